"""DDPM and DDIM samplers with the interface of diffusers' schedulers, thin layers over `noise` and `prediction`.

They take the constructor keys of `diffusers.DDPMScheduler` and `DDIMScheduler` with the same meaning and defaults. They
return the same numbers, except where those of diffusers are wrong; tests/test_schedulers_differences.py has each
difference. Tables are float64; `step` computes in float32 or better and never waits for the device.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import NamedTuple, overload

import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from torch import Tensor

from ddpm_pipe.checks import check_choice, falling_timesteps
from ddpm_pipe.noise import (
    BETA_SCHEDULES,
    Coefficient,
    add_noise,
    add_scaled,
    broadcast,
    draw_noise,
    exp,
    log,
    make_betas,
    mix,
    posterior,
    posterior_coefficients,
    rescale_zero_terminal_snr,
    sqrt,
)
from ddpm_pipe.prediction import PREDICTIONS, eps_from_x0, velocity

STOCK_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
"""The beta schedules that every scheduler of diffusers knows."""

LEARNED_VARIANCES = ("learned", "learned_range")
VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", *LEARNED_VARIANCES)


# ---------------------------------------------------------------- timesteps: (T, count, offset) -> increasing steps


def _linspace(steps: int, count: int, offset: int) -> np.ndarray:
    return np.linspace(0, steps - 1, count).round()


def _leading(steps: int, count: int, offset: int) -> np.ndarray:
    return np.arange(count) * (steps // count) + offset


def _trailing(steps: int, count: int, offset: int) -> np.ndarray:
    return (steps - np.arange(count) * (steps / count)).round()[::-1] - 1


def _quadratic(steps: int, count: int, offset: int) -> np.ndarray:
    """The CIFAR-10 setting of DDIM (Song et al. 2021, appendix D.2): tau_i = c i^2 up to 0.8 T.

    Near 0 some rounded squares coincide; each of these is raised to one more than the last, so that the count is kept.
    """
    squares = (np.linspace(0, np.sqrt(0.8 * steps), count) ** 2).astype(np.int64)
    index = np.arange(count)
    return np.maximum.accumulate(squares - index) + index


TIMESTEP_SPACINGS: dict[str, Callable[[int, int, int], np.ndarray]] = {
    "linspace": _linspace,
    "leading": _leading,
    "trailing": _trailing,
    "quadratic": _quadratic,
}
"""How to choose `count` of T timesteps; the first three are Table 2 of Lin et al. (2024)."""


# ---------------------------------------------------------------- what both samplers share


class DiffusionScheduler(SchedulerMixin, ConfigMixin):
    """The base of both samplers: it holds the noise levels, chooses the timesteps and clips x0.

    A sampler is a subclass with a `step`, whose `__init__` takes the keys of the config and calls `build`.
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers]
    order = 1
    init_noise_sigma = 1.0

    @classmethod
    def _get_compatibles(cls) -> list[type]:
        """Return the compatible schedulers of diffusers; SchedulerMixin would look their names up in this package."""
        diffusers = importlib.import_module("diffusers")
        return [cls, *(getattr(diffusers, name) for name in cls._compatibles if hasattr(diffusers, name))]

    def build(self, final_alpha_bar_is_one: bool = True) -> None:
        """Check the config and make the tables; each `__init__` calls this."""
        # When diffusers makes another scheduler of this config, it drops the keys listed here, and some schedulers,
        # such as Heun and KDPM2, have other defaults (beta_end 0.012). The list is empty to keep the chain the same.
        self.register_to_config(_use_default_values=[])
        config = self.config
        check_choice("prediction_type", config.prediction_type, PREDICTIONS)
        check_choice("timestep_spacing", config.timestep_spacing, TIMESTEP_SPACINGS)
        betas = self._betas()

        alpha_bar = torch.cumprod(1 - betas, 0)
        final = torch.ones(1, dtype=torch.float64) if final_alpha_bar_is_one else alpha_bar[:1]
        self._alpha_bar = torch.cat([final, alpha_bar])  # float64, (T + 1,): entry t + 1 is alpha_bar_t, t >= -1
        self._alpha_bar_numbers = dict(enumerate(self._alpha_bar.tolist(), start=-1))

        self.betas = betas.float()
        self.alphas = (1 - betas).float()
        self.alphas_cumprod = alpha_bar.float()

        self.num_inference_steps: int | None = None
        self.custom_timesteps = False
        self._set(np.arange(config.num_train_timesteps))

    def _betas(self) -> Tensor:
        """Return the betas of the config, float64 (T,).

        The config names a schedule as diffusers does; a schedule that diffusers lacks is also written out as
        `trained_betas`. So any scheduler of diffusers made from this config has the same noise levels.
        """
        config = self.config
        if config.trained_betas is None:
            name = config.beta_schedule
            betas = make_betas(name, config.num_train_timesteps, config.beta_start, config.beta_end)
            same = [stock for stock in STOCK_SCHEDULES if BETA_SCHEDULES[stock] is BETA_SCHEDULES[name]]
            self.register_to_config(**{"beta_schedule": same[0]} if same else {"trained_betas": betas.tolist()})
        else:
            check_choice("beta_schedule", config.beta_schedule, BETA_SCHEDULES)
            betas = torch.as_tensor(np.asarray(config.trained_betas, dtype=np.float64))
            if betas.shape != (config.num_train_timesteps,) or not ((betas > 0) & (betas <= 1)).all():
                raise ValueError(
                    f"trained_betas must hold num_train_timesteps={config.num_train_timesteps} values in (0, 1], "
                    f"got shape {tuple(betas.shape)}."
                )
        return rescale_zero_terminal_snr(betas) if config.rescale_betas_zero_snr else betas

    # ------------------------------------------------------------ timesteps

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Choose the timesteps of sampling.

        Args:
            num_inference_steps: how many of the T training timesteps, 1 to T, spaced as `timestep_spacing` says.
            device: where `timesteps` should lie; None leaves them on the CPU.
            timesteps: the timesteps themselves instead of their number: strictly decreasing, T - 1 to 0.

        Raises:
            ValueError: where both or neither are given, or where the number or a timestep lies outside the chain.
        """
        steps = self.config.num_train_timesteps
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("set_timesteps takes exactly one of num_inference_steps and timesteps.")
        if num_inference_steps is None:
            chosen = np.asarray(falling_timesteps(timesteps, steps))[::-1]
        else:
            if not 1 <= num_inference_steps <= steps:
                raise ValueError(
                    f"num_inference_steps={num_inference_steps} must lie between 1 and num_train_timesteps={steps}."
                )
            offset = self.config.steps_offset
            chosen = TIMESTEP_SPACINGS[self.config.timestep_spacing](steps, num_inference_steps, offset)
            if chosen[-1] >= steps:
                raise ValueError(f"steps_offset={offset} moves a timestep past the last of {steps}; use a smaller one.")
        self.custom_timesteps = timesteps is not None
        self.num_inference_steps = len(chosen)
        self._set(chosen, device)

    def _set(self, increasing: np.ndarray, device: str | torch.device | None = None) -> None:
        chosen = torch.from_numpy(increasing.astype(np.int64))
        self.timesteps = chosen.flip(0).to(device)
        # Entry t is the chosen timestep before t, or -1. With this table `step` needs no search and no host sync.
        below = torch.searchsorted(chosen, torch.arange(self.config.num_train_timesteps))
        previous = torch.cat([torch.tensor([-1]), chosen])[below]
        self._previous_numbers = dict(enumerate(previous.tolist()))
        self._previous = previous
        self._placed: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._tables(self.timesteps.device)

    def _tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return `_alpha_bar` and `_previous` on a device.

        `set_timesteps` copies them to its device. They are copied to another one, as in a training that never calls
        `set_timesteps`, when they are first asked for.
        """
        if device not in self._placed:
            tables = self._alpha_bar, self._previous
            self._placed[device] = tables[0].to(device, non_blocking=True), tables[1].to(device, non_blocking=True)
        return self._placed[device]

    def previous_timestep(self, timestep: int | Tensor) -> int | Tensor:
        """Return the timestep that follows `timestep` in sampling, -1 after the last.

        The result is a number for a number, else a tensor shaped like `timestep`.

        Raises:
            ValueError: for a number that is not a timestep of the chain.
        """
        if not isinstance(timestep, Tensor):
            if timestep not in self._previous_numbers:
                raise ValueError(f"timestep={timestep} must be a whole number from 0 to {len(self) - 1}.")
            return self._previous_numbers[timestep]
        _, previous = self._tables(timestep.device)
        return previous.index_select(0, timestep.reshape(-1)).view(timestep.shape)

    @overload
    def alpha_bar(self, timestep: int) -> float: ...

    @overload
    def alpha_bar(self, timestep: Tensor) -> Tensor: ...

    def alpha_bar(self, timestep: int | Tensor) -> Coefficient:
        """Return alpha_bar at timesteps >= -1: a number for a number, else float64 in timestep's shape and device."""
        if not isinstance(timestep, Tensor):
            return self._alpha_bar_numbers[timestep]
        alpha_bar, _ = self._tables(timestep.device)
        return alpha_bar.index_select(0, timestep.reshape(-1).long() + 1).view(timestep.shape)

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    # ------------------------------------------------------------ the forward process

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """Return `sample` as it is, since these samplers keep x_t in the network's own scale."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return x_t ~ q(x_t | x0) for images and noise (B, C, H, W) and timesteps (B,) (DDPM eq. 4)."""
        return add_noise(original_samples, noise, self.alpha_bar(timesteps))

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return v (Salimans & Ho 2022) of clean images `sample` and noise (B, C, H, W) at timesteps (B,)."""
        return velocity(sample, noise, self.alpha_bar(timesteps)).to(sample.dtype)

    # ------------------------------------------------------------ the denoised image

    def clip(self, x0: Tensor) -> Tensor:
        """Clip x0 or threshold it dynamically (Saharia et al. 2022, section 2.3), as the config says."""
        if self.config.thresholding:
            magnitude = x0.flatten(1).abs().float()
            quantile = magnitude.quantile(self.config.dynamic_thresholding_ratio, dim=1)
            bound = quantile.clamp(1, self.config.sample_max_value).view(-1, *[1] * (x0.ndim - 1))
            return x0.clamp(-bound, bound) / bound
        if self.config.clip_sample:
            return x0.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        return x0


def _at_least_float32(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor if tensor.dtype == torch.float64 else tensor.float() for tensor in tensors)


def _in_dtype(dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor if tensor.dtype == dtype else tensor.to(dtype) for tensor in tensors)


# ---------------------------------------------------------------- DDPM


class ReverseKernel(NamedTuple):
    """The Gaussian p(x_s | x_t) of the network, in float32 or better."""

    mean: Tensor
    """(B, C, H, W)"""
    log_variance: Coefficient
    """a number, or a tensor that broadcasts over the mean"""
    x0: Tensor
    """the estimate of the clean image that the mean was made from, (B, C, H, W)"""


class DDPMScheduler(DiffusionScheduler):
    """Ancestral sampling (DDPM, Ho et al. 2020, Algorithm 2), with the interface of `diffusers.DDPMScheduler`.

    Args:
        num_train_timesteps: T, the length of the training chain.
        beta_start, beta_end: the range of beta in (0, 1), for the schedules that have one.
        beta_schedule: a key of `noise.BETA_SCHEDULES`.
        trained_betas: T betas in (0, 1] that replace the schedule.
        variance_type: variance of the reverse kernel. `fixed_small` is beta_tilde, that of the posterior, and
            `fixed_large` is beta; the names with `_log` mean the same. With `learned`, the second half of the network's
            2C output channels is the variance itself; with `learned_range`, it interpolates between both in the log
            domain (Improved DDPM, eq. 15).
        clip_sample, clip_sample_range: whether to clip the predicted x0, and to which +- range; the data is in [-1, 1].
        prediction_type: a key of `prediction.PREDICTIONS`.
        thresholding, dynamic_thresholding_ratio, sample_max_value: use dynamic thresholding instead of clipping.
        timestep_spacing: a key of `TIMESTEP_SPACINGS`.
        steps_offset: added to the timesteps of `leading`.
        rescale_betas_zero_snr: whether to rescale betas to zero terminal SNR (Lin et al. 2024).

    Raises:
        ValueError: for an unknown value, naming the accepted ones.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
    ):
        check_choice("variance_type", variance_type, VARIANCE_TYPES)
        self.variance_type = variance_type
        self.build()
        # this is beta_tilde of 1 -> 0, the last step that has noise; the decoder has it too (DDPM, section 3.3)
        ends = self._alpha_bar[[min(2, num_train_timesteps), 1]]
        self._last_variance = posterior_coefficients(*ends.tolist())[2] or 1e-20

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """Draw x_s from p(x_s | x_t), where s is the next chosen timestep (DDPM, Algorithm 2, lines 3-4).

        Args:
            model_output: the network's output, (B, C, H, W), or (B, 2C, H, W) with learned variance.
            timestep: t, an int or a tensor, 0-d or (B,).
            sample: x_t, (B, C, H, W).
            generator: of the noise; a list has one per image.

        Returns:
            `prev_sample`, x_s in the dtype of `sample` (the mean alone where s = -1), and `pred_original_sample`, x0.

        Raises:
            ValueError: where the channels of `model_output` do not fit `variance_type`.
        """
        s = self.previous_timestep(timestep)
        mean, log_variance, x0 = self.reverse_kernel(model_output, timestep, s, sample)
        z = draw_noise(sample.shape, generator, sample.device, sample.dtype)
        x_s = add_scaled(mean, broadcast(s >= 0, mean) * exp(0.5 * log_variance), z)

        x_s, x0 = _in_dtype(sample.dtype, x_s, x0)
        return DDPMSchedulerOutput(prev_sample=x_s, pred_original_sample=x0) if return_dict else (x_s, x0)

    def reverse_kernel(
        self, model_output: Tensor, t: int | Tensor, s: int | Tensor, x_t: Tensor, clip: bool = True
    ) -> ReverseKernel:
        """Return p(x_s | x_t) = N(mean, variance) for an earlier step s < t (DDPM eq. 1 and 7, x0 from the network).

        Args:
            model_output: the network's output, (B, C, H, W), or (B, 2C, H, W) with learned variance.
            t, s: timesteps, both numbers or both tensors, 0-d or (B,); s = -1 is the clean image, for which the
                kernel has the variance of the step before.
            x_t: (B, C, H, W).
            clip: whether to clip or threshold x0 as the config says.

        Raises:
            ValueError: where the channels of `model_output` do not fit `variance_type`.
        """
        output, x_t = _at_least_float32(model_output, x_t)
        output, *variance_output = self._split(output, x_t.shape[1])
        alpha_bar_t, alpha_bar_s = self.alpha_bar(t), self.alpha_bar(s)
        x0 = PREDICTIONS[self.config.prediction_type].x0(output, x_t, alpha_bar_t)
        x0 = self.clip(x0) if clip else x0
        mean, small = posterior(x0, x_t, alpha_bar_t, alpha_bar_s)
        if isinstance(s, Tensor):
            small = torch.where(s < 0, self._last_variance, small)
        elif s < 0:
            small = self._last_variance
        log_variance = self._log_variance(small, 1 - alpha_bar_t / alpha_bar_s, x_t, *variance_output)
        return ReverseKernel(mean, log_variance, x0)

    def _split(self, output: Tensor, channels: int) -> tuple[Tensor, ...]:
        """Split off the prediction (B, C, H, W) and, where it is learned, the variance, of the same shape."""
        learned = self.config.variance_type in LEARNED_VARIANCES
        expected = 2 * channels if learned else channels
        if output.shape[1] != expected:
            raise ValueError(
                f"variance_type={self.config.variance_type!r} needs a network output of {expected} channels for images "
                f"of {channels}, got {output.shape[1]}; learned and learned_range take twice the image's channels."
            )
        return output.split(channels, dim=1) if learned else (output,)

    def _log_variance(self, small: Coefficient, large: Coefficient, like: Tensor, *learned: Tensor) -> Coefficient:
        """Return the kernel's log variance over images `like`, between beta_tilde (`small`) and beta (`large`)."""
        if self.config.variance_type == "learned":
            return learned[0].clamp(min=1e-20).log()
        log_small, log_large = broadcast(log(small), like), broadcast(log(large), like)
        if self.config.variance_type == "learned_range":  # Improved DDPM, eq. 15
            share = (learned[0] + 1) / 2
            return share * log_large + (1 - share) * log_small
        return log_large if "large" in self.config.variance_type else log_small


