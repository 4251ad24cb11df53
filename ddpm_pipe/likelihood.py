"""The variational bound on -log p(x0), term by term (DDPM eq. 5): Gaussians, and a decoder of 8-bit pixels.

Images are in [-1, 1]; results are per image, in bits per dimension (one colour value of one pixel is a dimension).
"""

import math

import torch
from torch import Tensor

from ddpm_pipe.noise import posterior
from ddpm_pipe.schedulers import DDPMScheduler


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, variance1) || N(mean2, variance2)) in nats, element by element, from log variances."""
    difference = log_variance1 - log_variance2
    return 0.5 * (difference.exp() - 1 - difference + (mean1 - mean2) ** 2 * (-log_variance2).exp())


def discretized_gaussian_log_likelihood(x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log of the mass that N(mean, variance) gives to the bin of each 8-bit value (DDPM eq. 13), in nats.

    Args:
        x0: pixels in [-1, 1], multiples of 2/255; the outermost bins reach to infinity.
        mean, log_variance: of the decoder, broadcast over x0.
    """
    # in float64: the differences and the gradients of log cdfs lose all digits of float32 far from the mean
    precision = (-0.5 * log_variance.double()).exp()
    upper, lower = (x0.double() - mean + 1 / 255) * precision, (x0.double() - mean - 1 / 255) * precision
    # log(cdf(upper) - cdf(lower)), on the side of the mean where the difference of log cdfs keeps its digits
    near, far = torch.where(upper + lower > 0, -lower, upper), torch.where(upper + lower > 0, -upper, lower)
    log_near, log_far = torch.special.log_ndtr(near), torch.special.log_ndtr(far)
    inner = log_near + torch.log(-torch.expm1((log_far - log_near).clamp(max=-1e-12)))
    inner = torch.where(x0 < -0.999, torch.special.log_ndtr(upper), inner)
    return torch.where(x0 > 0.999, torch.special.log_ndtr(-lower), inner).to(x0.dtype)


def bits(nats: Tensor) -> Tensor:
    """Mean over the dimensions of each image, in bits: (B, C, H, W) -> (B,)."""
    return nats.flatten(1).mean(1) / math.log(2)


def vlb_term(
    scheduler: DDPMScheduler, model_output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, clip: bool = True
) -> Tensor:
    """L_{t-1} of DDPM eq. 5: KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)), and L_0 = -log p(x0 | x_1).

    Args:
        scheduler: the chain, and the variance of the reverse kernel.
        model_output: the network's output for x_t, (B, C, H, W) or (B, 2C, H, W).
        x0, x_t: clean and noisy images, (B, C, H, W).
        t: timesteps, (B,); 0 is the decoder's.
        clip: clip the network's x0 as the scheduler's config says.

    Returns:
        bits per dimension, (B,).
    """
    s = t - 1
    kernel = scheduler.reverse_kernel(model_output, t, s, x_t, clip)
    mean, variance = posterior(x0, x_t, scheduler.alpha_bar(t), scheduler.alpha_bar(s))
    log_variance = variance.clamp(min=1e-20).log().to(mean.dtype).view(-1, *[1] * (x0.ndim - 1))
    kl = normal_kl(mean, log_variance, kernel.mean, kernel.log_variance)
    decoder = -discretized_gaussian_log_likelihood(x0, kernel.mean, kernel.log_variance)
    return torch.where(t == 0, bits(decoder), bits(kl))
