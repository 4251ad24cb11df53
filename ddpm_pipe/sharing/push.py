"""Sharing a run or a pipeline on the Hub: the pipeline, its card, its picture and its evaluation, and nothing else."""

import dataclasses
import json
import shlex
import shutil
import tempfile
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from ddpm_pipe.config import Config, option
from ddpm_pipe.pretrained import DDPMPipeline
from ddpm_pipe.sharing.card import CODE_FILES, EVALUATION, PICTURE, find_picture, make_card, read_evaluation
from ddpm_pipe.training.log import METRICS
from ddpm_pipe.training.recipe import CONFIG, PLAN
from ddpm_pipe.weights import read_json

CONFIGS = ["model_index.json", "scheduler/scheduler_config.json", "unet/config.json"]
WEIGHTS = ["unet/diffusion_pytorch_model*.safetensors", "unet/diffusion_pytorch_model*.safetensors.index*.json"]
"""With `CODE_FILES` all that `save_pretrained` writes, and so all that is pushed of a pipeline folder."""

STALE = [*CONFIGS, *WEIGHTS, *CODE_FILES, PICTURE, EVALUATION]
"""What an earlier push may have left in the repository; deleted there where it is no longer part of the push. Other
files of the repository are left alone."""


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
        return upload_run(config, Path(folder))


def stage(config: PushConfig, folder: Path) -> None:
    """Copy into an empty folder what of a run is shared, and write its card there.

    Raises:
        ValueError: where there is no such pipeline, a file is a link, or the evaluation cannot be read.
    """
    run, pipeline = Path(config.run), Path(config.run) / config.pipeline
    if config.pipeline != pipeline.name:
        raise ValueError(f"pipeline={config.pipeline!r} must be the name of a folder in run={config.run!r}.")
    for source in (pipeline, run / CONFIG, run / PLAN, run / METRICS):
        refuse_links(source, run)
    if not (pipeline / "model_index.json").exists():
        raise ValueError(
            f"run={config.run!r} has no pipeline in {pipeline}; give a run folder and one of its pipelines."
        )
    stage_pipeline(pipeline, folder)
    picture = find_picture(run, pipeline)
    if picture is not None:
        refuse_links(picture, run)
        shutil.copyfile(picture, folder / PICTURE)
    for place in (pipeline, run):
        refuse_links(place / EVALUATION, place)
    evaluation = read_evaluation(run, pipeline)
    if evaluation:
        write_json(evaluation, folder / EVALUATION)
    card = make_card(run, pipeline, config.repo, config.license, config.dataset, config.dataset_license)
    card.save(folder / "README.md")


def stage_pipeline(pipeline: Path, folder: Path) -> None:
    """Copy the files that `save_pretrained` writes, and no others.

    Raises:
        ValueError: where one of them is a link, or a config cannot be read.
    """
    for pattern in [*CONFIGS, *WEIGHTS, *CODE_FILES]:
        for source in sorted(pipeline.glob(pattern)):
            refuse_links(source, pipeline)
            target = folder / source.relative_to(pipeline)
            target.parent.mkdir(parents=True, exist_ok=True)
            if pattern in CONFIGS:
                write_json(read_json(source), target)
            else:
                shutil.copyfile(source, target)


def refuse_links(file: Path, top: Path) -> None:
    """Raise ValueError where a file, or a folder between it and `top`, is a link: it may lead anywhere."""
    for path in (file, *file.parents):
        if path == top:
            return
        if path.is_symlink():
            raise ValueError(f"{path} is a link, and links are not pushed; put the file itself there.")


def write_json(content: Any, file: Path) -> None:
    """Write JSON without what concerns this machine alone: where a part was loaded from, and absolute paths."""

    def shared(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shared(entry) for key, entry in value.items() if key != "_name_or_path"}
        if isinstance(value, list):
            return [shared(entry) for entry in value]
        return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value

    file.write_text(json.dumps(shared(content), indent=2) + "\n")


def repeated(config: PushConfig) -> str:
    """The command line that pushes the same again."""
    flags = []
    for each in dataclasses.fields(config):
        value = getattr(config, each.name)
        if value != each.default:
            flags.append(f"--{each.name}" if value is True else f"--{each.name} {shlex.quote(value)}")
    return f"python examples/push.py {' '.join(flags)}"


def upload(
    folder: Path,
    repo: str,
    message: str,
    repeat: str,
    public: bool = False,
    revision: str | None = None,
    token: str | None = None,
    create_pr: bool = False,
) -> str:
    """Make the repository where it does not exist, commit a staged folder to it and print its address.

    Args:
        folder: holds what the repository shall hold.
        repo: as org/name.
        message: of the commit.
        repeat: how to push the same again, for the error.
        public: let everyone see it.
        revision: branch to push to; made where it does not exist.
        token: of the Hub; None is that of the login.
        create_pr: open a pull request instead of a commit.

    Raises:
        PushError: where the Hub cannot be reached or refuses.
        ValueError: where the repository is public and the push is not.
    """
    api = HfApi(token=token)
    try:
        url = api.create_repo(repo, private=not public, exist_ok=True)
        exposed = not public and not api.model_info(url.repo_id).private
        if not exposed:
            if revision:
                api.create_branch(url.repo_id, branch=revision, exist_ok=True)
            api.upload_folder(
                repo_id=url.repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=message,
                create_pr=create_pr,
                delete_patterns=STALE,
            )
    except Exception as error:  # of the HTTP library that this version of the client has, or its own
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise PushError(f"the push to {repo} failed ({reason}); nothing was lost, repeat it with: {repeat}") from error
    if exposed:
        raise ValueError(
            f"repo={repo!r} is public already; pass --public (in Python private=False) to push to it all the same."
        )
    print(f"pushed to {url}")
    return str(url)


def upload_run(config: PushConfig, folder: Path) -> str:
    """Upload what is staged of a run; raises as `upload`."""
    message = f"Push {config.pipeline} of {Path(config.run).name}"
    return upload(folder, config.repo, message, repeated(config), config.public, config.revision)


def push_pipeline(pipeline: DDPMPipeline, repo: str, private: bool | None, variant: str | None, **options: Any) -> str:
    """Push a pipeline that is no run's, with a card of what is known of it.

    Args:
        pipeline: what to push.
        repo: as org/name.
        private: hide it from others; None hides it too.
        variant: of the names of the files of weights.
        options: commit_message, token and create_pr, as `upload` takes them.

    Raises:
        PushError, ValueError: as `upload`.
    """
    message = options.pop("commit_message") or f"Push {type(pipeline).__name__}"
    with tempfile.TemporaryDirectory() as saved, tempfile.TemporaryDirectory() as folder:
        pipeline.save_pretrained(saved, variant=variant)
        stage_pipeline(Path(saved), Path(folder))
        make_card(None, Path(folder), repo).save(Path(folder) / "README.md")
        return upload(Path(folder), repo, message, f"pipeline.push_to_hub({repo!r})", private is False, **options)


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
        """Wait for the push under way and say where it failed."""
        if self.last is not None:
            error = self.last.exception()
            if error is not None:
                print(error)
            self.last = None
