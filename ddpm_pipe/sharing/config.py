"""The config of `push`: what is shared, where, and which licences its card names."""

from typing import Self

from pydantic import model_validator

from ddpm_pipe.config import Config, Place


class PushConfig(Config):
    """What to share"""

    run: Place = ""
    """the run folder; needed unless only a Space is pushed"""
    repo: Place = ""
    """repository of the model on the Hub, as org/name; needed unless only a folder is pushed"""
    space: Place = ""
    """Space on the Hub, as org/name: a page that draws with the model of repo in the browser, or what folder holds"""
    folder: Place = ""
    """folder that is a Space already, because it has a README.md whose metadata names its sdk, such as static"""
    public: bool = False
    """let everyone see the repository; it is private otherwise"""
    pipeline: str = "pipeline"
    """name of the pipeline folder in the run, such as ema-0.05"""
    revision: str | None = None
    """branch to push to; it is created if it does not exist"""
    license: str | None = None
    """licence of the weights, as the Hub names licences"""
    dataset: str | None = None
    """name of the training data, or their id on the Hub"""
    dataset_license: str | None = None
    """licence of the training data"""
    dry_run: bool = False
    """print which files would be pushed, and push nothing"""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.run and not self.space:
            raise ValueError("run must be given, the run folder; or space, for a page that draws with a model.")
        if self.folder and not self.space:
            raise ValueError(f"folder={self.folder!r} needs space, the Space to which it is pushed.")
        if not self.repo and (self.run or not self.folder):
            raise ValueError("repo must be given: the repository of the model on the Hub, as org/name.")
        return self
