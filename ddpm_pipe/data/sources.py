"""Opening a dataset id, a file or a folder as a dataset with a column of images and perhaps a column of classes."""

import glob
import os
import re
import warnings
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
import torch
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from torch import Tensor

AnyDataset = Any
"""`datasets.Dataset` or `datasets.IterableDataset`."""

FILE_FORMATS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset", ".zip": "imagefolder"}
"""Maps the suffix of a file to the `datasets` loader that reads it."""


class DataError(ValueError):
    """Data cannot be read as images; the message names the data and what is wrong with them."""


def reason(error: BaseException) -> str:
    """Describe the root cause of an exception in one line without a full stop."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()).rstrip(".")
    if text and isinstance(error, ValueError | OSError):  # their messages need no type name
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn any exception of a loader into a DataError of one sentence.

    Files, archives, disks and networks raise exceptions of many types. All of them except MemoryError are attributed
    to the data that the loader reads.

    Raises:
        DataError: where the loader fails; the message names `what` and the reason.
    """
    try:
        yield
    except (DataError, MemoryError):
        raise
    except Exception as error:
        raise DataError(f"{what} could not be read: {reason(error)}.") from error


# ---------------------------------------------------------------- opening


def open_dataset(data: str, split: str = "train", streaming: bool = False) -> AnyDataset:
    """Open a local dataset or one on the Hub.

    Args:
        data: a folder or a zip file of images (class subfolders become labels); a folder of parquet files or of
            `Dataset.save_to_disk`; a parquet, arrow or tar file or a glob of such files; or the id of a dataset on the
            Hub.
        split: name of a split, or an expression of `datasets` such as "train[:10%]". A file, a glob, a saved `Dataset`
            and images without a subfolder for each split have one split, "train".
        streaming: whether to read row by row instead of as a whole.

    Raises:
        DataError: where there is nothing to read, or no such split; the message names what was looked for.
    """
    if not data:
        raise DataError("data='' names nothing; give a folder of images, a parquet or arrow file or a dataset id.")
    with explained(f"data={data!r} with split={split!r}"):
        path = Path(data).expanduser()
        if path.is_dir():
            return _open_folder(data, path, split, streaming)
        if path.is_file() and path.suffix.lower() == ".zip" and (listed := list_images(path)):
            return _open_listed(listed, split, streaming)
        loader, options = FILE_FORMATS.get(path.suffix.lower()), {"path": data}
        if path.is_file() and loader is None:
            raise DataError(f"data={data!r} is a file of an unknown kind; known are {', '.join(FILE_FORMATS)}.")
        try:
            if loader is not None:
                options = {"path": loader, "data_files": data if "://" in data else _find_files(path)}
            return datasets.load_dataset(**options, split=split, streaming=streaming)
        except (HFValidationError, HfHubHTTPError, OSError) as error:
            if path.is_file():
                raise
            raise DataError(
                f"data={data!r} is neither a file nor a folder here, nor could it be read from the Hub "
                f"({reason(error)}); give a folder of images, a parquet or arrow file or a dataset id."
            ) from error


def _find_files(path: Path) -> str:
    """Return the glob pattern of the files that a path or a glob names.

    Raises:
        FileNotFoundError: where there are no such files.
        DataError: as `_check_files` does.
    """
    pattern = glob.escape(str(path)) if path.is_file() else str(path)
    files = glob.glob(pattern, recursive=True)
    if not files:
        raise FileNotFoundError(f"there is no file {path}")
    _check_files(files)
    return pattern


def _check_files(files: Iterable[str]) -> None:
    """Refuse files that `datasets` would misread without an error.

    Raises:
        DataError: for a tar file that was cut off between two of its members, which `datasets` would read as a shorter
            one, and for a parquet file with an empty table, which it would read in batches of no rows.
    """
    for file in files:
        suffix = os.path.splitext(file)[1].lower()
        with explained(file):
            if suffix == ".tar" and not _ends_with_zeros(file):
                raise DataError(f"{file} is truncated or compressed: a tar file ends with 1024 zeros.")
            if suffix == ".parquet" and _is_empty_table(file):
                raise DataError(f"{file} has no rows; remove it, or give another file.")


def _ends_with_zeros(file: str) -> bool:
    with open(file, "rb") as handle:
        handle.seek(-min(1024, os.path.getsize(file)), os.SEEK_END)
        return handle.read() == bytes(1024)


def _is_empty_table(file: str) -> bool:
    metadata = pyarrow.parquet.read_metadata(file)
    return metadata.num_row_groups > 0 and metadata.num_rows == 0


