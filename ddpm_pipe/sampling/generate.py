"""Draw many images of one model into a folder.

Each image depends on its seed alone, and an interrupted call resumes where it stopped: it cuts the seeds whose images
are missing into parts and deals these to the processes. Every file is written under a temporary name and then renamed,
so a file that exists is whole, and its images are never drawn again.
"""

import io
import json
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import PartialState
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ddpm_pipe.launch import processes
from ddpm_pipe.pretrained import DDPMPipeline
from ddpm_pipe.run.files import replace_text, whole_file
from ddpm_pipe.sampling.config import GenerateConfig, parse_seeds
from ddpm_pipe.sampling.protocol import (
    Batch,
    label_cycle,
    pipeline_for,
    protocol,
    sample_images,
    try_out,
)

GENERATION = "generation.json"
"""File that holds the protocol of a folder of images; it is written before the first image."""

NOT_COMPARED = ("model", "guide", "revision", "seeds", "versions")
"""Entries of a protocol that may change when `generate` adds to a folder; checksums, not names, tell the weights."""


# ---------------------------------------------------------------- files, which are written whole or not at all


def _named_png(seed: int, image: Tensor) -> tuple[str, bytes]:
    """Return the file name and the PNG bytes of an image, uint8 (C, H, W)."""
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy()).save(buffer, "png")
    return f"{seed:06d}.png", buffer.getvalue()


def _shard(folder: Path, seeds: list[int], suffix: str) -> Path:
    return folder / f"{seeds[0]:06d}-{seeds[-1]:06d}.{suffix}"  # no two shards have the same first seed


def _write_png(folder: Path, seeds: list[int], batches: Iterable[Batch], classes: int) -> None:
    for drawn, images, _ in batches:
        for seed, image in zip(drawn, images, strict=True):
            name, png = _named_png(seed, image)
            with whole_file(folder / name) as new:
                new.write_bytes(png)


def _write_zip(folder: Path, seeds: list[int], batches: Iterable[Batch], classes: int) -> None:
    with whole_file(_shard(folder, seeds, "zip")) as new, zipfile.ZipFile(new, "w") as archive:
        for drawn, images, _ in batches:
            for seed, image in zip(drawn, images, strict=True):
                name, png = _named_png(seed, image)
                archive.writestr(zipfile.ZipInfo(name), png)  # has no date: the same images give the same file


def _write_parquet(folder: Path, seeds: list[int], batches: Iterable[Batch], classes: int) -> None:
    """Write the columns image, seed and, if there are classes, label, with the types that `datasets` reads."""
    features = datasets.Features({"image": datasets.Image(), "seed": datasets.Value("int64")})
    if classes:
        features["label"] = datasets.ClassLabel(classes)
    rows: list[dict[str, Any]] = []
    for drawn, images, labels in batches:
        for i, seed in enumerate(drawn):
            name, png = _named_png(seed, images[i])
            rows.append({"image": {"bytes": png, "path": name}, "seed": seed, "label": labels and labels[i]})
    with whole_file(_shard(folder, seeds, "parquet")) as new:
        pq.write_table(pa.Table.from_pylist(rows, schema=features.arrow_schema), new)


PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
"""The last bytes of every PNG file."""


def _png_seeds(file: Path) -> list[int]:
    with file.open("rb") as png:
        png.seek(max(0, file.stat().st_size - len(PNG_END)))
        if png.read() != PNG_END:
            raise ValueError("its end is missing")
    return [int(file.stem)]


def _zip_seeds(file: Path) -> list[int]:
    with zipfile.ZipFile(file) as archive:
        return [int(Path(name).stem) for name in archive.namelist()]


def _parquet_seeds(file: Path) -> list[int]:
    return pq.read_table(file, columns=["seed"])["seed"].to_pylist()


class Format(NamedTuple):
    """How images are stored in files of one format."""

    pattern: str
    """a regular expression that the file names match"""
    seeds: Callable[[Path], list[int]]
    """returns the seeds of the images in a file"""
    write: Callable[[Path, list[int], Iterable[Batch], int], None]
    """writes images to a folder, given their seeds, the batches that draw them when read, and the number of classes"""
    sharded: bool
    """whether a file holds many images"""


FORMATS = {
    "png": Format(r"\d{6,}\.png", _png_seeds, _write_png, sharded=False),
    "zip": Format(r"\d{6,}-\d{6,}\.zip", _zip_seeds, _write_zip, sharded=True),
    "parquet": Format(r"\d{6,}-\d{6,}\.parquet", _parquet_seeds, _write_parquet, sharded=True),
}


def seeds_in(folder: Path, output_format: str) -> set[int]:
    """Return the seeds of the images that a folder holds in this format.

    Raises:
        ValueError: where a file cannot be read; the message names it.
    """
    row = FORMATS[output_format]
    seeds: set[int] = set()
    for file in folder.iterdir():
        if re.fullmatch(row.pattern, file.name):
            try:
                seeds.update(row.seeds(file))
            except (OSError, zipfile.BadZipFile, pa.ArrowException, KeyError, ValueError) as error:
                reason = " ".join(str(error).split()).rstrip(".")
                raise ValueError(f"{file} is damaged ({reason}); delete it, and its images are drawn again.") from error
    return seeds


