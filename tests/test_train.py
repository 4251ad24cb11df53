"""The whole loop on real images and a small network: it learns, it saves, and it is the same run however it is cut."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from conftest import one_sentence
from PIL import Image
from runs import NETWORK, REPO, STOCK, assert_same, final_state, launch, loss_curve, write_config
from safetensors.torch import load_file

from ddpm_pipe import DDPMPipeline
from ddpm_pipe.run.checkpoint import Checkpoints
from ddpm_pipe.run.folder import Run
from ddpm_pipe.training.config import TrainConfig
from ddpm_pipe.training.loop import train


@pytest.mark.parametrize(
    ("unet", "options"),
    [
        (NETWORK, {}),
        (NETWORK | {"self_condition": True, "dropout": 0.1}, {"class_conditional": True, "guidance_scale": 2.0}),
        (NETWORK, {"prediction_type": "v_prediction", "loss_weight": "min_snr", "rescale_betas_zero_snr": True}),
        (STOCK, {"class_conditional": True, "loss": "huber", "flip": True, "channels": 3}),
        (NETWORK, {"gradient_checkpointing": True, "mixed_precision": "bf16", "channels_last": True}),
    ],
)
def test_a_run_leaves_a_pipeline_a_grid_and_its_config(recipe, unet, options):
    config = recipe(unet=unet, **options)
    folder = train(config)
    pipeline = DDPMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(2, torch.Generator().manual_seed(0), output_type="pt").images
    assert images.shape == (2, config.channels or 1, 8, 8) and images.isfinite().all()
    average = load_file(next(folder.parent.glob("checkpoints/*")) / "ema.safetensors")
    assert_same(pipeline.unet.state_dict(), average)
    columns, rows = (10, 1) if config.class_conditional else (4, 3)
    assert Image.open(folder.parent / "samples" / "step-00000006.png").size == (8 * columns, 8 * rows)
    assert yaml.safe_load((folder.parent / "config.yaml").read_text())["unet"] == unet


def test_the_network_learns(recipe):
    """The loss of the last steps is far below that of the first and below 1, the loss of answering zero."""
    config = recipe(steps=150, batch_size=32, learning_rate=4e-3, sample_every=0, log_every=5)
    train(config)
    losses = [loss for _, loss in loss_curve(config)]
    assert losses[0] > 0.8
    assert sum(losses[-4:]) / 4 < 0.5 * losses[0]


@pytest.mark.parametrize(("precision", "optimizer"), [("no", "adamw"), ("bf16", "adamw"), ("no", "muon")])
def test_a_resumed_run_ends_bit_for_bit_where_an_uninterrupted_one_does(recipe, precision, optimizer):
    config = recipe(
        unet=NETWORK | {"dropout": 0.2, "self_condition": True},
        class_conditional=True,
        gradient_accumulation_steps=2,
        flip=True,
        mixed_precision=precision,
        optimizer=optimizer,
        lr_schedule="cosine",
        save_every=2,
    )
    train(config)
    whole = final_state(config)
    shutil.rmtree(Run(config.output_dir).checkpoint(6))
    train(config.replace(resume=True))
    assert_same(whole, final_state(config))


def test_accumulation_does_not_change_the_run(recipe):
    whole, parts = recipe("whole"), recipe("parts", gradient_accumulation_steps=4)
    train(whole)
    train(parts)
    assert_same(final_state(whole), final_state(parts), rtol=1e-3, atol=2e-5)


@pytest.mark.slow
def test_two_processes_are_the_same_run_as_one(recipe):
    one, two = recipe("one"), recipe("two")
    train(one)
    done = launch(write_config(two), processes=2)
    assert done.returncode == 0, done.stderr
    assert "2 processes x 1 accumulation steps" in done.stdout
    assert_same(final_state(one), final_state(two), rtol=1e-3, atol=2e-5)


def assert_same_losses(first: TrainConfig, second: TrainConfig) -> None:
    torch.testing.assert_close(torch.tensor(loss_curve(first)), torch.tensor(loss_curve(second)), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("sampling", ["uniform", "loss_second_moment"])
def test_the_loss_curve_does_not_depend_on_processes_and_accumulation(lives, few_images, recipe, sampling):
    chain = {"num_train_timesteps": 4, "beta_schedule": "linear", "beta_end": 0.6, "timestep_sampling": sampling}
    options = {"data": few_images, "batch_size": 16, "steps": 16, "log_every": 1, "sample_every": 0, **chain}
    one, two = recipe("one", **options), recipe("two", **options)
    accumulated = recipe("accumulated", **options, gradient_accumulation_steps=2)
    for config, processes in ((one, 1), (two, 2), (accumulated, 1)):
        lives.complete(write_config(config), processes=processes)
    assert len(loss_curve(one)) == 16
    assert_same_losses(one, two)
    assert_same_losses(one, accumulated)
    if sampling == "loss_second_moment":
        history = [Checkpoints(Run(config.output_dir)).load()[2]["timesteps"] for config in (one, two, accumulated)]
        assert history[0]["counts"].min() > 10, "timesteps were drawn by their losses"
        for other in history[1:]:
            assert torch.equal(other["counts"], history[0]["counts"])
            torch.testing.assert_close(other["losses"], history[0]["losses"], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_a_run_may_go_on_with_another_number_of_processes(lives, few_images, recipe, first, then):
    options = {"data": few_images, "log_every": 1, "save_every": 3, "sample_every": 0, "class_conditional": True}
    whole, moved = recipe("whole", **options), recipe("run", **options)
    train(whole)
    ranks = lives.start_ranks(first, write_config(moved), die_in="checkpoints/.step-00000006.new")
    assert ranks[0].wait() == -signal.SIGKILL, ranks[0].errors
    for life in ranks[1:]:
        life.signal(signal.SIGKILL)
        life.wait()
    lives.complete(write_config(moved), "--resume", processes=then)
    assert_same_losses(whole, moved)
    assert_same(final_state(whole), final_state(moved), rtol=1e-3, atol=2e-5)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_another_run_is_never_overwritten_in_silence(recipe):
    run = train(recipe(steps=2)).parent
    before = contents(run)
    with one_sentence("holds a run; pass --resume, --overwrite or another folder."):
        train(recipe(steps=2))
    with one_sentence("split='dev' could not be read"):
        train(recipe(steps=1, overwrite=True, split="dev"))
    assert contents(run) == before, "what cannot replace a run does not delete it"


def test_overwriting_deletes_all_that_the_folder_of_a_run_holds(recipe):
    run = train(recipe(steps=2)).parent
    others = ["notes.txt", "evaluation.json", "ema-0.05/model_index.json", ".pipeline.old/model_index.json"]
    for name in others:
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("")
    train(recipe(steps=1, overwrite=True))
    assert not set(others) & set(contents(run))
    assert [Run.steps(run / part) for part in ("checkpoints", "ema", "samples")] == [[1]] * 3


def test_overwriting_what_is_not_there_yet_trains(recipe):
    with one_sentence("split='dev' could not be read"):
        train(recipe(steps=1, overwrite=True, split="dev"))
    assert train(recipe(steps=1, overwrite=True)).is_dir(), "also where a first attempt failed"


NO_RUN = {"samples/holiday.png": "", "logs/access.log": "", "config.yaml": "model: mine"}
NO_RUN |= {"config.yaml train.py": "data: images\noutput_dir: runs/mine"}


@pytest.mark.parametrize(("names", "text"), NO_RUN.items())
def test_overwriting_deletes_nothing_in_a_folder_that_holds_no_run(recipe, names, text):
    """A folder with somebody's own config of a training among them."""
    config = recipe(steps=1, overwrite=True)
    run = Path(config.output_dir)
    for name in names.split():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(text)
    for delete in (lambda: train(config), Run(run).clear):
        with one_sentence(f"holds {names.split('/')[0].split()[0]}", "not the config.yaml and plan.json of a run"):
            delete()
    assert contents(run) == dict.fromkeys(names.split(), text.encode())


