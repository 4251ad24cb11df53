"""The files of a pipeline folder: what they are called, and how a network is read from them.

Reading runs no code of a file: JSON and safetensors hold none, and from pickles only tensors and plain values are read.
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin, UNet2DModel
from safetensors.torch import load_file
from torch import Tensor

from ddpm_pipe.run.files import sha256
from ddpm_pipe.unet import CODE_FILE

STEM = "diffusion_pytorch_model"
"""How diffusers names the files of a network's weights."""

LEGACY_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names in UNet2DModels that were saved in 2022, such as google/ddpm-* -> the names that diffusers uses since then."""

CODE = {"unet": CODE_FILE, "scheduler": "ddpm_schedulers", "pipeline": "ddpm_pipeline"}
"""Names of the code files, without suffix. diffusers looks for `<component>/<name>.py`, and at the root for the
pipeline's."""

SAMPLERS_FILE = "samplers.json"
"""The file of the samplers that were found for the weights; diffusers does not read it."""

CONFIGS = ["model_index.json", "scheduler/scheduler_config.json", "unet/config.json", SAMPLERS_FILE]
WEIGHTS = [f"unet/{STEM}*.safetensors", f"unet/{STEM}*.safetensors.index*.json"]
CODE_FILES = [f"{name}.py" if part == "pipeline" else f"{part}/{name}.py" for part, name in CODE.items()]
"""These three lists are patterns of all files that `save_pretrained` writes into a pipeline folder."""

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        ValueError: where the file is missing or holds no JSON object, naming it.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{file} is missing.") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} must hold a JSON object, not {type(value).__name__}.")
    return value


