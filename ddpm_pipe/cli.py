"""The commands `ddpm-pipe train | generate | timesteps | evaluate | average | demo | push | convert | export`.

Each command is a config and a function that takes it. Modules that need torch are imported only when a command runs,
so that `--help` answers at once.
"""

import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from ddpm_pipe import __version__
from ddpm_pipe.config import FILE_SUFFIXES, Config, parse


class Command(NamedTuple):
    """The config and the function of a command, each as `module:name`, and its line of help."""

    config: str
    function: str
    help: str


COMMANDS = {
    "train": Command("training.config:TrainConfig", "training.loop:train", "train a model on images"),
    "generate": Command("sampling.config:GenerateConfig", "sampling.generate:generate", "draw images into a folder"),
    "timesteps": Command(
        "sampling.config:TimestepsConfig", "sampling.timesteps:learn_timesteps", "search the timesteps of few steps"
    ),
    "evaluate": Command(
        "evaluation.config:EvaluateConfig", "evaluation.evaluate:evaluate", "measure how good a model is"
    ),
    "average": Command("training.config:AverageConfig", "training.posthoc:average", "rebuild averages of any length"),
    "demo": Command("demo.config:DemoConfig", "demo.app:demo", "draw with a model in the browser"),
    "push": Command("sharing.config:PushConfig", "sharing.push:push", "share a run on the Hub"),
    "convert": Command(
        "convert.config:ConvertConfig", "convert.command:convert", "convert a checkpoint of another project"
    ),
    "export": Command(
        "export.config:ExportConfig", "export.export:export", "write a model as ONNX and a page that draws"
    ),
}
PRESETS = {path.stem: path for path in sorted(Path(str(files("ddpm_pipe"))).glob("presets/*.yaml"))}
"""Name of a preset -> its file."""


def usage() -> str:
    """Return the text that `ddpm-pipe --help` prints."""
    lines = [f"  {name:10}{command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: ddpm-pipe COMMAND [preset or config.yaml] [--key value ...]",
            "",
            *lines,
            "",
            f"ddpm-pipe COMMAND --help lists the keys. Presets of train: {', '.join(PRESETS)}.",
            "Several GPUs or processes: accelerate launch -m ddpm_pipe COMMAND ...",
        ]
    )


def main(argv: Sequence[str] | None = None, **defaults: Any) -> None:
    """Run a command. Where the package refuses its input, print one sentence and exit with code 2.

    Args:
        argv: the command line without the program; None takes that of this process.
        defaults: values of the config that replace its class' own defaults.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return
    if argv[0] == "--version":
        print(f"ddpm-pipe {__version__}")
        return
    name, *rest = argv
    try:
        run(name, rest, defaults)
    except (ValueError, OSError) as error:
        if not is_refusal(error):
            raise
        told = " ".join(str(error).split())
        what = f"a file could not be read or written ({told})" if isinstance(error, OSError) else told
        print(f"ddpm-pipe {name}: {what}", file=sys.stderr)
        sys.exit(2)


def run(name: str, argv: list[str], defaults: dict[str, Any]) -> None:
    """Parse the config of a command and call its function.

    Raises:
        ValueError: as in `configure`, and what the function raises.
    """
    config = configure(name, argv, defaults)
    load("launch:use_all_cores")()
    load(COMMANDS[name].function)(config)
    load("launch:leave")()


def configure(name: str, argv: list[str], defaults: dict[str, Any]) -> Config:
    """Return the config of a command; `argv` is what follows the name of the command.

    Raises:
        ValueError: for an unknown command or preset, or an invalid config.
    """
    if name not in COMMANDS:
        raise ValueError(f"there is no such command; use one of {', '.join(COMMANDS)}.")
    if argv and not argv[0].startswith("-") and not argv[0].endswith(FILE_SUFFIXES):
        if argv[0] not in PRESETS:
            known = ", ".join(PRESETS)
            raise ValueError(f"{argv[0]!r} is neither a config file (.yaml, .yml, .json) nor a preset: {known}.")
        argv = [str(PRESETS[argv[0]]), *argv[1:]]
    return parse(load(COMMANDS[name].config), argv, prog=f"ddpm-pipe {name}", **defaults)


def load(place: str) -> Any:
    """Import and return the object that `module:name` names."""
    module, _, name = place.partition(":")
    return getattr(import_module(f"ddpm_pipe.{module}"), name)


def is_refusal(error: Exception) -> bool:
    """Return whether this package raised the error itself, or it is an OSError.

    An error that a library raised is a bug and keeps its traceback. An OSError is none: the system raises it for files
    and networks.
    """
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return isinstance(error, OSError) or frame.f_globals.get("__name__", "").split(".")[0] == "ddpm_pipe"
