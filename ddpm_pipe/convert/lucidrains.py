"""Convert denoising-diffusion-pytorch of Phil Wang (lucidrains) to pipelines of this package.

Its GaussianDiffusion saves the betas and the weights of the loss beside the network, so a file tells the noise and
usually the objective too. The network is a `DDPMUNet2DModel`: that class re-creates the reference implementation, which
has the same network under the same names.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor

from ddpm_pipe.convert.config import OBJECTIVES, ConvertConfig
from ddpm_pipe.convert.names import Weights, count, learns_variance, refuse, rename
from ddpm_pipe.noise import make_betas, snr
from ddpm_pipe.pretrained import DDPMPipeline
from ddpm_pipe.schedulers import DDPMScheduler
from ddpm_pipe.unet import DDPMUNet2DModel
from ddpm_pipe.weights import fill

MARK = r"(model\.)?init_conv\.weight"
"""Pattern of a name that only the state dict of this project has: of its GaussianDiffusion, or of its Unet alone."""

ASSUMED = "auto_normalize=True and, unless given, sinusoidal_pos_emb_theta=10000"
"""What the conversion assumes, because neither the file nor a flag tells it."""

# ---------------------------------------------------------------- the file


def saved_weights(loaded: Any) -> tuple[Any, Any] | None:
    """Take the weights and their average out of what the project's Trainer saves.

    Returns:
        The state dict of the GaussianDiffusion that was trained and that of its average, which is empty where the file
        has none; None alone where a Trainer did not save the file.
    """
    if not isinstance(loaded, Mapping) or not isinstance(loaded.get("model"), Mapping):
        return None
    prefix, ema = "ema_model.", loaded.get("ema")
    named = ema.items() if isinstance(ema, Mapping) else ()
    average = {str(name).removeprefix(prefix): value for name, value in named if str(name).startswith(prefix)}
    return loaded["model"], average


# ---------------------------------------------------------------- names

_NAMES = [
    # from 1.8 on, attention has its norm inside and no wrappers
    (r"^((?:down|up)s\.\d+\.2|mid_attn)\.norm\.", r"\1.fn.norm."),
    (r"^((?:down|up)s\.\d+\.2|mid_attn)\.(to_|mem_kv)", r"\1.fn.fn.\2"),
    (r"^init_conv\.", "conv_in."),
    (r"^final_conv\.", "conv_out."),
    (r"^final_res_block\.", "resnet_out."),
    (r"^time_mlp\.0\.weights$", "time_proj.weight"),
    (r"^time_mlp\.1\.", "time_embedding.linear_1."),
    (r"^time_mlp\.3\.", "time_embedding.linear_2."),
    (r"^mid_block(\d)\.", r"mid_resnet_\1."),
    (r"^mid_attn\.", "mid_attention."),
    (r"^(down|up)s\.(\d+)\.([01])\.", r"\1_blocks.\2.resnets.\3."),
    (r"^(down|up)s\.(\d+)\.2\.", r"\1_blocks.\2.attention."),
    (r"^downs\.(\d+)\.3\.(1\.)?", r"down_blocks.\1.downsample."),
    (r"^ups\.(\d+)\.3\.(1\.)?", r"up_blocks.\1.upsample."),
    (r"\.mlp\.1\.", ".time_emb_proj."),
    (r"\.block(\d)\.proj\.", r".conv\1."),
    (r"\.block(\d)\.norm\.(weight|gamma|g)$", r".norm\1.weight"),
    (r"\.block(\d)\.norm\.(bias|beta)$", r".norm\1.bias"),
    (r"\.res_conv\.", ".conv_shortcut."),
    (r"\.fn\.fn\.to_out\.0\.", ".attention.to_out."),
    (r"\.fn\.fn\.to_out\.1\.g$", ".attention.norm_out.weight"),
    (r"\.fn\.fn\.", ".attention."),
    (r"\.fn\.norm\.g$", ".norm.weight"),
]
"""Rules that turn a name of any version of the project, or of the reference implementation, into ours."""

_OURS = ("conv_", "resnet_out.", "time_", "mid_resnet_", "mid_attention.", "down_blocks.", "up_blocks.")
"""How the names of a `DDPMUNet2DModel` begin."""


def from_reference(state_dict: Weights) -> dict[str, Tensor]:
    """Rename weights of this project, or of the reference implementation, to the names of `DDPMUNet2DModel`.

    Args:
        state_dict: the weights of a Unet, each in PyTorch's layout. A norm may call its weights weight and bias, gamma
            and beta as MindSpore does, or g.

    Raises:
        ValueError: for a name that no rule maps, naming it.
    """
    renamed = {}
    for name, tensor in state_dict.items():
        ours = rename(name, _NAMES)
        if not ours.startswith(_OURS):
            raise ValueError(f"the reference network has no weight named {name!r}.")
        is_gain = re.search(r"\.norm(\d|_out)?\.weight$", ours)
        renamed[ours] = tensor.flatten() if is_gain else tensor
    return renamed


# ---------------------------------------------------------------- the network

_UNSUPPORTED = {
    r"^(null_)?classes_": "denoising-diffusion-pytorch: the classes of its classifier_free_guidance",
    r"\.norm\.b$": "denoising-diffusion-pytorch before 0.28: LayerNorm with a bias",
}
"""Pattern of a name -> the option that has such a weight, which `DDPMUNet2DModel` cannot express."""

_VERSIONS = {
    (0, 28): ("layer", True, "linear"),
    (1, 7): ("rms", True, "linear"),
    (1, 7, 2): ("rms", False, "linear"),
    (1, 7, 4): ("rms", False, "linear_sum"),
}
"""First version of a kind of network -> its norm of attention, whether its filters are standardised, and its kind of
linear attention. Neither names nor shapes tell these."""


def _version_traits(weights: Weights, version: str | None) -> tuple[str, bool, str]:
    """Find the row of `_VERSIONS` that the network follows; the names of 1.8 and later tell that it is the last.

    Raises:
        ValueError: where the version is needed but missing or malformed, or is one that cannot be converted.
    """
    if not any(".fn.fn." in name for name in weights):  # 1.8 or later
        return _VERSIONS[1, 7, 4]
    if version is None or not re.fullmatch(r"\d+(\.\d+)*", version):
        raise ValueError(
            f"version={version!r} must be the version of denoising-diffusion-pytorch that trained the checkpoint, as "
            "1.5.8: it is older than 1.8, and those before and after 1.7.4 have different networks of the same shapes."
        )
    numbers = tuple(map(int, version.split(".")))
    if numbers < (0, 28):
        raise ValueError(
            f"version={version!r} has cosine-similarity attention, which cannot be converted; 0.28.0 and later can."
        )
    return _VERSIONS[max(first for first in _VERSIONS if first <= numbers)]


def _heads(ours: Weights, attention: str, num_heads: int | None) -> tuple[int, int]:
    """Find how many heads an attention has and how wide they are, from its learned keys or from what the user says.

    Args:
        ours: the renamed weights.
        attention: how the names of the attention begin.
        num_heads: what the user gives; it is ignored where there are learned keys.

    Raises:
        ValueError: where the number is needed and not given, or does not divide the channels.
    """
    hidden = ours[f"{attention}.to_out.weight"].shape[1]
    if f"{attention}.mem_kv" in ours:
        heads = ours[f"{attention}.mem_kv"].shape[1]
    elif num_heads is None and hidden != 128:
        raise ValueError(
            f"num_heads (attn_heads of the Unet) must be given: {hidden} channels are not the usual 4 x 32."
        )
    else:
        heads = num_heads or 4
    if hidden % heads:
        raise ValueError(f"num_heads={heads} does not divide the {hidden} channels of attention.")
    return heads, hidden // heads


def _time_options(ours: Weights, theta: float | None) -> dict[str, Any]:
    """Find how the network embeds the time.

    Fourier features are weights of the file. Nothing tells whether they were learned or stayed random, which makes no
    difference to the images; we mark them as learned.

    Args:
        ours: the renamed weights.
        theta: `sinusoidal_pos_emb_theta` as the user gives it; None means 10000.

    Raises:
        ValueError: for a theta where the network has Fourier features, which do not use it.
    """
    options: dict[str, Any] = {"time_embedding_dim": len(ours["time_embedding.linear_1.weight"]) // 4}
    if "time_proj.weight" not in ours:
        return options | {"time_embedding_theta": 10_000.0 if theta is None else theta}
    if theta is not None:
        raise ValueError(f"sinusoidal_pos_emb_theta={theta} is not used by a network with Fourier features of time.")
    return options | {"time_embedding_type": "learned_fourier", "time_fourier_dim": 2 * len(ours["time_proj.weight"])}


def _shape_options(ours: Weights, num_heads: int | None, linear: str) -> dict[str, Any]:
    """Find what names and shapes tell of the network.

    Args:
        ours: the renamed weights.
        num_heads: number of heads of every attention, where there are no learned keys to tell it.
        linear: the kind of attention that ends in a norm, "linear" or "linear_sum"; the other kind is full attention.
    """
    levels = range(count(ours, r"down_blocks\.(\d+)\."))
    attentions = [f"down_blocks.{i}.attention.attention" for i in levels]
    heads, head_dims = zip(*(_heads(ours, attention, num_heads) for attention in attentions))
    memory = ours.get("mid_attention.attention.mem_kv")  # (2, heads, number, head_dim)
    out_channels, stem = ours["conv_out.weight"].shape[0], ours["conv_out.weight"].shape[1]
    channels = ours["conv_in.weight"].shape[1]
    return {
        "in_channels": min(channels, out_channels),
        "out_channels": out_channels,
        "block_out_channels": tuple(ours[f"down_blocks.{i}.downsample.weight"].shape[0] for i in levels),
        "stem_channels": stem,
        "norm_type": "group" if "resnet_out.norm1.bias" in ours else "rms",
        "downsample_type": "conv" if ours["down_blocks.0.downsample.weight"].shape[-1] == 4 else "pixel_unshuffle",
        "attention_types": tuple(linear if f"{name}.norm_out.weight" in ours else "full" for name in attentions),
        "num_attention_heads": heads,
        "attention_head_dim": head_dims,
        "num_mem_kv": 0 if memory is None else memory.shape[2],
        "self_condition": channels == 2 * out_channels,
    }


def _network(weights: Weights, version: str | None, config: ConvertConfig) -> ModelMixin:
    """Make the network that the project calls Unet.

    Args:
        weights: the state dict of the Unet.
        version: version of the project; needed for networks from before 1.8.
        config: what the user says of the checkpoint.

    Raises:
        ValueError: for a network that `DDPMUNet2DModel` cannot express, or a flag that is needed, naming it.
    """
    sample_size = config.sample_size
    refuse(weights, _UNSUPPORTED)
    attention_norm, standardize, linear = _version_traits(weights, version)
    ours = from_reference(weights)
    network = DDPMUNet2DModel(
        sample_size=sample_size,
        norm_num_groups=config.norm_num_groups or 8,
        attention_norm_type=attention_norm,
        weight_standardization=standardize,
        **_time_options(ours, config.sinusoidal_pos_emb_theta),
        **_shape_options(ours, config.num_heads, linear),
    )
    return fill(network, ours, "the checkpoint")


# ---------------------------------------------------------------- the scheduler


def _objectives_of(loss_weight: Tensor, alpha_bar: Tensor) -> list[str]:
    """List the objectives whose loss may have these weights: min(snr, gamma) times the factor of the objective.

    Args:
        loss_weight: weights of the loss, (T,); gamma is infinite where the project did not clip the snr.
        alpha_bar: the noise schedule, (T,).
    """
    ratio = snr(alpha_bar)
    factors = {"pred_noise": 1 / ratio, "pred_x0": torch.ones_like(ratio), "pred_v": 1 / (ratio + 1)}
    clipped = {objective: loss_weight.double() / factor for objective, factor in factors.items()}
    return [name for name in clipped if torch.allclose(clipped[name], ratio.clamp(max=clipped[name].max()), rtol=1e-3)]


def _objective(buffers: Weights, given: str | None, learned: bool) -> str:
    """Find what the network predicts, from the weights of the loss in the file or from what the user says.

    Args:
        buffers: the tensors of the GaussianDiffusion itself.
        given: what the user says, None for nothing.
        learned: whether the network predicts the variance too; it then always predicts the noise.

    Raises:
        ValueError: where the file does not tell it and the user does not say it, or the two disagree.
    """
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


def _scheduler(buffers: Weights, objective: str | None, learned: bool) -> DDPMScheduler:
    """Make the scheduler that draws as GaussianDiffusion does.

    It clips x0, and has the variance of the posterior or the one that the network predicts.

    Args:
        buffers: the tensors of the GaussianDiffusion itself. Where one of our schedules gives its betas, the scheduler
            names that schedule; otherwise it lists the betas.
        objective: what the network predicts, as the user says; None for nothing.
        learned: whether the network predicts the variance too.
    """
    told = _objective(buffers, objective, learned)
    betas = buffers["betas"].double()
    noise: dict[str, Any] = {"trained_betas": betas.tolist()}
    for name in ("linear_rescaled", "squaredcos_cap_v2"):
        if torch.allclose(betas, make_betas(name, len(betas)), rtol=1e-6, atol=0):
            noise = {"beta_schedule": name}
    return DDPMScheduler(
        num_train_timesteps=len(betas),
        prediction_type=OBJECTIVES[told],
        variance_type="learned_range" if learned else "fixed_small",
        timestep_spacing="trailing",
        **noise,
    )


# ---------------------------------------------------------------- the pipeline


def pipeline(weights: Weights, loaded: Any, config: ConvertConfig) -> DDPMPipeline:
    """Make the pipeline of a GaussianDiffusion.

    Args:
        weights: its state dict.
        loaded: all that the file holds; a Trainer saves the version of the project beside the weights.
        config: what the user says of the checkpoint.

    Raises:
        ValueError: for a diffusion or a network that cannot be converted, or a flag that is needed, naming it.
    """
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
    saved = loaded.get("version") if isinstance(loaded, Mapping) else None
    version = saved if isinstance(saved, str) and saved else config.version
    unet = {name.removeprefix("model."): value for name, value in weights.items() if name.startswith("model.")}
    network = _network(unet, version, config)
    return DDPMPipeline(network, _scheduler(buffers, config.objective, learns_variance(network)))
