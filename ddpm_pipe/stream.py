"""Data too large to decode at once: rows read one after another, shuffled in a buffer, decoded when they are used."""

import itertools
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import datasets
import numpy as np
import torch
from torch import Tensor

from ddpm_pipe.data import (
    UNREADABLE,
    ImageData,
    choose_channels,
    choose_size,
    find_image_column,
    find_label_column,
    flip_some,
    map_cells,
    open_dataset,
    open_image,
    read_header,
    to_array,
    to_unit_range,
)
from ddpm_pipe.randomness import derive_seed, generator


@dataclass
class ImageStream:
    """A stream of rows, and what its images are to become.

    Attributes:
        rows: the dataset, its images not decoded.
        column, label_column: where the images and the labels are; no labels without the latter.
        class_names: names of the classes, by label.
        shape: (C, H, W) of the images.
    """

    rows: datasets.IterableDataset
    column: str
    label_column: str | None
    class_names: tuple[str, ...]
    shape: tuple[int, int, int]

    def decode(self, rows: list[dict]) -> tuple[Tensor, Tensor | None]:
        """Images uint8 (n, C, H, W) and labels (n,) or None.

        An unreadable image is reported and gives way to the readable one before it, so that a batch keeps its size.

        Raises:
            ValueError: where none of them can be read.
        """
        channels, height, width = self.shape

        def read(cell: dict | None) -> np.ndarray | None:
            try:
                return to_array(open_image(cell), channels, (height, width))
            except UNREADABLE as error:
                warnings.warn(f"an image of the stream cannot be read: {error}", stacklevel=2)
                return None

        images = map_cells(read, [row[self.column] for row in rows])
        readable = {i: image for i, image in enumerate(images) if image is not None}
        if not readable:
            raise ValueError(f"none of {len(rows)} images in a row of the stream can be read.")
        chosen = [max((i for i in readable if i <= place), default=min(readable)) for place in range(len(rows))]
        labels = None if self.label_column is None else torch.tensor([rows[i][self.label_column] for i in chosen])
        return torch.from_numpy(np.stack([readable[i] for i in chosen])), labels

    def hold_out(self, count: int, seed: int) -> tuple["ImageStream", ImageData]:
        """The stream without its first `count` rows, and those as images in memory."""
        images, labels = torch.zeros(0, *self.shape, dtype=torch.uint8), None
        if count:
            images, labels = self.decode(list(self.rows.take(count)))
        held_out = ImageData(images, torch.arange(len(images)), labels, self.class_names, self.column)
        return replace(self, rows=self.rows.skip(count)), held_out

    def batches(self, batch_size: int, seed: int, flip: bool) -> "StreamBatches":
        """Training batches of this stream."""
        return StreamBatches(self, batch_size, seed, flip)

    def describe(self) -> str:
        """The plan that is printed before training starts."""
        channels, height, width = self.shape
        lines = [
            f"a stream of images, {width}x{height}, {channels} channel{'s' * (channels > 1)}, from {self.column!r}"
        ]
        if self.class_names:
            lines.append(f"{len(self.class_names)} classes: {', '.join(self.class_names)}")
        return "\n".join(lines)


def stream_images(
    data: str,
    split: str = "train",
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    with_labels: bool = False,
    resolution: list[int] | None = None,
    channels: int | None = None,
) -> ImageStream:
    """Open a dataset as a stream; the arguments are those of `data.load_images`.

    Size and channels are those of the first image where none are asked for; others are made to fit.

    Raises:
        ValueError: where the stream holds no image, or labels are wanted that are not of the class-label type.
    """
    rows = open_dataset(data, split, streaming=True)
    first = next(iter(rows.decode(False)), None)
    if first is None:
        raise ValueError(f"data={data!r} is an empty stream.")
    column = find_image_column(rows, image_column)
    names: tuple[str, ...] = ()
    if with_labels:
        label_column = find_label_column(rows, label_column)
        if not isinstance(rows.features[label_column], datasets.ClassLabel):
            raise ValueError(f"label_column={label_column!r} must be of the class-label type to be streamed.")
        names = tuple(rows.features[label_column].names)
    header = read_header(first[column])
    if header.error:
        raise ValueError(f"the first image of data={data!r} cannot be read: {header.error}")
    shape = (choose_channels([header], channels), *choose_size([header], resolution))
    kept = [column, label_column] if with_labels else [column]
    rows = rows.select_columns(kept).cast_column(column, datasets.Image(decode=False))
    return ImageStream(rows, column, label_column if with_labels else None, names, shape)


class StreamBatches:
    """Batches of a stream; which rows make up a step is a function of (seed, step), as with `data.Batches`.

    A step is found by reading on to it, from the start where it lies behind. Every process reads all rows and decodes
    its own, and does so for the next step, in a thread, while the network is at work on this one.

    Args:
        stream: the images.
        batch_size: images per optimizer step, over all processes.
        seed: of the order and the flips.
        flip: mirror each image with probability 1/2.
        buffer_size: rows among which the next is drawn.
    """

    def __init__(self, stream: ImageStream, batch_size: int, seed: int, flip: bool = False, buffer_size: int = 1000):
        self.stream, self.batch_size, self.seed, self.flip = stream, batch_size, seed, flip
        self.buffer_size = buffer_size
        self._reader = ThreadPoolExecutor(1)  # one: it alone reads rows, in the order of the calls
        self._ahead: dict[tuple[int, int], Future] = {}
        self._read: dict[int, list[dict]] = {}  # step -> its rows, for the last two steps
        self._rows = self._epochs()

    def _epochs(self) -> Iterator[dict]:
        for epoch in itertools.count():
            seed = derive_seed(self.seed, "order", epoch)
            yield from self.stream.rows.shuffle(seed=seed, buffer_size=self.buffer_size)

    def _decode(self, step: int, part: slice) -> tuple[Tensor, Tensor | None]:
        """A part of the rows of a step as images and labels, in the reader's thread."""
        last = max(self._read, default=-1)
        if step < last and step not in self._read:
            self._read, self._rows, last = {}, self._epochs(), -1
        for reading in range(last + 1, step + 1):
            self._read[reading] = list(itertools.islice(self._rows, self.batch_size))
            self._read.pop(reading - 2, None)
        return self.stream.decode(self._read[step][part])

    def __call__(self, step: int, part: slice, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor | None]:
        """A part of the batch of optimizer step `step`: x0 in [-1, 1], (n, C, H, W), and labels (n,) or None."""
        now = self._ahead.pop((step, part.start), None) or self._reader.submit(self._decode, step, part)
        self._ahead = {key: ahead for key, ahead in self._ahead.items() if key[0] >= step}
        self._ahead[step + 1, part.start] = self._reader.submit(self._decode, step + 1, part)
        images, labels = now.result()
        x0 = to_unit_range(images.to(device, non_blocking=True))
        if self.flip:
            x0 = flip_some(x0, torch.rand(self.batch_size, generator=generator(self.seed, "flip", step))[part])
        return x0, labels if labels is None else labels.to(device, non_blocking=True)
