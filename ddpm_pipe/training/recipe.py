"""A recipe: every choice of a training run, and the network, noise and learning rate that follow from it."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import get_type_hints

import torch
from diffusers import ModelMixin

from ddpm_pipe.checks import check_choice
from ddpm_pipe.config import Config, JsonDict, option, typed
from ddpm_pipe.data.memory import ImageData
from ddpm_pipe.data.stream import ImageStream
from ddpm_pipe.objective import LOSSES
from ddpm_pipe.prediction import LOSS_WEIGHTS
from ddpm_pipe.pretrained import NETWORKS
from ddpm_pipe.randomness import derive_seed
from ddpm_pipe.schedulers import LEARNED_VARIANCES, DDPMScheduler
from ddpm_pipe.training.ema import power_exponent
from ddpm_pipe.training.timestep_sampling import TIMESTEP_SAMPLERS

CONFIG = "config.yaml"
"""The recipe of a run, in its folder; where it exists there is a run."""
PLAN = "plan.json"
"""What is printed before the first step, in the run folder."""

TRAINED_VARIANCES = ("fixed_small", "fixed_large", "learned_range")
LR_SCHEDULES = ("constant", "linear", "cosine")
PRECISIONS = ("auto", "no", "bf16", "fp16")
TRACKERS = ("auto", "none", "tensorboard", "wandb")

RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "be at least 1": (
        "num_train_timesteps steps batch_size gradient_accumulation_steps max_bad_steps ema_snapshot_every save_every "
        "keep_last num_samples sample_steps log_every",
        lambda value: value >= 1,
    ),
    "be at least 0": (
        "holdout vlb_weight offset_noise lr_warmup_steps weight_decay max_grad_norm seed keep_every sample_every "
        "push_every",
        lambda value: value >= 0,
    ),
    "be more than 0": ("loss_gamma loss_k learning_rate adam_eps ema_power", lambda value: value > 0),
    "lie in [0, 1)": ("class_dropout adam_beta1 adam_beta2 ema_decay", lambda value: 0 <= value < 1),
}
"""In words, where numbers of a recipe must lie: their names, and whether a number lies there."""


@dataclass
class TrainConfig(Config):
    """Every choice of a run. The defaults are a small recipe for small images; examples/presets has others."""

    # data
    data: str = field(metadata={"help": "folder of images, parquet or arrow file, or dataset id on the Hub"})
    output_dir: str = option("runs/default", "run folder: checkpoints, samples, logs and the finished pipeline")
    split: str = option("train", "split of the data to train on")
    image_column: str | None = option(None, "column of the images; found by itself where only one holds images")
    label_column: str | None = option(None, "column of the classes; found by itself where only one holds labels")
    resolution: list[int] | None = option(None, "size, or height and width, to resize and crop to")
    channels: int | None = option(None, "1 (grey), 3 (RGB) or 4 (RGBA)")
    flip: bool = option(False, "mirror images at random")
    class_conditional: bool = option(False, "train on the labels too")
    streaming: bool = option(False, "read the data as it is needed instead of decoding it first")
    holdout: int = option(0, "images kept out of training, on which the loss is measured")
    class_dropout: float = option(0.1, "probability of hiding a label, for classifier-free guidance")

    # network and noise
    unet: JsonDict = field(
        default_factory=JsonDict,
        metadata={"help": "network: _class_name (DDPMUNet2DModel or UNet2DModel) and its config keys, as JSON"},
    )
    num_train_timesteps: int = option(1000, "T, the length of the chain")
    beta_schedule: str = option("linear", "a key of ddpm_pipe.noise.BETA_SCHEDULES")
    beta_start: float = option(1e-4, "first beta, for the schedules that have a range")
    beta_end: float = option(0.02, "last beta, for the schedules that have a range")
    rescale_betas_zero_snr: bool = option(False, "rescale betas to zero terminal SNR")
    prediction_type: str = option("epsilon", "what the network predicts: epsilon, sample or v_prediction")
    variance_type: str = option(
        "fixed_small", "of the sampler: fixed_small, fixed_large, or learned_range (hybrid loss)"
    )

    # loss
    loss: str = option("l2", f"one of {', '.join(LOSSES)}")
    loss_weight: str = option("none", f"one of {', '.join(LOSS_WEIGHTS)}")
    loss_gamma: float = option(5.0, "ceiling of min_snr, exponent of p2")
    loss_k: float = option(1.0, "k of p2")
    vlb_weight: float = option(1e-3, "weight of the variational bound with learned variance")
    offset_noise: float = option(0.0, "standard deviation of noise that is the same for all pixels of a channel")
    timestep_sampling: str = option("uniform", f"one of {', '.join(TIMESTEP_SAMPLERS)}")

    # optimisation
    steps: int = option(100_000, "optimizer steps")
    batch_size: int = option(64, "images per optimizer step, over all processes and accumulation steps")
    gradient_accumulation_steps: int = option(1, "parts into which each process cuts its share of the batch")
    learning_rate: float = option(2e-4, "peak learning rate")
    lr_schedule: str = option("constant", f"after the warm-up: {', '.join(LR_SCHEDULES)} (the latter two end at 0)")
    lr_warmup_steps: int = option(0, "optimizer steps over which the learning rate grows to its peak")
    adam_beta1: float = option(0.9, "AdamW: decay of the first moment")
    adam_beta2: float = option(0.999, "AdamW: decay of the second moment")
    adam_eps: float = option(1e-8, "AdamW: epsilon")
    weight_decay: float = option(0.0, "AdamW: weight decay")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm; 0 leaves them")
    ema_decay: float = option(0.9999, "longest decay of the averaged weights")
    ema_power: float = option(2 / 3, "how fast the decay grows to it: 1 - (1 + step)^-power")
    ema_sigma_rel: list[float] = field(
        default_factory=lambda: [0.05, 0.1],
        metadata={"help": "widths of power-function averages whose snapshots examples/ema.py mixes into any other"},
    )
    ema_snapshot_every: int | None = option(None, "optimizer steps between snapshots; as save_every if not given")
    max_bad_steps: int = option(
        20, "steps in a row without a finite gradient after which the last checkpoint is loaded"
    )
    seed: int = option(0, "of the whole run")

    # machine
    mixed_precision: str = option(
        "auto", f"{', '.join(PRECISIONS)}; auto is the launcher's, or bf16 where the device computes it"
    )
    channels_last: bool | None = option(None, "keep images channels-last in memory; by itself on CUDA only")
    gradient_checkpointing: bool = option(False, "save memory by computing activations twice")
    compile: bool = option(False, "torch.compile the network")

    # what is written
    save_every: int = option(5_000, "optimizer steps between checkpoints")
    keep_last: int = option(2, "newest checkpoints to keep")
    keep_every: int = option(0, "keep also checkpoints at multiples of this step; 0 for none")
    sample_every: int = option(5_000, "optimizer steps between sample grids; 0 for none")
    num_samples: int = option(64, "images in a grid")
    sample_steps: int = option(50, "DDIM steps of a grid")
    guidance_scale: float = option(1.0, "classifier-free guidance of a grid")
    log_every: int = option(20, "optimizer steps between log entries")
    tracker: str = option("auto", f"one of {', '.join(TRACKERS)}; auto is tensorboard where it is installed")
    push_to: str | None = option(None, "repository on the Hub, org/name, to push to every push_every steps")
    push_every: int = option(0, "optimizer steps between pushes, a multiple of save_every; 0 for none")
    push_public: bool = option(False, "let everyone see what is pushed; private otherwise")
    resume: bool = option(False, "go on from the newest checkpoint of output_dir")
    overwrite: bool = option(False, "delete what output_dir holds of another run")

    def __post_init__(self):
        super().__post_init__()
        check_choice("lr_schedule", self.lr_schedule, LR_SCHEDULES)
        check_choice("mixed_precision", self.mixed_precision, PRECISIONS)
        check_choice("tracker", self.tracker, TRACKERS)
        check_choice("variance_type", self.variance_type, TRAINED_VARIANCES)
        check_choice("timestep_sampling", self.timestep_sampling, TIMESTEP_SAMPLERS)
        if not self.output_dir:
            raise ValueError("output_dir='' must name a folder.")
        for width in self.ema_sigma_rel:
            power_exponent(width)
        for words, (names, lies_in) in RANGES.items():
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not lies_in(value):
                    raise ValueError(f"{name}={value} must {words}.")
        if self.sample_steps > self.num_train_timesteps:
            raise ValueError(
                f"sample_steps={self.sample_steps} is more than num_train_timesteps={self.num_train_timesteps}."
            )
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise ValueError(
                "rescale_betas_zero_snr needs prediction_type sample or v_prediction: noise alone shows no image."
            )
        if self.push_every % self.save_every or (self.push_every > 0) != (self.push_to is not None):
            raise ValueError(
                f"push_every={self.push_every} must be a multiple of save_every={self.save_every}, and goes with "
                "push_to, the repository on the Hub."
            )
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite contradict each other; choose one.")

    def is_due(self, step: int, every: int) -> bool:
        """Whether what is done every so many steps, and at the end, is due after `step` of them; 0 is never."""
        return every > 0 and (step % every == 0 or step == self.steps)


def lr_at(step: int, config: TrainConfig) -> float:
    """The learning rate of optimizer step `step`, from 0: linear warm-up, then constant or a decay to 0."""
    if step < config.lr_warmup_steps:
        return config.learning_rate * (step + 1) / config.lr_warmup_steps
    progress = (step - config.lr_warmup_steps) / max(1, config.steps - config.lr_warmup_steps)
    decay = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return config.learning_rate * decay[config.lr_schedule]


def make_unet(config: TrainConfig, data: ImageData | ImageStream) -> ModelMixin:
    """The network of the config for these images: sizes, channels and classes follow from the data.

    Raises:
        ValueError: for an unknown class or config key, or a size or number of channels that the data do not have.
    """
    options = dict(config.unet)
    name = typed("unet._class_name", options.pop("_class_name", "DDPMUNet2DModel"), str)
    check_choice("unet._class_name", name, NETWORKS)
    channels, height, width = data.shape
    expected = {"sample_size": height if height == width else (height, width), "in_channels": channels}
    expected["out_channels"] = channels * (1 + (config.variance_type in LEARNED_VARIANCES))
    if config.class_conditional:  # a stock UNet2DModel has no null class of its own: one embedding more
        expected["num_class_embeds"] = len(data.class_names) + (name == "UNet2DModel")
    kinds = get_type_hints(NETWORKS[name].__init__)
    for key, value in options.items():
        check_choice("unet", key, kinds)
        options[key] = typed(f"unet.{key}", value, kinds[key])
        if key in expected and options[key] != expected[key]:
            raise ValueError(f"unet.{key}={value!r}, but the data give {expected[key]!r}.")
    if name == "UNet2DModel":
        _check_stock_size(height, width, len(options.get("block_out_channels", (1,) * 4)))
    torch.manual_seed(derive_seed(config.seed, "weights"))
    return NETWORKS[name](**(expected | options))


def _check_stock_size(height: int, width: int, levels: int) -> None:
    factor = 2 ** (levels - 1)
    if height % factor or width % factor:
        raise ValueError(
            f"images of {width}x{height} do not suit a UNet2DModel of {levels} levels: height and width must be "
            f"multiples of {factor}; choose a resolution, fewer block_out_channels, or DDPMUNet2DModel."
        )


def make_scheduler(config: TrainConfig) -> DDPMScheduler:
    """The scheduler that trains and is saved."""
    return DDPMScheduler(
        num_train_timesteps=config.num_train_timesteps,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule=config.beta_schedule,
        rescale_betas_zero_snr=config.rescale_betas_zero_snr,
        prediction_type=config.prediction_type,
        variance_type=config.variance_type,
    )
