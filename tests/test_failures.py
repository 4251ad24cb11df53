"""What goes wrong in a run ends in one sentence or is got over, and nothing that was saved is lost."""

import errno
import itertools
import json
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import one_sentence
from lives import Life
from runs import NETWORK, STOCK, assert_same, final_state, make_recipe, write_config
from safetensors.torch import load_file

from ddpm_pipe.objective import Objective
from ddpm_pipe.run.checkpoint import Checkpoints
from ddpm_pipe.run.files import CheckpointError
from ddpm_pipe.run.folder import Run
from ddpm_pipe.training.config import TrainConfig
from ddpm_pipe.training.loop import train
from ddpm_pipe.training.state import TrainState

CHANCY = {
    "unet": NETWORK | {"dropout": 0.1, "self_condition": True},
    "class_conditional": True,
    "steps": 20,
    "save_every": 2,
    "log_every": 1,
    "sample_every": 0,
}


@pytest.fixture(scope="module")
def whole(lives, few_images, tmp_path_factory) -> TrainConfig:
    """A run that nothing happened to."""
    config = make_recipe(tmp_path_factory.mktemp("whole") / "run", data=few_images, **CHANCY)
    lives.complete(write_config(config))
    return config


@pytest.fixture(scope="module")
def begun(lives, few_images, tmp_path_factory) -> TrainConfig:
    """The same run, which has saved step 4."""
    config = make_recipe(tmp_path_factory.mktemp("begun") / "run", data=few_images, **CHANCY)
    life = lives.start(write_config(config), die_in="ema/.step-00000006.new")
    assert life.wait() == -signal.SIGKILL, life.errors
    assert Checkpoints(Run(config.output_dir)).steps() == [2, 4]
    return config


def copy_of(config: TrainConfig, folder: Path, **changes) -> TrainConfig:
    shutil.copytree(config.output_dir, folder / "run")
    return config.replace(output_dir=str(folder / "run"), **changes)


def sentence(life: Life) -> str:
    """The one line that a process had to say at its end."""
    assert life.wait() == 2, life.errors
    assert "Traceback" not in life.errors
    lines = [line for line in re.split(r"[\r\n]+", life.errors) if line.strip()]
    (start,) = [i for i, line in enumerate(lines) if "ddpm-pipe train: " in line]
    assert not [line for line in lines[start + 1 :] if "step/s" not in line], "more than one line"
    return lines[start].split("ddpm-pipe train: ")[1]


def assert_goes_on_to_the_same_end(lives, config: TrainConfig, whole: TrainConfig) -> None:
    lives.complete(write_config(config), "--resume")
    assert_same(final_state(whole), final_state(config))


# ---------------------------------------------------------------- the disk