@pytest.mark.parametrize("data", ["images", "images/*.parquet", "images/0.parquet", "."])
@pytest.mark.parametrize("whose", ["the new run", "the old run"])
def test_overwriting_never_deletes_training_data(recipe, few_images, monkeypatch, data, whose):
    run = train(recipe(steps=1, data=few_images)).parent
    (run / "images").mkdir()
    (run / "images" / "0.parquet").write_bytes(b"")
    monkeypatch.setenv("HOME", str(run.parent))
    data = f"~/run/{data}"
    if whose == "the old run":
        saved = Run(run).config
        saved.write_text(saved.read_text().replace(few_images, data))
    before = contents(run)
    with one_sentence(f"data={data!r} lies in output_dir={str(run)!r}, which --overwrite deletes."):
        train(recipe(steps=1, overwrite=True, data=data if whose == "the new run" else few_images))
    assert contents(run) == before


def test_the_name_of_a_dataset_on_the_hub_is_no_folder_of_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Run(".").check_apart("org/name")


@pytest.mark.parametrize("at", ["metrics.jsonl", "plan.json", "config.yaml"])
def test_a_clearing_that_was_killed_can_be_repeated(recipe, monkeypatch, at):
    run = Run(train(recipe(steps=1, sample_every=0)).parent)
    delete = Path.unlink

    def killed(path: Path) -> None:
        if path.name == at:
            raise KeyboardInterrupt
        delete(path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", killed)
        run.clear()
    run.clear()
    assert list(contents(run.folder)) == ["run.lock"]


@pytest.mark.slow
def test_two_processes_do_not_train_in_one_folder(lives, few_images, recipe):
    config = recipe("run", data=few_images, steps=100_000, save_every=5, sample_every=0, log_every=1)
    checkpoints, first = Checkpoints(Run(config.output_dir)), lives.start(write_config(config))
    while not checkpoints.steps():
        first.assert_alive()
        time.sleep(0.001)
    for flag in ("--resume", "--overwrite"):
        second = lives.start(write_config(config), flag)
        assert second.wait() == 2
        expected = f"ddpm-pipe train: output_dir={config.output_dir!r} is being trained in by another process."
        assert second.errors.splitlines()[-1] == expected
    first.assert_alive()
    first.signal(signal.SIGKILL)
    first.wait()
    lives.complete(write_config(config), "--resume", "--steps", str(checkpoints.steps()[-1] + 1))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"batch_size": 9, "gradient_accumulation_steps": 2}, "batch_size=9 must be a multiple of 2"),
        ({"mixed_precision": "fp16"}, "mixed_precision='fp16' needs a CUDA device"),
        ({"split": "dev"}, "split='dev' could not be read"),
        ({"beta_schedule": "lin"}, "beta_schedule='lin' is unknown; use one of linear"),
        ({"prediction_type": "noise"}, "prediction_type='noise' is unknown"),
        ({"loss_weight": "snr"}, "loss_weight='snr' is unknown"),
    ],
)
def test_what_cannot_work_is_one_sentence_and_leaves_no_run(recipe, options, sentence):
    config = recipe(**options)
    with one_sentence(sentence):
        train(config)
    assert not Run(config.output_dir).config.exists()


