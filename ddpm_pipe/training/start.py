"""Start a run from a trained model: what its config takes over, which weights are copied, and which are not.

All of this happens once, before the first step. The config in the run folder then gives every key, and the checkpoints
hold the weights, so a resumed run does not read the model again.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import ModelMixin, SchedulerMixin
from torch import Tensor

from ddpm_pipe.compatibility import same_levels
from ddpm_pipe.noise import BETA_SCHEDULES
from ddpm_pipe.pretrained import DDPMPipeline
from ddpm_pipe.run.checkpoint import Checkpoints
from ddpm_pipe.run.folder import Run
from ddpm_pipe.schedulers import DDPMScheduler
from ddpm_pipe.training.config import TrainConfig
from ddpm_pipe.training.recipe import make_scheduler

BETAS = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "rescale_betas_zero_snr")
"""Keys that give the noise levels. They have the same names in the config of a run and in that of a scheduler."""
CHAIN = (*BETAS, "prediction_type", "variance_type")
FROM_DATA = ("sample_size", "in_channels", "out_channels", "num_class_embeds")
"""Keys of a network that the run's own data and variance decide."""

SIZED = {
    "conv_in.weight": (1, "input channels"),
    "class_embedding.weight": (0, "class embeddings"),
    "conv_out.weight": (0, "output channels"),
    "conv_out.bias": (0, "output channels"),
}
"""Weights whose size along one axis the data and the variance decide -> this axis, and what it counts."""


class Source(NamedTuple):
    """What a run needs of the model that it starts from.

    Attributes:
        model: the id of the model on the Hub; None for a folder, whose name is private.
        unet: class and config of the network, as a run's config has them.
        chain: the keys of `CHAIN` that its scheduler has; not beta_schedule where none makes its noise levels.
        weights: name -> tensor of the network; empty for a run that resumes, whose checkpoint has them.
        alpha_bar: the noise levels of its scheduler, (T,); (0,) where it has none, or the run resumes.
        told: for a run that resumes, what was copied at its start.
    """

    model: str | None
    unet: dict[str, Any]
    chain: dict[str, Any]
    weights: dict[str, Tensor]
    alpha_bar: Tensor
    told: str = ""


# ---------------------------------------------------------------- reading the model


def find_source(config: TrainConfig, run: Run) -> Source | None:
    """Read the model that `init_from` names, or what a run that has a checkpoint to resume from kept of it.

    Raises:
        ValueError: where it is neither a pipeline, nor a run with one, nor the id of one, or cannot be read.
    """
    if config.init_from is None:
        return None
    if config.resume and Checkpoints(run).steps():
        saved, start = run.read_config(), run.read_plan().get("start")
        chain = {key: saved[key] for key in CHAIN if key in saved}
        return Source(start["model"], saved["unet"], chain, {}, torch.empty(0), start["told"]) if start else None
    pipeline, model = load(config.init_from)
    levels = noise_levels(pipeline.scheduler)
    return Source(model, describe(pipeline.unet), chain_of(pipeline.scheduler), pipeline.unet.state_dict(), levels)


def load(place: str) -> tuple[DDPMPipeline, str | None]:
    """Load the pipeline that `init_from` names, and return with it the id of one that comes from the Hub.

    Raises:
        ValueError: as in `find_source`.
    """
    folder = Path(place).expanduser()
    if folder.is_file():
        raise ValueError(f"init_from={place!r} is a file; ddpm-pipe convert makes a pipeline folder of a checkpoint.")
    if Run(folder).pipeline.is_dir():
        folder = Run(folder).pipeline
    try:
        return (DDPMPipeline.from_pretrained(folder), None) if folder.is_dir() else (_from_hub(place), place)
    except ValueError as error:
        raise ValueError(f"init_from: {error}") from error


def _from_hub(name: str) -> DDPMPipeline:
    try:
        return DDPMPipeline.from_pretrained(name)
    except OSError as error:  # not all that the client raises can be sent to the other processes
        reason = " ".join(str(error).split()).removesuffix(".")
        raise ValueError(f"{name!r} is no folder here, and the Hub does not give it: {reason}.") from error


def describe(network: ModelMixin) -> dict[str, Any]:
    """Return class and config of a network with values of JSON, as a run's config has them."""
    config = {key: value for key, value in network.config.items() if not key.startswith("_")}
    return {"_class_name": type(network).__name__} | json.loads(json.dumps(config))


def noise_levels(scheduler: SchedulerMixin) -> Tensor:
    """Return alpha_bar of a scheduler, (T,); (0,) where it has none."""
    return getattr(scheduler, "alphas_cumprod", torch.empty(0)).cpu()


def chain_of(scheduler: SchedulerMixin) -> dict[str, Any]:
    """Return the keys of `CHAIN` that a scheduler has; not beta_schedule where none makes its noise levels."""
    chain = {key: scheduler.config[key] for key in CHAIN if scheduler.config.get(key) is not None}
    named = {key: chain[key] for key in BETAS if key in chain}
    known = named.get("beta_schedule") in BETA_SCHEDULES
    if not known or not same_levels(noise_levels(DDPMScheduler(**named)), noise_levels(scheduler)):
        chain.pop("beta_schedule", None)
    return chain


# ---------------------------------------------------------------- the config


