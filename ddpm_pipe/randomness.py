"""Counted randomness: every draw is a function of (seed, what it is for, counters), never of a stored state.

So a run that is stopped and resumed, or moved to another number of processes, draws the same numbers.
"""

import numpy as np
import torch

STREAMS = (
    "weights",
    "order",
    "flip",
    "timestep",
    "noise",
    "self_condition",
    "class_dropout",
    "dropout",
    "sample",
    "holdout",
    "offset_noise",
    "health",
    "bound",
    "dropout_keys",
    "comparison",
)
"""What randomness is used for. The position of a name is part of the seed, so append new names at the end."""


def derive_seed(seed: int, stream: str, *counters: int) -> int:
    """Return a 64-bit seed for one use of randomness, independent of all others.

    Args:
        seed: the seed of the run, at least 0.
        stream: one of `STREAMS`.
        counters: what distinguishes this draw, e.g. the optimizer step or the epoch.
    """
    entropy = [seed, STREAMS.index(stream), *counters]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])


def generator(seed: int, stream: str, *counters: int, device: str | torch.device = "cpu") -> torch.Generator:
    """Return a torch generator on `device`, seeded by `derive_seed`."""
    return torch.Generator(device=device).manual_seed(derive_seed(seed, stream, *counters))
