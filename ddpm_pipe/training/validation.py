"""Validation of a run in progress: sample grids, and the loss on held-out images."""

import math
from typing import Any, NamedTuple

import torch
from diffusers import ModelMixin
from diffusers.utils import make_image_grid
from PIL import Image
from torch import Tensor

from ddpm_pipe.data.images import to_unit_range
from ddpm_pipe.data.memory import ImageData
from ddpm_pipe.data.stream import ImageStream
from ddpm_pipe.launch import to_device
from ddpm_pipe.pipeline import null_class
from ddpm_pipe.pretrained import DDPMPipeline
from ddpm_pipe.randomness import generator
from ddpm_pipe.run.files import whole_file
from ddpm_pipe.schedulers import DDIMScheduler
from ddpm_pipe.training.comparison import Comparison
from ddpm_pipe.training.config import TrainConfig
from ddpm_pipe.training.log import Log, mean_by_timestep, named_means
from ddpm_pipe.training.recipe import TrainingLoss, make_sampler
from ddpm_pipe.training.state import TrainState

FAILURES = (ValueError, RuntimeError, MemoryError, OSError)
"""What a grid that cannot be drawn raises; torch out of memory is a RuntimeError."""
FEW_STEPS = (1, 2, 4)
"""Numbers of steps in which a grid shows a model that is tuned for few."""


class Validation:
    """Measures the loss of the average on held-out images and draws sample grids, every `sample_every` steps.

    The grids show samples of the averaged and of the raw network.

    Args:
        config: the config of the run.
        objective: the loss.
        data: the images trained on, with which samples are compared.
        held_out: the images kept out of training; may be empty.
        log: the log that records the numbers, and whose run folder receives the grids.
    """

    def __init__(
        self, config: TrainConfig, objective: TrainingLoss, data: ImageData | ImageStream, held_out: ImageData, log: Log
    ):
        self.config, self.objective, self.held_out, self.log = config, objective, held_out, log
        self.comparison = Comparison(data, held_out, config.seed)
        self.signal = mean_signal(objective) if config.objective == "denoising" else {}

    def show(self, state: TrainState, step: int) -> None:
        """Log the numbers and draw the grids that are due after `step` optimizer steps and do not exist yet.

        Then tell what the log shows of the run. A failure, such as a lack of memory or disk space, is printed and does
        not stop the run.
        """
        if not self.config.is_due(step, self.config.sample_every):
            return
        try:
            self._measure(state, step)
            self._draw(state, step)
        except FAILURES as error:
            reason = str(error).partition("\n")[0]
            print(f"the samples of step {step} could not be drawn ({reason}); the run goes on without them.")
        self.log.tell(step, (step - 1) // self.config.sample_every * self.config.sample_every, self.signal)

    def _measure(self, state: TrainState, step: int) -> None:
        if not len(self.held_out) or self.log.has(step, "held_out_loss"):
            return
        average, device = state.average.module, state.accelerator.device
        sums = held_out_sums(self.config, average, self.objective, self.held_out, device)
        self.log.record(step, named_means("held_out_loss", sums))

    def _draw(self, state: TrainState, step: int) -> None:
        files = self.log.run.grids(step)
        if all(file.exists() for file in files.values()):
            return
        drawn = draw_samples(self.config, state, self.objective)
        compared = self.comparison(drawn["average"].rounds[-1], drawn["raw"].rounds[-1])
        if compared and not self.log.has(step, next(iter(compared))):
            self.log.record(step, compared)
        grids = {name: samples.grid() for name, samples in drawn.items()}
        for name, file in files.items():
            file.parent.mkdir(exist_ok=True)
            with whole_file(file) as new:
                grids[name].save(new, "png")
        self.log.show(step, grids)


def mean_signal(objective: TrainingLoss) -> dict[str, float]:
    """Return the mean alpha_bar of each range of t, by its name in the log without that of the loss."""
    alpha_bar = objective.scheduler.alphas_cumprod
    steps = len(alpha_bar)
    means = named_means("signal", mean_by_timestep(torch.arange(steps), alpha_bar, steps))
    return {name.removeprefix("signal/"): value for name, value in means.items() if "/" in name}


class Samples(NamedTuple):
    """The samples of a grid."""

    rounds: list[list[Image.Image]]
    """the same samples, drawn in each number of sampling steps"""
    columns: int
    """columns of the grid; with classes, one for each class"""

    def grid(self) -> Image.Image:
        """Lay out the rounds one below the other."""
        missing = -len(self.rounds[0]) % self.columns
        cells = [image for images in self.rounds for image in images + [images[0].point(lambda _: 0)] * missing]
        return make_image_grid(cells, len(cells) // self.columns, self.columns)


def draw_samples(config: TrainConfig, state: TrainState, objective: TrainingLoss) -> dict[str, Samples]:
    """Draw the samples of a grid with the averaged and with the raw network."""
    average = samples_of(config, DDPMPipeline(state.average.module, objective.scheduler))
    unet = state.accelerator.unwrap_model(state.unet)
    unet.eval()
    try:
        with torch.compiler.set_stance("force_eager"):  # compiling it for a grid would take longer than drawing one
            return {"average": average, "raw": samples_of(config, DDPMPipeline(unet, objective.scheduler))}
    finally:
        unet.train()


@torch.no_grad()
def held_out_sums(
    config: TrainConfig, unet: ModelMixin, objective: TrainingLoss, data: ImageData, device: torch.device
) -> Tensor:
    """Return the sums and counts of the losses on held-out images by timestep, as `mean_by_timestep` does.

    Timesteps and noise are the same every time. The sums are on the device, and nothing here waits for it.
    """
    draw = generator(config.seed, "health")
    t = to_device(torch.randint(config.num_train_timesteps, (len(data),), generator=draw), device)
    losses = []
    for rows, t_of_rows in zip(torch.arange(len(data)).split(config.batch_size), t.split(config.batch_size)):
        images, labels = data.take(rows)
        x0 = to_unit_range(to_device(images, device))
        eps = to_device(torch.randn(images.shape, generator=draw), device)
        conditions = {} if labels is None else {"class_labels": to_device(labels, device)}
        losses.append(objective(unet, x0, t_of_rows, eps, False, 1.0, **conditions))
    return mean_by_timestep(t, torch.cat(losses), config.num_train_timesteps)


def samples_of(config: TrainConfig, pipeline: DDPMPipeline) -> Samples:
    """Draw the samples of a grid from the same noise each time; with classes, these take turns.

    DDIM draws them in `sample_steps` steps. After consistency tuning, the saved sampler draws them in 1, 2 and 4 steps.
    """
    unet, count = pipeline.unet, config.num_samples
    options: dict[str, Any] = {}
    columns = math.ceil(math.sqrt(count))
    if few := config.objective == "consistency":
        sampler = make_sampler(config, pipeline.scheduler)
    else:
        sampler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    pipeline = DDPMPipeline(unet, sampler)
    pipeline.set_progress_bar_config(disable=True)
    classes = null_class(unet)
    if config.class_conditional and classes is not None:
        columns = min(classes, count)
        options = {"class_labels": torch.arange(count) % classes, "guidance_scale": config.grid_guidance}
    rounds = [
        pipeline(count, generator(config.seed, "sample"), steps, **options, return_dict=False)[0]
        for steps in (FEW_STEPS if few else (config.sample_steps,))
    ]
    return Samples(rounds, columns)
