"""The config of `convert`: what is converted, and the settings that its file does not tell."""

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
    """size, or height and width, of the images in pixels; needed for files"""
    weights: Literal["ema", "raw"] | None = None
    """which weights of the file to take: ema, the average, or raw; if not given, the average where the file has one"""
    objective: Literal["pred_noise", "pred_x0", "pred_v"] | None = None
    """what the network predicts; a file of denoising-diffusion-pytorch 1.5 or later tells it"""
    version: str | None = None
    """version of denoising-diffusion-pytorch; needed where it is older than 1.8 and the file does not tell it"""
    sinusoidal_pos_emb_theta: Float | None = None
    """theta of the time embedding of denoising-diffusion-pytorch, where it is not 10000"""
    auto_normalize: bool = True
    """whether denoising-diffusion-pytorch scaled the images to [-1, 1] in training"""
    num_heads: PositiveInt | None = None
    """number of attention heads, where the shapes do not tell it"""
    head_dim: PositiveInt | None = None
    """width of an attention head, which guided-diffusion calls num_head_channels"""
    norm_num_groups: PositiveInt | None = None
    """number of groups of a GroupNorm, where it is not the usual one of the project"""
    timesteps: PositiveInt | None = None
    """number of timesteps T; needed where the file holds weights only"""
    beta_schedule: Literal["linear", "cosine"] | None = None
    """noise schedule; needed where the file holds weights only"""
    variance_type: Literal["fixed_large", "fixed_small"] = "fixed_large"
    """variance of the sampler, where the file holds weights only"""
    rescale_timesteps: bool = False
    """whether improved-diffusion gave the network t * 1000 / T instead of t"""
    new_attention_order: bool = False
    """whether guided-diffusion made the network with use_new_attention_order"""

    def needed(self, name: str) -> Any:
        """Return a setting that the file does not tell.

        Raises:
            ValueError: where the user has not given it.
        """
        value = getattr(self, name)
        if value is None:
            choices = {"objective": OBJECTIVES, "beta_schedule": SCHEDULES}.get(name)
            one_of = f", one of {', '.join(choices)}" if choices else ""
            raise ValueError(f"{name} must be given{one_of}: the file does not tell it.")
        return value

    @property
    def sample_size(self) -> int | tuple[int, int]:
        """`image_size` in the form of a network's config."""
        size = self.needed("image_size")
        return size[0] if len(size) == 1 else tuple(size)
