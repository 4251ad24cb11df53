"""What averages and checkpoints cost beside a training step: `python benchmarks/overheads.py [preset.yaml ...]`.

Prints, for the network of each preset: seconds of a step (median), of the update of one average and of a checkpoint as
shares of it, and the memory and disk they take.
"""

import sys
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from timing import interleaved, median

from ddpm_pipe.cli import PRESETS
from ddpm_pipe.config import parse
from ddpm_pipe.data.images import to_unit_range
from ddpm_pipe.data.memory import ImageData
from ddpm_pipe.objective import Objective
from ddpm_pipe.run.folder import Run
from ddpm_pipe.training.config import TrainConfig
from ddpm_pipe.training.recipe import make_scheduler, make_unet
from ddpm_pipe.training.state import TrainState

SHAPES = {"fashion_mnist": (1, 28, 28), "cifar10": (3, 32, 32), "flowers": (3, 128, 128)}


def measure(preset: Path, batch_size: int = 16, repeats: int = 5) -> None:
    config = parse(TrainConfig, [str(preset)], data="none")
    config = config.replace(batch_size=batch_size, gradient_accumulation_steps=1, ema_sigma_rel=[0.05, 0.1])
    shape = SHAPES[preset.stem]
    images = torch.randint(0, 256, (batch_size, *shape), dtype=torch.uint8)
    data = ImageData(images, torch.arange(batch_size), class_names=tuple("0123456789"))
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision="bf16")
    state = TrainState(config, make_unet(config, data), accelerator)
    objective = Objective(make_scheduler(config))
    x0 = to_unit_range(images).to(accelerator.device)
    t, eps = torch.arange(batch_size, device=x0.device), torch.randn_like(x0)
    labels = {"class_labels": t % 10} if config.class_conditional else {}
    averages = (state.average, *state.profiles.values())

    def train_step() -> None:
        losses = objective(state.unet, x0, t, eps, False, **labels)
        accelerator.backward(losses.mean())
        state.optimizer_step(1, [(t, losses)])

    def update_averages() -> None:
        for average in averages:
            average.update(1)

    with tempfile.TemporaryDirectory() as folder:
        jobs = {"step": train_step, "update": update_averages, "save": lambda: state.save(Run(folder), 1)}
        step, update, save = (median(seconds) for seconds in interleaved(jobs, repeats).values())
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()) / 2**20
    weights = sum(p.numel() * 4 for p in state.average.module.parameters()) / 2**20
    print(
        f"{preset.stem}: step of {batch_size} images {step:.3f} s, of which {len(averages)} averages "
        f"{update / step:.1%} ({weights:.0f} MiB each); checkpoint {save:.2f} s = {save / step:.1f} steps, "
        f"{save / step / config.save_every:.2%} of a run that saves every {config.save_every}; {size:.0f} MiB on disk"
    )


if __name__ == "__main__":
    for preset in map(Path, sys.argv[1:] or (PRESETS["fashion_mnist"], PRESETS["cifar10"])):
        measure(preset)
