"""Which model is sampled and how: any scheduler by name, one seed per image, and the protocol that says so."""

import hashlib
import inspect
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from accelerate import PartialState
from diffusers import ModelMixin, SchedulerMixin
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import Tensor

from ddpm_pipe.checkpoint import sha256
from ddpm_pipe.compatibility import check_scheduler
from ddpm_pipe.config import Config, JsonDict, option
from ddpm_pipe.noise import check_choice
from ddpm_pipe.pipeline import null_class
from ddpm_pipe.portable import SAMPLERS, DDPMPipeline

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

DTYPES = ("float32", "bfloat16", "float16")

Batch = tuple[list[int], Tensor, list[int] | None]
"""Seeds, uint8 images (B, C, H, W) and labels of a batch; no labels for images without a class."""


@dataclass
class SampleConfig(Config):
    """Which model to sample, and how."""

    model: str = field(metadata={"help": "a pipeline folder, or the id of a repository on the Hub"})
    revision: str | None = option(None, "branch, tag or commit of a model on the Hub")
    dtype: str = option("float32", f"of the network: {', '.join(DTYPES)}")
    batch_size: int = option(64, "images that a process draws at a time")
    scheduler: str | None = option(None, f"one of {', '.join(ALIASES)}, or their class; the model's own if not given")
    scheduler_options: JsonDict = field(
        default_factory=JsonDict, metadata={"help": "config keys of the scheduler other than the model's, as JSON"}
    )
    steps: int | None = option(None, "timesteps of sampling; all that the model was trained with if not given")
    eta: float = option(0.0, "noise of DDIM, 0 to 1")
    class_labels: str | None = option(None, "balanced, or classes with commas between; seeds take them in turn")
    guidance_scale: float = option(1.0, "classifier-free guidance; 1 is none")

    def __post_init__(self):
        super().__post_init__()
        self.class_labels = None if self.class_labels is None else self.class_labels.replace(" ", "")
        check_choice("dtype", self.dtype, DTYPES)
        if self.scheduler is not None:
            check_choice("scheduler", self.scheduler, SCHEDULERS)
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1.")

    def call_options(self) -> dict[str, Any]:
        """The options of `sample_images`."""
        names = ("eta", "class_labels", "guidance_scale")
        return {"num_inference_steps": self.steps} | {name: getattr(self, name) for name in names}


def processes() -> PartialState:
    """The processes of this launch; those that are done wait for the others, for days."""
    # said outright, so that several processes on CPUs find each other
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=30))


# ---------------------------------------------------------------- images in memory


def sample_images(
    pipeline: DDPMPipeline, seeds: list[int], batch_size: int, class_labels: str | None = None, **options: Any
) -> Iterator[Batch]:
    """Draw one image per seed, which depends on that seed alone, to the rounding of the network in other batches.

    Args:
        pipeline: whose call draws the images.
        seeds: each the seed of a CPU generator of all noise of its image.
        batch_size: images at a time, at least 1.
        class_labels: as in `label_cycle`.
        options: more keywords of the call.

    Yields:
        Seeds, uint8 images (B, C, H, W) on the CPU, and labels or None, up to `batch_size` of each.

    Raises:
        ValueError: for options that this network or scheduler cannot honour, or images that are not finite.
    """
    cycle = label_cycle(pipeline.unet, class_labels)
    for start in range(0, len(seeds), batch_size):
        batch = seeds[start : start + batch_size]
        labels = cycle and [cycle[seed % len(cycle)] for seed in batch]
        # generators of the CPU: the noise is the same on every device
        generators = [torch.Generator().manual_seed(seed) for seed in batch]
        images = pipeline(len(batch), generators, class_labels=labels, output_type="pt", **options)[0]
        if not images.isfinite().all():
            raise ValueError(
                f"the images of seeds {batch[0]} to {batch[-1]} are not finite in {pipeline.unet.dtype}; choose "
                "another dtype or scheduler."
            )
        yield batch, (images * 255).round().to(torch.uint8).cpu(), labels


def label_cycle(unet: ModelMixin, class_labels: str | None) -> list[int] | None:
    """The classes that the seeds take in turn: the label of a seed is `cycle[seed % len(cycle)]`.

    Args:
        unet: the network.
        class_labels: "balanced" for all classes, or classes with commas between; None draws without a class.

    Raises:
        ValueError: for classes that the network does not have.
    """
    if class_labels is None:
        return None
    count = null_class(unet)
    if count is None:
        raise ValueError(f"class_labels={class_labels!r} needs a network with classes; this one has none.")
    if class_labels == "balanced":
        return list(range(count))
    cycle = [int(label) if label.isdecimal() else count for label in class_labels.split(",")]
    if max(cycle) >= count:
        raise ValueError(
            f"class_labels={class_labels!r} must be balanced, or classes from 0 to {count - 1} with commas between."
        )
    return cycle


# ---------------------------------------------------------------- the model and its protocol


