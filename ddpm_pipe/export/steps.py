"""The steps of a sampler as plain numbers, so that a page can take them without knowing the sampler.

Most samplers of DDPM are linear: what they make of x_t, of the estimates of x0 at this and at the last step, and of new
noise has fixed coefficients. These are measured on the scheduler itself, so that no formula is written twice.
"""

import inspect
from typing import NamedTuple

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from ddpm_pipe.compatibility import set_timesteps
from ddpm_pipe.noise import draw_noise
from ddpm_pipe.prediction import PREDICTIONS
from ddpm_pipe.samplers import make_scheduler, settings
from ddpm_pipe.schedulers import DDPMScheduler

EMPTY = 64
"""Entries of the probe that are zero, so that they show the noise alone."""


class Step(NamedTuple):
    """A step from x_t to x_s, whose names are the keys in `export.json`.

    It first computes x0 = `x0_of_x` x_t + `x0_of_output` output, clipped where the sampler clips, and then
    x_s = `x` x_t + `x0` x0 + `last_x0` (x0 of the step before) + `noise` z, with z from N(0, I).
    """

    t: float
    x0_of_x: float
    x0_of_output: float
    x: float
    x0: float
    last_x0: float
    noise: float


def clip_range(scheduler: SchedulerMixin) -> float | None:
    """Return the range +- to which a scheduler clips x0; None where it does not clip."""
    config = settings(scheduler)
    return config["clip_sample_range"] if config.get("clip_sample") else None


def linear_steps(
    scheduler: SchedulerMixin, count: int | None, timesteps: list[int] | None = None, eta: float = 0.0
) -> list[Step]:
    """Measure the coefficients of a scheduler's steps.

    A copy of it, for which the output of the network is x0 itself and is not clipped, takes the steps with unit
    vectors: one for x_t and one for x0 of each step. The entries of each result are the coefficients.

    Args:
        scheduler: the scheduler of a model.
        count: number of steps.
        timesteps: the timesteps themselves instead of their number.
        eta: noise of DDIM, for schedulers whose `step` takes it.

    Raises:
        ValueError: where a step is no such sum, naming the scheduler.
    """
    config = settings(scheduler)
    if config.get("thresholding"):
        raise ValueError(f"scheduler={type(scheduler).__name__} with thresholding=True is not linear in x0.")
    changes = {"prediction_type": "sample"} | {key: False for key in ("clip_sample",) if key in config}
    probe = make_scheduler(type(scheduler), scheduler, changes)
    chosen = set_timesteps(probe, count, timesteps).tolist()
    options = {"eta": eta} if "eta" in inspect.signature(probe.step).parameters else {}
    row, chain = PREDICTIONS[scheduler.config.prediction_type], DDPMScheduler.from_config(scheduler.config)
    units = torch.eye(2 * len(chosen) + EMPTY, dtype=torch.float64)[:, None, None, None]
    steps = []
    for i, t in enumerate(chosen):
        x_t, x0 = units[2 * i], units[2 * i + 1]
        generator, same = (torch.Generator().manual_seed(i) for _ in range(2))
        if not torch.equal(probe.scale_model_input(x_t, t), x_t) or float(probe.init_noise_sigma) != 1:
            raise ValueError(f"scheduler={type(scheduler).__name__} scales the input of the network.")
        x_s = probe.step(x0, t, x_t, generator=generator, return_dict=False, **options)[0].flatten()
        z = draw_noise(x_t.shape, same, x_t.device, x_t.dtype).flatten()
        noise = (x_s[-EMPTY:] @ z[-EMPTY:] / z[-EMPTY:].square().sum()).item()
        weights = _checked(x_s - noise * z, i, scheduler)
        alpha_bar = torch.tensor(chain.alpha_bar(int(t)), dtype=torch.float64)
        one, zero = torch.ones_like(alpha_bar), torch.zeros_like(alpha_bar)
        of_x, of_output = row.x0(zero, one, alpha_bar).item(), row.x0(one, zero, alpha_bar).item()
        steps.append(Step(t, of_x, of_output, *weights, noise))
    return steps


def _checked(entries: Tensor, i: int, scheduler: SchedulerMixin) -> tuple[float, float, float]:
    """Return the coefficients of x_t, x0 and the last x0 at step i; raise ValueError where there are others."""
    places = [2 * i, 2 * i + 1, *([2 * i - 1] if i else [])]
    values = entries[places].tolist()
    entries[places] = 0
    if not entries.abs().max() < 1e-5:
        raise ValueError(f"scheduler={type(scheduler).__name__} uses more than x_t, x0 and the last x0 in a step.")
    x, x0, last = [*values, 0.0][:3]
    return x, x0, last