def _open_folder(data: str, path: Path, split: str, streaming: bool) -> AnyDataset:
    """Open a split of a folder that `datasets` saved, of images, or of other files that `datasets` reads."""
    if (path / "config.yaml").is_file() and ((path / "checkpoints").is_dir() or (path / "plan.json").is_file()):
        raise DataError(f"data={data!r} is the folder of a training run; give a folder of images.")
    if saved := _load_saved(path):
        found = take_split(saved, split)
        return found.to_iterable_dataset() if streaming else found
    if listed := list_images(path):
        return _open_listed(listed, split, streaming)
    _check_files(f"{path}/{file}" for file in _walk(str(path), ""))
    if glob.has_magic(str(path.resolve())):
        raise DataError(
            f"data={data!r} is no folder of plain images, and the loader for others takes *, ? and [ in its name for "
            "wildcards; rename it."
        )
    try:
        return datasets.load_dataset(str(path), split=split, streaming=streaming)
    except FileNotFoundError as error:
        raise DataError(f"data={data!r} is a folder without images or parquet files.") from error


def _open_listed(listed: dict[str, datasets.Dataset], split: str, streaming: bool) -> AnyDataset:
    """Open a split of the images that `list_images` found."""
    found = take_split(listed, split)
    return _stream_files(found) if streaming else found


def _load_saved(path: Path) -> dict[str, datasets.Dataset]:
    """Load the splits that `save_to_disk` wrote into a folder; return an empty dict for any other folder."""
    if not (path / "dataset_dict.json").is_file() and not (path / "state.json").is_file():
        return {}
    found = datasets.load_from_disk(str(path))
    return found if isinstance(found, datasets.DatasetDict) else {"train": found}


def take_split(splits: dict[str, datasets.Dataset], split: str) -> datasets.Dataset:
    """Return the rows that a split expression of `datasets` names: "train", "train[:10%]", "train+test".

    Raises:
        ValueError: for an unknown split or a part without rows; the message names the existing splits.
    """
    sizes = {name: len(part) for name, part in splits.items()}
    named = [
        (part.splitname, range(sizes[part.splitname])[part.from_ : part.to])
        for part in datasets.ReadInstruction.from_spec(split).to_absolute(sizes)
    ]
    parts = [splits[name].select(rows) for name, rows in named if rows]
    if not parts:
        raise ValueError(f"it names no rows of {', '.join(f'{name} ({size} rows)' for name, size in sizes.items())}")
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


# ---------------------------------------------------------------- a folder or a zip file of images

_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_WORDS = {word: (split, rank) for split, words in _SPLITS.items() for rank, word in enumerate(words)}
_SPLIT_WORD = re.compile(rf"(?<![^-._ 0-9])({'|'.join(_WORDS)})(?![^-._ 0-9])")
"""Matches a word that names a split, between hyphens, dots, underscores, spaces, digits or the name's ends."""

_IMAGE_SUFFIXES = {form for suffix in ImageFolder.EXTENSIONS for form in (suffix, suffix.upper())}
_OTHER_DATA = tuple(f"/{name}" for name in ImageFolder.METADATA_FILENAMES) + tuple(FILE_FORMATS)
_DESCRIPTIONS = ("dataset_infos.json", ".huggingface.yaml")


def list_images(place: Path) -> dict[str, datasets.Dataset]:
    """List the images in a folder or a zip file.

    Splits, classes and order are those of the imagefolder loader of `datasets`, but a split by file names needs a word
    in each of them. That loader takes 1 ms of CPU time per file at every start, and finds no classes in a zip file. It
    remains responsible for the places that it reads by other rules: those with other data, metadata or a dataset
    description beside the images, and those where a name contains the words of two splits.

    Returns:
        For each split a dataset with the column "image", and "label" where each subfolder is a class. The dict is empty
        where there are no images, or the imagefolder loader is responsible.

    Raises:
        OSError: where a folder cannot be listed.
        DataError: for a file name that is not UTF-8.
    """
    place = place.resolve()
    if place.is_dir():
        files, form = sorted(_walk(str(place), "")), (f"{place}/", "")
    else:
        files, form = sorted(_zipped(place)), ("zip://", f"::{place}")
    if any(f"/{file}".endswith(_OTHER_DATA) for file in files) or _is_described(place):
        return {}
    images = [file for file in files if os.path.splitext(file)[1] in _IMAGE_SUFFIXES]
    splits = _by_split(images)
    if not splits:
        return {}
    classes = _classes(splits)
    return {split: _to_dataset(images, form, classes) for split, images in splits.items()}


