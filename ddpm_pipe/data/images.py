"""Decoding of image files: PIL images become uint8 arrays, then floats in [-1, 1]; undecodable files are reported.

EXIF orientation is applied; palette and CMYK images become RGB; transparent images are laid over white unless four
channels are requested; 16-bit greys and floats in [0, 1] become 8 bits; images of another size are resized and cropped
to the centre.
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
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ddpm_pipe.data.sources import DataError, reason

T = TypeVar("T")
Cell = dict[str, Any] | None
"""A cell of the image column: a dict with the "bytes" of an image file, its "path", or both."""

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Maps a number of channels to the PIL mode."""

DECODING = 2
"""Version of the decoding rules. Increase it whenever they change, so that pixels decoded by older rules are not read
from the cache."""

THREADS = min(32, (os.cpu_count() or 1) + 4)
"""Number of images decoded at once: more than there are processors, because some threads wait for a disk."""

_GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "F")
SMALL_FILE = 8192
"""Size in bytes below which image files are decoded by one thread. Compared with two threads, one thread decodes 2.5
times as many files per second at 2 KiB, and half as many at 36 KiB."""


# ---------------------------------------------------------------- decoding


def open_image(cell: Cell) -> Image.Image:
    """Open the image in a cell as an upright PIL image whose pixels are not decoded yet.

    Raises:
        ValueError: where the cell holds no image, or Pillow does not recognise the format.
    """
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
    """Open a local file, or one in a local zip file (`zip://name::archive`); return None where fsspec must open it."""
    if "://" not in path:
        return open(path, "rb")
    name, _, archive = path.removeprefix("zip://").partition("::")
    if os.path.isfile(archive):
        return _open_archive(archive, os.stat(archive).st_mtime_ns).open(name)
    return None


@lru_cache(maxsize=8)
def _open_archive(path: str, changed: int) -> zipfile.ZipFile:
    """Open a zip file once, so that its directory is not read again for each of its files.

    `changed`, the time of the last change, is part of the cache key: an archive that changed is opened anew.
    """
    return zipfile.ZipFile(path)


