"""A budget of time or images instead of a number of steps, and the lengths of a run that follow from it."""

import math
import re
from typing import Any, NamedTuple, Self

SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400}
IMAGES = {"img": 1, "kimg": 1_000, "Mimg": 1_000_000}

COOLDOWN = 0.2
"""Share of the steps over which the learning rate decays to 0: with about as many a constant rate reaches the loss of a
cosine in Hägele et al. 2024, "Scaling laws and compute-optimal training beyond fixed training durations"."""
WARM_UP, LONGEST_WARM_UP = 1 / 20, 5_000
"""Share of the steps of the warm-up, as in the preset fashion_mnist, and its most steps, those of DDPM."""
AVERAGE, LONGEST_DECAY = 1 / 20, 0.9999
"""Share of the steps that the average spans, among the widths that are best in Karras et al. 2024, and DDPM's decay."""
SAVES, GRIDS = 20, 10
"""Checkpoints of a run, and its most sample grids."""
SHOWING = 0.2
"""Largest share of a time that may go into sample grids and held-out losses."""

LENGTHS = frozenset(
    {"steps", "lr_schedule", "lr_cooldown", "lr_warmup_steps", "ema_decay", "ema_snapshot_every"}
    | {"save_every", "keep_every", "sample_every"}
)
"""Keys of a config that suit one number of steps, so that a budget on the command line replaces those of a preset."""


class Budget(NamedTuple):
    """A time in seconds, or a number of images; the other one is None."""

    seconds: float | None = None
    images: int | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a budget such as 90s, 30min, 2h, 1d, 200kimg or 5Mimg.

        Raises:
            ValueError: where the text is something else, or nothing above 0.
        """
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([a-zA-Z]+)", text)
        number, unit = (float(match[1]), match[2]) if match else (0.0, "")
        if number > 0 and unit in SECONDS:
            return cls(seconds=number * SECONDS[unit])
        if unit in IMAGES and round(number * IMAGES[unit]) >= 1:
            return cls(images=round(number * IMAGES[unit]))
        raise ValueError(f"{text!r} is no budget.")


def steps_in(seconds: float, step: float, showing: float, sample_every: int | None = None) -> tuple[int, int]:
    """Return how many steps and how many sample grids fit into a time, at least one step.

    Args:
        seconds: the time.
        step: seconds of an optimizer step.
        showing: seconds of the grids and the held-out loss that are due together.
        sample_every: steps between the grids, 0 for none; None leaves their number open, up to GRIDS.
    """
    if sample_every is None:
        grids = min(GRIDS, int(SHOWING * seconds / showing)) if showing else GRIDS
        return max(1, int((seconds - grids * showing) / step)), grids
    steps = max(1, int(seconds / (step + (showing / sample_every if sample_every else 0))))
    return steps, steps // sample_every if sample_every else 0


def lengths(steps: int, grids: int = GRIDS) -> dict[str, Any]:
    """Return the keys of a config that follow from a number of steps and of sample grids."""
    return {
        "steps": steps,
        "lr_schedule": "warmup_stable_decay",
        "lr_cooldown": COOLDOWN,
        "lr_warmup_steps": min(int(WARM_UP * steps), LONGEST_WARM_UP),
        "ema_decay": min(1 - 1 / max(1, AVERAGE * steps), LONGEST_DECAY),
        "save_every": math.ceil(steps / SAVES),
        "sample_every": math.ceil(steps / grids) if grids else 0,
    }
