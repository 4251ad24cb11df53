"""A diffusers pipeline that samples images with Algorithm 2 of DDPM and any scheduler.

This file and the modules that it imports travel with shared checkpoints that the pipelines of diffusers cannot sample.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from ddpm_pipe.checks import check_choice, check_number, whole_numbers
from ddpm_pipe.compatibility import check_scheduler, set_timesteps
from ddpm_pipe.noise import draw_noise
from ddpm_pipe.prediction import PREDICTIONS

OUTPUT_TYPES = ("pil", "np", "pt")


def null_class(unet: ModelMixin) -> int | None:
    """Return the label that stands for "no label", one more than the last class; None for a network without classes.

    A stock UNet2DModel defines no such label; by convention it is the last of its embeddings.
    """
    classes = unet.config.get("num_class_embeds")
    return None if classes is None else getattr(unet, "null_class", classes - 1)


class PixelDiffusionPipeline(DiffusionPipeline):
    """Generate images in pixel space, with or without classes.

    Args:
        unet: a `DDPMUNet2DModel` or a `diffusers.UNet2DModel`.
        scheduler: of this package or of diffusers, with the noise levels and the `prediction_type` that the network was
            trained with; one that is plugged in later must have the same.

    Attributes:
        own_scheduler: the scheduler given here; it says what the network was trained for, whatever is plugged in later.
        samplers: timesteps that were searched for few steps, which `DDPMPipeline` loads; None where there are none.
        guide: a weaker network for the same images, labels and noise levels, such as a smaller or an earlier one. With
            a `guidance_scale`, images are pushed away from what it predicts (autoguidance, Karras et al. 2024, "Guiding
            a diffusion model with a bad version of itself"); None pushes them away from the null class instead.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["sample", "pred_original_sample"]

    def __init__(self, unet: ModelMixin, scheduler: SchedulerMixin):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.own_scheduler = scheduler
        self.samplers: Any = None
        self.guide: ModelMixin | None = None

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **components):
        """Make this pipeline of the network and scheduler of another one, except for `components` given by name.

        The method of diffusers takes only a network of exactly the annotated class, and casts it to float32.
        """
        made = cls(**pipeline.components | components)
        if "unet" not in components:
            made.own_scheduler = getattr(pipeline, "own_scheduler", pipeline.scheduler)
            made.samplers = getattr(pipeline, "samplers", None)
            made.guide = getattr(pipeline, "guide", None)
        return made

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
        class_labels: int | list[int] | Tensor | None = None,
        guidance_scale: float = 1.0,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, Tensor, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] = ("sample",),
        sample: Tensor | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Sample images (DDPM, Algorithm 2).

        Args:
            batch_size: number of images B; None takes that of `sample`, or 1.
            generator: source of all noise; with a list of one per image, each image depends on its own alone.
            num_inference_steps: 1 to T; None takes all T timesteps of the training chain. A number for which `samplers`
                has timesteps, with this scheduler, guidance, and labels or none, takes those.
            eta: noise of DDIM, 0 to 1; only for schedulers whose `step` takes it.
            use_clipped_model_output: derive the noise anew from the clipped x0; DDIM only. None does so where
                possible, since what was clipped off x0 would stay in the noise; False is what diffusers does.
            class_labels: one class for all images or one per image; None draws without a class.
            guidance_scale: classifier-free guidance (Ho & Salimans 2022): 1 is the plain conditional model, more than 1
                pushes away from the unconditional one, or from `guide` where there is one, also without classes.
            output_type: "pil", "np" (B, H, W, C) in [0, 1] or "pt" (B, C, H, W) in [0, 1].
            return_dict: return an `ImagePipelineOutput` instead of a tuple.
            callback_on_step_end: called as (pipeline, step index, timestep, tensors) after each step; the tensors it
                returns replace those of the loop.
            callback_on_step_end_tensor_inputs: which of `_callback_tensor_inputs` the callback is given.
            sample: x_T (B, C, H, W) of unit variance to start from; None draws it.
            timesteps: instead of a number of steps, the timesteps themselves, decreasing from T - 1 or less to 0 or
                more; only for schedulers whose `set_timesteps` takes them.

        Raises:
            ValueError: for an argument that this network or scheduler cannot honour, naming it, or for images that
                are not finite.
        """
        check_choice("output_type", output_type, OUTPUT_TYPES)
        for name in callback_on_step_end_tensor_inputs:
            check_choice("callback_on_step_end_tensor_inputs", name, self._callback_tensor_inputs)
        if batch_size is None:
            batch_size = len(sample) if isinstance(sample, Tensor) and sample.ndim else 1
        denoise, step_options = self._conditions(
            batch_size, generator, class_labels, guidance_scale, eta, use_clipped_model_output
        )
        if timesteps is None:
            timesteps = self.learned_timesteps(num_inference_steps, class_labels is not None, guidance_scale, eta)
            num_inference_steps = num_inference_steps if timesteps is None else None
        chosen = self._choose_timesteps(num_inference_steps, timesteps)
        sample = self._initial_noise(batch_size, generator, sample) * self.scheduler.init_noise_sigma
        callback = (callback_on_step_end, callback_on_step_end_tensor_inputs)
        images = self._run(sample, chosen, denoise, step_options, *callback)
        return self._output(images, output_type, return_dict)

    def _run(
        self,
        sample: Tensor,
        timesteps: Tensor,
        denoise: Callable[[Tensor, Tensor, Tensor], Tensor],
        step_options: dict,
        callback: Callable[[DiffusionPipeline, int, Tensor, dict], dict | None] | None = None,
        callback_inputs: tuple[str, ...] = ("sample",),
    ) -> Tensor:
        """Run Algorithm 2 from x_t (B, C, H, W) at the first of `timesteps`, one step at each; return images in [0, 1].

        `denoise` and `step_options` are those of `_conditions`; the callback is that of `__call__`.
        """
        scheduler = self.scheduler
        pred_original_sample = torch.zeros_like(sample)
        estimate_is_read = callback is not None or bool(self.unet.config.get("self_condition"))
        numbers = timesteps.tolist()  # known here, so that no step waits for the device
        for i, t in enumerate(self.progress_bar(timesteps.to(sample.device, non_blocking=True))):
            model_input = scheduler.scale_model_input(sample, numbers[i])
            model_output = denoise(model_input, t, pred_original_sample)
            try:
                step = scheduler.step(model_output, numbers[i], sample, return_dict=estimate_is_read, **step_options)
            except (ValueError, NotImplementedError) as error:  # a scheduler may not read this output
                name, reason = type(scheduler).__name__, " ".join(str(error).split()).rstrip(".")
                raise ValueError(f"scheduler={name} cannot sample this model with these options: {reason}.") from error
            sample = step[0]
            if estimate_is_read:
                pred_original_sample = step.get("pred_original_sample")
                if pred_original_sample is None:
                    pred_original_sample = self._pred_original_sample(model_output, t, model_input)

            if callback is not None:
                tensors = {"sample": sample, "pred_original_sample": pred_original_sample}
                offered = {name: tensors[name] for name in callback_inputs}
                tensors |= callback(self, i, t, offered) or {}
                sample, pred_original_sample = tensors["sample"], tensors["pred_original_sample"]
        return (sample / 2 + 0.5).clamp(0, 1)

    # ------------------------------------------------------------ parts of the loop

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images, from the network's config; raises ValueError where that has no sample_size."""
        config = self.unet.config
        if config.sample_size is None:
            raise ValueError(
                "the network's config has no sample_size, so the size of its images is unknown; set it there."
            )
        size = config.sample_size
        return config.in_channels, *((size, size) if isinstance(size, int) else size)

    def _conditions(
        self,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None,
        class_labels: int | list[int] | Tensor | None = None,
        guidance_scale: float = 1.0,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
    ) -> tuple[Callable[[Tensor, Tensor, Tensor], Tensor], dict]:
        """Return the network with labels and guidance, as (x_t, t, last x0) -> output, and the keywords of `step`."""
        check_scheduler(self.scheduler, self.own_scheduler)
        check_number("eta", eta)
        check_number("guidance_scale", guidance_scale)
        self._check_batch(generator, batch_size)
        self._check_guide()
        step_options = self._step_options(generator, eta, use_clipped_model_output)
        labels = self.network_labels(class_labels, batch_size, guidance_scale)
        return self.denoiser(labels, guidance_scale), step_options

    def _check_batch(self, generator: torch.Generator | list[torch.Generator] | None, batch_size: int) -> None:
        check_number("batch_size", batch_size, whole=True)
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1.")
        several = isinstance(generator, list)
        generators = generator if isinstance(generator, list) else [generator] * (generator is not None)
        if not all(isinstance(each, torch.Generator) for each in generators):
            raise ValueError(f"generator={generator!r:.100} must be a torch.Generator or a list of one per image.")
        if several and len(generators) != batch_size:
            raise ValueError(
                f"generator is a list of {len(generators)} for batch_size={batch_size}; give one per image."
            )

    def _check_guide(self) -> None:
        """Raise ValueError where the guide is a network for other images, labels or inputs than the network's."""
        if self.guide is None:
            return
        for key in ("in_channels", "sample_size", "num_class_embeds", "self_condition"):
            mine, others = (network.config.get(key) or None for network in (self.unet, self.guide))
            if mine != others:
                raise ValueError(f"guide has {key}={others}, and the network that it guides {mine}; they must agree.")
        if null_class(self.unet) != null_class(self.guide):
            raise ValueError(
                f"guide is a {type(self.guide).__name__}, whose null class is not that of the "
                f"{type(self.unet).__name__} that it guides."
            )

    def learned_timesteps(
        self, num_inference_steps: int | None, has_labels: bool, guidance_scale: float = 1.0, eta: float = 0.0
    ) -> list[int] | None:
        """Return the timesteps that `samplers` has for a call with this scheduler; None where it has none."""
        if self.guide is not None and guidance_scale != 1:
            return None  # they were searched without it
        conditions = (num_inference_steps, eta, guidance_scale, has_labels)
        return self.samplers and self.samplers.timesteps_for(self.scheduler, self.own_scheduler, conditions)

    def _choose_timesteps(self, num_inference_steps: int | None, timesteps: Sequence[int] | None = None) -> Tensor:
        """Set the scheduler's timesteps and return them: as given, or so many, all T of the training chain for None.

        The scheduler keeps them, and its noise levels, on the CPU: it looks them up there without asking the device.
        """
        return set_timesteps(self.scheduler, num_inference_steps, timesteps)

    def _initial_noise(
        self,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None,
        given: Tensor | None = None,
    ) -> Tensor:
        """Return `given` or a draw of N(0, I), (B, C, H, W), in float32 whatever the network's precision."""
        shape = (batch_size, *self.image_shape)
        if given is None:
            return draw_noise(shape, generator, self._execution_device, torch.float32)
        if not isinstance(given, Tensor):
            raise ValueError(f"sample must be a tensor of noise, {shape}, not a {type(given).__name__}.")
        if given.shape != shape:
            raise ValueError(
                f"sample has the shape {tuple(given.shape)}; give the noise of {batch_size} images, {shape}."
            )
        if not given.is_floating_point() or not given.isfinite().all():
            raise ValueError(f"sample must be finite floating-point noise, it is {given.dtype} or not finite.")
        return given.to(self._execution_device, torch.float32)

    def denoiser(self, labels: Tensor | None = None, scale: float = 1.0) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Return the network with guidance: (x_t, t, last x0) -> (B, C, H, W), or (B, 2C, H, W) with learned variance.

        Args:
            labels: (B,), or where the null class guides (2B,) with it in the second half; None without classes.
            scale: strength of the guidance; 1 is none.
        """
        unet, guide = self.unet, self.guide
        conditions = {} if labels is None else {"class_labels": labels}
        # only DDPM's schedulers, ours and diffusers', have variance_type: they read a learned variance from the output
        takes_variance = "variance_type" in vars(self.scheduler)
        if guide is not None and (guide.device, guide.dtype) != (unet.device, unet.dtype):
            guide.to(unet.device, unet.dtype)

        def predict(network: ModelMixin, x_t: Tensor, t: Tensor, last_x0: Tensor) -> Tensor:
            inputs = {"sample": x_t if x_t.dtype == network.dtype else x_t.to(network.dtype)}
            if network.config.get("self_condition"):
                inputs["self_cond"] = last_x0.clamp(-1, 1).to(network.dtype)
            # a copy, because a CUDA graph of torch.compile overwrites its output at the next step
            return network(timestep=t, **inputs, **conditions).sample.to(torch.float32, copy=True)

        def denoise(x_t: Tensor, t: Tensor, last_x0: Tensor) -> Tensor:
            channels = x_t.shape[1]
            if scale == 1.0:
                output = predict(unet, x_t, t, last_x0)
            else:
                if guide is None:  # one pass computes both predictions
                    output, weaker = predict(unet, torch.cat([x_t, x_t]), t, torch.cat([last_x0, last_x0])).chunk(2)
                else:
                    output, weaker = (predict(network, x_t, t, last_x0) for network in (unet, guide))
                prediction = torch.lerp(weaker[:, :channels], output[:, :channels], scale)
                output = torch.cat([prediction, output[:, channels:]], dim=1)
            return output if takes_variance else output[:, :channels]

        return denoise

    def _pred_original_sample(self, model_output: Tensor, t: Tensor, model_input: Tensor) -> Tensor:
        """Compute the estimate of x0, for schedulers whose `step` does not return it."""
        alpha_bar = torch.take(self.scheduler.alphas_cumprod.to(t.device, non_blocking=True), t.long())
        prediction = model_output[:, : model_input.shape[1]]
        return PREDICTIONS[self.scheduler.config.prediction_type].x0(prediction, model_input, alpha_bar)

    def network_labels(
        self, class_labels: int | list[int] | Tensor | None, batch_size: int, scale: float = 1.0
    ) -> Tensor | None:
        """Return labels (B,), or where the null class guides (2B,) with it in the second half; None without classes.

        Raises:
            ValueError: for labels or guidance that the network does not have, naming the accepted labels.
        """
        null = null_class(self.unet)
        if null is None:
            if class_labels is not None or (scale != 1.0 and self.guide is None):
                raise ValueError(
                    "class_labels need a network with classes, and guidance_scale one or a guide; this one has none."
                )
            return None
        given = whole_numbers(null if class_labels is None else class_labels)
        if given is None:
            raise ValueError(f"class_labels must be a class or one per image, whole numbers from 0 to {null}.")
        if given.ndim > 0 and len(given) != batch_size:
            raise ValueError(
                f"class_labels has {len(given)} entries for batch_size={batch_size}; give one, or one per image."
            )
        if given.min() < 0 or given.max() > null:
            raise ValueError(f"class_labels must lie between 0 and {null} (the null class).")
        labels = torch.as_tensor(given).to(self._execution_device, non_blocking=True).expand(batch_size)
        if scale == 1.0 or self.guide is not None:
            return labels
        if class_labels is None:
            raise ValueError(f"guidance_scale={scale} needs class_labels to guide towards, or a guide.")
        return torch.cat([labels, torch.full_like(labels, null)])

    def _step_options(
        self,
        generator: torch.Generator | list[torch.Generator] | None,
        eta: float,
        use_clipped_model_output: bool | None,
    ) -> dict:
        """Return those of the given keywords that this scheduler's `step` takes."""
        if not 0 <= eta <= 1:
            raise ValueError(f"eta={eta} must lie between 0 (DDIM) and 1 (DDPM).")
        known = inspect.signature(self.scheduler.step).parameters
        of_ddim = {"eta": eta, "use_clipped_model_output": use_clipped_model_output}
        for name, value in of_ddim.items():
            if value and name not in known:
                raise ValueError(
                    f"{name}={value} has no meaning for {type(self.scheduler).__name__}; use DDIMScheduler."
                )
        if generator is not None and hasattr(self.scheduler, "noise_sampler"):
            raise ValueError(
                f"generator has no meaning for {type(self.scheduler).__name__}, which draws noise of its own; leave it "
                "out, or use DPMSolverMultistepScheduler with algorithm_type='sde-dpmsolver++'."
            )
        if use_clipped_model_output is None:
            of_ddim["use_clipped_model_output"] = True
        return {name: value for name, value in {"generator": generator, **of_ddim}.items() if name in known}

    def _output(self, images: Tensor, output_type: str, return_dict: bool) -> ImagePipelineOutput | tuple:
        """Return what a call returns for images (B, C, H, W) in [0, 1]."""
        self.maybe_free_model_hooks()
        result = self._to_images(images, output_type)
        return ImagePipelineOutput(images=result) if return_dict else (result,)

    def _to_images(self, images: Tensor, output_type: str):
        if output_type == "pt":
            return images
        if not images.isfinite().all():
            raise ValueError(
                f"the images are not finite: the network, in {self.unet.dtype}, or the scheduler overflows; choose "
                "torch.float32 or another scheduler."
            )
        array = images.cpu().permute(0, 2, 3, 1).numpy()
        return array if output_type == "np" else self.numpy_to_pil(array)
