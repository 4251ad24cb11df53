"""Exponential moving averages of the weights, with decays that are pure functions of the optimizer step."""

import copy
from collections.abc import Callable

from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


def warmup_decay(step: int, max_decay: float, power: float = 2 / 3) -> float:
    """min(max_decay, 1 - (1 + step)^-power): an average over a growing share of the run until `max_decay` is reached.

    Args:
        step: optimizer steps done before this update, from 0; the first update copies the weights.
        max_decay: the decay of a long run, in [0, 1).
        power: how fast it is reached: 2/3 gets to 0.999 at step 31,600; 3/4 at step 10,000.
    """
    return min(max_decay, 1 - (1 + step) ** -power)


class EMA:
    """An average of a model's weights as a module of its own, always in eval mode.

    Args:
        model: the network that is trained; the average starts as a copy of it.
        decay: optimizer step -> decay in [0, 1].
    """

    def __init__(self, model: nn.Module, decay: Callable[[int], float]):
        self.decay = decay
        self.module = copy.deepcopy(model).eval().requires_grad_(False)

    def update(self, model: nn.Module, step: int) -> None:
        """module <- decay(step) * module + (1 - decay(step)) * model; buffers are copied."""
        average = get_ema_multi_avg_fn(self.decay(step))
        average(list(self.module.parameters()), [p.detach() for p in model.parameters()], None)
        for ours, theirs in zip(self.module.buffers(), model.buffers(), strict=True):
            ours.copy_(theirs)
