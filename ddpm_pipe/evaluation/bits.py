"""Measure bits per dimension: the variational bound (DDPM eq. 5) of real images under a model."""

from collections.abc import Callable

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from ddpm_pipe.data.images import to_unit_range
from ddpm_pipe.data.memory import ImageData
from ddpm_pipe.evaluation.config import EvaluateConfig
from ddpm_pipe.evaluation.results import Metric
from ddpm_pipe.launch import to_device
from ddpm_pipe.likelihood import Bound, variational_bound
from ddpm_pipe.pipeline import PixelDiffusionPipeline
from ddpm_pipe.prediction import PREDICTIONS
from ddpm_pipe.randomness import generator
from ddpm_pipe.schedulers import DDPMScheduler


def denoiser(pipeline: PixelDiffusionPipeline, labels: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the network as the bound takes it: (x_t (B, C, H, W), t (B,)) -> output.

    A self-conditioned network is called twice, the second time with its own first estimate of x0, so that its output
    depends on x_t and t alone.
    """

    network = pipeline.denoiser(labels)

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        output = network(x_t, t, torch.zeros_like(x_t))
        if not pipeline.unet.config.get("self_condition"):
            return output
        row = PREDICTIONS[pipeline.scheduler.config.prediction_type]
        x0 = row.x0(output[:, : x_t.shape[1]], x_t, pipeline.scheduler.alpha_bar(t))
        return network(x_t, t, x0)

    return denoise


def check_bound(config: EvaluateConfig, pipeline: PixelDiffusionPipeline, data: ImageData) -> None:
    """Check that the bound of these images can be computed.

    Raises:
        ValueError: where the chain of the model has fewer terms than the config asks for, or the network does not have
            the labels of the images.
    """
    last = pipeline.scheduler.config.num_train_timesteps - 1
    if not 1 <= config.bits_terms <= last:
        raise ValueError(f"bits_terms={config.bits_terms} must lie between 1 and the {last} that the model has.")
    pipeline.network_labels(None if data.labels is None else data.labels[data.rows], len(data))


def measure_bits(
    config: EvaluateConfig, pipeline: PixelDiffusionPipeline, data: ImageData, state: PartialState
) -> Metric:
    """Measure the variational bound on the bits per dimension of real images, with its standard error and its terms."""
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    bound = bound_of_images(config, PixelDiffusionPipeline(pipeline.unet, scheduler), data, state)
    terms = {name: term.mean().item() for name, term in bound._asdict().items()}
    error = (bound.total.std() / len(bound.total) ** 0.5).item()
    given = "given their labels" if data.labels is not None else "without labels"
    of_terms = ", ".join(f"{name} {value:.4f}" for name, value in terms.items())
    protocol = (
        f"variational bound, standard error {error:.2g} over {config.bits_images} images of split {config.test_split} "
        f"{given}; {of_terms}; {scheduler.config.variance_type}, {config.bits_terms} of {len(scheduler) - 1} terms"
    )
    return Metric("bits_per_dim", "bits/dim", bound.total.mean().item(), protocol, error, terms)


def bound_of_images(
    config: EvaluateConfig, pipeline: PixelDiffusionPipeline, data: ImageData, state: PartialState
) -> Bound:
    """Compute the bound of the first `config.bits_images` images of `data`, in float64.

    The processes share the batches, and every process gets the whole bound.
    """
    parts = []
    for start in range(0, config.bits_images, config.batch_size)[state.process_index :: state.num_processes]:
        images, labels = data.take(torch.arange(start, min(start + config.batch_size, config.bits_images)))
        labels = pipeline.network_labels(labels, len(images))
        draw = generator(0, "bound", start)
        x0 = to_unit_range(to_device(images, state.device))
        bound = variational_bound(denoiser(pipeline, labels), pipeline.scheduler, x0, config.bits_terms, draw)
        parts.append(Bound(*(term.cpu() for term in bound)))
    return Bound(*(torch.cat(terms).double() for terms in zip(*gather_object(parts), strict=True)))
