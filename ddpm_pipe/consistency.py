"""Easy consistency tuning (Geng et al. 2024, "Consistency Models Made Easy") on the discrete chain of DDPM.

A denoiser D(x_t) estimates the mean of all clean images that x_t may come from. Tuning turns it into a function that
answers the same image along a whole path of sampling, so that a single step draws it: D(x_t) learns to be what it is at
an earlier timestep r of the same image and noise, and r comes closer to t in the course of the run.
"""

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from ddpm_pipe.noise import snr
from ddpm_pipe.prediction import PREDICTIONS
from ddpm_pipe.schedulers import LEARNED_VARIANCES, DDPMScheduler

HUBER = 0.00054
"""c of the pseudo-Huber loss, for errors per pixel (Song & Dhariwal 2023, "Improved techniques for training consistency
models", section 3.3, whose norm is larger than the root mean square by the square root of the number of pixels)."""


def earlier_timestep(sigmas: Tensor, t: Tensor, stage: int) -> Tensor:
    """Return the timestep r < t whose answer is the target at t, (B,); -1 stands for the clean image.

    The noise level of r is at most sigma_t (1 - n(sigma_t) / 2^stage), with n(sigma) = 1 + 8 sigmoid(-sigma): the
    mapping of the paper, with its constants for CIFAR-10.

    Args:
        sigmas: sqrt(1 / snr) at timesteps -1, 0, ..., T - 1, increasing from 0, (T + 1,); the last may be infinite.
        t: timesteps, (B,).
        stage: from 1; with each stage, r comes closer to t, and in the end it is t - 1.
    """
    sigma = sigmas[t + 1]
    share = (1 - (1 + 8 * torch.sigmoid(-sigma)) / 2**stage).clamp(min=0)
    r = torch.searchsorted(sigmas, share * sigma, right=True) - 2
    return torch.minimum(r, t - 1)


class ConsistencyObjective:
    """The loss of easy consistency tuning, in float32 whatever the network's precision.

    Args:
        scheduler: gives the noise levels and `prediction_type`.
        stages: how often r comes closer to t in a run.
        teacher: the model whose guidance is learned, in evaluation mode; None for no guidance.
        null_class: the label with which the teacher estimates an image of any class.
        guidance: scale of that guidance, 1 for none.

    Raises:
        ValueError: for a scheduler whose networks cannot be tuned, saying why.
    """

    def __init__(
        self,
        scheduler: DDPMScheduler,
        stages: int = 4,
        teacher: ModelMixin | None = None,
        null_class: int | None = None,
        guidance: float = 1.0,
    ):
        config = scheduler.config
        if config.prediction_type == "epsilon":
            raise ValueError(
                "objective='consistency' needs prediction_type v_prediction or sample, because at the last timestep an "
                "error of the predicted noise is many times as large in the image; train a model that predicts noise "
                "further with prediction_type v_prediction first."
            )
        if config.variance_type in LEARNED_VARIANCES:
            raise ValueError("objective='consistency' trains no variance; choose variance_type fixed_small.")
        self.scheduler, self.stages = scheduler, stages
        self.teacher, self.null_class, self.guidance = teacher, null_class, guidance
        self.sigmas = snr(scheduler.alpha_bar(torch.arange(-1, len(scheduler)))).rsqrt()

    def __call__(
        self,
        unet: nn.Module,
        x0: Tensor,
        t: Tensor,
        eps: Tensor,
        self_condition: bool = False,
        progress: float = 1.0,
        **conditions: Tensor,
    ) -> Tensor:
        """Return the loss of each image, (B,); the arguments are those of `Objective`.

        The network answers twice with the same dropout. Its answer at the earlier timestep is without gradient. The
        weight 1 / sigma_t + 1 is, up to a factor of sqrt(2), that which makes an error of x0 one of v.
        """
        self.sigmas = self.sigmas.to(t.device)  # the first call copies them
        r = earlier_timestep(self.sigmas, t, 1 + min(int(progress * self.stages), self.stages - 1))
        x_t = self.scheduler.add_noise(x0, eps, t)
        x0, eps = self._guided(x0, eps, x_t, t, conditions)
        with torch.no_grad(), torch.random.fork_rng([t.device] if t.is_cuda else []):
            x_r = self.scheduler.add_noise(x0, eps, r.clamp(min=0))
            target = self._denoise(unet, x_r, r.clamp(min=0), conditions)
        target = torch.where((r < 0).view(-1, 1, 1, 1), x0, target)
        error = self._denoise(unet, x_t, t, conditions) - target
        distance = (error.square().flatten(1).mean(1) + HUBER**2).sqrt() - HUBER
        return distance * (1 + 1 / self.sigmas[t + 1]).float()

    @torch.no_grad()
    def _guided(
        self, x0: Tensor, eps: Tensor, x_t: Tensor, t: Tensor, conditions: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the image moved by what guidance adds to the teacher's estimate, and the noise that keeps x_t.

        The mean of x0 given x_t then is the guided estimate (Ho & Salimans 2021, eq. 6, whose w is one less), so that
        x_r lies, on average, where a step of DDIM with guidance goes from x_t.
        """
        if self.teacher is None or self.null_class is None:
            return x0, eps
        without = {"class_labels": torch.full_like(conditions["class_labels"], self.null_class)}
        with_class, without_class = (self._denoise(self.teacher, x_t, t, each) for each in (conditions, without))
        x0 = x0 + (self.guidance - 1) * (with_class - without_class)
        alpha_bar = self.scheduler.alpha_bar(t).view(-1, 1, 1, 1)
        return x0, ((x_t - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()).to(x0.dtype)

    def _denoise(self, unet: nn.Module, x_t: Tensor, t: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        """Return D(x_t), the network's estimate of x0, (B, C, H, W)."""
        output = unet(x_t, t, **conditions).sample.float()
        return PREDICTIONS[self.scheduler.config.prediction_type].x0(output, x_t, self.scheduler.alpha_bar(t))
