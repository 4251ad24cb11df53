"""Interpolation, image-to-image, inpainting and inversion with a trained model.

Each is a pipeline that shares the network and the scheduler of another one: `InpaintPipeline.from_pipe(pipeline)`.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from PIL import Image, ImageOps
from torch import Tensor

from ddpm_pipe.checks import check_choice, check_number
from ddpm_pipe.data.images import to_array
from ddpm_pipe.noise import add_noise
from ddpm_pipe.pipeline import OUTPUT_TYPES
from ddpm_pipe.prediction import PREDICTIONS
from ddpm_pipe.pretrained import DDPMPipeline

Images = Image.Image | Tensor | list[Image.Image] | list[Tensor]
Generators = torch.Generator | list[torch.Generator] | None
Labels = int | list[int] | Tensor | None

USE_OURS = "use DDIMScheduler.from_config(pipeline.scheduler.config) of ddpm_pipe"


class InterpolationPipeline(DDPMPipeline):
    """Draw images between those of two noises with deterministic DDIM (Song et al. 2021, section 5.3)."""

    @torch.no_grad()
    def __call__(  # type: ignore[override]  # each takes arguments of its own
        self,
        count: int = 8,
        generator: Generators = None,
        num_inference_steps: int | None = None,
        class_labels: Labels = None,
        guidance_scale: float = 1.0,
        output_type: str = "pil",
        return_dict: bool = True,
        sample: Tensor | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Draw `count` images from one end to the other; the ends are the plain DDIM images of their noises.

        Args:
            count: number of images, at least 2, spaced by equal angles.
            generator: source of the two noises; a list has one for each end.
            sample: the two noises themselves, (2, C, H, W); None draws them.
            num_inference_steps, class_labels, guidance_scale, output_type, return_dict: as for a plain pipeline of
                `count` images.

        Raises:
            ValueError: for a scheduler that is not DDIM, or an argument that cannot be honoured, naming it.
        """
        check_ddim(self.scheduler)
        check_number("count", count, whole=True)
        if count < 2:
            raise ValueError(f"count={count} must be at least 2, the two ends.")
        self._check_batch(generator, 2)
        first, last = self._initial_noise(2, generator, sample)
        path = slerp(first, last, torch.linspace(0, 1, count))
        return super().__call__(
            num_inference_steps=num_inference_steps,
            class_labels=class_labels,
            guidance_scale=guidance_scale,
            output_type=output_type,
            return_dict=return_dict,
            sample=path,
        )