# ---------------------------------------------------------------- DDIM


class DDIMScheduler(DiffusionScheduler):
    """Implicit sampling (DDIM, Song et al. 2021, eq. 12 and 16), with the interface of `diffusers.DDIMScheduler`.

    The arguments are those of `DDPMScheduler` except `variance_type`, since the variance channels of a network with
    learned variance are ignored. `set_alpha_to_one` says whether the last step ends at the clean image (True) or at the
    noise level of timestep 0 (False).
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
    ):
        self.build(final_alpha_bar_is_one=set_alpha_to_one)
        self.final_alpha_cumprod = self._alpha_bar[0].float()

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """Go from x_t to x_s, where s is the next chosen timestep (DDIM eq. 12).

        Args:
            model_output: the network's output, (B, C, H, W), or (B, 2C, H, W) with learned variance.
            timestep: t, an int or a tensor, 0-d or (B,).
            sample: x_t, (B, C, H, W).
            eta: how much noise to add, 0 (none: deterministic) to 1 (the posterior's, as DDPM with `fixed_small`).
            use_clipped_model_output: whether to derive the noise anew from the clipped x0.
            generator: of the noise; a list has one per image.
            variance_noise: the noise itself, (B, C, H, W), instead of a generator.

        Returns:
            `prev_sample`, x_s in the dtype of `sample`, and `pred_original_sample`, x0.

        Raises:
            ValueError: where both a generator and noise are given, or eta is not in [0, 1].
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"eta={eta} must lie between 0 (DDIM) and 1 (DDPM).")
        if generator is not None and variance_noise is not None:
            raise ValueError("step takes a generator or variance_noise, not both.")
        output, x_t = _at_least_float32(model_output, sample)
        output = output[:, : x_t.shape[1]] if output.shape != x_t.shape else output
        s = self.previous_timestep(timestep)
        alpha_bar_t, alpha_bar_s = self.alpha_bar(timestep), self.alpha_bar(s)

        row = PREDICTIONS[self.config.prediction_type]
        x0 = self.clip(row.x0(output, x_t, alpha_bar_t))
        eps = eps_from_x0(x0, x_t, alpha_bar_t) if use_clipped_model_output else row.eps(output, x_t, alpha_bar_t)
        # eq. 16: this share of the noise 1 - alpha_bar_s is new; where eta = 1 it makes up the posterior's variance
        new = eta**2 * (1 - alpha_bar_t / alpha_bar_s) / (1 - alpha_bar_t)
        x_s = mix(sqrt(alpha_bar_s), x0, sqrt((1 - alpha_bar_s) * (1 - new)), eps)
        if eta > 0:
            if variance_noise is None:
                variance_noise = draw_noise(sample.shape, generator, sample.device, sample.dtype)
            x_s = add_scaled(x_s, sqrt((1 - alpha_bar_s) * new), variance_noise)

        x_s, x0 = _in_dtype(sample.dtype, x_s, x0)
        return DDIMSchedulerOutput(prev_sample=x_s, pred_original_sample=x0) if return_dict else (x_s, x0)
