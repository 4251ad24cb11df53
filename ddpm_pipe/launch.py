"""The processes and threads of a launch, as the launcher or the user chose them."""

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
"""How long processes wait for one that decodes, draws, compiles or uploads. Where one process dies, torchrun and
`accelerate launch` tell the others to end at once, and kill those that have not ended after 30 seconds."""


def processes() -> PartialState:
    """Join the processes of this launch and return their state."""
    # cpu is given explicitly, so that several processes on CPUs find each other
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)


def leave() -> None:
    """Leave the other processes of this launch, if there are any; threads of gloo at times abort a process that ends
    without this."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def local_processes() -> int:
    """Return how many processes of this launch run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Copy a tensor from the CPU to a device; a copy to a GPU is asynchronous and starts from pinned memory."""
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def from_main(function: Callable[[], T]) -> T:
    """Call `function` on the main process; return its result, or raise its error, on all processes.

    Machines need not share a disk, so files are to be read by the main process alone.
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
    """Use all cores where `accelerate launch` gave a process one thread and the user did not ask for that."""
    left_one = os.environ.get("ACCELERATE_USE_CPU") == "False" and os.environ.get("OMP_NUM_THREADS") == "1"
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    if left_one and alone and not torch.accelerator.is_available() and not _launcher_was_told_threads():
        torch.set_num_threads(psutil.cpu_count(logical=False) or 1)


def _launcher_was_told_threads() -> bool:
    """Return whether the user gave the launcher a number of threads.

    Only the launcher's environment and flags tell: it always sets OMP_NUM_THREADS for the processes that it starts.
    """
    try:
        launcher = psutil.Process(os.getppid())
        flags = " ".join(launcher.cmdline()).replace("-", "_")
        return "OMP_NUM_THREADS" in launcher.environ() or "num_cpu_threads_per_process" in flags
    except psutil.Error:  # the launcher has ended, or may not be inspected
        return False
