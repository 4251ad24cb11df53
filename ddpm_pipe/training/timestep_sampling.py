"""Distributions of the training timesteps: uniform, or favouring timesteps with a large loss."""

import torch
from torch import Tensor


class UniformSampler:
    """Draws every timestep equally often (DDPM, Algorithm 1, line 3).

    Args:
        steps: T.
    """

    def __init__(self, steps: int):
        self.steps = steps

    def probabilities(self) -> Tensor:
        """Return the probability of each timestep, float64 (T,) on the CPU."""
        return torch.full((self.steps,), 1 / self.steps, dtype=torch.float64)

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Do nothing: the uniform distribution does not depend on losses."""

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        pass


class LossSecondMomentSampler(UniformSampler):
    """Draws t with p_t proportional to sqrt(E[L_t^2]) over the last losses of each timestep (Improved DDPM, eq. 18).

    The distribution is uniform until every timestep has a full history. After that, a share of 0.1 % stays uniform.

    Args:
        steps: T.
        history: losses remembered per timestep, 10 in the paper.
    """

    def __init__(self, steps: int, history: int = 10):
        super().__init__(steps)
        self.losses = torch.zeros(steps, history, dtype=torch.float64)
        self.counts = torch.zeros(steps, dtype=torch.long)

    def probabilities(self) -> Tensor:
        if (self.counts < self.losses.shape[1]).any():
            return super().probabilities()
        weights = self.losses.square().mean(1).sqrt()
        return 0.999 * weights / weights.sum() + 0.001 / self.steps

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Record the losses (B,) of timesteps (B,); a new loss replaces the oldest one of its timestep."""
        for step, loss in zip(t.tolist(), losses.double().tolist(), strict=True):
            self.losses[step, self.counts[step] % self.losses.shape[1]] = loss
            self.counts[step] += 1

    def state_dict(self) -> dict[str, Tensor]:
        return {"losses": self.losses, "counts": self.counts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.losses, self.counts = state["losses"].clone(), state["counts"].clone()


TIMESTEP_SAMPLERS: dict[str, type[UniformSampler]] = {
    "uniform": UniformSampler,
    "loss_second_moment": LossSecondMomentSampler,
}
