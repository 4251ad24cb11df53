"""The page: its layout, and what its buttons do."""

import html
import math
from collections.abc import Callable
from typing import Any

import gradio as gr
import torch
from gradio.processing_utils import save_bytes_to_cache
from PIL import Image, ImageChops

from ddpm_pipe.demo.config import Settings
from ddpm_pipe.demo.draw import (
    RECOMMENDED,
    Call,
    Frame,
    Model,
    draw,
    enlarged,
    interpolate,
    redraw,
    similar,
    watch,
)
from ddpm_pipe.editing import InterpolationPipeline

NO_CLASS = "none"
"""The choice of the page for images without a class, since a list has no empty choice."""

PIXELS = 2**20
"""Largest number of pixels of all images that the page draws in one call."""

CSS = """
main.fillable {width: 100%; max-width: 1200px !important;}
.pixelated img, .pixelated canvas {image-rendering: pixelated;}
.picture img {width: 100%; height: 100%; object-fit: contain;}
.results .grid-wrap {min-height: 20rem; max-height: none; overflow-y: visible;}
.results .grid-container {grid-template-rows: auto;}
.results .caption-label {padding: 0 0.3rem; font-size: 0.7rem; opacity: 0.85;}
@media (max-width: 600px) {.results .grid-container {grid-template-columns: repeat(3, minmax(0, 1fr));}}
"""

SMALL = 200
"""Images whose longer side has fewer pixels are shown with the edges of their pixels, and larger ones smoothly."""


