"""Images of PIL -> uint8 arrays -> [-1, 1]: what a file becomes, and what is done with one that cannot be decoded.

EXIF orientation is applied; palette and CMYK images become RGB; transparency is laid over white unless four channels
are asked for; 16-bit greys and floats in [0, 1] become 8 bits; other sizes are resized and cropped to the centre.
"""

import io
import os
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import chain
from typing import IO, Any, NamedTuple, TypeVar

import fsspec
import numpy as np
import psutil
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ddpm_pipe.sources import DataError, reason

T = TypeVar("T")
Cell = dict[str, Any] | None
"""A cell of the image column: the bytes of a file, its path, or both."""

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Number of channels -> mode of PIL."""

DECODING = 2
"""Version of the rules by which files become pixels: raise it with each change of them, so that no pixels decoded by
older rules are found in the cache."""

THREADS = min(32, (os.cpu_count() or 1) + 4)
"""Images decoded at a time; more than processors, for some threads wait for a disk."""

_GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "F")
SMALL_FILE = 8192
"""Bytes of an image file below which one thread decodes more of them than two: 2.5 times as many where they have 2 KiB,
half as many where they have 36 KiB."""


# ---------------------------------------------------------------- decoding


def open_image(cell: Cell) -> Image.Image:
    """A PIL image, upright, from the bytes or the path in a cell of the image column, not decoded yet."""
    if cell is None or (cell["bytes"] is None and cell["path"] is None):
        raise ValueError("there is no image")
    source = io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"]
    if isinstance(source, str) and "://" in source:
        with _open_here(source) or fsspec.open(source) as file:
            source = io.BytesIO(file.read())
    try:
        image = Image.open(source)
    except UnidentifiedImageError:
        raise ValueError("Pillow knows no image format like it") from None
    ImageOps.exif_transpose(image, in_place=True)
    return image


def _open_here(path: str) -> IO[bytes] | None:
    """A file of this machine, or one in a zip file of it, `zip://name::archive`; None for others, as fsspec opens."""
    if "://" not in path:
        return open(path, "rb")
    name, _, archive = path.removeprefix("zip://").partition("::")
    if os.path.isfile(archive):
        return _open_archive(archive, os.stat(archive).st_mtime_ns).open(name)
    return None


@lru_cache(maxsize=8)
def _open_archive(path: str, changed: int) -> zipfile.ZipFile:
    """A zip file, its directory read once and not for each of its files; `changed` is when it last was."""
    return zipfile.ZipFile(path)


def to_array(image: Image.Image, channels: int, size: tuple[int, int]) -> np.ndarray:
    """A PIL image of any mode and size -> uint8 (channels, height, width), by the rules in the head of this module.

    Raises:
        ValueError: for floats outside [0, 1] and integers outside 16 bits, whose white nothing tells.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_to_8_bits(np.asarray(image)))
    elif channels != 4 and image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert(MODES[channels])
    height, width = size
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)


def _to_8_bits(pixels: np.ndarray) -> np.ndarray:
    """Greys of floats in [0, 1] or of 16-bit integers -> uint8."""
    white = 1 if pixels.dtype.kind == "f" else 65535
    low, high = pixels.min(), pixels.max()
    if not (low >= 0 and high <= white):  # false for NaN too
        raise ValueError(f"its pixels, {low:g} to {high:g}, lie outside the range 0 to {white} of their type")
    return (pixels * (255 / white)).round().astype(np.uint8)


class Unreadable(NamedTuple):
    """What stands for an image that cannot be decoded."""

    reason: str


def attempt(function: Callable[[Cell], T], cell: Cell) -> T | Unreadable:
    """`function` of an image cell; whatever a decoder raises, but for a lack of memory, is the fault of its file."""
    try:
        return function(cell)
    except MemoryError:
        raise
    except Exception as error:
        return Unreadable(f"{(cell or {}).get('path') or 'no path'}: {reason(error)}")


def map_cells(function: Callable[[Cell], T], cells: list[Cell]) -> list[T | Unreadable]:
    """`attempt` of every image cell, in order.

    Threads read the files, for some wait for a disk, and decode the large ones, which PIL does outside the
    interpreter's lock. Small ones are decoded by this thread, in less time than it takes to hand them over.
    """
    if any(_is_on_disk(cell) for cell in cells):
        cells = list(_in_threads(_load_small, cells))
    small = [cell is None or (cell["bytes"] is not None and len(cell["bytes"]) < SMALL_FILE) for cell in cells]
    others = [cell for cell, is_small in zip(cells, small, strict=True) if not is_small]
    decoded = _in_threads(partial(attempt, function), others)
    return [attempt(function, cell) if is_small else next(decoded) for cell, is_small in zip(cells, small, strict=True)]


