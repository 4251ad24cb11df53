"""Speed and memory of training against batch, resolution, images and processes: `python benchmarks/scaling.py`

The small network in bf16, ours and diffusers' recipe. Each point is a process of its own, so that its peak of memory,
above what the imports take, is its own. Prints tables and writes docs/scaling.png; a few minutes on a CPU.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from matplotlib.figure import Figure
from recipes import SMALL, STEPS, make_config, make_data
from timing import DEVICE, interleaved, median, table

RECIPES = ("diffusers", "ddpm_pipe")
DEFAULTS = {"batch": 16, "size": 32, "images": 256, "processes": 1}
AXES = {
    "batch": ("images in a batch", [4, 16, 64]),
    "size": ("pixels on a side", [16, 32, 64]),
    "images": ("images in the data", [256, 4096, 32768]),
    "processes": ("processes of one thread", [1, 2]),
}
MEASURES = {
    "images_per_second": "images/s",
    "peak": "peak memory above imports, MiB",
    "start": "seconds to the first step",
}


def peak_memory() -> int:
    """Bytes this process has held at most (Linux); that of getrusage counts its parent's too."""
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def point(recipe: str, data: str, batch: int, size: int, images: int, processes: int) -> None:
    """Measure one point in this process and print it as JSON."""
    before, begin = psutil.Process().memory_info().rss, time.perf_counter()
    step = STEPS[recipe](make_config(data, SMALL, batch if recipe == "ddpm_pipe" else batch // processes), "bf16")
    step()
    start = time.perf_counter() - begin
    seconds = median(interleaved({recipe: step}, 10)[recipe])
    peak = torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else peak_memory() - before
    if int(os.environ.get("RANK", 0)) == 0:
        print(json.dumps({"images_per_second": batch / seconds, "peak": peak / 2**20, "start": start}))


def measure(recipe: str, data: str, **setting: int) -> dict[str, float]:
    """What a process of its own, or several, measures."""
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={setting['processes']}"]
    command = [sys.executable, *(launcher if setting["processes"] > 1 else [])]
    threads = 1 if "one_thread" in setting else torch.get_num_threads()
    arguments = json.dumps({"recipe": recipe, "data": data, **{name: setting[name] for name in DEFAULTS}})
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([*command, __file__, "--point", arguments], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def sweep(axis: str, scratch: Path) -> dict[str, list[dict[str, float]]]:
    """Recipe -> what is measured at each value of the axis."""
    measured: dict[str, list[dict[str, float]]] = {recipe: [] for recipe in RECIPES}
    for value in AXES[axis][1]:
        setting = DEFAULTS | {axis: value} | ({"one_thread": 1} if axis == "processes" else {})
        data = scratch / f"{setting['images']}-{setting['size']}"
        if not data.exists():
            make_data(data, setting["images"], setting["size"])
        for recipe in RECIPES:
            measured[recipe].append(measure(recipe, str(data), **setting))
    return measured


def main() -> None:
    figure = Figure(figsize=(4 * len(AXES), 3 * len(MEASURES)), layout="constrained")
    plots = figure.subplots(len(MEASURES), len(AXES))
    with tempfile.TemporaryDirectory() as scratch:
        for column, (axis, (label, values)) in enumerate(AXES.items()):
            measured = sweep(axis, Path(scratch))
            rows = [
                [recipe, str(value), *(f"{found[name]:.3g}" for name in MEASURES)]
                for recipe, points in measured.items()
                for value, found in zip(values, points, strict=True)
            ]
            table(f"Against {label}", ["", label, *MEASURES.values()], rows)
            for row, (name, title) in enumerate(MEASURES.items()):
                plot = plots[row, column]
                for recipe, points in measured.items():
                    plot.plot(values, [found[name] for found in points], marker="o", label=recipe)
                plot.set(xscale="log", xticks=values, xticklabels=values, xlabel=label, ylabel=title, ylim=(0, None))
                plot.minorticks_off()
    plots[0, 0].legend()
    figure.savefig(Path(__file__).parents[1] / "docs" / "scaling.png", dpi=80)


if __name__ == "__main__":
    if "--point" in sys.argv:
        point(**json.loads(sys.argv[-1]))
    else:
        main()
