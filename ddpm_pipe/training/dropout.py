"""Dropout that treats an image the same way whatever images share the network's batch with it."""

import torch
from torch import Tensor, nn

LOWEST, END = -(2**31), 2**31
"""The range of int32: the lowest value, and one more than the highest."""


class ImageDropout(nn.Module):
    """Dropout as nn.Dropout does it, with a mask for each image that depends on the key of that image alone.

    The generator of torch draws 32 bits u for each number of one image, however many images there are, and so does the
    same for every part of a batch. Each image has a key, an odd number a, and drops a number where a u mod 2^32 is
    among the lowest share p of all 2^32 values (multiply-shift hashing, Dietzfelbinger et al. 1997). As a u is uniform,
    the numbers of an image are dropped independently. So are those of two images, up to a covariance of at most 2^-31,
    because their keys are independent.

    Args:
        p: probability that a number is dropped, in (0, 1).

    Attributes:
        keys: a of each image of the next batch, int32 (B,), from `draw_keys`.
    """

    keys: Tensor

    def __init__(self, p: float):
        super().__init__()
        self.p = p
        self.lowest_kept = LOWEST + round(p * 2**32)

    def forward(self, x: Tensor) -> Tensor:
        """Return x, (B, ...), unchanged in eval mode; in training, return x / (1 - p) with zeros in it."""
        if not self.training:
            return x
        bits = torch.randint(LOWEST, END, x.shape[1:], dtype=torch.int32, device=x.device)
        keep = self.keys.view(-1, *[1] * (x.ndim - 1)) * bits >= self.lowest_kept
        return torch.where(keep, x / (1 - self.p), 0)


def draw_keys(count: int, generator: torch.Generator) -> Tensor:
    """Draw the keys of images, odd int32 (count,)."""
    size, device = (count,), generator.device
    return torch.randint(LOWEST, END, size, dtype=torch.int32, generator=generator, device=device) | 1


def use_image_dropout(network: nn.Module) -> list[ImageDropout]:
    """Replace every nn.Dropout of a network that drops anything by an ImageDropout, and return these."""
    replaced = []
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Dropout) and child.p > 0:
                replaced.append(ImageDropout(child.p))
                setattr(parent, name, replaced[-1])
    return replaced
