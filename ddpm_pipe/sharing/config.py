"""The config of `push`: what is shared, where, and which licences its card names."""

from ddpm_pipe.config import Config, Place


class PushConfig(Config):
    """What to share"""

    run: Place
    """the run folder"""
    repo: str
    """repository on the Hub, as org/name"""
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