def _walk(folder: str, prefix: str, above: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield the relative paths of all files in a folder, except hidden ones and those in folders named `__*`.

    Links are followed, except to one of the folders `above`, which would loop.
    """
    real = os.path.realpath(folder)
    if real in above:
        return
    for entry in os.scandir(folder):
        kind = Path(entry) if entry.is_symlink() else entry  # for a Path, a dangling link is neither file nor folder
        if entry.name.startswith("."):
            continue
        if kind.is_file():
            yield prefix + entry.name
        elif kind.is_dir() and not entry.name.startswith("__"):
            yield from _walk(entry.path, f"{prefix}{entry.name}/", (*above, real))


def _zipped(archive: Path) -> set[str]:
    """Return the paths of all files in a zip file, except those that `_walk` would leave out of a folder."""
    hidden = re.compile(r"(^|/)(\.|__[^/]*/)|/$")
    with zipfile.ZipFile(archive) as file:
        return {name for name in file.namelist() if not hidden.search(name)}


def _is_described(place: Path) -> bool:
    """Return whether a dataset card or another file in a folder tells `datasets` how to read it."""
    card = place / "README.md"
    described = any((place / name).exists() for name in _DESCRIPTIONS)
    return described or (card.is_file() and card.read_bytes().startswith(b"---"))


def _by_split(images: list[str]) -> dict[str, list[str]]:
    """Group images by split: by folder names if any of them names a split, by file names if each does, else as train.

    The imagefolder loader splits by file names as soon as one of them names a split, so that a single picture called
    training_ground.png would leave out all others. Where folders name splits, images in other folders are left out
    with a warning, since a class may be called train.

    Each split is sorted by the word that names it, in the order of _SPLITS. For each word, names that are the plain
    word come first, then those that begin with it, then those that end with it. The result is empty where a name
    contains the words of two splits, or is the name of a shard.
    """
    if any(re.match(r"data/[^/]*-\d{5}-of-\d{5}[^/]*\.", image) for image in images):
        return {}
    named = {image: _split_words(image.split("/")[:-1]) for image in images}
    if not any(named.values()):
        named = {image: _split_words(image.split("/")[-1:]) for image in images}
        if not all(named.values()):
            return {"train": images}
    if any(len(words) > 1 for words in named.values()):
        return {}
    found = defaultdict(list)
    for image, words in named.items():
        for name, word in words:
            split, rank = _WORDS[word]
            found[split].append((rank, not name.startswith(word), not name.endswith(word), image))
    others = sorted({image.split("/")[0] for image, words in named.items() if not words and "/" in image})
    if others:
        warnings.warn(f"images in {', '.join(others)} are left out, because other folders name splits", stacklevel=2)
    return {split: [image for *_, image in sorted(found[split])] for split in _SPLITS if split in found}


def _split_words(names: list[str]) -> list[tuple[str, str]]:
    """Return the words in some names that name a split, each with the name that holds it."""
    return [(name, word) for name in names for word in _SPLIT_WORD.findall(name)]


def _classes(splits: dict[str, list[str]]) -> list[str]:
    """Return the sorted names of the classes.

    There are none where images lie at several depths, or where all images of the first split lie in folders of the same
    name.
    """
    depths = {image.count("/") for images in splits.values() for image in images}
    names = {split: {_folder_name(image) for image in images} for split, images in splits.items()}
    if len(depths) > 1 or len(next(iter(names.values()))) < 2:
        return []
    return sorted(set.union(*names.values()))


def _folder_name(image: str) -> str:
    return os.path.basename(os.path.dirname(image))


def _to_dataset(images: list[str], form: tuple[str, str], classes: list[str]) -> datasets.Dataset:
    """Make a dataset of image files; where there are classes, the name of a file's folder gives its label.

    `form` holds the prefix and the suffix that turn the relative path of an image into its full path.
    """
    before, after = form
    columns: dict[str, list] = {"image": [f"{before}{image}{after}" for image in images]}
    features = datasets.Features(image=datasets.Image())
    if classes:
        number = {name: label for label, name in enumerate(classes)}
        columns["label"] = [number[_folder_name(image)] for image in images]
        features["label"] = datasets.ClassLabel(names=classes)
    try:
        return datasets.Dataset.from_dict(columns, features)
    except UnicodeEncodeError as error:
        raise DataError(f"the name of {error.object!r} is not UTF-8; rename it.") from error


def _stream_files(images: datasets.Dataset) -> datasets.IterableDataset:
    """Turn listed images into a stream that is shuffled by rows, like that of the imagefolder loader, not by tables."""
    rows = images.cast_column("image", datasets.Image(decode=False))
    return datasets.IterableDataset.from_generator(_rows, images.features, gen_kwargs={"dataset": rows})


def _rows(dataset: datasets.Dataset) -> Iterator[dict]:
    yield from dataset


# ---------------------------------------------------------------- columns


def find_image_column(dataset: AnyDataset, name: str | None = None) -> str:
    """Return the column that holds the images: `name` if given, else the only column of images.

    Raises:
        DataError: for an unknown column or one of another type, or where none or several hold images.
    """
    features = dataset.features or {}
    columns = ", ".join(features)
    if name is not None:
        if name not in features:
            raise DataError(f"image_column={name!r} is not in the data; its columns are {columns}.")
        if not _may_hold_images(features[name]):
            raise DataError(f"image_column={name!r} holds {_describe(features[name])}, not images.")
        return name
    found = [column for column, feature in features.items() if _holds_images(feature)]
    if len(found) != 1:
        what = "none of its columns holds images" if not found else f"several columns hold images: {', '.join(found)}"
        raise DataError(f"{what}; name one with image_column (columns: {columns}).")
    return found[0]


def _holds_images(feature: object) -> bool:
    """Return whether a feature holds images: an image feature, or the bytes and path that a parquet file stores."""
    return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})


def _may_hold_images(feature: object) -> bool:
    """Return whether a feature holds images, or what `datasets` can cast to images: encoded files or paths to them."""
    return _holds_images(feature) or _dtype(feature) in ("string", "large_string", "binary", "large_binary")


def _dtype(feature: object) -> str:
    """Return the type of a column of plain values, "" for any other column."""
    return feature.dtype if isinstance(feature, datasets.Value) else ""


def _describe(feature: object) -> str:
    return _dtype(feature) or type(feature).__name__


def find_label_column(dataset: AnyDataset, name: str | None = None) -> str:
    """Return the column that holds the classes: `name` if given, else the only column of class labels.

    Raises:
        DataError: for an unknown column, or where none or several hold class labels.
    """
    features = dataset.features or {}
    columns = ", ".join(features)
    if name is not None:
        if name not in features:
            raise DataError(f"label_column={name!r} is not in the data; its columns are {columns}.")
        return name
    found = _class_columns(dataset)
    if len(found) != 1:
        raise DataError(f"{len(found)} columns hold class labels; name one with label_column (columns: {columns}).")
    return next(iter(found))


def unused_classes(dataset: AnyDataset) -> tuple[str, ...]:
    """Return the names of the classes that a run without labels leaves out; () where there is no one column of them."""
    found = list(_class_columns(dataset).values())
    return tuple(found[0].names) if len(found) == 1 and found[0].num_classes > 1 else ()


def _class_columns(dataset: AnyDataset) -> dict[str, datasets.ClassLabel]:
    """Return the columns of class labels, by name."""
    features = dataset.features or {}
    return {column: feature for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)}


def read_labels(dataset: datasets.Dataset, column: str) -> tuple[Tensor, tuple[str, ...]]:
    """Return the labels, int64 (N,) from 0, and the names of the classes.

    Whole numbers and strings become classes in the order in which their strings are sorted.

    Raises:
        DataError: for a column of other values, and where a row has no label (null, or -1 in a column of class labels)
            or one that is not a class.
    """
    feature = dataset.features[column]
    with explained(f"label_column={column!r}"):
        values = dataset[column][:]
    if isinstance(feature, datasets.ClassLabel):
        names = tuple(feature.names)
    elif re.fullmatch(r"u?int\d+|bool|(large_)?string", _dtype(feature)):
        names = tuple(sorted({str(value) for value in values if value is not None}))
        number = {name: label for label, name in enumerate(names)}
        values = [None if value is None else number[str(value)] for value in values]
    else:
        raise DataError(
            f"label_column={column!r} holds {_describe(feature)}, not classes; give one of class labels, whole numbers "
            "or strings."
        )
    missing = [row for row, value in enumerate(values) if not is_label(value, names)]
    if missing:
        raise DataError(
            f"label_column={column!r} has no label of its {len(names)} classes in {len(missing)} of {len(values)} "
            f"rows, the first of them row {missing[0]} ({values[missing[0]]})."
        )
    return torch.tensor(values, dtype=torch.long), names


def is_label(value: int | None, classes: tuple[str, ...]) -> bool:
    """Return whether a value is the label of a class; `datasets` writes null or -1 for a missing label."""
    return value is not None and 0 <= value < len(classes)
