"""One dataclass from a YAML or JSON file and flags, its values checked against its annotations."""

import dataclasses
import json
import math
import operator
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import psutil
import torch
import yaml
from accelerate.utils import str_to_bool
from transformers import HfArgumentParser

from ddpm_pipe.run.files import replace_text

# ---------------------------------------------------------------- types


class JsonDict(dict):
    """A mapping that may be written as JSON on the command line."""


def _to_text(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # YAML reads the digits of a seed or a commit as a number
    return str(Path(value)) if isinstance(value, os.PathLike) else _same(str, value)


def _to_int(value: Any) -> int:
    return int(value) if isinstance(value, str) else operator.index(_no_bool(value))


def _to_float(value: Any) -> float:
    number = float(_no_bool(value))
    if not math.isfinite(number):
        raise ValueError
    return number


def _to_bool(value: Any) -> bool:
    return bool(str_to_bool(value)) if isinstance(value, str) else _same(bool, value)


def _to_mapping(value: Any) -> JsonDict:
    return JsonDict(_same(Mapping, json.loads(value) if isinstance(value, str) else value))


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise TypeError
    return value


def _same(kind: Any, value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError
    return value


KINDS: dict[Any, tuple[str, Callable[[Any], Any]]] = {
    str: ("a text", _to_text),
    int: ("a whole number", _to_int),
    float: ("a finite number", _to_float),
    bool: ("true or false", _to_bool),
    JsonDict: ("a mapping, on the command line as JSON", _to_mapping),
    NoneType: ("null", lambda value: _same(NoneType, value)),
}
"""Type in an annotation -> how it is called, and what makes a value one or raises TypeError or ValueError."""


def typed(name: str, value: Any, kind: Any) -> Any:
    """`value` as the type that an annotation asks for: flags are texts, and a single value may stand for a list.

    Args:
        name: what the value is of, for the sentence.
        kind: a key of `KINDS`, a list, tuple or union of them, or a type that is not checked.

    Raises:
        ValueError: where it is of another type, naming the accepted one.
    """
    try:
        return _convert(value, kind)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name}={value!r:.100} must be {_describe(kind)}.") from error


def _convert(value: Any, kind: Any) -> Any:
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        for part in parts:
            with suppress(TypeError, ValueError, OverflowError):
                return _convert(value, part)
        raise TypeError
    if origin in (list, tuple):
        values = value if isinstance(value, (list, tuple)) else [value]
        if origin is tuple and parts[-1] is not Ellipsis and len(values) != len(parts):
            raise ValueError
        return origin(_convert(each, parts[0]) for each in values)
    return KINDS[kind][1](value) if kind in KINDS else value


def _describe(kind: Any) -> str:
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(map(_describe, parts))
    if origin in (list, tuple):
        count = f"{len(parts)} " if origin is tuple and parts[-1] is not Ellipsis else ""
        return f"a list of {count}{_describe(parts[0]).removeprefix('a ')}s"
    return KINDS[kind][0]


@dataclasses.dataclass
class Config:
    """What all configs have in common: their values are of the types of their annotations, from wherever they come."""

    def __post_init__(self):
        """Check the values.

        Raises:
            ValueError: for one that cannot be, naming it.
        """
        kinds = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            setattr(self, field.name, typed(field.name, getattr(self, field.name), kinds[field.name]))


T = TypeVar("T", bound=Config)

# ---------------------------------------------------------------- files and flags


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
    except (yaml.YAMLError, ValueError) as error:  # ValueError for bytes that are no text, and days that do not exist
        reason = " ".join(str(error).split())
        raise ValueError(f"config file {str(path)!r} is not valid YAML or JSON: {reason}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"config file {str(path)!r} must hold keys and values.")
    return values


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print below a page of usage."""
        raise ValueError(f"{message}.")


def parse_config(config_class: type[T], argv: Sequence[str], **defaults: Any) -> T:
    """Make a config of: a file named by the first argument, then flags (which win), then `defaults`.

    Args:
        config_class: its fields are the keys of the file and the flags.
        argv: the command line without the program.
        defaults: values that replace the dataclass's own defaults.

    Raises:
        ValueError: for unknown keys of the file or flags, naming the accepted ones, and for values that cannot be.
    """
    argv = list(argv)
    known = [field.name for field in dataclasses.fields(config_class)]
    values = dict(defaults)
    if argv and argv[0].endswith(_FILE_SUFFIXES):
        path = Path(argv.pop(0))
        values |= read_config_file(path)
        unknown = [key for key in values if key not in known]
        if unknown:
            raise ValueError(f"{path} has unknown keys: {', '.join(map(str, unknown))}; known are {', '.join(known)}.")
    parser = _Parser(config_class, allow_abbrev=False)
    for action in parser._actions:
        action.required = action.required and action.dest not in values
        action.type = None  # a flag is a text, which the config converts like a text in a file
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
    """Undo that `accelerate launch` leaves a process one thread where nobody told it to, with --cpu or a number."""
    left_one = os.environ.get("ACCELERATE_USE_CPU") == "False" and os.environ.get("OMP_NUM_THREADS") == "1"
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    if left_one and alone and not torch.accelerator.is_available() and not _launcher_was_told_threads():
        torch.set_num_threads(psutil.cpu_count(logical=False) or 1)


def _launcher_was_told_threads() -> bool:
    """Whether the user gave the launcher a number of threads: it hands its own on under the same name."""
    try:
        launcher = psutil.Process(os.getppid())
        flags = " ".join(launcher.cmdline()).replace("-", "_")
        return "OMP_NUM_THREADS" in launcher.environ() or "num_cpu_threads_per_process" in flags
    except psutil.Error:  # it ended, or may not be looked at
        return False


def main(function: Callable[[T], Any], config_class: type[T], **defaults: Any) -> None:
    """Run `function` on the config of the command line; bad input or a bad disk end in one sentence and exit code 2."""
    use_all_cores()
    try:
        function(parse_config(config_class, sys.argv[1:], **defaults))
    except (ValueError, OSError) as error:
        what = f"a file could not be read or written ({error})" if isinstance(error, OSError) else error
        print(f"{Path(sys.argv[0]).name}: {what}", file=sys.stderr)
        sys.exit(2)
