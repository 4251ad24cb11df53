"""Checkpoints of other projects, converted to pipelines of this package.

A checkpoint is recognised by the names in it: `FAMILIES` has a row for each kind. Files are read as plain tensors, and
none of their code runs.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import ModelMixin
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor

from ddpm_pipe.checks import check_choice
from ddpm_pipe.config import Config
from ddpm_pipe.noise import make_betas, snr
from ddpm_pipe.pretrained import SAMPLERS, DDPMPipeline, read_index
from ddpm_pipe.run.files import replace_folder
from ddpm_pipe.schedulers import DDPMScheduler
from ddpm_pipe.sharing.convert import networks
from ddpm_pipe.sharing.convert.networks import from_reference
from ddpm_pipe.weights import STEM, from_config, load_network, read_tensors, weight_files

__all__ = ["ConvertConfig", "convert", "from_reference"]

FILE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")

OBJECTIVES = {"pred_noise": "epsilon", "pred_x0": "sample", "pred_v": "v_prediction"}
"""What lucidrains' package calls it -> `prediction_type`."""

SCHEDULES = {"linear": "linear_rescaled", "cosine": "squaredcos_cap_v2"}
"""What improved-diffusion calls it -> `beta_schedule`."""

CHOICES: dict[str, Collection[str]] = {
    "weights": ("ema", "raw"),
    "objective": OBJECTIVES,
    "beta_schedule": SCHEDULES,
    "variance_type": ("fixed_large", "fixed_small"),
}


