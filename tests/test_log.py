"""What is seen of a run: losses by timestep, metrics.jsonl, the report, grids and the loss on images held out."""

import dataclasses
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import one_sentence
from PIL import Image
from runs import NETWORK, assert_same, final_state, loss_curve
from safetensors.torch import load_file

from ddpm_pipe import DDPMPipeline
from ddpm_pipe.data.memory import ImageData
from ddpm_pipe.objective import Objective
from ddpm_pipe.run.folder import Run
from ddpm_pipe.training.config import TrainConfig
from ddpm_pipe.training.launcher import make_accelerator
from ddpm_pipe.training.log import TIMESTEP_BINS, Log, mean_by_timestep, named_means
from ddpm_pipe.training.loop import load_training_images, train
from ddpm_pipe.training.recipe import make_scheduler, make_unet
from ddpm_pipe.training.report import write_report
from ddpm_pipe.training.tracking import choose_tracker
from ddpm_pipe.training.validation import held_out_sums, samples_of

# ---------------------------------------------------------------- losses by timestep


def test_equal_ranges_of_timesteps_have_their_mean_loss():
    t = torch.arange(1000)
    means = named_means("loss", mean_by_timestep(t, t.float(), 1000))  # the loss of t is t
    assert means["loss"] == 499.5
    assert [means[f"loss/t_{i}0%"] for i in range(TIMESTEP_BINS)] == [100 * i + 49.5 for i in range(TIMESTEP_BINS)]
    assert len(means) == 1 + TIMESTEP_BINS


@pytest.mark.parametrize("steps", [1, 4, 7, 15, 1000])
def test_every_timestep_of_any_chain_has_its_range(steps):
    sums = mean_by_timestep(torch.arange(steps), torch.ones(steps), steps)
    assert sums[0].sum() == sums[1].sum() == steps
    assert sums[1].max() - sums[1].min() <= 1, "equal ranges"


def test_the_mean_is_over_images_not_over_ranges():
    t, losses = torch.tensor([0, 0, 0, 999]), torch.tensor([1.0, 1.0, 1.0, 5.0])
    assert named_means("x", mean_by_timestep(t, losses, 1000)) == {"x": 2.0, "x/t_00%": 1.0, "x/t_90%": 5.0}


def test_the_parts_of_a_batch_sum_to_the_whole():
    drawn = torch.Generator().manual_seed(0)
    t, losses = torch.randint(50, (64,), generator=drawn), torch.rand(64, generator=drawn)
    parts = sum(mean_by_timestep(t[rows], losses[rows], 50) for rows in torch.arange(64).split(13))
    torch.testing.assert_close(parts, mean_by_timestep(t, losses, 50), rtol=1e-14, atol=0)


# ---------------------------------------------------------------- metrics.jsonl


@pytest.fixture
def log(recipe, tmp_path):
    """A log of a run of 10 steps of 8 images and 20 timesteps, every 4 steps."""
    (tmp_path / "run").mkdir()
    return log_from(0, recipe(steps=10, log_every=4))


def log_from(step: int, config: TrainConfig) -> Log:
    """The log of a run that begins after `step`."""
    return Log(config, Accelerator(cpu=True), Run(config.output_dir), step)


def write_steps(log: Log, steps: range, **values: float) -> None:
    """Two accumulation steps of two images each; the loss of every image is the step."""
    for step in steps:
        seen = [(torch.tensor([0, 19]), torch.full((2,), float(step))) for _ in range(2)]
        log.write(step, seen, **values)


def test_an_entry_has_the_mean_since_the_one_before_it_and_the_last_step_has_one(log):
    write_steps(log, range(1, 11), learning_rate=0.5)
    assert loss_curve(log.config) == [(4, 2.5), (8, 6.5), (10, 9.5)]
    for entry in log.run.read_metrics():
        assert entry["loss/t_00%"] == entry["loss/t_90%"] == entry["loss"]
        assert entry["learning_rate"] == 0.5


def test_the_speed_is_in_images_of_the_whole_batch(log, monkeypatch):
    monkeypatch.setattr("time.perf_counter", lambda: log.since[0] + 2.0)
    write_steps(log, range(1, 5))
    (entry,) = log.run.read_metrics()
    assert entry["images_per_second"] == 4 * 8 / 2


