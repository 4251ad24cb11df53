"""What a user says of a checkpoint: where it is, where its pipeline goes, and what its file does not tell."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from ddpm_pipe.checks import check_choice
from ddpm_pipe.config import Config

OBJECTIVES = {"pred_noise": "epsilon", "pred_x0": "sample", "pred_v": "v_prediction"}
"""What denoising-diffusion-pytorch calls the output of a network -> `prediction_type` of our schedulers."""

SCHEDULES = {"linear": "linear_rescaled", "cosine": "squaredcos_cap_v2"}
"""What improved-diffusion calls a noise schedule -> `beta_schedule` of our schedulers."""

CHOICES: dict[str, Collection[str]] = {
    "weights": ("ema", "raw"),
    "objective": OBJECTIVES,
    "beta_schedule": SCHEDULES,
    "variance_type": ("fixed_large", "fixed_small"),
}
"""Field of the config -> the values that it accepts."""


@dataclass
class ConvertConfig(Config):
    """What to convert, and what its file does not say."""

    source: str = field(metadata={"help": "a checkpoint file, or a folder or Hub id of a pipeline of diffusers"})
    output_dir: str = field(metadata={"help": "a new folder for the pipeline"})
    image_size: list[int] | None = field(
        default=None, metadata={"help": "size, or height and width, of the images; needed for files"}
    )
    weights: str | None = field(
        default=None, metadata={"help": "ema (the average) or raw; by default the average where the file has one"}
    )
    objective: str | None = field(
        default=None,
        metadata={
            "help": "pred_noise, pred_x0 or pred_v; told by the file of denoising-diffusion-pytorch 1.5 and later"
        },
    )
    version: str | None = field(
        default=None,
        metadata={"help": "of denoising-diffusion-pytorch, where the file is from before 1.8 and lacks it"},
    )
    sinusoidal_pos_emb_theta: float | None = field(
        default=None, metadata={"help": "of denoising-diffusion-pytorch, where the network was made with another"}
    )
    auto_normalize: bool = field(
        default=True, metadata={"help": "of denoising-diffusion-pytorch: whether images were brought to [-1, 1]"}
    )
    num_heads: int | None = field(default=None, metadata={"help": "attention heads, where the shapes do not tell"})
    head_dim: int | None = field(default=None, metadata={"help": "num_head_channels of guided-diffusion"})
    norm_num_groups: int | None = field(default=None, metadata={"help": "groups of a GroupNorm, where not the usual"})
    timesteps: int | None = field(default=None, metadata={"help": "T; needed where the file has weights only"})
    beta_schedule: str | None = field(
        default=None, metadata={"help": "linear or cosine; needed where the file has weights only"}
    )
    variance_type: str = field(
        default="fixed_large", metadata={"help": "fixed_large or fixed_small, of a file that has weights only"}
    )
    rescale_timesteps: bool = field(
        default=False, metadata={"help": "improved-diffusion's: the network is shown t * 1000 / T"}
    )
    new_attention_order: bool = field(default=False, metadata={"help": "guided-diffusion's use_new_attention_order"})

    def __post_init__(self):
        """Check the values.

        Raises:
            ValueError: for one that is unknown or too small, naming it.
        """
        super().__post_init__()
        for name, accepted in CHOICES.items():
            if getattr(self, name) is not None:
                check_choice(name, getattr(self, name), accepted)
        for name in ("num_heads", "head_dim", "norm_num_groups", "timesteps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.image_size is not None and (len(self.image_size) not in (1, 2) or min(self.image_size) < 1):
            raise ValueError(f"image_size={self.image_size} must be a size, or a height and a width, of at least 1.")

    def needed(self, name: str) -> Any:
        """A value that the file does not tell.

        Raises:
            ValueError: where it is not given.
        """
        value = getattr(self, name)
        if value is None:
            choices = f", one of {', '.join(CHOICES[name])}" if name in CHOICES else ""
            raise ValueError(f"{name} must be given{choices}: the file does not tell it.")
        return value

    @property
    def sample_size(self) -> int | tuple[int, int]:
        """`image_size`, as a network's config has it."""
        size = self.needed("image_size")
        return size[0] if len(size) == 1 else tuple(size)
