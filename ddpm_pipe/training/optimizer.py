"""The optimizers of training: AdamW, and Muon for the matrices with AdamW for the rest."""

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


def orthogonalized(matrices: Tensor) -> Tensor:
    """Bring all singular values of each matrix, (..., m, n), near 1 by Newton-Schulz iterations.

    Each iteration multiplies M by a + b M M^T + c (M M^T)^2. The product of these factors is a polynomial of the first
    Gram matrix M M^T, or M^T M if that is smaller, so M itself is multiplied only once.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    wide = matrices.mT if tall else matrices
    wide = wide / torch.linalg.matrix_norm(wide, keepdim=True).clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    gram, eye = wide @ wide.mT, torch.eye(wide.shape[-2], dtype=wide.dtype, device=wide.device)
    product = eye
    for _ in range(ITERATIONS):
        factor = a * eye + b * gram + c * gram @ gram
        product, gram = factor @ product, factor @ gram @ factor
    result = product @ wide
    return result.mT if tall else result


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
        """Move the matrices, all of one shape at once: to a GPU a small product takes as long as a large one."""
        momenta = [self._momentum(matrix) for matrix in matrices]
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, gradients)
        ahead = [each.flatten(1) for each in torch._foreach_add(gradients, momenta, alpha=group["momentum"])]
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        for shape in dict.fromkeys(each.shape for each in ahead):
            places = [i for i, each in enumerate(ahead) if each.shape == shape]
            directions = orthogonalized(torch.stack([ahead[i] for i in places]))
            size = group["lr"] * group["rms"] * max(shape) ** 0.5
            alike = [matrices[i] for i in places]
            torch._foreach_add_(alike, [d.view_as(m) for d, m in zip(directions, alike)], alpha=-size)

    def _momentum(self, matrix: Tensor) -> Tensor:
        state = self.state[matrix]
        if not state:  # AdamW loads the state of parameters that have a step
            state |= {"step": torch.tensor(0.0), "momentum": torch.zeros_like(matrix)}
        state["step"] += 1
        return state["momentum"]
