"""Two judges of pictures, which differ in how they are built: `python benchmarks/judges.py folder --data images`.

Each is a classifier of labelled images, grey or coloured, saved as TorchScript for `ddpm-pipe evaluate --features`.
A recipe that wins by one of them alone may have been tuned to it. They are trained on the GPU where there is one.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from timing import DEVICE
from torch import Tensor, nn

from ddpm_pipe.data.memory import ImageData, load_images

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from feature_network import BUNDLED, accuracy, fit, shuffled, steps_of

SHIFT = 2
"""Pixels by which a training image of colour is shifted at most."""


class Judge(nn.Module):
    """uint8 (B, 3, H, W) -> features (B, D) and logits (B, classes), float32; one of 1 channel sees only the first."""

    def __init__(self, layers: nn.Sequential, channels: int, width: int, classes: int):
        super().__init__()
        self.layers, self.channels = layers, channels
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.layers(images[:, : self.channels].float() / 127.5 - 1).mean((2, 3))
        return features, self.head(features)


class Residual(nn.Module):
    """Two 3x3 convolutions with a skip (He et al. 2016)."""

    def __init__(self, before: int, after: int):
        super().__init__()
        self.convolutions = nn.Sequential(*_conv(before, after), nn.ReLU(), *_conv(after, after))
        self.skip = nn.Conv2d(before, after, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.convolutions(x) + self.skip(x))


class Mixer(nn.Module):
    """A depthwise 7x7 convolution with a skip, then two pointwise ones with another (ConvMixer, ConvNeXt)."""

    def __init__(self, channels: int):
        super().__init__()
        self.space = nn.Sequential(
            nn.Conv2d(channels, channels, 7, padding=3, groups=channels), nn.GELU(), nn.BatchNorm2d(channels)
        )
        self.channels = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 1),
            nn.GELU(),
            nn.Conv2d(2 * channels, channels, 1),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.space(x)
        return x + self.channels(x)


def _conv(before: int, after: int) -> list[nn.Module]:
    return [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after)]


def resnet(channels: int, classes: int) -> Judge:
    """3x3 convolutions, maxima of 2x2 squares, three resolutions; twice as wide for colour."""
    pool, width = nn.MaxPool2d(2), 32 if channels == 1 else 64
    layers = [*_conv(channels, width), nn.ReLU(), pool, Residual(width, 2 * width), pool]
    return Judge(nn.Sequential(*layers, Residual(2 * width, 4 * width)), channels, 4 * width, classes)


def mixer(channels: int, classes: int) -> Judge:
    """2x2 patches and large depthwise kernels, two resolutions without a maximum; twice as wide for colour."""
    width = 64 if channels == 1 else 128
    patches = [nn.Conv2d(channels, width, 2, 2), nn.GELU(), nn.BatchNorm2d(width), Mixer(width)]
    deeper = [
        nn.Conv2d(width, 2 * width, 2, 2),
        nn.GELU(),
        nn.BatchNorm2d(2 * width),
        *[Mixer(2 * width) for _ in "ab"],
    ]
    return Judge(nn.Sequential(*patches, *deeper), channels, 2 * width, classes)


JUDGES = {"resnet": resnet, "mixer": mixer}


# ---------------------------------------------------------------- training


def batches(images: ImageData, epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images, uint8 (B, C, H, W), and labels in a shuffled order; coloured images are mirrored and shifted."""
    draw = torch.Generator().manual_seed(0)
    for positions in shuffled(len(images), epochs, draw):
        pixels, labels = images.take(positions)
        if images.shape[0] == 3:
            mirror = torch.rand(len(pixels), 1, 1, 1, generator=draw) < 0.5
            dy, dx = torch.randint(-SHIFT, SHIFT + 1, (2,), generator=draw).tolist()
            pixels = torch.where(mirror, pixels.flip(-1), pixels).roll((dy, dx), (2, 3))
        yield pixels, labels


def train_judge(name: str, data: str, epochs: int, bf16: bool) -> nn.Module:
    """Train a judge on the training split."""
    images = load_images(data, with_labels=True)
    torch.manual_seed(0)
    network = JUDGES[name](images.shape[0], len(images.class_names)).to(DEVICE, memory_format=torch.channels_last)
    return fit(network, batches(images, epochs), steps_of(images, epochs), bf16)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where to save them, as <judge>.pt")
    parser.add_argument("--data", default=BUNDLED, help="labelled images, as `ddpm-pipe train` takes them")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16, twice as fast where it is native")
    parser.add_argument("--judges", nargs="+", choices=JUDGES, default=list(JUDGES))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in options.judges:
        network = train_judge(name, options.data, options.epochs, options.bf16)
        torch.jit.script(network.cpu()).save(str(options.folder / f"{name}.pt"))
        told = f"{accuracy(network.to(DEVICE), options.data):.1%} of the test images are classified rightly"
        print(f"{name}: {told}", flush=True)
