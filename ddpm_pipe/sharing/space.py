"""The files of a Space: a page that draws with a model of the Hub, or a folder that is a Space already.

A page is an app.py that loads the model from its repository. The weights are thus in one place, and the page draws with
the newest ones. This package is in the Space itself, because the Space must run the version that made it.
"""

import shutil
from importlib.metadata import PackageNotFoundError, distribution, version
from importlib.resources import files
from pathlib import Path

import yaml
from huggingface_hub import RepoCard, SpaceCard, SpaceCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ddpm_pipe.sharing.config import PushConfig
from ddpm_pipe.sharing.upload import PACKAGE, refuse_links

APP = '''"""A page that draws with {repo}; ddpm_pipe, beside this file, is the program."""

from ddpm_pipe.demo.app import serve_space
from ddpm_pipe.demo.config import DemoConfig

serve_space(DemoConfig(model={repo!r}, revision={revision!r}, open=False))
'''

TEXT = """
# {name}

This page draws images with [{repo}](https://huggingface.co/{repo}), a pixel-space diffusion model, in the browser.
It was made by `ddpm-pipe push --space`. It runs on a CPU; a GPU, which you choose in the settings of the Space, is used
where there is one.

Where the model is private, the page needs a token that may read it: add one as the secret `HF_TOKEN` in the settings of
the Space.
"""

SDKS = ("gradio", "docker", "static")
"""What runs a Space."""

PYTHON = "3.12"
"""Version of Python in the Space; without one, the Hub takes an older one than this package needs."""


def stage_space(config: PushConfig, folder: Path) -> None:
    """Write the files of the Space into an empty folder: a page for the model, or a copy of the folder of the config.

    Raises:
        ValueError: where the folder of the config is no Space, a file in it is a link, or the model has no valid id.
    """
    if config.folder:
        copy_space(Path(config.folder), folder)
        return
    try:
        validate_repo_id(config.repo)
        sdk_version = version("gradio")
    except HFValidationError as error:
        raise ValueError(f"repo={config.repo!r} is not the id of a repository, such as org/name.") from error
    except PackageNotFoundError as error:
        raise ValueError("A Space gets the gradio of this machine; pip install 'ddpm_pipe[demo]'.") from error
    card = SpaceCardData(
        title=config.space.split("/")[-1],
        sdk="gradio",
        sdk_version=sdk_version,
        python_version=PYTHON,
        app_file="app.py",
        models=[config.repo],
        tags=["ddpm_pipe", "diffusion"],
        license="mit",
    )
    text = TEXT.format(name=card.title, repo=config.repo)
    SpaceCard(f"---\n{card.to_yaml()}\n---\n{text}").save(folder / "README.md")
    (folder / "app.py").write_text(APP.format(repo=config.repo, revision=config.revision))
    installed = distribution(PACKAGE)
    needed = [line for line in installed.requires or [] if "extra ==" not in line]
    (folder / "requirements.txt").write_text("\n".join(needed) + "\n")
    package = Path(str(files(PACKAGE)))
    shutil.copytree(package, folder / PACKAGE, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    licence = installed.read_text("licenses/LICENSE") or (package.parent / "LICENSE").read_text()  # a checkout's
    (folder / PACKAGE / "LICENSE").write_text(licence)


def copy_space(source: Path, folder: Path) -> None:
    """Copy a folder that is a Space, without hidden files.

    Raises:
        ValueError: where it is no Space, or a file in it is a link.
    """
    read_sdk(source)
    for file in sorted(source.rglob("*")):
        place = file.relative_to(source)
        refuse_links(file, source)
        if file.is_file() and not any(part.startswith(".") for part in place.parts):
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / place)


def read_sdk(folder: Path) -> str:
    """Return what runs a Space, by the metadata of its README.md.

    Raises:
        ValueError: where there is no such file, or it does not say so.
    """
    card = folder / "README.md"
    try:
        sdk = RepoCard.load(card).data.get("sdk")
    except (ValueError, OSError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"folder={str(folder)!r} is no Space: {card} cannot be read ({reason}).") from error
    if sdk not in SDKS:
        raise ValueError(f"{card} must say sdk: {', '.join(SDKS)} in its metadata; it says {sdk!r}.")
    return sdk
