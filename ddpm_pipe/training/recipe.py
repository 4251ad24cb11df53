"""Building the network, the scheduler, the loss and the learning rate from a config."""

import math
from typing import Any, get_type_hints

import torch
from diffusers import LCMScheduler, ModelMixin, SchedulerMixin
from pydantic import create_model

from ddpm_pipe.checks import check_choice
from ddpm_pipe.config import Config
from ddpm_pipe.consistency import ConsistencyObjective
from ddpm_pipe.data.memory import ImageData
from ddpm_pipe.data.stream import ImageStream
from ddpm_pipe.objective import Objective
from ddpm_pipe.pipeline import null_class
from ddpm_pipe.pretrained import NETWORKS
from ddpm_pipe.randomness import derive_seed
from ddpm_pipe.schedulers import LEARNED_VARIANCES, DDPMScheduler
from ddpm_pipe.training.config import LossConfig, ModelConfig, OptimConfig, TrainConfig

TrainingLoss = Objective | ConsistencyObjective


def lr_at(step: int, config: OptimConfig) -> float:
    """Return the learning rate of step `step`, counted from 0: a linear warm-up, then constant or decaying to 0.

    The decay of warmup_stable_decay is 1 - sqrt(progress), the best of those compared in Hägele et al. 2024, "Scaling
    laws and compute-optimal training beyond fixed training durations".
    """
    if step < config.lr_warmup_steps:
        return config.learning_rate * (step + 1) / config.lr_warmup_steps
    progress = (step - config.lr_warmup_steps) / max(1, config.steps - config.lr_warmup_steps)
    start = cooldown_start(config)
    cooled = max(0, step - start) / max(1, config.steps - start)
    decay = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
        "warmup_stable_decay": 1 - math.sqrt(cooled),
    }
    return config.learning_rate * decay[config.lr_schedule]


def cooldown_start(config: OptimConfig) -> int:
    """Return the step at which warmup_stable_decay begins to decay; for other schedules, the last step."""
    if config.lr_schedule != "warmup_stable_decay":
        return config.steps
    return min(config.steps, max(config.lr_warmup_steps, config.steps - round(config.lr_cooldown * config.steps)))


def make_unet(config: TrainConfig, data: ImageData | ImageStream) -> ModelMixin:
    """Build the network of the config; the data determine its image size, channels and classes.

    Raises:
        ValueError: for an unknown class or config key, or a size, channels or classes that contradict the data.
    """
    options = dict(config.unet)
    name = options.pop("_class_name", "DDPMUNet2DModel")
    check_choice("unet._class_name", name, NETWORKS)
    channels, height, width = data.shape
    expected = {"sample_size": height if height == width else (height, width), "in_channels": channels}
    expected["out_channels"] = channels * (1 + (config.variance_type in LEARNED_VARIANCES))
    if config.class_conditional:  # a stock UNet2DModel has no null class of its own and needs one more embedding
        expected["num_class_embeds"] = len(data.class_names) + (name == "UNet2DModel")
    options = _checked(NETWORKS[name], options)
    for key, value in options.items():
        if key in expected and value != expected[key]:
            raise ValueError(f"unet.{key}={value!r}, but the data give {expected[key]!r}.")
    if name == "UNet2DModel":
        _check_stock_size(height, width, len(options.get("block_out_channels", (1,) * 4)))
    torch.manual_seed(derive_seed(config.seed, "weights"))
    return NETWORKS[name](**(expected | options))


def _checked(network: type[ModelMixin], options: dict[str, Any]) -> dict[str, Any]:
    """Return the config keys of a network, converted to the types that its `__init__` declares.

    Raises:
        ValueError: for an unknown key or a value of another type.
    """
    kinds = get_type_hints(network.__init__)
    for key in options:
        check_choice("unet", key, kinds)
    fields: dict[str, Any] = {key: (kinds[key], ...) for key in options}
    try:
        return dict(create_model("unet", __base__=Config, **fields)(**options))
    except ValueError as error:
        raise ValueError(f"unet.{error}") from None


def _check_stock_size(height: int, width: int, levels: int) -> None:
    factor = 2 ** (levels - 1)
    if height % factor or width % factor:
        raise ValueError(
            f"images of {width}x{height} do not suit a UNet2DModel of {levels} levels: height and width must be "
            f"multiples of {factor}; choose a resolution, fewer block_out_channels, or DDPMUNet2DModel."
        )


def make_scheduler(config: ModelConfig) -> DDPMScheduler:
    """Build the scheduler that adds noise in training and is saved with the pipeline."""
    return DDPMScheduler(
        num_train_timesteps=config.num_train_timesteps,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule=config.beta_schedule,
        rescale_betas_zero_snr=config.rescale_betas_zero_snr,
        prediction_type=config.prediction_type,
        variance_type=config.variance_type,
    )


def make_sampler(config: LossConfig, scheduler: DDPMScheduler) -> SchedulerMixin:
    """Return the scheduler that the pipeline is saved with.

    It is the one that adds noise in training or, after consistency tuning, one of diffusers that estimates x0 and adds
    new noise in turn (Song et al. 2023, Algorithm 1), at any number of evenly spaced timesteps.
    """
    if config.objective == "denoising":
        return scheduler
    settings = {key: value for key, value in scheduler.config.items() if key != "variance_type"}  # LCM has none
    return LCMScheduler.from_config(settings, original_inference_steps=len(scheduler))


def make_objective(config: LossConfig, scheduler: DDPMScheduler, teacher: ModelMixin | None = None) -> TrainingLoss:
    """Build the training loss; `teacher` is the model whose guidance a student learns."""
    if config.objective == "consistency":
        null = None if teacher is None else null_class(teacher)
        return ConsistencyObjective(scheduler, config.consistency_stages, teacher, null, config.consistency_guidance)
    return Objective(scheduler, config.loss, config.loss_weight, config.loss_gamma, config.loss_k, config.vlb_weight)
