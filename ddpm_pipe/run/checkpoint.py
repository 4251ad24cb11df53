"""Checkpoints of a run. Each is written whole or not at all and checked when it is read; the oldest are deleted.

A run folder holds `checkpoints/step-00001000/`, ..., each with its files and a `manifest.json` of their SHA-256 sums.
"""

import logging
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ddpm_pipe.run.files import CheckpointError, check_manifest, replace_folder, save_tensors, write_manifest
from ddpm_pipe.run.folder import Run

logger = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run.

    Args:
        run: the run whose checkpoints they are.
        keep_last: how many of the newest to keep, at least 1.
        keep_every: keep also those whose step is a multiple of this; 0 keeps no others.
        keep_step: keep also the one of this step.
    """

    def __init__(self, run: Run, keep_last: int = 2, keep_every: int = 0, keep_step: int | None = None):
        self.run = run
        self.keep_last, self.keep_every, self.keep_step = keep_last, keep_every, keep_step

    def steps(self) -> list[int]:
        """Return the steps of the checkpoints on disk, in increasing order."""
        return self.run.steps(self.run.checkpoints)

    def save(self, step: int, weights: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
        """Write one checkpoint, then delete those that are no longer wanted, and return its folder.

        Args:
            step: number of optimizer steps done.
            weights: file name without suffix -> state dict, as safetensors.
            state: everything else, readable by `torch.load(weights_only=True)`.

        Raises:
            CheckpointError: where it cannot be written; earlier checkpoints stay intact.
        """

        def write(folder: Path) -> None:
            save_tensors(folder, weights)
            torch.save(dict(state), folder / "state.pt")
            write_manifest(folder, step)

        replace_folder(self.run.checkpoint(step), write)
        self._delete_old(step)
        return self.run.checkpoint(step)

    def _delete_old(self, newest: int) -> None:
        """Delete checkpoints that are no longer wanted, and those of later steps, before which the run was resumed."""
        steps = self.steps()
        wanted = [step for step in steps if step <= newest][-self.keep_last :]
        for step in steps:
            kept_for_good = step == self.keep_step or (self.keep_every and step % self.keep_every == 0)
            if step not in wanted and not (kept_for_good and step <= newest):
                shutil.rmtree(self.run.checkpoint(step), ignore_errors=True)

    def load(self, last: float = math.inf) -> tuple[int, dict[str, dict[str, Tensor]], dict[str, Any]] | None:
        """Return step, weights and state of the newest checkpoint that can be read; None where there is no checkpoint.

        Where a checkpoint cannot be read, the log says so and the one before it is tried.

        Args:
            last: checkpoints of later steps are left out.

        Raises:
            CheckpointError: where there are checkpoints and none can be read, or all are later.
        """
        steps = [step for step in self.steps() if step <= last]
        if not steps and self.steps():
            raise CheckpointError(f"{self.run.checkpoints} holds no checkpoint of step {last} or before to go on from.")
        for step in reversed(steps):
            try:
                return step, *self._read(self.run.checkpoint(step))
            except (OSError, ValueError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
                reason = str(error).rstrip(".")
                logger.warning(
                    "checkpoint %s is unreadable (%s); taking the one before it.", self.run.checkpoint(step), reason
                )
        if steps:
            raise CheckpointError(f"none of the {len(steps)} checkpoints in {self.run.checkpoints} can be read.")
        return None

    def _read(self, folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        check_manifest(folder)
        weights = {path.stem: safetensors.torch.load_file(path) for path in folder.glob("*.safetensors")}
        return weights, torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
