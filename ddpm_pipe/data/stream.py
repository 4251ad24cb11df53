"""Streaming of data that are too large to decode at once: rows are shuffled in a buffer and decoded when used."""

import itertools
import math
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from inspect import signature

import datasets
import numpy as np
import torch
from torch import Tensor

from ddpm_pipe.data.images import (
    Unreadable,
    check_memory,
    choose_channels,
    choose_size,
    describe_classes,
    describe_shape,
    first_header,
    map_cells,
    open_image,
    to_array,
    to_unit_range,
)
from ddpm_pipe.data.memory import ImageData
from ddpm_pipe.data.sources import (
    DataError,
    explained,
    find_image_column,
    find_label_column,
    is_label,
    open_dataset,
    unused_classes,
)
from ddpm_pipe.launch import to_device
from ddpm_pipe.randomness import derive_seed

PATIENCE = 1000
"""Number of consecutive unreadable rows after which a stream is given up."""

_TAKEN = signature(datasets.IterableDataset.shuffle).parameters
SHARDS = {"max_buffer_input_shards": 1} if "max_buffer_input_shards" in _TAKEN else {}
"""Makes `datasets` read one file of a stream at a time. From version 5 on it would read ten in threads, and wait 5 s
for them to end."""

Example = tuple[np.ndarray, int]
"""An image, uint8 (C, H, W), and its label, which is 0 where there are no labels."""


@dataclass
class ImageStream:
    """A stream of rows, with what is needed to decode its images.

    Attributes:
        rows: the dataset, whose images are not decoded.
        column: the column of the images.
        label_column: the column of the labels; None where there are none.
        class_names: names of the classes, by label.
        unused: names of the classes of a stream that is read without labels.
        shape: (C, H, W) of the images.
        skipped: one line for each image that could not be read so far.
    """

    rows: datasets.IterableDataset
    column: str
    label_column: str | None
    class_names: tuple[str, ...]
    unused: tuple[str, ...]
    shape: tuple[int, int, int]
    skipped: list[str] = field(default_factory=list)

    def decode(self, rows: list[dict], following: Iterable[dict] = ()) -> tuple[Tensor, Tensor | None]:
        """Decode rows into images, uint8 (n, C, H, W), and labels, (n,) or None.

        An image that cannot be read is reported once and replaced by that of the first readable row after it, in `rows`
        or in `following`. So a batch keeps its size, and is the same however it is cut into parts.

        Raises:
            DataError: where the last of the rows and the next PATIENCE rows cannot be read.
        """
        chosen: list[Example] = []
        for example in reversed(self._read(rows)):
            if isinstance(example, Unreadable):
                example = chosen[-1] if chosen else self._first_readable(following)
            chosen.append(example)
        return self._stack(chosen[::-1])

    def _read(self, rows: list[dict]) -> list[Example | Unreadable]:
        """Decode image and label of each row; report an unreadable image the first time it is met."""
        channels, height, width = self.shape
        images = map_cells(
            lambda cell: to_array(open_image(cell), channels, (height, width)), [r[self.column] for r in rows]
        )
        examples: list[Example | Unreadable] = []
        for row, image in zip(rows, images, strict=True):
            label = 0 if self.label_column is None else row[self.label_column]
            if not isinstance(image, Unreadable) and self.label_column and not is_label(label, self.class_names):
                image = Unreadable(f"{row[self.column]['path'] or 'no path'}: there is no label of a class ({label})")
            if isinstance(image, Unreadable):
                self._report(image)
                examples.append(image)
            else:
                examples.append((image, label))
        return examples

    def _report(self, image: Unreadable) -> None:
        if image.reason not in self.skipped:
            self.skipped.append(image.reason)
            warnings.warn(f"unreadable image {len(self.skipped)} of the stream: {image.reason}", stacklevel=3)

    def _first_readable(self, rows: Iterable[dict]) -> Example:
        for row in itertools.islice(rows, PATIENCE):
            (example,) = self._read([row])
            if not isinstance(example, Unreadable):
                return example
        raise DataError(f"an image of the stream and the next {PATIENCE} cannot be read; the last: {self.skipped[-1]}.")

    def _stack(self, examples: list[Example]) -> tuple[Tensor, Tensor | None]:
        images = np.stack([image for image, _ in examples]) if examples else np.zeros((0, *self.shape), np.uint8)
        labels = None if self.label_column is None else torch.tensor([label for _, label in examples], dtype=torch.long)
        return torch.from_numpy(images), labels

    def hold_out(self, count: int, seed: int) -> tuple["ImageStream", ImageData]:
        """Return the stream without its first `count` rows, and the readable images of those rows, in memory.

        Raises:
            DataError: where the images do not fit into memory, or nothing would be left to train on.
        """
        if count < 0:
            raise DataError(f"holdout={count} must be at least 0.")
        check_memory(count * math.prod(self.shape), f"holdout={count}: keeping images out of training")
        with explained("the stream"):
            rows = list(self.rows.take(count + 1)) if count else []
        if count and len(rows) <= count:
            raise DataError(f"holdout={count} must leave some of the {len(rows)} images to train on.")
        readable = [example for example in self._read(rows[:count]) if not isinstance(example, Unreadable)]
        images, labels = self._stack(readable)
        held_out = ImageData(images, torch.arange(len(images)), labels, self.class_names, column=self.column)
        return replace(self, rows=self.rows.skip(count)), held_out

    def batches(self, batch_size: int, seed: int) -> "StreamBatches":
        """Return the training batches of this stream."""
        return StreamBatches(self, batch_size, seed)

    def summary(self) -> str:
        """Describe the stream in one line, for the plan and the model card."""
        return f"a stream of images, {describe_shape(self.shape)}, from column {self.column!r}"

    def notes(self) -> list[str]:
        """Return further lines to print before training: the classes."""
        return describe_classes(self.class_names, self.unused)


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
    """Open a dataset as a stream; the arguments are those of `load_images`.

    Where no size or channels are given, the first readable image decides them, and the others are converted to match.

    Raises:
        DataError: where the stream holds no image, or the labels to read are not of the class-label type.
    """
    rows = open_dataset(data, split, streaming=True)
    column = find_image_column(rows, image_column)
    label_column = find_label_column(rows, label_column) if with_labels else None
    names: tuple[str, ...] = ()
    if label_column is not None:
        if not isinstance(rows.features[label_column], datasets.ClassLabel):
            raise DataError(f"label_column={label_column!r} must be of the class-label type to be streamed.")
        names = tuple(rows.features[label_column].names)
    unused = () if with_labels else unused_classes(rows)
    kept = [column, label_column] if label_column else [column]
    rows = rows.select_columns(kept).cast_column(column, datasets.Image(decode=False))
    with explained(f"data={data!r}"):
        first = first_header(row[column] for row in itertools.islice(rows, PATIENCE))
    shape = (choose_channels([first], channels), *choose_size([first], resolution))
    return ImageStream(rows, column, label_column, names, unused, shape)


