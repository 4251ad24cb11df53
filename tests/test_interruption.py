"""A run that is asked to stop saves, says so, and can go on as if it had never stopped."""

import operator
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext

import psutil
import pytest
from lives import Life
from runs import NETWORK, REPO, assert_same, final_state, loss_curve, make_recipe, write_config

from ddpm_pipe import DDPMPipeline
from ddpm_pipe.run.checkpoint import Checkpoints
from ddpm_pipe.run.folder import Run
from ddpm_pipe.training.config import TrainConfig
from ddpm_pipe.training.interruption import Interrupted, Interruption
from ddpm_pipe.training.log import Log
from ddpm_pipe.training.loop import train
from ddpm_pipe.training.validation import Validation

BOTH, name_of = [signal.SIGTERM, signal.SIGINT], operator.attrgetter("name")


def wait_for_step(config: TrainConfig, step: int, life: Life) -> None:
    while not any(entry["step"] >= step for entry in Run(config.output_dir).read_metrics()):
        life.assert_alive()
        time.sleep(0.001)


# ---------------------------------------------------------------- real processes

CHANCY = {
    "unet": NETWORK | {"dropout": 0.1, "self_condition": True},
    "class_conditional": True,
    "steps": 40,
    "lr_schedule": "cosine",
    "save_every": 1000,
    "log_every": 1,
    "sample_every": 0,
}


@pytest.fixture(scope="module")
def whole(lives, few_images, tmp_path_factory) -> TrainConfig:
    config = make_recipe(tmp_path_factory.mktemp("whole") / "run", data=few_images, **CHANCY)
    lives.complete(write_config(config))
    return config


@pytest.mark.slow
@pytest.mark.parametrize("number", BOTH, ids=name_of)
def test_a_signal_stops_a_run_that_then_goes_on_to_the_same_end(lives, few_images, whole, tmp_path, number):
    config = make_recipe(tmp_path / "run", data=few_images, **CHANCY)
    life = lives.start(write_config(config))
    wait_for_step(config, 3, life)
    life.signal(number)
    assert life.wait() == 75, "EX_TEMPFAIL of sysexits.h"
    assert "Traceback" not in life.errors

    (step,) = Checkpoints(Run(tmp_path / "run")).steps()
    assert 3 <= step < config.steps
    assert life.output.splitlines()[-1] == f"stopped at step {step}; resume with --resume."
    assert life.output.count("stopped") == 1
    assert Checkpoints(Run(tmp_path / "run")).load()[0] == step
    assert loss_curve(config) == loss_curve(whole)[:step], "nothing was trained that was not saved"

    lives.complete(write_config(config), "--resume")
    assert_same(final_state(whole), final_state(config))
    assert loss_curve(config) == loss_curve(whole)


@pytest.mark.slow
@pytest.mark.parametrize("first", BOTH, ids=name_of)
@pytest.mark.parametrize("second", BOTH, ids=name_of)
def test_a_second_signal_ends_a_long_step_at_once(lives, few_images, tmp_path, first, second):
    options = {"batch_size": 10_000, "gradient_accumulation_steps": 10_000}  # a step of minutes
    config = make_recipe(tmp_path / "run", data=few_images, **options)
    life = lives.start(write_config(config))
    while not (tmp_path / "run" / "metrics.jsonl").exists():  # the last thing before the first step
        life.assert_alive()
        time.sleep(0.001)
    time.sleep(0.5)
    life.signal(first)
    time.sleep(0.1)
    life.signal(second)
    assert life.wait(timeout=20) == -second


@pytest.mark.slow
@pytest.mark.parametrize("asked", [0, 1])
def test_two_processes_stop_together_when_one_is_asked(lives, few_images, tmp_path, asked):
    config = make_recipe(tmp_path / "run", data=few_images, **CHANCY | {"steps": 400, "log_every": 3})
    ranks = lives.start_ranks(2, write_config(config))
    wait_for_step(config, 3, ranks[0])
    ranks[asked].signal(signal.SIGTERM)
    assert [life.wait() for life in ranks] == [75, 75], ranks[0].errors
    (step,) = Checkpoints(Run(tmp_path / "run")).steps()
    assert step % 3 == 0, "they ask each other when they log"
    assert [life.output.count(f"stopped at step {step}") for life in ranks] == [1, 0]


@pytest.mark.slow
def test_what_the_tracker_was_given_before_the_stop_is_on_disk(lives, few_images, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = make_recipe(tmp_path / "run", data=few_images, **CHANCY | {"tracker": "tensorboard"})
    life = lives.start(write_config(config))
    wait_for_step(config, 3, life)
    life.signal(signal.SIGTERM)
    assert life.wait() == 75
    events = EventAccumulator(str(tmp_path / "run" / "logs")).Reload()
    (step,) = Checkpoints(Run(tmp_path / "run")).steps()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, step + 1))


# ---------------------------------------------------------------- under a launcher

ACCELERATE = ["accelerate.commands.launch"]
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "1"]


def trainers(launcher: subprocess.Popen) -> list[psutil.Process]:
    """The processes under a launcher that train."""
    below = psutil.Process(launcher.pid).children(recursive=True)
    return [process for process in below if "examples/train.py" in process.cmdline()]


