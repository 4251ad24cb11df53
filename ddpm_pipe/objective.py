"""The training loss: lines 2 to 5 of Algorithm 1 of DDPM for one batch, for every parametrisation and weighting."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_pipe.checks import check_choice
from ddpm_pipe.likelihood import vlb_term
from ddpm_pipe.noise import snr
from ddpm_pipe.prediction import PREDICTIONS, loss_weight
from ddpm_pipe.schedulers import LEARNED_VARIANCES, DDPMScheduler

LOSSES: dict[str, Callable[..., Tensor]] = {"l1": F.l1_loss, "l2": F.mse_loss, "huber": F.smooth_l1_loss}


class Objective:
    """The weighted denoising loss (DDPM eq. 14 and after), in float32 whatever the network's precision.

    With a scheduler of learned variance it is the hybrid loss of Improved DDPM (eq. 16): the variational bound is added
    and trains the variance alone.

    Args:
        scheduler: gives the noise levels, `prediction_type` and `variance_type`.
        loss: a key of `LOSSES`.
        weight: a key of `prediction.LOSS_WEIGHTS`.
        gamma, k: constants of the weight; None takes those of its paper.
        vlb_weight: lambda of the hybrid loss, 0.001 in the paper.

    Raises:
        ValueError: for an unknown value, naming the accepted ones.
    """

    def __init__(
        self,
        scheduler: DDPMScheduler,
        loss: str = "l2",
        weight: str = "none",
        gamma: float | None = None,
        k: float | None = None,
        vlb_weight: float = 1e-3,
    ):
        check_choice("loss", loss, LOSSES)
        self.scheduler = scheduler
        self.loss = LOSSES[loss]
        levels = snr(scheduler.alpha_bar(torch.arange(len(scheduler))))
        self.weights = loss_weight(weight, scheduler.config.prediction_type, levels, gamma, k).float()
        self.vlb_weight = vlb_weight

    def __call__(
        self, unet: nn.Module, x0: Tensor, t: Tensor, eps: Tensor, self_condition: bool = False, **conditions: Tensor
    ) -> Tensor:
        """Return the loss of each image, (B,).

        Args:
            unet: the network, called as unet(x_t, t, **conditions).
            x0: clean images in [-1, 1], (B, C, H, W).
            t: timesteps, (B,).
            eps: the noise, shaped like x0.
            self_condition: whether to show the network its own estimate of x0, made without gradient (Analog Bits,
                Algorithm 1).
            conditions: other arguments of the network, e.g. `class_labels` (B,).
        """
        channels, alpha_bar = x0.shape[1], self.scheduler.alpha_bar(t)
        row = PREDICTIONS[self.scheduler.config.prediction_type]
        x_t = self.scheduler.add_noise(x0, eps, t)
        if self_condition:
            with torch.no_grad():
                # a copy, because a CUDA graph of torch.compile overwrites its output at the second call
                estimate = unet(x_t, t, **conditions).sample.to(torch.float32, copy=True)
                conditions["self_cond"] = row.x0(estimate[:, :channels], x_t, alpha_bar)
        output = unet(x_t, t, **conditions).sample.float()
        prediction = output[:, :channels]
        error = self.loss(prediction, row.target(x0, eps, alpha_bar), reduction="none").flatten(1).mean(1)
        self.weights = self.weights.to(t.device)  # the first call copies them
        loss = error * self.weights[t]
        if self.scheduler.config.variance_type in LEARNED_VARIANCES:
            output = torch.cat([prediction.detach(), output[:, channels:]], dim=1)
            bound = vlb_term(self.scheduler, output, x0, x_t, t, clip=False)
            loss = loss + self.vlb_weight * len(self.scheduler) * bound
        return loss
