"""What is converted, and what its file does not say."""

from typing import Any, Literal

from ddpm_pipe.config import Config, Float, Place, PositiveInt, Size

OBJECTIVES = {"pred_noise": "epsilon", "pred_x0": "sample", "pred_v": "v_prediction"}
"""What denoising-diffusion-pytorch calls the output of a network -> `prediction_type` of our schedulers."""

SCHEDULES = {"linear": "linear_rescaled", "cosine": "squaredcos_cap_v2"}
"""What improved-diffusion calls a noise schedule -> `beta_schedule` of our schedulers."""


class ConvertConfig(Config):
    """What to convert"""

    source: Place
    """a checkpoint file, or a folder or Hub id of a pipeline of diffusers"""
    output_dir: Place
    """a new folder for the pipeline"""
    image_size: Size | None = None
    """size, or height and width, of the images; needed for files"""
    weights: Literal["ema", "raw"] | None = None
    """which weights of the file: ema, the average, or raw; the average if not given, where there is one"""
    objective: Literal["pred_noise", "pred_x0", "pred_v"] | None = None
    """what the network predicts; the file of denoising-diffusion-pytorch 1.5 and later tells it"""
    version: str | None = None
    """version of denoising-diffusion-pytorch, where the file is from before 1.8 and lacks it"""
    sinusoidal_pos_emb_theta: Float | None = None
    """of denoising-diffusion-pytorch, where the network was made with another than 10000"""
    auto_normalize: bool = True
    """of denoising-diffusion-pytorch: whether images were brought to [-1, 1]"""
    num_heads: PositiveInt | None = None
    """attention heads, where the shapes do not tell"""
    head_dim: PositiveInt | None = None
    """num_head_channels of guided-diffusion"""
    norm_num_groups: PositiveInt | None = None
    """groups of a GroupNorm, where there are not the usual ones"""
    timesteps: PositiveInt | None = None
    """T; needed where the file has weights only"""
    beta_schedule: Literal["linear", "cosine"] | None = None
    """needed where the file has weights only"""
    variance_type: Literal["fixed_large", "fixed_small"] = "fixed_large"
    """variance of the sampler, of a file that has weights only"""
    rescale_timesteps: bool = False
    """of improved-diffusion: the network is shown t * 1000 / T"""
    new_attention_order: bool = False
    """use_new_attention_order of guided-diffusion"""

    def needed(self, name: str) -> Any:
        """A value that the file does not tell.

        Raises:
            ValueError: where it is not given.
        """
        value = getattr(self, name)
        if value is None:
            choices = {"objective": OBJECTIVES, "beta_schedule": SCHEDULES}.get(name)
            one_of = f", one of {', '.join(choices)}" if choices else ""
            raise ValueError(f"{name} must be given{one_of}: the file does not tell it.")
        return value

    @property
    def sample_size(self) -> int | tuple[int, int]:
        """`image_size`, as a network's config has it."""
        size = self.needed("image_size")
        return size[0] if len(size) == 1 else tuple(size)