def read_tensors(file: Path) -> Any:
    """Return what a safetensors file or a pickle holds: tensors on the CPU, numbers, strings and containers.

    Raises:
        ValueError: for a file that is damaged, or a pickle that holds anything else, naming the file.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged file can make its reader raise anything
        if file.suffix == ".safetensors":
            raise ValueError(f"{file} is no safetensors file, or is damaged ({error}).") from error
        raise ValueError(
            f"{file} is not read: torch.load(weights_only=True) refuses a file that is damaged or holds more than "
            "tensors and plain values, whose code could do anything."
        ) from error


def from_config(cls: type, file: Path) -> Any:
    """Make a scheduler, or a network whose weights are on the meta device, from the config in a JSON file.

    Raises:
        ValueError: for a file that holds no config, or values that the class does not take, naming the file.
    """
    config = read_json(file)
    if not isinstance(config.get("_class_name", ""), str):
        raise ValueError(f"{file} has the _class_name {config['_class_name']!r}, which is no name.")
    try:
        with init_empty_weights():
            return cls.from_config(config)  # type: ignore[attr-defined]
    except Exception as error:  # values of the wrong kind can make the class raise anything
        reason = " ".join(str(error).split()).removesuffix(".")
        raise ValueError(f"{file} makes no {cls.__name__}: {reason}.") from error


def weight_files(folder: Path, variant: str | None = None, suffix: str = "safetensors") -> list[Path]:
    """Return the files of a network's weights: one, or the shards that an index names; none where there are no weights.

    Raises:
        ValueError: for an invalid index, or one that names anything but files beside it.
    """
    dotted = f".{variant}" if variant else ""
    index, whole = folder / f"{STEM}.{suffix}.index{dotted}.json", folder / f"{STEM}{dotted}.{suffix}"
    if not index.is_file():
        return [whole] if whole.is_file() else []
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{index} has no weight_map of weights and their files.")
    beside = {path.name for path in folder.iterdir()}
    for name in shards.values():
        if not isinstance(name, str) or name not in beside or not name.endswith(f".{suffix}"):
            raise ValueError(f"{index} names {name!r}, which is no {suffix} file beside it.")
    return [folder / name for name in sorted(set(shards.values()))]


def part_folder(pipeline: Path, name: str) -> Path:
    """Return the folder of a part of a pipeline: its own or, as in google/ddpm-*, that of the pipeline itself."""
    return pipeline / name if (pipeline / name).is_dir() else pipeline


def saved_variants(names: Iterable[str]) -> set[str | None]:
    """Return the variants, such as "fp16", whose weights are among files of these names; None is that without name."""
    saved = rf"{STEM}(?:\.([^.]+))?\.safetensors|{STEM}\.safetensors\.index(?:\.([^.]+))?\.json"
    return {match[1] or match[2] for name in names if (match := re.fullmatch(saved, name))}


def why_none(source: str, names: Collection[str], variant: str | None) -> str:
    """Return a sentence that says why `weight_files` found none in a folder with files of these names."""
    there = {variant or "" for variant in saved_variants(names)}
    if there:
        wanted, *others = (f"of variant={name!r}" if name else "without variant" for name in (variant, *sorted(there)))
        return f"{source} has no weights {wanted}, only those {' and '.join(others)}."
    folder, _, part = source.rpartition("/")
    if any(name.endswith(PICKLES) for name in names):
        return (
            f"{folder} has no {part}/{STEM}.safetensors but pickled weights, which can run code and are not loaded: "
            "ddpm-pipe convert makes safetensors of them."
        )
    return f"{folder} has no weights: {part}/{STEM}.safetensors is missing."


def _listed(names: Collection[str]) -> str:
    """Return names for a sentence, of many only the first."""
    shown = ", ".join(map(repr, sorted(names)[:5]))
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def fill(
    network: ModelMixin, weights: Mapping[str, Tensor], source: str, dtype: torch.dtype = torch.float32
) -> ModelMixin:
    """Put copies of `weights` into `network` and return it in eval mode.

    Args:
        network: a network, whose own weights may be on the meta device.
        weights: name -> tensor.
        source: what an error message calls the weights.
        dtype: the precision of the copies.

    Raises:
        ValueError: for weights that are missing, left over, of another shape or not finite, naming them.
    """
    expected = network.state_dict()
    missing, unexpected = expected.keys() - weights.keys(), weights.keys() - expected.keys()
    if missing:
        raise ValueError(f"{source} lacks the weights {_listed(missing)} of {type(network).__name__}.")
    if unexpected:
        raise ValueError(f"{source} has a part that {type(network).__name__} cannot express, {_listed(unexpected)}.")
    copies = {}
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            shapes = f"{tuple(tensor.shape)} where the network can only express {tuple(expected[name].shape)}"
            raise ValueError(f"the weight {name!r} of {source} is {shapes}.")
        if not tensor.is_floating_point():
            raise ValueError(f"the weight {name!r} of {source} has {tensor.dtype}, which is no floating-point number.")
        copies[name] = tensor.to(dtype, copy=True)
        if not torch.stack(copies[name].aminmax()).isfinite().all():
            raise ValueError(f"the weight {name!r} of {source} has NaN or infinite entries in {dtype}.")
    network.load_state_dict(copies, assign=True)
    return network.eval()


def load_network(
    cls: type[ModelMixin],
    folder: Path,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
    suffix: str = "safetensors",
) -> ModelMixin:
    """Load a network from its folder, on the CPU and in eval mode.

    Args:
        cls: class of the network.
        folder: folder of config.json and the weights.
        variant: which of several saved sets of weights to load, such as "fp16".
        dtype: precision of the loaded weights.
        suffix: suffix of the weight files, "safetensors" or "bin".

    Raises:
        ValueError: for files that are missing or damaged, or weights that are not those of the network, naming them.
    """
    network = from_config(cls, folder / cls.config_name)
    files = weight_files(folder, variant, suffix)
    if not files:
        raise ValueError(why_none(str(folder), [path.name for path in folder.iterdir()], variant))
    weights: dict[str, Tensor] = {}
    for file in files:
        loaded = read_tensors(file)
        if not (isinstance(loaded, dict) and all(isinstance(entry, Tensor) for entry in loaded.values())):
            raise ValueError(f"{file} holds no weights by name.")
        weights |= loaded
    if cls is UNet2DModel:
        legacy = re.compile(rf"(\.attentions\.\d+\.)({'|'.join(LEGACY_ATTENTION)})(?=\.)")
        weights = {legacy.sub(lambda m: m[1] + LEGACY_ATTENTION[m[2]], name): weights[name] for name in weights}
    return fill(network, weights, str(folder), dtype)


def weights_sha256(pipeline: Path) -> dict[str, str]:
    """Return the checksums of the weight files in a pipeline folder, by name; they tell one model from another."""
    return {path.name: sha256(path) for path in sorted(part_folder(pipeline, "unet").glob("*.safetensors"))}
