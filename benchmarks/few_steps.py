"""A model and its tuned student in few steps: `python benchmarks/few_steps.py <teacher> <student>`, both pipelines.

Draws docs/few_steps.png: a row for each number of steps, and in each row the same seeds and classes. With the
`--guidance` of the teacher that the student has learned, it draws docs/guided.png.
"""

import argparse

import torch
from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw

from ddpm_pipe.sampling.config import SampleConfig
from ddpm_pipe.sampling.protocol import pipeline_for, sample_images

MARGIN = 200
"""Pixels left of a row for its name."""


def draw_row(model: str, scheduler: str | None, steps: int, count: int, guidance: float) -> list[Image.Image]:
    """Draw the images of seeds 0 to count - 1, each of the next class where there are any, at twice their size."""
    config = SampleConfig(model=model, scheduler=scheduler, steps=steps)
    pipeline = pipeline_for(config)
    pipeline.samplers = None  # even timesteps, also where others were searched
    labels = None if pipeline.unet.config.get("num_class_embeds") is None else "balanced"
    options = {"num_inference_steps": steps, "guidance_scale": guidance}
    ((_, images, _),) = sample_images(pipeline, list(range(count)), count, labels, **options)
    pixels = pipeline.numpy_to_pil(images.float().div(255).permute(0, 2, 3, 1).numpy())
    return [image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST) for image in pixels]


def main(teacher: str, student: str, count: int, guidance: float) -> None:
    rows = [("teacher, DPM-Solver++", teacher, "dpm++", steps, guidance) for steps in (1, 2, 4, 20)]
    rows += [("student", student, None, steps, 1.0) for steps in (1, 2, 4)]
    drawn = [draw_row(model, scheduler, steps, count, scale) for _, model, scheduler, steps, scale in rows]
    grid = make_image_grid([image.convert("RGB") for row in drawn for image in row], len(rows), count)
    picture = Image.new("RGB", (MARGIN + grid.width, grid.height), "white")
    picture.paste(grid, (MARGIN, 0))
    for i, (name, _, _, steps, _) in enumerate(rows):
        place = (6, (i + 0.5) * grid.height / len(rows))
        ImageDraw.Draw(picture).text(place, f"{name}, {steps}", fill="black", anchor="lm", font_size=14)
    picture.save("docs/few_steps.png" if guidance == 1 else "docs/guided.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("teacher", help="pipeline folder")
    parser.add_argument("student", help="pipeline folder")
    parser.add_argument("--guidance", type=float, default=1.0, help="scale of the teacher's guidance")
    parser.add_argument("--count", type=int, default=10, help="images in a row")
    torch.set_num_threads(1)
    main(**vars(parser.parse_args()))
