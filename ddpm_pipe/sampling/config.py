"""The configs of `generate` and `timesteps`: which model is sampled and how, and what is drawn or searched."""

import re
from typing import Any, Literal, Self

from pydantic import field_validator, model_validator

from ddpm_pipe.checks import check_choice
from ddpm_pipe.config import CompileMode, Config, Float, JsonDict, Place, PositiveInt

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
"""Short name or class name -> the class, and the options that make it what the name says.

This package has its own DDPM and DDIM; the rest come from diffusers. Other schedulers of diffusers are left out,
because they use noise levels that a DDPM was not trained on or, as DPMSolverSDEScheduler does, draw noise without the
images' generators.
"""

MAX_SEEDS = 10_000_000
"""Largest number of seeds that a config may name; the list of more seeds would itself fill the memory."""


class LoadConfig(Config):
    """Model"""

    model: Place
    """a pipeline folder, or the id of a repository on the Hub"""
    revision: str | None = None
    """branch, tag or commit of a model on the Hub"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """precision of the network"""


class SampleConfig(LoadConfig):
    """Sampler"""

    compile: CompileMode = "none"
    """mode in which torch.compile compiles the network; the last two use CUDA graphs"""
    batch_size: PositiveInt = 64
    """images that a process draws at a time"""
    scheduler: str | None = None
    """ddpm, ddim, dpm++, dpm++sde, dpm++single, unipc, deis, pndm, lms, euler, euler_a, heun, kdpm2, kdpm2_a, or the
    class name of one of these; the model's own scheduler if not given"""
    scheduler_options: JsonDict = {}
    """config keys of the scheduler that replace the model's, as JSON"""
    steps: PositiveInt | None = None
    """number of sampling steps; all timesteps that the model was trained with if not given"""
    eta: Float = 0.0
    """amount of noise that DDIM adds, from 0 (none) to 1 (as much as DDPM)"""
    class_labels: str | None = None
    """balanced for all classes, or class numbers with commas between; the seeds take them in turn"""
    guidance_scale: Float = 1.0
    """scale of guidance, away from images without a class or from those of the guide; 1 applies none"""
    guide: Place | None = None
    """a weaker model, such as an earlier or smaller one: a pipeline folder, or the id of a repository on the Hub"""

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

    @model_validator(mode="after")
    def _guided(self) -> Self:
        if self.guide is not None and self.guidance_scale == 1:
            raise ValueError(f"guide={self.guide!r} needs a guidance_scale other than 1, which applies no guidance.")
        return self

    def call_options(self) -> dict[str, Any]:
        """Return the options that `sample_images` takes."""
        names = ("eta", "class_labels", "guidance_scale")
        return {"num_inference_steps": self.steps} | {name: getattr(self, name) for name in names}


class GenerateConfig(SampleConfig):
    """Images to draw"""

    seeds: str = "0-63"
    """seeds, one for each image: numbers and ranges with commas between, such as 0-49999"""
    output_dir: Place = "runs/generated"
    """folder of the images; if it already holds some of the same model and settings, only the others are drawn"""
    output_format: Literal["png", "zip", "parquet"] = "png"
    """png writes one file for each image; zip and parquet write files of many images"""
    shard_size: PositiveInt = 1000
    """number of images in one zip or parquet file"""

    @model_validator(mode="after")
    def _check(self) -> Self:
        parse_seeds(self.seeds)
        return self


class TimestepsConfig(SampleConfig):
    """Search"""

    steps: PositiveInt
    """number of timesteps that are searched"""
    reference_steps: PositiveInt = 100
    """number of steps of DPM-Solver++ (dpm++) for the solution that the few steps are to come close to"""
    num_images: PositiveInt = 64
    """number of images that the search compares, and of others on which its result is checked"""

    @model_validator(mode="after")
    def _unguided(self) -> Self:
        if self.guide is not None:
            raise ValueError("guide must not be given: the pipeline would keep the timesteps and not the guide.")
        return self


def parse_seeds(text: str) -> list[int]:
    """Parse text such as "0-49999" or "1,5,7-9", and return its seeds in increasing order, each once.

    Raises:
        ValueError: where the text is not of this form, or names more than `MAX_SEEDS` seeds.
    """
    ranges = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", part.strip())  # longer ones may not fit in 64 bits
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