def _in_threads(function: Callable[[Cell], T], cells: list[Cell]) -> Iterator[T]:
    """`function` of every cell, in order, begun for all of them before the first result is taken."""
    share = 1 + len(cells) // (2 * THREADS)
    shares = [cells[i : i + share] for i in range(0, len(cells), share)]
    results = _threads(os.getpid()).map(lambda cells: [function(cell) for cell in cells], shares)
    return chain.from_iterable(results)


@lru_cache(maxsize=1)
def _threads(process: int) -> ThreadPoolExecutor:
    """The threads of a process; one that was forked has none of its parent's."""
    return ThreadPoolExecutor(THREADS)


def _is_on_disk(cell: Cell) -> bool:
    return cell is not None and cell["bytes"] is None


def _load_small(cell: Cell) -> Cell:
    """A cell with the bytes of its file where that is small; one that cannot be read is left as it is."""
    content = attempt(_read_small, cell)
    return cell | {"bytes": content} if cell is not None and isinstance(content, bytes) else cell


def _read_small(cell: Cell) -> bytes | None:
    """The bytes of a small file of this machine."""
    file = _open_here(cell["path"]) if cell is not None and cell["bytes"] is None else None
    if file is None:
        return None
    with file:
        content = file.read(SMALL_FILE)
    return content if len(content) < SMALL_FILE else None


class Header(NamedTuple):
    """What an image is before it becomes an array."""

    size: tuple[int, int]
    """height and width"""
    grey: bool


def read_header(cell: Cell) -> Header:
    """The header of the image in a cell, if it can become an array too."""
    image = open_image(cell)
    to_array(image, 1, (image.height, image.width))
    return header_of(image)


def header_of(image: Image.Image) -> Header:
    return Header((image.height, image.width), image.mode in _GREY_MODES)


def first_header(cells: Iterable[Cell]) -> Header:
    """The header of the first image that can be decoded.

    Raises:
        ValueError: where there is none, saying what is wrong with the first.
    """
    why, rows = "", 0
    for cell in cells:
        header = attempt(read_header, cell)
        if not isinstance(header, Unreadable):
            return header
        why, rows = why or f"; the first is {header.reason}", rows + 1
    raise ValueError(f"it has no image that can be read in {rows} rows{why}")


def choose_size(headers: Iterable[Header], resolution: list[int] | None) -> tuple[int, int]:
    """Height and width of the training images: `resolution` (one number or two), else the one size that all have.

    Raises:
        DataError: for an impossible resolution, or mixed sizes without one.
    """
    if resolution is not None:
        if len(resolution) not in (1, 2) or min(resolution) < 1:
            raise DataError(f"resolution={resolution} must be one size or a height and a width, each at least 1.")
        height, width = resolution[0], resolution[-1]
        needed = 8 * height * width * THREADS  # PIL takes 4 bytes for a pixel, and resizes one axis after the other
        check_memory(needed, f"resolution={resolution}: decoding images of {width}x{height}, {THREADS} at a time,")
        return height, width
    sizes = Counter(header.size for header in headers)
    if len(sizes) > 1:
        common = ", ".join(f"{width}x{height} ({count})" for (height, width), count in sizes.most_common(3))
        raise DataError(f"the images have {len(sizes)} different sizes: {common}, ...; choose one with resolution.")
    return next(iter(sizes))


def check_memory(needed: int, what: str) -> None:
    """Refuse, before any of it is taken, what takes more memory than there is.

    Raises:
        DataError: naming `what`, the bytes it needs and those that are free.
    """
    free = psutil.virtual_memory().available
    if needed > free:
        raise DataError(f"{what} takes {gib(needed)} of memory, and {gib(free)} are free.")


def gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def choose_channels(headers: Iterable[Header], channels: int | None) -> int:
    """Channels of the training images: as asked, else 1 where all are grey and 3 where all are coloured.

    Raises:
        DataError: for a number that is not 1, 3 or 4, or grey and coloured images mixed without one.
    """
    if channels is not None:
        if channels not in MODES:
            raise DataError(f"channels={channels} must be 1 (grey), 3 (RGB) or 4 (RGBA).")
        return channels
    grey = Counter(header.grey for header in headers)
    if len(grey) > 1:
        raise DataError(
            f"{grey[True]} images are grey and {grey[False]} are coloured; choose channels=1 or channels=3."
        )
    return 1 if grey[True] else 3


# ---------------------------------------------------------------- pixels as numbers


def flip_some(images: Tensor, draws: Tensor) -> Tensor:
    """Mirror the images (n, C, H, W) whose draw from [0, 1) is below 1/2."""
    mirrored = (draws < 0.5).to(images.device, non_blocking=True)
    return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)


def to_unit_range(images: Tensor) -> Tensor:
    """uint8 pixels 0 to 255 -> float32 in [-1, 1] (DDPM, section 3.3)."""
    return images.float() / 127.5 - 1
