"""The random numbers of one optimizer step, except the choice of images, as a function of the seed and the step."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from ddpm_pipe.launch import to_device
from ddpm_pipe.randomness import derive_seed, generator
from ddpm_pipe.training.config import TrainConfig
from ddpm_pipe.training.dropout import ImageDropout, draw_keys

BLOCK = 8
"""Number of images whose noise is drawn together: a process draws at most two blocks more than its share."""


class Draws(NamedTuple):
    """The random numbers for a part of the batch; None stands for what the config has no use for."""

    t: Tensor
    """timesteps, (n,)"""
    weight: Tensor
    """1 / (T p_t), the loss weight that corrects for drawing some timesteps more often, (n,)"""
    eps: Tensor
    """noise, (n, C, H, W)"""
    self_condition: bool
    """whether the network receives its own estimate of x0 (self-conditioning); the same for the whole batch"""
    dropout_seed: int
    """the seed given to torch before the network with dropout is called; the same for the whole batch"""
    mirror: Tensor | None
    """whether the image is mirrored, (n,)"""
    hide_label: Tensor | None
    """whether the null class replaces the label, (n,)"""
    dropout_keys: Tensor | None
    """what tells the dropout of an image from that of others, int32 (n,)"""

    def mirrored(self, x0: Tensor) -> Tensor:
        """Return the images, (n, C, H, W), mirrored where `mirror` is true."""
        if self.mirror is None:
            return x0
        return torch.where(self.mirror.view(-1, 1, 1, 1), x0.flip(-1), x0)

    def conditions(self, labels: Tensor | None, null_class: int | None) -> dict[str, Tensor]:
        """Return the network's inputs besides x_t and t: the labels (n,), of which some are hidden, or nothing."""
        if labels is None or null_class is None:
            return {}
        if self.hide_label is None:
            return {"class_labels": labels}
        return {"class_labels": torch.where(self.hide_label, null_class, labels)}

    def seed_dropout(self, modules: list[ImageDropout]) -> None:
        """Make the dropout modules of a network draw the masks of these images when it is called next."""
        if self.dropout_keys is None:
            return
        for module in modules:
            module.keys = self.dropout_keys
        torch.manual_seed(self.dropout_seed)


def micro_batches(
    config: TrainConfig, accelerator: Accelerator, probabilities: Tensor, step: int, shape: tuple[int, ...]
) -> Iterator[tuple[slice, Draws]]:
    """Yield this process's parts of the batch of a step, one per accumulation step, with their random numbers.

    A few numbers for each image are drawn for the whole batch and then cut. Noise is drawn in blocks of BLOCK images,
    each with a generator of its own, and a process draws only the blocks of its parts. So the numbers do not depend on
    how many processes there are.

    Args:
        config: the config of the run.
        accelerator: gives the device, the number of processes and the index of this one.
        probabilities: probability of each timestep, (T,), on the CPU.
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

    # drawn on the CPU, because multinomial raises an error on CUDA where algorithms must be deterministic
    t = torch.multinomial(probabilities, size, replacement=True, generator=generator(config.seed, "timestep", step))
    weight = to_device((1 / (config.num_train_timesteps * probabilities[t])).float(), device)
    t = to_device(t, device)
    mirror = hide_label = keys = None
    if config.flip:  # drawn on the CPU, as earlier versions did
        mirror = to_device(torch.rand(size, generator=generator(config.seed, "flip", step)) < 0.5, device)
    if config.class_conditional and config.class_dropout:
        hide_label = torch.rand(size, generator=draw("class_dropout"), device=device) < config.class_dropout
    if config.unet.get("dropout"):
        keys = draw_keys(size, draw("dropout_keys"))
    dropout_seed = derive_seed(config.seed, "dropout", step)
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
        mine = (None if drawn is None else drawn[part] for drawn in (mirror, hide_label, keys))
        yield part, Draws(t[part], weight[part], eps, self_condition, dropout_seed, *mine)
