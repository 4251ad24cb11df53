"""What the page computes: calls of pipelines, of which it shows the images and the code that draws them again."""

import io
import json
import zipfile
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from PIL import Image, ImageOps
from torch import Tensor

from ddpm_pipe.checks import check_choice
from ddpm_pipe.data.images import MODES, to_array
from ddpm_pipe.demo.config import Settings
from ddpm_pipe.editing import ImageToImagePipeline, InpaintPipeline, InterpolationPipeline
from ddpm_pipe.launch import processes
from ddpm_pipe.pipeline import null_class
from ddpm_pipe.pretrained import DDPMPipeline
from ddpm_pipe.samplers import OWN_SCHEDULERS, Sampler, options_of
from ddpm_pipe.sampling.config import LoadConfig
from ddpm_pipe.sampling.protocol import label_cycle, load_model, plug_in
from ddpm_pipe.sharing.card import read_class_names

RECOMMENDED, OWN = "recommended", "own"
SAMPLERS = {
    "dpm++": "DPM-Solver++",
    "dpm++sde": "DPM-Solver++ with noise",
    "unipc": "UniPC",
    "euler": "Euler",
    "heun": "Heun, two network calls a step",
    "ddim": "DDIM",
    "ddpm": "DDPM",
}
"""Short name -> what the page calls it."""

FRAMES = 60
"""Number of steps that are kept of an image whose drawing is watched; of more steps, every second, third, ... is."""
JUMP = 10
"""Steps by which redrawing goes back where there are enough, as in section 4.2 of RePaint."""


# ---------------------------------------------------------------- the model


@dataclass(frozen=True)
class Model:
    """A model and what the page needs to know of it.

    Attributes:
        config: says where the model was loaded from.
        pipeline: draws the images; calls of the page leave its scheduler alone.
        class_names: names of the classes by label; [] for a model without classes.
    """

    config: LoadConfig
    pipeline: DDPMPipeline
    class_names: list[str]

    @classmethod
    def load(cls, config: LoadConfig) -> Self:
        """Load the model onto the accelerator, where there is one.

        Raises:
            ValueError: for a model that is not valid, or whose images are no pictures.
            OSError: where a repository or revision does not exist or may not be read.
        """
        pipeline = load_model(config).to(processes().device)
        channels = pipeline.image_shape[0]
        if channels not in MODES:
            raise ValueError(f"model={config.model!r} draws {channels} channels; the page shows 1, 3 or 4.")
        count = null_class(pipeline.unet) or 0
        names = read_class_names(config.model, config.revision)
        return cls(config, pipeline, names if len(names) == count else [f"class {label}" for label in range(count)])

    @property
    def recommended(self) -> Sampler | None:
        """The sampler that was found to be the best for its cost."""
        found = self.pipeline.samplers
        return None if found is None else found.recommended

    @property
    def samplers(self) -> dict[str, str]:
        """Names of the samplers that the page offers -> what it calls them; the first one is the default."""
        names, own = {}, type(self.pipeline.own_scheduler).__name__
        if self.recommended is not None:
            name, steps = self.recommended.scheduler.removesuffix("Scheduler"), self.recommended.steps
            names[RECOMMENDED] = f"Recommended: {name}, {steps} steps"
        if own not in OWN_SCHEDULERS:
            names[OWN] = f"The model's own: {own.removesuffix('Scheduler')}"
        return names | SAMPLERS

    @property
    def first_settings(self) -> Settings:
        """The settings with which the page opens."""
        sampler = next(iter(self.samplers))
        steps = min(4 if sampler == OWN else 20, self.pipeline.own_scheduler.config.num_train_timesteps)
        guidance = 1.0 if sampler == OWN or not self.class_names else 2.0
        if self.recommended is not None:
            steps, guidance = self.recommended.steps, self.recommended.guidance_scale
        labels = "balanced" if self.class_names else None
        return Settings(sampler=sampler, steps=steps, class_labels=labels, guidance_scale=guidance)

    def scheduler(self, settings: Settings) -> tuple[SchedulerMixin, dict[str, Any]]:
        """Make the scheduler of the settings, and the keywords of a call with it.

        Raises:
            ValueError: for a sampler that this model does not have.
        """
        own = self.pipeline.own_scheduler
        check_choice("sampler", settings.sampler, self.samplers)
        if settings.sampler == RECOMMENDED and self.recommended is not None:
            options = self.recommended.call_options()
            options.pop("guidance_scale", None)  # that of the settings counts
            return self.recommended.make_scheduler(own), options
        name = None if settings.sampler == OWN else settings.sampler
        fewer = settings.steps < own.config.num_train_timesteps
        return plug_in(own, name, {}, fewer), {"num_inference_steps": settings.steps}

    def conditions(self, settings: Settings, seeds: list[int]) -> dict[str, Any]:
        """Return the keywords for classes and guidance of a call that draws one image for each seed.

        Raises:
            ValueError: for a class that the model does not have.
        """
        cycle = label_cycle(self.pipeline.unet, settings.class_labels)
        if cycle is None:
            return {}
        labels = [cycle[seed % len(cycle)] for seed in seeds]
        guidance = {} if settings.guidance_scale == 1 else {"guidance_scale": settings.guidance_scale}
        return {"class_labels": labels if len(set(labels)) > 1 else labels[0]} | guidance


