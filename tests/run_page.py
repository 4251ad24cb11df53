"""Execute the code of one page of the documentation: `python run_page.py <job>`.

The job is a JSON file with `folder`, in which the code runs, and `blocks` in the order of the page: `where` it stands,
and either `python`, source whose names all blocks of the page share, or `commands`. A command has its `program`
(ddpm_pipe or a script of this project), its `argv`, and the flags that make it `small`, or null for one that is not
run. The flags of every command of the package are checked, whether it is run or not.
"""

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState

from ddpm_pipe import cli

REPO = Path(__file__).resolve().parent.parent
TRAIN = "examples/train.py"


def check(program: str, argv: list[str]) -> None:
    """Check that the script exists or, for a command of the package, that its config takes the flags."""
    if program == TRAIN:  # it trains the bundled images with a preset where no other is given
        preset = ["fashion_mnist"] if not argv or argv[0].startswith("--") else []
        cli.configure("train", [*preset, *argv], {"data": "examples"})
    elif program == "ddpm_pipe":
        cli.configure(argv[0], argv[1:], {})
    else:
        assert (REPO / program).exists(), f"{program} does not exist"


def run(program: str, argv: list[str]) -> None:
    """Run a command as a new process would."""
    AcceleratorState._reset_state(reset_partial_state=True)
    if program == "ddpm_pipe":
        cli.main(argv)
        return
    sys.argv = [program, *argv]
    runpy.run_path(str(REPO / program), run_name="__main__")


def main(job: dict[str, Any]) -> None:
    os.chdir(job["folder"])
    names: dict[str, Any] = {}
    for block in job["blocks"]:
        print(block["where"], file=sys.stderr, flush=True)
        if "python" in block:
            exec(compile(block["python"], block["where"], "exec"), names)
        for command in block.get("commands", ()):
            print("$", command["program"], *command["argv"], file=sys.stderr, flush=True)
            check(command["program"], command["argv"])
            if command["small"] is not None:
                run(command["program"], [*command["argv"], *command["small"]])


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
