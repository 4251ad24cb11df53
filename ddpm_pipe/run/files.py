"""Write files and folders whole or not at all, and compare their checksums when they are read."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from filelock import FileLock, Timeout
from torch import Tensor

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"


class CheckpointError(ValueError):
    """A checkpoint could not be written or read; the message says what is still intact."""


def sync(path: Path) -> None:
    """Flush a file or folder to the disk, so that it survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to; its file replaces `path` once the block ends without an error."""
    new = path.with_name(f".{path.name}.new")
    try:
        yield new
        sync(new)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, others: str) -> Iterator[None]:
    """Hold a lock file. Where another process holds it, log `others`, which says what that process does, and wait.

    Raises:
        OSError: where the lock file cannot be written.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("%s; this one waits for it.", others)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def replace_text(path: Path, text: str) -> None:
    """Write a text file whole, or leave it as it was."""
    with whole_file(path) as new:
        new.write_text(text)


def replace_folder(folder: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a new folder, then put the new one in the place of `folder`.

    Raises:
        CheckpointError: where the new folder cannot be written, as on a full disk; `folder` is then as it was.
    """
    new, old = _beside(folder)
    try:
        _settle(folder)
        new.mkdir(parents=True)
        write(new)
        for path in new.rglob("*"):
            sync(path)
        sync(new)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        sync(folder.parent)
        _settle(folder)
    except (OSError, safetensors.SafetensorError, RuntimeError) as error:
        with suppress(OSError):  # the next write settles it then
            _settle(folder)
        raise CheckpointError(f"{folder} could not be written ({error}); what was saved before is intact.") from error


def _beside(folder: Path) -> tuple[Path, Path]:
    """Return where the next and the last version of a folder lie during an exchange; the last one is always whole."""
    return folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")


def _settle(folder: Path) -> None:
    """Finish an exchange of folders, also one that was interrupted.

    Where the next version did not take its place, the last version goes back there. Otherwise the last version is
    deleted, under the name of the next one, since a folder of that name need not be whole.
    """
    new, old = _beside(folder)
    shutil.rmtree(new, ignore_errors=True)
    if old.exists():
        old.rename(new if folder.exists() else folder)
        shutil.rmtree(new, ignore_errors=True)


def save_tensors(folder: Path, weights: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write state dicts as `<name>.safetensors` files of a folder."""
    for name, tensors in weights.items():
        whole = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
        safetensors.torch.save_file(whole, folder / f"{name}.safetensors")


def shapes(weights: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Return the names and shapes of a state dict, which tell of which network it is."""
    return {name: tensor.shape for name, tensor in weights.items()}


def write_manifest(folder: Path, step: int) -> None:
    """Write the step and the SHA-256 sums of all files of a folder into its manifest."""
    sums = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps({"step": step, "sha256": sums}, indent=2))


def check_manifest(folder: Path) -> None:
    """Compare the files of a folder with its manifest.

    Raises:
        CheckpointError: where a file or the manifest is missing or damaged.
    """
    try:
        sums = json.loads((folder / MANIFEST).read_text())["sha256"]
        changed = [name for name, expected in sums.items() if sha256(folder / name) != expected]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder} is not whole ({error!r}).") from error
    if changed:
        raise CheckpointError(f"{', '.join(changed)} in {folder} is not what its checksum says.")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