def answers(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function of the page: it shows its progress, and a refusal as one sentence."""

    def answer(progress=gr.Progress(track_tqdm=True), *values: Any) -> Any:  # noqa: B008 - gradio looks for it there
        try:
            return function(*values)
        except torch.OutOfMemoryError:
            reason = "The memory of the device is too small for so many images; draw fewer at a time."
        except ValueError as error:
            reason = html.escape(str(error), quote=False)
        raise gr.Error(reason, print_exception=False)

    return answer


class Page:
    """The page of one model.

    Args:
        model: draws the images. It is loaded once, and draws for one visitor at a time.
    """

    def __init__(self, model: Model):
        self.model = model
        _, height, width = model.pipeline.image_shape
        self.most = max(1, min(64, PIXELS // (height * width)))
        """largest number of images of a call"""
        self.one_class = "All have the class of the first seed." if model.class_names else ""
        self.look = ["pixelated"] if max(height, width) < SMALL else []
        self.settings: list[gr.components.Component] = []

    def blocks(self) -> gr.Blocks:
        """Lay out the page."""
        with gr.Blocks(title=self.model.config.model, analytics_enabled=False, delete_cache=(3600, 86400)) as blocks:
            gr.Markdown(self.heading())
            with gr.Row():
                with gr.Column(scale=1, min_width=260):
                    self.add_settings()
                with gr.Column(scale=3, min_width=320):
                    for name, add in (
                        ("Draw", self.add_draw),
                        ("Watch", self.add_watch),
                        ("Interpolate", self.add_interpolate),
                        ("Redraw a part", self.add_redraw),
                        ("From an image", self.add_similar),
                    ):
                        with gr.Tab(name):
                            add()
        return blocks

    def heading(self) -> str:
        """Return the title of the page and what the model is, as Markdown."""
        channels, height, width = self.model.pipeline.image_shape
        kind = {1: "grey", 3: "colour", 4: "colour and opacity"}[channels]
        classes = f"{len(self.model.class_names)} classes" if self.model.class_names else "no classes"
        steps = self.model.pipeline.own_scheduler.config.num_train_timesteps
        device = self.model.pipeline.device.type
        facts = f"{height}×{width} pixels, {kind}, {classes}, {steps} timesteps, on {device}"
        return f"# {html.escape(self.model.config.model)}\n\nA pixel-space diffusion model: {facts}."

    # ------------------------------------------------------------ settings, which all tabs share

    def add_settings(self) -> None:
        """Add the fields of `Settings`."""
        first, names = self.model.first_settings, self.model.class_names
        samplers = [(title, name) for name, title in self.model.samplers.items()]
        longest = self.model.pipeline.own_scheduler.config.num_train_timesteps
        with gr.Group():
            seed = gr.Number(first.seed, label="Seed", info="The same seed gives the same image.", precision=0)
            again = gr.Button("New seed", size="sm")
            sampler = gr.Dropdown(samplers, value=first.sampler, label="Sampler")
            is_free = first.sampler != RECOMMENDED
            steps = gr.Slider(1, longest, first.steps, step=1, label="Steps", interactive=is_free)
            choices = [("each class in turn", "balanced"), *((name, str(i)) for i, name in enumerate(names))]
            label = gr.Dropdown(
                [*choices, ("no class", NO_CLASS)],
                value=first.class_labels or NO_CLASS,
                label="Class",
                visible=bool(names),
            )
            guidance = gr.Slider(
                0,
                10,
                first.guidance_scale,
                step=0.1,
                label="Guidance",
                info="1 is none; more is clearer and less varied.",
                visible=bool(names),
            )
        self.settings = [seed, sampler, steps, label, guidance]
        again.click(None, outputs=seed, js="() => Math.floor(Math.random() * 1e6)", api_visibility="private")
        quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        sampler.change(self.steps_of, sampler, steps, **quiet)
        label.change(lambda name: gr.Slider(interactive=name != NO_CLASS), label, guidance, **quiet)

    def steps_of(self, sampler: str) -> gr.Slider:
        """Return the slider of the steps for a sampler; the recommended one has a number of its own."""
        found = self.model.recommended
        if sampler == RECOMMENDED and found is not None:
            return gr.Slider(value=found.steps, interactive=False)
        return gr.Slider(interactive=True)

    def read(self, seed: Any, sampler: str, steps: Any, label: str, guidance: Any) -> Settings:
        """Return the settings of the fields.

        Raises:
            ValueError: for a value that is not valid, in one sentence.
        """
        labels = None if label == NO_CLASS else label
        return Settings(seed=seed, sampler=sampler, steps=steps, class_labels=labels, guidance_scale=guidance)

    # ------------------------------------------------------------ tabs

    def add_draw(self) -> None:
        """Add the tab that draws images from noise."""
        number = self.number(16)
        button = gr.Button("Draw", variant="primary")
        self.on(button, draw, [number], self.results(), "draw")

    def add_interpolate(self) -> None:
        """Add the tab that draws images between two seeds."""
        with gr.Row():
            last = gr.Number(1, label="Last seed", info="The first one is the seed of the settings.", precision=0)
            number = gr.Slider(2, max(2, self.most), min(8, self.most), step=1, label="Images")
        button = gr.Button("Interpolate", variant="primary")
        gr.Markdown(f"DDIM draws the images, whatever sampler is chosen. {self.one_class}")
        self.on(button, interpolate, [last, number], self.results(), "interpolate")

    def add_similar(self) -> None:
        """Add the tab that draws images like a given one."""
        with gr.Row():
            with gr.Column():
                image = gr.Image(
                    label="Image",
                    type="pil",
                    format="png",
                    sources=["upload", "clipboard"],
                    height=320,
                    elem_classes=[*self.look, "picture"],
                )
                first = gr.Button("Draw one from the seed", size="sm")
            with gr.Column():
                strength = gr.Slider(0.05, 1, 0.5, step=0.05, label="Strength", info="How much is drawn anew.")
                number = self.number(4)
                button = gr.Button("Draw like it", variant="primary")
                gr.Markdown(self.one_class)
        self.start(first, lambda drawn: drawn, image, "similar_start")
        self.on(button, similar, [image, number, strength], self.results(), "similar")

    def add_redraw(self) -> None:
        """Add the tab that draws a painted part of an image anew."""
        with gr.Row():
            with gr.Column():
                image = gr.ImageEditor(
                    label="Paint over a part",
                    type="pil",
                    image_mode="RGBA",
                    format="png",
                    sources=["upload", "clipboard"],
                    transforms=(),
                    layers=False,
                    height=520,
                    brush=gr.Brush(default_size=60, colors=["#e11d48"], color_mode="fixed"),
                    buttons=[],
                    canvas_size=(448, 448),
                    elem_classes=self.look,
                    elem_id="painted",
                )
                first = gr.Button("Draw one from the seed", size="sm")
            with gr.Column():
                times = gr.Slider(
                    1, 20, 5, step=1, label="Resamplings", info="More fit the new part better and take longer."
                )
                number = self.number(4)
                button = gr.Button("Redraw", variant="primary")
                gr.Markdown(f"DDPM draws the images, or DDIM where it is chosen. {self.one_class}")
        self.start(first, canvas_of, image, "redraw_start")
        self.on(button, redraw_painted, [image, number, times], self.results(), "redraw")

    def add_watch(self) -> None:
        """Add the tab that shows an image step by step."""
        button = gr.Button("Draw and watch", variant="primary")
        position = gr.Slider(1, 2, 1, step=1, label="Step", interactive=False)
        title = gr.Markdown("The network sees a noisy image and makes an estimate of the clean one, step after step.")
        with gr.Row():
            x_t, x0 = (
                gr.Image(
                    label=label,
                    format="png",
                    interactive=False,
                    height=320,
                    buttons=["download", "fullscreen"],
                    elem_classes=[*self.look, "picture"],
                )
                for label in ("Noisy image x_t", "Estimate of x0")
            )
        code = self.code()
        frames = gr.State([])

        def begin(*values: Any) -> tuple:
            call = draw(self.model, self.read(*values), 1)
            seen = watch(self.model, call)
            middle = (len(seen) + 1) // 2
            slider = gr.Slider(minimum=1, maximum=len(seen), value=middle, interactive=True)
            return seen, slider, *show(seen, middle), gr.Code(call.code(self.model), visible=True)

        def show(seen: list[Frame], place: int) -> Frame:
            return seen[place - 1]

        outputs = [frames, position, title, x_t, x0, code]
        button.click(
            answers(begin),
            self.settings,
            outputs,
            concurrency_id="model",
            show_progress_on=[x_t, x0],
            api_name="watch",
        )
        position.input(
            show,
            [frames, position],
            [title, x_t, x0],
            queue=False,
            show_progress="hidden",
            trigger_mode="always_last",
            api_visibility="private",
        )

    # ------------------------------------------------------------ parts of tabs

    def number(self, usual: int) -> gr.Slider:
        """Add the field for the number of images."""
        return gr.Slider(1, self.most, min(usual, self.most), step=1, label="Images", visible=self.most > 1)

    def code(self) -> gr.Code:
        """Add the place for the code."""
        return gr.Code(
            label="The same in Python", language="python", interactive=False, show_line_numbers=False, visible=False
        )

    def results(self) -> list[gr.components.Component]:
        """Add the places for images, their zip file and their code."""
        images = gr.Gallery(
            show_label=False,
            format="png",
            object_fit="contain",
            interactive=False,
            buttons=["download", "fullscreen"],
            elem_classes=[*self.look, "results"],
        )
        return [images, gr.DownloadButton("Download images and code", size="md", visible=False), self.code()]

    def on(
        self,
        button: gr.Button,
        make_call: Callable[..., Call],
        inputs: list[gr.components.Component],
        outputs: list[gr.components.Component],
        name: str,
    ) -> None:
        """Have a button make a call of the settings and more inputs, and show its images, zip file and code."""
        count = len(self.settings)

        def respond(*values: Any) -> tuple:
            call = make_call(self.model, self.read(*values[:count]), *values[count:])
            images = call.run(self.model)
            file = save_bytes_to_cache(call.archive(self.model, images), "images.zip", outputs[1].GRADIO_CACHE)
            shown = list(zip(images, captions(self.model, call, len(images)), strict=True))
            columns = min(8, max(4, math.ceil(math.sqrt(2 * len(images)))))
            return (
                gr.Gallery(shown, columns=columns),
                gr.DownloadButton(value=file, visible=True),
                gr.Code(call.code(self.model), visible=True),
            )

        button.click(
            answers(respond),
            [*self.settings, *inputs],
            outputs,
            concurrency_id="model",
            show_progress_on=outputs[0],
            api_name=name,
        )

    def start(
        self, button: gr.Button, wrap: Callable[[Image.Image], Any], output: gr.components.Component, name: str
    ) -> None:
        """Have a button draw one image from the seed, as one to begin with."""

        def respond(*values: Any) -> Any:
            (image,) = draw(self.model, self.read(*values), 1).run(self.model)
            return wrap(image)

        button.click(answers(respond), self.settings, output, concurrency_id="model", api_name=name)


def canvas_of(image: Image.Image) -> dict[str, Any]:
    """Return an image for painting on it."""
    return {"background": enlarged(image), "layers": [], "composite": None}


def redraw_painted(model: Model, settings: Settings, canvas: dict[str, Any] | None, *rest: Any) -> Call:
    """Make the call that draws what is painted on a canvas anew; `rest` is that of `redraw`."""
    image = None if canvas is None else canvas["background"]
    if canvas is None or image is None:
        return redraw(model, settings, None, None, *rest)
    mask = Image.new("L", image.size)
    for layer in canvas["layers"]:
        mask = ImageChops.lighter(mask, layer.getchannel("A").point(lambda value: 255 * (value > 0)))
    return redraw(model, settings, image, mask, *rest)


def captions(model: Model, call: Call, count: int) -> list[str]:
    """Return what stands below each image: its seed and class, or its place between two seeds."""
    if call.kind is InterpolationPipeline:
        return [f"{i / (count - 1):.0%}" for i in range(count)]
    labels = call.options.get("class_labels")
    names = [""] * count
    if labels is not None:
        names = [f" · {model.class_names[each]}" for each in ([labels] * count if isinstance(labels, int) else labels)]
    return [f"{seed}{name}" for seed, name in zip(call.seeds, names, strict=True)]
