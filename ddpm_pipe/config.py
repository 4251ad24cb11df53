"""Configs: pydantic models whose fields are both the keys of a YAML or JSON file and the flags of a command."""

import argparse
import json
from collections.abc import Sequence
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Self, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

# ---------------------------------------------------------------- types of values


def _number(value: Any) -> Any:
    """Convert a number of any library to one of Python, and refuse true and false."""
    if isinstance(value, bool):
        raise PydanticCustomError("truth", "Input should be a number, not true or false")
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, PathLike) else value


def _from_json(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise PydanticCustomError("json", "Input should be a mapping, on the command line as JSON") from error


def _listed(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [part for each in value for part in (each.split(",") if isinstance(each, str) else [each])]
    return value if value is None else _listed([value])


def _compile_mode(value: Any) -> Any:
    """Translate the truth value that `compile` was in earlier versions to a mode."""
    return {"true": "default", "false": "none"}.get(str(value).lower(), value)


Int = Annotated[int, BeforeValidator(_number)]
PositiveInt = Annotated[Int, Field(ge=1)]
NonNegativeInt = Annotated[Int, Field(ge=0)]
Float = Annotated[float, BeforeValidator(_number)]
PositiveFloat = Annotated[Float, Field(gt=0)]
NonNegativeFloat = Annotated[Float, Field(ge=0)]
Share = Annotated[Float, Field(ge=0, lt=1)]
Place = Annotated[str, Field(min_length=1), BeforeValidator(_as_text)]
"""A path, or the id of a repository on the Hub."""
JsonDict = Annotated[dict[str, Any], BeforeValidator(_from_json)]
"""A mapping; a flag gives it as JSON."""

CompileMode = Annotated[Literal["none", "default", "reduce-overhead", "max-autotune"], BeforeValidator(_compile_mode)]
"""A mode of torch.compile; the last two also replay the kernels of a call as CUDA graphs."""

T = TypeVar("T")
Listed = Annotated[list[T], BeforeValidator(_listed)]
"""A list, which may also be given as a single value or as values with commas between them."""

Size = Annotated[Listed[PositiveInt], Field(min_length=1, max_length=2)]
"""[size] or [height, width], in pixels."""


# ---------------------------------------------------------------- configs


class Config(BaseModel):
    """The base of all configs. A config cannot change, and its values are checked wherever they come from.

    Raises:
        ValueError: one sentence that names a key that is unknown or missing, or whose value is invalid.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        coerce_numbers_to_str=True,  # YAML reads the digits of a seed or of a commit as a number
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    def __init__(self, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ValueError(self._sentence(error.errors()[0])) from None

    @classmethod
    def _sentence(cls, error: ErrorDetails) -> str:
        """Return a sentence that says what is wrong with one key."""
        name, value = str(next(iter(error["loc"]), "")), error["input"]
        if error["type"] == "value_error":
            return str(error["ctx"]["error"])
        if error["type"] == "missing":
            return f"{name} must be given: {cls.model_fields[name].description}."
        if error["type"] == "extra_forbidden":
            return f"{name} is unknown; known are {', '.join(cls.names())}."
        return f"{name}={value!r:.100} must {error['msg'].partition(' should ')[2] or error['msg']}."

    @classmethod
    def sections(cls) -> dict[str, list[str]]:
        """Return heading -> names of fields. Each class that a config inherits from is a section of its file.

        A field that a subclass declares anew is in the section of the subclass.
        """
        classes = [each for each in cls.__mro__ if issubclass(each, Config) and each is not Config]
        owners = {name: each for each in reversed(classes) for name in each.__annotations__ if name in cls.model_fields}
        names = {each: [name for name, owner in owners.items() if owner is each] for each in classes}
        return {(each.__doc__ or "").partition("\n")[0]: fields for each, fields in names.items() if fields}

    @classmethod
    def names(cls) -> list[str]:
        """Return the names of all fields, section after section."""
        return [name for names in cls.sections().values() for name in names]

    def replace(self, **changes: Any) -> Self:
        """Return the same config with some values replaced; the new values are checked, and defaults stay not given."""
        return type(self)(**{name: getattr(self, name) for name in self.model_fields_set} | changes)

    def undecided(self) -> set[str]:
        """Return the names of values that were not given and that others will decide, instead of the defaults."""
        return set()

    def to_yaml(self) -> str:
        """Return the text of a config file, section after section, without values that are undecided."""
        values = self.model_dump(mode="json", exclude=self.undecided())
        return yaml.safe_dump({name: values[name] for name in self.names() if name in values}, sort_keys=False)

    @classmethod
    def merge(cls, values: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
        """Return the values of a file and of the flags, which win."""
        return values | flags


C = TypeVar("C", bound=Config)


# ---------------------------------------------------------------- files and flags

FILE_SUFFIXES = (".yaml", ".yml", ".json")


def read_config_file(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML or JSON file.

    Raises:
        ValueError: where the file cannot be read or holds no mapping.
    """
    try:
        values = yaml.safe_load(path.read_text())  # JSON is YAML
    except OSError as error:
        raise ValueError(f"config file {str(path)!r} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: bytes that are not text, or a date that does not exist
        reason = " ".join(str(error).split())
        raise ValueError(f"config file {str(path)!r} is not valid YAML or JSON: {reason}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"config file {str(path)!r} must hold keys and values.")
    return values


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise ValueError with the message that argparse would print below a page of usage."""
        raise ValueError(f"{message}.")


def make_parser(config_class: type[Config], prog: str | None = None) -> _Parser:
    """Make a parser with a flag for each field. It checks no values, and it leaves out fields that are not given."""
    usage = "%(prog)s [config.yaml] [--key value ...]"
    parser = _Parser(prog=prog, usage=usage, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for heading, names in config_class.sections().items():
        group = parser.add_argument_group(heading)
        for name in names:
            field = config_class.model_fields[name]
            group.add_argument(f"--{name}", help=_help(field), **_arity(name, field))
    return parser


def _help(field: FieldInfo) -> str:
    """Return what `--help` says of a field: its docstring, its choices and its default."""
    choices = [choice for kind in (field.annotation, *get_args(field.annotation)) for choice in _choices(kind)]
    one_of = f"; one of {', '.join(choices)}" if choices else ""
    default = field.get_default(call_default_factory=True)
    told = "needed" if field.is_required() else f"default: {default if default not in (None, '', [], {}) else 'none'}"
    return f"{' '.join((field.description or '').split())}{one_of} ({told})".replace("%", "%%")


def _choices(kind: Any) -> list[str]:
    return list(get_args(kind)) if get_origin(kind) is Literal else []


def _arity(name: str, field: FieldInfo) -> dict[str, Any]:
    """Return how many values a flag takes: that of a boolean may be left out, and a list may have several."""
    if _mentions(field.annotation, bool):
        return {"nargs": "?", "const": "true", "metavar": "true|false"}
    return {"nargs": "+" if _mentions(field.annotation, list) else None, "metavar": name.upper()}


def _mentions(annotation: Any, kind: type) -> bool:
    """Return whether a type is `kind`, a union with it, or a container of it."""
    return kind in (annotation, get_origin(annotation)) or any(_mentions(part, kind) for part in get_args(annotation))


def _underscored(word: str) -> str:
    """Replace each - in the name of a flag with _."""
    flag, equals, value = word.partition("=")
    return flag.replace("-", "_").replace("__", "--", 1) + equals + value if word.startswith("--") else word


def parse(config_class: type[C], argv: Sequence[str], prog: str | None = None, **defaults: Any) -> C:
    """Make a config. Flags win over the file that the first argument may name, and the file wins over `defaults`.

    Args:
        config_class: its fields are the keys of the file and the flags.
        argv: the command line without the program.
        prog: the name of the program, for `--help`.
        defaults: values that replace the class' own defaults.

    Raises:
        ValueError: for unknown keys of the file or flags, naming the accepted ones, and for invalid values.
    """
    argv, known, values = list(argv), config_class.names(), dict(defaults)
    if argv and argv[0].endswith(FILE_SUFFIXES):
        path = Path(argv.pop(0))
        values |= read_config_file(path)
        unknown = [str(key) for key in values if key not in known]
        if unknown:
            raise ValueError(f"{path} has unknown keys: {', '.join(unknown)}; known are {', '.join(known)}.")
    given, rest = make_parser(config_class, prog).parse_known_args([_underscored(word) for word in argv])
    if rest:
        raise ValueError(f"unknown arguments: {' '.join(rest)}; known are --{', --'.join(known)}.")
    return config_class(**config_class.merge(values, vars(given)))
