"""What is shared, where, and what its card says of licences."""

from ddpm_pipe.config import Config, Place


class PushConfig(Config):
    """What to share"""

    run: Place
    """the run folder"""
    repo: str
    """repository on the Hub, as org/name"""
    public: bool = False
    """let everyone see it; it is private otherwise"""
    pipeline: str = "pipeline"
    """which pipeline folder of the run, as ema-0.05"""
    revision: str | None = None
    """branch to push to; it is made where it does not exist"""
    license: str | None = None
    """licence of the weights, as the Hub names licences"""
    dataset: str | None = None
    """name of the training data, or their id on the Hub"""
    dataset_license: str | None = None
    """licence of the training data"""
    dry_run: bool = False
    """print what would be pushed and push nothing"""
