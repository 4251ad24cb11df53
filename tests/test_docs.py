"""The README and the pages of docs/ are executed: each block of Python, and each command of the package with its flags.

A page is run in a folder of its own, which has images in path/to/images and a finished run of a tiny network in
runs/mine. The Hub is the one of hub_server.py and has the models org/name and org/stock. Before a block may stand

- `<!-- test: --steps 3 -->`: flags for its commands on top of those that make them small,
- `<!-- not run: reason -->`: its flags are checked, and nothing is run.
"""

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import indent
from typing import Any, NamedTuple

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from feature_network import Classifier
from hub_server import HubServer
from lives import Lives
from PIL import Image
from runs import NETWORK, REPO, STOCK
from torch.distributed.run import get_args_parser

from ddpm_pipe.data.memory import load_images

PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((REPO / "docs").glob("*.md")))]
OTHERS = ("pip", "git", "cd", "source", "ruff", "mypy", "pytest")
"""Programs whose commands are skipped: they prepare what the tests find prepared, or are the tests."""
SMALL = {
    "train": "--batch_size 4 --holdout 4 --num_train_timesteps 100 --num_samples 4 --sample_steps 2 --save_every 2"
    f" --sample_every 2 --tracker none --mixed_precision no --unet '{json.dumps(NETWORK)}'",
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
        return "<!-- not run: " not in self.comments

    @property
    def flags(self) -> list[str]:
        return shlex.split(" ".join(re.findall(r"<!-- test: (.*) -->", self.comments)))


def read_blocks(page: str) -> list[Block]:
    text = (REPO / page).read_text()
    fences = re.finditer(r"^((?:<!-- .* -->\n)*)```(.*)\n((?:.*\n)*?)```$", text, re.MULTILINE)
    return [Block(f"{page}:{text[: m.start(2)].count(chr(10)) + 1}", m[2], m[3], m[1]) for m in fences]


def commands(block: Block) -> Iterator[list[str]]:
    """The commands of a block of bash, as words; other programs and variables before a command are left out."""
    for line in block.source.replace("\\\n", " ").splitlines():
        for command in line.split("&&"):
            words = shlex.split(command, comments=True)
            while words and re.fullmatch(r"[A-Z_0-9]+=.*", words[0]):
                words.pop(0)
            if words and words[0] not in OTHERS and words[:3] != ["python3", "-m", "venv"]:
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
        source = block.source if block.is_run else f"def not_run():\n{indent(block.source, '    ')}"
        return {"where": block.where, "python": source}
    done = []
    for program, argv in map(without_launcher, commands(block)):
        small = make_small(program, argv, block.flags) if block.is_run else None
        done.append({"program": program, "argv": argv, "small": small})
    return {"where": block.where, "commands": done}


# ---------------------------------------------------------------- what the pages find


@pytest.fixture(scope="module")
def parent(tmp_path_factory) -> Iterator[Lives]:
    """The parent of the processes of all pages, for whom the Hub is on the loopback."""
    with HubServer(tokens={"hf_good": "org"}) as hub:
        handle = Lives(**hub.environment(home=tmp_path_factory.mktemp("home"), token="hf_good"))
        yield handle
        handle.close()


def write_job(folder: Path, blocks: list[dict[str, Any]]) -> Path:
    job = folder.with_suffix(".json")
    job.write_text(json.dumps({"folder": str(folder), "blocks": blocks}))
    return job


def run_page(parent: Lives, folder: Path, blocks: list[dict[str, Any]]) -> None:
    life = parent.start(str(write_job(folder, blocks)), program="tests/run_page.py")
    code = life.wait(timeout=600)
    assert code == 0, f"exit code {code}: {life.errors}"


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
def features(tmp_path_factory) -> Path:
    """A feature network that has learned nothing: pages and notebook need numbers, and not what they say."""
    file = tmp_path_factory.mktemp("features") / "features.pt"
    torch.jit.script(Classifier(10).eval()).save(str(file))
    return file


@pytest.fixture(scope="module")
def place(parent, features, tmp_path_factory) -> Path:
    """The folder that every page gets a copy of."""
    folder = tmp_path_factory.mktemp("docs") / "place"
    write_images(folder / "path" / "to" / "images")
    shutil.copy(features, folder)
    train = "ddpm-pipe train --data path/to/images --beta_schedule cosine --prediction_type v_prediction --save_every 1"
    mine = f"{train} --output_dir runs/mine --class_conditional --ema_sigma_rel 0.05,0.1\n"
    stock = f"<!-- test: --unet '{json.dumps(STOCK)}' -->"
    runs = [
        Block("the run", "bash", mine, ""),
        Block("a stock run", "bash", f"{train} --output_dir runs/stock\n", stock),
        Block("the Hub", "python", MAKE, ""),
    ]
    run_page(parent, folder, [job_of(block) for block in runs])
    return folder


# ---------------------------------------------------------------- the pages


@pytest.mark.slow
@pytest.mark.xdist_group("docs")  # one worker: what the pages find is made once
@pytest.mark.parametrize("page", [page for page in PAGES if read_blocks(page)])
def test_the_code_of_a_page_runs(page, parent, place, tmp_path):
    blocks = [job_of(block) for block in read_blocks(page) if block.language in ("python", "bash")]
    folder = tmp_path / "page"
    shutil.copytree(place, folder)
    run_page(parent, folder, blocks)


def test_every_block_is_read_and_known(repo):
    for page in PAGES:
        blocks = read_blocks(page)
        assert (repo / page).read_text().count("```") == 2 * len(blocks), page
        assert {block.language for block in blocks} <= {"python", "bash"}, page


@pytest.mark.slow
@pytest.mark.xdist_group("docs")
def test_a_wrong_flag_of_a_page_fails(parent, tmp_path):
    """What is not run is checked nevertheless."""
    folder = tmp_path / "page"
    folder.mkdir()
    for text in (
        "ddpm-pipe train --data x --batchsize 4",
        "accelerate launch -m ddpm_pipe generate --model x --seed 1",
    ):
        block = Block("a page", "bash", f"{text}\n", "<!-- not run: it is wrong -->\n")
        life = parent.start(str(write_job(folder, [job_of(block)])), program="tests/run_page.py")
        assert life.wait() != 0 and "unknown arguments" in life.errors
    with pytest.raises(SystemExit):
        without_launcher(["accelerate", "launch", "--processes", "2", "-m", "ddpm_pipe", "train"])


# ---------------------------------------------------------------- pictures, links, the site, the notebook

FORMER = {
    *("sample", "train-on-your-own-images", "data", "a-run-survives-anything", "generate-many-images", "in-few-steps"),
    *("how-good-is-it", "how-fast-is-it", "more-from-a-trained-model", "share-on-the-hub"),
    *("checkpoints-of-other-projects", "where-things-are", "licence"),
}
"""Headings that the README had in version 0.2.0, to which others may link."""


def anchors(page: Path) -> set[str]:
    """What a link into a page can name: its headings, and the places that it names itself."""
    text = page.read_text()
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {*(title.lower().replace(" ", "-") for title in headings), *re.findall(r'<a id="(.*?)">', text)}


def test_links_to_former_headings_of_the_readme_lead_somewhere(repo):
    assert anchors(repo / "README.md") >= FORMER


def test_links_from_the_readme_into_pages_lead_to_headings(repo):
    links = re.findall(r"\]\(([^)#:]*)#([^)]+)\)", (repo / "README.md").read_text())
    assert links and not [link for link in links if link[1] not in anchors(repo / (link[0] or "README.md"))]


def test_every_picture_has_a_script_that_draws_it(repo):
    scripts = "".join(path.read_text() for folder in ("docs", "benchmarks") for path in (repo / folder).glob("*.py"))
    pictures = [path.stem for path in (repo / "docs").rglob("*.png")]
    assert pictures and not [name for name in pictures if not re.search(rf'[/"]{name}(\.png)?"', scripts)]


@pytest.mark.slow
@pytest.mark.xdist_group("docs")
def test_the_script_draws_the_pictures_of_the_pages(repo, place, tmp_path, monkeypatch):
    mine = str(place / "runs" / "mine")
    argv = ["docs/pictures.py", mine, "--tiles", mine, "--cifar10", mine, "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    runpy.run_path(str(repo / "docs" / "pictures.py"), run_name="__main__")
    assert {path.name for path in tmp_path.glob("*.png")} == {path.name for path in (repo / "docs/pictures").iterdir()}


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_asks_no_other_server(repo, tmp_path):
    pytest.importorskip("material", reason="the site needs mkdocs-material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
    done = subprocess.run([str(part) for part in command], cwd=repo, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert {f"{Path(page).stem}.html" for page in PAGES[1:]} <= {path.name for path in tmp_path.glob("*.html")}
    loaded = r"<(?:script|img|link rel=\"(?:stylesheet|preconnect|icon))[^>]*?(?:src|href)=\"?(https?:[^\" >]*)"
    for page in tmp_path.glob("*.html"):
        assert not re.findall(loaded, page.read_text()), page.name


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(repo, features, tmp_path):
    nbclient = pytest.importorskip("nbclient", reason="the notebook needs nbclient")
    nbformat = pytest.importorskip("nbformat", reason="the notebook needs nbformat")
    notebook = nbformat.read(repo / "examples" / "quickstart.ipynb", as_version=4)
    assert not [cell for cell in notebook.cells if cell.get("outputs") or cell.get("execution_count")]
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    values = {"RUN": str(tmp_path / "run"), "STEPS": 2, "GRID": 10, "IMAGES": 20, "FEATURES": str(features)}
    assert re.findall(r"^(\w+) =", parameters.source, re.M) == list(values)
    parameters.source = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": repo / "examples"}}).execute()
    pictures = [
        output for cell in notebook.cells for output in cell.get("outputs", ()) if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 4
    assert "unet/diffusion_pytorch_model.safetensors" in "".join(output.text for output in notebook.cells[-2].outputs)
