"""A training loop to copy and change: DDPM's Algorithm 1 on the bundled pictures, on public parts of the package.

`python examples/minimal.py [steps] [folder]` trains, saves a pipeline, loads it and draws a grid. The real loop, in
ddpm_pipe/training/loop.py, adds processes, checkpoints, exact resumption and logs.
"""

import sys
from pathlib import Path

import torch
from diffusers.utils import make_image_grid

from ddpm_pipe import DDIMScheduler, DDPMPipeline, DDPMScheduler, DDPMUNet2DModel
from ddpm_pipe.data.memory import load_images
from ddpm_pipe.objective import Objective
from ddpm_pipe.training.ema import EMA, warmup_decay


def main(steps: int = 600, folder: str = "runs/minimal", batch_size: int = 32) -> None:
    torch.manual_seed(0)
    data = load_images(str(Path(__file__).parent / "fashion_mnist"), resolution=[16])
    batches = data.batches(batch_size, seed=0)
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    unet = DDPMUNet2DModel(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64),
        layers_per_block=1,
        attention_types=("none", "linear"),
    )
    objective = Objective(scheduler, weight="min_snr")
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3)
    average = EMA(unet, decay=lambda step: warmup_decay(step, 0.99))
    for step in range(steps):  # Algorithm 1 of DDPM
        x0, _ = batches(step, slice(batch_size))
        t = torch.randint(len(scheduler), (batch_size,))
        eps = torch.randn_like(x0)
        loss = objective(unet, x0, t, eps).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update(step)
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.4f}")

    DDPMPipeline(average.module, scheduler).save_pretrained(folder)
    pipeline = DDPMPipeline.from_pretrained(folder)
    pipeline.scheduler = DDIMScheduler.from_config(scheduler.config, timestep_spacing="trailing")
    images = pipeline(batch_size=16, num_inference_steps=20).images
    make_image_grid(images, 2, 8).save(Path(folder) / "samples.png")


if __name__ == "__main__":
    main(*(kind(value) for kind, value in zip((int, str), sys.argv[1:], strict=False)))