# ---------------------------------------------------------------- calls


@dataclass(frozen=True)
class Call:
    """A call of a pipeline, which the page makes and also shows as code.

    Attributes:
        kind: the pipeline that is called.
        scheduler: its scheduler, which no other call has.
        seeds: one for each generator of the call.
        options: its other keywords.
        images: keywords that take pictures, each one for all images.
    """

    kind: type[DDPMPipeline]
    scheduler: SchedulerMixin
    seeds: list[int]
    options: dict[str, Any]
    images: dict[str, Image.Image] = field(default_factory=dict)

    def run(self, model: Model, **more: Any) -> list[Image.Image]:
        """Draw the images; `more` are further keywords of the call.

        Raises:
            ValueError: for an option that the network or the scheduler cannot honour, or images that are not finite.
        """
        pipeline = self.kind.from_pipe(model.pipeline, scheduler=self.scheduler)
        given = {name: [image] * len(self.seeds) for name, image in self.images.items()}
        generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        return pipeline(generator=generators, **given, **self.options, **more).images

    def code(self, model: Model) -> str:
        """Return a program that draws the same images; where the call takes pictures, it reads them from PNG files."""
        own, device = model.pipeline.own_scheduler, model.pipeline.device.type
        scheduler, kind = type(self.scheduler).__name__, self.kind.__name__
        ours = sorted(({scheduler} & OWN_SCHEDULERS.keys()) | {"DDPMPipeline"})
        imports = ["import torch"]
        imports += [] if scheduler in OWN_SCHEDULERS else [f"from diffusers import {scheduler}"]
        imports += ["from PIL import Image"] if self.images else []
        imports += ["", f"from ddpm_pipe import {', '.join(ours)}"]
        imports += [] if self.kind is DDPMPipeline else [f"from ddpm_pipe.editing import {kind}"]
        given, seeds = model.config, range(self.seeds[0], self.seeds[-1] + 1)
        source = [literal(given.model)] + [f"revision={literal(given.revision)}"] * (given.revision is not None)
        source += [f"torch_dtype=torch.{given.dtype}"] * (given.dtype != "float32")
        changed = "".join(f", {key}={literal(value)}" for key, value in options_of(self.scheduler, own).items())
        which = str(seeds) if self.seeds == list(seeds) and len(seeds) > 1 else str(self.seeds)
        lines = [
            *imports,
            "",
            f"pipeline = DDPMPipeline.from_pretrained({', '.join(source)})" + f'.to("{device}")' * (device != "cpu"),
            f"pipeline.scheduler = {scheduler}.from_config(pipeline.scheduler.config{changed})",
            *([] if self.kind is DDPMPipeline else [f"pipeline = {kind}.from_pipe(pipeline)"]),
            f"generators = [torch.Generator().manual_seed(seed) for seed in {which}]",
            "images = pipeline(",
            *(f'    {name}=[Image.open("{name}.png")] * {len(self.seeds)},' for name in self.images),
            *(f"    {name}={value!r}," for name, value in self.options.items()),
            "    generator=generators,",
            ").images",
            'images[0].save("0.png")',
        ]
        return "\n".join(lines)

    def archive(self, model: Model, images: list[Image.Image]) -> bytes:
        """Return a zip file of the images, the pictures that the call takes, and the program that draws them again."""
        files = {f"{i}.png": png(image) for i, image in enumerate(images)}
        files |= {f"{name}.png": png(image) for name, image in self.images.items()}
        files["draw.py"] = f"{self.code(model)}\n".encode()
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, content in files.items():
                archive.writestr(zipfile.ZipInfo(name), content)  # has no date: the same images give the same file
        return buffer.getvalue()


def literal(value: Any) -> str:
    """Return a value as it stands in code, text in double quotes."""
    return json.dumps(value) if isinstance(value, str) else repr(value)


