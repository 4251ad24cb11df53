"""What the network's output means, and how its error is weighted.

`PREDICTIONS` has one row per parametrisation, `LOSS_WEIGHTS` one per weighting. To add one, add a row.
"""

from collections.abc import Callable
from inspect import signature
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_pipe.checks import check_choice
from ddpm_pipe.noise import Coefficient, add_scaled, broadcast, mix, signal_and_noise


class Prediction(NamedTuple):
    """One parametrisation of the denoiser. Images are (B, C, H, W), alpha_bar is a number, 0-d or (B,)."""

    target: Callable[[Tensor, Tensor, Coefficient], Tensor]
    """(x0, eps, alpha_bar) -> what the network is trained to return."""
    x0: Callable[[Tensor, Tensor, Coefficient], Tensor]
    """(output, x_t, alpha_bar) -> the clean image that the output implies."""
    eps: Callable[[Tensor, Tensor, Coefficient], Tensor]
    """(output, x_t, alpha_bar) -> the noise that the output implies."""
    eps_weight: Callable[[Tensor], Tensor]
    """snr -> w with |eps - eps(output)|^2 = w |target - output|^2; times w, the plain loss is that of the noise."""


def x0_from_eps(eps: Tensor, x_t: Tensor, alpha_bar: Coefficient) -> Tensor:
    """Solve DDPM eq. 4 for the clean image."""
    signal, noise = signal_and_noise(alpha_bar)
    return add_scaled(x_t, -noise, eps) / broadcast(signal, x_t)


def eps_from_x0(x0: Tensor, x_t: Tensor, alpha_bar: Coefficient) -> Tensor:
    """Solve DDPM eq. 4 for the noise."""
    signal, noise = signal_and_noise(alpha_bar)
    return add_scaled(x_t, -signal, x0) / broadcast(noise, x_t)


def velocity(x0: Tensor, eps: Tensor, alpha_bar: Coefficient) -> Tensor:
    """Return v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0 (Salimans & Ho 2022, section 4 and appendix D)."""
    signal, noise = signal_and_noise(alpha_bar)
    return mix(signal, eps, -noise, x0)


def _x0_from_v(v: Tensor, x_t: Tensor, alpha_bar: Coefficient) -> Tensor:
    signal, noise = signal_and_noise(alpha_bar)
    return mix(signal, x_t, -noise, v)


def _eps_from_v(v: Tensor, x_t: Tensor, alpha_bar: Coefficient) -> Tensor:
    signal, noise = signal_and_noise(alpha_bar)
    return mix(signal, v, noise, x_t)


PREDICTIONS: dict[str, Prediction] = {
    "epsilon": Prediction(
        target=lambda x0, eps, alpha_bar: eps,
        x0=x0_from_eps,
        eps=lambda output, x_t, alpha_bar: output,
        eps_weight=torch.ones_like,
    ),
    "sample": Prediction(
        target=lambda x0, eps, alpha_bar: x0,
        x0=lambda output, x_t, alpha_bar: output,
        eps=eps_from_x0,
        eps_weight=lambda snr: snr,
    ),
    "v_prediction": Prediction(
        target=velocity,
        x0=_x0_from_v,
        eps=_eps_from_v,
        eps_weight=lambda snr: snr / (snr + 1),
    ),
}


# ---------------------------------------------------------------- loss weights

LOSS_WEIGHTS: dict[str, Callable[..., Tensor] | None] = {
    # the plain loss of whatever the network predicts (DDPM eq. 14)
    "none": None,
    # P2 (Choi et al. 2022, eq. 8)
    "p2": lambda snr, gamma=1.0, k=1.0: (k + snr) ** -gamma,
    # Min-SNR (Hang et al. 2023, section 3.4): the loss of x0 times min(snr, gamma)
    "min_snr": lambda snr, gamma=5.0: (gamma / snr).clamp(max=1),
}
"""(snr, constants of the weight, by default those of its paper) -> factor of the noise loss. `loss_weight` converts it
to what the network predicts, so that the same error of x0 costs the same."""


def loss_weight(
    name: str, prediction_type: str, snr: Tensor, gamma: float | None = None, k: float | None = None
) -> Tensor:
    """Return the factor that multiplies the plain loss at each noise level, shaped like `snr`.

    Args:
        name: a key of `LOSS_WEIGHTS`.
        prediction_type: a key of `PREDICTIONS`.
        snr: signal-to-noise ratios >= 0, any shape.
        gamma: the exponent of p2 or the ceiling of min_snr; None takes that of the paper, 1 or 5.
        k: constant of p2; None takes that of the paper, 1.

    Raises:
        ValueError: for an unknown name, naming the accepted ones.
    """
    check_choice("loss_weight", name, LOSS_WEIGHTS)
    check_choice("prediction_type", prediction_type, PREDICTIONS)
    weight = LOSS_WEIGHTS[name]
    if weight is None:
        return torch.ones_like(snr)
    known = signature(weight).parameters
    constants = {key: value for key, value in {"gamma": gamma, "k": k}.items() if value is not None and key in known}
    return PREDICTIONS[prediction_type].eps_weight(snr) * weight(snr, **constants)
