"""A dataset decoded as a whole to uint8, in memory or in a memory-mapped file, and the batches drawn from it.

Each batch is a function of the seed and the step.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import datasets
import numpy as np
import PIL
import psutil
import torch
from torch import Tensor

from ddpm_pipe.data.images import (
    DECODING,
    Cell,
    Header,
    Unreadable,
    choose_channels,
    choose_size,
    describe_classes,
    describe_shape,
    first_header,
    gib,
    header_of,
    map_cells,
    open_image,
    read_header,
    to_array,
    to_unit_range,
)
from ddpm_pipe.data.sources import (
    DataError,
    explained,
    find_image_column,
    find_label_column,
    open_dataset,
    read_labels,
    reason,
    unused_classes,
)
from ddpm_pipe.launch import local_processes, to_device
from ddpm_pipe.randomness import generator
from ddpm_pipe.run.files import locked, replace_text, whole_file

T = TypeVar("T")


# ---------------------------------------------------------------- the images


@dataclass
class ImageData:
    """All images of a dataset, decoded once. They are in memory, or in a memory-mapped file where they are too large.

    Attributes:
        images: uint8 (N, C, H, W); an image that could not be read is all zeros.
        rows: int64 (len(self),), the indices of the images in use.
        labels: int64 (N,) or None.
        class_names: names of the classes, by label.
        unused: names of the classes of images that were read without labels.
        column: the dataset column that holds the images.
        skipped: one line for each image that could not be read.
        memory_mapped: whether `images` is backed by a file.
    """

    images: Tensor
    rows: Tensor
    labels: Tensor | None = None
    class_names: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    column: str = ""
    skipped: tuple[str, ...] = ()
    memory_mapped: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W)."""
        return tuple(self.images.shape[1:])

    def take(self, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the images, uint8 (n, C, H, W), and the labels, (n,) or None, at positions from 0 to len(self) - 1."""
        rows = self.rows[positions]
        return self.images[rows], None if self.labels is None else self.labels[rows]

    def hold_out(self, count: int, seed: int) -> tuple["ImageData", "ImageData"]:
        """Split the images at random, by the seed, into one part of len(self) - count images and one of count images.

        Raises:
            DataError: where nothing would be left to train on.
        """
        if not 0 <= count < len(self):
            raise DataError(f"holdout={count} must leave some of the {len(self)} images to train on.")
        drawn = self.rows[torch.randperm(len(self), generator=generator(seed, "holdout"))]
        first, second = drawn[count:].sort().values, drawn[:count].sort().values
        return replace(self, rows=first), replace(self, rows=second)

    def batches(self, batch_size: int, seed: int) -> "Batches":
        """Return the training batches of these images."""
        return Batches(self, batch_size, seed)

    def summary(self) -> str:
        """Describe the images in one line, for the plan and the model card."""
        return f"{len(self)} images per epoch, {describe_shape(self.shape)}, from column {self.column!r}"

    def notes(self) -> list[str]:
        """Return further lines to print before training: where images are kept, the classes, and unreadable images."""
        where = "memory-mapped" if self.memory_mapped else "in memory"
        lines = [f"{self.images.nbytes / 2**20:.1f} MiB {where}", *describe_classes(self.class_names, self.unused)]
        if self.skipped:
            lines.append(f"{len(self.skipped)} unreadable images skipped:")
            lines.extend(f"  {line}" for line in self.skipped)
        return lines


def load_images(
    data: str,
    split: str = "train",
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    with_labels: bool = False,
    resolution: list[int] | None = None,
    channels: int | None = None,
    max_memory: int | None = None,
) -> ImageData:
    """Open a dataset and decode all of it.

    Args:
        data, split: as in `open_dataset`.
        image_column, label_column: columns of the images and labels; None detects them.
        with_labels: whether to read the labels too.
        resolution: [size] or [height, width] in pixels; None keeps the size that all images have.
        channels: 1, 3 or 4; None means 1 where all images are grey, and 3 where all are coloured.
        max_memory: bytes above which the images are kept in a memory-mapped file of the datasets cache, for later runs
            to reuse; None means half of the free memory. Several processes on one machine always share such a file.

    Raises:
        DataError: where the data cannot become one tensor of images; the message says why in one sentence.
    """
    dataset = open_dataset(data, split)
    column = find_image_column(dataset, image_column)
    labels, names = read_labels(dataset, find_label_column(dataset, label_column)) if with_labels else (None, ())
    with explained(f"column {column!r} of data={data!r}"):
        cells = Cells(dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False)), column)
        images, skipped = _decode(cells, resolution, channels, max_memory)
    return ImageData(
        images=torch.from_numpy(images),
        rows=torch.tensor([i for i in range(len(cells)) if i not in skipped], dtype=torch.long),
        labels=labels,
        class_names=names,
        unused=() if with_labels else unused_classes(dataset),
        column=column,
        skipped=tuple(f"row {i}: {why}" for i, why in skipped.items()),
        memory_mapped=isinstance(images, np.memmap),
    )


# ---------------------------------------------------------------- decoding all of them


@dataclass
class Cells:
    """The image column of a dataset, whose cells are not decoded."""

    dataset: datasets.Dataset
    column: str

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Cell]:
        for batch in self.dataset.iter(batch_size=128):
            yield from batch[self.column]

    def map(self, function: Callable[[Cell], T], at_once: int = 128) -> Iterator[T | Unreadable]:
        """Apply `function` to every cell by `attempt`, `at_once` cells at a time, and yield the results in order."""
        for batch in self.dataset.iter(batch_size=at_once):
            yield from map_cells(function, batch[self.column])


class Target(NamedTuple):
    """The array that every image is converted to, and what all images must have in common."""

    channels: int
    size: tuple[int, int]
    """height and width"""
    common_size: tuple[int, int] | None
    """the size that all images must have; None where others are resized"""
    common_grey: bool | None
    """True if all images must be grey, False if all must be coloured, None where they are converted"""

    def takes(self, header: Header) -> bool:
        """Return whether an image has the common size and colour."""
        return self.common_size in (None, header.size) and self.common_grey in (None, header.grey)


class MixedImages(Exception):
    """An image differs from the first one in size or colour, and the user chose no resolution or channels."""


Skipped = dict[int, str]
"""Maps a row to the reason why its image could not be decoded."""


def _decode(
    cells: Cells, resolution: list[int] | None, channels: int | None, max_memory: int | None
) -> tuple[np.ndarray, Skipped]:
    """Decode all images, in memory or memory-mapped; the first image decides a size or channels that are not given.

    Raises:
        DataError: for images of several sizes or colours where none is chosen.
        ValueError: where no image can be read.
    """
    first = first_header(cells)
    target = Target(
        channels=choose_channels([first], channels),
        size=choose_size([first], resolution),
        common_size=None if resolution else first.size,
        common_grey=None if channels else first.grey,
    )
    shape = (len(cells), target.channels, *target.size)
    max_memory = psutil.virtual_memory().available // 2 if max_memory is None else max_memory
    try:
        if local_processes() == 1 and math.prod(shape) <= max_memory:
            images = np.zeros(shape, np.uint8)
            skipped = _decode_into(images, cells, target)
        else:
            images, skipped = _memory_mapped(shape, cells, target)
    except MixedImages:
        headers = [header for header in cells.map(read_header) if not isinstance(header, Unreadable)]
        choose_size(headers, resolution)
        choose_channels(headers, channels)
        raise
    if len(skipped) == len(cells):
        raise ValueError(f"it has no image that can be read in {len(cells)} rows; the first is {skipped[0]}")
    return images, skipped


def _decode_into(images: np.ndarray, cells: Cells, target: Target) -> Skipped:
    """Decode all cells into `images`, uint8 (N, C, H, W); images that cannot be decoded stay zero.

    Raises:
        MixedImages: at the first image that the target does not accept.
    """

    def decode(cell: Cell) -> tuple[Header, np.ndarray]:
        image = open_image(cell)
        return header_of(image), to_array(image, target.channels, target.size)

    skipped = {}
    at_once = min(128, 1 + 2**28 // images[0].nbytes)
    for i, result in enumerate(cells.map(decode, at_once)):
        if isinstance(result, Unreadable):
            skipped[i] = result.reason
            continue
        header, images[i] = result
        if not target.takes(header):
            raise MixedImages
    return skipped


# ---------------------------------------------------------------- memory-mapped


def _memory_mapped(shape: tuple[int, ...], cells: Cells, target: Target) -> tuple[np.ndarray, Skipped]:
    """Map the file of decoded images in the datasets cache, and decode them into it unless an earlier run has.

    Only one run at a time decodes. It writes a temporary file and renames it when all of it is on the disk.

    Raises:
        DataError: where the disk has no room for the file, or it cannot be written.
    """
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "ddpm_pipe"
    path = folder / f"{_content_key(cells, target)}-{'x'.join(map(str, shape))}.npy"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(path.with_suffix(".lock"), "another run decodes the same images"):
            if found := _decoded_before(path, shape):
                return found
            with whole_file(path) as new:
                images = _reserve(new, shape)
                skipped = _decode_into(images, cells, target)
                replace_text(path.with_suffix(".json"), json.dumps(skipped))
                images.flush()
            return images, skipped
    except OSError as error:
        raise DataError(f"the decoded images cannot be kept in {folder}: {reason(error)}.") from error


def _content_key(cells: Cells, target: Target) -> str:
    """Hash what decides the pixels into a name: the files, the target, the version of Pillow and the decoding rules."""
    key = hashlib.sha256(repr((DECODING, PIL.__version__, target)).encode())
    for cell in cells:
        key.update(_content(cell))
    return key.hexdigest()[:32]


def _content(cell: Cell) -> bytes:
    """Return what identifies the file in a cell: the hash of its bytes, or its path, size and modification time."""
    if cell is None or cell["bytes"] is None:
        path = (cell or {}).get("path")
        try:
            stat = os.stat((path or "").rpartition("::")[2])  # a file in an archive is identified by the archive
        except (OSError, ValueError):  # Python raises ValueError for an impossible path
            return repr(path).encode()
        return repr((path, stat.st_size, stat.st_mtime_ns)).encode()
    return hashlib.sha256(cell["bytes"]).digest()


def _decoded_before(path: Path, shape: tuple[int, ...]) -> tuple[np.ndarray, Skipped] | None:
    """Return the images in a file and the skipped rows listed beside it; None where either is missing or damaged."""
    try:
        if np.load(path, mmap_mode="r").shape != shape:  # "r+" would lengthen a file that is too short
            return None
        notes = json.loads(path.with_suffix(".json").read_text())
        return np.load(path, mmap_mode="r+"), {int(row): why for row, why in notes.items()}
    except (OSError, ValueError, EOFError):  # the file is missing, or shorter than its header says
        return None


def _reserve(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """Create a file for uint8 images (N, C, H, W) and allocate all of its space on the disk.

    Without the allocation, a disk that fills up later would kill the process.

    Raises:
        OSError: where the disk has no room for the file.
    """
    needed, free = math.prod(shape), shutil.disk_usage(path.parent).free
    if needed > free:
        raise OSError(f"they take {gib(needed)}, and {gib(free)} are free; choose a smaller resolution or streaming.")
    images = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
    if hasattr(os, "posix_fallocate"):  # macOS has no posix_fallocate
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    return images


# ---------------------------------------------------------------- batches


class Batches:
    """Shuffled batches, in which the images of a step are a function of (seed, step).

    Epochs follow one another without a gap, so a batch may reach into the next epoch.

    Args:
        data: the images.
        batch_size: images per optimizer step, over all processes.
        seed: seed of the order.
    """

    def __init__(self, data: ImageData, batch_size: int, seed: int):
        self.data, self.batch_size, self.seed = data, batch_size, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def positions(self, step: int) -> Tensor:
        """Return the positions in the data of the images of optimizer step `step`, int64 (batch_size,)."""
        drawn = torch.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs = drawn // len(self.data)
        return torch.cat([self._permutation(int(e))[drawn[epochs == e] % len(self.data)] for e in epochs.unique()])

    def _permutation(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = torch.randperm(len(self.data), generator=generator(self.seed, "order", epoch))
        return self._order

    def __call__(self, step: int, part: slice, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor | None]:
        """Return a part of the batch of optimizer step `step`: x0 in [-1, 1], (n, C, H, W), and labels (n,) or None."""
        images, labels = self.data.take(self.positions(step)[part])
        x0 = to_unit_range(to_device(images, device))
        return x0, labels if labels is None else to_device(labels, device)