def test_the_bar_of_a_resumed_run_counts_the_speed_of_its_own_steps(log):
    bar = log_from(9, log.config).bar
    assert (bar.n, bar.initial, bar.total) == (9, 9, 10)


def test_a_resumed_log_drops_what_came_later(log):
    write_steps(log, range(1, 11))
    resumed = log_from(9, log.config)
    assert [step for step, _ in loss_curve(log.config)] == [4, 8]
    write_steps(resumed, range(10, 11))
    assert loss_curve(log.config) == [(4, 2.5), (8, 6.5), (10, 10.0)]


def test_a_last_line_cut_short_is_left_out(log):
    write_steps(log, range(1, 11))
    file = log.run.metrics
    file.write_text(file.read_text()[:-20])
    assert [entry["step"] for entry in log.run.read_metrics()] == [4, 8]
    log_from(10, log.config).record(11, {"loss": 1.0})
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [4, 8, 11]


def test_a_run_without_metrics_has_no_entries(tmp_path):
    assert Run(tmp_path).read_metrics() == []


def shown(run: Path) -> dict[str, str | bytes]:
    """Metrics without the speed, and grids, of a run."""
    entries = [{k: v for k, v in entry.items() if k != "images_per_second"} for entry in Run(run).read_metrics()]
    return {"metrics": json.dumps(entries)} | {path.name: path.read_bytes() for path in (run / "samples").iterdir()}


@pytest.mark.parametrize("left_out", ["everything", "the grids", "the raw grid"])
def test_what_a_kill_after_a_checkpoint_left_out_is_shown_when_the_run_is_resumed(recipe, left_out):
    config = recipe(steps=4, save_every=2, sample_every=2, holdout=10)
    run = train(config).parent
    before = shown(run)
    for path in (run / "samples").glob("step-00000004*"):
        if left_out != "the raw grid" or "raw" in path.name:
            path.unlink()
    if left_out == "everything":
        lines = Run(run).metrics.read_text().splitlines(keepends=True)
        (first,) = [i for i, line in enumerate(lines) if "held_out_loss" in line and json.loads(line)["step"] == 4]
        Run(run).metrics.write_text("".join(lines[:first]))
    assert shown(run) != before
    train(config.replace(resume=True))
    assert shown(run) == before


def test_what_was_shown_of_steps_that_are_trained_again_is_shown_again_and_once(recipe):
    config = recipe(steps=4, save_every=2, sample_every=2, log_every=1, holdout=10)
    run = train(config).parent
    before = shown(run)
    shutil.rmtree(Run(run).checkpoint(4))
    Run(run).grids(4)["average"].write_bytes(b"of another life")
    (run / "samples" / "step-by-step.png").write_bytes(b"of the user")
    train(config.replace(resume=True))
    assert shown(run) == before | {"step-by-step.png": b"of the user"}


@pytest.mark.parametrize("cause", ["no memory", "no folder"])
def test_a_grid_that_cannot_be_drawn_is_told_and_harms_nothing(recipe, capsys, cause):
    chancy = {"unet": NETWORK | {"dropout": 0.2}, "steps": 4, "save_every": 2, "sample_every": 2, "holdout": 10}
    undisturbed, config = recipe("undisturbed", **chancy), recipe("run", **chancy)
    train(undisturbed)
    if cause == "no memory":
        config = config.replace(num_samples=10**12)
    else:
        Path(config.output_dir).mkdir()
        (Path(config.output_dir) / "samples").write_text("not a folder")
    capsys.readouterr()
    train(config)
    told = [line for line in capsys.readouterr().out.splitlines() if "could not be drawn" in line]
    assert [line.split(" (")[0] for line in told] == [
        f"the samples of step {step} could not be drawn" for step in (2, 4)
    ]
    assert_same(final_state(undisturbed), final_state(config))
    assert [entry["step"] for entry in Run(config.output_dir).read_metrics() if "held_out_loss" in entry] == [2, 4]


# ---------------------------------------------------------------- the report