# ---------------------------------------------------------------- the folder


def generate(config: GenerateConfig) -> Path:
    """Draw the images that the folder does not hold yet, on all processes.

    Returns:
        The folder, once all images are in it.

    Raises:
        ValueError: where the config cannot work, or the folder holds images of another model or of other settings.
    """
    state = processes()
    with state.main_process_first():  # the main process downloads the model, and the others read its cache
        pipeline = pipeline_for(config).to(state.device)
    try_out(config, pipeline)
    folder = Path(config.output_dir)
    if state.is_main_process:
        kept = {"output_format": config.output_format, "seeds": config.seeds}
        open_folder(folder, protocol(config, pipeline) | kept)
    state.wait_for_everyone()
    held, seeds = seeds_in(folder, config.output_format), parse_seeds(config.seeds)
    state.wait_for_everyone()  # no process writes before all have listed the folder
    missing = [seed for seed in seeds if seed not in held]
    state.print(f"{len(seeds)} images in {folder}, of which {len(missing)} are missing and drawn now")
    size = config.shard_size if FORMATS[config.output_format].sharded else config.batch_size
    parts = [missing[start : start + size] for start in range(0, len(missing), size)]
    with state.split_between_processes(parts) as share:
        draw(config, pipeline, folder, share, state)
    state.wait_for_everyone()
    return folder


def open_folder(folder: Path, new: dict[str, Any]) -> None:
    """Create the folder, or delete the half-written files that a kill left in it, and write the protocol into it.

    Raises:
        ValueError: where the folder cannot be written, or holds images of another protocol or of seeds that `new` does
            not include.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            if any(re.fullmatch(rf"\.{row.pattern}\.new", path.name) for row in FORMATS.values()):
                path.unlink()
        begun = any(seeds_in(folder, output_format) for output_format in FORMATS)
        earlier = check_continuation(folder, new) if begun else []
        versions = [*(each for each in earlier if each != new["versions"]), new["versions"]]
        replace_text(folder / GENERATION, json.dumps(new | {"versions": versions}, indent=2) + "\n")
    except OSError as error:
        raise ValueError(f"output_dir={str(folder)!r} cannot be written: {error.strerror}.") from error


def check_continuation(folder: Path, new: dict[str, Any]) -> list[dict[str, str]]:
    """Check that the images in a folder belong to the protocol `new`, and return the versions that drew them.

    Raises:
        ValueError: where they do not; the message names what differs.
    """
    if not (folder / GENERATION).exists():
        raise ValueError(f"output_dir={str(folder)!r} holds images but no {GENERATION}; choose another folder.")
    try:
        old = json.loads((folder / GENERATION).read_text(), parse_constant=str)  # as `protocol` stores it
        versions, old_seeds = old["versions"], set(parse_seeds(str(old["seeds"])))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / GENERATION} is damaged ({error}); choose another folder.") from error
    before, after = _flat(old), _flat(new)
    for key in before | after:
        if key.split(".")[0] not in NOT_COMPARED and before.get(key) != after.get(key):
            raise ValueError(
                f"output_dir={str(folder)!r} holds images of {key}={before.get(key)!r}, not {after.get(key)!r}; "
                "choose another folder, or the same settings."
            )
    if not old_seeds <= set(parse_seeds(new["seeds"])):
        raise ValueError(
            f"output_dir={str(folder)!r} holds images of seeds={old['seeds']!r}, which are not all in {new['seeds']!r};"
            " choose another folder, or seeds that include them."
        )
    return versions


def _flat(entries: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a nested mapping; dots join the keys of its levels."""
    flat: dict[str, Any] = {}
    for key, value in entries.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def draw(
    config: GenerateConfig, pipeline: DDPMPipeline, folder: Path, parts: list[list[int]], state: PartialState
) -> None:
    """Draw and write the parts of this process; the main process also shows the progress of its own parts."""
    cycle = label_cycle(pipeline.unet, config.class_labels)
    classes = 0 if cycle is None else len(label_cycle(pipeline.unet, "balanced") or ())
    whose = "images" if state.num_processes == 1 else f"images of the first of {state.num_processes} processes"
    layout = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]"
    total = sum(map(len, parts))
    with tqdm(total=total, desc=whose, unit=" images", bar_format=layout, disable=not state.is_main_process) as bar:

        def counted(batches: Iterator[Batch]) -> Iterator[Batch]:
            for batch in batches:
                yield batch
                bar.update(len(batch[0]))

        for seeds in parts:
            batches = counted(sample_images(pipeline, seeds, config.batch_size, **config.call_options()))
            FORMATS[config.output_format].write(folder, seeds, batches, classes)
