"""Processes and threads, as a launcher or a user chose them."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

T = TypeVar("T")

PATIENCE = timedelta(days=30)
"""How long processes wait for one that decodes, draws, compiles or uploads. Where one of them dies, the launcher ends
the others: torchrun and `accelerate launch` do it at once, and kill after 30 seconds what does not end by itself."""


def processes() -> PartialState:
    """The processes of this launch."""
    # said outright, so that several processes on CPUs find each other
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)


def local_processes() -> int:
    """How many processes of this launch run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def from_main(function: Callable[[], T]) -> T:
    """What `function` returns on the main process, on all processes; what it raises there is raised on all.

    Machines need not share a disk: what a file says is what the main process reads.
    """
    outcome: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = error
    if PartialState().num_processes > 1:
        broadcast_object_list(outcome)
    result, refusal = outcome
    if refusal is not None:
        raise refusal
    return result


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
