"""The random numbers of one optimizer step, except the choice of images, as a function of the seed and the step."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from ddpm_pipe.randomness import derive_seed, generator
from ddpm_pipe.training.config import TrainConfig

BLOCK = 8
"""Number of images whose noise is drawn together: a process draws at most two blocks more than its share."""


class Draws(NamedTuple):
    """The random numbers for a part of the batch."""

    t: Tensor
    """timesteps, (n,)"""
    weight: Tensor
    """1 / (T p_t), the loss weight that corrects for drawing some timesteps more often, (n,)"""
    eps: Tensor
    """noise, (n, C, H, W)"""
    mirror: Tensor
    """whether the image is mirrored, (n,)"""
    hide_label: Tensor
    """whether the null class replaces the label, (n,)"""
    self_condition: bool
    """whether the network receives its own estimate of x0 (self-conditioning); the same for the whole batch"""
    dropout_seed: int
    """the seed given to torch before the network is called on this part"""

    def mirrored(self, x0: Tensor) -> Tensor:
        """Return the images, (n, C, H, W), mirrored where `mirror` is true."""
        return torch.where(self.mirror.view(-1, 1, 1, 1), x0.flip(-1), x0)

    def conditions(self, labels: Tensor | None, null_class: int | None) -> dict[str, Tensor]:
        """Return the network's inputs besides x_t and t: the labels (n,), of which some are hidden, or nothing."""
        if labels is None or null_class is None:
            return {}
        return {"class_labels": torch.where(self.hide_label, null_class, labels)}


def micro_batches(
    config: TrainConfig, accelerator: Accelerator, probabilities: Tensor, step: int, shape: tuple[int, ...]
) -> Iterator[tuple[slice, Draws]]:
    """Yield this process's parts of the batch of a step, one per accumulation step, with their random numbers.

    Scalars are drawn for the whole batch and then cut. Noise is drawn in blocks of BLOCK images, each with a generator
    of its own, and a process draws only the blocks of its parts. So the numbers do not depend on how many processes
    there are.

    Args:
        config: the config of the run.
        accelerator: gives the device, the number of processes and the index of this one.
        probabilities: probability of each timestep, (T,), on the device.
        step: optimizer steps done.
        shape: (C, H, W) of the images.
    """
    size, device = config.batch_size, accelerator.device

    def draw(stream: str) -> torch.Generator:
        return generator(config.seed, stream, step, device=device)

    def draw_noise(stream: str, part: slice, *sizes: int) -> Tensor:
        """Draw the standard normal noise of a part of the batch, (n, *sizes)."""
        blocks = range(part.start // BLOCK, -(-part.stop // BLOCK))
        generators = [generator(config.seed, stream, step, block, device=device) for block in blocks]
        drawn = torch.cat([torch.randn(BLOCK, *sizes, generator=each, device=device) for each in generators])
        return drawn[part.start - blocks.start * BLOCK :][: part.stop - part.start]

    t = torch.multinomial(probabilities, size, replacement=True, generator=draw("timestep"))
    weight = (1 / (config.num_train_timesteps * probabilities[t])).float()
    # drawn on the CPU, as earlier versions did
    mirror = (torch.rand(size, generator=generator(config.seed, "flip", step)) < (0.5 if config.flip else 0)).to(device)
    hide = torch.rand(size, generator=draw("class_dropout"), device=device) < config.class_dropout
    self_condition = (
        config.unet.get("self_condition", False) and derive_seed(config.seed, "self_condition", step) % 2 == 0
    )

    parts = accelerator.num_processes * config.gradient_accumulation_steps
    for micro in range(config.gradient_accumulation_steps):
        index = micro * accelerator.num_processes + accelerator.process_index
        part = slice(index * size // parts, (index + 1) * size // parts)
        eps = draw_noise("noise", part, *shape)
        if config.offset_noise:
            eps += config.offset_noise * draw_noise("offset_noise", part, shape[0], 1, 1)
        seed = derive_seed(config.seed, "dropout", step, index)
        yield part, Draws(t[part], weight[part], eps, mirror[part], hide[part], self_condition, seed)
