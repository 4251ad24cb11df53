"""A training step of this package and of its peers, for the same network and the same image files.

diffusers' is its unconditional recipe, written anew from its documentation: a DataLoader that decodes and transforms
image by image, a prepared learning-rate schedule, EMAModel. Lucidrains' is the Trainer of denoising-diffusion-pytorch
itself, downloaded from PyPI; its image folder, which needs torchvision, is replaced by one that does the same.
"""

import contextlib
import io
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset, Image
from diffusers import DDPMScheduler, ModelMixin
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image as PILImage
from timing import DEVICE, Step
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ddpm_pipe.data.memory import ImageData, load_images
from ddpm_pipe.objective import Objective
from ddpm_pipe.training.config import TrainConfig
from ddpm_pipe.training.recipe import make_scheduler, make_unet
from ddpm_pipe.training.state import TrainState
from ddpm_pipe.training.step import training_step

ROOT = Path(__file__).resolve().parent.parent
LUCIDRAINS = ("denoising-diffusion-pytorch", "2.3.4", "denoising_diffusion_pytorch.denoising_diffusion_pytorch")

SMALL = {
    "_class_name": "UNet2DModel",
    "block_out_channels": [32, 64, 64],
    "down_block_types": ["DownBlock2D"] * 3,
    "up_block_types": ["UpBlock2D"] * 3,
    "norm_num_groups": 8,
}
CIFAR = yaml.safe_load((ROOT / "ddpm_pipe" / "presets" / "cifar10.yaml").read_text())["unet"]
NETWORKS = {"a small UNet2DModel": SMALL, "ddpm-cifar10": CIFAR}


def make_data(folder: Path, count: int = 256, size: int = 32) -> str:
    """PNG files of colour images, as a user has them."""
    noise = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        buffer = io.BytesIO()
        PILImage.fromarray(noise.integers(0, 256, (size, size, 3), np.uint8)).save(buffer, "png")
        rows.append({"image": {"bytes": buffer.getvalue(), "path": None}})
    Dataset.from_list(rows).cast_column("image", Image()).save_to_disk(folder)
    return str(folder)


def make_config(data: str, unet: dict, batch_size: int) -> TrainConfig:
    """The recipe of all: one average, AdamW, gradients clipped, images flipped."""
    return TrainConfig(data=data, unet=unet, batch_size=batch_size, flip=True)


def fresh_accelerator(precision: str) -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=DEVICE.type == "cpu", mixed_precision=precision)


def shaped_data(config: TrainConfig) -> ImageData:
    """One image of the size of the first, which says what network the data need, without reading the others."""
    width, height = Dataset.load_from_disk(config.data)[0]["image"].size
    return ImageData(torch.zeros(1, 3, height, width), torch.arange(1))


def make_network(config: TrainConfig) -> ModelMixin:
    """The network for images of that size."""
    return make_unet(config, shaped_data(config))


def our_step(config: TrainConfig, precision: str) -> Step:
    """A step of ddpm_pipe.training.loop, without what it writes."""
    accelerator = fresh_accelerator(precision)
    data = load_images(config.data, with_labels=config.class_conditional)
    state = TrainState(config, make_unet(config, data), accelerator)
    objective = Objective(make_scheduler(config))
    batches, step = data.batches(config.batch_size, 0), 0

    def train_step() -> None:
        nonlocal step
        training_step(state, objective, batches, data.shape, step)
        step += 1

    return train_step


# ---------------------------------------------------------------- diffusers


def decode(image: PILImage.Image) -> Tensor:
    """An image in [0, 1], resized and flipped by chance, as the transforms of both peers do."""
    array = np.asarray(image.convert("RGB").resize(image.size), np.float32) / 255
    return torch.from_numpy(array[:, ::-1].copy() if torch.rand(()) < 0.5 else array).permute(2, 0, 1)


def peer_batches(data: str, batch_size: int) -> Iterator[Tensor]:
    """Images decoded and scaled one after another, in shuffled batches, for ever."""
    dataset = Dataset.load_from_disk(data)
    dataset.set_transform(lambda rows: {"input": [2 * decode(image) - 1 for image in rows["image"]]})
    loader = DataLoader(dataset, batch_size=batch_size, shuffle=True)
    while True:
        yield from (batch["input"] for batch in loader)


def diffusers_step(config: TrainConfig, precision: str) -> Step:
    """A step of diffusers' unconditional recipe."""
    accelerator = fresh_accelerator(precision)
    model = make_network(config)
    average = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, power=0.75)
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    rates = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=10_000)
    model, optimizer, rates = accelerator.prepare(model, optimizer, rates)
    average.to(accelerator.device)
    batches = peer_batches(config.data, config.batch_size)
    model.train()

    def train_step() -> None:
        clean = next(batches).to(accelerator.device)
        noise = torch.randn_like(clean)
        t = torch.randint(0, 1000, (len(clean),), device=clean.device)
        loss = F.mse_loss(model(scheduler.add_noise(clean, noise, t), t).sample.float(), noise)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        average.step(model.parameters())
        loss.item()  # for its progress bar

    return train_step


# ---------------------------------------------------------------- lucidrains


class Answering(nn.Module):
    """A network of diffusers as GaussianDiffusion wants one."""

    def __init__(self, unet: ModelMixin):
        super().__init__()
        self.unet, self.channels, self.out_dim, self.self_condition = unet, 3, 3, False

    def forward(self, x: Tensor, time: Tensor, x_self_cond: None = None) -> Tensor:
        return self.unet(x, time).sample


class ImageRows(torch.utils.data.Dataset):
    """Its folder of images: decoded, resized, flipped and scaled to [0, 1] one after another."""

    def __init__(self, data: str, *rest, **options):
        self.rows = Dataset.load_from_disk(data)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Tensor:
        return decode(self.rows[i]["image"])


def lucidrains_step(config: TrainConfig, precision: str) -> Step:
    """A step of the Trainer of denoising-diffusion-pytorch.

    Raises:
        pytest.skip.Exception: where PyPI cannot be reached.
    """
    sys.path.insert(0, str(ROOT / "tests"))
    from pypi import load

    AcceleratorState._reset_state(reset_partial_state=True)
    scratch = Path(tempfile.gettempdir()) / "ddpm_pipe-benchmarks"
    package = load(*LUCIDRAINS, scratch)
    package.Dataset = ImageRows
    network = make_network(config)
    diffusion = package.GaussianDiffusion(
        Answering(network), image_size=network.config.sample_size, objective="pred_noise", beta_schedule="linear"
    )
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = package.Trainer(
            diffusion.to(DEVICE),
            config.data,
            train_batch_size=config.batch_size,
            results_folder=str(scratch / "results"),
            save_and_sample_every=10**9,
            calculate_fid=False,
            amp=precision != "no",
            mixed_precision_type=precision if precision != "no" else "fp16",
        )

    def train_step() -> None:
        trainer.train_num_steps = trainer.step + 1
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            trainer.train()

    return train_step


STEPS = {"diffusers": diffusers_step, "lucidrains": lucidrains_step, "ddpm_pipe": our_step}
"""Recipe -> (config, precision) -> a function that makes one optimizer step."""
