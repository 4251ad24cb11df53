"""Search the timesteps for which a scheduler, in few steps, comes closest to the model's own solution in many.

The search needs no images and no training: from the same noise, a deterministic scheduler approximates one solution of
the probability flow (Song et al. 2021, eq. 13) whatever its steps, so their distance is the error of the steps.
"""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ddpm_pipe.compatibility import set_timesteps
from ddpm_pipe.launch import processes
from ddpm_pipe.pretrained import DDPMPipeline
from ddpm_pipe.samplers import Sampler, Samplers, read_samplers
from ddpm_pipe.sampling.config import TimestepsConfig
from ddpm_pipe.sampling.protocol import pipeline_for, plug_in, sample_images, sampler_of
from ddpm_pipe.weights import SAMPLERS_FILE, weights_sha256

FIRST_SEED = 10**15
"""The first seed of the search; `generate` and `evaluate` draw none of its noise unless told to."""


def coordinate_search(error: Callable[[list[int]], float], start: list[int], steps: int) -> list[int]:
    """Minimise an error over timesteps, one timestep at a time.

    Each timestep in turn moves by its stride where that lowers the error, first in the direction of its last move.
    Where neither direction lowers it, the stride is halved. The first stride is half the mean distance between them,
    and the search ends when all strides are below T / 200, or 1.

    Args:
        error: the function of strictly decreasing timesteps.
        start: the timesteps to begin with, strictly decreasing from T - 1 or less to 0 or more.
        steps: the number of timesteps T.
    """
    errors = {tuple(start): error(start)}

    def lowers(trial: list[int]) -> bool:
        if not all(upper > lower for upper, lower in pairwise([steps, *trial, -1])):
            return False
        if tuple(trial) not in errors:
            errors[tuple(trial)] = error(trial)
        return errors[tuple(trial)] < errors[tuple(best)]

    best, least = start, max(1, steps // 200)
    strides = [max(least, steps // (2 * len(start)))] * len(start)
    while max(map(abs, strides)) >= least:
        for i, stride in enumerate(strides):
            for change in (stride, -stride) if abs(stride) >= least else ():
                trial = [*best[:i], best[i] + change, *best[i + 1 :]]
                if lowers(trial):
                    best, strides[i] = trial, change
                    break
            else:
                strides[i] = int(stride / 2)
    return best


class Solutions(NamedTuple):
    """The long solutions from the noise of some seeds, with which those in few steps are compared."""

    pipeline: DDPMPipeline
    config: TimestepsConfig
    seeds: list[int]
    images: Tensor

    def rmse(self, **steps: int | list[int]) -> float:
        """Return the error of images in few steps, in levels of 255; `steps` are keywords of the pipeline."""
        return (draw(self.pipeline, self.config, self.seeds, **steps) - self.images).square().mean().sqrt().item()


def draw(pipeline: DDPMPipeline, config: TimestepsConfig, seeds: list[int], **steps: int | list[int]) -> Tensor:
    """Draw the images (B, C, H, W) of some seeds, in levels from 0 to 255; `steps` are keywords of the pipeline."""
    options = config.call_options() | {"num_inference_steps": None} | steps
    return torch.cat([images for _, images, _ in sample_images(pipeline, seeds, config.batch_size, **options)]).float()


def solve(pipeline: DDPMPipeline, config: TimestepsConfig, seeds: list[int]) -> Solutions:
    """Draw the long solutions from the noise of some seeds."""
    scheduler = plug_in(pipeline.own_scheduler, "dpm++", {}, fewer=True)
    reference = DDPMPipeline.from_pipe(pipeline, scheduler=scheduler)
    reference.set_progress_bar_config(desc=f"long solutions, {len(seeds)} images")
    images = draw(reference, config, seeds, num_inference_steps=config.reference_steps)
    return Solutions(pipeline, config, seeds, images)


def check_deterministic(pipeline: DDPMPipeline, config: TimestepsConfig) -> None:
    """Raise ValueError where the scheduler draws noise in its steps, so that no solution belongs to the first noise."""
    noise, generator = torch.zeros(1, *pipeline.image_shape), torch.Generator()
    before = generator.get_state()
    pipeline(1, generator, config.steps, config.eta, sample=noise, output_type="pt")
    if not torch.equal(generator.get_state(), before):
        raise ValueError(
            f"scheduler={type(pipeline.scheduler).__name__} with eta={config.eta:g} draws noise in its steps, so that "
            "nothing is there to come close to; use dpm++, dpm++single, ddim, euler or heun, without eta."
        )


def even_timesteps(pipeline: DDPMPipeline, count: int) -> list[int]:
    """Return the timesteps that the scheduler chooses by itself, as whole numbers.

    Raises:
        ValueError: where the scheduler takes no others.
    """
    chosen = set_timesteps(pipeline.scheduler, count, None).round().long().tolist()
    start = list(dict.fromkeys(chosen))  # Heun lists a timestep once for each call of the network
    set_timesteps(pipeline.scheduler, None, start)
    return start


def learn_timesteps(config: TimestepsConfig) -> Sampler | None:
    """Search the timesteps, check them on other noise, and keep them in the pipeline folder where they are better.

    Returns:
        The sampler with its timesteps; None where the scheduler's own are at least as good on the other noise.

    Raises:
        ValueError: where the model is no folder here, the scheduler takes no timesteps or draws noise, or the weights
            change meanwhile.
    """
    folder = Path(config.model)
    if not (folder / "model_index.json").exists():
        raise ValueError(
            f"model={config.model!r} is not a pipeline folder here, and what is found is kept there; save it first."
        )
    weights = weights_sha256(folder)
    pipeline = pipeline_for(config).to(processes().device)
    chain = pipeline.scheduler.config.num_train_timesteps
    config = config.replace(reference_steps=min(config.reference_steps, chain))
    pipeline.samplers = None  # the search starts from the scheduler's own timesteps
    found, before, after = search(pipeline, config)
    told = (
        f"RMSE {after:.2f} levels of 255 to {config.reference_steps} steps of dpm++, and {before:.2f} with the "
        f"scheduler's own timesteps; {config.num_images} images that the search did not see"
    )
    if after >= before:
        print(f"timesteps {found}: {told}; the scheduler's own are as good, and nothing is kept.")
        return None
    if weights_sha256(folder) != weights:
        raise ValueError(f"the weights in {folder} changed while timesteps were searched; search again.")
    sampler = sampler_of(config, pipeline, found, told)
    (read_samplers(folder) or Samplers(unet_sha256=weights)).with_learned(sampler).write(folder)
    print(f"timesteps {found}: {told}; kept in {folder / SAMPLERS_FILE}.")
    return sampler


def search(pipeline: DDPMPipeline, config: TimestepsConfig) -> tuple[list[int], float, float]:
    """Search the timesteps of a pipeline.

    Returns:
        The timesteps, and the errors on other noise of the scheduler's own timesteps and of these, in levels of 255.

    Raises:
        ValueError: where the scheduler takes no timesteps or draws noise.
    """
    check_deterministic(pipeline, config)
    start = even_timesteps(pipeline, config.steps)
    seeds, count = range(FIRST_SEED, FIRST_SEED + 2 * config.num_images), config.num_images
    searched, held_out = (solve(pipeline, config, list(part)) for part in (seeds[:count], seeds[count:]))
    with tqdm(desc=f"{len(start)} timesteps", unit=" trials") as bar:

        def error(timesteps: list[int]) -> float:
            value = searched.rmse(timesteps=timesteps)
            bar.update()
            bar.set_postfix(rmse=f"{value:.2f}")
            return value

        found = coordinate_search(error, start, pipeline.scheduler.config.num_train_timesteps)
    return found, held_out.rmse(num_inference_steps=config.steps), held_out.rmse(timesteps=found)
