"""Two judges of grey pictures, which differ in how they are built: `python benchmarks/judges.py folder`.

Each is a classifier, trained on all of Fashion-MNIST or on other labelled data and saved as TorchScript for
`ddpm-pipe evaluate --features`. A recipe that wins by one of them alone may have been tuned to it.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
FEATURES = 128


class Judge(nn.Module):
    """uint8 (B, 3, H, W) -> features (B, FEATURES) and logits (B, classes), float32; it sees only the first channel."""

    def __init__(self, layers: nn.Sequential, classes: int):
        super().__init__()
        self.layers = layers
        self.head = nn.Linear(FEATURES, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.layers(images[:, :1].float() / 127.5 - 1).mean((2, 3))
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


def resnet(classes: int) -> Judge:
    """3x3 convolutions, maxima of 2x2 squares, three resolutions."""
    pool = nn.MaxPool2d(2)
    return Judge(nn.Sequential(*_conv(1, 32), nn.ReLU(), pool, Residual(32, 64), pool, Residual(64, FEATURES)), classes)


def mixer(classes: int) -> Judge:
    """2x2 patches and large depthwise kernels, two resolutions without a maximum."""
    return Judge(
        nn.Sequential(
            nn.Conv2d(1, 64, 2, 2), nn.GELU(), nn.BatchNorm2d(64), Mixer(64), nn.Conv2d(64, FEATURES, 2, 2),
            nn.GELU(), nn.BatchNorm2d(FEATURES), Mixer(FEATURES), Mixer(FEATURES),
        ),
        classes,
    )  # fmt: skip


JUDGES = {"resnet": resnet, "mixer": mixer}

if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests"))
    from feature_network import BUNDLED, accuracy, train_classifier

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where to save them, as <judge>.pt")
    parser.add_argument("--data", default=BUNDLED, help="labelled images, as `ddpm-pipe train` takes them")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--judges", nargs="+", choices=JUDGES, default=list(JUDGES))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in options.judges:
        network = train_classifier(options.data, epochs=options.epochs, make=JUDGES[name])
        torch.jit.script(network).save(str(options.folder / f"{name}.pt"))
        print(f"{name}: {accuracy(network, options.data):.1%} of the test images are classified rightly", flush=True)
