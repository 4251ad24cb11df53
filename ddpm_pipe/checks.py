"""Checks of arguments. A check that fails raises ValueError with one sentence that names the argument."""

import math
from collections.abc import Collection
from numbers import Integral, Real
from typing import Any

import numpy as np


def check_choice(name: str, value: str, accepted: Collection[str]) -> None:
    """Raise ValueError, naming the argument and the accepted values, where `value` is not one of them."""
    if value not in list(accepted):  # a list compares values and does not hash them
        raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(accepted)}.")


def check_number(name: str, value: Any, whole: bool = False) -> None:
    """Raise ValueError, naming the argument, where `value` is not a finite number or, with `whole`, not a whole one."""
    is_number = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
        raise ValueError(f"{name}={value!r:.100} must be a {'whole' if whole else 'finite'} number.")


def whole_numbers(values: Any) -> np.ndarray | None:
    """Return a whole number, or a list, array or tensor of them, as int64, () or (n,); None for anything else."""
    try:
        array = np.asarray(values.cpu() if hasattr(values, "cpu") else values)
    except (TypeError, ValueError, RuntimeError):
        return None
    return array.astype(np.int64) if array.dtype.kind in "iu" and array.ndim <= 1 else None


def falling_timesteps(timesteps: Any, steps: int) -> list[int]:
    """Check the timesteps of sampling and return them as a list of ints.

    Raises:
        ValueError: where they are not strictly decreasing whole numbers between T - 1 and 0; T is `steps`.
    """
    chosen = whole_numbers(timesteps)
    if chosen is None or chosen.ndim == 0 or (np.diff(chosen) >= 0).any() or chosen[0] >= steps or chosen[-1] < 0:
        raise ValueError(f"timesteps must be strictly decreasing values from {steps - 1} to 0, all whole numbers.")
    return chosen.tolist()