def mount(*argv: str) -> None:
    done = subprocess.run(["mount", *argv], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path):
    """A disk of its own of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder))
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path) -> None:
    with (disk / "others").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC


@pytest.mark.slow
@pytest.mark.parametrize("what", ["save_every", "log_every", "sample_every"])
def test_a_full_disk_is_one_sentence_and_the_run_can_go_on(lives, begun, whole, small_disk, what):
    config = copy_of(begun, small_disk)
    rare = {"save_every": 20, "log_every": 20, "sample_every": 0}
    eager = config.replace(**rare | {what: 1})
    life = lives.start(write_config(eager), "--resume", die_in="metrics.jsonl")
    assert life.wait() == -signal.SIGKILL, "there is room for its config and metrics"
    fill(small_disk)
    life = lives.start(str(small_disk / "run.yaml"), "--resume")
    assert "No space left" in sentence(life)
    assert Checkpoints(Run(config.output_dir)).load()[0] == 4
    (small_disk / "others").unlink()
    assert_goes_on_to_the_same_end(lives, config, whole)


@pytest.mark.slow
def test_a_file_that_cannot_grow_is_one_sentence_and_the_run_can_go_on(lives, begun, whole, tmp_path):
    config = copy_of(begun, tmp_path)
    told = sentence(lives.start(write_config(config), "--resume", limit=250_000))  # state.pt alone is larger
    assert re.fullmatch(r".*/step-00000006 could not be written \(.*\); what was saved before is intact\.", told)
    assert Checkpoints(Run(config.output_dir)).load()[0] == 4
    assert not list(Path(config.output_dir).glob("**/.*")), "nothing half-written is left"
    assert_goes_on_to_the_same_end(lives, config, whole)


@pytest.mark.slow
def test_a_kill_between_two_renames_and_then_a_full_disk_leave_the_last_pipeline(lives, begun, whole, tmp_path):
    config = copy_of(begun, tmp_path)
    pipeline = Path(config.output_dir) / "pipeline"
    before = load_file(pipeline / "unet" / "diffusion_pytorch_model.safetensors")
    life = lives.start(write_config(config), "--resume", die_in="rename .pipeline.new")
    assert life.wait() == -signal.SIGKILL, life.errors
    assert not pipeline.exists()
    argv = [write_config(config), "--resume", "--ema_snapshot_every", "1000"]  # the pipeline is the first to be saved
    assert "/pipeline could not be written" in sentence(lives.start(*argv, limit=20_000))
    assert_same(before, load_file(pipeline / "unet" / "diffusion_pytorch_model.safetensors"))
    assert not list(Path(config.output_dir).glob("**/.*")), "nothing is left beside it"
    assert_goes_on_to_the_same_end(lives, config, whole)


@pytest.fixture
def lockable(tmp_path):
    """A folder, and how to make it read-only, for root too: by a mount over it, since a run keeps a file of it open."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def lock(how: str) -> None:
        if how == "rw":
            subprocess.run(["umount", "-l", str(folder)], check=True)
            return
        mount("--bind", str(folder), str(folder))
        while subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], capture_output=True).returncode:
            time.sleep(0.01)  # a file is just being written

    yield folder, lock
    subprocess.run(["umount", "-l", str(folder)], capture_output=True)


@pytest.mark.slow
def test_a_run_folder_that_became_read_only_is_one_sentence(lives, begun, whole, lockable, tmp_path):
    folder, lock = lockable
    config = copy_of(begun, folder)
    argv = [write_config(config), "--resume"]
    lock("ro")
    assert "Read-only file system" in sentence(lives.start(*argv))
    lock("rw")
    assert_goes_on_to_the_same_end(lives, config, whole)


@pytest.mark.slow
def test_a_folder_that_becomes_read_only_under_a_run_is_one_sentence(lives, begun, whole, lockable):
    folder, lock = lockable
    config = copy_of(begun, folder, steps=2000)
    life = lives.start(write_config(config), "--resume")
    while max(Checkpoints(Run(config.output_dir)).steps()) < 6:
        life.assert_alive()
        time.sleep(0.001)
    lock("ro")
    assert "Read-only file system" in sentence(life)
    assert Checkpoints(Run(config.output_dir)).load()[0] >= 6


def test_a_file_in_the_place_of_the_checkpoints_is_one_sentence(recipe):
    config = recipe(sample_every=0)
    Path(config.output_dir).mkdir()
    (Path(config.output_dir) / "checkpoints").write_text("not a folder")
    with one_sentence(match=r"checkpoints/step-00000006 could not be written"):
        train(config)


# ---------------------------------------------------------------- checkpoints that do not serve


@pytest.mark.slow
def test_a_broken_newest_checkpoint_is_reported_and_costs_only_time(lives, begun, whole, tmp_path):
    config = copy_of(begun, tmp_path)
    file = Run(tmp_path / "run").checkpoint(4) / "unet.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    life = lives.complete(write_config(config), "--resume")
    assert re.search(r"checkpoint .*step-00000004 is unreadable .*; taking the one before it", life.errors)
    assert_same(final_state(whole), final_state(config))


