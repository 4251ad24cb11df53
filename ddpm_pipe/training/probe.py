"""A few training steps on a network of their own, which say what a run will take and leave no trace on it."""

import sys
import time
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch.utils.flop_counter import FlopCounterMode

from ddpm_pipe.data.memory import ImageData
from ddpm_pipe.data.stream import ImageStream
from ddpm_pipe.launch import from_main
from ddpm_pipe.training.config import TrainConfig
from ddpm_pipe.training.launcher import make_accelerator
from ddpm_pipe.training.recipe import TrainingLoss, make_objective, make_scheduler, make_unet
from ddpm_pipe.training.state import TrainState
from ddpm_pipe.training.step import training_step
from ddpm_pipe.training.teacher import frozen_copy, prepared
from ddpm_pipe.training.validation import FAILURES, draw_samples

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

WARM_UP = 2
"""Steps that are not counted: they compile, allocate and choose kernels."""
FEWEST, MOST, LONG_ENOUGH = 2, 20, 2.0
"""Fewest and most steps that are measured, and the seconds that they should take together."""


class Probe(NamedTuple):
    """What was measured, on the main process."""

    flops: int
    """floating-point operations for an image in training, forward and backward"""
    step_seconds: float
    """seconds of an optimizer step"""
    showing_seconds: float
    """seconds of the sample grids and the held-out loss that are due together"""
    peak_memory: int | None
    """bytes: allocated on the GPU, or resident for the whole process on a CPU; None where the system does not tell"""


def probe(config: TrainConfig, data: ImageData | ImageStream, held_out: ImageData) -> Probe:
    """Measure what a run will take.

    The steps are those of the run, in the same precision and processes, from its first on. They train a network,
    an average and an optimizer that are freed afterwards. All random numbers of a run follow from its seed and its
    counters, so the run does not notice.

    Raises:
        ValueError: for a network, a loss or a batch that cannot work.
    """
    accelerator = make_accelerator(config)  # its own, because it counts steps and scales losses
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(accelerator.device)
    step_seconds, showing_seconds = _train_and_show(config, data, held_out, accelerator)
    peak_memory = from_main(lambda: _peak_memory(accelerator.device))
    accelerator.free_memory()
    return Probe(flops_per_image(config, data), step_seconds, showing_seconds, peak_memory)


def _train_and_show(
    config: TrainConfig, data: ImageData | ImageStream, held_out: ImageData, accelerator: Accelerator
) -> tuple[float, float]:
    """Return the seconds of a step, and those of the grids and the held-out loss."""
    unet = make_unet(config, data)
    teacher = prepared(frozen_copy(config, unet), accelerator)
    state = TrainState(config, unet, accelerator)
    objective = make_objective(config, make_scheduler(config), teacher)
    batches = data.batches(config.batch_size, config.seed)

    def seconds_of(first: int, count: int) -> float:
        """Take steps, the last one of the run again beyond its end, and return the main process's seconds of one."""
        start = _now()
        for step in range(first, first + count):
            training_step(state, objective, batches, data.shape, min(step, config.steps - 1))
        end = _now()
        return from_main(lambda: (end - start) / count)

    seconds_of(0, WARM_UP)
    count = round(LONG_ENOUGH / seconds_of(WARM_UP, 1))
    step_seconds = seconds_of(WARM_UP + 1, min(max(count, FEWEST), MOST))
    return step_seconds, from_main(lambda: _showing_seconds(config, state, objective, len(held_out)))


def flops_per_image(config: TrainConfig, data: ImageData | ImageStream) -> int:
    """Count the floating-point operations of the network for one image, forward and backward, without computing."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        unet = make_unet(config, data)
        labels = {"class_labels": torch.zeros(1, dtype=torch.long)} if config.class_conditional else {}
        unet(torch.empty(1, *data.shape), torch.zeros(1, dtype=torch.long), **labels).sample.sum().backward()
    return counter.get_total_flops()


def _showing_seconds(config: TrainConfig, state: TrainState, objective: TrainingLoss, held_out: int) -> float:
    """Return the seconds of grids and held-out loss, from grids of one sampling step; 0 where none can be drawn."""
    if not config.sample_every:
        return 0.0
    try:
        for _ in range(2):  # the first one allocates and chooses kernels
            start = _now()
            draw_samples(config.replace(sample_steps=1), state, objective)
            seconds = _now() - start
    except FAILURES:
        return 0.0
    guided = config.class_conditional and config.grid_guidance != 1
    images = 2 * config.num_samples * (1 + guided)  # through the averaged and through the raw network
    return seconds * (config.sample_steps + held_out / images)


def _now() -> float:
    """Return the time in seconds at which all work given to the device is done."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def _peak_memory(device: torch.device) -> int | None:
    """Return the most bytes so far: allocated on a GPU, or resident for this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