def ended(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "whom", "number", "code"),
    [
        (ACCELERATE, "the launcher", signal.SIGTERM, -signal.SIGTERM),
        (ACCELERATE, "the launcher", signal.SIGKILL, -signal.SIGKILL),
        (ACCELERATE, "the trainer", signal.SIGTERM, 1),
        (TORCHRUN, "the launcher", signal.SIGTERM, 1),
        (TORCHRUN, "the launcher", signal.SIGKILL, -signal.SIGKILL),
        (TORCHRUN, "the trainer", signal.SIGTERM, 1),
    ],
)
def test_a_run_whose_launcher_or_trainer_is_asked_to_stop_saves_and_ends(
    lives, few_images, whole, tmp_path, command, whom, number, code
):
    config = make_recipe(tmp_path / "run", data=few_images, **CHANCY)
    argv = [sys.executable, "-m", *command, "examples/train.py", write_config(config)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (tmp_path / "output").open("w") as output:
        launcher = subprocess.Popen(argv, cwd=REPO, env=environment, stdout=output, stderr=output)
        while not any(entry["step"] >= 3 for entry in Run(config.output_dir).read_metrics()):
            assert launcher.poll() is None, (tmp_path / "output").read_text()
            time.sleep(0.001)
        (trainer,) = trainers(launcher)
        (launcher if whom == "the launcher" else trainer).send_signal(number)
        assert launcher.wait(timeout=60) == code
    end = time.monotonic() + 60
    while not ended(trainer):
        assert time.monotonic() < end, "nobody is left to end it"
        time.sleep(0.01)
    (step,) = Checkpoints(Run(tmp_path / "run")).steps()
    assert 3 <= step < config.steps
    assert f"stopped at step {step}; resume with --resume." in (tmp_path / "output").read_text()
    lives.complete(write_config(config), "--resume")
    assert_same(final_state(whole), final_state(config))


@pytest.mark.slow
def test_two_processes_end_with_their_launcher(few_images, tmp_path):
    config = make_recipe(tmp_path / "run", data=few_images, **CHANCY | {"steps": 400, "log_every": 3})
    argv = [sys.executable, "-m", *TORCHRUN[:-1], "2", "examples/train.py", write_config(config)]
    launcher = subprocess.Popen(argv, cwd=REPO, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while not Run(config.output_dir).read_metrics():
        assert launcher.poll() is None
        time.sleep(0.001)
    processes = trainers(launcher)
    launcher.kill()
    launcher.wait()
    end = time.monotonic() + 60
    while not all(ended(process) for process in processes):
        assert time.monotonic() < end, "nobody is left to end them"
        time.sleep(0.01)
    (step,) = Checkpoints(Run(tmp_path / "run")).steps()
    assert len(processes) == 2 and step % 3 == 0


# ---------------------------------------------------------------- in this process


def handlers() -> list:
    return [signal.getsignal(number) for number in BOTH]


@pytest.mark.parametrize("number", BOTH, ids=name_of)
def test_the_first_signal_is_only_noted(number):
    with Interruption() as interruption:
        assert not interruption.requested
        signal.raise_signal(number)
        assert interruption.requested


def test_the_second_signal_gets_its_usual_answer():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a shell ignores it
    try:
        with Interruption(), pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_handlers_of_others_come_back():
    before = handlers()
    with pytest.raises(RuntimeError), Interruption():
        assert handlers() != before
        raise RuntimeError
    assert handlers() == before


def test_outside_the_main_thread_signals_are_left_alone():
    before, seen = handlers(), []

    def use():
        with Interruption() as interruption:
            seen.append((handlers(), interruption.requested))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert seen == [(before, False)]
    assert handlers() == before


def test_a_run_outside_the_main_thread_comes_to_its_end(recipe):
    config, done = recipe(steps=2, sample_every=0), []
    thread = threading.Thread(target=lambda: done.append(train(config)))
    thread.start()
    thread.join()
    assert done == [Run(config.output_dir).pipeline]


@pytest.mark.parametrize(("at", "stops"), [(3, True), (6, False)])
def test_a_run_asked_to_stop_in_its_last_step_is_a_finished_run(recipe, monkeypatch, at, stops):
    write = Log.write

    def ask(log, step, *rest, **values):
        write(log, step, *rest, **values)
        if step == at:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Log, "write", ask)
    config = recipe(steps=6, sample_every=0)
    with pytest.raises(Interrupted) if stops else nullcontext():
        train(config)
    run = Run(config.output_dir)
    assert run.steps(run.checkpoints) == [at]
    weights = DDPMPipeline.from_pretrained(run.pipeline).unet.state_dict()
    assert_same(weights, Checkpoints(run).load()[1]["ema"])


def test_a_signal_while_grids_are_drawn_stops_a_resumed_run_after_a_step(recipe, monkeypatch):
    train(recipe(steps=2, sample_every=0))

    def show(validation, state, step):
        if step == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Validation, "show", show)
    config = recipe(steps=6, sample_every=0, resume=True)
    with pytest.raises(Interrupted):
        train(config)
    assert Checkpoints(Run(config.output_dir)).steps() == [2, 3]
