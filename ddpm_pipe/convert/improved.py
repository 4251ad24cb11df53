"""Convert improved-diffusion and guided-diffusion (Nichol & Dhariwal 2021) to pipelines of this package.

Each of their files holds one set of weights, the raw ones or an average. It does not tell the noise and the objective
that the network was trained with, so the user says these. The network is a UNet2DModel of diffusers.
"""

import re
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor

from ddpm_pipe.convert.config import ConvertConfig
from ddpm_pipe.convert.names import Weights, scheduler_from_flags, stock_names, stock_network
from ddpm_pipe.pretrained import DDPMPipeline

MARK = r"input_blocks\.0\.0\.weight"
"""Pattern of a name that only the state dict of these projects has."""

ASSUMED = "num_heads_upsample as num_heads"
"""What the conversion assumes, because neither the file nor a flag tells it."""

# ---------------------------------------------------------------- names

_PARTS = {
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
"""How the names of a part outside the levels begin -> how they begin in UNet2DModel."""

_BLOCK_NAMES = [
    (r"\.in_layers\.0\.", ".norm1."),
    (r"\.in_layers\.2\.", ".conv1."),
    (r"\.emb_layers\.1\.", ".time_emb_proj."),
    (r"\.out_layers\.0\.", ".norm2."),
    (r"\.out_layers\.3\.", ".conv2."),
    (r"\.skip_connection\.", ".conv_shortcut."),
    (r"(downsamplers\.0)\.op\.", r"\1.conv."),
]
"""Rules that rename the parts of a block to those of UNet2DModel, besides those that `stock_names` has."""

_PLAIN_BLOCKS = {
    "conv": ("DownBlock2D", "UpBlock2D"),
    "resnet": ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"),
}
"""How levels change the resolution -> the types of UNet2DModel's blocks without attention, down and up."""


def _prefixes(weights: Weights) -> tuple[dict[str, str], str]:
    """Find the levels, which these projects do not name: they number all blocks of the network in one sequence.

    Returns:
        How the names of each part begin -> how they begin in UNet2DModel; and how levels change the resolution, "conv"
        for a convolution or "resnet" for a ResNet block.

    Raises:
        ValueError: for levels that UNet2DModel cannot express.
    """
    upsamplers = {
        match[1]: match[2] for name in weights if (match := re.match(r"(output_blocks\.\d+\.[12])\.(conv|in_)", name))
    }
    inputs, outputs = (
        {int(match[1]) for name in weights if (match := re.match(rf"{side}put_blocks\.(\d+)\.", name))}
        for side in ("in", "out")
    )
    levels = len(upsamplers) + 1
    per_level = len(outputs) // levels  # ResNet blocks on the way up; one fewer and a downsampler on the way down
    if outputs != set(range(levels * per_level)) or inputs != outputs:
        raise ValueError("levels of several depths or resampled without weights (conv_resample) cannot be converted.")
    prefixes = dict(_PARTS)
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


# ---------------------------------------------------------------- the network


def _head_dim(ours: Weights, num_heads: int | None, head_dim: int | None) -> int:
    """Find the width of a head, which is the same everywhere in a UNet2DModel.

    Args:
        ours: the renamed weights.
        num_heads: as the user gives it for improved-diffusion.
        head_dim: as the user gives it for guided-diffusion, where it is called num_head_channels.

    Raises:
        ValueError: where neither is given, or the attentions do not have heads of one width.
    """
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


def _split_qkv(ours: Weights, head_dim: int, new_attention_order: bool) -> dict[str, Tensor]:
    """Split the matrix that an attention has for queries, keys and values into the three of UNet2DModel.

    Args:
        ours: the renamed weights.
        head_dim: width of a head.
        new_attention_order: whether the matrix holds the queries of all heads, then their keys, then their values;
            otherwise it holds the queries, keys and values of one head after those of another.
    """
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


def _time_table(timesteps: int, width: int) -> Tensor:
    """Embed t * 1000 / T for every t of T `timesteps`: UNet2DModel cannot scale t, but it can look up a table."""
    t = torch.arange(timesteps).float() * (1000 / timesteps)
    return get_timestep_embedding(t, width, flip_sin_to_cos=True, downscale_freq_shift=0)


def _network(weights: Weights, config: ConvertConfig) -> ModelMixin:
    """Make the network that both projects call UNetModel.

    Raises:
        ValueError: for a network that UNet2DModel cannot express, or a flag that is needed, naming it.
    """
    timesteps = config.needed("timesteps")
    options: dict[str, Any] = {"sample_size": config.sample_size}
    options["norm_num_groups"] = options["attn_norm_num_groups"] = config.norm_num_groups or 32
    prefixes, resample = _prefixes(weights)
    ours = stock_names(weights, prefixes, _BLOCK_NAMES)
    options["attention_head_dim"] = _head_dim(ours, config.num_heads, config.head_dim)
    ours = _split_qkv(ours, options["attention_head_dim"], config.new_attention_order)
    if config.rescale_timesteps and timesteps != 1000:
        ours["time_proj.weight"] = _time_table(timesteps, width=ours["conv_in.weight"].shape[0])
        options |= {"time_embedding_type": "learned", "num_train_timesteps": timesteps}
    if "class_embedding.weight" in ours:
        options["num_class_embeds"] = len(ours["class_embedding.weight"])
    first = "down_blocks.0.resnets.0"
    if len(ours[f"{first}.time_emb_proj.weight"]) == 2 * len(ours[f"{first}.conv1.weight"]):
        options["resnet_time_scale_shift"] = "scale_shift"
    return stock_network(ours, resample, _PLAIN_BLOCKS[resample], **options)


# ---------------------------------------------------------------- the pipeline


def pipeline(weights: Weights, loaded: Any, config: ConvertConfig) -> DDPMPipeline:
    """Make the pipeline of the weights, with the scheduler that the user describes.

    Args:
        weights: the state dict of a UNetModel.
        loaded: all that the file holds, which is not used.
        config: what the user says of the checkpoint.

    Raises:
        ValueError: for a network that cannot be converted, or a flag that is needed, naming it.
    """
    network = _network(weights, config)
    return DDPMPipeline(network, scheduler_from_flags(config, network))
