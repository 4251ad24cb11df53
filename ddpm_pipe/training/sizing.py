"""The recipe for images without a preset: network, batch, learning rate, flips and dropout from a small table."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple


class Size(NamedTuple):
    """One row: a size of network, the optimisation that suits it, and the training that it is worth."""

    images: float
    """images that training must show for this row to be taken"""
    width: int
    """channels at full resolution; each level has twice those of the level before"""
    widest: int
    """most channels of a level"""
    layers: int
    """blocks per level"""
    attention: int
    """pixels of the largest level that has attention"""
    batch_size: int
    learning_rate: float
    short: bool = False
    """whether to take what docs/experiments.md found for short runs: Muon, and filters that are not standardised"""

    def values(self, shape: tuple[int, ...], parts: int = 1) -> dict[str, Any]:
        """Return the keys of a config for images of `shape`, (C, H, W).

        The levels go down to at most LOWEST pixels, and the batch can be cut into `parts` equal parts.
        """
        shorter = min(shape[1:])
        levels = 1 + max(0, math.ceil(math.log2(shorter / LOWEST)))
        sizes = [shorter // 2**level for level in range(levels)]
        unet: dict[str, Any] = {
            "block_out_channels": [min(self.width * 2**level, self.widest) for level in range(levels)],
            "layers_per_block": self.layers,
            "attention_types": ["linear" if size <= self.attention else "none" for size in sizes],
        }
        optimizer: dict[str, Any] = {"optimizer": "adamw"}
        if self.short:
            unet["weight_standardization"] = False
            optimizer = {"optimizer": "muon", "muon_rms": 0.3}
        return {
            "unet": unet,
            **optimizer,
            "batch_size": math.ceil(self.batch_size / parts) * parts,
            "learning_rate": self.learning_rate,
            "beta_schedule": "cosine",
            "prediction_type": "v_prediction",
        }


LOWEST = 8
"""Most pixels of the lowest level; the presets fashion_mnist and DDPM have 7 and 4."""

SIZES = (
    #    images  width  widest  layers  attention  batch  rate  short
    Size(0, 32, 64, 1, 8, 16, 2e-3, True),  # the preset fashion_mnist
    Size(2e6, 64, 512, 2, 16, 32, 2e-4),  # about the preset flowers
    Size(1e7, 128, 256, 2, 16, 128, 2e-4),  # about the preset cifar10
)
"""The rows, from the smallest network. The presets flowers and cifar10 show 22 and 102 million images; a row is taken
from a tenth of that."""

OFTEN = 100
"""Epochs from which images are mirrored and the network has dropout. DDPM trains on CIFAR-10 for 2,048 epochs with
both, the preset fashion_mnist for two with neither."""
DROPOUT = 0.1
"""That of DDPM on CIFAR-10."""

SIZED = frozenset({*SIZES[0].values((1, 8, 8)), "flip"})
"""The keys that the table chooses."""


def choose(
    shape: tuple[int, ...], count: int | None, parts: int, shown: Callable[[dict[str, Any]], float]
) -> tuple[dict[str, Any], float]:
    """Choose the largest network that a budget is worth.

    Args:
        shape: (C, H, W) of the images.
        count: how many images there are; None where that is unknown, which counts as many.
        parts: equal parts into which the batch must be cut.
        shown: how many images training shows within the budget, as a function of the values of a row.

    Returns:
        The chosen keys of a config, and the images that training shows with them.
    """
    for size in SIZES:
        values = size.values(shape, parts)
        images = shown(values)
        if images >= size.images:
            chosen, chosen_images = values, images
    often = count is not None and chosen_images >= OFTEN * count
    unet = chosen["unet"] | {"dropout": DROPOUT if often else 0.0}
    return chosen | {"unet": unet, "flip": often}, chosen_images
