"""Exponential moving averages of the weights, with decays that are pure functions of the optimizer step.

Besides the classic average there are power-function profiles (Karras et al. 2024, "Analyzing and improving the training
dynamics of diffusion models", section 3). From snapshots of a few of them, an average of any width can be rebuilt after
training.
"""

import copy
from collections.abc import Callable, Sequence

import numpy as np
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


def warmup_decay(step: int, max_decay: float, power: float = 2 / 3) -> float:
    """Return min(max_decay, 1 - (1 + step)^-power).

    With this decay the average spans more and more steps, until `max_decay` is reached.

    Args:
        step: optimizer steps done before this update, from 0; the first update copies the weights.
        max_decay: the decay of a long run, in [0, 1).
        power: how fast the decay grows: 2/3 reaches 0.999 at step 31,600; 3/4 at step 10,000.
    """
    return min(max_decay, 1 - (1 + step) ** -power)


def power_exponent(sigma_rel: float) -> float:
    """Return gamma of the power-function profile whose standard deviation, relative to the run, is `sigma_rel`.

    The profile (gamma + 1) u^gamma on [0, 1] has the variance (gamma + 1) / ((gamma + 2)^2 (gamma + 3)); this equation
    is solved for gamma.

    Raises:
        ValueError: where sigma_rel lies outside (0, 1 / sqrt(12)]; 1 / sqrt(12) is the width of the flat profile.
    """
    if not 0 < sigma_rel <= 12**-0.5:
        raise ValueError(f"sigma_rel={sigma_rel} must lie in (0, {12**-0.5:.4f}].")
    precision = sigma_rel**-2
    return float(np.roots([1, 7, 16 - precision, 12 - precision]).real.max())


def power_decay(step: int, sigma_rel: float) -> float:
    """Return (1 - 1/t)^(gamma + 1), the decay of update t = step + 1 (Karras et al. 2024, eq. 3).

    The first update copies the weights.
    """
    return (1 - 1 / (step + 1)) ** (power_exponent(sigma_rel) + 1)


class EMA:
    """An average of a model's weights, held in a separate module that is always in eval mode.

    Args:
        model: the network being trained, on its device; the average starts as a copy of it.
        decay: function from the optimizer step to the decay in [0, 1].
    """

    def __init__(self, model: nn.Module, decay: Callable[[int], float]):
        self.decay = decay
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        # listed once, because walking through a network takes longer than averaging it on a GPU
        self._parameters = list(self.module.parameters()), list(model.parameters())
        self._buffers = list(zip(self.module.buffers(), model.buffers(), strict=True))

    def update(self, step: int) -> None:
        """Set module to decay(step) * module + (1 - decay(step)) * model, and copy the buffers."""
        get_ema_multi_avg_fn(self.decay(step))(*self._parameters, None)
        for ours, theirs in self._buffers:
            ours.copy_(theirs)


# ---------------------------------------------------------------- averages rebuilt after training


def profile_products(
    steps_a: np.ndarray, gammas_a: np.ndarray, steps_b: np.ndarray, gammas_b: np.ndarray
) -> np.ndarray:
    """Return the inner products, (A, B), of profiles p(u) = (gamma + 1) u^gamma / t^(gamma + 1) on [0, t]."""
    t_a, g_a, t_b, g_b = steps_a[:, None], gammas_a[:, None], steps_b[None], gammas_b[None]
    shorter = np.minimum(t_a, t_b)
    shares = (shorter / t_a) ** (g_a + 1) * (shorter / t_b) ** (g_b + 1)
    return (g_a + 1) * (g_b + 1) / (g_a + g_b + 1) * shares / shorter


def posthoc_coefficients(
    snapshots: Sequence[tuple[int, float]], step: int, sigma_rel: float
) -> tuple[np.ndarray, float]:
    """Compute how to mix snapshots into an average of another width, by least squares on the profiles.

    The method is that of Karras et al. 2024, section 3.2.

    Args:
        snapshots: (step, sigma_rel) of each snapshot.
        step: optimizer step at which the average ends, no later than the last snapshot.
        sigma_rel: width of the average.

    Returns:
        One coefficient per snapshot, which sum to 1, and the relative L2 error of the mixed profile.

    Raises:
        ValueError: where a width lies outside (0, 1 / sqrt(12)].
    """
    steps = np.array([float(s) for s, _ in snapshots])
    gammas = np.array([power_exponent(width) for _, width in snapshots])
    wanted = np.array([float(step)]), np.array([power_exponent(sigma_rel)])
    among, with_wanted = profile_products(steps, gammas, steps, gammas), profile_products(steps, gammas, *wanted)[:, 0]
    # a Lagrange multiplier makes the coefficients sum to 1, so that weights that never change stay the same
    ones = np.ones((len(steps), 1))
    system = np.block([[among, ones], [ones.T, np.zeros((1, 1))]])
    coefficients = np.linalg.lstsq(system, np.append(with_wanted, 1.0), rcond=1e-12)[0][:-1]
    norm = profile_products(*wanted, *wanted)[0, 0]
    residual = norm - 2 * coefficients @ with_wanted + coefficients @ among @ coefficients
    return coefficients, float(np.sqrt(max(residual, 0) / norm))
