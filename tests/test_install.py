"""What an installed user has: the wheel with its commands and presets, and an example to copy."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from PIL import Image

import ddpm_pipe


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_wheel_in_an_empty_environment_has_the_commands(repo, tmp_path):
    """Its dependencies are those of this environment, which a path file lends it."""
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, repo, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    modules = {f"ddpm_pipe/{path.relative_to(repo / 'ddpm_pipe')}" for path in (repo / "ddpm_pipe").rglob("*.py")}
    presets = {f"ddpm_pipe/presets/{path.name}" for path in (repo / "ddpm_pipe" / "presets").iterdir()}
    assert modules | presets | {
        "ddpm_pipe/py.typed",
        "ddpm_pipe/export/page.html",
        "ddpm_pipe/model_cards/TEMPLATE.md",
    } <= set(names)
    assert not [name for name in names if name.startswith(("tests", "examples"))]

    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel, cwd=tmp_path)
    lent = Path(pytest.__file__).parents[1]
    (site / "lent.pth").write_text(f"{lent}\n")
    python = tmp_path / "venv" / "bin" / "python"
    place = run(python, "-I", "-c", "import ddpm_pipe; print(ddpm_pipe.__file__)", cwd=tmp_path).strip()
    assert Path(place).is_relative_to(site)
    told = run(python, "-I", site / "bin" / "ddpm-pipe", "--help", cwd=tmp_path)
    assert all(
        command in told
        for command in (
            "train",
            "generate",
            "timesteps",
            "evaluate",
            "average",
            "demo",
            "push",
            "convert",
            "export",
            "cifar10",
        )
    )
    flags = ["--data", repo / "examples" / "fashion_mnist", "--split", "test", "--steps", "2", "--batch_size", "4"]
    small = ["--resolution", "8", "--num_samples", "10", "--sample_steps", "2", "--tracker", "none"]
    run(python, "-I", "-m", "ddpm_pipe", "train", "fashion_mnist", *flags, *small, "--output_dir", "run", cwd=tmp_path)
    assert (tmp_path / "run" / "pipeline" / "model_index.json").exists()


def test_the_minimal_example_learns_and_draws(repo, tmp_path):
    told = run(sys.executable, repo / "examples" / "minimal.py", "61", tmp_path / "out", cwd=tmp_path)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", told)]
    assert len(losses) == 4 and losses[-1] < losses[0] / 2
    with Image.open(tmp_path / "out" / "samples.png") as grid:
        assert grid.size == (8 * 16, 2 * 16) and len(grid.getcolors()) > 10


def test_the_version_is_stated_in_one_place_and_has_its_changes(repo):
    project = tomllib.loads((repo / "pyproject.toml").read_text())["project"]
    assert "version" in project["dynamic"] and "version" not in project
    assert f"## {ddpm_pipe.__version__}" in (repo / "CHANGELOG.md").read_text()
    assert f"version: {ddpm_pipe.__version__}" in (repo / "CITATION.cff").read_text()


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_links_to_files_lead_somewhere(repo, name):
    links = re.findall(r"\]\(([^)#:]+)\)|src=\"([^\"]+)\"", (repo / name).read_text())
    missing = [link for pair in links for link in pair if link and not (repo / link).exists()]
    assert links and not missing