class StreamBatches:
    """Batches of a stream, in which the rows of a step are a function of (seed, step), as in `Batches`.

    The stream is read forward up to the step, from the start if the step's rows are no longer held. Every process reads
    all rows and decodes its own. A thread does this for the next step while the network works on this one.

    Args:
        stream: the images.
        batch_size: images per optimizer step, over all processes.
        seed: seed of the order.
        buffer_size: number of rows from which the next one is drawn.
    """

    def __init__(self, stream: ImageStream, batch_size: int, seed: int, buffer_size: int = 1000):
        self.stream, self.batch_size, self.seed = stream, batch_size, seed
        self.buffer_size = buffer_size
        self._reader = ThreadPoolExecutor(1)  # a single thread, so that rows are read in the order of the calls
        self._ahead: dict[tuple[int, int], Future] = {}
        self._rows = self._epochs()
        self._first = 0  # number of the first row in _held, counted across epochs
        self._held: deque[dict] = deque()

    def _epochs(self) -> Iterator[dict]:
        for epoch in itertools.count():
            seed = derive_seed(self.seed, "order", epoch)
            with explained("the stream"):
                rows = iter(self.stream.rows.shuffle(seed=seed, buffer_size=self.buffer_size, **SHARDS))
                first = next(rows, None)
                if first is None:
                    raise DataError("the stream has no rows to train on.")
                yield first
                yield from rows

    def _seek(self, step: int) -> None:
        """Drop the rows before the previous step; where the rows of this step are gone, read again from the start."""
        if step * self.batch_size < self._first:
            self._rows, self._first = self._epochs(), 0
            self._held.clear()
        while self._first < (step - 1) * self.batch_size:
            self._row(self._first)
            self._held.popleft()
            self._first += 1

    def _row(self, number: int) -> dict:
        """Return a row that was not dropped yet, and read on to it where needed."""
        while number >= self._first + len(self._held):
            self._held.append(next(self._rows))
        return self._held[number - self._first]

    def _decode(self, step: int, part: slice) -> tuple[Tensor, Tensor | None]:
        """Decode a part of the rows of a step into images and labels; this runs in the reader thread."""
        self._seek(step)
        numbers = range(step * self.batch_size, (step + 1) * self.batch_size)[part]
        rows = [self._row(number) for number in numbers]
        return self.stream.decode(rows, map(self._row, itertools.count(numbers.stop)))

    def __call__(self, step: int, part: slice, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor | None]:
        """Return a part of the batch of optimizer step `step`: x0 in [-1, 1], (n, C, H, W), and labels (n,) or None."""
        now = self._ahead.pop((step, part.start), None) or self._reader.submit(self._decode, step, part)
        self._ahead = {key: ahead for key, ahead in self._ahead.items() if key[0] >= step}
        self._ahead[step + 1, part.start] = self._reader.submit(self._decode, step + 1, part)
        images, labels = now.result()
        x0 = to_unit_range(to_device(images, device))
        return x0, labels if labels is None else to_device(labels, device)
