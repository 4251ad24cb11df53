"""One dataclass from a YAML or JSON file and flags."""

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
import yaml
from transformers import HfArgumentParser

from ddpm_pipe.checkpoint import replace_text

T = TypeVar("T")


class JsonDict(dict):
    """A mapping that may be written as JSON on the command line."""

    def __init__(self, value: Any = ()):
        super().__init__(json.loads(value) if isinstance(value, str) else value)


def option(default: Any, help: str) -> Any:
    """A field of a config with its default and what `--help` says of it."""
    return dataclasses.field(default=default, metadata={"help": help})


_FILE_SUFFIXES = (".yaml", ".yml", ".json")


def read_config_file(path: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file.

    Raises:
        ValueError: where there is no such file or it holds no mapping.
    """
    try:
        values = yaml.safe_load(path.read_text())  # JSON is YAML
    except OSError as error:
        raise ValueError(f"config file {str(path)!r} cannot be read: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise ValueError(f"config file {str(path)!r} is not valid YAML or JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"config file {str(path)!r} must hold keys and values.")
    return values


def parse_config(config_class: Callable[..., T], argv: Sequence[str], **defaults: Any) -> T:
    """Make a config of: a file named by the first argument, then flags (which win), then `defaults`.

    Args:
        config_class: a dataclass; its fields are the keys of the file and the flags.
        argv: the command line without the program.
        defaults: values that replace the dataclass's own defaults.

    Raises:
        ValueError: for unknown keys of the file or flags, naming the accepted ones.
    """
    argv = list(argv)
    known = [field.name for field in dataclasses.fields(config_class)]  # type: ignore[arg-type]
    values = dict(defaults)
    if argv and argv[0].endswith(_FILE_SUFFIXES):
        path = Path(argv.pop(0))
        values |= read_config_file(path)
        unknown = [key for key in values if key not in known]
        if unknown:
            raise ValueError(f"{path} has unknown keys: {', '.join(unknown)}; known are {', '.join(known)}.")
    parser = HfArgumentParser(config_class, allow_abbrev=False)
    for action in parser._actions:  # a key that the file sets is no longer required as a flag
        action.required = action.required and action.dest not in values
    parser.set_defaults(**values)
    config, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    if unknown:
        raise ValueError(f"unknown arguments: {' '.join(unknown)}; known are --{', --'.join(known)}.")
    return config


def save_config(config: Any, path: Path) -> None:
    """Write a dataclass as a YAML or JSON file that `parse_config` reads back."""
    values = json.loads(json.dumps(dataclasses.asdict(config)))  # plain types only
    as_json = path.suffix == ".json"
    replace_text(path, json.dumps(values, indent=2) + "\n" if as_json else yaml.safe_dump(values, sort_keys=False))


def use_all_cores() -> None:
    """Undo that `accelerate launch`, where --cpu does not tell it of the CPU, leaves a process one thread."""
    left_one = os.environ.get("ACCELERATE_USE_CPU") == "False" and os.environ.get("OMP_NUM_THREADS") == "1"
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    if left_one and alone and not torch.accelerator.is_available():
        torch.set_num_threads(psutil.cpu_count(logical=False) or 1)


def main(function: Callable[[T], Any], config_class: Callable[..., T], **defaults: Any) -> None:
    """Run `function` on the config of the command line; bad input or a bad disk end in one sentence and exit code 2."""
    use_all_cores()
    try:
        function(parse_config(config_class, sys.argv[1:], **defaults))
    except (ValueError, OSError) as error:
        what = f"a file could not be read or written ({error})" if isinstance(error, OSError) else error
        print(f"{Path(sys.argv[0]).name}: {what}", file=sys.stderr)
        sys.exit(2)
