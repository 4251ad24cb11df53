"""A run killed at any moment and resumed is the run that was never killed, bit for bit."""

import hashlib
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from runs import NETWORK, assert_same, final_state, loss_curve, make_recipe, write_config
from safetensors.torch import load_file

from ddpm_pipe.run.checkpoint import Checkpoints
from ddpm_pipe.run.folder import Run
from ddpm_pipe.training.config import TrainConfig

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
    "holdout": 4,
}
"""All that chance decides, and much to save."""


def make_run(lives, folder: Path, processes: int = 1, **options) -> TrainConfig:
    """An uninterrupted run, in a process of its own, in the folder `run` of `folder`."""
    config = make_recipe(folder / "run", **CHANCY | options)
    lives.complete(write_config(config), processes=processes, record=folder / "writes")
    return config


def assert_same_run(whole: TrainConfig, config: TrainConfig) -> None:
    """Weights, averages, optimizer moments, the profiles' snapshots, the pipeline, the grid and every logged loss."""
    assert_same(final_state(whole), final_state(config))
    assert loss_curve(whole) == loss_curve(config)
    assert held_out_losses(whole) == held_out_losses(config)
    assert files(whole, "checkpoints").keys() == files(config, "checkpoints").keys()
    for part in ("ema", "pipeline", "samples"):
        assert files(whole, part) == files(config, part), part


def held_out_losses(config: TrainConfig) -> list[dict]:
    """The entries of the loss on images held out."""
    return [entry for entry in Run(config.output_dir).read_metrics() if "held_out_loss" in entry]


def files(config: TrainConfig, part: str) -> dict[str, str]:
    """The files of a part of the run folder, as checksums: a difference of bytes would take pytest minutes to show."""
    folder = Path(config.output_dir) / part
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def newest(config: TrainConfig) -> int:
    """The step of the newest checkpoint."""
    return max(Checkpoints(Run(config.output_dir)).steps(), default=0)


def kill_in_time(lives, config: TrainConfig, argv: list[str], chance: random.Random) -> str:
    """Kill a life in its start, or some steps and a moment later; says where that was."""
    steps = chance.choice([0, 1, 2, 3])
    goal = newest(config) + steps
    life = lives.start(*argv)
    while steps and not any(entry["step"] >= goal for entry in Run(config.output_dir).read_metrics()[-1:]):
        life.assert_alive()
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
def test_twenty_kills_change_nothing(lives, few_images, tmp_path, precision):
    options = {"data": few_images, "steps": 40, "sample_every": 40, "mixed_precision": precision}
    whole = make_run(lives, tmp_path / "whole", **options)
    writes = (tmp_path / "whole" / "writes").read_text().splitlines()
    per_save = sum(any(part in line for part in ("checkpoints", "ema", "pipeline")) for line in writes) // 20

    config = make_recipe(tmp_path / "killed" / "run", **CHANCY | options)
    argv, chance = [write_config(config), "--resume"], random.Random(precision)
    in_writes = [1 + int(per_save * (i + chance.random()) / 10) for i in range(10)]
    plan = chance.sample([0] * 10 + in_writes, 20)
    died = []
    for number in plan:
        died.append(kill_in_write(lives, config, argv, number) if number else kill_in_time(lives, config, argv, chance))
        assert newest(config) < config.steps
    lives.complete(*argv)
    print(f"{precision}: {len(died)} kills, {len(died) + 1} lives:", *died, sep="\n  ")
    assert_same_run(whole, config)


def test_killing_two_processes_changes_nothing(lives, few_images, tmp_path):
    options = {"data": few_images, "steps": 8, "sample_every": 0}
    whole = make_run(lives, tmp_path / "whole", processes=2, **options)
    config = make_recipe(tmp_path / "killed" / "run", **CHANCY | options)
    argv = [write_config(config), "--resume"]
    ranks = lives.start_ranks(2, *argv, die_in="manifest.json")  # rank 0 kills itself
    assert ranks[0].wait() == -signal.SIGKILL, ranks[0].errors
    ranks[1].signal(signal.SIGKILL)
    ranks[1].wait()
    ranks = lives.start_ranks(2, *argv)  # both are killed
    while newest(config) < 2:
        ranks[0].assert_alive()
        time.sleep(0.001)
    for life in ranks:
        life.signal(signal.SIGKILL)
    assert [life.wait() for life in ranks] == [-signal.SIGKILL] * 2
    lives.complete(*argv, processes=2)
    assert_same_run(whole, config)


# ---------------------------------------------------------------- the worst moments

STEPS = 4
MOMENTS = {
    "the config": "config.yaml",
    "the metrics": "metrics.jsonl",
    "a snapshot": "rename ema/.step-00000004.new",
    "the last checkpoint": "rename checkpoints/.step-00000004.new",
    "the last pipeline": "save_file .pipeline.new",
    "the exchange of the pipelines": "rename .pipeline.new",
    "a grid": "replace samples/.step-00000004.png.new",
    "the other grid": "replace samples/.step-00000004-raw.png.new",
}
"""What is being written -> the write that the second life of a run does not survive."""


@pytest.fixture(scope="module")
def whole(lives, few_images, tmp_path_factory) -> TrainConfig:
    return make_run(lives, tmp_path_factory.mktemp("whole"), data=few_images, steps=STEPS, sample_every=STEPS)


@pytest.fixture(scope="module")
def begun(lives, few_images, tmp_path_factory) -> TrainConfig:
    """A run killed when it had saved step 2 of 4."""
    folder = tmp_path_factory.mktemp("begun")
    config = make_recipe(folder / "run", **CHANCY | {"data": few_images, "steps": STEPS, "sample_every": STEPS})
    life = lives.start(write_config(config), die_in="ema/.step-00000004.new")
    assert life.wait() == -signal.SIGKILL, life.errors
    return config


def copy_of(config: TrainConfig, folder: Path) -> TrainConfig:
    shutil.copytree(config.output_dir, folder / "run")
    return config.replace(output_dir=str(folder / "run"))


@pytest.fixture
def killed(request, lives, begun, tmp_path) -> TrainConfig:
    """The begun run, resumed and killed in a moment."""
    config = copy_of(begun, tmp_path)
    life = lives.start(write_config(config), "--resume", die_in=MOMENTS[request.param])
    assert life.wait() == -signal.SIGKILL, life.errors
    return config


@pytest.mark.parametrize("killed", MOMENTS, indirect=True)
def test_a_kill_at_the_worst_moment_changes_nothing(lives, killed, whole):
    lives.complete(write_config(killed), "--resume")
    assert_same_run(whole, killed)


@pytest.mark.parametrize("killed", ["the last pipeline", "the exchange of the pipelines"], indirect=True)
def test_after_a_kill_there_is_a_whole_pipeline(killed):
    """Between the two renames of an exchange it lies in `.pipeline.old`, until the run is resumed."""
    run = Path(killed.output_dir)
    folder = next(path for path in (run / "pipeline", run / ".pipeline.old") if path.exists())
    assert load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def test_resuming_a_finished_run_changes_nothing(lives, whole, tmp_path):
    config = copy_of(whole, tmp_path)
    lives.complete(write_config(config), "--resume")
    assert_same_run(whole, config)
