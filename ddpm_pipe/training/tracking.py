"""The trackers of Accelerate to which a run logs beside its folder: how they start, and how they show images."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, get_available_trackers
from PIL import Image

from ddpm_pipe.training.config import TrainConfig

PROJECT = "ddpm_pipe"
"""The project of all runs in wandb and trackio."""
LOGS = "logs"
"""The folder in the run folder where tensorboard and wandb write."""


def choose_tracker(tracker: str) -> str | None:
    """Return the tracker to use: for auto, tensorboard where it is installed; None for none.

    Raises:
        ValueError: where the tracker is not installed.
    """
    installed = {str(name) for name in get_available_trackers()}
    if tracker == "auto":
        return "tensorboard" if "tensorboard" in installed else None
    if tracker == "none":
        return None
    if tracker not in installed:
        raise ValueError(
            f"tracker={tracker!r} is not installed; pip install {tracker}, or give another tracker or none."
        )
    return tracker


def start_tracker(config: TrainConfig, accelerator: Accelerator) -> None:
    """Start the tracker of the accelerator, if it has one; in wandb and trackio the run is named after its folder."""
    folder = Path(config.output_dir)
    options: dict[str, dict[str, Any]] = {
        "tensorboard": {},
        "wandb": {"name": folder.name, "dir": str(folder / LOGS)},
        "trackio": {"name": folder.name, "resume": "allow" if config.resume else "never"},
    }
    for tracker in map(str, accelerator.log_with):
        if tracker == "wandb" and accelerator.is_main_process:
            (folder / LOGS).mkdir(parents=True, exist_ok=True)  # otherwise wandb writes to another folder
        accelerator.init_trackers(LOGS if tracker == "tensorboard" else PROJECT, init_kwargs=options)


def show_images(tracker: GeneralTracker, images: Mapping[str, Image.Image], step: int) -> None:
    """Send images to a tracker, by name."""
    if tracker.name == "trackio":  # Accelerate sends it no images
        import trackio

        tracker.log({name: trackio.Image(image, caption=name) for name, image in images.items()}, step=step)
        return
    batches = {name: np.asarray(image.convert("RGB"))[None] for name, image in images.items()}
    layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
    tracker.log_images(batches, step=step, **layout)
