"""Predicted against measured time and peak memory of six small runs: `OMP_NUM_THREADS=1 python benchmarks/plan.py`.

Each run is a process of its own with a budget of 40 seconds, so that the prediction also chooses its number of steps.
The time runs from the plan to the last grid. On a CPU, the memory is the most that was resident for the process.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from timing import table

from ddpm_pipe.run.folder import Run

DATA = Path(__file__).parent.parent / "examples" / "fashion_mnist"
BUDGET = "40s"

RUNS = {
    # channels of the levels, attention, batch, resolution, image channels, precision
    "smallest": ([16, 32], ["none", "none"], 16, 28, 1, "no"),
    "preset fashion_mnist": ([32, 64, 64], ["none", "none", "linear"], 16, 28, 1, "no"),
    "large batch": ([16, 32], ["none", "none"], 128, 16, 1, "no"),
    "colour": ([32, 64], ["none", "linear"], 8, 32, 3, "no"),
    "larger images": ([16, 32, 64], ["none", "none", "linear"], 4, 64, 3, "no"),
    "bf16": ([32, 64], ["none", "none"], 16, 16, 3, "bf16"),
}


def measure(name: str, folder: Path) -> list[str]:
    """Train one run and return a row of the table."""
    widths, attention, batch_size, resolution, channels, precision = RUNS[name]
    unet = {"block_out_channels": widths, "attention_types": attention, "layers_per_block": 1, "norm_num_groups": 8}
    options = {"data": DATA, "split": "test", "output_dir": folder, "unet": json.dumps(unet), "budget": BUDGET}
    options |= {"batch_size": batch_size, "resolution": resolution, "channels": channels, "mixed_precision": precision}
    options |= {"learning_rate": 1e-3, "num_samples": 16, "sample_steps": 5, "holdout": 100, "tracker": "none"}
    options["save_every"] = 10**6  # the plan does not count saving
    flags = [str(part) for key, value in options.items() for part in (f"--{key}", value)]
    process = subprocess.Popen([sys.executable, "-m", "ddpm_pipe", "train", *flags], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"the run {name!r} ended with status {status}.")
    run = Run(folder)
    plan, config = run.read_plan(), run.read_config()
    probe, grids = plan["measured"], len(run.steps(run.samples))
    last = max(file.stat().st_mtime for file in (run.metrics, *run.samples.glob("*.png")))
    predicted = config["steps"] * probe["step_seconds"] + grids * probe["showing_seconds"]
    seconds = last - run.plan.stat().st_mtime
    memory = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    row = [name, str(widths), str(batch_size), f"{channels}x{resolution}x{resolution}", precision]
    row += [str(config["steps"]), f"{predicted:.1f}", f"{seconds:.1f}", f"{seconds / predicted:.2f}"]
    expected = probe["peak_memory"]
    return [*row, f"{expected / 2**20:.0f}", f"{memory / 2**20:.0f}", f"{memory / expected:.2f}"]


if __name__ == "__main__":
    columns = ["run", "channels", "batch", "image", "precision", "steps", "predicted s", "measured s", "ratio"]
    columns += ["predicted MiB", "measured MiB", "ratio"]
    print(f"load before: {os.getloadavg()}")
    with tempfile.TemporaryDirectory() as folder:
        rows = (measure(name, Path(folder) / str(i)) for i, name in enumerate(RUNS))
        table(f"Budget {BUDGET}", columns, rows)  # prints each row when it is measured
    print(f"load after: {os.getloadavg()}")
