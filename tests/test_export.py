"""A model outside of Python: its sampler as plain numbers, its network as ONNX, and the page in a real browser.

The browser is Chromium, driven by Playwright. Where Chromium, or the npm package onnxruntime-web, cannot be had, the tests
of the page are skipped and say so.
"""

import contextlib
import functools
import io
import json
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from conftest import one_sentence
from PIL import Image

from ddpm_pipe import DDPMPipeline, DDPMScheduler, DDPMUNet2DModel
from ddpm_pipe.export import runtime
from ddpm_pipe.export.config import ExportConfig
from ddpm_pipe.export.offers import offers
from ddpm_pipe.export.steps import linear_steps
from ddpm_pipe.sampling.protocol import plug_in

STEPS = 50
"""T of the models here."""
SHAPE = (3, 8, 12)
CLASSES = 3
TOLERANCE = 1
"""Levels of 255 by which a pixel that the browser drew may differ from the one that Python drew."""


def network(**options) -> DDPMUNet2DModel:
    torch.manual_seed(0)
    small = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_types": "none"}
    unet = DDPMUNet2DModel(sample_size=SHAPE[1:], **(small | options))
    torch.nn.init.normal_(unet.conv_out.weight, std=0.5)
    return unet.eval()


def pipeline_of(unet, scheduler=None, **options) -> DDPMPipeline:
    options = {"num_train_timesteps": STEPS, "beta_schedule": "squaredcos_cap_v2"} | options
    pipeline = DDPMPipeline(unet, scheduler or DDPMScheduler(**options))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def few_step_scheduler() -> diffusers.LCMScheduler:
    config = {"num_train_timesteps": STEPS, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
    return diffusers.LCMScheduler(original_inference_steps=STEPS, clip_sample=True, **config)


def all_noise(images: int, draws: int) -> tuple[torch.Tensor, list[torch.Generator]]:
    """The noise of the first draws of generators, (draws, images, C, H, W), and those generators, before they drew."""
    drawn = [torch.Generator().manual_seed(seed) for seed in range(images)]
    noise = [torch.stack([torch.randn(1, *SHAPE, generator=one)[0] for one in drawn]) for _ in range(draws)]
    return torch.stack(noise), [torch.Generator().manual_seed(seed) for seed in range(images)]


# ---------------------------------------------------------------- the sampler as numbers


def draw_by_numbers(pipeline: DDPMPipeline, steps, clip: float | None, noise: torch.Tensor) -> torch.Tensor:
    """The loop of the page, in Python: the images in [0, 1]."""
    draws = iter(noise)
    x, last = next(draws), 0.0
    for step in steps:
        output = pipeline.unet(x, step.t).sample[:, : x.shape[1]]
        x0 = step.x0_of_x * x + step.x0_of_output * output
        x0 = x0 if clip is None else x0.clamp(-clip, clip)
        x = step.x * x + step.x0 * x0 + step.last_x0 * last + step.noise * (next(draws) if step.noise else 0)
        last = x0
    return (x / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon", "sample"])
@pytest.mark.parametrize("name, count", [("dpm++", 7), ("dpm++", 16), ("ddim", 5), ("ddpm", 6), ("ddpm", STEPS)])
def test_the_numbers_of_a_sampler_draw_its_images(name, count, prediction_type):
    pipeline = pipeline_of(network(), prediction_type=prediction_type, beta_schedule="linear", beta_end=0.2)
    pipeline.scheduler = scheduler = plug_in(pipeline.own_scheduler, name, {}, fewer=count != STEPS)
    steps = linear_steps(scheduler, count)
    noise, generators = all_noise(2, count + 1)
    expected = pipeline(2, generators, count, output_type="pt").images
    clip = None if name == "dpm++" else 1.0
    got = draw_by_numbers(pipeline, steps, clip, noise)
    assert (got - expected).abs().max() < 2e-5
    wrong = [step._replace(x0=step.x0 * 1.01) for step in steps]
    assert (draw_by_numbers(pipeline, wrong, clip, noise) - expected).abs().max() > 5e-4


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_numbers_of_a_model_tuned_for_few_steps_draw_its_images(count):
    pipeline = pipeline_of(network(), few_step_scheduler())
    (offer,) = offers(pipeline)
    assert list(offer["steps"]) == [1, 2, 3, 4, 8] and offer["default_steps"] == 2
    steps = linear_steps(pipeline.scheduler, count)
    noise, generators = all_noise(2, count)
    expected = pipeline(2, generators, count, output_type="pt").images
    assert (draw_by_numbers(pipeline, steps, offer["clip"], noise) - expected).abs().max() < 2e-5


def test_a_page_offers_searched_timesteps_and_leaves_out_what_is_not_linear(tmp_path, capsys):
    from ddpm_pipe.samplers import Sampler, Samplers

    pipeline = pipeline_of(network(), prediction_type="v_prediction")
    searched = Sampler(scheduler="DPMSolverMultistepScheduler", steps=3, timesteps=[49, 20, 4], protocol="by hand")
    heun = Sampler(scheduler="HeunDiscreteScheduler", steps=3, guidance_scale=2.0, protocol="by hand")
    pipeline.samplers = Samplers(unet_sha256={}, learned=[searched], recommended=heun)
    first, *others = offers(pipeline)
    assert [row[0] for row in first["steps"][3]] == [49, 20, 4] and first["guidance_scale"] == 1
    assert [offer["label"] for offer in others] == ["DPM-Solver++", "DDIM", "DDPM"]
    assert "does not offer HeunDiscreteScheduler (recommended): scheduler=" in capsys.readouterr().out


def test_a_learned_variance_leaves_out_ddpm_and_thresholding_is_refused():
    learned = pipeline_of(network(out_channels=6), variance_type="learned_range")
    assert [offer["label"] for offer in offers(learned)] == ["DPM-Solver++", "DDIM"]
    with one_sentence("thresholding=True"):
        offers(pipeline_of(network(), thresholding=True))
