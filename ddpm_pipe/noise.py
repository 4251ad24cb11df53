"""The forward process q of DDPM: how much noise there is at each timestep, and what follows from it in closed form.

The functions are pure, except for `draw_noise`. Tables are float64 of shape (T,). A coefficient, such as
`alpha_bar`, multiplies images of shape (B, C, H, W). It is a number or a 0-d tensor where the whole batch has one noise
level, and has shape (B,) where each image has its own. The formulas are the same for all of these; with numbers, the
device computes nothing but the images.
"""

import math
from collections.abc import Callable

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ddpm_pipe.checks import check_choice

# ---------------------------------------------------------------- schedules: name -> betas of shape (T,)


def _linear(steps: int, beta_start: float, beta_end: float) -> Tensor:
    """DDPM (Ho et al. 2020), section 4: beta grows linearly."""
    return torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)


def _linear_rescaled(steps: int, beta_start: float, beta_end: float) -> Tensor:
    """`linear` with both ends multiplied by 1000 / T, so that a chain of any length destroys the image equally."""
    return _linear(steps, beta_start * 1000 / steps, beta_end * 1000 / steps).clamp(max=0.999)


def _scaled_linear(steps: int, beta_start: float, beta_end: float) -> Tensor:
    """Latent diffusion (Rombach et al. 2022): the square root of beta grows linearly."""
    return torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64) ** 2


def _sigmoid(steps: int, beta_start: float, beta_end: float) -> Tensor:
    """diffusers' `sigmoid` (from GeoDiff, Xu et al. 2022): beta itself follows a sigmoid over [-6, 6]."""
    return torch.linspace(-6, 6, steps, dtype=torch.float64).sigmoid() * (beta_end - beta_start) + beta_start


def _betas_from_alpha_bar(alpha_bar: Callable[[Tensor], Tensor], steps: int) -> Tensor:
    """Return betas <= 0.999 for which prod(1 - beta) follows `alpha_bar` on [0, 1] (Improved DDPM, section 3.2)."""
    curve = alpha_bar(torch.linspace(0, 1, steps + 1, dtype=torch.float64))
    return (1 - curve[1:] / curve[:-1]).clamp(max=0.999)


def _cosine(steps: int, beta_start: float, beta_end: float) -> Tensor:
    """Improved DDPM (Nichol & Dhariwal 2021), eq. 17: alpha_bar follows a squared cosine with the offset s = 0.008."""
    return _betas_from_alpha_bar(lambda u: torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2, steps)


def _laplace(steps: int, beta_start: float, beta_end: float) -> Tensor:
    """diffusers' `laplace` (Hang & Gu 2024): log SNR follows the quantiles of a Laplace distribution."""

    def alpha_bar(u: Tensor) -> Tensor:
        side = torch.where(u > 0.5, -1.0, 1.0)
        snr = torch.exp(-0.5 * side * torch.log(1 - 2 * (0.5 - u).abs() + 1e-6))
        return (snr / (1 + snr)).sqrt()

    return _betas_from_alpha_bar(alpha_bar, steps)


def _sigmoid_alpha_bar(steps: int, beta_start: float, beta_end: float) -> Tensor:
    """The sigmoid of Jabri, Fleet & Chen (2022) and Chen (2023): alpha_bar follows a sigmoid over [-3, 3], tau = 1."""

    def alpha_bar(u: Tensor) -> Tensor:
        low, high = torch.tensor([-3.0, 3.0], dtype=torch.float64).sigmoid()
        return (high - (6 * u - 3).sigmoid()) / (high - low)

    return _betas_from_alpha_bar(alpha_bar, steps)


BETA_SCHEDULES: dict[str, Callable[[int, float, float], Tensor]] = {
    "linear": _linear,
    "linear_rescaled": _linear_rescaled,
    "scaled_linear": _scaled_linear,
    "squaredcos_cap_v2": _cosine,
    "cosine": _cosine,
    "sigmoid": _sigmoid,
    "sigmoid_alpha_bar": _sigmoid_alpha_bar,
    "laplace": _laplace,
}


