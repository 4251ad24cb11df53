"""The folder of a run: where its files lie, who may write into it, and how it is deleted."""

import glob
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ddpm_pipe.config import read_config_file
from ddpm_pipe.run.files import replace_folder

EVALUATION = "evaluation.json"
"""The file of what was measured of a pipeline. It lies in the pipeline's folder, so new weights replace it too."""
TRAINING = "training.json"
"""The file in a pipeline's folder that says after how many optimizer steps of its run the pipeline was written."""


class Run:
    """One run folder. No other module spells the names of the files in it.

    Args:
        folder: the folder, which need not exist yet.

    Attributes:
        config: every choice of the run.
        plan: what the run prints before its first step, kept for the model card.
        metrics: the log, one JSON object per line.
        report: the curves of the log.
        pipeline: the averaged network, saved as a pipeline.
        teacher: the weights of the teacher whose guidance the run learns.
        checkpoints, snapshots, samples: folders of checkpoints, of power-function averages and of sample grids.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.config = self.folder / "config.yaml"
        self.plan = self.folder / "plan.json"
        self.metrics = self.folder / "metrics.jsonl"
        self.report = self.folder / "report.png"
        self.pipeline = self.folder / "pipeline"
        self.teacher = self.folder / "teacher.safetensors"
        self.checkpoints = self.folder / "checkpoints"
        self.snapshots = self.folder / "ema"
        self.samples = self.folder / "samples"
        self._lock = self.folder / "run.lock"

    def __str__(self) -> str:
        return str(self.folder)

    # ------------------------------------------------------------ places

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}"

    def snapshot(self, step: int) -> Path:
        return self.snapshots / f"step-{step:08d}"

    def grids(self, step: int) -> dict[str, Path]:
        """Return where the sample grids of the averaged and of the raw network are kept."""
        return {name: self.samples / f"step-{step:08d}{end}.png" for name, end in (("average", ""), ("raw", "-raw"))}

    def average(self, sigma_rel: float) -> Path:
        """Return where the pipeline of a power-function average of this width is written."""
        return self.folder / f"ema-{sigma_rel:g}"

    @staticmethod
    def width(pipeline: Path) -> str | None:
        """Return the width of the average in a pipeline's folder, by its name.

        It is None for the average of the training loop, the only one that the log of the run describes.
        """
        match = re.fullmatch(r"ema-(.*)", pipeline.name)
        return match and match[1]

    @staticmethod
    def steps(folder: Path) -> list[int]:
        """Return the steps of the checkpoints, snapshots or grids in a folder, in increasing order."""
        found = (re.fullmatch(r"step-(\d+)((-raw)?\.png)?", path.name) for path in folder.glob("step-*"))
        return sorted({int(match[1]) for match in found if match})

    # ------------------------------------------------------------ what it holds

    def exists(self) -> bool:
        """Return whether the folder holds a run: a config and a plan, or a config alone where a kill left no more."""
        try:
            is_config = {"data", "output_dir"} <= self.read_config().keys()
        except ValueError:
            return False
        return is_config and (self.plan.exists() or self._contents() == [self.config])

    def read_config(self) -> dict[str, Any]:
        """Return the config of the run; raise ValueError where it cannot be read."""
        return read_config_file(self.config)

    def read_plan(self) -> dict[str, Any]:
        """Return the plan of the run; raise ValueError where it cannot be read."""
        return read_config_file(self.plan)

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the entries of the log, oldest first, without a last line that was cut short."""
        entries = []
        for line in self.metrics.read_text().splitlines() if self.metrics.exists() else []:
            try:
                entries.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return entries

    # ------------------------------------------------------------ writing

    def save_pipeline(self, folder: Path, pipeline: Any, step: int) -> None:
        """Replace `folder` with a pipeline and the number of steps that its weights were trained for.

        Raises:
            CheckpointError: as in `replace_folder`.
        """

        def write(new: Path) -> None:
            pipeline.save_pretrained(new)
            (new / TRAINING).write_text(json.dumps({"step": step}) + "\n")

        replace_folder(folder, write)

    def forget_after(self, step: int) -> None:
        """Delete the checkpoints and snapshots of later steps, the newest first."""
        for part in (self.checkpoints, self.snapshots):
            for later in reversed([found for found in self.steps(part) if found > step]):
                shutil.rmtree(part / f"step-{later:08d}")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder and keep other processes from training in it. The system frees the lock of a killed process.

        Raises:
            ValueError: where another process trains in the folder, or it cannot be written.
        """
        lock = FileLock(self._lock, timeout=0)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout as error:
            raise ValueError(f"output_dir={str(self)!r} is being trained in by another process.") from error
        except OSError as error:
            raise ValueError(f"output_dir={str(self)!r} cannot be written: {error.strerror}.") from error
        try:
            yield
        finally:
            lock.release()

    def check_clearable(self) -> None:
        """Raise ValueError where the folder holds anything but a run, or the images that the run was trained on."""
        found = sorted(path.name for path in self._contents())
        if found and not self.exists():
            raise ValueError(
                f"output_dir={str(self)!r} holds {', '.join(found[:5])} but not the {self.config.name} and "
                f"{self.plan.name} of a run, so --overwrite deletes nothing there; choose another folder."
            )
        if found:
            self.check_apart("data", str(self.read_config()["data"]))

    def check_apart(self, name: str, place: str) -> None:
        """Raise ValueError where the images or the model that a key of the config names lie in the folder."""
        path = Path(place).expanduser()
        here = path.exists() or glob.has_magic(place)  # else it is an id on the Hub
        if here and self.folder.resolve() in (path.resolve(), *path.resolve().parents):
            raise ValueError(f"{name}={place!r} lies in output_dir={str(self)!r}, which --overwrite deletes.")

    def clear(self) -> None:
        """Delete everything in the folder, plan and config last, so that what an interruption leaves is still a run.

        Raises:
            ValueError: where the folder holds anything but a run, or something cannot be deleted.
        """
        self.check_clearable()
        try:
            for path in sorted(self._contents(), key=lambda path: (path == self.config, path == self.plan)):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        except OSError as error:
            raise ValueError(f"output_dir={str(self)!r} cannot be cleared: {error}.") from error

    def _contents(self) -> list[Path]:
        return [path for path in self.folder.glob("*") if path != self._lock] if self.folder.is_dir() else []
