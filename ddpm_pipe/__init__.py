"""Train pixel-space diffusion models on your own images, know how good they are, and share them."""

from ddpm_pipe.pretrained import DDPMPipeline
from ddpm_pipe.schedulers import DDIMScheduler, DDPMScheduler
from ddpm_pipe.unet import DDPMUNet2DModel

__all__ = ["DDIMScheduler", "DDPMPipeline", "DDPMScheduler", "DDPMUNet2DModel"]
__version__ = "0.1.0"
