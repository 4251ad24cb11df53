"""What a run prints and writes before its first step: the plan, the config, and changes since it was last started."""

import json
import os
import platform
from importlib.metadata import version
from typing import Any

import torch

from ddpm_pipe.data.memory import ImageData
from ddpm_pipe.data.stream import ImageStream
from ddpm_pipe.run.files import replace_text
from ddpm_pipe.run.folder import Run
from ddpm_pipe.training.config import TrainConfig
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
        if now != value and name not in ("resume", "overwrite"):
            print(f"resumed with {name}={now!r}, was {value!r}")


def announce(
    config: TrainConfig, data: ImageData | ImageStream, state: TrainState, run: Run, start: dict[str, Any] | None
) -> None:
    """Print the plan, and write it and the config into the run folder, after all checks of the config have passed."""
    plan = make_plan(config, data, state) | {"start": start}
    started = [f"started from {config.init_from}: {start['told']}"] if start else []
    lines = [plan["data"], *data.notes(), plan["network"], *started, plan["batches"]]
    state.accelerator.print("\n".join(lines))
    if state.accelerator.is_main_process:
        if config.overwrite:
            run.clear()
        replace_text(run.config, config.replace(resume=False, overwrite=False).to_yaml())
        replace_text(run.plan, json.dumps(plan, indent=2) + "\n")


def make_plan(config: TrainConfig, data: ImageData | ImageStream, state: TrainState) -> dict[str, Any]:
    """Return the plan of a run, as the model card shows it."""
    return {
        "data": data.summary(),
        "class_names": list(data.class_names) if config.class_conditional else [],
        "network": state.describe_network(),
        "batches": state.describe_batches(),
        "device": describe_device(state.accelerator.device),
        "versions": {name: version(name) for name in ("ddpm_pipe", "torch", "diffusers")},
    }


def describe_device(device: torch.device) -> str:
    """Return the name of a GPU, or the number and kind of CPU cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} {platform.machine()} CPU cores"
