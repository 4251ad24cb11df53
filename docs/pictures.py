"""Draw the pictures of the documentation: `python docs/pictures.py runs/fashion_mnist`, the run of the first command.

They go to docs/pictures/. Each is drawn on the CPU from fixed seeds, so the same model gives the same pictures; all of
them take a few minutes of one core. `--tiles` and `--cifar10` name the runs of docs/training.md and docs/experiments.md
with coloured pictures, whose samples are drawn as well.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ddpm_pipe import DDIMScheduler, DDPMPipeline
from ddpm_pipe.data.images import to_unit_range
from ddpm_pipe.data.memory import ImageData, load_images
from ddpm_pipe.data.neighbours import nearest
from ddpm_pipe.randomness import generator
from ddpm_pipe.run.folder import Run
from ddpm_pipe.sampling.protocol import plug_in, sample_images
from ddpm_pipe.training.report import write_report

ROOT = Path(__file__).resolve().parent.parent
SCALE, GAP, TEXT = 3, 4, 15
"""Each pixel is a square of SCALE pixels; pixels between pictures; pixels of the height of a letter."""
SEEDS = list(range(10))
COLOURED = ("tiles", "cifar10")
"""Pictures of runs with classes other than the first command's."""


# ---------------------------------------------------------------- tables of pictures


def table(rows: list[Tensor], columns: list[str], names: list[str]) -> Image.Image:
    """Draw pictures in rows under the names of the columns, white on black.

    Args:
        rows: uint8 (N, C, H, W), one for each row.
        columns: the name above each column; empty for none.
        names: the name left of each row; empty for none.
    """
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), TEXT)
    height, width = (SCALE * size + GAP for size in rows[0].shape[2:])
    left = GAP + max((round(font.getlength(name)) + 2 * GAP for name in names), default=0)
    top = GAP + max((TEXT + 4) * (1 + name.count("\n")) for name in columns) + GAP if columns else GAP
    whole = Image.new("RGB", (left + len(rows[0]) * width, top + len(rows) * height))
    draw = ImageDraw.Draw(whole)
    for column, name in enumerate(columns):
        middle = left + column * width + (width - GAP) / 2
        draw.multiline_text((middle, top - 2 * GAP), name, "white", font, anchor="md", align="center")
    for row, images in enumerate(rows):
        middle = top + row * height + (height - GAP) / 2
        if names:
            draw.text((GAP, middle), names[row], "white", font, anchor="lm")
        for column, image in enumerate(images):
            cell = Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy()).convert("RGB")
            whole.paste(cell.resize((width - GAP, height - GAP), 0), (left + column * width, top + row * height))
    return whole


def to_levels(x: Tensor) -> Tensor:
    """Convert images in [-1, 1], (B, C, H, W), to uint8; what lies outside is cut off."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def timesteps(length: int, shares: list[float]) -> list[int]:
    """Return the timesteps, 0 to length - 1, at shares of a chain of this length."""
    return [min(round(share * length), length - 1) for share in shares]


def short(name: str) -> str:
    """Break the name of a class so that it fits above a picture."""
    return name.replace("T-shirt/top", "T-shirt").replace(" ", "\n")


# ---------------------------------------------------------------- the pictures


def draw_samples(pipeline: DDPMPipeline, seeds: list[int], steps: int, scale: float = 1.0) -> Tensor:
    """Draw an image of each seed with DPM-Solver++, uint8 (N, C, H, W); seed i has class i modulo their number."""
    solver = plug_in(pipeline.own_scheduler, "dpm++", {}, fewer=True)
    drawing = DDPMPipeline(pipeline.unet, solver)
    drawing.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": steps, "guidance_scale": scale}
    return torch.cat([images for _, images, _ in sample_images(drawing, seeds, 20, "balanced", **options)])


def classes(pipeline: DDPMPipeline, names: list[str], rows: int = 5) -> Image.Image:
    """Draw samples of each class, one a column; the classes are guided towards with scale 2."""
    images = draw_samples(pipeline, list(range(rows * len(names))), steps=20, scale=2.0)
    return table(list(images.split(len(names))), [short(name) for name in names], [])


def forward(pipeline: DDPMPipeline, data: ImageData) -> Image.Image:
    """Draw x_t ~ q(x_t | x_0) of real pictures at growing t, each row with the same noise."""
    positions = [int((data.labels[data.rows] == label).nonzero()[0]) for label in (9, 0, 8, 3)]
    x0 = to_unit_range(data.take(torch.tensor(positions))[0])
    eps = torch.randn(x0.shape, generator=generator(0, "sample"))
    scheduler = pipeline.own_scheduler
    steps = timesteps(len(scheduler), [0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 1])
    noisy = [to_levels(scheduler.add_noise(x0, eps, torch.full((len(x0),), t))) for t in steps]
    return table(list(torch.stack(noisy, 1)), [f"t = {t}" for t in steps], [])


def denoising(pipeline: DDPMPipeline) -> Image.Image:
    """Draw x_t and the estimate of x_0 along the path of DDPM's Algorithm 2, for two images."""
    shown = timesteps(len(pipeline.own_scheduler), [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.15, 0])
    path: dict[str, list[Tensor]] = {"sample": [], "pred_original_sample": []}
    before: list[Tensor] = []

    def keep(_: DDPMPipeline, step: int, t: Tensor, tensors: dict[str, Tensor]) -> None:
        if int(t) in shown:
            path["sample"].append(before[-1] if before else noise)
            path["pred_original_sample"].append(tensors["pred_original_sample"])
        before[:] = [tensors["sample"]]

    drawing = DDPMPipeline(pipeline.unet, pipeline.own_scheduler)
    drawing.set_progress_bar_config(disable=True)
    noise = torch.randn(2, *drawing.image_shape, generator=generator(3, "sample"))
    drawing(
        generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)],
        class_labels=[9, 0],
        sample=noise,
        callback_on_step_end=keep,
        callback_on_step_end_tensor_inputs=("sample", "pred_original_sample"),
    )
    rows = [to_levels(torch.stack([images[i] for images in steps])) for i in (0, 1) for steps in path.values()]
    return table(rows, [f"t = {t}" for t in shown], ["x_t", "estimate of x_0"] * 2)