class _FromImagesPipeline(DDPMPipeline):
    """The base of the pipelines that draw one image for each given one."""

    def _edit(
        self,
        given: Tensor,
        draw: Callable[[Tensor, Callable[[], Tensor], Callable[..., Tensor]], Tensor],
        generator: Generators = None,
        num_inference_steps: int | None = None,
        eta: float = 0.0,
        class_labels: Labels = None,
        guidance_scale: float = 1.0,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Check the conditions, draw images with `draw`, and return what a call returns.

        Args:
            given: images (B, C, H, W).
            draw: (timesteps, noise, run) -> images (B, C, H, W) in [0, 1]. `noise()` draws N(0, I) of their shape, and
                `run(start, timesteps)` is `_run` with labels and guidance.
            generator, num_inference_steps, eta, class_labels, guidance_scale, output_type, return_dict: as for a plain
                pipeline of B images.
        """
        check_choice("output_type", output_type, OUTPUT_TYPES)
        denoise, step_options = self._conditions(len(given), generator, class_labels, guidance_scale, eta)
        timesteps = self._choose_timesteps(num_inference_steps)
        noise = partial(self._initial_noise, len(given), generator)
        images = draw(timesteps, noise, partial(self._run, denoise=denoise, step_options=step_options))
        return self._output(images, output_type, return_dict)


class ImageToImagePipeline(_FromImagesPipeline):
    """Draw images like a given one: add noise to it and remove that again (SDEdit, Meng et al. 2022, Algorithm 1)."""

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self, image: Images, strength: float = 0.5, **options: Any
    ) -> ImagePipelineOutput | tuple:
        """Draw one image for each given one.

        Args:
            image: PIL images, which are fitted to the network's size, or (B, C, H, W) in [0, 1].
            strength: share of the chosen timesteps to go through, in (0, 1]: near 0 little changes, and near 1 almost
                nothing of the image is left.
            options: generator, num_inference_steps, eta, class_labels, guidance_scale, output_type and return_dict, as
                for a plain pipeline of B images.

        Raises:
            ValueError: for an argument that this network or scheduler cannot honour, naming it.
        """
        check_number("strength", strength)
        if not 0 < strength <= 1:
            raise ValueError(f"strength={strength} must be more than 0 and at most 1.")
        given = read_images("image", image, self.image_shape).to(self._execution_device)

        def draw(timesteps: Tensor, noise: Callable[[], Tensor], run: Callable[..., Tensor]) -> Tensor:
            last = self._begin_late(timesteps, strength)
            return run(self.scheduler.add_noise(2 * given - 1, noise(), last[:1]), last)

        return self._edit(given, draw, **options)

    def _begin_late(self, timesteps: Tensor, strength: float) -> Tensor:
        """Return the last share `strength` of the timesteps, at least one, and tell the scheduler where they begin."""
        scheduler, order = self.scheduler, self.scheduler.order
        count = (len(timesteps) + order - 1) // order  # schedulers of order 2 list each timestep but the first twice
        begin = (count - max(round(strength * count), 1)) * order
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        elif type(scheduler).__name__ not in ("DDPMScheduler", "DDIMScheduler"):  # PNDM counts its own steps
            raise ValueError(f"scheduler={type(scheduler).__name__} cannot begin in the middle; {USE_OURS}.")
        return timesteps[begin:]


class InpaintPipeline(_FromImagesPipeline):
    """Draw a part of an image anew so that it fits the rest (RePaint, Lugmayr et al. 2022, Algorithm 1)."""

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self, image: Images, mask: Images, jump_length: int = 10, resamplings: int = 10, **options: Any
    ) -> ImagePipelineOutput | tuple:
        """Draw one image for each given one; where the mask is 0, the result is exactly the given image.

        Args:
            image: PIL images, which are fitted to the network's size, or (B, C, H, W) in [0, 1].
            mask: 1 (white) where to draw and 0 (black) where to keep; values of at least 1/2 count as 1. One mask for
                all images or one per image, as PIL images or (B, 1, H, W).
            jump_length: j, how many steps each jump goes back, 1 to num_inference_steps - 1.
            resamplings: U or r, how often each stretch of j steps is run, at least 1; more runs fit the new part better
                to the rest and take about as many times longer.
            options: generator, num_inference_steps, eta, class_labels, guidance_scale, output_type and return_dict, as
                for a plain pipeline of B images.

        Raises:
            ValueError: for a scheduler of diffusers, or an argument that cannot be honoured, naming it.
        """
        check_levels(self.scheduler)
        given = read_images("image", image, self.image_shape).to(self._execution_device)
        drawn = read_images("mask", mask, (1, *self.image_shape[1:])).to(self._execution_device) >= 0.5
        if len(drawn) not in (1, len(given)):
            raise ValueError(f"mask holds {len(drawn)} masks for {len(given)} images; give one, or one per image.")

        def draw(timesteps: Tensor, noise: Callable[[], Tensor], run: Callable[..., Tensor]) -> Tensor:
            order = resampling_order(len(timesteps), jump_length, resamplings)
            path = timesteps[torch.tensor(order, device=timesteps.device)]

            def keep(pipeline: DiffusionPipeline, i: int, t: Tensor, tensors: dict) -> dict:
                """Lines 4 to 10: put in x_s of the given image where it is kept; go back if the next timestep does."""
                alpha_bar_s = self.scheduler.alpha_bar(self.scheduler.previous_timestep(t))
                x = torch.where(drawn, tensors["sample"], add_noise(2 * given - 1, noise(), alpha_bar_s))
                if i + 1 < len(order) and order[i + 1] <= order[i]:
                    alpha = self.scheduler.alpha_bar(path[i + 1]) / alpha_bar_s  # alpha of q(x_t | x_s), as one step
                    x = add_noise(x, noise(), alpha)
                return {"sample": x}

            return torch.where(drawn, run(noise(), path, callback=keep), given)

        return self._edit(given, draw, **options)


class InversionPipeline(DDPMPipeline):
    """Find the noise of a given image with the ODE of DDIM backwards (Song et al. 2021, section 4.3 and 5.4)."""

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self, image: Images, num_inference_steps: int | None = None, class_labels: Labels = None
    ) -> Tensor:
        """Return x_T, float32 (B, C, H, W), the `sample` for a pipeline with DDIM, eta 0 and the same timesteps.

        The image that this pipeline draws without guidance differs from the given one by a discretisation error: on the
        28x28 pictures of the default recipe, its RMSE is 4.3, 2.3 and 1.0 levels of 255 with 50, 100 and 250 steps.

        Args:
            image: PIL images, which are fitted to the network's size, or (B, C, H, W) in [0, 1].
            num_inference_steps: 1 to T; None takes all T timesteps of the training chain.
            class_labels: one class for all images or one per image; None inverts without a class.

        Raises:
            ValueError: for a scheduler that is not this package's DDIM, for clipping, which cannot be undone, or for an
                argument that cannot be honoured, naming it.
        """
        check_ddim(self.scheduler)
        check_levels(self.scheduler)
        for name in ("clip_sample", "thresholding"):
            if self.scheduler.config[name]:
                raise ValueError(f"{name}=True of the scheduler cannot be undone; make it with {name}=False.")
        x = 2 * read_images("image", image, self.image_shape).to(self._execution_device) - 1
        denoise, _ = self._conditions(len(x), None, class_labels)
        row = PREDICTIONS[self.scheduler.config.prediction_type]
        # the network knows no cleaner image than that of timestep 0, so the given image stands for it
        rising = [0, *(t for t in reversed(self._choose_timesteps(num_inference_steps).tolist()) if t > 0)]
        levels = torch.tensor(rising, device=x.device)
        x0 = torch.zeros_like(x)
        for s, t in self.progress_bar(list(pairwise(levels))):
            output, alpha_bar_s = denoise(x, s, x0), self.scheduler.alpha_bar(s)
            x0, eps = row.x0(output, x, alpha_bar_s), row.eps(output, x, alpha_bar_s)
            x = add_noise(x0, eps, self.scheduler.alpha_bar(t))  # DDIM eq. 12 without noise, from s up to t
        self.maybe_free_model_hooks()
        return x


# ---------------------------------------------------------------- parts of these pipelines


def slerp(first: Tensor, last: Tensor, share: Tensor) -> Tensor:
    """Return points on the arc between two tensors, (n, ...) for n shares in [0, 1] (Shoemake 1985; DDIM, app. D.5).

    Where the tensors have the same or opposite directions, no arc is defined, and the points lie on the straight line.
    """
    a, b = first.double(), last.double()
    cosine = (a * b).sum() / (a.norm() * b.norm())
    angle = cosine.clamp(-1, 1).arccos()
    share = share.to(a, non_blocking=True).view(-1, *[1] * a.ndim)
    arc = ((1 - share) * angle).sin() / angle.sin() * a + (share * angle).sin() / angle.sin() * b
    return torch.where(angle.sin() > 1e-6, arc, torch.lerp(a, b, share)).to(first.dtype)


def resampling_order(steps: int, jump_length: int, resamplings: int) -> list[int]:
    """Return the order of RePaint's steps (Algorithm 1, j as in section 4.2): 0 starts from x_T, steps - 1 is the last.

    One stretch of j steps ends before the last step, and one before each j-th step back from there. No jump starts from
    the clean image.

    Raises:
        ValueError: for a jump longer than the chain, or resamplings below 1.
    """
    check_number("jump_length", jump_length, whole=True)
    check_number("resamplings", resamplings, whole=True)
    if resamplings < 1:
        raise ValueError(f"resamplings={resamplings} must be at least 1.")
    if resamplings > 1 and not 1 <= jump_length < steps:
        raise ValueError(
            f"jump_length={jump_length} must lie between 1 and {steps - 1}, one less than num_inference_steps."
        )
    order = []
    for step in range(steps):
        order.append(step)
        left = steps - 1 - step
        if left > 0 and step + 1 >= jump_length and (left - 1) % jump_length == 0:
            order += list(range(step + 1 - jump_length, step + 1)) * (resamplings - 1)
    return order


def read_images(name: str, images: Images, shape: tuple[int, int, int]) -> Tensor:
    """Return images as float32 (B, C, H, W) in [0, 1]; PIL images are fitted to `shape`, (C, H, W), as in training.

    Raises:
        ValueError: for anything but PIL images or tensors in [0, 1] of that shape, naming the argument `name`.
    """
    given: Any = torch.atleast_1d(images) if isinstance(images, Tensor) else images
    rows = list(given) if isinstance(given, (list, tuple, Tensor)) else [given]
    if not rows or not all(_is_image(row) for row in rows):
        raise ValueError(f"{name} must be a PIL image, a list of them, or a tensor of shape (B, {str(shape)[1:]}.")
    tensors = [row if isinstance(row, Tensor) else _from_pil(row, shape) for row in rows]
    for tensor in tensors:
        if tensor.shape != shape:
            raise ValueError(f"{name} has an entry of shape {tuple(tensor.shape)}; its entries must be {shape}.")
    batch = torch.stack(tensors).float()
    if not ((batch >= 0) & (batch <= 1)).all():
        raise ValueError(f"{name} must lie in [0, 1], it goes from {batch.min():.3g} to {batch.max():.3g}.")
    return batch


def _is_image(row: Any) -> bool:
    return not row.is_complex() if isinstance(row, Tensor) else isinstance(row, Image.Image) and all(row.size)


def _from_pil(image: Image.Image, shape: tuple[int, int, int]) -> Tensor:
    channels, height, width = shape
    return torch.tensor(to_array(ImageOps.exif_transpose(image), channels, (height, width))) / 255


def check_levels(scheduler: SchedulerMixin) -> None:
    """Raise ValueError unless the scheduler tells the noise level and the successor of a timestep, as ours do."""
    if not (hasattr(scheduler, "alpha_bar") and hasattr(scheduler, "previous_timestep")):
        raise ValueError(f"scheduler={type(scheduler).__name__} lacks the noise levels of this package's; {USE_OURS}.")


def check_ddim(scheduler: SchedulerMixin) -> None:
    """Raise ValueError unless the scheduler is deterministic DDIM, of this package or of diffusers."""
    if type(scheduler).__name__ != "DDIMScheduler":
        raise ValueError(f"scheduler={type(scheduler).__name__} is not deterministic DDIM; {USE_OURS}.")
