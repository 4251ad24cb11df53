"""A small real feature network, where Inception cannot be had: a classifier of the bundled pictures.

`python tests/feature_network.py out.pt` trains it and saves it as TorchScript, for `--features out.pt`.
"""

import argparse
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

import pypi
import pytest
import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ddpm_pipe.data.memory import ImageData, load_images
from ddpm_pipe.evaluation.metrics import import_torchmetrics

import_torchmetrics("fid")  # before torchvision has its stand-in

BUNDLED = str(Path(__file__).parent.parent / "examples" / "fashion_mnist")
BATCH_SIZE = 100


class Classifier(nn.Module):
    """uint8 (B, 3, H, W), H and W at least 8 -> features (B, 128) and logits (B, classes), float32."""

    def __init__(self, classes: int):
        super().__init__()

        def block(before: int, after: int) -> list[nn.Module]:
            return [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]

        pool = nn.MaxPool2d(2)
        self.layers = nn.Sequential(*block(3, 16), pool, *block(16, 32), pool, *block(32, 64), pool, *block(64, 128))
        self.head = nn.Linear(128, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.layers(images.float() / 127.5 - 1).mean((2, 3))
        return features, self.head(features)


def train_classifier(data: str = BUNDLED, split: str = "train", epochs: int = 6) -> nn.Module:
    """Train on labelled images, grey or RGB; the same weights every time on one machine with one thread."""
    images = load_images(data, split, with_labels=True)
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Classifier(len(images.class_names)).to(memory_format=torch.channels_last)
    return fit(network, map(images.take, shuffled(len(images), epochs, generator)), steps_of(images, epochs))


def shuffled(count: int, epochs: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Positions of the images of each batch, in another order in each epoch; those left over are left out."""
    for _ in range(epochs):
        order = torch.randperm(count, generator=generator)
        yield from order[: count // BATCH_SIZE * BATCH_SIZE].split(BATCH_SIZE)


def steps_of(images: ImageData, epochs: int) -> int:
    return len(images) // BATCH_SIZE * epochs


def fit(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], steps: int, bf16: bool = False) -> nn.Module:
    """Train a classifier, on its device, with uint8 images (B, 1 or 3, H, W) and labels (B,)."""
    device = next(network.parameters()).device
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, steps)
    for pixels, labels in batches:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = network(pixels.expand(-1, 3, -1, -1).to(device))[1]
        loss = cross_entropy(logits.float(), labels.to(device), label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def accuracy(network: nn.Module, data: str = BUNDLED, split: str = "test") -> float:
    """The share of labelled images whose class has the highest logit."""
    images, device = load_images(data, split, with_labels=True), next(network.parameters()).device
    hits = []
    for positions in torch.arange(len(images)).split(BATCH_SIZE):
        pixels, labels = images.take(positions)
        hits.append(network(pixels.expand(-1, 3, -1, -1).to(device))[1].argmax(1).cpu() == labels)
    return torch.cat(hits).double().mean().item()


@pytest.fixture(scope="session")
def feature_file(tmp_path_factory) -> str:
    """The classifier as TorchScript, trained once for all workers."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of the whole session; without workers, of all sessions
    file = folder / "feature_network.pt"
    with FileLock(file.with_suffix(".lock")):
        if not file.exists():
            torch.jit.script(train_classifier()).save(str(file))
    return str(file)


@pytest.fixture
def torch_fidelity(tmp_path_factory, monkeypatch):
    """The library without its torchvision, which neither Inception nor the metrics use."""
    names = ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")
    modules = {name: ModuleType(name) for name in names}
    for name in names[1:]:
        parent, child = name.rsplit(".", 1)
        setattr(modules[parent], child, modules[name])
    vars(modules["torchvision.datasets"]).update(
        dict.fromkeys(("CIFAR10", "CIFAR100", "STL10"), object)
    )  # base classes
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    folder = pypi.unpacked("torch-fidelity", "0.4.0", tmp_path_factory.getbasetemp())
    with pypi.importable(folder, "torch_fidelity"):
        yield


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", help="where to save it")
    parser.add_argument("--data", default=BUNDLED, help="labelled images, as examples/train.py takes them")
    parser.add_argument("--split", default="train")
    parser.add_argument("--epochs", type=int, default=6)
    options = parser.parse_args()
    classifier = train_classifier(options.data, options.split, options.epochs)
    torch.jit.script(classifier).save(options.file)
    print(f"{accuracy(classifier):.3f} of the bundled test images are classified rightly")