@pytest.mark.slow
def test_when_no_checkpoint_can_be_read_it_is_one_sentence(lives, begun, tmp_path):
    config = copy_of(begun, tmp_path)
    for step in (2, 4):
        (Run(tmp_path / "run").checkpoint(step) / "ema.safetensors").write_bytes(b"")
    life = lives.start(write_config(config), "--resume")
    assert life.wait() == 2 and "Traceback" not in life.errors
    assert life.errors.splitlines()[-1].startswith("ddpm-pipe train: none of the 2 checkpoints")


def test_a_new_checkpoint_outlives_a_broken_one_of_a_later_step(tmp_path):
    def save(step: int, keep_last: int) -> None:
        Checkpoints(Run(tmp_path), keep_last).save(step, {"unet": {"w": torch.full((2,), float(step))}}, {})

    save(10, keep_last=2)
    save(20, keep_last=2)
    (Run(tmp_path).checkpoint(20) / "unet.safetensors").write_bytes(b"")
    save(15, keep_last=1)  # the run went on from 10
    assert Checkpoints(Run(tmp_path)).load()[0] == 15


OTHERS = {
    "wider": ({"unet": NETWORK | {"block_out_channels": [8, 24]}}, "unet"),
    "deeper": ({"unet": NETWORK | {"layers_per_block": 2}}, "unet"),
    "stock": ({"unet": STOCK}, "unet"),
    "with classes": ({"class_conditional": True}, "class_conditional"),
    "another profile": ({"ema_sigma_rel": [0.05, 0.2]}, "ema_sigma_rel"),
    "other timesteps": ({"timestep_sampling": "loss_second_moment"}, "timestep"),
    "another optimizer": ({"optimizer": "muon"}, "optimizer"),
}


@pytest.mark.parametrize(("change", "names"), OTHERS.values(), ids=OTHERS.keys())
def test_a_checkpoint_of_another_kind_of_run_is_one_sentence(recipe, change, names, begun_small):
    before = {path: path.read_bytes() for path in begun_small.rglob("*") if path.is_file()}
    with one_sentence("the checkpoint of", "does not fit this config", names):
        train(recipe(begun_small, steps=4, sample_every=0, resume=True, **change))
    assert {path: path.read_bytes() for path in begun_small.rglob("*") if path.is_file()} == before


@pytest.fixture
def begun_small(recipe) -> Path:
    """A finished run of 2 steps, that may go on."""
    return train(recipe(steps=2, sample_every=0)).parent


# ---------------------------------------------------------------- numbers that are not finite


def spoil(monkeypatch, bad_steps, value=torch.nan, part=0, parts=1) -> None:
    """Multiply the noise of a part of the batch in some of the steps that are trained from now on."""
    calls, call = itertools.count(), Objective.__call__

    def spoiled(objective, unet, x0, t, eps, *rest, **conditions):
        bad = divmod(next(calls), parts) in [(step, part) for step in bad_steps]
        return call(objective, unet, x0, t, eps * value if bad else eps, *rest, **conditions)

    monkeypatch.setattr(Objective, "__call__", spoiled)


FINITE = {"sample_every": 0, "save_every": 1, "keep_last": 100, "log_every": 1}


@pytest.mark.parametrize(("value", "part"), [(torch.nan, 0), (torch.nan, 1), (torch.inf, 0)])
def test_a_step_without_a_finite_gradient_changes_no_weight_and_the_run_goes_on(recipe, monkeypatch, value, part):
    spoil(monkeypatch, {3}, value, part, parts=2)
    config = recipe(**FINITE, gradient_accumulation_steps=2)
    train(config)
    after = [final_state(config, step) for step in range(1, 7)]
    assert_same(after[2], after[3])  # three steps done, and four
    assert not torch.equal(after[3]["unet.conv_in.weight"], after[4]["unet.conv_in.weight"])
    assert all(tensor.isfinite().all() for tensor in after[-1].values())


