"""A dataset id, a file or a folder -> uint8 images in memory -> batches, in an order that depends on the seed alone.

How files become images: EXIF orientation is applied; palette and CMYK images become RGB; transparency is laid over
white unless four channels are asked for; 16-bit greys are scaled to 8 bits; other sizes are resized and cropped to the
centre.
"""

import io
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import datasets
import fsspec
import numpy as np
import psutil
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from PIL import Image, ImageOps
from torch import Tensor

from ddpm_pipe.randomness import generator

T = TypeVar("T")
AnyDataset = Any
"""`datasets.Dataset` or `datasets.IterableDataset`."""

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Number of channels -> mode of PIL."""

_GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "F")
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
SMALL_FILE = 8192
"""Bytes of an image file below which one thread decodes more of them than two: 2.5 times as many where they have 2 KiB,
half as many where they have 36 KiB."""

_FILE_FORMATS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset", ".zip": "imagefolder"}


# ---------------------------------------------------------------- finding the images


def open_dataset(data: str, split: str = "train", streaming: bool = False) -> AnyDataset:
    """Open a dataset wherever it is.

    Args:
        data: a folder of images (class subfolders become labels), of parquet files or of `Dataset.save_to_disk`; a
            parquet, arrow, tar or zip file or a glob of such files; or the id of a dataset on the Hub.
        split: which split, where there are several.
        streaming: read it row by row instead of as a whole.

    Raises:
        ValueError: where there is nothing to read, naming what was looked for.
    """
    path = Path(data).expanduser()
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            found = datasets.load_from_disk(str(path))
            found = found[split] if isinstance(found, datasets.DatasetDict) else found
            return found.to_iterable_dataset() if streaming else found
        if path.suffix in _FILE_FORMATS:
            options = {"path": _FILE_FORMATS[path.suffix], "data_files": str(path), "split": "train"}
        else:
            options = {"path": str(path) if path.is_dir() else data, "split": split}
        return datasets.load_dataset(**options, streaming=streaming)
    except (FileNotFoundError, HFValidationError, HfHubHTTPError, ConnectionError, OSError) as error:
        if path.is_dir():
            raise ValueError(f"data={data!r} is a folder without images or parquet files.") from error
        raise ValueError(
            f"data={data!r} is neither a file nor a folder here, nor could it be read from the Hub "
            f"({type(error).__name__}); give a folder of images, a parquet or arrow file or a dataset id."
        ) from error
    except (KeyError, ValueError) as error:
        raise ValueError(f"data={data!r} with split={split!r} could not be read: {error}") from error


def find_image_column(dataset: AnyDataset, name: str | None = None) -> str:
    """The column that holds the images: `name` if given, else the only one that looks like it.

    Raises:
        ValueError: for an unknown column, or where none or several hold images.
    """
    columns = dataset.column_names
    if name is not None:
        if name not in columns:
            raise ValueError(f"image_column={name!r} is not in the data; its columns are {', '.join(columns)}.")
        return name
    found = [column for column, feature in dataset.features.items() if _holds_images(feature)]
    if len(found) != 1:
        what = "none of its columns holds images" if not found else f"several columns hold images: {', '.join(found)}"
        raise ValueError(f"{what}; name one with image_column (columns: {', '.join(columns)}).")
    return found[0]


def _holds_images(feature: object) -> bool:
    """An image feature, or what one looks like in a parquet file written without it."""
    return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})


def find_label_column(dataset: AnyDataset, name: str | None = None) -> str:
    """The column that holds the classes: `name` if given, else the only one of class labels.

    Raises:
        ValueError: for an unknown column, or where no single one holds class labels.
    """
    columns = ", ".join(dataset.column_names)
    if name is not None:
        if name not in dataset.column_names:
            raise ValueError(f"label_column={name!r} is not in the data; its columns are {columns}.")
        return name
    found = [column for column, feature in dataset.features.items() if isinstance(feature, datasets.ClassLabel)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} columns hold class labels; name one with label_column (columns: {columns}).")
    return found[0]


def read_labels(dataset: datasets.Dataset, column: str) -> tuple[Tensor, tuple[str, ...]]:
    """Labels (N,) from 0 and the names of the classes; numbers and strings are numbered in sorted order."""
    if not isinstance(dataset.features[column], datasets.ClassLabel):
        dataset = dataset.class_encode_column(column)
    return torch.tensor(dataset[column][:]), tuple(dataset.features[column].names)


# ---------------------------------------------------------------- decoding


def open_image(cell: dict | None) -> Image.Image:
    """A PIL image, upright, from the bytes or the path in a cell of the image column, not decoded yet."""
    if cell is None:
        raise ValueError("there is no image")
    source = io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"]
    if isinstance(source, str) and "://" in source:  # inside a zip file
        with fsspec.open(source) as file:
            source = io.BytesIO(file.read())
    return ImageOps.exif_transpose(Image.open(source))


def to_array(image: Image.Image, channels: int, size: tuple[int, int]) -> np.ndarray:
    """A PIL image of any mode and size -> uint8 (channels, height, width), by the rules in the head of this module."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    elif channels != 4 and image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert(MODES[channels])
    height, width = size
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)


