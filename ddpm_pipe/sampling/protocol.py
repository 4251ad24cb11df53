"""Sample a model with any scheduler and one seed per image, and record in a protocol how it was sampled."""

import hashlib
import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import ModelMixin, SchedulerMixin
from huggingface_hub.errors import HFValidationError
from torch import Tensor

from ddpm_pipe.compatibility import check_scheduler
from ddpm_pipe.pipeline import null_class
from ddpm_pipe.pretrained import DDPMPipeline
from ddpm_pipe.samplers import OWN_SCHEDULERS, Sampler, accepted_keys, make_scheduler
from ddpm_pipe.sampling.config import SCHEDULERS, LoadConfig, SampleConfig
from ddpm_pipe.sharing.privacy import shared_name
from ddpm_pipe.weights import weights_sha256

Batch = tuple[list[int], Tensor, list[int] | None]
"""Seeds, uint8 images (B, C, H, W) and labels of a batch; the labels are None for images without a class."""


# ---------------------------------------------------------------- images in memory


def sample_images(
    pipeline: DDPMPipeline, seeds: list[int], batch_size: int, class_labels: str | None = None, **options: Any
) -> Iterator[Batch]:
    """Draw one image per seed. It depends on that seed alone, up to rounding, which may vary with the batch.

    Args:
        pipeline: draws the images.
        seeds: each one seeds a CPU generator, which draws all noise of its image.
        batch_size: number of images drawn at a time, at least 1.
        class_labels: as in `label_cycle`.
        options: more keywords for the call of the pipeline.

    Yields:
        Seeds, uint8 images (B, C, H, W) on the CPU, and labels or None, up to `batch_size` of each.

    Raises:
        ValueError: for options that this network or scheduler cannot honour, or images that are not finite.
    """
    cycle = label_cycle(pipeline.unet, class_labels)
    for start in range(0, len(seeds), batch_size):
        batch = seeds[start : start + batch_size]
        labels = cycle and [cycle[seed % len(cycle)] for seed in batch]
        # CPU generators draw the same noise whatever the device
        generators = [torch.Generator().manual_seed(seed) for seed in batch]
        images = pipeline(len(batch), generators, class_labels=labels, output_type="pt", **options)[0]
        if not images.isfinite().all():
            raise ValueError(
                f"the images of seeds {batch[0]} to {batch[-1]} are not finite in {pipeline.unet.dtype}; choose "
                "another dtype or scheduler."
            )
        yield batch, (images * 255).round().to(torch.uint8).cpu(), labels