def test_skipped_steps_are_counted(recipe, monkeypatch):
    spoil(monkeypatch, {1, 3, 4})
    config = recipe(**FINITE)
    train(config)
    assert [entry["skipped_steps"] for entry in Run(config.output_dir).read_metrics()] == [0, 1, 1, 2, 3, 3]


def test_skipped_steps_are_still_counted_after_resuming(recipe, monkeypatch):
    spoil(monkeypatch, {1, 4})
    train(recipe(**FINITE | {"steps": 3}))
    config = recipe(**FINITE, resume=True)
    train(config)
    assert [entry["skipped_steps"] for entry in Run(config.output_dir).read_metrics()] == [0, 1, 1, 1, 2, 2]


def test_metrics_of_a_skipped_step_are_json(recipe, monkeypatch):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    spoil(monkeypatch, {1})
    config = recipe(**FINITE | {"steps": 3})
    train(config)
    for line in Run(config.output_dir).metrics.read_text().splitlines():
        json.loads(line, parse_constant=refuse)


BAD = {"sample_every": 0, "save_every": 4, "max_bad_steps": 2}
STOPPED = ("2 steps in a row had no finite gradient", "what was saved before them is intact", "a lower learning_rate")


def test_a_run_that_diverges_stops_and_can_be_resumed_with_a_lower_learning_rate(recipe):
    config = recipe(**BAD, steps=4)
    train(config)
    before = final_state(config)
    longer = config.replace(steps=10, resume=True)
    with one_sentence(*STOPPED):
        train(longer.replace(learning_rate=1e30))
    assert Checkpoints(Run(config.output_dir)).load()[0] == 4
    assert_same(before, final_state(config))
    train(longer.replace(learning_rate=1e-4))
    after = final_state(config, 10)
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert not torch.equal(after["unet.conv_in.weight"], before["unet.conv_in.weight"])


def test_bad_steps_that_are_not_in_a_row_do_not_stop_a_run(recipe, monkeypatch):
    spoil(monkeypatch, {5, 7, 9})
    train(recipe(**BAD, steps=10))


def test_a_checkpoint_in_between_does_not_hide_that_bad_steps_are_in_a_row(recipe, monkeypatch):
    spoil(monkeypatch, range(5, 40))
    config = recipe(**BAD | {"save_every": 1}, steps=40)
    with one_sentence(*STOPPED):
        train(config)
    assert Checkpoints(Run(config.output_dir)).load()[0] == 6


def test_bad_steps_from_the_first_on_stop_the_run(recipe, monkeypatch):
    spoil(monkeypatch, range(40))
    with one_sentence(*STOPPED):
        train(recipe(**BAD, steps=40))


@pytest.mark.parametrize("sick", ["network", "average", "all"])
def test_weights_that_are_not_finite_are_never_written(recipe, monkeypatch, sick):
    step_of = TrainState.optimizer_step

    def optimizer_step(state, step, seen):
        step_of(state, step, seen)
        if step == 4 and sick != "all":
            module = state.average.module if sick == "average" else state.unet
            next(iter(module.parameters())).data.view(-1)[0] = torch.nan

    monkeypatch.setattr(TrainState, "optimizer_step", optimizer_step)
    if sick == "all":
        monkeypatch.setattr("ddpm_pipe.training.state.lr_at", lambda step, config: torch.inf if step == 4 else 1e-3)
    config = recipe(sample_every=0, save_every=2, steps=8)
    with pytest.raises(CheckpointError, match=r"weights at step 6 are not finite and were not saved"):
        train(config)
    run = Path(config.output_dir)
    assert Checkpoints(Run(run)).load()[0] == 4
    written = [tensor for path in run.rglob("*.safetensors") for tensor in load_file(path).values()]
    assert written and all(tensor.isfinite().all() for tensor in written)
    assert_same(load_file(run / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"), ema_of(config, 4))


def ema_of(config: TrainConfig, step: int) -> dict[str, torch.Tensor]:
    return load_file(Run(config.output_dir).checkpoint(step) / "ema.safetensors")
