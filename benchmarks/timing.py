"""Things timed in turn on the device that is there, and tables of the result."""

import statistics
import time
from collections.abc import Callable, Iterable

import torch

Step = Callable[[], object]

DEVICE = torch.accelerator.current_accelerator() or torch.device("cpu")


def synchronize() -> None:
    if DEVICE.type != "cpu":
        torch.accelerator.synchronize()


def interleaved(steps: dict[str, Step], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each round of each step, taken in turn: what else the machine does falls on all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(warm_up + rounds):
        for name, step in steps.items():
            synchronize()
            start = time.perf_counter()
            step()
            synchronize()
            if i >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median(times: list[float]) -> float:
    return statistics.median(times)


def table(title: str, columns: list[str], rows: Iterable[list[str]]) -> None:
    """Print Markdown."""
    print(f"\n{title}\n")
    for row in (columns, ["---"] * len(columns), *rows):
        print(f"| {' | '.join(row)} |", flush=True)


def ratios(times: list[float], reference: list[float]) -> str:
    """How many times as fast as the reference in the same round: median, lowest and highest."""
    all_of_them = sorted(base / mine for base, mine in zip(reference, times, strict=True))
    return f"{median(all_of_them):.2f} ({all_of_them[0]:.2f} to {all_of_them[-1]:.2f})"
