"""All that chance decides in one optimizer step but which images it takes: a function of the seed and the step."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from ddpm_pipe.randomness import derive_seed, generator
from ddpm_pipe.training.config import TrainConfig


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

    All is drawn for the whole batch and then cut, so that it does not depend on the number of processes.

    Args:
        probabilities: of each timestep, (T,).
        step: optimizer steps done.
        shape: (C, H, W) of the images.
    """
    size, device = config.batch_size, accelerator.device

    def draw(stream: str) -> torch.Generator:
        return generator(config.seed, stream, step, device=device)

    probabilities = probabilities.to(device)
    t = torch.multinomial(probabilities, size, replacement=True, generator=draw("timestep"))
    weight = (1 / (config.num_train_timesteps * probabilities[t])).float()
    eps = torch.randn(size, *shape, generator=draw("noise"), device=device)
    if config.offset_noise:
        eps += config.offset_noise * torch.randn(size, shape[0], 1, 1, generator=draw("offset_noise"), device=device)
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
        seed = derive_seed(config.seed, "dropout", step, index)
        yield part, Draws(t[part], weight[part], eps[part], mirror[part], hide[part], self_condition, seed)