@pytest.fixture(scope="module")
def metrics() -> list[dict]:
    """Entries with all that a report draws."""
    entries = []
    for step in range(10, 110, 10):
        losses = dict.fromkeys(("loss", "loss/t_00%", "loss/t_90%", "gradient_norm"), 1 / step)
        entries.append({"step": step, "learning_rate": 1e-4, "images_per_second": 100.0 + step} | losses)
        entries.append({"step": step, "held_out_loss": 2 / step, "held_out_loss/t_50%": 2 / step})
    return entries


SKIPPED = {"step": 110, "loss": None, "gradient_norm": None}


@pytest.mark.parametrize("of", ["all", "nothing held out", "a single entry", "a skipped step"])
def test_a_report_is_drawn_of_whatever_was_logged(tmp_path, metrics, of):
    entries = {
        "all": metrics,
        "nothing held out": [entry for entry in metrics if "loss" in entry],
        "a single entry": metrics[:1],
        "a skipped step": [*metrics, metrics[0] | SKIPPED],
    }[of]
    Run(tmp_path).metrics.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    with Image.open(write_report(Run(tmp_path))) as picture:
        assert picture.width >= 1000 and picture.height >= 600


def test_a_report_without_metrics_is_one_sentence(tmp_path):
    with one_sentence("has no metrics to draw a report from."):
        write_report(Run(tmp_path))


# ---------------------------------------------------------------- grids and images held out


@pytest.fixture
def finished(recipe):
    """A run with images held out, labels and an average unlike the raw weights; its config and folder."""
    config = recipe(steps=6, log_every=1, sample_every=3, holdout=20, class_conditional=True, ema_power=0.3)
    return config, train(config).parent


def health_of(config, unet):
    """The loss of a network on the images held out."""
    accelerator = make_accelerator(config)
    _, held_out = load_training_images(config, accelerator)
    sums = held_out_sums(config, unet, Objective(make_scheduler(config)), held_out, accelerator.device)
    return named_means("held_out_loss", sums)


def test_the_logged_held_out_loss_is_that_of_the_saved_average(finished):
    config, run = finished
    logged = [entry for entry in Run(run).read_metrics() if "held_out_loss" in entry]
    assert [entry["step"] for entry in logged] == [3, 6]
    again = health_of(config, DDPMPipeline.from_pretrained(run / "pipeline").unet)
    assert logged[-1] == {"step": 6} | again
    assert any(name.startswith("held_out_loss/t_") for name in again)


def test_the_grids_show_the_average_and_the_raw_network(finished):
    config, run = finished
    saved = {name: Image.open(run / "samples" / name) for name in ("step-00000006.png", "step-00000006-raw.png")}
    average, raw = saved.values()
    assert average.tobytes() != raw.tobytes()
    pipeline = DDPMPipeline.from_pretrained(run / "pipeline")
    assert samples_of(config, pipeline).grid().tobytes() == average.tobytes()
    pipeline.unet.load_state_dict(load_file(max((run / "checkpoints").iterdir()) / "unet.safetensors"))
    assert samples_of(config, pipeline).grid().tobytes() == raw.tobytes()
    assert len(list((run / "samples").iterdir())) == 4


