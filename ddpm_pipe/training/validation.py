"""What tells a healthy run from a sick one: sample grids and the loss on images held out."""

import math
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.utils import make_image_grid
from PIL import Image

from ddpm_pipe.data.images import to_unit_range
from ddpm_pipe.data.memory import ImageData
from ddpm_pipe.objective import Objective
from ddpm_pipe.pipeline import null_class
from ddpm_pipe.pretrained import DDPMPipeline
from ddpm_pipe.randomness import generator
from ddpm_pipe.run.files import whole_file
from ddpm_pipe.schedulers import DDIMScheduler
from ddpm_pipe.training.log import Log, grid_files, mean_by_timestep, named_means, read_metrics
from ddpm_pipe.training.recipe import TrainConfig
from ddpm_pipe.training.state import TrainState


def show_health(
    config: TrainConfig,
    state: TrainState,
    objective: Objective,
    held_out: ImageData,
    log: Log,
    step: int,
) -> None:
    """Log the loss of the average on the images held out, and draw grids of the averaged and the raw network.

    What is there already is left as it is. Where memory or the disk do not suffice, that is told and the run goes on.
    """
    average, device = state.average.module, state.accelerator.device
    measured = any(entry["step"] == step and "held_out_loss" in entry for entry in read_metrics(log.run))
    try:
        if len(held_out) and not measured:
            log.record(step, held_out_loss(config, average, objective, held_out, device))
        files = grid_files(log.run, step)
        if not all(file.exists() for file in files.values()):
            grids = draw_grids(config, state, objective)
            for name, file in files.items():
                file.parent.mkdir(exist_ok=True)
                with whole_file(file) as new:
                    grids[name].save(new, "png")
            log.show(step, grids)
    except (ValueError, RuntimeError, MemoryError, OSError) as error:  # of torch, for no memory, a RuntimeError
        reason = str(error).partition("\n")[0]
        print(f"the samples of step {step} could not be drawn ({reason}); the run goes on without them.")


def draw_grids(config: TrainConfig, state: TrainState, objective: Objective) -> dict[str, Image.Image]:
    """Grids of the averaged and of the raw network."""
    average = sample_grid(config, DDPMPipeline(state.average.module, objective.scheduler))
    unet = state.accelerator.unwrap_model(state.unet)
    unet.eval()
    try:
        return {"average": average, "raw": sample_grid(config, DDPMPipeline(unet, objective.scheduler))}
    finally:
        unet.train()


@torch.no_grad()
def held_out_loss(
    config: TrainConfig, unet: ModelMixin, objective: Objective, data: ImageData, device: torch.device
) -> dict[str, float]:
    """The loss on images held out, over all and by timestep, with the same timesteps and noise every time."""
    draw = generator(config.seed, "health")
    t = torch.randint(config.num_train_timesteps, (len(data),), generator=draw).to(device)
    losses = []
    for rows in torch.arange(len(data)).split(config.batch_size):
        images, labels = data.take(rows)
        eps = torch.randn(images.shape, generator=draw).to(device)
        conditions = {} if labels is None else {"class_labels": labels.to(device)}
        losses.append(objective(unet, to_unit_range(images.to(device)), t[rows], eps, False, **conditions))
    sums = mean_by_timestep(t, torch.cat(losses), config.num_train_timesteps)
    return named_means("held_out_loss", sums)


def sample_grid(config: TrainConfig, pipeline: DDPMPipeline) -> Image.Image:
    """A grid drawn with DDIM from the same noise each time; with classes, one column per class."""
    unet, count = pipeline.unet, config.num_samples
    options: dict[str, Any] = {}
    columns = math.ceil(math.sqrt(count))
    sampler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    pipeline = DDPMPipeline(unet, sampler)
    pipeline.set_progress_bar_config(disable=True)
    classes = null_class(unet)
    if config.class_conditional and classes is not None:
        columns = min(classes, count)
        options = {"class_labels": torch.arange(count) % classes, "guidance_scale": config.guidance_scale}
    noise = generator(config.seed, "sample")
    (images,) = pipeline(count, noise, config.sample_steps, **options, return_dict=False)
    rows = math.ceil(count / columns)
    blank = [images[0].point(lambda _: 0)] * (rows * columns - count)
    return make_image_grid(images + blank, rows, columns)
