"""A pipeline folder on its way to the Hub: what of it is shared, and one commit with it."""

import shutil
from pathlib import Path

from huggingface_hub import HfApi

from ddpm_pipe.run.folder import EVALUATION
from ddpm_pipe.sharing.card import PICTURE
from ddpm_pipe.sharing.privacy import write_json
from ddpm_pipe.weights import CODE_FILES, CONFIGS, WEIGHTS, read_json

STALE = [*CONFIGS, *WEIGHTS, *CODE_FILES, PICTURE, EVALUATION]
"""What an earlier push may have left in the repository; deleted there where it is no longer part of the push. Other
files of the repository are left alone."""


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
    """Raise ValueError where a file, or a folder between it and `top`, is a link: it may lead anywhere."""
    for path in (file, *file.parents):
        if path == top:
            return
        if path.is_symlink():
            raise ValueError(f"{path} is a link, and links are not pushed; put the file itself there.")


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