def take_over(config: TrainConfig, source: Source | None) -> TrainConfig:
    """Return the config with the network and the chain of the source; keys that were given keep their values.

    Raises:
        ValueError: where the two networks are of different classes, the noise levels have no name, or the source has a
            value that a run does not accept.
    """
    if source is None:
        return config
    place, theirs = f"init_from={config.init_from!r}", source.unet["_class_name"]
    name = config.unet.get("_class_name", theirs)
    if name != theirs:
        raise ValueError(f"unet._class_name={name!r}, but {place} has a {theirs}; give no unet, nor a preset with one.")
    given = config.model_fields_set
    if "beta_schedule" in given:
        given = given | {"beta_start", "beta_end"}  # a range belongs to its schedule
    elif "beta_schedule" not in source.chain:
        raise ValueError(f"{place} has noise levels that no beta_schedule makes; give beta_schedule.")
    unet = {key: value for key, value in source.unet.items() if key not in FROM_DATA}
    chain = {
        key: getattr(config, key) if key in given else source.chain.get(key, getattr(config, key)) for key in CHAIN
    }
    try:
        return config.replace(unet=unet | config.unet, **chain)
    except ValueError as error:
        raise ValueError(f"with what {place} gives, {error}") from error


# ---------------------------------------------------------------- the weights


def start_from(source: Source, unet: ModelMixin, config: TrainConfig) -> dict[str, str | None]:
    """Copy the weights of the source into the network of a run; those that do not fit stay as they were initialised.

    Args:
        source: the trained model.
        unet: the network, changed in place.
        config: the config of the run, after `take_over`.

    Returns:
        For the plan: `model`, as in `Source`, and `told`, which says what was copied and what was not, and why.

    Raises:
        ValueError: where the blocks of the networks differ by more than their number of levels, naming the keys.
    """
    if not source.weights:
        return {"model": source.model, "told": source.told}
    changes = copy_weights(source, unet, config)
    told = ["weights copied" if changes else "all weights copied", *changes]
    size, before = (_size(network["sample_size"]) for network in (describe(unet), source.unet))
    if size != before is not None:
        told.append(f"images are {size}, not {before}, which all weights fit")
    meaning = source.chain.get("prediction_type", config.prediction_type)
    if config.prediction_type != meaning:
        told.append(f"the output now means {config.prediction_type}, not {meaning}")
    if not same_levels(noise_levels(make_scheduler(config)), source.alpha_bar):
        told.append("the noise levels are others")
    return {"model": source.model, "told": "; ".join(told)}


def copy_weights(source: Source, unet: ModelMixin, config: TrainConfig) -> list[str]:
    """Copy the weights that fit, and return a clause for each part that was re-initialised or left out.

    Raises:
        ValueError: as in `start_from`.
    """
    ours, images = unet.state_dict(), unet.config.in_channels
    levels, before = (len(network["block_out_channels"]) for network in (unet.config, source.unet))
    theirs = {_renumbered(name, levels - before): weight for name, weight in source.weights.items()}
    copied = {name: theirs[name] for name in ours if name in theirs and theirs[name].shape == ours[name].shape}
    other = sorted((ours.keys() | theirs.keys()) - copied.keys())
    deep = [name for name in other if levels != before and _level(name, levels) >= min(levels, before) - 1]
    if other_blocks := [name for name in other if name not in SIZED and name not in deep]:
        raise ValueError(_misfit(source, unet, config, other_blocks[0]))
    changes = []
    for name in (name for name in SIZED if name in other):
        axis, counted = SIZED[name]
        now, then = (weights[name].shape[axis] if name in weights else 0 for weights in (ours, theirs))
        done = "re-initialised" if now else "left out"
        if name.startswith("conv_out") and images == source.unet["in_channels"]:
            copied[name] = torch.cat([theirs[name][:images], ours[name][images:]])  # the mean comes before the variance
            done = "re-initialised for the variance" if now > then else "cut to the mean"
        changes.append(f"{name.split('.')[0]} {done} ({now} {counted}, not {then})")
    if deep:
        blocks = sorted({re.sub(r"^(\w+(\.\d+)?).*", r"\1", name) for name in deep if name in ours})
        changes.append(f"{', '.join(blocks)} re-initialised where they differ ({levels} levels, not {before})")
    unet.load_state_dict(copied, strict=False)
    return list(dict.fromkeys(changes))


def _renumbered(name: str, new_levels: int) -> str:
    """Return the name of a weight in a network with `new_levels` more: blocks on the way up count from the lowest."""
    return re.sub(r"^up_blocks\.(\d+)", lambda match: f"up_blocks.{int(match[1]) + new_levels}", name)


def _level(name: str, levels: int) -> int:
    """Return the level of a weight, 0 for the highest resolution: `levels` for the middle, -1 for what has none."""
    if match := re.match(r"(down|up)_blocks\.(-?\d+)", name):
        return int(match[2]) if match[1] == "down" else levels - 1 - int(match[2])
    return levels if name.startswith("mid_") else -1


def _misfit(source: Source, unet: ModelMixin, config: TrainConfig, weight: str) -> str:
    ours = describe(unet)
    keys = [key for key, value in source.unet.items() if key not in FROM_DATA and ours[key] != value]
    told = " and ".join(f"{key}={source.unet[key]!r}, not {ours[key]!r}" for key in keys)
    return (
        f"init_from={config.init_from!r} has other blocks ({told}), as its weight {weight!r}; give unet without them."
    )


def _size(sample_size: int | list[int] | None) -> str | None:
    """Return width and height of images in words; None where they are not known."""
    height, width = sample_size if isinstance(sample_size, list) else (sample_size, sample_size)
    return None if height is None else f"{width}x{height}"