def make_betas(name: str, steps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """Make the variances beta_t of the kernels q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I) (DDPM eq. 2).

    Args:
        name: a key of `BETA_SCHEDULES`.
        steps: T, the number of training timesteps.
        beta_start, beta_end: the range of beta in (0, 1); only schedules that have a range read it.

    Returns:
        float64 betas of shape (T,), each in (0, 1).

    Raises:
        ValueError: for an unknown name, fewer steps than 1, or a beta outside (0, 1).
    """
    check_choice("beta_schedule", name, BETA_SCHEDULES)
    if steps < 1:
        raise ValueError(f"num_train_timesteps={steps} must be at least 1.")
    if 0 < beta_start < 1 and 0 < beta_end < 1:
        betas = BETA_SCHEDULES[name](steps, beta_start, beta_end)
        if ((betas > 0) & (betas < 1)).all():
            return betas
    raise ValueError(f"beta_start={beta_start}, beta_end={beta_end} put a beta of {name!r} outside (0, 1).")


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shift and scale sqrt(alpha_bar) so that nothing of the image is left at T (Lin et al. 2024, Algorithm 1).

    Args:
        betas: shape (T,).

    Returns:
        float64 betas of shape (T,); the first is unchanged and the last is exactly 1.
    """
    root = torch.cumprod(1 - betas.double(), 0).sqrt()
    alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    alphas = torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
    return 1 - alphas


# ---------------------------------------------------------------- coefficients

Coefficient = float | Tensor
"""A number or a tensor; the functions of this module compute the same from both."""


def sqrt(x: Coefficient) -> Coefficient:
    return x.sqrt() if isinstance(x, Tensor) else math.sqrt(x)


def log(x: Coefficient) -> Coefficient:
    return x.log() if isinstance(x, Tensor) else math.log(x)


def exp(x: Coefficient) -> Coefficient:
    return x.exp() if isinstance(x, Tensor) else math.exp(x)


def broadcast(coefficient: Coefficient, like: Tensor) -> Coefficient:
    """Bring a coefficient to a form that multiplies images `like`, of shape (B, ...), in float32 or better.

    A number, or a tensor that has as many dimensions as the images, is returned as it is. A 0-d tensor stays on its
    device, since a CPU scalar multiplies a GPU tensor without a copy. With images in half precision it does not, since
    a 0-d tensor would not raise the product to float32.
    """
    if not isinstance(coefficient, Tensor) or coefficient.ndim == like.ndim:
        return coefficient
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if coefficient.ndim == 0 and like.dtype in (torch.float32, torch.float64):
        return coefficient.to(dtype)
    return coefficient.to(like.device, dtype, non_blocking=True).view(-1, *[1] * (like.ndim - 1))


def add_scaled(x: Tensor, b: Coefficient, y: Tensor) -> Tensor:
    """Return x + b y for images x and y of shape (B, ...)."""
    return x + broadcast(b, y) * y if isinstance(b, Tensor) else torch.add(x, y, alpha=b)


def mix(a: Coefficient, x: Tensor, b: Coefficient, y: Tensor) -> Tensor:
    """Return a x + b y for images x and y of shape (B, ...)."""
    ax = broadcast(a, x) * x
    return ax + broadcast(b, y) * y if isinstance(b, Tensor) else ax.add_(y, alpha=b)


# ---------------------------------------------------------------- closed forms


def signal_and_noise(alpha_bar: Coefficient) -> tuple[Coefficient, Coefficient]:
    """Return sqrt(alpha_bar) and sqrt(1 - alpha_bar) in the precision of alpha_bar.

    In half precision, 1 - alpha_bar would be lost near t = 0.
    """
    return sqrt(alpha_bar), sqrt(1 - alpha_bar)


def add_noise(x0: Tensor, eps: Tensor, alpha_bar: Coefficient) -> Tensor:
    """Return x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps ~ q(x_t | x0) (DDPM eq. 4), in the dtype of x0."""
    signal, noise = signal_and_noise(alpha_bar)
    return mix(signal, x0, noise, eps).to(x0.dtype)


def posterior_coefficients(
    alpha_bar_t: Coefficient, alpha_bar_s: Coefficient
) -> tuple[Coefficient, Coefficient, Coefficient]:
    """Return the coefficients of q(x_s | x_t, x0) for an earlier step s < t (DDPM eq. 6-7, with beta_t of t -> s).

    Args:
        alpha_bar_t, alpha_bar_s: noise levels of the later and the earlier step: numbers, 0-d, (B,) or whole tables;
            s = -1, the clean image, has alpha_bar 1.

    Returns:
        The factor of x0, the factor of x_t and the variance beta_tilde, each shaped like the arguments.
    """
    alpha = alpha_bar_t / alpha_bar_s
    beta = 1 - alpha
    noise_t, noise_s = 1 - alpha_bar_t, 1 - alpha_bar_s
    return sqrt(alpha_bar_s) * beta / noise_t, sqrt(alpha) * noise_s / noise_t, noise_s / noise_t * beta


def posterior(
    x0: Tensor, x_t: Tensor, alpha_bar_t: Coefficient, alpha_bar_s: Coefficient
) -> tuple[Tensor, Coefficient]:
    """Return the mean, (B, ...), and variance, shaped like the noise levels, of q(x_s | x_t, x0) (DDPM eq. 6-7)."""
    of_x0, of_x_t, variance = posterior_coefficients(alpha_bar_t, alpha_bar_s)
    return mix(of_x0, x0, of_x_t, x_t), variance


def snr(alpha_bar: Tensor) -> Tensor:
    """Return the signal-to-noise ratio alpha_bar / (1 - alpha_bar) (Kingma et al. 2021, eq. 2)."""
    return alpha_bar / (1 - alpha_bar)


# ---------------------------------------------------------------- noise itself


def draw_noise(
    shape: tuple[int, ...],
    generator: torch.Generator | list[torch.Generator] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Draw N(0, I), the numbers that diffusers draws; what a generator of the CPU draws is copied without a wait.

    Args:
        shape: (B, ...) of the noise.
        generator: source of the noise; a list has one per image, and None is torch's own generator of the device.
        device, dtype: of the noise.
    """
    first = generator[0] if isinstance(generator, list) else generator
    on_cpu = first is not None and first.device.type == "cpu"
    drawn = randn_tensor(shape, generator, torch.device("cpu") if on_cpu else device, dtype)
    if on_cpu and device.type == "cuda":
        drawn = drawn.pin_memory()  # other memory is copied in pieces, for which the CPU waits
    return drawn.to(device, non_blocking=True)
