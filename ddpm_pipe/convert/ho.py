"""Convert the PyTorch ports of DDPM (Ho et al. 2020), including that of DDIM, to pipelines of this package.

Their files hold the weights only, so the user says which noise and which objective the network was trained with. The
network is a UNet2DModel of diffusers.
"""

from typing import Any

from diffusers import ModelMixin

from ddpm_pipe.convert.config import ConvertConfig
from ddpm_pipe.convert.names import Weights, count, scheduler_from_flags, stock_names, stock_network
from ddpm_pipe.pretrained import DDPMPipeline

MARK = r"down\.0\.block\.0\.conv1\.weight"
"""Pattern of a name that only the state dict of such a port has."""

ASSUMED = "nothing else"
"""What the conversion assumes, because neither the file nor a flag tells it."""

# ---------------------------------------------------------------- the file


def saved_weights(loaded: Any) -> tuple[Any, Any] | None:
    """Take the weights and their average out of the list that DDIM's training saves.

    The list holds the weights, the state of the optimizer, the epoch, the step and, where one is kept, the average.

    Returns:
        The weights and their average, which may be None; None alone where the file holds anything but a list.
    """
    if not isinstance(loaded, list) or not loaded:
        return None
    return loaded[0], loaded[4] if len(loaded) > 4 else None


# ---------------------------------------------------------------- the network

_PARTS = {
    "temb.dense.0.": "time_embedding.linear_1.",
    "temb.dense.1.": "time_embedding.linear_2.",
    "conv_in.": "conv_in.",
    "norm_out.": "conv_norm_out.",
    "conv_out.": "conv_out.",
    "mid.block_1.": "mid_block.resnets.0.",
    "mid.attn_1.": "mid_block.attentions.0.",
    "mid.block_2.": "mid_block.resnets.1.",
}
"""How the names of a part outside the levels begin -> how they begin in UNet2DModel."""

_BLOCK_NAMES = [
    (r"\.temb_proj\.", ".time_emb_proj."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
]
"""Rules that rename the parts of a block to those of UNet2DModel, besides those that `stock_names` has."""


def _prefixes(weights: Weights) -> dict[str, str]:
    """Map how the names of each part begin to how they begin in UNet2DModel.

    On the way up, UNet2DModel counts the levels from the other end.
    """
    prefixes = dict(_PARTS)
    levels = count(weights, r"down\.(\d+)\.")
    for i in range(levels):
        for theirs, ours in (("down", f"down_blocks.{i}"), ("up", f"up_blocks.{levels - 1 - i}")):
            prefixes |= {
                f"{theirs}.{i}.block.": f"{ours}.resnets.",
                f"{theirs}.{i}.attn.": f"{ours}.attentions.",
                f"{theirs}.{i}.{theirs}sample.": f"{ours}.{theirs}samplers.0.",
            }
    return prefixes


def _network(weights: Weights, config: ConvertConfig) -> ModelMixin:
    """Make the network that the ports call Model.

    Raises:
        ValueError: for a network that UNet2DModel cannot express, saying why.
    """
    return stock_network(
        stock_names(weights, _prefixes(weights), _BLOCK_NAMES),
        "conv",
        ("DownBlock2D", "UpBlock2D"),
        sample_size=config.sample_size,
        attention_head_dim=None,  # one head
        flip_sin_to_cos=False,
        freq_shift=1,
        downsample_padding=0,
        norm_eps=1e-6,
        norm_num_groups=config.norm_num_groups or 32,
    )


# ---------------------------------------------------------------- the pipeline


def pipeline(weights: Weights, loaded: Any, config: ConvertConfig) -> DDPMPipeline:
    """Make the pipeline of a port's weights, with the scheduler that the user describes.

    Args:
        weights: the state dict of its Model.
        loaded: all that the file holds, which is not used.
        config: what the user says of the checkpoint.

    Raises:
        ValueError: for a network that cannot be converted, or a flag that is needed, naming it.
    """
    network = _network(weights, config)
    return DDPMPipeline(network, scheduler_from_flags(config, network))
