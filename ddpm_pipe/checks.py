"""Arguments checked, with one sentence for each that cannot be."""

import math
from collections.abc import Collection
from numbers import Integral, Real
from typing import Any

import numpy as np


def check_choice(name: str, value: str, accepted: Collection[str]) -> None:
    """Raise one sentence naming the argument and the accepted values where `value` is not one of them."""
    if value not in list(accepted):  # a list has no need to hash the value
        raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(accepted)}.")


def check_number(name: str, value: Any, whole: bool = False) -> None:
    """Raise one sentence naming the argument where `value` is not a finite number, or not a whole one."""
    is_number = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
        raise ValueError(f"{name}={value!r:.100} must be a {'whole' if whole else 'finite'} number.")


def whole_numbers(values: Any) -> np.ndarray | None:
    """A whole number, or a list, array or tensor of them, as int64 of shape () or (n,); None for anything else."""
    try:
        array = np.asarray(values.cpu() if hasattr(values, "cpu") else values)
    except (TypeError, ValueError, RuntimeError):
        return None
    return array.astype(np.int64) if array.dtype.kind in "iu" and array.ndim <= 1 else None


def falling_timesteps(timesteps: Any, steps: int) -> list[int]:
    """A list of timesteps to go through, checked.

    Raises:
        ValueError: where they are not strictly decreasing whole numbers from T - 1 to 0, T being `steps`.
    """
    chosen = whole_numbers(timesteps)
    if chosen is None or chosen.ndim == 0 or (np.diff(chosen) >= 0).any() or chosen[0] >= steps or chosen[-1] < 0:
        raise ValueError(f"timesteps must be strictly decreasing values from {steps - 1} to 0, all whole numbers.")
    return chosen.tolist()
