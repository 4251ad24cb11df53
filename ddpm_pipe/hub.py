"""Sharing a run on the Hub: its pipeline, its card, its picture and its evaluation, and nothing else."""

import shutil
import tempfile
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi

from ddpm_pipe.card import EVALUATION, PICTURE, make_card
from ddpm_pipe.config import Config, option

PIPELINE_SUFFIXES = (".json", ".safetensors", ".py")
"""Of a pipeline folder, what is pushed; of the rest of a run, only what `stage` names."""

STALE = ["unet/*", "scheduler/*", "*.py", "*.png", EVALUATION]
"""What an earlier push may have left in the repository; deleted there where it is no longer part of the push."""


@dataclass
class PushConfig(Config):
    """What to share, where, and what its card says of licences."""

    run: str = field(metadata={"help": "the run folder"})
    repo: str = field(metadata={"help": "repository on the Hub, as org/name"})
    public: bool = option(False, "let everyone see it; private otherwise")
    pipeline: str = option("pipeline", "which pipeline folder of the run, as ema-0.05")
    revision: str | None = option(None, "branch to push to; made where it does not exist")
    license: str | None = option(None, "of the weights, as the Hub names licences")
    dataset: str | None = option(None, "name of the training data, or their id on the Hub")
    dataset_license: str | None = option(None, "of the training data")
    dry_run: bool = option(False, "print what would be pushed and push nothing")


class PushError(ValueError):
    """A push did not succeed; the message says how to repeat it."""


def push(config: PushConfig) -> str | None:
    """Push a run to the Hub; what is there already is not pushed again, and a push without news makes no commit.

    Returns:
        The address of the repository, None for a dry run.

    Raises:
        PushError: where the Hub cannot be reached or refuses; the run is as it was and the push can be repeated.
        ValueError: where the folder holds no run or no such pipeline, or a public repository would get a private run.
    """
    with tempfile.TemporaryDirectory() as folder:
        stage(config, Path(folder))
        if config.dry_run:
            for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
                print(f"{path.stat().st_size:>12,}  {path.relative_to(folder)}")
            return None
        return upload(config, Path(folder))


def stage(config: PushConfig, folder: Path) -> None:
    """Copy into an empty folder what of a run is shared, and write its card there.

    Raises:
        ValueError: where there is no such pipeline.
    """
    run, pipeline = Path(config.run), Path(config.run) / config.pipeline
    if not (pipeline / "model_index.json").exists():
        raise ValueError(
            f"run={config.run!r} has no pipeline in {pipeline}; give a run folder and one of its pipelines."
        )
    for source in pipeline.rglob("*"):
        if source.suffix in PIPELINE_SUFFIXES:
            target = folder / source.relative_to(pipeline)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    grids = sorted(path for path in (run / "samples").glob("step-*.png") if not path.stem.endswith("-raw"))
    if grids:
        shutil.copyfile(grids[-1], folder / PICTURE)
    if (run / EVALUATION).exists():
        shutil.copyfile(run / EVALUATION, folder / EVALUATION)
    card = make_card(run, pipeline, config.repo, config.license, config.dataset, config.dataset_license)
    card.save(folder / "README.md")


def upload(config: PushConfig, folder: Path) -> str:
    """Make the repository where it does not exist and commit a staged folder to it.

    Raises:
        PushError: where the Hub cannot be reached or refuses.
        ValueError: where the repository is public and the push is not.
    """
    api = HfApi()
    repeat = f"python examples/push.py --run {config.run} --repo {config.repo}{' --public' * config.public}"
    try:
        url = api.create_repo(config.repo, private=not config.public, exist_ok=True)
        exposed = not config.public and not api.model_info(url.repo_id).private
        if not exposed:
            if config.revision:
                api.create_branch(url.repo_id, branch=config.revision, exist_ok=True)
            message = f"Push {config.pipeline} of {Path(config.run).name}"
            api.upload_folder(
                repo_id=url.repo_id,
                folder_path=folder,
                revision=config.revision,
                commit_message=message,
                delete_patterns=STALE,
            )
    except Exception as error:  # of the HTTP library that this version of the client has, or its own
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise PushError(
            f"the push to {config.repo} failed ({reason}); nothing was lost, repeat it with: {repeat}"
        ) from error
    if exposed:
        raise ValueError(f"repo={config.repo!r} is public already; pass --public to push to it all the same.")
    return str(url)


class Pusher:
    """Pushes a run from time to time while it goes on: in the background, and a failure is only told."""

    def __init__(self, config: PushConfig):
        self.config, self.api = config, HfApi()
        self.last: Future | None = None

    def push(self) -> None:
        """Start a push of what is saved now; left out where the one before is still under way."""
        if self.last is not None and not self.last.done():
            print(f"the last push to {self.config.repo} is still under way; this one is left out.")
            return
        self.finish()
        folder = tempfile.TemporaryDirectory()
        stage(self.config, Path(folder.name))

        def upload_and_delete() -> None:
            with folder:
                upload(self.config, Path(folder.name))

        self.last = self.api.run_as_future(upload_and_delete)

    def finish(self) -> None:
        """Wait for the push under way and say where it failed."""
        if self.last is not None:
            error = self.last.exception()
            if error is not None:
                print(error)
            self.last = None
