"""Train pixel-space diffusion models on your own images, measure how good they are, and share them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddpm_pipe.pretrained import DDPMPipeline
    from ddpm_pipe.schedulers import DDIMScheduler, DDPMScheduler
    from ddpm_pipe.unet import DDPMUNet2DModel

__all__ = ["DDIMScheduler", "DDPMPipeline", "DDPMScheduler", "DDPMUNet2DModel"]
__version__ = "0.2.0"

HOMES = {
    "DDPMPipeline": "pretrained",
    "DDIMScheduler": "schedulers",
    "DDPMScheduler": "schedulers",
    "DDPMUNet2DModel": "unet",
}
"""The module of each public class. A class is imported when it is first asked for, so that `--help` need not wait for
torch."""


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"ddpm_pipe.{HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *HOMES])