@dataclass
class ConvertConfig(Config):
    """What to convert, and what its file does not say."""

    source: str = field(metadata={"help": "a checkpoint file, or a folder or Hub id of a pipeline of diffusers"})
    output_dir: str = field(metadata={"help": "a new folder for the pipeline"})
    image_size: list[int] | None = field(
        default=None, metadata={"help": "size, or height and width, of the images; needed for files"}
    )
    weights: str | None = field(
        default=None, metadata={"help": "ema (the average) or raw; by default the average where the file has one"}
    )
    objective: str | None = field(
        default=None,
        metadata={
            "help": "pred_noise, pred_x0 or pred_v; told by the file of denoising-diffusion-pytorch 1.5 and later"
        },
    )
    version: str | None = field(
        default=None,
        metadata={"help": "of denoising-diffusion-pytorch, where the file is from before 1.8 and lacks it"},
    )
    sinusoidal_pos_emb_theta: float | None = field(
        default=None, metadata={"help": "of denoising-diffusion-pytorch, where the network was made with another"}
    )
    auto_normalize: bool = field(
        default=True, metadata={"help": "of denoising-diffusion-pytorch: whether images were brought to [-1, 1]"}
    )
    num_heads: int | None = field(default=None, metadata={"help": "attention heads, where the shapes do not tell"})
    head_dim: int | None = field(default=None, metadata={"help": "num_head_channels of guided-diffusion"})
    norm_num_groups: int | None = field(default=None, metadata={"help": "groups of a GroupNorm, where not the usual"})
    timesteps: int | None = field(default=None, metadata={"help": "T; needed where the file has weights only"})
    beta_schedule: str | None = field(
        default=None, metadata={"help": "linear or cosine; needed where the file has weights only"}
    )
    variance_type: str = field(
        default="fixed_large", metadata={"help": "fixed_large or fixed_small, of a file that has weights only"}
    )
    rescale_timesteps: bool = field(
        default=False, metadata={"help": "improved-diffusion's: the network is shown t * 1000 / T"}
    )
    new_attention_order: bool = field(default=False, metadata={"help": "guided-diffusion's use_new_attention_order"})

    def __post_init__(self):
        """Check the values.

        Raises:
            ValueError: for one that is unknown or too small, naming it.
        """
        super().__post_init__()
        for name, accepted in CHOICES.items():
            if getattr(self, name) is not None:
                check_choice(name, getattr(self, name), accepted)
        for name in ("num_heads", "head_dim", "norm_num_groups", "timesteps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.image_size is not None and (len(self.image_size) not in (1, 2) or min(self.image_size) < 1):
            raise ValueError(f"image_size={self.image_size} must be a size, or a height and a width, of at least 1.")

    def needed(self, name: str) -> Any:
        """A value that the file does not tell.

        Raises:
            ValueError: where it is not given.
        """
        value = getattr(self, name)
        if value is None:
            choices = f", one of {', '.join(CHOICES[name])}" if name in CHOICES else ""
            raise ValueError(f"{name} must be given{choices}: the file does not tell it.")
        return value

    @property
    def sample_size(self) -> int | tuple[int, int]:
        """`image_size`, as a network's config has it."""
        size = self.needed("image_size")
        return size[0] if len(size) == 1 else tuple(size)


# ---------------------------------------------------------------- reading


def _weights(loaded: Any, which: str | None) -> dict[str, Tensor]:
    """The averaged or the raw state dict in what a training script saved."""
    raw, average = loaded, None
    if isinstance(loaded, list) and loaded:  # DDIM's: weights, optimizer, epoch, step, average
        raw, average = loaded[0], loaded[4] if len(loaded) > 4 else None
    elif isinstance(loaded, Mapping) and isinstance(loaded.get("model"), Mapping):  # lucidrains' Trainer
        prefix = "ema_model."
        ema = loaded.get("ema")
        named = ema.items() if isinstance(ema, Mapping) else ()
        average = {str(name).removeprefix(prefix): value for name, value in named if str(name).startswith(prefix)}
        raw = loaded["model"]
    if which == "ema" and not average:
        raise ValueError("weights='ema': the file holds one set of weights only; leave weights away.")
    chosen = raw if which == "raw" or not average else average
    if not isinstance(chosen, Mapping):
        return {}
    return {str(name).removeprefix("module."): value for name, value in chosen.items() if isinstance(value, Tensor)}


# ---------------------------------------------------------------- lucidrains' denoising-diffusion-pytorch


def _objectives_of(loss_weight: Tensor, alpha_bar: Tensor) -> list[str]:
    """The objectives whose loss weights these can be: its own factor of min(snr, gamma)."""
    ratio = snr(alpha_bar)
    factors = {"pred_noise": 1 / ratio, "pred_x0": torch.ones_like(ratio), "pred_v": 1 / (ratio + 1)}
    clipped = {objective: loss_weight.double() / factor for objective, factor in factors.items()}
    return [name for name in clipped if torch.allclose(clipped[name], ratio.clamp(max=clipped[name].max()), rtol=1e-3)]


def _lucidrains_objective(buffers: Mapping[str, Tensor], given: str | None, learned: bool) -> str:
    """What the network predicts, by the loss weights in the file or as given."""
    if learned:  # LearnedGaussianDiffusion always predicts the noise
        told = ["pred_noise"]
    elif "loss_weight" in buffers:
        told = _objectives_of(buffers["loss_weight"], torch.cumprod(1 - buffers["betas"].double(), 0))
    else:
        told = []
    if given is None and len(told) != 1:
        raise ValueError(f"objective must be given, one of {', '.join(OBJECTIVES)}: the loss weights do not tell it.")
    if given is not None and told and given not in told:
        why = "its variance is learned" if learned else "its loss weights say so"
        raise ValueError(f"objective={given!r} is not that of the checkpoint, which is {' or '.join(told)}: {why}.")
    return given or told[0]


def _lucidrains_scheduler(buffers: Mapping[str, Tensor], given: str | None, learned: bool) -> DDPMScheduler:
    """GaussianDiffusion's sampler: clipped x0, and the posterior's variance or a learned one."""
    objective = _lucidrains_objective(buffers, given, learned)
    betas = buffers["betas"].double()
    noise: dict[str, Any] = {"trained_betas": betas.tolist()}
    for name in ("linear_rescaled", "squaredcos_cap_v2"):
        if torch.allclose(betas, make_betas(name, len(betas)), rtol=1e-6, atol=0):
            noise = {"beta_schedule": name}
    return DDPMScheduler(
        num_train_timesteps=len(betas),
        prediction_type=OBJECTIVES[objective],
        variance_type="learned_range" if learned else "fixed_small",
        timestep_spacing="trailing",
        **noise,
    )


def _convert_lucidrains(weights: dict[str, Tensor], version: str | None, config: ConvertConfig) -> DDPMPipeline:
    buffers = {name: value for name, value in weights.items() if "." not in name}
    if "betas" not in buffers:
        raise ValueError(
            "the file has no `betas`: of denoising-diffusion-pytorch, a GaussianDiffusion can be converted, not its "
            "Unet alone, and not what is trained in continuous time."
        )
    if not config.auto_normalize:
        raise ValueError(
            "auto_normalize=False: a pipeline draws images in [-1, 1], so a network of images in [0, 1] cannot be "
            "converted; where the data were brought to [-1, 1] before training, leave auto_normalize at true."
        )
    network = networks.lucidrains_network(
        {name.removeprefix("model."): value for name, value in weights.items() if name.startswith("model.")},
        sample_size=config.sample_size,
        version=version or config.version,
        num_heads=config.num_heads,
        norm_num_groups=config.norm_num_groups,
        theta=config.sinusoidal_pos_emb_theta,
    )
    learned = network.config.out_channels == 2 * network.config.in_channels
    return DDPMPipeline(network, _lucidrains_scheduler(buffers, config.objective, learned))


# ---------------------------------------------------------------- files that hold weights only


def _scheduler_from_flags(config: ConvertConfig, network: ModelMixin) -> DDPMScheduler:
    """The sampler of a network whose file says nothing of the diffusion it was trained for."""
    learned = network.config.out_channels == 2 * network.config.in_channels
    return DDPMScheduler(
        num_train_timesteps=config.needed("timesteps"),
        beta_schedule=SCHEDULES[config.needed("beta_schedule")],
        prediction_type=OBJECTIVES[config.needed("objective")],
        variance_type="learned_range" if learned else config.variance_type,
    )


def _convert_improved(weights: dict[str, Tensor], version: str | None, config: ConvertConfig) -> DDPMPipeline:
    timesteps = config.needed("timesteps")
    network = networks.improved_network(
        weights,
        sample_size=config.sample_size,
        num_heads=config.num_heads,
        head_dim=config.head_dim,
        norm_num_groups=config.norm_num_groups,
        new_attention_order=config.new_attention_order,
        scaled_timesteps=timesteps if config.rescale_timesteps and timesteps != 1000 else None,
    )
    return DDPMPipeline(network, _scheduler_from_flags(config, network))


def _convert_ho(weights: dict[str, Tensor], version: str | None, config: ConvertConfig) -> DDPMPipeline:
    network = networks.ho_network(weights, config.sample_size, config.norm_num_groups)
    return DDPMPipeline(network, _scheduler_from_flags(config, network))


# ---------------------------------------------------------------- pipelines of diffusers


def _fetch(source: str) -> Path:
    """The folder of the cache with the configs and weights of a repository: pickles only where it has nothing else."""
    try:
        for suffix in ("safetensors", "bin"):
            patterns = ["*.json", f"{STEM}*.{suffix}", f"unet/{STEM}*.{suffix}"]
            folder = Path(snapshot_download(source, allow_patterns=patterns))
            if weight_files(_part(folder, "unet"), suffix=suffix):
                break
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"source={source!r} is no file or folder here, and the Hub does not give it: {reason}"
        ) from error
    return folder


