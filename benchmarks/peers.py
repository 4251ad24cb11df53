"""Ours beside diffusers in one run, interleaved: training, sampling and import. `python benchmarks/peers.py`

The peer's training is its unconditional recipe, written anew from its documentation: a DataLoader that decodes and
transforms image by image, the stock UNet2DModel, a prepared learning-rate schedule, EMAModel. Both train the same
networks on the same images in batches of 16. Both sample a network that does nothing: what is left is scheduler, loop
and progress bar. Prints Markdown tables of medians, ratios and their range, and what the machine can do at most.
"""

import io
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset, Image
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from ddpm_pipe import DDIMScheduler, DDPMPipeline, DDPMScheduler
from ddpm_pipe.config import parse_config
from ddpm_pipe.data import load_images
from ddpm_pipe.draws import micro_batches
from ddpm_pipe.objective import Objective
from ddpm_pipe.recipe import TrainConfig, make_scheduler, make_unet
from ddpm_pipe.state import TrainState

HERE = Path(__file__).resolve().parent
BATCH, IMAGES, WARM_UP = 16, 256, 1
Step = Callable[[], None]


def interleaved(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of each round of each step, taken in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(WARM_UP + rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if i >= WARM_UP:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def report(title: str, unit: str, per_unit: float, seconds: dict[str, list[float]], reference: str) -> None:
    """A table of units per second, or of a duration, and the ratio to the reference in the same round."""
    print(f"\n{title}\n\n| | {unit} | times {reference} (lowest to highest round) |\n| --- | --- | --- |")
    for name, times in seconds.items():
        ratios = sorted(base / mine for base, mine in zip(seconds[reference], times, strict=True))
        value = per_unit / statistics.median(times) if per_unit else statistics.median(times)
        print(f"| {name} | {value:.3g} | {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |")


# ---------------------------------------------------------------- training


def make_data(folder: Path) -> str:
    """Colour images of 32x32 as files, as a user has them."""
    noise = np.random.default_rng(0)
    rows = []
    for _ in range(IMAGES):
        buffer = io.BytesIO()
        diffusers.utils.numpy_to_pil(noise.random((1, 32, 32, 3)))[0].save(buffer, "png")
        rows.append({"image": {"bytes": buffer.getvalue(), "path": None}})
    Dataset.from_list(rows).cast_column("image", Image()).save_to_disk(folder)
    return str(folder)


def our_step(config: TrainConfig, precision: str) -> Step:
    """A step of ddpm_pipe.train, without what it writes."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision=precision)
    data = load_images(config.data)
    state = TrainState(config, make_unet(config, data), accelerator)
    objective = Objective(make_scheduler(config))
    batches, step = data.batches(BATCH, 0, flip=True), 0

    def train_step() -> None:
        nonlocal step
        seen = []
        for part, draws in micro_batches(config, accelerator, state.timesteps.probabilities(), step, data.shape):
            x0, _ = batches(step, part, accelerator.device)
            losses = objective(state.unet, x0, draws.t, draws.eps)
            accelerator.backward(losses.mean())
            seen.append((draws.t, losses.detach()))
        state.optimizer_step(step, seen)
        step += 1

    return train_step


def peer_batches(data: str) -> Iterator[Tensor]:
    """Images decoded, flipped and scaled one after another, in shuffled batches, for ever."""

    def transform(rows: dict) -> dict:
        arrays = [np.asarray(image.convert("RGB").resize((32, 32)), np.float32) for image in rows["image"]]
        flipped = [array[:, ::-1] if torch.rand(()) < 0.5 else array for array in arrays]
        return {"input": [torch.from_numpy(array / 127.5 - 1).permute(2, 0, 1) for array in flipped]}

    dataset = Dataset.load_from_disk(data)
    dataset.set_transform(transform)
    loader = DataLoader(dataset, batch_size=BATCH, shuffle=True)
    while True:
        yield from (batch["input"] for batch in loader)


def peer_step(config: TrainConfig, precision: str) -> Step:
    """A step of diffusers' train_unconditional recipe."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision=precision)
    model = make_unet(config, load_images(config.data))
    average = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, power=0.75)
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    rates = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=10_000)
    model, optimizer, rates = accelerator.prepare(model, optimizer, rates)
    average.to(accelerator.device)
    batches = peer_batches(config.data)
    model.train()

    def train_step() -> None:
        clean = next(batches).to(accelerator.device)
        noise = torch.randn_like(clean)
        t = torch.randint(0, 1000, (len(clean),), device=clean.device)
        loss = F.mse_loss(model(scheduler.add_noise(clean, noise, t), t).sample.float(), noise)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        average.step(model.parameters())
        loss.item()  # for its progress bar

    return train_step


SMALL = '{"_class_name": "UNet2DModel", "block_out_channels": [32, 64, 64], "norm_num_groups": 8}'


