"""What the tests of whole runs share: a small recipe, and how two runs are compared."""

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import yaml
from safetensors.torch import load_file
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_pipe.run.checkpoint import Checkpoints
from ddpm_pipe.run.folder import Run
from ddpm_pipe.training.config import TrainConfig
from ddpm_pipe.training.draws import Draws, micro_batches

REPO = Path(__file__).parent.parent
NETWORK = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4, "attention_types": "none"}
STOCK = {
    "_class_name": "UNet2DModel",
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D"] * 2,
    "up_block_types": ["UpBlock2D"] * 2,
    "norm_num_groups": 4,
}


class Largest(TorchDispatchMode):
    """Notes the most numbers that a tensor made meanwhile has."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **kwargs or {})
        self.numbers = max(self.numbers, made.numel() if isinstance(made, torch.Tensor) else 0)
        return made


def make_recipe(folder: Path, unet=NETWORK, **options) -> TrainConfig:
    """A run of a few steps on the bundled test images at 8x8."""
    defaults = {
        "data": str(REPO / "examples" / "fashion_mnist"),
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
        "ema_sigma_rel": [0.05, 0.1],
    }
    return TrainConfig(output_dir=str(folder), unet=unet, **(defaults | options))


def move_to_root(pipeline: Path) -> None:
    """Lay a pipeline's parts out as those of google/ddpm-cifar10-32: all files in one folder."""
    for part in ("unet", "scheduler"):
        for file in (pipeline / part).iterdir():
            file.rename(pipeline / file.name)
        (pipeline / part).rmdir()


def write_config(config: TrainConfig) -> str:
    """What the config gives, in a file beside the run folder, for a command line."""
    file = Path(config.output_dir).parent / f"{Path(config.output_dir).name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    return str(file)


def final_state(config: TrainConfig, step: int | None = None) -> dict[str, torch.Tensor]:
    """All tensors of the last checkpoint, or of that of `step`: weights, averages and optimizer."""
    checkpoints = Checkpoints(Run(config.output_dir))
    folder = checkpoints.run.checkpoint(checkpoints.steps()[-1] if step is None else step)
    tensors = {
        f"{name}.{k}": v for name in ("unet", "ema") for k, v in load_file(folder / f"{name}.safetensors").items()
    }
    moments = torch.load(folder / "state.pt", weights_only=True)["optimizer"]["state"]
    tensors |= {f"{path.stem}.{k}": v for path in folder.glob("ema-*") for k, v in load_file(path).items()}
    return tensors | {f"{i}.{k}": v for i, state in moments.items() for k, v in state.items()}


def assert_same(first: dict, second: dict, **tolerance) -> None:
    """The same names and, unless a tolerance is given, the same bits."""
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], msg=name, **(tolerance or {"rtol": 0, "atol": 0}))


def loss_curve(config: TrainConfig) -> list[tuple[int, float]]:
    """Step and loss of every entry of metrics.jsonl that has a loss."""
    return [(entry["step"], entry["loss"]) for entry in Run(config.output_dir).read_metrics() if "loss" in entry]


def draw_parts(
    config: TrainConfig, step: int, probabilities: torch.Tensor, shape: tuple[int, ...] = (1, 1, 1), processes: int = 1
) -> list[Draws]:
    """What is drawn for each part of the batch of a step, in the order of the batch, by all processes together."""
    parts = {}
    for rank in range(processes):
        process = SimpleNamespace(device=torch.device("cpu"), num_processes=processes, process_index=rank)
        parts |= {part.start: draws for part, draws in micro_batches(config, process, probabilities, step, shape)}
    return [parts[start] for start in sorted(parts)]


multiprocessing.set_forkserver_preload(["ddpm_pipe.training.loop", "ddpm_pipe.sampling.generate"])


def run_on_two(function: Callable, *arguments: object) -> None:
    """Run it in two processes as `torchrun` does, but for the seconds that importing takes."""
    counts = {"min_nodes": 1, "max_nodes": 1, "nproc_per_node": 2, "max_restarts": 0}
    meeting = {"run_id": "test", "rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    handlers |= {number: signal.getsignal(number) for number in (signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)}
    try:
        elastic_launch(LaunchConfig(**counts, **meeting, start_method="forkserver"), function)(*arguments)
    finally:
        for number, handler in handlers.items():  # it leaves its own, to the tests after this one
            signal.signal(number, handler)


def launch(*argv: str, processes: int, **environment: str) -> subprocess.CompletedProcess:
    """Several processes on CPUs: without MPI, `accelerate launch --cpu` would start only one."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    variables = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        [*command, "examples/train.py", *argv], cwd=REPO, env=variables, capture_output=True, text=True, timeout=600
    )