def _part(folder: Path, name: str) -> Path:
    """Where a part of a pipeline is saved: google/ddpm-* have both beside each other."""
    return folder / name if (folder / name).is_dir() else folder


def _convert_diffusers(source: str) -> DDPMPipeline:
    """A stock DDPM or DDIM pipeline with the schedulers of this package, or a pickled one of this package."""
    folder = Path(source) if Path(source).is_dir() else _fetch(source)
    network_class, scheduler_class = read_index(folder)
    if scheduler_class not in SAMPLERS.values():
        raise ValueError(
            f"source={source!r} has a {scheduler_class.__name__}; with {' or '.join(SAMPLERS)} it can be converted."
        )
    part = _part(folder, "unet")
    suffix = "bin" if weight_files(part, suffix="bin") and not weight_files(part) else "safetensors"
    network = load_network(network_class, part, suffix=suffix)
    return DDPMPipeline(network, from_config(scheduler_class, _part(folder, "scheduler") / scheduler_class.config_name))


# ---------------------------------------------------------------- the command


class Family(NamedTuple):
    """One kind of checkpoint."""

    mark: str
    """Pattern of a name that its state dict has."""
    convert: Callable[[dict[str, Tensor], str | None, ConvertConfig], DDPMPipeline]
    """(state dict, version in the file, config) -> pipeline."""
    assumed: str
    """What neither the file nor a flag tells."""


