"""Ours beside its peers in one run, interleaved: training, data, sampling and import. `python benchmarks/peers.py`

Prints Markdown tables of medians and of ratios with their range, the share of what the machine reaches at most, and
what a part of the step costs in another setting: a few minutes on a CPU. `--quick` leaves the large network out.
"""

import subprocess
import sys
import tempfile
from functools import partial
from itertools import count
from pathlib import Path

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from recipes import NETWORKS, STEPS, make_config, make_data, make_network, our_step, peer_batches
from timing import DEVICE, Step, interleaved, median, ratios, table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ddpm_pipe import DDIMScheduler, DDPMPipeline, DDPMScheduler
from ddpm_pipe.data.memory import load_images
from ddpm_pipe.data.stream import stream_images
from ddpm_pipe.training.config import TrainConfig
from ddpm_pipe.training.plan import describe_device

BATCH = 16 if DEVICE.type == "cpu" else 128
PRECISIONS = {"float32": "no", "bf16": "bf16"}


# ---------------------------------------------------------------- what the machine can do


def ceiling(rounds: int) -> dict[str, float]:
    """FLOP/s of a convolution of the CIFAR-10 network, forward, by precision; printed beside a large matrix product."""
    rows, reached = [], {}
    for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        size = 2048 if DEVICE.type == "cpu" else 8192
        a = torch.randn(size, size, dtype=dtype, device=DEVICE)
        image = torch.randn(BATCH, 256, 16, 16, dtype=dtype, device=DEVICE)
        kernel = torch.randn(256, 256, 3, 3, dtype=dtype, device=DEVICE)
        jobs = {"product": lambda a=a: a @ a, "convolution": lambda i=image, k=kernel: F.conv2d(i, k, padding=1)}
        seconds = interleaved(jobs, rounds)
        product = 2 * size**3 / median(seconds["product"])
        reached[name] = 2 * BATCH * 256 * 256 * 9 * 16 * 16 / median(seconds["convolution"])
        rows.append([name, f"{product / 1e9:.0f}", f"{reached[name] / 1e9:.0f}"])
    table(
        "What the machine reaches, GFLOP/s", ["", f"product of {size}x{size}", "convolution 3x3 of 256 channels"], rows
    )
    return reached


# ---------------------------------------------------------------- training


def flops_per_image(config: TrainConfig) -> float:
    """Of the network, forward and backward."""
    model = make_network(config)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 32, 32), torch.zeros(1)).sample.sum().backward()
    return counter.get_total_flops()


def training(data: str, reached: dict[str, float], networks: dict[str, dict], rounds: int) -> None:
    for title, unet in networks.items():
        config, steps = make_config(data, unet, BATCH), {}
        for name, precision in PRECISIONS.items():
            for recipe, make_step in STEPS.items():
                try:
                    steps[f"{recipe} {name}"] = make_step(config, precision)
                except pytest.skip.Exception as reason:
                    print(reason)
            if DEVICE.type == "cuda":  # on a CPU it takes minutes to compile and is no faster
                steps[f"ddpm_pipe, compiled {name}"] = our_step(config.replace(compile="default"), precision)
        seconds, flops = interleaved(steps, rounds, warm_up=2), flops_per_image(config)
        rows = []
        for name, times in seconds.items():
            precision, rate = name.split()[-1], BATCH / median(times)
            share = f"{flops * rate / 1e9:.0f} ({flops * rate / reached[precision]:.0%})"
            stock = [seconds[f"diffusers {base}"] for base in ("float32", precision)]
            rows.append([name, f"{rate:.3g}", share, *(ratios(times, base) for base in stock)])
        table(
            f"Training {title}, batch {BATCH}, {flops / 1e9:.2f} GFLOP an image",
            ["", "images/s", "GFLOP/s (of the convolution's)", "times stock float32", "times stock, same precision"],
            rows,
        )


def data_path(data: str, rounds: int) -> None:
    """Images/s that the data alone give, without a network to feed."""
    part, steps = slice(0, BATCH), count()
    peer = peer_batches(data, BATCH)
    resident, streamed = (opened(data).batches(BATCH, 0) for opened in (load_images, stream_images))
    seconds = interleaved(
        {
            "diffusers, a DataLoader": lambda: next(peer),
            "ddpm_pipe, in memory": lambda: resident(next(steps), part, DEVICE),
            "ddpm_pipe, streamed": lambda: streamed(next(steps), part, DEVICE),
        },
        rounds,
    )
    stock = seconds["diffusers, a DataLoader"]
    rows = [[name, f"{BATCH / median(times):,.0f}", ratios(times, stock)] for name, times in seconds.items()]
    table("Batches of images, without the network", ["", "images/s", "times diffusers"], rows)


# ---------------------------------------------------------------- sampling


class Nothing(ModelMixin, ConfigMixin):
    """A network that answers at once."""

    @register_to_config
    def __init__(self, sample_size: int = 32, in_channels: int = 3, out_channels: int = 3):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.answer = UNet2DOutput(sample=torch.zeros(1, in_channels, sample_size, sample_size, device=DEVICE))

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> UNet2DOutput:
        return self.answer


def sampling(rounds: int, steps: int = 1000) -> None:
    """Scheduler, loop and progress bar: the time of a step with a network that answers at once."""
    for kind, stock, scheduler, ours in (
        ("DDPM", diffusers.DDPMPipeline, diffusers.DDPMScheduler, DDPMScheduler),
        ("DDIM", diffusers.DDIMPipeline, diffusers.DDIMScheduler, DDIMScheduler),
    ):
        pipelines = {"diffusers": stock(Nothing(), scheduler()), "ddpm_pipe": DDPMPipeline(Nothing(), ours())}
        seconds = interleaved(
            {
                name: partial(pipeline.to(DEVICE), num_inference_steps=steps, output_type="np")
                for name, pipeline in pipelines.items()
            },
            rounds,
        )
        rows = [
            [name, f"{1e6 * median(times) / steps:.0f}", ratios(times, seconds["diffusers"])]
            for name, times in seconds.items()
        ]
        table(f"A step of {kind} without the network, batch 1", ["", "microseconds", "times diffusers"], rows)


# ---------------------------------------------------------------- import


def importing(rounds: int) -> None:
    def run(package: str) -> Step:
        return lambda: subprocess.run([sys.executable, "-c", f"from {package} import DDPMPipeline"], check=True)

    seconds = interleaved({package: run(package) for package in ("diffusers", "ddpm_pipe")}, rounds)
    rows = [[name, f"{median(t):.2f}", ratios(t, seconds["diffusers"])] for name, t in seconds.items()]
    table("Import of DDPMPipeline in a new process", ["", "seconds", "times diffusers"], rows)


if __name__ == "__main__":
    diffusers.utils.logging.set_verbosity_error()
    print(f"torch {torch.__version__}, diffusers {diffusers.__version__}, {describe_device(DEVICE)}", end=", ")
    print(f"{torch.get_num_threads()} threads")
    quick = "--quick" in sys.argv
    importing(3)
    sampling(5)
    with tempfile.TemporaryDirectory() as scratch:
        data = make_data(Path(scratch) / "data")
        data_path(data, 20)
        training(data, ceiling(10), dict(list(NETWORKS.items())[: 1 if quick else None]), 3)
