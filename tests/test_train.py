"""The whole loop on real images and a small network: it learns, it saves, and it is the same run however it is cut."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from ddpm_pipe import DDPMPipeline
from ddpm_pipe.recipe import JsonDict
from ddpm_pipe.train import TrainConfig, train

NETWORK = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4, "attention_types": "none"}
STOCK = {
    "_class_name": "UNet2DModel",
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D"] * 2,
    "up_block_types": ["UpBlock2D"] * 2,
    "norm_num_groups": 4,
}


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps the precision of a process; each test starts as a new process would."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def recipe(tmp_path, repo):
    """A run of a few steps on the bundled test images at 8x8."""

    def make(folder="run", unet=NETWORK, **options) -> TrainConfig:
        defaults = {
            "data": str(repo / "examples" / "fashion_mnist"),
            "split": "test",
            "resolution": [8],
            "num_train_timesteps": 20,
            "beta_schedule": "cosine",
            "steps": 6,
            "batch_size": 8,
            "learning_rate": 2e-3,
            "mixed_precision": "no",
            "num_samples": 10,
            "sample_steps": 2,
            "tracker": "none",
        }
        return TrainConfig(output_dir=str(tmp_path / folder), unet=JsonDict(unet), **(defaults | options))

    return make


def final_state(config: TrainConfig) -> dict[str, torch.Tensor]:
    """All tensors of the last checkpoint: weights, average and optimizer."""
    folder = max((Path(config.output_dir) / "checkpoints").iterdir())
    tensors = {
        f"{name}.{k}": v for name in ("unet", "ema") for k, v in load_file(folder / f"{name}.safetensors").items()
    }
    moments = torch.load(folder / "state.pt", weights_only=True)["optimizer"]["state"]
    tensors |= {f"{path.stem}.{k}": v for path in folder.glob("ema-*") for k, v in load_file(path).items()}
    return tensors | {f"{i}.{k}": v for i, state in moments.items() for k, v in state.items()}


def assert_same(first: dict, second: dict, **tolerance) -> None:
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], msg=name, **(tolerance or {"rtol": 0, "atol": 0}))


def launch(repo, *argv: str, processes: int) -> subprocess.CompletedProcess:
    """Several processes on CPUs: without MPI, `accelerate launch --cpu` would start only one."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "examples/train.py", *argv], cwd=repo, env=environment, capture_output=True, text=True, timeout=600
    )


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


def test_the_network_learns(recipe, monkeypatch):
    """The loss of the last steps is far below that of the first and below 1, the loss of answering zero."""
    losses = []
    monkeypatch.setattr(
        "ddpm_pipe.train.Log.write", lambda _, step, seen, **__: losses.append(seen[0][1].mean().item())
    )
    monkeypatch.setattr("ddpm_pipe.train.write_report", lambda run: None)
    train(recipe(steps=150, batch_size=32, learning_rate=4e-3, sample_every=0))
    first, last = sum(losses[:5]) / 5, sum(losses[-20:]) / 20
    assert first > 0.8
    assert last < 0.5 * first


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_resumed_run_ends_bit_for_bit_where_an_uninterrupted_one_does(recipe, precision):
    options = {
        "unet": NETWORK | {"dropout": 0.2, "self_condition": True},
        "class_conditional": True,
        "gradient_accumulation_steps": 2,
        "flip": True,
        "mixed_precision": precision,
        "lr_schedule": "cosine",
    }
    whole = recipe("whole", **options)
    train(whole)
    # stop after step 4 of 6, with checkpoints at 2 and 4
    cut = recipe("cut", **options, save_every=2)
    original, stop = cut.steps, KeyboardInterrupt()

    def interrupted(state, step, seen):
        if step == 4:
            raise stop
        return state_step(state, step, seen)

    from ddpm_pipe.state import TrainState

    state_step = TrainState.optimizer_step
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainState, "optimizer_step", interrupted)
        train(cut)
    AcceleratorState._reset_state(reset_partial_state=True)
    train(recipe("cut", **options, save_every=2, resume=True))
    assert cut.steps == original
    assert_same(final_state(whole), final_state(cut))


def test_accumulation_does_not_change_the_run(recipe):
    whole, parts = recipe("whole"), recipe("parts", gradient_accumulation_steps=4)
    train(whole)
    train(parts)
    assert_same(final_state(whole), final_state(parts), rtol=1e-3, atol=2e-5)


@pytest.mark.slow
def test_two_processes_are_the_same_run_as_one(recipe, repo, tmp_path):
    from ddpm_pipe.config import save_config

    one, two = recipe("one"), recipe("two")
    train(one)
    save_config(two, tmp_path / "two.yaml")
    done = launch(repo, str(tmp_path / "two.yaml"), processes=2)
    assert done.returncode == 0, done.stderr
    assert "2 processes x 1 accumulation steps" in done.stdout
    assert_same(final_state(one), final_state(two), rtol=1e-3, atol=2e-5)


def test_tensorboard_shows_loss_rate_and_speed(recipe):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = recipe(tracker="tensorboard", log_every=2, lr_warmup_steps=4)
    train(config)
    events = EventAccumulator(str(Path(config.output_dir) / "logs")).Reload()
    assert {"loss", "learning_rate", "images_per_second"} <= set(events.Tags()["scalars"])
    rates = [(event.step, event.value) for event in events.Scalars("learning_rate")]
    assert rates == [(2, pytest.approx(1e-3)), (4, pytest.approx(2e-3)), (6, pytest.approx(2e-3))]


def test_another_run_is_never_overwritten_in_silence(recipe):
    train(recipe(steps=2))
    with pytest.raises(ValueError, match="holds a run; pass --resume, --overwrite or another folder"):
        train(recipe(steps=2))
    train(recipe(steps=1, overwrite=True))
    assert [path.name for path in (Path(recipe().output_dir) / "checkpoints").iterdir()] == ["step-00000001"]


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
    with pytest.raises(ValueError, match=sentence):
        train(config)
    assert not (Path(config.output_dir) / "config.yaml").exists()


def test_a_folder_that_cannot_be_written_is_one_sentence(recipe, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ValueError, match=r"output_dir=.* cannot be written"):
        train(recipe("file/run"))