FAMILIES = {
    "denoising-diffusion-pytorch": Family(
        r"(model\.)?init_conv\.weight",
        _convert_lucidrains,
        "auto_normalize=True and, unless given, sinusoidal_pos_emb_theta=10000",
    ),
    "improved-diffusion or guided-diffusion": Family(
        r"input_blocks\.0\.0\.weight", _convert_improved, "num_heads_upsample as num_heads"
    ),
    "DDPM's PyTorch ports": Family(r"down\.0\.block\.0\.conv1\.weight", _convert_ho, "nothing else"),
}


def _convert_file(path: Path, config: ConvertConfig) -> tuple[str, DDPMPipeline]:
    """The family of a checkpoint and its pipeline."""
    try:
        loaded = read_tensors(path)
    except ValueError as error:
        raise ValueError(f"source: {error}") from error
    weights = _weights(loaded, config.weights)
    version = loaded.get("version") if isinstance(loaded, Mapping) else None
    version = version if isinstance(version, str) else None
    for name, family in FAMILIES.items():
        if any(re.fullmatch(family.mark, weight) for weight in weights):
            try:
                return name, family.convert(weights, version, config)
            except KeyError as error:
                raise ValueError(f"the checkpoint lacks the weight {error}.") from error
            except (IndexError, TypeError, RuntimeError) as error:  # from tensors that have not even the usual axes
                raise ValueError(
                    f"the checkpoint has a tensor of a shape that none of {name} has ({error})."
                ) from error
    raise ValueError(f"source={config.source!r} holds no network of {', '.join(FAMILIES)}, by the names in it.")


def convert(config: ConvertConfig) -> DDPMPipeline:
    """Convert a checkpoint, write it as a pipeline folder and print what it was.

    Raises:
        ValueError: for an unknown file, an option that cannot be converted or a setting that is missing, naming it.
    """
    if not config.output_dir:
        raise ValueError("output_dir='' must name a folder.")
    out, path = Path(config.output_dir), Path(config.source)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"output_dir={config.output_dir!r} is not empty; name a new folder.")
    if path.suffix in FILE_SUFFIXES and not path.exists():
        raise ValueError(f"source={config.source!r} does not exist.")
    if path.is_file():
        family, pipeline = _convert_file(path, config)
        what = f"{family}, assumed {FAMILIES[family].assumed}"
    else:
        what, pipeline = "a pipeline of diffusers", _convert_diffusers(config.source)
    replace_folder(out, pipeline.save_pretrained)
    scheduler = pipeline.scheduler.config
    steps = f"{scheduler.num_train_timesteps} timesteps, {scheduler.prediction_type}"
    print(f"{out}: {type(pipeline.unet).__name__}, {steps}; converted from {what}")
    return pipeline