def map_cells(function: Callable[[dict | None], T], cells: list[dict | None]) -> list[T]:
    """`function` of every image cell, in order: in threads (PIL decodes outside the interpreter's lock), but for small
    files in memory, which are decoded in less time than it takes to hand them over."""
    in_memory = [len(cell["bytes"]) for cell in cells if cell is not None and cell["bytes"] is not None]
    if in_memory and sum(in_memory) < SMALL_FILE * len(in_memory):
        return [function(cell) for cell in cells]
    with ThreadPoolExecutor() as pool:
        return list(pool.map(function, cells))


@dataclass
class Header:
    """What is known of an image before its pixels are decoded; `error` where it cannot be opened."""

    size: tuple[int, int] = (0, 0)
    grey: bool = False
    error: str | None = None


def read_header(cell: dict | None) -> Header:
    try:
        image = open_image(cell)
    except UNREADABLE as error:
        return Header(error=str(error))
    return Header((image.height, image.width), image.mode in _GREY_MODES)


def choose_size(headers: Iterable[Header], resolution: list[int] | None) -> tuple[int, int]:
    """Height and width of the training images: `resolution` (one number or two), else the one size that all have.

    Raises:
        ValueError: for an impossible resolution, or mixed sizes without one.
    """
    if resolution is not None:
        if len(resolution) not in (1, 2) or min(resolution) < 1:
            raise ValueError(f"resolution={resolution} must be one size or a height and a width, each at least 1.")
        return resolution[0], resolution[-1]
    sizes = Counter(header.size for header in headers)
    if len(sizes) > 1:
        common = ", ".join(f"{width}x{height} ({count})" for (height, width), count in sizes.most_common(3))
        raise ValueError(f"the images have {len(sizes)} different sizes: {common}, ...; choose one with resolution.")
    return next(iter(sizes))


def choose_channels(headers: Iterable[Header], channels: int | None) -> int:
    """Channels of the training images: as asked, else 1 where all are grey and 3 where all are coloured.

    Raises:
        ValueError: for a number that is not 1, 3 or 4, or grey and coloured images mixed without one.
    """
    if channels is not None:
        if channels not in MODES:
            raise ValueError(f"channels={channels} must be 1 (grey), 3 (RGB) or 4 (RGBA).")
        return channels
    grey = Counter(header.grey for header in headers)
    if len(grey) > 1:
        raise ValueError(
            f"{grey[True]} images are grey and {grey[False]} are coloured; choose channels=1 or channels=3."
        )
    return 1 if grey[True] else 3


# ---------------------------------------------------------------- the images


