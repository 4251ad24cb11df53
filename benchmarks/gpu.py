"""What a GPU makes of training and sampling, ours beside its peers: `python benchmarks/gpu.py`.

Each row is a setting of training ddpm-cifar10 (35.7 M weights), taken in turn with the others of its batch size: images
per second, the share of the FLOP/s that a large matrix product reaches, kernel launches and waits of the host,
and the peak memory. A step of each sampler follows. `--quick` takes a small network and few rounds, which is how a
machine without a GPU tests the script.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from recipes import CIFAR, SMALL, STEPS, make_config, make_data, make_network, shaped_data
from timing import DEVICE, Step, interleaved, median, table
from torch.profiler import ProfilerActivity, profile

from ddpm_pipe import DDPMPipeline, DDPMScheduler
from ddpm_pipe.sampling.protocol import plug_in
from ddpm_pipe.training.config import TrainConfig
from ddpm_pipe.training.launcher import choose_kernels
from ddpm_pipe.training.plan import describe_device
from ddpm_pipe.training.probe import flops_per_image

SAMPLERS = ("ddpm", "ddim", "dpm++", "unipc", "euler")
SETTINGS: dict[str, dict] = {
    "eager": {},
    "eager, not channels-last": {"channels_last": False},
    "compiled": {"compile": "default"},
    "compiled, not channels-last": {"compile": "default", "channels_last": False},
    "CUDA graphs": {"compile": "reduce-overhead"},
}
"""Settings of ours that are measured beside the peers."""


def without_tf32(step: Step) -> Step:
    """The step with products and convolutions in full precision, which the others round to TF32."""

    def precise() -> None:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        step()
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True

    return precise


def product_flops(dtype: torch.dtype, size: int) -> float:
    """FLOP/s of a matrix product: what the device reaches at most."""
    a = torch.randn(size, size, dtype=dtype, device=DEVICE)
    seconds = interleaved({"product": lambda: a @ a}, rounds=5)["product"]
    return 2 * size**3 / median(seconds)


def profiled(step: Step) -> tuple[int, int]:
    """Kernel launches and waits of the host in one step; 0 without a GPU."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (DEVICE.type == "cuda")
    with profile(activities=activities) as record:
        step()
    counts = {event.key: event.count for event in record.key_averages()}
    starts = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
    launches = sum(count for name, count in counts.items() if name.startswith(starts))
    return launches, counts.get("cudaStreamSynchronize", 0)


def peak_memory(step: Step) -> float:
    """GiB that a step has allocated at most; 0 without a GPU."""
    if DEVICE.type != "cuda":
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() / 2**30


def make_steps(config: TrainConfig, chosen: list[str]) -> dict[str, tuple[str, Callable[[], Step]]]:
    """Name -> precision, and what makes the step."""
    steps = {}
    for name, recipe in STEPS.items():
        settings = chosen if name == "ddpm_pipe" else [""]
        for setting in settings:
            options = SETTINGS.get(setting, {})
            changed = config.replace(**options)
            title = f"{name}, {setting}, bf16" if setting else f"{name}, bf16"
            steps[title] = ("bf16", lambda recipe=recipe, changed=changed: recipe(changed, "bf16"))
    for name in ("ddpm_pipe", "diffusers"):
        steps[f"{name}, tf32"] = ("no", lambda name=name: STEPS[name](config, "no"))
        steps[f"{name}, float32"] = ("no", lambda name=name: without_tf32(STEPS[name](config, "no")))
    return steps


def training(
    data: str, unet: dict, batch: int, rounds: int, reached: dict[str, float], chosen: list[str]
) -> list[dict]:
    """Measure all settings with one batch size, in turn."""
    config = make_config(data, unet, batch)
    flops, steps, precisions = flops_per_image(config, shaped_data(config)), {}, {}
    for name, (precision, make) in make_steps(config, chosen).items():
        try:
            steps[name], precisions[name] = make(), precision
        except (pytest.skip.Exception, torch.OutOfMemoryError) as reason:
            print(f"{name}, batch {batch}: {str(reason).splitlines()[0]}")
    rows = []
    for name, times in interleaved(steps, rounds, warm_up=3).items():
        launches, waits = profiled(steps[name])
        rate = batch / median(times)
        row = {"setting": name, "batch": batch, "images_per_second": rate, "launches": launches, "waits": waits}
        rows.append(row | {"share": flops * rate / reached[precisions[name]], "memory_gib": peak_memory(steps[name])})
    return rows


def sampling(unet: dict, data: str, batch: int, rounds: int, compiled: bool) -> list[dict]:
    """Milliseconds of a sampling step of each scheduler, the network included."""
    own = DDPMScheduler()
    jobs = {}
    for title in ("{}", "{}, CUDA graphs") if compiled else ("{}",):
        network = make_network(make_config(data, unet, batch)).to(DEVICE, torch.bfloat16).eval()
        if title != "{}":
            network.compile(mode="reduce-overhead")
        for name in SAMPLERS:
            pipeline = DDPMPipeline(network, own)
            pipeline.scheduler = plug_in(own, name, {}, fewer=True)
            pipeline.set_progress_bar_config(disable=True)
            jobs[title.format(name)] = partial(pipeline, batch, num_inference_steps=10, output_type="pt")
    seconds = interleaved(jobs, rounds, warm_up=3)
    return [{"sampler": name, "batch": batch, "ms_per_step": 100 * median(times)} for name, times in seconds.items()]


def show(title: str, rows: list[dict]) -> None:
    """Print measured rows as Markdown."""
    cells = [[f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    table(title, list(rows[0]), cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small network, one batch size and two rounds")
    parser.add_argument("--batch_sizes", type=int, nargs="+", help="images in a step; 32, 128 and 512 if not given")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="settings of ours")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    quick = arguments.quick
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    choose_kernels(deterministic=False)
    unet, batches, rounds = (SMALL, (16,), 2) if quick else (CIFAR, (32, 128, 512), 10)
    batches = arguments.batch_sizes or batches
    size = 512 if quick else 8192
    reached = {"bf16": product_flops(torch.bfloat16, size), "no": product_flops(torch.float32, size)}
    most = ", ".join(f"{flops / 1e12:.3g} ({name})" for name, flops in reached.items())
    print(f"{describe_device(DEVICE)}, torch {torch.__version__}; a product reaches {most} TFLOP/s")
    with tempfile.TemporaryDirectory() as folder:
        data = make_data(Path(folder), 128 if quick else 2048)
        trained = []
        for batch in batches:
            trained += training(data, unet, batch, rounds, reached, arguments.settings)
            show(f"Training, batch {batch}", [row for row in trained if row["batch"] == batch])
        compiled = any("compile" in SETTINGS[name] for name in arguments.settings)
        sampled = sampling(unet, data, batches[-1], rounds, compiled)
    show("A step of sampling, bf16", sampled)
    if arguments.json:
        facts = {"device": describe_device(DEVICE), "torch": torch.__version__, "product_flops": reached}
        arguments.json.write_text(json.dumps(facts | {"training": trained, "sampling": sampled}, indent=2) + "\n")


if __name__ == "__main__":
    main()