def guidance(pipeline: DDPMPipeline, names: list[str]) -> Image.Image:
    """Draw the same seeds with growing scale of classifier-free guidance, one row each."""
    scales = [0.0, 1.0, 2.0, 4.0, 8.0]
    rows = [draw_samples(pipeline, SEEDS, steps=20, scale=scale) for scale in scales]
    return table(rows, [short(name) for name in names], [f"scale {scale:g}" for scale in scales])


def steps(pipeline: DDPMPipeline, names: list[str]) -> Image.Image:
    """Draw the same seeds with growing numbers of steps of DPM-Solver++, one row each."""
    counts = [2, 4, 6, 10, 20, 50]
    rows = [draw_samples(pipeline, SEEDS, steps=count) for count in counts]
    return table(rows, [short(name) for name in names], [f"{count} steps" for count in counts])


def neighbours(pipeline: DDPMPipeline, data: ImageData) -> Image.Image:
    """Draw samples, one a row, and the training images nearest to them."""
    images = draw_samples(pipeline, SEEDS[:5], steps=20)
    _, positions = nearest(images, data, 8)
    rows = [torch.cat([image[None], data.take(places)[0]]) for image, places in zip(images, positions, strict=True)]
    return table(rows, ["sample", *(f"{i}." for i in range(1, 9))], [])


def interpolation(pipeline: DDPMPipeline) -> Image.Image:
    """Draw the images between those of two noises, for three classes."""
    from ddpm_pipe.editing import InterpolationPipeline

    ddim = DDIMScheduler.from_config(pipeline.own_scheduler.config, clip_sample=False)
    between = InterpolationPipeline.from_pipe(pipeline, scheduler=ddim)
    between.set_progress_bar_config(disable=True)
    rows = []
    for label in (7, 3, 8):
        ends = [torch.Generator().manual_seed(seed) for seed in (label, label + 20)]
        images = between(10, ends, 25, class_labels=label, output_type="pt").images
        rows.append((images * 255).round().to(torch.uint8))
    return table(rows, [], [])


def load(run: Run) -> tuple[DDPMPipeline, list[str]]:
    """Load the model of a run, and the names of its classes."""
    return DDPMPipeline.from_pretrained(run.pipeline), json.loads(run.plan.read_text())["class_names"]


def main(run: Run, coloured: dict[str, Run], output: Path, chosen: list[str]) -> None:
    pipeline, names = load(run)
    data = str(ROOT / "examples" / "fashion_mnist")
    training = load_images(data, "train", with_labels=True, resolution=list(pipeline.image_shape[1:]))
    pictures: dict[str, Callable[[], Image.Image]] = {
        "classes": lambda: classes(pipeline, names),
        "forward": lambda: forward(pipeline, training),
        "denoising": lambda: denoising(pipeline),
        "guidance": lambda: guidance(pipeline, names),
        "steps": lambda: steps(pipeline, names),
        "neighbours": lambda: neighbours(pipeline, training),
        "interpolation": lambda: interpolation(pipeline),
        "report": lambda: Image.open(write_report(run)),
    }
    pictures |= {name: lambda other=other: classes(*load(other)) for name, other in coloured.items()}
    output.mkdir(parents=True, exist_ok=True)
    for name in chosen or pictures:
        pictures[name]().save(output / f"{name}.png", optimize=True)
        print(output / f"{name}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="the folder of a run of a model with the ten classes of Fashion-MNIST")
    for name in COLOURED:
        parser.add_argument(f"--{name}", help=f"the folder of the run whose samples are {name}.png")
    parser.add_argument("--output", default=str(ROOT / "docs" / "pictures"), help="where the pictures go")
    parser.add_argument("--only", nargs="+", default=[], help="names of the pictures to draw; all if not given")
    options = parser.parse_args()
    torch.set_num_threads(1)  # other numbers of threads round differently
    coloured = {name: Run(folder) for name in COLOURED if (folder := getattr(options, name))}
    main(Run(options.run), coloured, Path(options.output), options.only)
