"""Which model is sampled and how, and which images are drawn."""

import re
from typing import Any, Literal, Self

from pydantic import field_validator, model_validator

from ddpm_pipe.checks import check_choice
from ddpm_pipe.config import Config, Float, JsonDict, Place, PositiveInt

ALIASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpm": ("DDPMScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "dpm++sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++single": ("DPMSolverSinglestepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "kdpm2_a": ("KDPM2AncestralDiscreteScheduler", {}),
}
SCHEDULERS = ALIASES | {name: (name, {}) for name, _ in ALIASES.values()}
"""Short name or class name -> class and the options that make it what the name says.

DDPM and DDIM are those of this package. The others of diffusers have noise levels that a DDPM was not trained on, or,
as DPMSolverSDEScheduler, noise that is not that of the images' generators.
"""

MAX_SEEDS = 10_000_000
"""Images that one call of `generate` draws at most; more would fill the memory with their seeds alone."""


class SampleConfig(Config):
    """Model and sampler"""

    model: Place
    """a pipeline folder, or the id of a repository on the Hub"""
    revision: str | None = None
    """branch, tag or commit of a model on the Hub"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """precision of the network"""
    batch_size: PositiveInt = 64
    """images that a process draws at a time"""
    scheduler: str | None = None
    """ddpm, ddim, dpm++, dpm++sde, dpm++single, unipc, deis, pndm, lms, euler, euler_a, heun, kdpm2, kdpm2_a, or the
    class of one; the model's own if not given"""
    scheduler_options: JsonDict = {}
    """config keys of the scheduler other than the model's, as JSON"""
    steps: PositiveInt | None = None
    """timesteps of sampling; all that the model was trained with if not given"""
    eta: Float = 0.0
    """noise of DDIM, 0 to 1"""
    class_labels: str | None = None
    """balanced, or classes with commas between; the seeds take them in turn"""
    guidance_scale: Float = 1.0
    """classifier-free guidance; 1 is none"""

    @field_validator("scheduler")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        if name is not None:
            check_choice("scheduler", name, SCHEDULERS)
        return name

    @field_validator("class_labels")
    @classmethod
    def _without_blanks(cls, labels: str | None) -> str | None:
        return labels and labels.replace(" ", "")

    def call_options(self) -> dict[str, Any]:
        """The options of `sample_images`."""
        names = ("eta", "class_labels", "guidance_scale")
        return {"num_inference_steps": self.steps} | {name: getattr(self, name) for name in names}


class GenerateConfig(SampleConfig):
    """Images to draw"""

    seeds: str = "0-63"
    """one image per seed: numbers and ranges with commas between, as 0-49999"""
    output_dir: Place = "runs/generated"
    """folder of the images; one that already holds images of the same model is completed"""
    output_format: Literal["png", "zip", "parquet"] = "png"
    """files of one image each, or shards of many"""
    shard_size: PositiveInt = 1000
    """images in a zip or parquet file"""

    @model_validator(mode="after")
    def _check(self) -> Self:
        parse_seeds(self.seeds)
        return self


def parse_seeds(text: str) -> list[int]:
    """The seeds of "0-49999" or "1,5,7-9", increasing and each once.

    Raises:
        ValueError: where it is not of this form, or holds more than `MAX_SEEDS`.
    """
    ranges = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", part.strip())  # more digits fit no 64-bit integer
        if not match or int(match[1]) > int(match[2] or match[1]):
            raise ValueError(
                f"seeds={text!r} must be numbers of up to 18 digits and ranges with commas between, as 0-49999 or "
                "1,5,7-9."
            )
        ranges.append(range(int(match[1]), int(match[2] or match[1]) + 1))
    count = sum(part.stop - part.start for part in ranges)
    if count > MAX_SEEDS:
        raise ValueError(f"seeds={text!r} are {count:,} images; a folder takes at most {MAX_SEEDS:,}.")
    return sorted(set().union(*ranges))
