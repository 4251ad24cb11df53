"""One optimizer step of Algorithm 1 of DDPM (Ho et al. 2020)."""

from torch import Tensor

from ddpm_pipe.data.memory import Batches
from ddpm_pipe.data.stream import StreamBatches
from ddpm_pipe.training.draws import micro_batches
from ddpm_pipe.training.recipe import TrainingLoss
from ddpm_pipe.training.state import TrainState


def training_step(
    state: TrainState, objective: TrainingLoss, batches: Batches | StreamBatches, shape: tuple[int, ...], step: int
) -> list[tuple[Tensor, Tensor]]:
    """Take a step: draw images, timesteps and noise, and update the network and its averages.

    Args:
        state: the network and all that is updated with it.
        objective: the loss.
        batches: the images.
        shape: (C, H, W) of the images.
        step: optimizer steps done.

    Returns:
        Timesteps (n,) and losses (n,) of this process, one pair per accumulation step.
    """
    accelerator = state.accelerator
    seen, probabilities = [], state.timesteps.probabilities()
    progress = step / state.config.steps
    for part, draws in micro_batches(state.config, accelerator, probabilities, step, shape):
        x0, labels = batches(step, part, accelerator.device)
        x0, conditions = draws.mirrored(x0), draws.conditions(labels, state.null_class)
        draws.seed_dropout(state.dropouts)
        with accelerator.accumulate(state.unet):
            losses = objective(state.unet, x0, draws.t, draws.eps, draws.self_condition, progress, **conditions)
            accelerator.backward((losses * draws.weight).mean())
        seen.append((draws.t, losses.detach()))
    state.optimizer_step(step, seen)
    return seen