@dataclass
class ImageData:
    """All images, decoded once: in memory, or in a memory-mapped file where they are too many.

    Attributes:
        images: uint8 (N, C, H, W); what could not be read is zero.
        rows: which of the images are in use, (len(self),).
        labels: int64 (N,) or None.
        class_names: names of the classes, by label.
        column: the column the images were found in.
        skipped: one line for each image that could not be read.
        memory_mapped: whether `images` lie in a file.
    """

    images: Tensor
    rows: Tensor
    labels: Tensor | None = None
    class_names: tuple[str, ...] = ()
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
        """Images (n, C, H, W) and labels (n,) or None at positions 0 to len(self) - 1."""
        rows = self.rows[positions]
        return self.images[rows], None if self.labels is None else self.labels[rows]

    def hold_out(self, count: int, seed: int) -> tuple["ImageData", "ImageData"]:
        """Two disjoint parts, of len(self) - count and of count images, drawn by the seed.

        Raises:
            ValueError: where nothing would be left to train on.
        """
        if not 0 <= count < len(self):
            raise ValueError(f"holdout={count} must leave some of the {len(self)} images to train on.")
        drawn = self.rows[torch.randperm(len(self), generator=generator(seed, "holdout"))]
        first, second = drawn[count:].sort().values, drawn[:count].sort().values
        return replace(self, rows=first), replace(self, rows=second)

    def batches(self, batch_size: int, seed: int, flip: bool) -> "Batches":
        """Training batches of these images."""
        return Batches(self, batch_size, seed, flip)

    def describe(self) -> str:
        """The plan that is printed before training starts."""
        channels, height, width = self.shape
        where = "memory-mapped" if self.memory_mapped else "in memory"
        lines = [
            f"{len(self)} images per epoch, {width}x{height}, {channels} channel{'s' * (channels > 1)}, "
            f"from column {self.column!r}; {self.images.nbytes / 2**20:.1f} MiB {where}"
        ]
        if self.class_names:
            lines.append(f"{len(self.class_names)} classes: {', '.join(self.class_names)}")
        if self.skipped:
            lines.append(f"{len(self.skipped)} unreadable images skipped:")
            lines.extend(f"  {line}" for line in self.skipped)
        return "\n".join(lines)


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
        image_column, label_column: where the images and labels are; None finds them.
        with_labels: read the labels too.
        resolution: [size] or [height, width] in pixels; None keeps the size that all images have.
        channels: 1, 3 or 4; None is 1 where all images are grey, else 3.
        max_memory: bytes above which the images are kept in a memory-mapped file in the datasets cache, where the next
            run finds them; None is half of the free memory.

    Raises:
        ValueError: for anything that cannot become one tensor of images, in one sentence.
    """
    dataset = open_dataset(data, split)
    column = find_image_column(dataset, image_column)
    labels, names = read_labels(dataset, find_label_column(dataset, label_column)) if with_labels else (None, ())
    cells = dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False))

    headers = list(_map_column(read_header, cells, column))
    readable = [header for header in headers if header.error is None]
    if not readable:
        raise ValueError(f"data={data!r} has no image that can be read in column {column!r} ({len(headers)} rows).")
    size, channels = choose_size(readable, resolution), choose_channels(readable, channels)

    shape = (len(cells), channels, *size)
    max_memory = psutil.virtual_memory().available // 2 if max_memory is None else max_memory
    if math.prod(shape) <= max_memory:
        images = np.zeros(shape, np.uint8)
        skipped = _decode_into(images, cells, column)
    else:
        images, skipped = _memory_mapped(shape, cells, column)
    rows = torch.tensor([i for i in range(len(cells)) if i not in skipped], dtype=torch.long)
    return ImageData(
        images=torch.from_numpy(images),
        rows=rows,
        labels=labels,
        class_names=names,
        column=column,
        skipped=tuple(f"row {i}: {reason}" for i, reason in skipped.items()),
        memory_mapped=isinstance(images, np.memmap),
    )


def _map_column(function: Callable[[dict | None], T], cells: datasets.Dataset, column: str) -> Iterator[T]:
    """`function` of every image cell, in order."""
    for batch in cells.iter(batch_size=1024):
        yield from map_cells(function, batch[column])


def _decode_into(images: np.ndarray, cells: datasets.Dataset, column: str) -> dict[int, str]:
    """Decode all cells into `images`, uint8 (N, C, H, W); return row -> reason of those that could not be read."""
    channels, *size = images.shape[1:]

    def decode(cell: dict | None) -> tuple[np.ndarray | None, str]:
        try:
            return to_array(open_image(cell), channels, tuple(size)), ""
        except UNREADABLE as error:
            return None, f"{(cell or {}).get('path') or 'no path'}: {error}"

    skipped = {}
    for i, (image, reason) in enumerate(_map_column(decode, cells, column)):
        if image is None:
            skipped[i] = reason
        else:
            images[i] = image
    return skipped


def _memory_mapped(shape: tuple[int, ...], cells: datasets.Dataset, column: str) -> tuple[np.ndarray, dict[int, str]]:
    """The decoded images in a file of the datasets cache, decoded now or by an earlier run."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "ddpm_pipe"
    path = folder / f"{cells._fingerprint}-{'x'.join(map(str, shape))}.npy"
    notes = path.with_suffix(".json")  # written last: its presence says that the images are complete
    if not notes.exists():
        folder.mkdir(parents=True, exist_ok=True)
        images = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
        skipped = _decode_into(images, cells, column)
        images.flush()
        notes.write_text(json.dumps(skipped))
    skipped = {int(row): reason for row, reason in json.loads(notes.read_text()).items()}
    return np.load(path, mmap_mode="r+"), skipped


# ---------------------------------------------------------------- batches


class Batches:
    """Shuffled, flipped batches: which images make up a step is a function of (seed, step).

    The images are taken epoch after epoch without a gap, so that a batch may reach into the next epoch.

    Args:
        data: the images.
        batch_size: images per optimizer step, over all processes.
        seed: of the order and the flips.
        flip: mirror each image with probability 1/2.
    """

    def __init__(self, data: ImageData, batch_size: int, seed: int, flip: bool = False):
        self.data, self.batch_size, self.seed, self.flip = data, batch_size, seed, flip
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def positions(self, step: int) -> Tensor:
        """Which images of the data make up optimizer step `step`, (batch_size,)."""
        drawn = torch.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs = drawn // len(self.data)
        return torch.cat([self._permutation(int(e))[drawn[epochs == e] % len(self.data)] for e in epochs.unique()])

    def _permutation(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = torch.randperm(len(self.data), generator=generator(self.seed, "order", epoch))
        return self._order

    def __call__(self, step: int, part: slice, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor | None]:
        """A part of the batch of optimizer step `step`: x0 in [-1, 1], (n, C, H, W), and labels (n,) or None."""
        images, labels = self.data.take(self.positions(step)[part])
        x0 = to_unit_range(images.to(device, non_blocking=True))
        if self.flip:
            x0 = flip_some(x0, torch.rand(self.batch_size, generator=generator(self.seed, "flip", step))[part])
        return x0, labels if labels is None else labels.to(device, non_blocking=True)


def flip_some(images: Tensor, draws: Tensor) -> Tensor:
    """Mirror the images (n, C, H, W) whose draw from [0, 1) is below 1/2."""
    mirrored = (draws < 0.5).to(images.device, non_blocking=True)
    return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)


def to_unit_range(images: Tensor) -> Tensor:
    """uint8 pixels 0 to 255 -> float32 in [-1, 1] (DDPM, section 3.3)."""
    return images.float() / 127.5 - 1
