"""What a run prints and writes before its first step: the plan, the config, and changes since it was last started."""

import json
import math
import os
import platform
from datetime import timedelta
from importlib.metadata import version
from typing import Any

import torch

from ddpm_pipe.data.memory import ImageData
from ddpm_pipe.data.stream import ImageStream
from ddpm_pipe.run.files import replace_text
from ddpm_pipe.run.folder import Run
from ddpm_pipe.training.config import TrainConfig
from ddpm_pipe.training.settling import Settled
from ddpm_pipe.training.state import TrainState


def check_folder(config: TrainConfig, run: Run) -> None:
    """Check that training would neither mix with nor delete other contents of the run folder.

    Raises:
        ValueError: where the folder holds a run and neither `resume` nor `overwrite` is set, or where `overwrite` would
            delete the images to train on, the model to start from or something that is not a run.
    """
    if run.config.exists() and not (config.resume or config.overwrite):
        raise ValueError(f"output_dir={config.output_dir!r} holds a run; pass --resume, --overwrite or another folder.")
    if config.overwrite:
        run.check_clearable()
        run.check_apart("data", config.data)
        if config.init_from is not None:
            run.check_apart("init_from", config.init_from)


def print_changes(config: TrainConfig, run: Run) -> None:
    """Print the settings that differ from those the run was started with, since they may change its results."""
    before = run.read_config() if run.config.exists() else {}
    for name, value in before.items():
        now = getattr(config, name, value)
        if now != value and name not in ("resume", "overwrite", "plan"):
            print(f"resumed with {name}={now!r}, was {value!r}")


def announce(
    settled: Settled,
    data: ImageData | ImageStream,
    state: TrainState,
    run: Run,
    first: int,
    start: dict[str, Any] | None,
) -> None:
    """Print the plan, and write it and the config into the run folder, after all checks of the config have passed.

    With `config.plan` nothing is written. `first` is the step from which the run goes on, and `start` what
    `start_from` tells of the model that it starts from.
    """
    config, plan = settled.config, make_plan(settled, data, state) | {"start": start}
    started = [f"started from {config.init_from}: {start['told']}"] if start else []
    lines = [plan["data"], *data.notes(), plan["network"], *started]
    lines += [plan["batches"], *plan["reasons"], plan["compute"]]
    state.accelerator.print("\n".join(filter(None, lines)))
    if state.accelerator.is_main_process and not config.plan:
        if config.overwrite:
            run.clear()
        if settled.last < math.inf:
            forget_cooldown(run, first)
        replace_text(run.config, config.replace(resume=False, overwrite=False).to_yaml())
        replace_text(run.plan, json.dumps(plan, indent=2) + "\n")


def forget_cooldown(run: Run, first: int) -> None:
    """Delete what a lengthened run trained after step `first`, where it goes on, and say so.

    This comes before the new config is written, so that a run that is killed in between is still the shorter one.
    """
    newest = max(run.steps(run.checkpoints), default=first)
    if newest > first:
        print(
            f"the run is lengthened from step {first}; the cool-down of steps {first + 1} to {newest} is thrown away."
        )
        run.forget_after(first)


def make_plan(settled: Settled, data: ImageData | ImageStream, state: TrainState) -> dict[str, Any]:
    """Return the plan of a run, as the model card shows it."""
    config = settled.config
    return {
        "data": data.summary(),
        "class_names": list(data.class_names) if config.class_conditional else [],
        "network": state.describe_network(),
        "batches": state.describe_batches(),
        "budget": settled.budget,
        "reasons": settled.reasons,
        "compute": describe_compute(settled, data, state.accelerator.device.type == "cuda"),
        "measured": settled.probe and settled.probe._asdict(),
        "device": describe_device(state.accelerator.device),
        "versions": {name: version(name) for name in ("ddpm_pipe", "torch", "diffusers")},
    }


def describe_compute(settled: Settled, data: ImageData | ImageStream, on_gpu: bool) -> str:
    """Describe in one line how often the images are shown and, as far as it was measured, what the run takes."""
    config, probe = settled.config, settled.probe
    told = []
    if isinstance(data, ImageData):
        told.append(f"{config.steps * config.batch_size / len(data):.3g} epochs")
    if probe:
        grids = math.ceil(config.steps / config.sample_every) if config.sample_every else 0
        seconds = config.steps * probe.step_seconds + grids * probe.showing_seconds
        told.append(f"{probe.flops / 1e9:.3g} GFLOPs per image, forward and backward")
        told.append(f"{probe.step_seconds:.3g} s per step and {probe.showing_seconds:.3g} s for each of {grids} grids")
        told.append(f"{timedelta(seconds=round(seconds))} expected")
    if probe and probe.peak_memory:
        told.append(f"peak memory {probe.peak_memory / 2**30:.2f} GiB {'on the GPU' if on_gpu else 'of the process'}")
    return ", ".join(told)


def describe_device(device: torch.device) -> str:
    """Return the name of a GPU, or the number and kind of CPU cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} {platform.machine()} CPU cores"