def png(image: Image.Image) -> bytes:
    """Return the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


# ---------------------------------------------------------------- what the page offers


def draw(model: Model, settings: Settings, number: int) -> Call:
    """Draw `number` images from noise, one for each seed."""
    seeds = [settings.seed + i for i in range(number)]
    scheduler, length = model.scheduler(settings)
    options = {"batch_size": number} | length | model.conditions(settings, seeds)
    return Call(DDPMPipeline, scheduler, seeds, options)


def interpolate(model: Model, settings: Settings, last_seed: int, number: int) -> Call:
    """Draw `number` images on the way from one seed to another, all of the class of the first; DDIM draws them."""
    scheduler, length = model.scheduler(settings.replace(sampler="ddim"))
    options = {"count": number} | length | model.conditions(settings, [settings.seed])
    return Call(InterpolationPipeline, scheduler, [settings.seed, settings.replace(seed=last_seed).seed], options)


def similar(model: Model, settings: Settings, image: Image.Image | None, number: int, strength: float) -> Call:
    """Draw `number` images like a given one, each from a seed of its own, all of the class of the first seed.

    Raises:
        ValueError: where no image is given.
    """
    if image is None:
        raise ValueError("There is no image yet; put one in, or draw one from the seed.")
    scheduler, _ = model.scheduler(settings)
    seeds = [settings.seed + i for i in range(number)]
    options = {"strength": strength, "num_inference_steps": settings.steps}
    options |= model.conditions(settings, seeds[:1])
    return Call(ImageToImagePipeline, scheduler, seeds, options, {"image": fitted(model, image)})


def redraw(
    model: Model, settings: Settings, image: Image.Image | None, mask: Image.Image | None, number: int, resamplings: int
) -> Call:
    """Draw a part of an image anew, `number` times; DDPM draws it unless the settings name DDIM.

    Args:
        model, settings: draw the images.
        image: the image, of any size.
        mask: an image of the same size, 255 where it is drawn anew and 0 where it is kept.
        number: number of images, each with a seed of its own, all of the class of the first seed.
        resamplings: how often each stretch of steps is run, at least 1.

    Raises:
        ValueError: where there is no image, or nothing of it is to be drawn anew.
    """
    if image is None or mask is None:
        raise ValueError("There is no image yet; put one in, or draw one from the seed.")
    _, height, width = model.pipeline.image_shape
    mask = ImageOps.fit(mask, (width, height), Image.Resampling.BOX).point(lambda value: 255 * (value >= 128))
    if mask.getbbox() is None:
        raise ValueError("Nothing is painted; paint over the part of the image that is to be drawn anew.")
    scheduler, length = model.scheduler(settings.replace(sampler="ddim" if settings.sampler == "ddim" else "ddpm"))
    seeds = [settings.seed + i for i in range(number)]
    jumps = {"jump_length": min(JUMP, settings.steps - 1), "resamplings": resamplings if settings.steps > 1 else 1}
    options = jumps | length | model.conditions(settings, seeds[:1])
    return Call(InpaintPipeline, scheduler, seeds, options, {"image": fitted(model, image), "mask": mask})


class Frame(NamedTuple):
    """One step on the way from noise to an image.

    Attributes:
        title: which step it is.
        x_t: what the network is given: the noisy image, of unit variance where the scheduler scales it.
        x0: the estimate of the image that the network makes of it.
    """

    title: str
    x_t: Image.Image
    x0: Image.Image


def watch(model: Model, call: Call) -> list[Frame]:
    """Draw the image of a call and return what it looked like on the way, the image itself last.

    Raises:
        ValueError: as `Call.run`.
    """
    frames: list[Frame] = []
    given: list[Tensor] = []
    scale_model_input = call.scheduler.scale_model_input

    def see(sample: Tensor, timestep: Any) -> Tensor:
        given[:] = [scale_model_input(sample, timestep)]
        return given[0]

    def keep(pipeline: DiffusionPipeline, i: int, t: Tensor, tensors: dict) -> None:
        count = len(pipeline.scheduler.timesteps)
        if i * FRAMES // count > (i - 1) * FRAMES // count:
            title = f"step {i + 1} of {count}, timestep {float(t):.0f}"
            frames.append(Frame(title, as_picture(given[0]), as_picture(tensors["pred_original_sample"])))

    call.scheduler.scale_model_input = see
    (image,) = call.run(model, callback_on_step_end=keep, callback_on_step_end_tensor_inputs=("pred_original_sample",))
    return [*frames, Frame("the image", image, image)]


# ---------------------------------------------------------------- pictures


def as_picture(x: Tensor) -> Image.Image:
    """Return one image (1, C, H, W) in [-1, 1] as a picture; values outside are clipped."""
    pixels = (x / 2 + 0.5).clamp(0, 1).float().cpu().permute(0, 2, 3, 1).numpy()
    return DiffusionPipeline.numpy_to_pil(pixels)[0]


def enlarged(image: Image.Image, least: int = 448) -> Image.Image:
    """Enlarge an image a whole number of times, without blur, until its longer side has at least so many pixels."""
    times = -(-least // max(image.size))
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


def fitted(model: Model, image: Image.Image) -> Image.Image:
    """Fit an image to the size and channels of the model, as in training; what `enlarged` did is undone exactly."""
    channels, height, width = model.pipeline.image_shape
    small = image.resize((width, height), Image.Resampling.NEAREST)
    if small.resize(image.size, Image.Resampling.NEAREST).tobytes() == image.tobytes():
        image = small
    pixels = to_array(ImageOps.exif_transpose(image), channels, (height, width))
    return Image.fromarray(pixels.transpose(1, 2, 0).squeeze(-1) if channels == 1 else pixels.transpose(1, 2, 0))
