"""The packages of other projects, at the version that a test names, imported from PyPI without installing them.

What they need for training only (torchvision and pytorch-fid: reading and measuring images) has empty stand-ins: the
networks and samplers that the tests compare with do not use it.
"""

import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType

import accelerate  # noqa: F401  before torchvision has its stand-in
import diffusers  # noqa: F401
import pytest

UNUSED = (
    *("torchvision", "torchvision.transforms", "torchvision.utils"),
    *("pytorch_fid", "pytorch_fid.fid_score", "pytorch_fid.inception"),
    *("mpi4py", "blobfile"),
)


class StandIn(ModuleType):
    """A package of which every name is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def unpacked(name: str, version: str, cache: Path) -> Path:
    """The folder of a package, downloaded once; the test is skipped where PyPI is out of reach."""
    folder = cache / f"{name}-{version}"
    if not folder.is_dir():
        command = [sys.executable, "-m", "pip", "download", f"{name}=={version}", "--no-deps", "-q", "-d", str(cache)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if done.returncode:
            pytest.skip(f"PyPI cannot be reached for {name} {version}: {done.stderr.strip().splitlines()[-1:]}")
        stem = f"{name.replace('-', '_')}-{version}".lower()
        (archive,) = (file for file in cache.iterdir() if file.is_file() and file.name.lower().startswith(stem))
        partial = folder.with_name(f".{folder.name}.{os.getpid()}")  # whole or not there, whoever else unpacks it
        shutil.unpack_archive(archive, partial, "zip" if archive.suffix == ".whl" else "gztar")
        if not folder.is_dir():
            partial.rename(folder)
    return next((setup.parent for setup in folder.glob("*/setup.py")), folder)


@contextmanager
def importable(folder: Path, package: str):
    """`package` from `folder`, and forgotten again: another version can be next."""
    stand_ins = {name: StandIn(name) for name in UNUSED if name not in sys.modules}
    sys.path.insert(0, str(folder))
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in [*stand_ins, *(name for name in sys.modules if name.split(".")[0] == package)]:
            sys.modules.pop(name, None)


def load(name: str, version: str, module: str, cache: Path) -> ModuleType:
    """A module of a package on PyPI."""
    with importable(unpacked(name, version, cache), module.split(".")[0]):
        return import_module(module)