def to_array(image: Image.Image, channels: int, size: tuple[int, int]) -> np.ndarray:
    """Turn a PIL image of any mode and size into uint8 (channels, height, width), by the rules of the module docstring.

    Raises:
        ValueError: for floats outside [0, 1] and integers outside 16 bits, because nothing says which value is white.
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
    """Convert grey values, floats in [0, 1] or 16-bit integers, to uint8."""
    white = 1 if pixels.dtype.kind == "f" else 65535
    low, high = pixels.min(), pixels.max()
    if not (low >= 0 and high <= white):  # false for NaN too
        raise ValueError(f"its pixels, {low:g} to {high:g}, lie outside the range 0 to {white} of their type")
    return (pixels * (255 / white)).round().astype(np.uint8)


class Unreadable(NamedTuple):
    """The placeholder for an image that cannot be decoded, with the reason."""

    reason: str


def attempt(function: Callable[[Cell], T], cell: Cell) -> T | Unreadable:
    """Return `function(cell)`, or Unreadable where it raises.

    Any exception other than MemoryError is attributed to the image file.
    """
    try:
        return function(cell)
    except MemoryError:
        raise
    except Exception as error:
        return Unreadable(f"{(cell or {}).get('path') or 'no path'}: {reason(error)}")


def map_cells(function: Callable[[Cell], T], cells: list[Cell]) -> list[T | Unreadable]:
    """Apply `function` to every image cell by `attempt`, and return the results in order.

    Threads read the files, because some reads wait for a disk, and decode the large files, because PIL releases the
    interpreter's lock while it decodes. The calling thread decodes the small files, which takes less time than handing
    them to another thread.
    """
    if any(_is_on_disk(cell) for cell in cells):
        cells = list(_in_threads(_load_small, cells))
    small = [cell is None or (cell["bytes"] is not None and len(cell["bytes"]) < SMALL_FILE) for cell in cells]
    others = [cell for cell, is_small in zip(cells, small, strict=True) if not is_small]
    decoded = _in_threads(partial(attempt, function), others)
    return [attempt(function, cell) if is_small else next(decoded) for cell, is_small in zip(cells, small, strict=True)]


def _in_threads(function: Callable[[Cell], T], cells: list[Cell]) -> Iterator[T]:
    """Apply `function` to every cell in threads, which all start before the first result is read; keep the order."""
    share = 1 + len(cells) // (2 * THREADS)
    shares = [cells[i : i + share] for i in range(0, len(cells), share)]
    results = _threads(os.getpid()).map(lambda cells: [function(cell) for cell in cells], shares)
    return chain.from_iterable(results)


@lru_cache(maxsize=1)
def _threads(process: int) -> ThreadPoolExecutor:
    """Return the thread pool of a process. A forked process needs its own, since threads do not survive a fork."""
    return ThreadPoolExecutor(THREADS)


def _is_on_disk(cell: Cell) -> bool:
    return cell is not None and cell["bytes"] is None


def _load_small(cell: Cell) -> Cell:
    """Add the bytes of a small local file to its cell; return any other cell, or an unreadable one, unchanged."""
    content = attempt(_read_small, cell)
    return cell | {"bytes": content} if cell is not None and isinstance(content, bytes) else cell


def _read_small(cell: Cell) -> bytes | None:
    """Return the bytes of a local file smaller than SMALL_FILE, None for any other cell."""
    file = _open_here(cell["path"]) if cell is not None and cell["bytes"] is None else None
    if file is None:
        return None
    with file:
        content = file.read(SMALL_FILE)
    return content if len(content) < SMALL_FILE else None


class Header(NamedTuple):
    """What is known about an image before it becomes an array."""

    size: tuple[int, int]
    """height and width"""
    grey: bool


def read_header(cell: Cell) -> Header:
    """Return the header of the image in a cell, after checking that the image converts to an array.

    Raises:
        ValueError: where the image cannot be opened or converted. Pillow may raise other errors for a damaged file.
    """
    image = open_image(cell)
    to_array(image, 1, (image.height, image.width))
    return header_of(image)


def header_of(image: Image.Image) -> Header:
    return Header((image.height, image.width), image.mode in _GREY_MODES)


def first_header(cells: Iterable[Cell]) -> Header:
    """Return the header of the first image that can be decoded.

    Raises:
        ValueError: where no image can be decoded; the message says what is wrong with the first one.
    """
    why, rows = "", 0
    for cell in cells:
        header = attempt(read_header, cell)
        if not isinstance(header, Unreadable):
            return header
        why, rows = why or f"; the first is {header.reason}", rows + 1
    raise ValueError(f"it has no image that can be read in {rows} rows{why}")


def choose_size(headers: Iterable[Header], resolution: list[int] | None) -> tuple[int, int]:
    """Return height and width of the training images: `resolution` (one or two numbers), or the size all images share.

    Raises:
        DataError: for an impossible resolution, or for images of several sizes where no resolution is given.
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
    """Check that `needed` bytes of memory are free before any of them is allocated.

    Raises:
        DataError: where they are not; the message names `what`, the memory that it needs and the memory that is free.
    """
    free = psutil.virtual_memory().available
    if needed > free:
        raise DataError(f"{what} takes {gib(needed)} of memory, and {gib(free)} are free.")


def gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def choose_channels(headers: Iterable[Header], channels: int | None) -> int:
    """Return the channels of the training images: `channels` if given, or 1 if all are grey and 3 if all are coloured.

    Raises:
        DataError: where `channels` is not 1, 3 or 4, or is None and some images are grey and others coloured.
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


def describe_shape(shape: tuple[int, ...]) -> str:
    """Describe the size and channels of images of shape (C, H, W)."""
    channels, height, width = shape
    return f"{width}x{height}, {channels} channel{'s' * (channels > 1)}"


def describe_classes(names: tuple[str, ...], unused: tuple[str, ...]) -> list[str]:
    """Return a line that lists the classes, or those that a run leaves out; none where there are no classes."""
    if unused:
        names_of = f"{len(unused)} classes that this run does not use; class_conditional true trains with them"
        return [f"{names_of}: {', '.join(unused)}"]
    return [f"{len(names)} classes: {', '.join(names)}"] if names else []


def to_unit_range(images: Tensor) -> Tensor:
    """Scale uint8 pixels, 0 to 255, to float32 in [-1, 1] (DDPM, section 3.3)."""
    return images.float() / 127.5 - 1
