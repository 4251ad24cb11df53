"""Copy the files of a pipeline folder that are shared, list a folder, and upload it to the Hub in one commit."""

import shutil
from pathlib import Path

from huggingface_hub import HfApi

from ddpm_pipe.run.folder import EVALUATION
from ddpm_pipe.sharing.card import PICTURE
from ddpm_pipe.sharing.privacy import write_json
from ddpm_pipe.weights import CODE_FILES, CONFIGS, WEIGHTS, read_json

PACKAGE = __name__.partition(".")[0]
"""The folder of this package, also in a Space."""
STALE = [*CONFIGS, *WEIGHTS, *CODE_FILES, PICTURE, EVALUATION]
"""Files that an earlier push may have left in the repository.

A push deletes those that it does not contain itself, and leaves all other files of the repository alone.
"""
STALE_IN_SPACES = [f"{PACKAGE}/*"]
"""The same for a Space: the modules of this package."""


class PushError(ValueError):
    """A push did not succeed; the message says how to repeat it."""


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
    """Raise ValueError where a file, or a folder between it and `top`, is a link, because a link may lead anywhere."""
    for path in (file, *file.parents):
        if path == top:
            return
        if path.is_symlink():
            raise ValueError(f"{path} is a link, and links are not pushed; put the file itself there.")


def print_files(folder: Path) -> None:
    """Print size and name of every file in a folder, as a dry run does."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        print(f"{path.stat().st_size:>12,}  {path.relative_to(folder)}")


def upload(
    folder: Path,
    repo: str,
    message: str,
    repeat: str,
    public: bool = False,
    revision: str | None = None,
    token: str | None = None,
    create_pr: bool = False,
    space_sdk: str | None = None,
) -> str:
    """Create the repository if it does not exist, commit a staged folder to it and print its address.

    Args:
        folder: the staged folder, whose files the repository gets.
        repo: the repository, as org/name.
        message: message of the commit.
        repeat: the command or call that repeats the push, for the error message.
        public: let everyone see the repository.
        revision: branch to push to; it is created if it does not exist.
        token: access token of the Hub; None uses that of the login.
        create_pr: open a pull request instead of committing to the branch.
        space_sdk: what runs a Space, such as gradio or static; None makes the repository one of a model.

    Returns:
        The address of the repository.

    Raises:
        PushError: where the Hub cannot be reached or refuses.
        ValueError: where the repository is public and `public` is false.
    """
    api = HfApi(token=token)
    kind = "model" if space_sdk is None else "space"
    try:
        url = api.create_repo(repo, private=not public, exist_ok=True, repo_type=kind, space_sdk=space_sdk)
        exposed = not public and not api.repo_info(url.repo_id, repo_type=kind).private
        if not exposed:
            if revision:
                api.create_branch(url.repo_id, branch=revision, exist_ok=True)
            api.upload_folder(
                repo_id=url.repo_id,
                repo_type=kind,
                folder_path=folder,
                revision=revision,
                commit_message=message,
                create_pr=create_pr,
                delete_patterns=STALE if space_sdk is None else STALE_IN_SPACES,
            )
    except Exception as error:  # the client's own, or those of its HTTP library, which depends on its version
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise PushError(f"the push to {repo} failed ({reason}); nothing was lost, repeat it with: {repeat}") from error
    if exposed:
        raise ValueError(
            f"repo={repo!r} is public already; pass --public (in Python private=False) to push to it all the same."
        )
    print(f"pushed to {url}")
    return str(url)
