"""The variational bound on -log p(x0), term by term (DDPM eq. 5), with Gaussian steps and a decoder of 8-bit pixels.

Images are in [-1, 1]. Results are per image, in bits per dimension; one colour value of one pixel is a dimension.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_pipe.noise import draw_noise, log, posterior, signal_and_noise
from ddpm_pipe.schedulers import DDPMScheduler


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """Return KL(N(mean1, variance1) || N(mean2, variance2)) in nats, element by element, from log variances."""
    difference = log_variance1 - log_variance2
    return 0.5 * (difference.exp() - 1 - difference + (mean1 - mean2) ** 2 * (-log_variance2).exp())


def discretized_gaussian_log_likelihood(x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return the log of the mass that N(mean, variance) gives to the bin of each 8-bit value (DDPM eq. 13), in nats.

    Args:
        x0: pixels in [-1, 1], multiples of 2/255; the outermost bins reach to infinity.
        mean, log_variance: of the decoder's Gaussian; both broadcast over x0.
    """
    # float64, since far from the mean the differences and gradients of log cdfs lose all digits of float32
    precision = (-0.5 * log_variance.double()).exp()
    upper, lower = (x0.double() - mean + 1 / 255) * precision, (x0.double() - mean - 1 / 255) * precision
    # this is log(cdf(upper) - cdf(lower)), on the side of the mean where the difference of log cdfs keeps its digits
    near, far = torch.where(upper + lower > 0, -lower, upper), torch.where(upper + lower > 0, -upper, lower)
    log_near, log_far = torch.special.log_ndtr(near), torch.special.log_ndtr(far)
    inner = log_near + torch.log(-torch.expm1((log_far - log_near).clamp(max=-1e-12)))
    inner = torch.where(x0 < -0.999, torch.special.log_ndtr(upper), inner)
    return torch.where(x0 > 0.999, torch.special.log_ndtr(-lower), inner).to(x0.dtype)


def bits(nats: Tensor) -> Tensor:
    """Convert nats (B, C, H, W) to bits per dimension (B,), the mean over the dimensions of each image."""
    return nats.flatten(1).mean(1) / math.log(2)


def vlb_term(
    scheduler: DDPMScheduler, model_output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, clip: bool = True
) -> Tensor:
    """Return L_{t-1} of DDPM eq. 5, KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)), or L_0 = -log p(x0 | x_1).

    Args:
        scheduler: gives the chain and the variance of the reverse kernel.
        model_output: the network's output for x_t, (B, C, H, W) or (B, 2C, H, W).
        x0, x_t: clean and noisy images, (B, C, H, W).
        t: timesteps, (B,), counted from 0; for t = 0 the term is that of the decoder, L_0.
        clip: whether to clip the network's x0 as the scheduler's config says.

    Returns:
        The terms in bits per dimension, (B,).
    """
    s = t - 1
    kernel = scheduler.reverse_kernel(model_output, t, s, x_t, clip)
    mean, variance = posterior(x0, x_t, scheduler.alpha_bar(t), scheduler.alpha_bar(s))
    log_variance = torch.as_tensor(variance).clamp(min=1e-20).log().to(mean.dtype).view(-1, *[1] * (x0.ndim - 1))
    of_network = torch.as_tensor(kernel.log_variance)
    kl = normal_kl(mean, log_variance, kernel.mean, of_network)
    decoder = -discretized_gaussian_log_likelihood(x0, kernel.mean, of_network)
    return torch.where(t == 0, bits(decoder), bits(kl))


# ---------------------------------------------------------------- the whole bound


class Bound(NamedTuple):
    """The bound on -log p(x0) of each image and its three parts (DDPM eq. 5), in bits per dimension, each (B,)."""

    prior: Tensor
    """L_T: the cost of what is left of the image at the end of the chain."""
    transitions: Tensor
    """L_{1:T-1}: the cost of all steps but the last."""
    decoder: Tensor
    """L_0: the cost of the 8-bit values."""

    @property
    def total(self) -> Tensor:
        """The sum of the parts; -log p(x0) is at most this."""
        return self.prior + self.transitions + self.decoder


def prior_term(scheduler: DDPMScheduler, x0: Tensor) -> Tensor:
    """Return L_T of DDPM eq. 5, KL(q(x_T | x0) || N(0, I)), of images (B, C, H, W) in bits per dimension, (B,)."""
    signal, noise = signal_and_noise(scheduler.alpha_bar(len(scheduler) - 1))
    zero = torch.zeros_like(x0)
    return bits(normal_kl(signal * x0, 2 * log(noise) + zero, zero, zero))


@torch.no_grad()
def variational_bound(
    denoise: Callable[[Tensor, Tensor], Tensor],
    scheduler: DDPMScheduler,
    x0: Tensor,
    count: int,
    generator: torch.Generator,
) -> Bound:
    """Estimate the bound without bias, with one draw of noise per term.

    Args:
        denoise: the network as (x_t (B, C, H, W), t (B,)) -> its output.
        scheduler: gives the chain and the variance of the reverse kernel.
        x0: images in [-1, 1] of 8-bit values, (B, C, H, W).
        count: how many of the T - 1 terms of L_{1:T-1} to compute for each image, 1 to T - 1; one term is drawn from
            each of as many equal parts of the chain.
        generator: source of timesteps and noise, on the CPU.

    Raises:
        ValueError: where `count` is not between 1 and T - 1.
    """
    last = len(scheduler) - 1
    if not 1 <= count <= last:
        raise ValueError(f"count={count} must lie between 1 and {last}, the number of transitions.")

    def term(t: Tensor) -> Tensor:
        eps = draw_noise(x0.shape, generator, x0.device, x0.dtype)
        x_t = scheduler.add_noise(x0, eps, t)
        return vlb_term(scheduler, denoise(x_t, t), x0, x_t, t)

    batch = (len(x0),)
    decoder = term(torch.zeros(batch, dtype=torch.long, device=x0.device))
    transitions = torch.zeros_like(decoder)
    for k in range(count):
        low, high = 1 + k * last // count, 1 + (k + 1) * last // count
        t = torch.randint(low, high, batch, generator=generator).to(x0.device, non_blocking=True)
        transitions += (high - low) * term(t)
    return Bound(prior_term(scheduler, x0), transitions, decoder)
