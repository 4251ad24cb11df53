"""The README and the pages of docs/ are executed: each block of Python, and each command of the package with its flags.

A page is run in a folder of its own, which has images in path/to/images and a finished run of a tiny network in
runs/mine. The Hub is the one of hub_server.py and has the models org/name and org/stock. Before a block may stand

- `<!-- test: --steps 3 -->`: flags for its commands on top of those that make them small,
- `<!-- not run: reason -->`: its flags are checked, and nothing is run.
"""

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from accelerate.commands.launch import launch_command_parser
from feature_network import feature_file  # noqa: F401
from hub_server import HubServer
from lives import Lives
from runs import NETWORK, REPO, STOCK
from torch.distributed.run import get_args_parser

from ddpm_pipe.cli import COMMANDS
from ddpm_pipe.data.memory import load_images

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("docs")]

PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((REPO / "docs").glob("*.md")))]
INSTALLERS = ("pip", "git", "cd")
"""Programs whose commands are not run anywhere: they prepare what the tests find prepared."""
SMALL = {
    "train": "--batch_size 4 --num_train_timesteps 100 --num_samples 4 --sample_steps 2 --save_every 2 --sample_every 2"
    f" --tracker none --mixed_precision no --unet '{json.dumps(NETWORK)}'",
    "generate": "--seeds 0-3 --batch_size 4 --steps 2",
    "timesteps": "--steps 2 --reference_steps 4 --num_images 2",
    "evaluate": "--features features.pt --num_images 20 --batch_size 20 --steps 2 --bits_terms 2",
}
"""Flags that let a command end within seconds."""


# ---------------------------------------------------------------- blocks and commands


class Block(NamedTuple):
    """A fenced block: its page and line, its language, its text, and the comments right before it."""

    where: str
    language: str
    source: str
    comments: str

    @property
    def is_run(self) -> bool:
        return "<!-- not run: " not in self.comments and "<!-- test command -->" not in self.comments

    @property
    def flags(self) -> list[str]:
        return shlex.split(" ".join(re.findall(r"<!-- test: (.*) -->", self.comments)))


def read_blocks(page: str) -> list[Block]:
    text = (REPO / page).read_text()
    fences = re.finditer(r"^((?:<!-- .* -->\n)*)```(.*)\n((?:.*\n)*?)```$", text, re.MULTILINE)
    return [Block(f"{page}:{text[: m.start(2)].count(chr(10)) + 1}", m[2], m[3], m[1]) for m in fences]


def commands(block: Block) -> Iterator[list[str]]:
    """The commands of a block of bash, as words; installers and variables before a command are left out."""
    for line in block.source.replace("\\\n", " ").splitlines():
        for command in line.split("&&"):
            words = shlex.split(command, comments=True)
            while words and re.fullmatch(r"[A-Z_0-9]+=.*", words[0]):
                words.pop(0)
            if words and words[0] not in INSTALLERS and words[:3] != ["python3", "-m", "venv"]:
                yield words


def without_launcher(words: list[str]) -> tuple[str, list[str]]:
    """The program, `ddpm_pipe` or a script, and its arguments; the parser of the launcher checks the launcher's own."""
    if words[:2] == ["accelerate", "launch"]:
        launched = launch_command_parser().parse_args(words[2:])
        return launched.training_script, launched.training_script_args
    if words[0] == "torchrun":
        launched = get_args_parser().parse_args(words[1:])
        return launched.training_script, launched.training_script_args
    if words[0] == "python":
        return words[1], words[2:]
    assert words[0] == "ddpm-pipe", f"{words[0]} is no program that the tests know"
    return "ddpm_pipe", words[1:]


def make_small(program: str, argv: list[str], flags: list[str]) -> list[str]:
    """The flags that make a command small, and those of its block, which win."""
    name = "train" if program == "examples/train.py" else argv[0] if program == "ddpm_pipe" else ""
    small = shlex.split(SMALL.get(name, ""))
    if name == "train" and not {"--budget", "--steps"} & {*flags}:
        small += ["--budget", "8img"] if "--budget" in argv else ["--steps", "2"]
    return small + flags


def job_of(block: Block) -> dict[str, Any]:
    """What run_page.py does for a block."""
    if block.language == "python":
        return {"where": block.where, "python": block.source}
    parsed = [without_launcher(words) for words in commands(block)]
    return {
        "where": block.where,
        "commands": [
            {"program": program, "argv": argv, "small": make_small(program, argv, block.flags) if block.is_run else None}
            for program, argv in parsed
        ],
    }


# ---------------------------------------------------------------- what the pages find


@pytest.fixture(scope="module")
def parent(tmp_path_factory) -> Iterator[Lives]:
    """The parent of the processes of all pages, for whom the Hub is on the loopback."""
    with HubServer(tokens={"hf_good": "org"}) as hub:
        handle = Lives(**hub.environment(home=tmp_path_factory.mktemp("home"), token="hf_good"))
        yield handle
        handle.close()


def run_page(parent: Lives, folder: Path, blocks: list[dict[str, Any]]) -> None:
    job = folder.with_suffix(".json")
    job.write_text(json.dumps({"folder": str(folder), "blocks": blocks}))
    parent.complete(str(job), program="tests/run_page.py")


def write_images(folder: Path) -> None:
    """Three training and three test images of each class at 16x16, in class folders."""
    for split, offset in (("train", 0), ("test", 3)):
        data = load_images(str(REPO / "examples" / "fashion_mnist"), "test", with_labels=True, resolution=[16])
        for label, name in enumerate(data.class_names):
            place = folder / split / name.replace("/", " ")
            place.mkdir(parents=True)
            rows = (data.labels[data.rows] == label).nonzero()[offset : offset + 3, 0]
            for row, image in zip(rows.tolist(), data.take(rows)[0], strict=True):
                Image.fromarray(image[0].numpy()).save(place / f"{row}.png")


MAKE = """
import shutil
from ddpm_pipe import DDPMPipeline
shutil.copytree("runs/mine", "runs/fashion_mnist")
for run, name in ("mine", "org/name"), ("stock", "org/stock"):
    DDPMPipeline.from_pretrained(f"runs/{run}/pipeline").push_to_hub(name)
shutil.rmtree("runs/stock")
"""


@pytest.fixture(scope="module")
def place(parent, feature_file, tmp_path_factory) -> Path:  # noqa: F811
    """The folder that every page gets a copy of."""
    folder = tmp_path_factory.mktemp("docs") / "place"
    write_images(folder / "path" / "to" / "images")
    shutil.copy(feature_file, folder / "features.pt")
    mine = "ddpm-pipe train --data path/to/images --output_dir runs/mine --class_conditional --ema_sigma_rel 0.05,0.1"
    stock = f"ddpm-pipe train --data path/to/images --output_dir runs/stock --unet '{json.dumps(STOCK)}'"
    recipe = " --beta_schedule cosine --prediction_type v_prediction --save_every 1\n"
    training = Block("the runs", "bash", mine + recipe + stock + recipe, "")
    run_page(parent, folder, [job_of(training), {"where": "the Hub", "python": MAKE}])
    return folder


# ---------------------------------------------------------------- the pages


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page, parent, place, tmp_path):
    blocks = [job_of(block) for block in read_blocks(page) if block.language in ("python", "bash")]
    folder = tmp_path / "page"
    shutil.copytree(place, folder)
    run_page(parent, folder, blocks)
