"""Checks of a scheduler that replaces a model's own: whether it can sample the model, and at which timesteps.

diffusers lets any scheduler be plugged into any pipeline, and many then draw wrong images without a warning.
"""

import inspect
from collections.abc import Sequence

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from ddpm_pipe.checks import check_choice, check_number, falling_timesteps
from ddpm_pipe.prediction import PREDICTIONS


def same_levels(first: Tensor, second: Tensor) -> bool:
    """Return whether two chains have the same noise levels, by their alpha_bar, each (T,)."""
    return first.shape == second.shape and torch.allclose(first, second, rtol=0, atol=1e-4)


def check_scheduler(scheduler: SchedulerMixin, own: SchedulerMixin) -> None:
    """Raise unless `scheduler` can sample a network that was trained with `own`.

    The scheduler must have the noise levels of that chain (`alphas_cumprod`), give the network's output the same
    meaning, need nothing for a step but that output, the timestep and x_t, and go from noise to an image. Schedulers of
    flow matching, EDM, score SDEs and tokens have other noise levels or none; others invert images or inpaint.

    Raises:
        ValueError: where it cannot; the sentence names the scheduler and the reason.
    """
    name = f"scheduler={type(scheduler).__name__}"
    levels, own_levels = (getattr(each, "alphas_cumprod", torch.empty(0)).cpu() for each in (scheduler, own))
    if len(levels) == 0 or not same_levels(levels, own_levels):
        raise ValueError(
            f"{name} has other noise levels than the model was trained with, by its alphas_cumprod; use a scheduler "
            "that has them, made with from_config of the model's own."
        )
    meaning, own_meaning = (each.config.get("prediction_type", "epsilon") for each in (scheduler, own))
    check_choice(f"{name}: prediction_type", meaning, PREDICTIONS)
    if meaning != own_meaning:
        raise ValueError(f"{name} has prediction_type={meaning!r}, but the model predicts {own_meaning!r}.")
    if needed := _needed(scheduler):
        raise ValueError(f"{name} needs more for a step than the network's output, timestep and x_t: {needed}.")
    if scheduler.timesteps is not None and scheduler.timesteps[0] < scheduler.timesteps[-1]:
        raise ValueError(f"{name} goes from an image to noise; use one that goes from noise to an image.")


def _needed(scheduler: SchedulerMixin) -> str:
    """Return the names of what `step` needs besides the network's output, the timestep and x_t."""
    given = ("model_output", "timestep", "sample")
    parameters = [p for p in inspect.signature(scheduler.step).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    # prev_timestep has a default, but without it UnCLIPScheduler goes to t - 1 whatever timestep comes next
    needed = [p for p in parameters if p.name not in given and (p.default is p.empty or p.name == "prev_timestep")]
    return ", ".join(p.name for p in needed)


def set_timesteps(scheduler: SchedulerMixin, count: int | None, timesteps: Sequence[int] | None) -> Tensor:
    """Set the scheduler's timesteps: `count` of them, or the given ones, or all T of the training chain for neither.

    Returns:
        The scheduler's timesteps, (n,), on the CPU; some schedulers list a timestep more than once.

    Raises:
        ValueError: where the scheduler cannot honour them, in one sentence.
    """
    name, steps = type(scheduler).__name__, scheduler.config.num_train_timesteps
    choice: dict = {"num_inference_steps": steps if count is None else count}
    if timesteps is None:
        check_number("num_inference_steps", choice["num_inference_steps"], whole=True)
        if not 1 <= choice["num_inference_steps"] <= steps:
            raise ValueError(f"num_inference_steps={count} must lie between 1 and num_train_timesteps={steps}.")
    elif count is not None:
        raise ValueError("timesteps and num_inference_steps contradict each other; give one of them.")
    elif "timesteps" not in inspect.signature(scheduler.set_timesteps).parameters:
        raise ValueError(f"timesteps cannot be given to {name}; give num_inference_steps.")
    else:
        choice = {"timesteps": falling_timesteps(timesteps, steps)}
    try:
        scheduler.set_timesteps(**choice, device="cpu")
    except (ValueError, TypeError, IndexError) as error:  # diffusers' schedulers have limits of their own
        ((argument, value),) = choice.items()
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(f"{argument}={value} does not suit {name}: {reason}.") from error
    _check_path(scheduler)
    return scheduler.timesteps


def _check_path(scheduler: SchedulerMixin) -> None:
    """Raise ValueError where the set timesteps do not decrease, or the first has another noise level than its own.

    On some CPUs KDPM2AncestralDiscreteScheduler of diffusers rounds a variance to less than 0, where the last timestep
    is nearly pure noise.
    """
    name, timesteps = f"scheduler={type(scheduler).__name__}", scheduler.timesteps
    if not timesteps.isfinite().all():
        raise ValueError(f"{name} has timesteps that are not finite for this model's noise levels; choose another one.")
    if len(timesteps) > 1 and not timesteps[0] > timesteps[-1]:
        spacing = scheduler.config.get("timestep_spacing")
        raise ValueError(
            f"{name} has no {len(timesteps)} timesteps that fall with timestep_spacing={spacing!r}; take 'trailing', "
            "or fewer steps."
        )
    if hasattr(scheduler, "sigmas"):
        first, levels = float(timesteps[0]), scheduler.alphas_cumprod
        around = [levels[min(int(first) + i, len(levels) - 1)].item() for i in (0, 1)]  # t may be fractional
        level = 1 / (1 + float(scheduler.sigmas[0]) ** 2)
        if not min(around) - 0.05 < level < max(around) + 0.05:
            raise ValueError(
                f"{name} with this config starts at a noise level that is not that of its first timestep; leave out "
                "what makes it so, as use_flow_sigmas=True or timestep_type='continuous'."
            )
