"""All that chance decides in one optimizer step but which images it takes: a function of the seed and the step."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from ddpm_pipe.randomness import derive_seed, generator
from ddpm_pipe.training.config import TrainConfig

BLOCK = 8
"""Images whose noise is drawn together: a process draws at most two blocks more than its share."""


class Draws(NamedTuple):
    """What chance decides about a part of the batch."""

    t: Tensor
    """timesteps, (n,)"""
    weight: Tensor
    """1 / (T p_t): what makes up for drawing some timesteps more often, (n,)"""
    eps: Tensor
    """noise, (n, C, H, W)"""
    mirror: Tensor
    """whether the image is mirrored, (n,)"""
    hide_label: Tensor
    """whether the label gives way to the null class, (n,)"""
    self_condition: bool
    """whether the network is shown its own estimate; the same for the whole batch"""
    dropout_seed: int
    """of the part: the seed of torch before the network is called"""

    def mirrored(self, x0: Tensor) -> Tensor:
        """The images (n, C, H, W), some of them mirrored."""
        return torch.where(self.mirror.view(-1, 1, 1, 1), x0.flip(-1), x0)

    def conditions(self, labels: Tensor | None, null_class: int | None) -> dict[str, Tensor]:
        """What the network is told besides x_t and t: the labels (n,), some of them hidden, or nothing."""
        if labels is None or null_class is None:
            return {}
        return {"class_labels": torch.where(self.hide_label, null_class, labels)}


def micro_batches(
    config: TrainConfig, accelerator: Accelerator, probabilities: Tensor, step: int, shape: tuple[int, ...]
) -> Iterator[tuple[slice, Draws]]:
    """The parts of the batch of a step that fall to this process, one per accumulation step.

    Numbers are drawn for the whole batch and cut. Noise is drawn in blocks of a few images, by a generator of each, and
    only the blocks of the part. So nothing depends on the number of processes, and none draws the noise of others.

    Args:
        probabilities: of each timestep, (T,), on the device.
        step: optimizer steps done.
        shape: (C, H, W) of the images.
    """
    size, device = config.batch_size, accelerator.device

    def draw(stream: str) -> torch.Generator:
        return generator(config.seed, stream, step, device=device)

    def draw_noise(stream: str, part: slice, *sizes: int) -> Tensor:
        """Normal noise of a part of the batch, (n, *sizes)."""
        blocks = range(part.start // BLOCK, -(-part.stop // BLOCK))
        generators = [generator(config.seed, stream, step, block, device=device) for block in blocks]
        drawn = torch.cat([torch.randn(BLOCK, *sizes, generator=each, device=device) for each in generators])
        return drawn[part.start - blocks.start * BLOCK :][: part.stop - part.start]

    t = torch.multinomial(probabilities, size, replacement=True, generator=draw("timestep"))
    weight = (1 / (config.num_train_timesteps * probabilities[t])).float()
    # on the CPU, where earlier versions drew it
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
