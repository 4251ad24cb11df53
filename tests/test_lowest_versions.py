"""A run, from images to a push, on the lowest versions that pyproject.toml allows of what this package is built on."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

BUILT_ON = (
    "diffusers",
    "transformers",
    "accelerate",
    "datasets",
    "huggingface-hub",
    "safetensors",
    "pydantic",
    "filelock",
)
BESIDE = {"pydantic": "pydantic-core==2.27.0", "transformers": "tokenizers==0.21.0"}
"""What the lowest version of a package needs beside it, which `pip --no-deps` leaves out."""

SMALL = ("--resolution", "8", "--steps", "2", "--batch_size", "4", "--num_samples", "10", "--sample_steps", "2")
DRAW = "from ddpm_pipe import DDPMPipeline; DDPMPipeline.from_pretrained('run/pipeline')(2, num_inference_steps=2)"


@pytest.fixture(scope="module")
def lowest(repo, tmp_path_factory) -> Path:
    """A folder with them, to be found before those that are installed."""
    project = tomllib.loads((repo / "pyproject.toml").read_text())["project"]
    bounds = dict(re.fullmatch(r"([\w-]+)>=([\d.]+)", needed).groups() for needed in project["dependencies"])
    wanted = [f"{name}=={bounds[name]}" for name in BUILT_ON] + [BESIDE[name] for name in BUILT_ON if name in BESIDE]
    folder = tmp_path_factory.mktemp("lowest")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), *wanted]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"PyPI cannot be reached: {done.stderr.strip().splitlines()[-1:]}")
    return folder


@pytest.mark.slow
def test_a_run_on_the_lowest_versions(lowest, repo, tmp_path):
    environment = os.environ | {"PYTHONPATH": f"{lowest}{os.pathsep}{repo}"}

    def run(*argv: object) -> str:
        command = [sys.executable, *(str(each) for each in argv)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert str(lowest) in run("-c", "import diffusers; print(diffusers.__file__)")
    data = ("--data", repo / "examples" / "fashion_mnist", "--split", "test", "--tracker", "none")
    run("-m", "ddpm_pipe", "train", "fashion_mnist", *data, *SMALL, "--output_dir", "run")
    run("-c", DRAW)
    model = ("--model", "run/pipeline", "--steps", "2")
    run("-m", "ddpm_pipe", "generate", *model, "--seeds", "0-3", "--scheduler", "dpm++", "--output_dir", "images")
    assert len(list((tmp_path / "images").glob("*.png"))) == 4
    assert "model_index.json" in run("-m", "ddpm_pipe", "push", "--run", "run", "--repo", "org/x", "--dry_run")
