"""Checkpoints of other projects, renamed to ours."""

import re
from collections.abc import Mapping

from torch import Tensor

# name in the reference implementation -> ours, applied in order
_REFERENCE_NAMES = [
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
    (r"^downs\.(\d+)\.3\.", r"down_blocks.\1.downsample."),
    (r"^ups\.(\d+)\.3\.(1\.)?", r"up_blocks.\1.upsample."),
    (r"\.mlp\.1\.", ".time_emb_proj."),
    (r"\.block(\d)\.proj\.", r".conv\1."),
    (r"\.block(\d)\.norm\.(weight|gamma)$", r".norm\1.weight"),
    (r"\.block(\d)\.norm\.(bias|beta)$", r".norm\1.bias"),
    (r"\.res_conv\.", ".conv_shortcut."),
    (r"\.fn\.fn\.to_out\.0\.", ".attention.to_out."),
    (r"\.fn\.fn\.to_out\.1\.g$", ".attention.norm_out.weight"),
    (r"\.fn\.fn\.", ".attention."),
    (r"\.fn\.norm\.g$", ".norm.weight"),
]


_OURS = ("conv_", "resnet_out.", "time_", "mid_resnet_", "mid_attention.", "down_blocks.", "up_blocks.")


def from_reference(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of the reference implementation's Unet -> state dict of `DDPMUNet2DModel`.

    Args:
        state_dict: names as in the reference, PyTorch layout; a norm may say gamma / beta or weight / bias.

    Raises:
        ValueError: for a name that no rule maps.
    """
    renamed = {}
    for name, tensor in state_dict.items():
        ours = name
        for pattern, replacement in _REFERENCE_NAMES:
            ours = re.sub(pattern, replacement, ours)
        if not ours.startswith(_OURS):
            raise ValueError(f"the reference network has no weight named {name!r}.")
        is_gain = ours.endswith((".norm.weight", ".norm_out.weight"))
        renamed[ours] = tensor.flatten() if is_gain else tensor
    return renamed
