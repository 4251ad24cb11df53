"""The command that converts a checkpoint of another project to a pipeline of this package.

The names in a checkpoint tell which project it comes from: `FAMILIES` has a row for each. Files are read as plain
tensors, and none of their code runs.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ddpm_pipe.convert import ho, improved, lucidrains, stock
from ddpm_pipe.convert.config import ConvertConfig
from ddpm_pipe.convert.names import Weights
from ddpm_pipe.pretrained import DDPMPipeline
from ddpm_pipe.run.files import replace_folder
from ddpm_pipe.weights import read_tensors

FILE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
"""Suffixes of a source that must be a file and cannot be an id on the Hub."""


class Family(Protocol):
    """What the module of each project provides."""

    MARK: str
    """Pattern of a name that only a state dict of the project has."""
    ASSUMED: str
    """What a conversion assumes, because neither the file nor a flag tells it."""

    def pipeline(self, weights: Weights, loaded: Any, config: ConvertConfig) -> DDPMPipeline:
        """Make the pipeline of a state dict; `loaded` is all that its file holds."""


FAMILIES: dict[str, Family] = {
    "denoising-diffusion-pytorch": lucidrains,
    "improved-diffusion or guided-diffusion": improved,
    "DDPM's PyTorch ports": ho,
}
"""Name of a project -> its module."""

CONTAINERS = (lucidrains.saved_weights, ho.saved_weights)
"""Functions that find the weights and their average where a training script saved more than one state dict."""


def _state_dict(loaded: Any, which: str | None) -> dict[str, Tensor]:
    """Choose one set of weights from what a training script saved.

    Args:
        loaded: all that the file holds.
        which: "ema" for the average, "raw" for the weights themselves, None for the average where the file has one.

    Returns:
        The tensors of the state dict, without the prefix that training on several devices puts before each name; it is
        empty where the file holds no weights.

    Raises:
        ValueError: where the user asks for the average and the file has none.
    """
    found = (weights for container in CONTAINERS if (weights := container(loaded)) is not None)
    raw, average = next(found, (loaded, None))
    if which == "ema" and not average:
        raise ValueError("weights='ema': the file holds one set of weights only; leave weights away.")
    chosen = raw if which == "raw" or not average else average
    if not isinstance(chosen, Mapping):
        return {}
    return {str(name).removeprefix("module."): value for name, value in chosen.items() if isinstance(value, Tensor)}


def _convert_file(path: Path, config: ConvertConfig) -> tuple[str, DDPMPipeline]:
    """Recognise the project that a file comes from, and convert it.

    Returns:
        The key of `FAMILIES`, and the pipeline.

    Raises:
        ValueError: for a file that cannot be read, comes from no known project, or cannot be converted, saying why.
    """
    try:
        loaded = read_tensors(path)
    except ValueError as error:
        raise ValueError(f"source: {error}") from error
    weights = _state_dict(loaded, config.weights)
    for name, family in FAMILIES.items():
        if any(re.fullmatch(family.MARK, weight) for weight in weights):
            try:
                return name, family.pipeline(weights, loaded, config)
            except KeyError as error:
                raise ValueError(f"the checkpoint lacks the weight {error}.") from error
            except (IndexError, TypeError, RuntimeError) as error:  # tensors may lack even the usual axes
                raise ValueError(
                    f"the checkpoint has a tensor of a shape that none of {name} has ({error})."
                ) from error
    raise ValueError(f"source={config.source!r} holds no network of {', '.join(FAMILIES)}, by the names in it.")


def convert(config: ConvertConfig) -> DDPMPipeline:
    """Convert a checkpoint, write its pipeline to a new folder and print what the checkpoint was.

    Raises:
        ValueError: for an unknown file, an option that cannot be converted or a missing setting, naming it.
    """
    if not config.output_dir:
        raise ValueError("output_dir='' must name a folder.")
    out, path = Path(config.output_dir), Path(config.source)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"output_dir={config.output_dir!r} is not empty; name a new folder.")
    if path.suffix in FILE_SUFFIXES and not path.exists():
        raise ValueError(f"source={config.source!r} does not exist.")
    if path.is_file():
        family, pipeline = _convert_file(path, config)
        what = f"{family}, assumed {FAMILIES[family].ASSUMED}"
    else:
        what, pipeline = "a pipeline of diffusers", stock.pipeline(config.source)
    replace_folder(out, pipeline.save_pretrained)
    scheduler = pipeline.scheduler.config
    steps = f"{scheduler.num_train_timesteps} timesteps, {scheduler.prediction_type}"
    print(f"{out}: {type(pipeline.unet).__name__}, {steps}; converted from {what}")
    return pipeline
