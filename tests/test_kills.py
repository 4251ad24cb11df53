"""A run killed at any moment and resumed is the run that was never killed, bit for bit."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from runs import NETWORK, assert_same, final_state, loss_curve, make_recipe
from safetensors.torch import load_file

from ddpm_pipe.checkpoint import Checkpoints
from ddpm_pipe.config import save_config
from ddpm_pipe.log import read_metrics
from ddpm_pipe.recipe import TrainConfig

pytestmark = pytest.mark.slow

CHANCY = {
    "unet": NETWORK | {"dropout": 0.1, "self_condition": True},
    "class_conditional": True,
    "flip": True,
    "gradient_accumulation_steps": 2,
    "lr_schedule": "cosine",
    "save_every": 2,
    "log_every": 1,
    "num_samples": 2,
}
"""All that chance decides, and much to save."""


def write_config(config: TrainConfig) -> str:
    """The config in a file beside the run folder."""
    folder = Path(config.output_dir).parent
    folder.mkdir(parents=True, exist_ok=True)
    save_config(config, folder / "config.yaml")
    return str(folder / "config.yaml")


def make_run(lives, folder: Path, **options) -> TrainConfig:
    """An uninterrupted run, in a process of its own, in the folder `run` of `folder`."""
    config = make_recipe(folder / "run", **CHANCY | options)
    life = lives.start(write_config(config), record=folder / "writes")
    assert life.wait() == 0, life.errors
    return config


def assert_same_run(whole: TrainConfig, config: TrainConfig) -> None:
    """Weights, averages, optimizer moments, the profiles' snapshots, the pipeline, the grid and every logged loss."""
    assert_same(final_state(whole), final_state(config))
    assert loss_curve(whole) == loss_curve(config)
    assert files(whole, "checkpoints").keys() == files(config, "checkpoints").keys()
    for part in ("ema", "pipeline", "samples"):
        assert files(whole, part) == files(config, part), part


def files(config: TrainConfig, part: str) -> dict[str, bytes]:
    """The files of a part of the run folder."""
    folder = Path(config.output_dir) / part
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def checkpoints(config: TrainConfig) -> Checkpoints:
    return Checkpoints(Path(config.output_dir))


def newest(config: TrainConfig) -> int:
    """The step of the newest checkpoint."""
    return max(checkpoints(config).steps(), default=0)


def kill_in_time(lives, config: TrainConfig, argv: list[str], chance: random.Random) -> str:
    """Kill a life in its start, or some steps and a moment later; says where that was."""
    steps = chance.choice([0, 1, 2, 3])
    goal = newest(config) + steps
    life = lives.start(*argv)
    while steps and not any(entry["step"] >= goal for entry in read_metrics(Path(config.output_dir))[-1:]):
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.06 if steps else 0.8))
    life.signal(signal.SIGKILL)
    assert life.wait() == -signal.SIGKILL, f"it ended before it was killed: {life.errors}"
    return "within a step or a save" if steps else "while it started"


def kill_in_write(lives, config: TrainConfig, argv: list[str], number: int) -> str:
    """Let a life kill itself in the middle of a write of its first save; says which."""
    record = Path(config.output_dir).parent / "writes"
    life = lives.start(*argv, die_in=number, record=record)
    assert life.wait() == -signal.SIGKILL, life.errors
    return f"within {record.read_text().splitlines()[-1]}"


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_twenty_kills_change_nothing(lives, tmp_path, precision):
    options = {"steps": 40, "sample_every": 20, "mixed_precision": precision}
    whole = make_run(lives, tmp_path / "whole", **options)
    writes = (tmp_path / "whole" / "writes").read_text().splitlines()
    per_save = sum("step-00000004" in line or "pipeline" in line for line in writes) // 20

    config = make_recipe(tmp_path / "killed" / "run", **CHANCY | options)
    argv, chance = [write_config(config), "--resume"], random.Random(precision)
    in_writes = [1 + int(per_save * (i + chance.random()) / 10) for i in range(10)]
    plan = chance.sample([0] * 10 + in_writes, 20)
    died = []
    for number in plan:
        died.append(kill_in_write(lives, config, argv, number) if number else kill_in_time(lives, config, argv, chance))
        assert newest(config) < config.steps
    life = lives.start(*argv)
    assert life.wait() == 0, life.errors
    print(f"{precision}: {len(died)} kills, {len(died) + 1} lives:", *died, sep="\n  ")
    assert_same_run(whole, config)