def training(folder: Path, rounds: int) -> None:
    data = make_data(folder / "data")
    small = [
        "--unet",
        SMALL.replace(
            "}",
            ', "down_block_types": ["DownBlock2D", "DownBlock2D", "DownBlock2D"], '
            '"up_block_types": ["UpBlock2D", "UpBlock2D", "UpBlock2D"]}',
        ),
    ]
    cifar = [str(HERE.parent / "examples" / "presets" / "cifar10.yaml")]
    for title, argv in (("a small UNet2DModel", small), ("ddpm-cifar10", cifar)):
        config = parse_config(TrainConfig, [*argv, "--batch_size", str(BATCH)], data=data)
        config.batch_size, config.ema_sigma_rel, config.data = BATCH, [], data
        steps = {"diffusers float32": peer_step(config, "no"), "diffusers bf16": peer_step(config, "bf16")}
        steps |= {"ddpm_pipe float32": our_step(config, "no"), "ddpm_pipe bf16": our_step(config, "bf16")}
        model = make_unet(config, load_images(data))
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, 32, 32), torch.zeros(1)).sample.sum().backward()
        flops = counter.get_total_flops() / 1e9
        name = f"Training {title}: {sum(p.numel() for p in model.parameters()):,} weights, {flops:.2f} GFLOP an image"
        report(name, "images/s", BATCH, interleaved(steps, rounds), "diffusers float32")


# ---------------------------------------------------------------- sampling


class Nothing(ModelMixin, ConfigMixin):
    """A network that answers at once."""

    @register_to_config
    def __init__(self, sample_size: int = 32, in_channels: int = 3, out_channels: int = 3):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.answer = UNet2DOutput(sample=torch.zeros(1, in_channels, sample_size, sample_size))

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> UNet2DOutput:
        return self.answer


def sampling(rounds: int, count: int = 1000) -> None:
    pipelines = {
        "diffusers DDPM": diffusers.DDPMPipeline(Nothing(), diffusers.DDPMScheduler()),
        "ddpm_pipe DDPM": DDPMPipeline(Nothing(), DDPMScheduler()),
        "diffusers DDIM": diffusers.DDIMPipeline(Nothing(), diffusers.DDIMScheduler()),
        "ddpm_pipe DDIM": DDPMPipeline(Nothing(), DDIMScheduler()),
    }
    steps = {name: lambda p=p: p(num_inference_steps=count, output_type="np") for name, p in pipelines.items()}
    seconds = interleaved(steps, rounds)
    for kind in ("DDPM", "DDIM"):
        pair = {name: [s * 1e6 / count for s in times] for name, times in seconds.items() if name.endswith(kind)}
        title = f"A sampling step of {kind} without the network, batch 1"
        report(title, "microseconds", 0, pair, f"diffusers {kind}")


# ---------------------------------------------------------------- import, and what the machine can do


def importing(rounds: int) -> None:
    def run(statement: str) -> Step:
        return lambda: subprocess.run([sys.executable, "-c", statement], check=True) and None

    statements = {
        "diffusers": "from diffusers import DDPMPipeline",
        "ddpm_pipe": "from ddpm_pipe import DDPMPipeline",
    }
    seconds = interleaved({name: run(statement) for name, statement in statements.items()}, rounds)
    report("Import of DDPMPipeline in a new process", "seconds", 0, seconds, "diffusers")


def ceiling() -> None:
    """Rates of a large matrix product and a convolution of the CIFAR-10 network, forward."""
    print("\nWhat the machine reaches\n\n| | GFLOP/s |\n| --- | --- |")
    for dtype in (torch.float32, torch.bfloat16):
        a, image = torch.randn(2048, 2048, dtype=dtype), torch.randn(16, 256, 16, 16, dtype=dtype)
        kernel = torch.randn(256, 256, 3, 3, dtype=dtype)
        jobs = {"matmul 2048": (lambda a=a: a @ a, 2 * 2048**3)}
        conv = 2 * 16 * 256 * 256 * 9 * 16 * 16
        jobs["conv 3x3, 256 channels"] = (lambda i=image, k=kernel: F.conv2d(i, k, padding=1), conv)
        for name, (job, flops) in jobs.items():
            times = interleaved({name: lambda job=job: (job(), None)[1]}, 5)[name]
            print(f"| {name}, {str(dtype).removeprefix('torch.')} | {flops / statistics.median(times) / 1e9:.0f} |")


if __name__ == "__main__":
    import tempfile

    diffusers.utils.logging.set_verbosity_error()
    print(f"torch {torch.__version__}, diffusers {diffusers.__version__}, {torch.get_num_threads()} threads")
    ceiling()
    importing(5)
    sampling(5)
    with tempfile.TemporaryDirectory() as scratch:
        training(Path(scratch), 3)