def test_a_folder_that_cannot_be_written_is_one_sentence(recipe, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with one_sentence("output_dir=", "cannot be written"):
        train(recipe("file/run"))


# ---------------------------------------------------------------- what accelerate launch was told


def accelerate_launch(config: TrainConfig, *flags: str, **environment: str) -> subprocess.CompletedProcess:
    """A run under the launcher, which gets these flags and environment variables."""
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *flags, "examples/train.py", write_config(config)],
        cwd=REPO,
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
@pytest.mark.skipif(torch.accelerator.is_available(), reason="threads matter on CPUs only")
@pytest.mark.parametrize(
    ("flags", "environment", "threads"),
    [
        ([], {}, psutil.cpu_count(logical=False)),
        ([], {"OMP_NUM_THREADS": "1"}, 1),
        (["--num-cpu-threads-per-process", "1"], {}, 1),
    ],
)
def test_a_process_alone_takes_all_cores_of_a_cpu_unless_it_is_told_otherwise(recipe, flags, environment, threads):
    """Not told of the CPU, the launcher would leave it one."""
    done = accelerate_launch(recipe(steps=1, sample_every=0), *flags, **environment)
    assert done.returncode == 0, done.stderr
    assert f"on {threads} CPU threads: float32, fused AdamW\n" in done.stdout


@pytest.mark.slow
def test_the_precision_of_the_launcher_is_taken_and_kept(recipe):
    config = recipe(steps=1, sample_every=0, mixed_precision="auto")
    done = accelerate_launch(config, "--mixed_precision", "bf16")
    assert done.returncode == 0, done.stderr
    assert "CPU threads: bf16, fused AdamW\n" in done.stdout
    assert yaml.safe_load((Path(config.output_dir) / "config.yaml").read_text())["mixed_precision"] == "bf16"


REFUSED = {
    ("--mixed_precision", "bf16"): "mixed_precision='no' contradicts mixed_precision='bf16', which accelerate launch",
    ("--dynamo_backend", "inductor"): "accelerate launch was told dynamo_backend=inductor, which is not supported",
    ("--use_fsdp", "--num_processes", "1"): "accelerate launch was told to use FSDP, which is not supported",
}


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "sentence"), REFUSED.items())
def test_what_the_launcher_cannot_have_is_one_sentence(recipe, flags, sentence):
    config = recipe()
    done = accelerate_launch(config, *flags)
    assert done.returncode == 1, done.stderr
    (told,) = [line for line in done.stderr.splitlines() if "ddpm-pipe train: " in line]
    assert told.startswith(f"ddpm-pipe train: {sentence}")
    assert not Path(config.output_dir).exists()


@pytest.mark.parametrize("name", ["DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_other_ways_to_share_the_work_are_one_sentence(recipe, monkeypatch, name):
    """Set as the launcher sets it, which asks for a library or a GPU first."""
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with one_sentence("accelerate launch was told to use", "not supported"):
        train(recipe())


def test_a_deterministic_run_is_the_same_run(recipe, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # kept, and taken back after the test
    plain, deterministic = recipe("plain"), recipe("deterministic", deterministic=True)
    train(plain)
    try:
        train(deterministic)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(final_state(plain), final_state(deterministic))
