"""The optimizers of training: AdamW, and Muon for the matrices with AdamW for the rest."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_pipe.training.config import OptimConfig

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
"""The polynomial a s + b s^3 + c s^5 and how often it is applied: singular values end between 0.68 and 1.14 (Jordan et
al. 2024, "Muon: an optimizer for hidden layers in neural networks")."""


def make_optimizer(config: OptimConfig, unet: nn.Module) -> torch.optim.AdamW:
    """Build the optimizer of the config for all parameters of a network."""
    options: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_eps,
        "weight_decay": config.weight_decay,
        "fused": True,
    }
    if config.optimizer == "adamw":
        return torch.optim.AdamW(unet.parameters(), **options)
    return Muon(unet.parameters(), hidden_matrices(unet), config.muon_rms, **options)


def hidden_matrices(unet: nn.Module) -> list[Tensor]:
    """Return the filters of all convolutions but the first and the last, which see or return pixels."""
    return [
        module.weight
        for name, module in unet.named_modules()
        if isinstance(module, nn.Conv2d) and name not in ("conv_in", "conv_out")
    ]


def newton_schulz(grams: Tensor) -> Tensor:
    """Return for each Gram matrix G = M M^T, (k, m, m), the matrix by which to multiply M, (k, m, m).

    M is scaled to a Frobenius norm of 1, and each iteration multiplies it by F = a + b G + c G^2, with the G of then.
    Polynomials of one matrix commute, so M itself need not take part.
    """
    a, b, c = COEFFICIENTS
    squares = grams.diagonal(dim1=1, dim2=2).sum(1).clamp(min=1e-14).view(-1, 1, 1)  # of the Frobenius norms
    grams = grams / squares
    product = torch.eye(grams.shape[-1], dtype=grams.dtype, device=grams.device).expand_as(grams)
    for _ in range(ITERATIONS):
        rest = torch.baddbmm(grams, grams, grams, beta=b, alpha=c)  # F - a
        product = torch.baddbmm(product, rest, product, beta=a)  # F times the product
        for _ in range(2):
            grams = torch.baddbmm(grams, rest, grams, beta=a)  # F G F
    return product * squares.rsqrt()


def orthogonalized(matrices: list[Tensor]) -> list[Tensor]:
    """Bring all singular values of each matrix, (m, n), near 1 by Newton-Schulz iterations of the smaller Gram matrix.

    Those of one size are computed together, since a GPU takes as long for a small product as for a large one.
    """
    wide = [each.mT if each.shape[0] > each.shape[1] else each for each in matrices]
    places: dict[torch.Size, list[int]] = defaultdict(list)
    for i, each in enumerate(wide):
        places[each.shape].append(i)
    stacks = {shape: torch.stack([wide[i] for i in places[shape]]) for shape in places}
    for size in dict.fromkeys(shape[0] for shape in stacks):
        alike = [shape for shape in stacks if shape[0] == size]
        factors = newton_schulz(torch.cat([stacks[shape] @ stacks[shape].mT for shape in alike]))
        for shape, factor in zip(alike, factors.split([len(places[shape]) for shape in alike])):
            for i, result in zip(places[shape], factor @ stacks[shape]):
                wide[i] = result
    return [result if result.shape == each.shape else result.mT for result, each in zip(wide, matrices)]


class Muon(torch.optim.AdamW):
    """AdamW, but for matrices, which move by their orthogonalized momentum (Jordan et al. 2024).

    A filter of a convolution is a row. The root mean square of a step of a matrix is about `rms` learning rates,
    whatever its shape (Liu et al. 2025, "Muon is scalable for LLM training", eq. 4, where it is 0.2).

    Args:
        parameters: all parameters.
        matrices: those that move so, of at least two dimensions; AdamW moves the others.
        rms: root mean square of a step, in learning rates.
        momentum: decay of the momentum, which is Nesterov's.
        options: the keywords of AdamW.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        matrices: list[Tensor],
        rms: float,
        momentum: float = 0.95,
        **options: Any,
    ):
        orthogonal = {id(matrix) for matrix in matrices}
        others = [each for each in parameters if id(each) not in orthogonal]
        super().__init__([{"params": others}, {"params": matrices}], **options)
        self.param_groups[1] |= {"rms": rms, "momentum": momentum}
        self._step_supports_amp_scaling = False  # a loss scaler unscales the gradients of matrices too, before the step

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        matrices = [matrix for matrix in self.param_groups[1]["params"] if matrix.grad is not None]
        gradients = [matrix.grad for matrix in matrices]
        self._move(matrices, gradients, self.param_groups[1])
        for matrix in matrices:
            matrix.grad = None  # AdamW leaves it where it is
        result = super().step(closure)
        for matrix, gradient in zip(matrices, gradients):
            matrix.grad = gradient
        return result

    def _move(self, matrices: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
        momenta = [self._momentum(matrix) for matrix in matrices]
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, gradients)
        ahead = torch._foreach_add(gradients, momenta, alpha=group["momentum"])
        directions = orthogonalized([each.flatten(1) for each in ahead])
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        sizes = [-group["lr"] * group["rms"] * max(each.shape) ** 0.5 for each in directions]
        torch._foreach_mul_(directions, sizes)
        torch._foreach_add_(matrices, [each.view_as(matrix) for each, matrix in zip(directions, matrices)])

    def _momentum(self, matrix: Tensor) -> Tensor:
        state = self.state[matrix]
        if not state:  # AdamW loads the state of a parameter only with a step, and moves that to its device
            state |= {"step": torch.zeros((), device=matrix.device), "momentum": torch.zeros_like(matrix)}
        return state["momentum"]
