"""Write a network as ONNX, and measure how far its answers are from those of torch."""

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from ddpm_pipe.pipeline import null_class

try:
    import onnx
    import onnxruntime
    import onnxscript  # noqa: F401, torch.onnx needs it
    from onnxruntime.transformers.float16 import convert_float_to_float16
except ImportError as error:
    raise ValueError(f"an export needs more packages ({error}): pip install 'ddpm_pipe[export]'.") from error

LARGEST = 2**31
"""Bytes that an ONNX file can hold."""

OUTPUT = "prediction"
"""Name of the output of an ONNX file; the names of its inputs are those of `Denoiser.forward`."""


class Denoiser(nn.Module):
    """A network with the inputs and the output of its ONNX file."""

    def __init__(self, unet: ModelMixin):
        super().__init__()
        self.unet = unet

    def forward(
        self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None, self_cond: Tensor | None = None
    ) -> Tensor:
        """Return the prediction (B, C, H, W), without the channels of a learned variance.

        Args:
            sample: x_t, (B, C, H, W).
            timestep: t, (B,), in float32, since graphics processors have no 64-bit integers.
            class_labels: (B,), int32; only for a network with classes.
            self_cond: the last estimate of x0 in [-1, 1], like `sample`; only for a network with self-conditioning.
        """
        given = {"class_labels": class_labels, "self_cond": self_cond}
        conditions = {name: value for name, value in given.items() if value is not None}
        return self.unet(sample, timestep, **conditions).sample[:, : sample.shape[1]]


def example_inputs(unet: ModelMixin, shape: tuple[int, int, int], steps: int, batch_size: int) -> dict[str, Tensor]:
    """Draw inputs of a network, by name; the batch size is also the seed.

    Args:
        unet: the network.
        shape: (C, H, W) of its images.
        steps: T; the timesteps reach from T - 1 to 0.
        batch_size: B.
    """
    generator = torch.Generator().manual_seed(batch_size)
    sample, estimate = (torch.randn(batch_size, *shape, generator=generator) for _ in range(2))
    inputs = {"sample": sample, "timestep": torch.linspace(steps - 1, 0, batch_size).round()}
    null = null_class(unet)
    if null is not None:
        inputs["class_labels"] = (torch.arange(batch_size) % (null + 1)).int()
    if unet.config.get("self_condition"):
        inputs["self_cond"] = estimate.clamp(-1, 1)
    return inputs


def write_float32(denoiser: Denoiser, file: Path, inputs: dict[str, Tensor]) -> None:
    """Write a network as an ONNX file that takes any number of images.

    Args:
        denoiser: the network, in float32 on the CPU.
        file: the file.
        inputs: examples, of at least 2 images.

    Raises:
        ValueError: for a network that is larger than an ONNX file can be.
    """
    size = sum(weight.nbytes for weight in denoiser.parameters())
    if size >= LARGEST:
        raise ValueError(f"the network has {size / 2**30:.1f} GiB of weights, and an ONNX file holds less than 2 GiB.")
    batch = torch.export.Dim("batch")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it tells of optional packages that are not installed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of its own use of what it deprecates
        torch.onnx.export(
            denoiser,
            kwargs=inputs,
            f=file,
            input_names=list(inputs),
            output_names=[OUTPUT],
            dynamic_shapes={name: {0: batch} for name in inputs},
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def write_float16(float32: Path, file: Path) -> None:
    """Convert an ONNX file to one that computes in float16; its inputs and output stay in float32."""
    onnx.save(convert_float_to_float16(onnx.load(float32), keep_io_types=True), file)


def measure_parity(file: Path, answers: list[tuple[dict[str, Tensor], Tensor]]) -> dict[str, Any]:
    """Compare an ONNX file, computed by onnxruntime, with the answers of torch.

    Args:
        file: the file.
        answers: inputs and what torch answers to them.

    Returns:
        `max_abs_error`, `relative_error` (root mean square of the error, divided by that of the answers), and how many
        `images` were compared. An error that is not finite is infinite.
    """
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    errors, expected = [], []
    for inputs, answer in answers:
        (got,) = session.run([OUTPUT], {name: value.numpy() for name, value in inputs.items()})
        errors.append((torch.from_numpy(got) - answer).flatten())
        expected.append(answer.flatten())
    error = torch.cat(errors).nan_to_num(nan=torch.inf)
    return {
        "max_abs_error": error.abs().max().item(),
        "relative_error": (error.norm() / torch.cat(expected).norm()).item(),
        "images": sum(len(answer) for _, answer in answers),
    }
