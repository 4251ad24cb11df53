"""Stopping a run between two steps when a signal or the end of the launcher asks it to."""

import os
import signal
import threading

import torch
from accelerate import Accelerator


class Interrupted(SystemExit):
    """The run was asked to stop and has saved a checkpoint; the exit code is 75, "try again later"."""

    def __init__(self):
        super().__init__(75)


LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")
"""Environment variables that `accelerate launch` and `torchrun` set for the processes they start."""


class Interruption:
    """Records SIGTERM and SIGINT, so that the run can stop after a whole step; a second signal ends it at once.

    The end of the launcher also asks its processes to stop, because `accelerate launch` does not forward signals.
    """

    def __init__(self):
        self.signalled = False
        self.launcher = os.getppid() if any(name in os.environ for name in LAUNCHED) else None

    @property
    def requested(self) -> bool:
        """True once this process was asked to stop."""
        return self.signalled or (self.launcher is not None and os.getppid() != self.launcher)

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self.handlers = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        else:
            self.handlers = {}
        return self

    def _note(self, number: int, frame: object) -> None:
        self.signalled = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def __exit__(self, *error: object) -> None:
        self._restore()

    def agreed(self, step: int, ask_every: int, accelerator: Accelerator) -> bool:
        """Return whether any process was asked to stop. Several processes ask each other every `ask_every` steps."""
        if accelerator.num_processes == 1:
            return self.requested
        if step % ask_every:
            return False
        return bool(accelerator.reduce(torch.tensor(float(self.requested), device=accelerator.device), "sum") > 0)
