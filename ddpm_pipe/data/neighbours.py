"""Find the training images nearest to each sample, as numbers and as a picture, to tell whether samples are copies."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from diffusers.utils import make_image_grid
from PIL import Image
from torch import Tensor

from ddpm_pipe.data.memory import ImageData

PIXELS = 2**22
"""Pixel values of the training images that are compared at a time: 32 MiB in double precision."""


def nearest(images: Tensor, data: ImageData, count: int) -> tuple[Tensor, Tensor]:
    """Find the training images nearest to each image, by the root mean squared difference of their pixels.

    Args:
        images: uint8 (N, C, H, W).
        data: the training images, of the same shape.
        count: number of neighbours of each image.

    Returns:
        Distances in 8-bit levels, increasing, and positions in `data`; each (N, count).

    Raises:
        ValueError: where the shapes differ, or `count` is not between 1 and the number of training images.
    """
    if images.shape[1:] != data.shape or not 1 <= count <= len(data):
        raise ValueError(
            f"images of {tuple(images.shape[1:])} have no {count} neighbours among {len(data)} of {data.shape}; "
            "shapes must be equal and the count at most the number of training images."
        )
    rows = images.flatten(1).double()
    best = torch.full((len(rows), 0), 0.0, dtype=torch.float64), torch.zeros(len(rows), 0, dtype=torch.long)
    for positions in _blocks(data):
        block = torch.cdist(rows, data.take(positions)[0].flatten(1).double(), compute_mode="use_mm_for_euclid_dist")
        distances, places = torch.cat([best[0], block], 1), torch.cat([best[1], positions.expand(len(rows), -1)], 1)
        top = distances.topk(min(count, distances.shape[1]), largest=False)
        best = top.values, places.gather(1, top.indices)
    return best[0] / rows.shape[1] ** 0.5, best[1]


def without_copies(data: ImageData, training: ImageData) -> ImageData:
    """Return the images of `data` that have no exact copy in `training`."""
    digests = list(_digests(data))
    copies = set(digests).intersection(_digests(training))
    return replace(data, rows=data.rows[torch.tensor([digest not in copies for digest in digests], dtype=torch.bool)])


def _blocks(data: ImageData) -> tuple[Tensor, ...]:
    return torch.arange(len(data)).split(max(1, PIXELS // math.prod(data.shape)))


def _digests(data: ImageData) -> Iterator[bytes]:
    for positions in _blocks(data):
        yield from (hashlib.sha256(image.numpy()).digest() for image in data.take(positions)[0])


def neighbour_grid(images: Tensor, data: ImageData, positions: Tensor) -> Image.Image:
    """Draw a row for each image, uint8 (N, C, H, W): the image, then those of `data` at its `positions` (N, count)."""
    cells = []
    for image, places in zip(images, positions, strict=True):
        cells += [image, *data.take(places)[0]]
    pictures = [Image.fromarray(cell.permute(1, 2, 0).squeeze(-1).numpy()) for cell in cells]
    return make_image_grid(pictures, len(images), 1 + positions.shape[1])
