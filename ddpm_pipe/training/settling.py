"""From a config that may hold a budget to one of plain numbers, before the first step."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from accelerate import Accelerator

from ddpm_pipe.data.memory import ImageData
from ddpm_pipe.data.stream import ImageStream
from ddpm_pipe.launch import from_main
from ddpm_pipe.run.folder import Run
from ddpm_pipe.training.budget import Budget, lengths, steps_in
from ddpm_pipe.training.config import OptimConfig, TrainConfig
from ddpm_pipe.training.probe import Probe, flops_per_image, probe
from ddpm_pipe.training.recipe import cooldown_start
from ddpm_pipe.training.sizing import choose

WORTH_A_PROBE = 500
"""Steps from which a run is measured before its first step, so that this takes a small part of it."""


class Settled(NamedTuple):
    """The plain config of a run, and where it comes from."""

    config: TrainConfig
    """the config, without a budget"""
    budget: str | None = None
    """the budget that the steps follow from"""
    reasons: tuple[str, ...] = ()
    """one line for each choice that was made"""
    probe: Probe | None = None
    """what a few steps took; None for a run of few steps"""
    last: float = math.inf
    """the last step whose checkpoint this run may go on from"""


def settle(
    config: TrainConfig, data: ImageData | ImageStream, held_out: ImageData, accelerator: Accelerator, run: Run
) -> Settled:
    """Decide all that the config leaves to its budget.

    A resumed run keeps what was decided before; another budget changes its steps alone.

    Raises:
        ValueError: for a network, a loss or a batch that cannot work.
    """
    before, budget = from_main(lambda: read_decisions(config, run))
    if config.budget is None:
        budget = budget if before.get("steps") == config.steps else None
        settled = Settled(config, budget)
    elif config.budget == budget:
        kept = {name: before[name] for name in config.undecided() if name in before}
        reason = f"budget {budget}: {kept['steps']} steps, as the run was started"
        settled = Settled(config.replace(budget=None, **kept), budget, (reason,))
    else:
        kept = {name: before[name] for name in config.undecided() - {"steps"} if name in before}
        settled = spend(config.replace(**kept), data, held_out, accelerator)
    config = settled.config
    if settled.probe is None and (config.plan or config.steps >= WORTH_A_PROBE):
        settled = settled._replace(probe=probe(config, data, held_out))
    return settled._replace(last=last_in_common(before, config))


def read_decisions(config: TrainConfig, run: Run) -> tuple[dict[str, Any], str | None]:
    """Return the config of the run that is resumed, and the budget it came from; {} and None for a new run."""
    if not (config.resume and run.config.exists()):
        return {}, None
    plan = run.read_plan() if run.plan.exists() else {}
    return run.read_config(), plan.get("budget")


def last_in_common(before: Mapping[str, Any], config: OptimConfig) -> float:
    """Return the last step whose checkpoint lies on the way of the run before and of a longer one.

    That is the step at which the learning rate began to decay; infinity where the run is not lengthened so.
    """
    earlier = OptimConfig(**{name: value for name, value in before.items() if name in OptimConfig.model_fields})
    start = cooldown_start(earlier)
    same = before and earlier.lr_schedule == config.lr_schedule == "warmup_stable_decay"
    return start if same and start < cooldown_start(config) else math.inf


def spend(config: TrainConfig, data: ImageData | ImageStream, held_out: ImageData, accelerator: Accelerator) -> Settled:
    """Decide the recipe, where no network is given, and the lengths that suit the budget of a config."""
    text = config.budget or ""
    budget, reasons, measured = Budget.parse(text), [], None
    if "unet" in config.undecided():
        config, reason = size_up(config, data, held_out, accelerator)
        reasons.append(reason)
    if budget.seconds is None:
        steps, why = max(1, round((budget.images or 0) / config.batch_size)), f"{config.batch_size} images a step"
        chosen = lengths(steps)
    else:
        measured = probe(config, data, held_out)
        every = None if "sample_every" in config.undecided() else config.sample_every
        steps, grids = steps_in(budget.seconds, measured.step_seconds, measured.showing_seconds, every)
        why = f"{measured.step_seconds:.3g} s a step, {measured.showing_seconds:.3g} s for each of {grids} sample grids"
        chosen = lengths(steps, grids)
    chosen = {name: value for name, value in chosen.items() if name in config.undecided()}
    reasons.append(f"budget {text}, with {why}: {describe(chosen)}")
    return Settled(config.replace(budget=None, **chosen), text, tuple(reasons), measured)


def size_up(
    config: TrainConfig, data: ImageData | ImageStream, held_out: ImageData, accelerator: Accelerator
) -> tuple[TrainConfig, str]:
    """Return the config with the recipe of the table of sizes, and one line that tells it.

    How many images a larger network could show in a time follows from the speed of the smallest one and from the
    floating-point operations of both.
    """
    budget, open_keys, speed = Budget.parse(config.budget or ""), config.undecided(), 0.0

    def with_values(values: dict[str, Any]) -> TrainConfig:
        return config.replace(**{name: value for name, value in values.items() if name in open_keys})

    def shown(values: dict[str, Any]) -> float:
        nonlocal speed
        if budget.seconds is None:
            return budget.images or 0
        sized = with_values(values)
        if not speed:
            smallest = probe(sized, data, held_out)
            speed = smallest.flops * sized.batch_size / smallest.step_seconds
        return budget.seconds * speed / flops_per_image(sized, data)

    count = len(data) if isinstance(data, ImageData) else None
    parts = accelerator.num_processes * config.gradient_accumulation_steps
    values, images = choose(data.shape, count, parts, shown)
    told = {name: value for name, value in values.items() if name in open_keys}
    return with_values(values), f"recipe for about {images:,.0f} images shown: {describe(told)}"


def describe(values: Mapping[str, Any]) -> str:
    """Return the keys and values of a config in one line."""
    rounded = {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in values.items()}
    return ", ".join(f"{name}={value}" for name, value in rounded.items())
