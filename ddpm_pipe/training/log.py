"""The log of a run in progress: the progress bar, the tracker, and metrics.jsonl, from which the report is drawn."""

import json
import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ddpm_pipe.run.files import replace_text
from ddpm_pipe.run.folder import Run
from ddpm_pipe.training.config import TrainConfig
from ddpm_pipe.training.diagnosis import diagnose
from ddpm_pipe.training.tracking import show_images, start_tracker

TIMESTEP_BINS = 10


def mean_by_timestep(t: Tensor, losses: Tensor, steps: int) -> Tensor:
    """Return sums and counts of losses (n,) in equal ranges of t, float64 (2, TIMESTEP_BINS).

    Sum divided by count is the mean loss of a range. `t` holds the timesteps (n,), and `steps` is T.
    """
    place = t * TIMESTEP_BINS // steps
    sums = torch.zeros(2, TIMESTEP_BINS, dtype=torch.float64, device=t.device)
    sums[0].index_add_(0, place, losses.double())
    sums[1].index_add_(0, place, torch.ones_like(losses, dtype=torch.float64))
    return sums


def named_means(name: str, sums: Tensor) -> dict[str, float]:
    """Return the mean loss as `name`, and that of each range of t that has losses as `name/t_00%`, `name/t_10%`, ..."""
    totals, counts = sums.cpu()
    means = {name: (totals.sum() / counts.sum()).item()}
    for i in counts.nonzero().flatten().tolist():
        means[f"{name}/t_{i * 100 // TIMESTEP_BINS:02d}%"] = (totals[i] / counts[i]).item()
    return means


class Log:
    """Writes an entry every `log_every` optimizer steps. Losses stay on the device in between."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator, run: Run, first_step: int):
        self.config, self.accelerator, self.run = config, accelerator, run
        is_hidden = not accelerator.is_local_main_process
        self.bar = tqdm(total=config.steps, initial=first_step, disable=is_hidden, unit="step")
        self.losses: list[tuple[Tensor, Tensor]] = []
        self.since = (time.perf_counter(), first_step)
        if accelerator.is_main_process:
            self._forget_after(first_step)
        start_tracker(config, accelerator)

    def _forget_after(self, step: int) -> None:
        """Delete the log entries and grids later than `step`, the checkpoint that the run resumes from."""
        kept = [json.dumps(entry) + "\n" for entry in self.run.read_metrics() if entry["step"] <= step]
        replace_text(self.run.metrics, "".join(kept))
        for shown in self.run.steps(self.run.samples):
            for file in self.run.grids(shown).values() if shown > step else ():
                file.unlink(missing_ok=True)

    def write(self, step: int, seen: list[tuple[Tensor, Tensor]], **values: float) -> None:
        """Advance the bar; if an entry is due, log the mean losses of all processes, the speed and `values`.

        Args:
            step: optimizer steps done.
            seen: timesteps (n,) and losses (n,) of this process, one pair per accumulation step.
            values: further values to log, by name.
        """
        self.bar.update()
        self.losses += seen
        if step % self.config.log_every and step != self.config.steps:
            return
        t, losses = (torch.cat(parts) for parts in zip(*self.losses, strict=True))
        sums = self.accelerator.reduce(mean_by_timestep(t, losses, self.config.num_train_timesteps), "sum")
        now, (then, before) = time.perf_counter(), self.since
        speed = (step - before) * self.config.batch_size / (now - then)
        self.losses, self.since = [], (now, step)
        means = named_means("loss", sums)
        self.bar.set_postfix(loss=f"{means['loss']:.4f}", images_per_s=f"{speed:.0f}")
        self.record(step, means | {"images_per_second": speed} | values)

    def record(self, step: int, values: dict[str, float]) -> None:
        """Write values to the tracker and, on the main process, to metrics.jsonl, with null for values not finite."""
        self.accelerator.log(values, step=step)
        if self.accelerator.is_main_process:
            self._append(step, {name: value if math.isfinite(value) else None for name, value in values.items()})

    def _append(self, step: int, entry: dict[str, Any]) -> None:
        with self.run.metrics.open("a") as file:
            file.write(json.dumps({"step": step} | entry) + "\n")

    def has(self, step: int, name: str) -> bool:
        """Return whether metrics.jsonl has a value of this name at a step."""
        return any(entry["step"] == step and name in entry for entry in self.run.read_metrics())

    def tell(self, step: int, since: int, signal: Mapping[str, float]) -> None:
        """Print what holds of the run since this step, and did not after step `since`, and write it to metrics.jsonl.

        `signal` is what `diagnose` asks for.
        """
        entries = self.run.read_metrics()
        before = diagnose([entry for entry in entries if entry["step"] <= since], signal)
        sentences = [told for state, told in diagnose(entries, signal).items() if state not in before]
        if sentences and not self.has(step, "diagnosis"):
            self._append(step, {"diagnosis": sentences})
            print("\n".join(f"step {step}: {told}" for told in sentences))

    def show(self, step: int, grids: dict[str, Image.Image]) -> None:
        """Send image grids to the tracker."""
        for tracker in self.accelerator.trackers:
            show_images(tracker, grids, step)

    def close(self) -> None:
        """End the progress bar."""
        self.bar.close()