def pipeline_for(config: SampleConfig) -> DDPMPipeline:
    """The model of the config with its scheduler plugged in, on the CPU.

    Raises:
        ValueError: for a model, scheduler, option or count of steps that cannot be.
    """
    local = Path(config.model).is_dir()
    if local and config.revision is not None:
        raise ValueError(
            f"revision={config.revision!r} is of a repository on the Hub, and model={config.model!r} a folder."
        )
    try:
        folder = config.model if local else DDPMPipeline.download(config.model, revision=config.revision)
    except HFValidationError as error:
        raise ValueError(f"model={config.model!r} is neither a folder here nor the id of a repository.") from error
    pipeline = DDPMPipeline.from_pretrained(folder)
    if config.dtype != "float32":
        pipeline.unet.to(getattr(torch, config.dtype))
    pipeline.set_progress_bar_config(disable=True)
    steps = pipeline.scheduler.config.num_train_timesteps
    if config.steps is not None and not 1 <= config.steps <= steps:
        raise ValueError(f"steps={config.steps} must lie between 1 and the {steps} that the model was trained with.")
    pipeline.scheduler = plug_in(
        pipeline.scheduler, config.scheduler, config.scheduler_options, fewer=config.steps not in (None, steps)
    )
    return pipeline


def plug_in(own: SchedulerMixin, name: str | None, options: dict[str, Any], fewer: bool) -> SchedulerMixin:
    """Another scheduler in the place of the model's own.

    Args:
        own: the scheduler of the model.
        name: a key of `SCHEDULERS`; None keeps the class.
        options: config keys that differ from those of `own`.
        fewer: whether it takes fewer steps than there are timesteps; a named one then starts at the last, pure noise.

    Raises:
        ValueError: for options that the class does not take, or one that cannot sample what was trained with `own`.
    """
    class_name, implied = (type(own).__name__, {}) if name is None else SCHEDULERS[name]
    cls = type(own) if name is None else SAMPLERS.get(class_name) or getattr(diffusers, class_name)
    accepted = [key for key in inspect.signature(cls.__init__).parameters if key not in ("self", "kwargs")]
    for key in options:
        check_choice("scheduler_options", key, accepted)
    if name is not None and fewer and "timestep_spacing" in accepted:
        implied = implied | {"timestep_spacing": "trailing"}
    try:
        scheduler = cls.from_config(own.config, **(implied | options))
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        raise ValueError(f"scheduler_options={json.dumps(options)} do not suit {class_name}: {error}") from error
    check_scheduler(scheduler, own)
    return scheduler


def protocol(config: SampleConfig, pipeline: DDPMPipeline) -> dict[str, Any]:
    """All that decides about the images: what `pipeline_for` made of the config, and how it is sampled; as JSON has it.

    A schedule of betas that the scheduler's config spells out is given as its checksum, an infinite number as a text.
    """
    scheduler = {key: value for key, value in pipeline.scheduler.config.items() if not key.startswith("_")}
    if scheduler.get("trained_betas") is not None:
        betas = np.asarray(scheduler["trained_betas"], np.float64)
        scheduler["trained_betas"] = hashlib.sha256(betas.tobytes()).hexdigest()
    cycle = label_cycle(pipeline.unet, config.class_labels)
    entries = {
        "model": shared_name(config.model),  # the weights are known by their checksums
        "revision": config.revision,
        "unet_sha256": weights_sha256(Path(pipeline.name_or_path)),
        "scheduler": {"class": type(pipeline.scheduler).__name__} | scheduler,
        "steps": config.steps or pipeline.scheduler.config.num_train_timesteps,
        "eta": config.eta,
        "guidance_scale": config.guidance_scale,
        "class_labels": config.class_labels,
        "label_of_an_image": cycle and f"entry seed % {len(cycle)}, from 0, of {_shortened(cycle)}",
        "dtype": config.dtype,
        "versions": {name: version(name) for name in ("ddpm_pipe", "torch", "diffusers")},
    }
    return json.loads(json.dumps(entries), parse_constant=str)


def shared_name(place: str) -> str:
    """What others are told of where a model or data are: the id of a repository; of a path, whether or not it is there
    now, only the last part."""
    try:
        validate_repo_id(place)
        is_id = not Path(place).exists()
    except HFValidationError:
        is_id = False
    return place if is_id else Path(place).expanduser().resolve().name


def weights_sha256(pipeline: Path) -> dict[str, str]:
    """The checksums of the files of weights in a pipeline folder, by name: what tells one model from another."""
    return {path.name: sha256(path) for path in sorted((pipeline / "unet").glob("*.safetensors"))}


def _shortened(cycle: list[int]) -> str:
    return f"the classes 0 to {len(cycle) - 1}" if cycle == list(range(len(cycle))) else str(cycle)


def try_out(config: SampleConfig, pipeline: DDPMPipeline) -> None:
    """Take the first step of one image, so that what cannot work is known before anything is written.

    Raises:
        ValueError: for anything that this network or scheduler cannot honour.
    """

    class FirstStep(Exception):
        pass

    def stop(*_: Any) -> None:
        raise FirstStep

    try:
        list(sample_images(pipeline, [0], 1, callback_on_step_end=stop, **config.call_options()))
    except FirstStep:
        pass
    except (NotImplementedError, TypeError, ImportError, IndexError) as error:
        name = type(pipeline.scheduler).__name__
        raise ValueError(f"{name} cannot sample this model with these options: {error}") from error
