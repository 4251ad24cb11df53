"""What the conversions share: they rename weights, make a UNet2DModel of them, and ask for what the file does not tell.

The module of each project contains only what differs from the other projects.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import ModelMixin, UNet2DModel
from torch import Tensor

from ddpm_pipe.convert.config import OBJECTIVES, SCHEDULES, ConvertConfig
from ddpm_pipe.schedulers import DDPMScheduler
from ddpm_pipe.weights import fill

Weights = Mapping[str, Tensor]
"""A state dict: the name of each weight -> its tensor."""

Rules = Sequence[tuple[str, str]]
"""Pairs of a pattern in a name and its replacement, which `rename` applies one after the other."""


# ---------------------------------------------------------------- names


def rename(name: str, rules: Rules) -> str:
    """Apply every rule to a name, in order; a rule sees what the rules before it have made."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def refuse(weights: Weights, unsupported: Mapping[str, str]) -> None:
    """Refuse weights if one of their names shows that the network has an option that we cannot express.

    Args:
        weights: weights of the other project, under its names.
        unsupported: pattern of a name -> the option that has such a weight, in words.

    Raises:
        ValueError: for the first pattern that is found, naming the option and the weight.
    """
    for pattern, what in unsupported.items():
        found = next((name for name in weights if re.search(pattern, name)), None)
        if found is not None:
            raise ValueError(f"{what} cannot be converted (weight {found!r}).")


def count(weights: Weights, pattern: str) -> int:
    """Count numbered parts: one more than the largest number that the group of `pattern` finds in a name, or zero."""
    return 1 + max((int(match[1]) for name in weights if (match := re.match(pattern, name))), default=-1)


# ---------------------------------------------------------------- the stock UNet2DModel

_ATTENTION_NAMES = [
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"\.proj_out\.", ".to_out.0."),
]
"""Rules that rename an attention of improved-diffusion or of DDPM's ports to the names of UNet2DModel."""


def stock_names(weights: Weights, prefixes: Mapping[str, str], rules: Rules) -> dict[str, Tensor]:
    """Rename weights to the names of UNet2DModel.

    Args:
        weights: weights of the other project, under its names.
        prefixes: how the names of a part of its network begin -> how they begin in UNet2DModel, such as
            "mid.attn_1." -> "mid_block.attentions.0.".
        rules: rules for the names inside a block, besides those of attention that all projects share.

    Returns:
        The renamed weights; the projections of an attention are matrices, where other projects have 1x1 convolutions.

    Raises:
        ValueError: for a weight that none of the prefixes fits.
    """
    renamed = {}
    for name, tensor in weights.items():
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        if prefix is None:
            raise ValueError(f"the checkpoint has a part that UNet2DModel cannot express, {name!r}.")
        ours = rename(prefixes[prefix] + name.removeprefix(prefix), [*rules, *_ATTENTION_NAMES])
        is_projection = ".attentions." in ours and ours.endswith("weight") and "norm" not in ours
        renamed[ours] = tensor.flatten(1) if is_projection else tensor
    return renamed


def stock_network(ours: Weights, resample: str, plain: tuple[str, str], **config: Any) -> ModelMixin:
    """Make the UNet2DModel whose weights these are.

    Args:
        ours: the weights under the names of UNet2DModel; their shapes tell the widths and where attention is.
        resample: how levels change the resolution, "conv" or "resnet".
        plain: the types of a block without attention, on the way down and on the way up.
        config: what names and shapes do not tell, as UNet2DModel takes it.

    Raises:
        ValueError: for a network that UNet2DModel cannot express, saying why.
    """
    levels = count(ours, r"down_blocks\.(\d+)\.")
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
        layers_per_block=count(ours, r"down_blocks\.0\.resnets\.(\d+)\."),
        down_block_types=tuple("AttnDownBlock2D" if attention else plain[0] for attention in attends),
        up_block_types=tuple("AttnUpBlock2D" if attention else plain[1] for attention in reversed(attends)),
        downsample_type=resample,
        upsample_type=resample,
        **config,
    )
    return fill(network, ours, "the checkpoint")


# ---------------------------------------------------------------- the scheduler


def learns_variance(network: ModelMixin) -> bool:
    """Say whether the network predicts the variance of a step too: it then has twice as many channels out as in."""
    return network.config.out_channels == 2 * network.config.in_channels


def scheduler_from_flags(config: ConvertConfig, network: ModelMixin) -> DDPMScheduler:
    """Make the scheduler of a network whose file holds weights only: the user has to say what it was trained for.

    Raises:
        ValueError: for `timesteps`, `beta_schedule` or `objective`, where the user has not given it.
    """
    return DDPMScheduler(
        num_train_timesteps=config.needed("timesteps"),
        beta_schedule=SCHEDULES[config.needed("beta_schedule")],
        prediction_type=OBJECTIVES[config.needed("objective")],
        variance_type="learned_range" if learns_variance(network) else config.variance_type,
    )