def label_cycle(unet: ModelMixin, class_labels: str | None) -> list[int] | None:
    """Return the classes that the seeds take in turn: the label of a seed is `cycle[seed % len(cycle)]`.

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


def load_model(config: LoadConfig, key: str = "model") -> DDPMPipeline:
    """Load the model of the config onto the CPU.

    Args:
        config: names the model.
        key: what a config that is wrong calls it.

    Raises:
        ValueError: for a model or revision that is not valid, or files that are damaged.
        OSError: where a repository or revision does not exist or may not be read.
    """
    folder = find_pipeline(config.model, config.revision, key)
    return DDPMPipeline.from_pretrained(folder, torch_dtype=getattr(torch, config.dtype))


def find_pipeline(place: str, revision: str | None = None, key: str = "model") -> Path:
    """Return the folder of the pipeline that `key` of a config names; one on the Hub is downloaded first.

    Raises:
        ValueError: where there is no such pipeline.
    """
    if not Path(place).is_dir():
        try:
            return Path(DDPMPipeline.download(place, revision=revision))
        except HFValidationError as error:
            raise ValueError(f"{key}={place!r} is neither a folder here nor the id of a repository.") from error
    if revision is not None:
        raise ValueError(f"revision={revision!r} is of a repository on the Hub, and {key}={place!r} a folder.")
    return Path(place)


def pipeline_for(config: SampleConfig) -> DDPMPipeline:
    """Load the model of the config, and its guide, onto the CPU, and give it the scheduler of the config.

    Raises:
        ValueError: for a model, scheduler, option or number of steps that is not valid.
    """
    pipeline = load_model(config)
    pipeline.set_progress_bar_config(disable=True)
    steps = pipeline.scheduler.config.num_train_timesteps
    if config.steps is not None and not 1 <= config.steps <= steps:
        raise ValueError(f"steps={config.steps} must lie between 1 and the {steps} that the model was trained with.")
    if config.guide is not None:
        guide = load_model(LoadConfig(model=config.guide, dtype=config.dtype), "guide")
        try:
            check_scheduler(guide.scheduler, pipeline.scheduler)
        except ValueError as error:
            raise ValueError(
                f"guide={config.guide!r} was trained for other noise levels than the model: {error}"
            ) from error
        pipeline.guide = guide.unet
    if config.compile != "none":
        for network in filter(None, (pipeline.unet, pipeline.guide)):
            network.compile(mode=config.compile)
    pipeline.scheduler = plug_in(
        pipeline.scheduler, config.scheduler, config.scheduler_options, fewer=config.steps not in (None, steps)
    )
    return pipeline


def plug_in(own: SchedulerMixin, name: str | None, options: dict[str, Any], fewer: bool) -> SchedulerMixin:
    """Make the scheduler that takes the place of the model's own.

    Args:
        own: the scheduler of the model.
        name: a key of `SCHEDULERS`; None keeps the class.
        options: config keys that differ from those of `own`.
        fewer: whether it takes fewer steps than there are timesteps; a scheduler that is given by name then starts at
            the last timestep, pure noise.

    Raises:
        ValueError: for options that the class does not take, or a scheduler that cannot sample a model that was trained
            with `own`.
    """
    class_name, implied = (type(own).__name__, {}) if name is None else SCHEDULERS[name]
    cls = type(own) if name is None else OWN_SCHEDULERS.get(class_name) or getattr(diffusers, class_name)
    if name is not None and fewer and "timestep_spacing" in accepted_keys(cls):
        implied = implied | {"timestep_spacing": "trailing"}
    scheduler = make_scheduler(cls, own, implied | options)
    check_scheduler(scheduler, own)
    return scheduler


def protocol(config: SampleConfig, pipeline: DDPMPipeline) -> dict[str, Any]:
    """Return everything that determines the images, as JSON values: the model, its scheduler, and how it is sampled.

    It names timesteps only where the pipeline carries them for this sampler. If the scheduler's config lists its betas,
    the protocol holds their checksum instead; it holds infinite numbers as text.
    """
    scheduler = {key: value for key, value in pipeline.scheduler.config.items() if not key.startswith("_")}
    if scheduler.get("trained_betas") is not None:
        betas = np.asarray(scheduler["trained_betas"], np.float64)
        scheduler["trained_betas"] = hashlib.sha256(betas.tobytes()).hexdigest()
    cycle = label_cycle(pipeline.unet, config.class_labels)
    entries = {
        "model": shared_name(config.model),  # the checksums identify the weights
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
    timesteps = learned_timesteps(config, pipeline)
    entries |= {} if timesteps is None else {"timesteps": timesteps}
    if config.guide is not None:
        folder = find_pipeline(config.guide, key="guide")
        entries |= {"guide": shared_name(config.guide), "guide_sha256": weights_sha256(folder)}
    return json.loads(json.dumps(entries), parse_constant=str)


def learned_timesteps(config: SampleConfig, pipeline: DDPMPipeline) -> list[int] | None:
    """Return the timesteps that the pipeline carries for the sampler of the config; None where it carries none."""
    return pipeline.learned_timesteps(config.steps, config.class_labels is not None, config.guidance_scale, config.eta)


def sampler_of(config: SampleConfig, pipeline: DDPMPipeline, timesteps: list[int] | None, how: str) -> Sampler:
    """Describe the sampler of the config, which the pipeline has, and how it was found."""
    return Sampler.of(
        pipeline.scheduler,
        pipeline.own_scheduler,
        steps=config.steps or pipeline.scheduler.config.num_train_timesteps,
        timesteps=timesteps,
        eta=config.eta,
        guidance_scale=config.guidance_scale,
        class_labels=config.class_labels,
        protocol=how,
    )


def _shortened(cycle: list[int]) -> str:
    return f"the classes 0 to {len(cycle) - 1}" if cycle == list(range(len(cycle))) else str(cycle)


def try_out(config: SampleConfig, pipeline: DDPMPipeline) -> None:
    """Take the first sampling step of one image, so that a config that cannot work fails before anything is written.

    Raises:
        ValueError: for anything that this network or scheduler cannot honour.
    """

    class FirstStep(Exception):
        pass

    def stop(*_: Any) -> None:
        raise FirstStep

    try:
        with torch.compiler.set_stance("force_eager"):  # it will be compiled for whole batches
            list(sample_images(pipeline, [0], 1, callback_on_step_end=stop, **config.call_options()))
    except FirstStep:
        pass
    except (NotImplementedError, TypeError, ImportError, IndexError) as error:
        name = type(pipeline.scheduler).__name__
        raise ValueError(f"{name} cannot sample this model with these options: {error}") from error
