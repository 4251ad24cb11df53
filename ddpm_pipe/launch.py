"""Processes and threads, as a launcher or a user chose them."""

import os
from datetime import timedelta

import psutil
import torch
from accelerate import PartialState


def processes() -> PartialState:
    """The processes of this launch; those that are done wait for the others, for days."""
    # said outright, so that several processes on CPUs find each other
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=30))


def use_all_cores() -> None:
    """Use all cores where `accelerate launch` left a process one thread and nobody told it to."""
    left_one = os.environ.get("ACCELERATE_USE_CPU") == "False" and os.environ.get("OMP_NUM_THREADS") == "1"
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    if left_one and alone and not torch.accelerator.is_available() and not _launcher_was_told_threads():
        torch.set_num_threads(psutil.cpu_count(logical=False) or 1)


def _launcher_was_told_threads() -> bool:
    """Whether the user gave the launcher a number of threads: it hands its own on under the same name."""
    try:
        launcher = psutil.Process(os.getppid())
        flags = " ".join(launcher.cmdline()).replace("-", "_")
        return "OMP_NUM_THREADS" in launcher.environ() or "num_cpu_threads_per_process" in flags
    except psutil.Error:  # it ended, or may not be looked at
        return False
