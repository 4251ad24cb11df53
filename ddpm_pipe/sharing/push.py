"""Share a run on the Hub, one of its pipelines with its card, picture and evaluation and nothing else; and Spaces."""

import shlex
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from huggingface_hub import HfApi

from ddpm_pipe.run.folder import EVALUATION, Run
from ddpm_pipe.sharing.card import PICTURE, find_picture, make_card, read_evaluation
from ddpm_pipe.sharing.config import PushConfig
from ddpm_pipe.sharing.privacy import write_json
from ddpm_pipe.sharing.space import read_sdk, stage_space
from ddpm_pipe.sharing.upload import print_files, refuse_links, stage_pipeline, upload


def push(config: PushConfig) -> str | None:
    """Push a run, a Space, or both to the Hub.

    Files that are already there are not pushed again, and without changes there is no commit.

    Returns:
        The address of the last repository; None for a dry run.

    Raises:
        PushError: where the Hub cannot be reached or refuses; the run is unchanged, and the push can be repeated.
        ValueError: where the folder holds no run or no such pipeline, or is no Space, or the repository is public and
            the push is not.
    """
    address = None
    if config.run:
        address = share(config, stage, upload_run)
    if config.space:
        address = share(config, stage_space, upload_space)
    return address


def share(
    config: PushConfig, stage: Callable[[PushConfig, Path], None], upload: Callable[[PushConfig, Path], str]
) -> str | None:
    """Stage files in a folder and upload them, or print their list for a dry run; return the address, or None."""
    with tempfile.TemporaryDirectory() as folder:
        stage(config, Path(folder))
        if config.dry_run:
            print_files(Path(folder))
            return None
        return upload(config, Path(folder))


def stage(config: PushConfig, folder: Path) -> None:
    """Copy the files of a run that are shared into an empty folder, and write the model card there.

    Raises:
        ValueError: where there is no such pipeline, a file is a link, or the evaluation cannot be read.
    """
    run = Run(config.run)
    pipeline = run.folder / config.pipeline
    if config.pipeline != pipeline.name:
        raise ValueError(f"pipeline={config.pipeline!r} must be the name of a folder in run={config.run!r}.")
    for source in (pipeline, run.config, run.plan, run.metrics):
        refuse_links(source, run.folder)
    if not (pipeline / "model_index.json").exists():
        raise ValueError(
            f"run={config.run!r} has no pipeline in {pipeline}; give a run folder and one of its pipelines."
        )
    stage_pipeline(pipeline, folder)
    picture = find_picture(run, pipeline)
    if picture is not None:
        refuse_links(picture, run.folder)
        shutil.copyfile(picture, folder / PICTURE)
    for place in (pipeline, run.folder):
        refuse_links(place / EVALUATION, place)
    evaluation = read_evaluation(run, pipeline)
    if evaluation:
        write_json(evaluation, folder / EVALUATION)
    card = make_card(run, pipeline, config.repo, config.license, config.dataset, config.dataset_license)
    card.save(folder / "README.md")


def repeated(config: PushConfig) -> str:
    """Return the command line that repeats this push."""
    given = config.model_dump(exclude_defaults=True)
    flags = [f"--{name}" if value is True else f"--{name} {shlex.quote(value)}" for name, value in given.items()]
    return f"ddpm-pipe push {' '.join(flags)}"


def upload_run(config: PushConfig, folder: Path) -> str:
    """Upload the staged files of a run and return the address; errors are those of `upload`."""
    message = f"Push {config.pipeline} of {Path(config.run).name}"
    return upload(folder, config.repo, message, repeated(config), config.public, config.revision)


def upload_space(config: PushConfig, folder: Path) -> str:
    """Upload the staged files of a Space and return the address; errors are those of `upload`."""
    sdk = read_sdk(folder)
    return upload(folder, config.space, "Push the page", repeated(config), config.public, space_sdk=sdk)


class Pusher:
    """Pushes a run in the background while it is training; a push that fails is only reported."""

    def __init__(self, config: PushConfig):
        self.config, self.api = config, HfApi()
        self.last: Future | None = None

    def push(self) -> None:
        """Start a push of what is saved now, unless the previous one is still under way."""
        if self.last is not None and not self.last.done():
            print(f"the last push to {self.config.repo} is still under way; this one is left out.")
            return
        self.finish()
        folder = tempfile.TemporaryDirectory()
        try:
            stage(self.config, Path(folder.name))
        except (ValueError, OSError) as error:
            folder.cleanup()
            print(f"nothing is pushed: {error}")
            return

        def upload_and_delete() -> None:
            with folder:
                upload_run(self.config, Path(folder.name))

        self.last = self.api.run_as_future(upload_and_delete)

    def finish(self) -> None:
        """Wait for the push that is under way, and print its error if it failed."""
        if self.last is not None:
            error = self.last.exception()
            if error is not None:
                print(error)
            self.last = None
