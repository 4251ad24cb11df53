"""Validation of a run in progress: sample grids, and the loss on held-out images."""

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
from ddpm_pipe.training.config import TrainConfig
from ddpm_pipe.training.log import Log, mean_by_timestep, named_means
from ddpm_pipe.training.state import TrainState


class Validation:
    """Measures the loss of the average on held-out images and draws sample grids, every `sample_every` steps.

    The grids show samples of the averaged and of the raw network.

    Args:
        config: the config of the run.
        objective: the loss.
        held_out: the images kept out of training; may be empty.
        log: the log that records the loss, and whose run folder receives the grids.
    """

    def __init__(self, config: TrainConfig, objective: Objective, held_out: ImageData, log: Log):
        self.config, self.objective, self.held_out, self.log = config, objective, held_out, log

    def show(self, state: TrainState, step: int) -> None:
        """Log the loss and draw the grids if they are due after `step` optimizer steps and do not exist yet.

        A failure, such as a lack of memory or disk space, is printed and does not stop the run.
        """
        if not self.config.is_due(step, self.config.sample_every):
            return
        try:
            self._measure(state, step)
            self._draw(state, step)
        except (ValueError, RuntimeError, MemoryError, OSError) as error:  # torch out of memory: RuntimeError
            reason = str(error).partition("\n")[0]
            print(f"the samples of step {step} could not be drawn ({reason}); the run goes on without them.")

    def _measure(self, state: TrainState, step: int) -> None:
        entries = self.log.run.read_metrics()
        if not len(self.held_out) or any(entry["step"] == step and "held_out_loss" in entry for entry in entries):
            return
        average, device = state.average.module, state.accelerator.device
        self.log.record(step, held_out_loss(self.config, average, self.objective, self.held_out, device))

    def _draw(self, state: TrainState, step: int) -> None:
        files = self.log.run.grids(step)
        if all(file.exists() for file in files.values()):
            return
        grids = draw_grids(self.config, state, self.objective)
        for name, file in files.items():
            file.parent.mkdir(exist_ok=True)
            with whole_file(file) as new:
                grids[name].save(new, "png")
        self.log.show(step, grids)


def draw_grids(config: TrainConfig, state: TrainState, objective: Objective) -> dict[str, Image.Image]:
    """Draw sample grids of the averaged and of the raw network."""
    average = sample_grid(config, DDPMPipeline(state.average.module, objective.scheduler))
    unet = state.accelerator.unwrap_model(state.unet)
    unet.eval()
    try:
        with torch.compiler.set_stance("force_eager"):  # compiling it for a grid would take longer than drawing one
            return {"average": average, "raw": sample_grid(config, DDPMPipeline(unet, objective.scheduler))}
    finally:
        unet.train()


@torch.no_grad()
def held_out_loss(
    config: TrainConfig, unet: ModelMixin, objective: Objective, data: ImageData, device: torch.device
) -> dict[str, float]:
    """Return the mean loss on held-out images, overall and by timestep; timesteps and noise are the same every time."""
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
    """Draw a grid with DDIM from the same noise each time; with classes, the grid has one column per class."""
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
