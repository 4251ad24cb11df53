"""onnxruntime-web, the JavaScript and WebAssembly that run a network in a browser: fetched, checked and copied."""

import base64
import hashlib
import os
import shutil
import tarfile
import urllib.request
from http.client import HTTPException
from importlib.resources import files
from pathlib import Path

from huggingface_hub import cached_assets_path

from ddpm_pipe.run.files import whole_file

VERSION = "1.30.0"
PACKAGE = f"onnxruntime-web-{VERSION}.tgz"
SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
"""The `dist.integrity` of the package in the npm registry, in base64."""

REGISTRY = "https://registry.npmjs.org/"
"""The npm registry, unless npm's own variable npm_config_registry names another one."""

NEEDED = (
    *("ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify.mjs", "ort-wasm-simd-threaded.asyncify.wasm"),
    *("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"),
)
"""The files that a browser loads: three where it has WebGPU, and three where it has not."""

FOLDER = "onnxruntime-web"
"""Where they lie beside the page."""

LICENCES = ("LICENSE", "ThirdPartyNotices.txt")
"""The npm package contains no licence file. These are of the same project's Python package, which an export needs."""


def fetch(given: Path | None = None) -> Path:
    """Return the npm package: the file that is given, or that in the cache of the Hugging Face libraries.

    Where the cache lacks it, it is fetched from the npm registry.

    Raises:
        ValueError: where the package cannot be fetched, or is not the pinned one.
    """
    if given is not None:
        if not given.is_file() or _sha512(given) != SHA512:
            raise ValueError(f"runtime={str(given)!r} is not the npm package {PACKAGE}, by its checksum.")
        return given
    cached = cached_assets_path("ddpm_pipe", namespace="npm") / PACKAGE
    if not cached.is_file():
        registry = os.environ.get("npm_config_registry", REGISTRY)  # noqa: SIM112, npm's own spelling
        address = f"{registry.rstrip('/')}/onnxruntime-web/-/{PACKAGE}"
        print(f"fetching {address} (33 MB)")
        with whole_file(cached) as new:
            _download(address, new)
    return cached


def _download(address: str, file: Path) -> None:
    """Download the package; raise ValueError where that fails or it is another one."""
    try:
        with urllib.request.urlopen(address, timeout=60) as response, file.open("wb") as opened:
            shutil.copyfileobj(response, opened)
    except (OSError, ValueError, HTTPException) as error:
        raise ValueError(
            f"{address} could not be fetched ({error}); run `npm pack onnxruntime-web@{VERSION}` where npm works and "
            "give the file as --runtime."
        ) from error
    if _sha512(file) != SHA512:
        raise ValueError(f"{address} does not have the checksum of {PACKAGE}, so it is not used.")


def unpack(package: Path, folder: Path) -> None:
    """Write the files that a browser loads, and their licence, into a new folder."""
    folder.mkdir()
    with tarfile.open(package) as archive:
        for name in NEEDED:
            member = archive.extractfile(f"package/dist/{name}")
            assert member is not None, name
            with member, (folder / name).open("wb") as file:
                shutil.copyfileobj(member, file)
    for name in LICENCES:
        (folder / name).write_bytes((files("onnxruntime") / name).read_bytes())


def _sha512(file: Path) -> str:
    with file.open("rb") as opened:
        return base64.b64encode(hashlib.file_digest(opened, "sha512").digest()).decode()
