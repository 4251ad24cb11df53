"""Networks of other projects: their weights under our names, and the config that names and shapes tell.

Each family has a table of its names, and a function that makes the network.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor

from ddpm_pipe.unet import DDPMUNet2DModel
from ddpm_pipe.weights import fill

Weights = Mapping[str, Tensor]
Size = int | tuple[int, int]


def _rename(name: str, rules: Sequence[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _refuse(weights: Weights, unsupported: Mapping[str, str]) -> None:
    """Raise where a name matches a pattern of `unsupported`, saying what it belongs to."""
    for pattern, what in unsupported.items():
        found = next((name for name in weights if re.search(pattern, name)), None)
        if found is not None:
            raise ValueError(f"{what} cannot be converted (weight {found!r}).")


def _count(weights: Weights, pattern: str) -> int:
    """One more than the largest number that `pattern` finds in a name."""
    return 1 + max((int(match[1]) for name in weights if (match := re.match(pattern, name))), default=-1)


# ---------------------------------------------------------------- the reference implementation and lucidrains' package

_REFERENCE_NAMES = [
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

_OURS = ("conv_", "resnet_out.", "time_", "mid_resnet_", "mid_attention.", "down_blocks.", "up_blocks.")


def from_reference(state_dict: Weights) -> dict[str, Tensor]:
    """State dict of the reference implementation's Unet, or of lucidrains' -> state dict of `DDPMUNet2DModel`.

    Args:
        state_dict: names as in the reference, PyTorch layout; a norm may say gamma / beta, weight / bias or g.

    Raises:
        ValueError: for a name that no rule maps.
    """
    renamed = {}
    for name, tensor in state_dict.items():
        ours = _rename(name, _REFERENCE_NAMES)
        if not ours.startswith(_OURS):
            raise ValueError(f"the reference network has no weight named {name!r}.")
        is_gain = re.search(r"\.norm(\d|_out)?\.weight$", ours)
        renamed[ours] = tensor.flatten() if is_gain else tensor
    return renamed


_LUCIDRAINS_UNSUPPORTED = {
    r"^(null_)?classes_": "denoising-diffusion-pytorch: the classes of its classifier_free_guidance",
    r"\.norm\.b$": "denoising-diffusion-pytorch before 0.28: LayerNorm with a bias",
}

# from this version on -> norms of attention, standardised filters, linear attention: names and shapes do not tell
_LUCIDRAINS_VERSIONS = {
    (0, 28): ("layer", True, "linear"),
    (1, 7): ("rms", True, "linear"),
    (1, 7, 2): ("rms", False, "linear"),
    (1, 7, 4): ("rms", False, "linear_sum"),
}


def _lucidrains_traits(weights: Weights, version: str | None) -> tuple[str, bool, str]:
    """The row of `_LUCIDRAINS_VERSIONS`."""
    if not any(".fn.fn." in name for name in weights):  # 1.8 or later
        return _LUCIDRAINS_VERSIONS[1, 7, 4]
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
    return _LUCIDRAINS_VERSIONS[max(first for first in _LUCIDRAINS_VERSIONS if first <= numbers)]


def _lucidrains_heads(weights: Weights, attention: str, num_heads: int | None) -> tuple[int, int]:
    """Heads and their width of one attention, from its learned keys or as given."""
    hidden = weights[f"{attention}.to_out.weight"].shape[1]
    if f"{attention}.mem_kv" in weights:
        heads = weights[f"{attention}.mem_kv"].shape[1]
    elif num_heads is None and hidden != 128:
        raise ValueError(
            f"num_heads (attn_heads of the Unet) must be given: {hidden} channels are not the usual 4 x 32."
        )
    else:
        heads = num_heads or 4
    if hidden % heads:
        raise ValueError(f"num_heads={heads} does not divide the {hidden} channels of attention.")
    return heads, hidden // heads


def _lucidrains_time(ours: Weights, theta: float | None) -> dict[str, Any]:
    """The config of the embedded time; whether Fourier features were learned or stayed random, nothing tells."""
    config: dict[str, Any] = {"time_embedding_dim": len(ours["time_embedding.linear_1.weight"]) // 4}
    if "time_proj.weight" not in ours:
        return config | {"time_embedding_theta": 10_000.0 if theta is None else theta}
    if theta is not None:
        raise ValueError(f"sinusoidal_pos_emb_theta={theta} is not used by a network with Fourier features of time.")
    return config | {"time_embedding_type": "learned_fourier", "time_fourier_dim": 2 * len(ours["time_proj.weight"])}


def _lucidrains_shapes(ours: Weights, num_heads: int | None, linear: str) -> dict[str, Any]:
    """What the renamed weights tell of the config; `linear` is the kind of attention that ends in a norm."""
    levels = range(_count(ours, r"down_blocks\.(\d+)\."))
    attentions = [f"down_blocks.{i}.attention.attention" for i in levels]
    heads, head_dims = zip(*(_lucidrains_heads(ours, attention, num_heads) for attention in attentions))
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


def lucidrains_network(
    weights: Weights,
    sample_size: Size,
    version: str | None,
    num_heads: int | None,
    norm_num_groups: int | None,
    theta: float | None,
) -> DDPMUNet2DModel:
    """The Unet of lucidrains' denoising-diffusion-pytorch.

    Args:
        weights: state dict of its Unet.
        sample_size: height and width of the images.
        version: of the package; needed for networks from before 1.8.
        num_heads: `attn_heads`, for networks without learned keys and values.
        norm_num_groups: `resnet_block_groups`, 8 if not given.
        theta: `sinusoidal_pos_emb_theta`, 10000 if not given.

    Raises:
        ValueError: for an option that cannot be converted, naming it.
    """
    _refuse(weights, _LUCIDRAINS_UNSUPPORTED)
    attention_norm, standardize, linear = _lucidrains_traits(weights, version)
    ours = from_reference(weights)
    network = DDPMUNet2DModel(
        sample_size=sample_size,
        norm_num_groups=norm_num_groups or 8,
        attention_norm_type=attention_norm,
        weight_standardization=standardize,
        **_lucidrains_time(ours, theta),
        **_lucidrains_shapes(ours, num_heads, linear),
    )
    return fill(network, ours, "the checkpoint")


# ---------------------------------------------------------------- stock UNet2DModel

_RESNET_NAMES = [
    # improved-diffusion and guided-diffusion
    (r"\.in_layers\.0\.", ".norm1."),
    (r"\.in_layers\.2\.", ".conv1."),
    (r"\.emb_layers\.1\.", ".time_emb_proj."),
    (r"\.out_layers\.0\.", ".norm2."),
    (r"\.out_layers\.3\.", ".conv2."),
    (r"\.skip_connection\.", ".conv_shortcut."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"\.proj_out\.", ".to_out.0."),
    (r"(downsamplers\.0)\.op\.", r"\1.conv."),
    # Ho's
    (r"\.temb_proj\.", ".time_emb_proj."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
]


def _stock_names(weights: Weights, prefixes: Mapping[str, str]) -> dict[str, Tensor]:
    """Weights with the prefixes of `prefixes` replaced, the names of blocks too, and 1x1 convolutions of attention as
    linear layers."""
    renamed = {}
    for name, tensor in weights.items():
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        if prefix is None:
            raise ValueError(f"the checkpoint has a part that UNet2DModel cannot express, {name!r}.")
        ours = _rename(prefixes[prefix] + name.removeprefix(prefix), _RESNET_NAMES)
        is_projection = ".attentions." in ours and ours.endswith("weight") and "norm" not in ours
        renamed[ours] = tensor.flatten(1) if is_projection else tensor
    return renamed


def _stock_network(ours: dict[str, Tensor], resample: str, plain: tuple[str, str], **config) -> UNet2DModel:
    """The UNet2DModel of renamed weights; `plain` are its block types of a level without attention, down and up."""
    levels = _count(ours, r"down_blocks\.(\d+)\.")
    attends = [f"down_blocks.{i}.attentions.0.group_norm.weight" in ours for i in range(levels)]
    widths = tuple(ours[f"down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(levels))
    channels, out_channels = ours["conv_in.weight"].shape[1], ours["conv_out.weight"].shape[0]
    if out_channels not in (channels, 2 * channels):
        raise ValueError(
            f"a network of {channels} channels in and {out_channels} out, super-resolution, say, cannot be converted."
        )
    base = ours["time_embedding.linear_1.weight"].shape[1]
    if base != widths[0]:
        raise ValueError(
            f"UNet2DModel has as many channels in its first level as in the embedded time: {widths[0]} and {base} (a "
            "first channel multiplier that is not 1) cannot be converted."
        )
    network = UNet2DModel(
        in_channels=channels,
        out_channels=out_channels,
        block_out_channels=widths,
        layers_per_block=_count(ours, r"down_blocks\.0\.resnets\.(\d+)\."),
        down_block_types=tuple("AttnDownBlock2D" if attention else plain[0] for attention in attends),
        up_block_types=tuple("AttnUpBlock2D" if attention else plain[1] for attention in reversed(attends)),
        downsample_type=resample,
        upsample_type=resample,
        **config,
    )
    return fill(network, ours, "the checkpoint")


def ho_network(weights: Weights, sample_size: Size, norm_num_groups: int | None) -> UNet2DModel:
    """The network of DDPM and DDIM (Ho et al. 2020) under the names of its PyTorch ports.

    Raises:
        ValueError: for an option that cannot be converted, naming it.
    """
    levels = _count(weights, r"down\.(\d+)\.")
    prefixes = {
        "temb.dense.0.": "time_embedding.linear_1.",
        "temb.dense.1.": "time_embedding.linear_2.",
        "conv_in.": "conv_in.",
        "norm_out.": "conv_norm_out.",
        "conv_out.": "conv_out.",
        "mid.block_1.": "mid_block.resnets.0.",
        "mid.attn_1.": "mid_block.attentions.0.",
        "mid.block_2.": "mid_block.resnets.1.",
    }
    for i in range(levels):
        for theirs, ours in (("down", f"down_blocks.{i}"), ("up", f"up_blocks.{levels - 1 - i}")):
            prefixes |= {
                f"{theirs}.{i}.block.": f"{ours}.resnets.",
                f"{theirs}.{i}.attn.": f"{ours}.attentions.",
                f"{theirs}.{i}.{theirs}sample.": f"{ours}.{theirs}samplers.0.",
            }
    return _stock_network(
        _stock_names(weights, prefixes),
        "conv",
        ("DownBlock2D", "UpBlock2D"),
        sample_size=sample_size,
        attention_head_dim=None,  # one head
        flip_sin_to_cos=False,
        freq_shift=1,
        downsample_padding=0,
        norm_eps=1e-6,
        norm_num_groups=norm_num_groups or 32,
    )


def _improved_prefixes(weights: Weights) -> tuple[dict[str, str], str]:
    """Prefix in improved-diffusion -> ours, and how levels are resampled, "conv" or "resnet"."""
    upsamplers = {
        match[1]: match[2] for name in weights if (match := re.match(r"(output_blocks\.\d+\.[12])\.(conv|in_)", name))
    }
    inputs, outputs = (
        {int(match[1]) for name in weights if (match := re.match(rf"{side}put_blocks\.(\d+)\.", name))}
        for side in ("in", "out")
    )
    levels = len(upsamplers) + 1
    per_level = len(outputs) // levels  # ResNet blocks on the way up; one less and a downsampler on the way down
    if outputs != set(range(levels * per_level)) or inputs != outputs:
        raise ValueError("levels of several depths or resampled without weights (conv_resample) cannot be converted.")
    prefixes = {
        "time_embed.0.": "time_embedding.linear_1.",
        "time_embed.2.": "time_embedding.linear_2.",
        "label_emb.": "class_embedding.",
        "input_blocks.0.0.": "conv_in.",
        "middle_block.0.": "mid_block.resnets.0.",
        "middle_block.1.": "mid_block.attentions.0.",
        "middle_block.2.": "mid_block.resnets.1.",
        "out.0.": "conv_norm_out.",
        "out.2.": "conv_out.",
    }
    for name in upsamplers:
        prefixes[f"{name}."] = f"up_blocks.{int(name.split('.')[1]) // per_level}.upsamplers.0."
    for n in outputs:
        i, j = divmod(n, per_level)
        prefixes[f"output_blocks.{n}.0."] = f"up_blocks.{i}.resnets.{j}."
        prefixes.setdefault(f"output_blocks.{n}.1.", f"up_blocks.{i}.attentions.{j}.")
        last = j == per_level - 1
        prefixes[f"input_blocks.{n + 1}.0."] = f"down_blocks.{i}.{'downsamplers.0' if last else f'resnets.{j}'}."
        prefixes[f"input_blocks.{n + 1}.1."] = f"down_blocks.{i}.attentions.{j}."
    return prefixes, "resnet" if "in_" in upsamplers.values() else "conv"


def _improved_head_dim(ours: Weights, num_heads: int | None, head_dim: int | None) -> int:
    """The width of the heads, which UNet2DModel has one of."""
    widths = sorted({tensor.shape[1] for name, tensor in ours.items() if name.endswith(".qkv.weight")})
    if head_dim is None:
        if num_heads is None:
            raise ValueError(
                "num_heads (of improved-diffusion) or head_dim (num_head_channels of guided-diffusion) must be given."
            )
        head_dim = widths[0] // num_heads
    if any(width != num_heads * head_dim if num_heads else width % head_dim for width in widths):
        raise ValueError(
            f"num_heads={num_heads}, head_dim={head_dim} do not fit attention of {', '.join(map(str, widths))} "
            "channels: UNet2DModel has heads of one width."
        )
    return head_dim


def _split_qkv(ours: dict[str, Tensor], head_dim: int, new_attention_order: bool) -> dict[str, Tensor]:
    """One matrix of queries, keys and values as three."""
    split = {}
    for name, tensor in ours.items():
        if ".qkv." not in name:
            split[name] = tensor
            continue
        heads = len(tensor) // 3 // head_dim
        tensor = tensor.unflatten(0, (3, heads, head_dim) if new_attention_order else (heads, 3, head_dim))
        for letter, part in zip("qkv", tensor.unbind(0 if new_attention_order else 1)):
            split[name.replace(".qkv.", f".to_{letter}.")] = part.flatten(0, 1)
    return split


def improved_network(
    weights: Weights,
    sample_size: Size,
    num_heads: int | None,
    head_dim: int | None,
    norm_num_groups: int | None,
    new_attention_order: bool,
    scaled_timesteps: int | None,
) -> UNet2DModel:
    """The network of improved-diffusion and guided-diffusion (Nichol & Dhariwal 2021).

    Args:
        weights: state dict of its UNetModel.
        sample_size: height and width of the images.
        num_heads, head_dim: `num_heads` or `num_head_channels`, of every attention.
        norm_num_groups: 32 if not given.
        new_attention_order: whether queries come before keys over all heads, or head after head.
        scaled_timesteps: T where `rescale_timesteps` shows the network t * 1000 / T.

    Raises:
        ValueError: for an option that cannot be converted, naming it.
    """
    prefixes, resample = _improved_prefixes(weights)
    ours = _stock_names(weights, prefixes)
    head_dim = _improved_head_dim(ours, num_heads, head_dim)
    ours = _split_qkv(ours, head_dim, new_attention_order)
    config: dict[str, Any] = {"sample_size": sample_size, "attention_head_dim": head_dim}
    if scaled_timesteps is not None:  # a table, since UNet2DModel cannot scale t
        config |= {"time_embedding_type": "learned", "num_train_timesteps": scaled_timesteps}
        t = torch.arange(scaled_timesteps).float() * (1000 / scaled_timesteps)
        width = ours["conv_in.weight"].shape[0]
        ours["time_proj.weight"] = get_timestep_embedding(t, width, flip_sin_to_cos=True, downscale_freq_shift=0)
    if "class_embedding.weight" in ours:
        config["num_class_embeds"] = len(ours["class_embedding.weight"])
    first = "down_blocks.0.resnets.0"
    if len(ours[f"{first}.time_emb_proj.weight"]) == 2 * len(ours[f"{first}.conv1.weight"]):
        config["resnet_time_scale_shift"] = "scale_shift"
    config["norm_num_groups"] = config["attn_norm_num_groups"] = norm_num_groups or 32
    plain = {"conv": ("DownBlock2D", "UpBlock2D"), "resnet": ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")}
    return _stock_network(ours, resample, plain[resample], **config)
