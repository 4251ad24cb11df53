"""Numbers that compare the samples of a grid with the images of a run: their colours, and how near copies they are."""

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ddpm_pipe.data.memory import ImageData
from ddpm_pipe.data.neighbours import nearest
from ddpm_pipe.data.stream import ImageStream
from ddpm_pipe.randomness import generator

COLOURS = 1000
"""Most images whose colours are taken."""
BLOCK = 16
"""Images whose colours are taken at a time, in double precision."""
COPIES, FEWEST_COPIES, REAL = 16, 10, 64
"""Most and fewest samples, and most real images, whose nearest training images are looked for."""
NEIGHBOURS = 5
"""A nearest training image is near where it is much nearer than the fifth nearest."""
NEAR = 0.05
"""Share of the real images that count as near."""
LARGEST = 2**30
"""Bytes of the training images above which none is looked for, because each grid would read all of them."""


class Comparison:
    """What samples are compared with: the images trained on, and those held out where there are some.

    Args:
        data: the images trained on.
        held_out: the images held out; may be empty.
        seed: the seed of the run, which chooses the images that are looked at.
    """

    def __init__(self, data: ImageData | ImageStream, held_out: ImageData, seed: int):
        self.training = data if isinstance(data, ImageData) else None
        self.held_out, self.seed = held_out, seed
        self._near: float | None = None

    def __call__(self, average: list[Image.Image], raw: list[Image.Image]) -> dict[str, float]:
        """Compare the samples of the averaged and of the raw network, which belong together in pairs.

        Returns:
            The values of `colours` and of `copies`; nothing where there are no images to compare with.
        """
        samples = to_pixels(average)
        return self.colours(samples, to_pixels(raw)) | self.copies(samples)

    def colours(self, average: Tensor, raw: Tensor) -> dict[str, float]:
        """Compare mean colours of uint8 samples (N, C, H, W), in standard deviations of those of the images.

        Returns:
            Of the channel in which the two networks differ most: `colour_gap`, the difference of their means, and
            `colour_gap_error`, its standard error over the pairs; `colour/average` and `colour/raw`, how far each lies
            from the mean of the images.
        """
        known = self.training if self.training is not None else self.held_out
        if len(average) < 2 or len(known) < 2:
            return {}
        blocks = self._chosen(known, COLOURS).split(BLOCK)
        real = torch.cat([mean_colours(known.take(positions)[0]) for positions in blocks])
        means = mean_colours(average), mean_colours(raw)
        spread = real.std(0).clamp(min=1.0)
        differences = (means[0] - means[1]) / spread
        gaps = differences.mean(0).abs()
        channel = int(gaps.argmax())
        error = differences[:, channel].std() / math.sqrt(len(differences))
        off = [((each.mean(0) - real.mean(0)) / spread)[channel].abs().item() for each in means]
        gap = {"colour_gap": gaps[channel].item(), "colour_gap_error": error.item()}
        return gap | {"colour/average": off[0], "colour/raw": off[1]}

    def copies(self, samples: Tensor) -> dict[str, float]:
        """Return as `near_copies` the share of uint8 samples (N, C, H, W) that are nearer to a training image than
        95 % of the test images are.

        The distance to the nearest training image is taken relative to that of the fifth nearest, so that samples
        with little detail, which are near to all images, do not count. Where no image is held out, the test images
        are training images, each compared with all others. The value is missing where there are too few samples or
        images, or the training images fill more than LARGEST bytes.
        """
        training = self.training
        if training is None or len(samples) < FEWEST_COPIES or len(training) <= NEIGHBOURS:
            return {}
        if len(training) * math.prod(training.shape) > LARGEST:
            return {}
        if self._near is None:
            others = self.held_out if len(self.held_out) else training
            some = others.take(self._chosen(others, REAL))[0]
            real = nearest(some, training, NEIGHBOURS + (others is training))[0]
            self._near = relative(real[:, -NEIGHBOURS:]).quantile(NEAR).item()
        found = relative(nearest(samples[:COPIES], training, NEIGHBOURS)[0])
        return {"near_copies": (found < self._near).double().mean().item()}

    def _chosen(self, data: ImageData, count: int) -> Tensor:
        """Return the positions of `count` images drawn at random, or of all where there are fewer, (n,)."""
        return torch.randperm(len(data), generator=generator(self.seed, "comparison"))[:count]


def to_pixels(images: list[Image.Image]) -> Tensor:
    """Return PIL images of one size as uint8 (N, C, H, W)."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return pixels.reshape(*pixels.shape[:3], -1).permute(0, 3, 1, 2)


def mean_colours(images: Tensor) -> Tensor:
    """Return the mean of each channel of images (N, C, H, W), float64 (N, C), in 8-bit levels."""
    return images.flatten(2).double().mean(2)


def relative(distances: Tensor) -> Tensor:
    """Return the first of the distances (N, NEIGHBOURS) divided by the last, (N,)."""
    return distances[:, 0] / distances[:, -1].clamp(min=1e-9)