@pytest.fixture
def small(recipe):
    """A config, an untrained network and 30 grey images of noise, 12 of them held out."""
    config = recipe()
    pixels = torch.randint(256, (30, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    data = ImageData(pixels, torch.arange(30))
    unet = make_unet(config, data).eval()
    torch.nn.init.normal_(unet.conv_out.weight)  # which is zero, so that every image has the same loss
    return config, unet, data


def loss_of(config, unet, data) -> dict[str, float]:
    _, held_out = data.hold_out(12, config.seed)
    sums = held_out_sums(config, unet, Objective(make_scheduler(config)), held_out, torch.device("cpu"))
    return named_means("held_out_loss", sums)


def test_the_held_out_loss_is_the_same_number_twice(small):
    first = loss_of(*small)
    torch.rand(1)
    assert loss_of(*small) == first


def test_the_held_out_loss_depends_on_the_held_out_images_alone(small):
    config, unet, data = small
    first = loss_of(config, unet, data)
    trained, held_out = data.hold_out(12, config.seed)

    def without(rows: torch.Tensor) -> ImageData:
        return dataclasses.replace(data, images=data.images.index_fill(0, rows, 0))

    assert loss_of(config, unet, without(trained.rows)) == first
    assert loss_of(config, unet, without(held_out.rows[:1])) != first


def test_the_held_out_loss_is_the_mean_of_its_ranges(small):
    losses = loss_of(*small)
    ranges = [value for name, value in losses.items() if "/" in name]
    assert 1 < len(ranges) <= TIMESTEP_BINS
    assert min(ranges) < losses["held_out_loss"] < max(ranges)


# ---------------------------------------------------------------- trackers


def test_tensorboard_shows_loss_rate_speed_and_grids(recipe):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = recipe(tracker="tensorboard", sample_every=3, log_every=2, lr_warmup_steps=4)
    run = Run(train(config).parent)
    events = EventAccumulator(str(run.folder / "logs")).Reload()
    assert {"loss", "learning_rate", "images_per_second"} <= set(events.Tags()["scalars"])
    rates = [(event.step, event.value) for event in events.Scalars("learning_rate")]
    assert rates == [(2, pytest.approx(1e-3)), (4, pytest.approx(2e-3)), (6, pytest.approx(2e-3))]
    assert set(events.Tags()["images"]) == {"average", "raw"}
    assert [event.step for event in events.Images("raw")] == [3, 6]
    with Image.open(run.grids(6)["average"]) as grid:
        shown = events.Images("average")[-1]
        assert (shown.width, shown.height) == grid.size


def tracked(tracker: str, folder: Path, **environment: str) -> Run:
    """A run with a tracker in a process of its own, which asks nothing of the network."""
    pytest.importorskip(tracker)
    command = [sys.executable, str(Path(__file__).with_name("tracked_run.py")), tracker, str(folder / "run")]
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(command, cwd=folder, env=offline, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "[]" in done.stdout.splitlines(), "addresses of the network"
    return Run(folder / "run")


def assert_shows(picture: Path, run: Run, step: int, name: str) -> None:
    """The picture is the grid of this name that the run drew at a step."""
    with Image.open(picture) as shown, Image.open(run.grids(step)[name]) as grid:
        assert shown.convert("RGB").tobytes() == grid.convert("RGB").tobytes()


@pytest.mark.slow
def test_wandb_offline_keeps_losses_and_grids(tmp_path):
    run = tracked("wandb", tmp_path, WANDB_MODE="offline")
    (folder,) = (run.folder / "logs" / "wandb").glob("offline-run-*")
    (record,) = folder.glob("run-*.wandb")
    logged = record.read_bytes()
    assert b"ddpm_pipe" in logged
    for name in ("loss", "held_out_loss", "gradient_norm"):
        values = [entry[name] for entry in run.read_metrics() if name in entry]
        assert len(values) >= 2 and all(json.dumps(value).encode() in logged for value in values), name
    for step in (3, 6):
        for name in ("average", "raw"):
            (picture,) = (folder / "files" / "media" / "images").glob(f"{name}_{step}_*.png")
            assert_shows(picture, run, step, name)


@pytest.mark.slow
def test_trackio_keeps_losses_and_grids(tmp_path):
    run = tracked("trackio", tmp_path, TRACKIO_DIR=str(tmp_path / "trackio"))
    with closing(sqlite3.connect(tmp_path / "trackio" / "ddpm_pipe.db")) as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert {name for name, _, _ in rows} == {"run"}
    logged = [{"step": step} | json.loads(values) for _, step, values in rows]
    pictures = [entry for entry in logged if "average" in entry]
    assert [entry for entry in logged if entry not in pictures] == run.read_metrics()
    assert [entry["step"] for entry in pictures] == [3, 6]
    for entry in pictures:
        for name in ("average", "raw"):
            file = tmp_path / "trackio" / "media" / entry[name]["file_path"]
            assert_shows(file, run, entry["step"], name)


def test_a_tracker_that_is_not_installed_is_one_sentence(monkeypatch):
    assert choose_tracker("none") is None
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    assert choose_tracker("auto") is None
    with one_sentence("tracker='trackio' is not installed", "pip install trackio"):
        choose_tracker("trackio")
