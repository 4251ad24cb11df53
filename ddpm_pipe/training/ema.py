"""Exponential moving averages of the weights, with decays that are pure functions of the optimizer step.

Besides the classic average there are power-function profiles (Karras et al. 2024, "Analyzing and improving the training
dynamics of diffusion models", section 3): from snapshots of a few of them, an average of any length is rebuilt after
training.
"""

import copy
from collections.abc import Callable, Sequence

import numpy as np
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


def power_exponent(sigma_rel: float) -> float:
    """gamma of the power-function profile whose width is `sigma_rel`, its standard deviation relative to the run.

    The profile (gamma + 1) u^gamma on [0, 1] has the variance (gamma + 1) / ((gamma + 2)^2 (gamma + 3)); that is solved
    for gamma.

    Raises:
        ValueError: where no profile has this width: it must lie in (0, 1 / sqrt(12)], 1 / sqrt(12) being the flat one.
    """
    if not 0 < sigma_rel <= 12**-0.5:
        raise ValueError(f"sigma_rel={sigma_rel} must lie in (0, {12**-0.5:.4f}].")
    precision = sigma_rel**-2
    return float(np.roots([1, 7, 16 - precision, 12 - precision]).real.max())


def power_decay(step: int, sigma_rel: float) -> float:
    """(1 - 1/t)^(gamma + 1) at update t = step + 1 (Karras et al. 2024, eq. 3); the first update copies the weights."""
    return (1 - 1 / (step + 1)) ** (power_exponent(sigma_rel) + 1)


class EMA:
    """An average of a model's weights as a module of its own, always in eval mode.

    Args:
        model: the network that is trained, on its device; the average starts as a copy of it.
        decay: optimizer step -> decay in [0, 1].
    """

    def __init__(self, model: nn.Module, decay: Callable[[int], float]):
        self.decay = decay
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        # listed once: to walk through a network takes longer than to average it on a GPU
        self._parameters = list(self.module.parameters()), list(model.parameters())
        self._buffers = list(zip(self.module.buffers(), model.buffers(), strict=True))

    def update(self, step: int) -> None:
        """module <- decay(step) * module + (1 - decay(step)) * model; buffers are copied."""
        get_ema_multi_avg_fn(self.decay(step))(*self._parameters, None)
        for ours, theirs in self._buffers:
            ours.copy_(theirs)


# ---------------------------------------------------------------- averages rebuilt after training


def profile_products(
    steps_a: np.ndarray, gammas_a: np.ndarray, steps_b: np.ndarray, gammas_b: np.ndarray
) -> np.ndarray:
    """Inner products of profiles p(u) = (gamma + 1) u^gamma / t^(gamma + 1) on [0, t], all of a with all of b."""
    t_a, g_a, t_b, g_b = steps_a[:, None], gammas_a[:, None], steps_b[None], gammas_b[None]
    shorter = np.minimum(t_a, t_b)
    shares = (shorter / t_a) ** (g_a + 1) * (shorter / t_b) ** (g_b + 1)
    return (g_a + 1) * (g_b + 1) / (g_a + g_b + 1) * shares / shorter


def posthoc_coefficients(
    snapshots: Sequence[tuple[int, float]], step: int, sigma_rel: float
) -> tuple[np.ndarray, float]:
    """How to mix snapshots into an average of another length: least squares on profiles (Karras et al., section 3.2).

    Args:
        snapshots: (step, sigma_rel) of each, both profiles of several steps.
        step: where the average ends, no later than the last snapshot.
        sigma_rel: its width.

    Returns:
        One coefficient per snapshot, of sum 1, and the error of the mixed profile relative to the wanted one (L2).

    Raises:
        ValueError: for a width that no profile has.
    """
    steps = np.array([float(s) for s, _ in snapshots])
    gammas = np.array([power_exponent(width) for _, width in snapshots])
    wanted = np.array([float(step)]), np.array([power_exponent(sigma_rel)])
    among, with_wanted = profile_products(steps, gammas, steps, gammas), profile_products(steps, gammas, *wanted)[:, 0]
    # least squares under the condition that the coefficients sum to 1 (a Lagrange multiplier): constants stay constant
    ones = np.ones((len(steps), 1))
    system = np.block([[among, ones], [ones.T, np.zeros((1, 1))]])
    coefficients = np.linalg.lstsq(system, np.append(with_wanted, 1.0), rcond=1e-12)[0][:-1]
    norm = profile_products(*wanted, *wanted)[0, 0]
    residual = norm - 2 * coefficients @ with_wanted + coefficients @ among @ coefficients
    return coefficients, float(np.sqrt(max(residual, 0) / norm))
