"""What a page needs to know of a model beside its network: the steps of the samplers that it offers."""

from typing import Any

from diffusers import SchedulerMixin

from ddpm_pipe.export.steps import Step, clip_range, linear_steps
from ddpm_pipe.pretrained import DDPMPipeline
from ddpm_pipe.samplers import Sampler
from ddpm_pipe.sampling.protocol import plug_in
from ddpm_pipe.schedulers import LEARNED_VARIANCES

OFFERED: dict[str, tuple[str, tuple[int, ...], int]] = {
    "dpm++": ("DPM-Solver++", (4, 6, 8, 10, 15, 20, 30, 50), 20),
    "ddim": ("DDIM", (10, 20, 50, 100), 50),
    "ddpm": ("DDPM", (50, 100, 250, 1000), 250),
}
"""Name of a sampler -> its label, and the numbers of steps and the default of the page."""

FEW_STEPS = ("LCM", (1, 2, 3, 4, 8), 2)
"""The same of a model that was tuned for few steps."""


def offers(pipeline: DDPMPipeline) -> list[dict[str, Any]]:
    """Return the samplers that a page offers, the best first.

    A model that was tuned for few steps has its own sampler alone. Others have the recommended one and those with
    searched timesteps, where the pipeline carries such, DPM-Solver++, DDIM and DDPM. Each draws the images of
    `ddpm-pipe generate` with that scheduler.

    Raises:
        ValueError: where none can sample the model.
    """
    own = pipeline.own_scheduler
    if type(own).__name__ == "LCMScheduler":
        return [_offer(own, None, FEW_STEPS)]
    names = [name for name in OFFERED if name != "ddpm" or own.config.get("variance_type") not in LEARNED_VARIANCES]
    return [*_carried(pipeline), *(_offer(own, name, OFFERED[name]) for name in names)]


def _offer(own: SchedulerMixin, name: str | None, row: tuple[str, tuple[int, ...], int]) -> dict[str, Any]:
    label, counts, default = row
    longest = own.config.num_train_timesteps
    possible = [count for count in counts if count <= longest] or [longest]
    scheduler = plug_in(own, name, {}, fewer=True)
    steps = {count: linear_steps(scheduler, count) for count in possible}
    return _entry(label, scheduler, steps, min(default, possible[-1]))


def _carried(pipeline: DDPMPipeline) -> list[dict[str, Any]]:
    """Return the samplers that the pipeline carries; a printed sentence names each that a page cannot take."""
    samplers, own = pipeline.samplers, pipeline.own_scheduler
    entries = []
    recommended = samplers and samplers.recommended
    for sampler in [*([recommended] if recommended else []), *(samplers.learned if samplers else [])]:
        kind = "recommended" if sampler is recommended else "searched timesteps"
        try:
            entries.append(_carried_entry(sampler, own, kind))
        except ValueError as error:
            print(f"the page does not offer {sampler.scheduler} ({kind}): {error}")
    return entries


def _carried_entry(sampler: Sampler, own: SchedulerMixin, kind: str) -> dict[str, Any]:
    scheduler = sampler.make_scheduler(own)
    count = sampler.steps if sampler.timesteps is None else None
    steps = {sampler.steps: linear_steps(scheduler, count, sampler.timesteps, sampler.eta)}
    label = f"{sampler.scheduler.removesuffix('Scheduler')}, {kind}"
    return _entry(label, scheduler, steps, sampler.steps) | {"guidance_scale": sampler.guidance_scale}


def _entry(label: str, scheduler: SchedulerMixin, steps: dict[int, list[Step]], default: int) -> dict[str, Any]:
    return {
        "label": label,
        "scheduler": type(scheduler).__name__,
        "clip": clip_range(scheduler),
        "default_steps": default,
        "steps": {
            count: [[float(f"{value:.10g}") for value in step] for step in rows] for count, rows in steps.items()
        },
    }
