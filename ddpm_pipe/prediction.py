"""What the network's output means, and how its error is weighted.

`PREDICTIONS` has one row per parametrisation, `LOSS_WEIGHTS` one per weighting. To add one, add a row.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_pipe.noise import signal_and_noise


class Prediction(NamedTuple):
    """One parametrisation of the denoiser. Images are (B, C, H, W), alpha_bar is 0-d or (B,)."""

    target: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(x0, eps, alpha_bar) -> what the network is trained to return."""
    x0: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(output, x_t, alpha_bar) -> the clean image that the output implies."""
    eps: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(output, x_t, alpha_bar) -> the noise that the output implies."""
    x0_weight: Callable[[Tensor], Tensor]
    """snr -> w with |target - output|^2 = w |x0 - x0(output)|^2: how the plain loss weighs an error of x0."""


def x0_from_eps(eps: Tensor, x_t: Tensor, alpha_bar: Tensor) -> Tensor:
    """Solve DDPM eq. 4 for the clean image."""
    signal, noise = signal_and_noise(alpha_bar, x_t)
    return (x_t - noise * eps) / signal


def eps_from_x0(x0: Tensor, x_t: Tensor, alpha_bar: Tensor) -> Tensor:
    """Solve DDPM eq. 4 for the noise."""
    signal, noise = signal_and_noise(alpha_bar, x_t)
    return (x_t - signal * x0) / noise


def velocity(x0: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0 (Salimans & Ho 2022, section 4 and appendix D)."""
    signal, noise = signal_and_noise(alpha_bar, x0)
    return signal * eps - noise * x0


def _x0_from_v(v: Tensor, x_t: Tensor, alpha_bar: Tensor) -> Tensor:
    signal, noise = signal_and_noise(alpha_bar, x_t)
    return signal * x_t - noise * v


def _eps_from_v(v: Tensor, x_t: Tensor, alpha_bar: Tensor) -> Tensor:
    signal, noise = signal_and_noise(alpha_bar, x_t)
    return signal * v + noise * x_t


PREDICTIONS: dict[str, Prediction] = {
    "epsilon": Prediction(
        target=lambda x0, eps, alpha_bar: eps,
        x0=x0_from_eps,
        eps=lambda output, x_t, alpha_bar: output,
        x0_weight=lambda snr: snr,
    ),
    "sample": Prediction(
        target=lambda x0, eps, alpha_bar: x0,
        x0=lambda output, x_t, alpha_bar: output,
        eps=eps_from_x0,
        x0_weight=torch.ones_like,
    ),
    "v_prediction": Prediction(
        target=velocity,
        x0=_x0_from_v,
        eps=_eps_from_v,
        x0_weight=lambda snr: snr + 1,
    ),
}


# ---------------------------------------------------------------- loss weights: (row, snr, gamma, k) -> factor


def _p2(row: Prediction, snr: Tensor, gamma: float, k: float) -> Tensor:
    """P2 (Choi et al. 2022, eq. 8): the noise loss times (k + snr)^-gamma, whatever the network predicts."""
    return snr * (k + snr) ** -gamma / row.x0_weight(snr)


def _p2_plain(row: Prediction, snr: Tensor, gamma: float, k: float) -> Tensor:
    """The factor of P2 on the plain loss of any parametrisation, as the reference implementation has it."""
    return (k + snr) ** -gamma


def _min_snr(row: Prediction, snr: Tensor, gamma: float, k: float) -> Tensor:
    """Min-SNR (Hang et al. 2023, section 3.4): the loss of x0 times min(snr, gamma), whatever the network predicts."""
    return snr.clamp(max=gamma) / row.x0_weight(snr)


LOSS_WEIGHTS: dict[str, Callable[[Prediction, Tensor, float, float], Tensor]] = {
    "none": lambda row, snr, gamma, k: torch.ones_like(snr),
    "p2": _p2,
    "p2_plain": _p2_plain,
    "min_snr": _min_snr,
}


def loss_weight(name: str, prediction_type: str, snr: Tensor, gamma: float, k: float = 1.0) -> Tensor:
    """The factor by which the plain loss at each noise level is multiplied.

    Args:
        name: a key of `LOSS_WEIGHTS`.
        prediction_type: a key of `PREDICTIONS`.
        snr: signal-to-noise ratios >= 0, any shape.
        gamma: the exponent of p2 (1 in the paper) or the ceiling of min_snr (5 in the paper).
        k: p2 only; the paper's k = 1.

    Returns:
        Weights shaped like `snr`. At snr = 0 (zero terminal SNR) noise prediction has no x0 to weigh and min_snr tends
        to 1, which is what it returns.
    """
    row = PREDICTIONS[prediction_type]
    weight = LOSS_WEIGHTS[name](row, snr, gamma, k)
    return torch.where(weight.isnan(), torch.ones_like(weight), weight)
