"""Editing pipelines: closed forms for images that are draws of a Gaussian, then what they promise with any network."""

from itertools import pairwise

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from PIL import Image
from test_pipeline import ALPHA_BAR, ROUNDING, SIZE, our_pipe, our_unet, quiet, refused, seeded, stock_unet
from torch.testing import assert_close

from ddpm_pipe import DDIMScheduler, DDPMPipeline, DDPMScheduler
from ddpm_pipe.editing import (
    ImageToImagePipeline,
    InpaintPipeline,
    InterpolationPipeline,
    InversionPipeline,
    read_images,
    resampling_order,
    slerp,
)

EDITORS = [InterpolationPipeline, ImageToImagePipeline, InpaintPipeline, InversionPipeline]


class Gaussian(ModelMixin, ConfigMixin):
    """What a network learns from draws of N(MEAN + SHIFT class, STD^2 R), R having CORRELATION off the diagonal."""

    MEAN, STD, SHIFT = 0.1, 0.2, 0.15  # images stay inside [-1, 1]: nothing is clipped

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 8,
        in_channels: int = 1,
        correlation: float = 0.0,
        num_class_embeds: int | None = None,
        prediction_type: str = "v_prediction",
    ):
        super().__init__()
        self.register_buffer("sigma", (1 / ALPHA_BAR - 1).sqrt())
        self.seen: list[int] = []
        self.first_input: torch.Tensor | None = None

    def covariance(self, pixels: int) -> torch.Tensor:
        rho = self.config.correlation
        return self.STD**2 * ((1 - rho) * torch.eye(pixels) + rho * torch.ones(pixels, pixels)).double()

    def forward(self, sample, timestep, class_labels=None):
        self.seen.append(int(timestep))
        self.first_input = sample if self.first_input is None else self.first_input
        below = timestep.long()  # KDPM2 asks at fractions of a timestep
        sigma = torch.lerp(self.sigma[below], self.sigma[(below + 1).clamp(max=999)], timestep.double() - below)
        alpha_bar, x = 1 / (1 + sigma**2), sample.flatten(1).double()
        covariance = self.covariance(x.shape[1])
        mean = self.MEAN + self.SHIFT * (0 if class_labels is None else class_labels.double()[:, None])
        gain = covariance @ (alpha_bar * covariance + (1 - alpha_bar) * torch.eye(x.shape[1])).inverse()
        x0 = mean + alpha_bar.sqrt() * (x - alpha_bar.sqrt() * mean) @ gain
        eps = (x - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()
        outputs = {
            "epsilon": eps,
            "sample": x0,
            "v_prediction": alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x0,
        }
        return UNet2DOutput(sample=outputs[self.config.prediction_type].view_as(sample).float())


def gaussian_pipe(cls, scheduler=DDIMScheduler, spacing: str = "trailing", **options):
    unet = Gaussian(**options)
    ours = DDIMScheduler(
        clip_sample=False, prediction_type=unet.config.prediction_type, timestep_spacing=spacing, set_alpha_to_one=True
    )
    return quiet(cls(unet, scheduler.from_config(ours.config)))


def editor(cls, unet=None, scheduler=None):
    """A pipeline of an untrained network."""
    scheduler = scheduler or DDIMScheduler(clip_sample=cls is not InversionPipeline)
    return quiet(cls.from_pipe(our_pipe(our_unet() if unet is None else unet, scheduler)))


def close(actual: torch.Tensor, expected: torch.Tensor, atol: float) -> None:
    assert_close(actual.double(), expected.double(), rtol=0, atol=atol)


def some_images(count: int = 2, channels: int = 3, size: int = SIZE) -> torch.Tensor:
    return torch.rand(count, channels, size, size, generator=seeded(5))


def edit(pipe, seed: int = 0, steps: int = 6, image: torch.Tensor | None = None, **options):
    """The images (B, C, H, W), or for inversion the noise, of one seeded call of any of the four."""
    channels = pipe.image_shape[0]
    given = some_images(2, channels) if image is None else image
    half = torch.zeros(1, 1, SIZE, SIZE)
    half[..., SIZE // 2 :] = 1
    if isinstance(pipe, InversionPipeline):
        return pipe(given, num_inference_steps=steps, **options)
    inputs = {
        InterpolationPipeline: {"count": 3},
        ImageToImagePipeline: {"image": given, "strength": 0.7},
        InpaintPipeline: {"image": given, "mask": half, "jump_length": 2, "resamplings": 2},
    }[type(pipe)]
    options = {"generator": seeded(seed), "output_type": "pt", **inputs, **options}
    return pipe(num_inference_steps=steps, **options).images


# ---------------------------------------------------------------- from_pipe


@pytest.mark.parametrize("cls", EDITORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_pipe_takes_the_very_parts_and_leaves_them_as_they_are(cls, dtype):
    pipe = our_pipe(our_unet().to(dtype), DDIMScheduler())
    made = cls.from_pipe(pipe)
    assert type(made) is cls and made.unet is pipe.unet and made.scheduler is pipe.scheduler
    assert made.unet.dtype is dtype
    back = DDPMPipeline.from_pipe(made)
    assert type(back) is DDPMPipeline and back.unet is pipe.unet


def test_from_pipe_takes_other_parts_by_name_and_the_pipelines_of_diffusers():
    stock, ddim = diffusers.DDPMPipeline(stock_unet(), diffusers.DDPMScheduler()), DDIMScheduler()
    made = InpaintPipeline.from_pipe(stock, scheduler=ddim)
    assert made.unet is stock.unet and made.scheduler is ddim


# ---------------------------------------------------------------- interpolation


@pytest.mark.parametrize("share, expected", [(0, [2, 0]), (0.5, [2**0.5, 2**0.5]), (1 / 3, [3**0.5, 1]), (1, [0, 2])])
def test_slerp_goes_along_the_circle(share, expected):
    points = slerp(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0]), torch.tensor([share]))
    assert_close(points, torch.tensor([expected], dtype=torch.float32), rtol=0, atol=1e-6)


def test_slerp_of_an_acute_angle_has_equal_steps_and_exact_ends():
    a, b = torch.randn(2, 3, 4, 4, generator=seeded())
    b = 0.7 * a + 0.3 * b
    b = b / b.norm() * a.norm()
    points = slerp(a, b, torch.linspace(0, 1, 6)).flatten(1)
    assert torch.equal(points[0], a.flatten()) and torch.equal(points[-1], b.flatten())
    assert_close(points.norm(dim=1), a.norm().expand(6))
    steps = (points[1:] - points[:-1]).norm(dim=1)
    assert_close(steps, steps[:1].expand(5), rtol=1e-4, atol=0)


@pytest.mark.parametrize("factor, middle", [(1.0, 1.0), (2.0, 1.5), (-1.0, 0.0)])
def test_slerp_without_an_arc_is_the_straight_line(factor, middle):
    a = torch.randn(3, 4, 4, generator=seeded())
    assert_close(slerp(a, factor * a, torch.tensor([0.5])), middle * a[None], rtol=0, atol=1e-6)


def test_interpolation_of_a_linear_model_is_slerp_of_its_images():
    """The ODE keeps (x_t - mean_t) / std_t, so that each image is known from its noise (here MEAN_T is nearly 0)."""
    pipe = gaussian_pipe(InterpolationPipeline)
    images = pipe(5, [seeded(1), seeded(2)], num_inference_steps=1000, output_type="pt").images
    a, b = (torch.randn(1, 8, 8, generator=seeded(seed)).double() for seed in (1, 2))
    angle = torch.arccos((a * b).sum() / (a.norm() * b.norm()))
    alpha_bar = ALPHA_BAR[-1]
    std = (alpha_bar * Gaussian.STD**2 + 1 - alpha_bar).sqrt()
    for i, image in enumerate(images):
        x_T = (torch.sin((4 - i) / 4 * angle) * a + torch.sin(i / 4 * angle) * b) / torch.sin(angle)
        x0 = Gaussian.MEAN + Gaussian.STD * (x_T - alpha_bar.sqrt() * Gaussian.MEAN) / std
        close(2 * image - 1, x0, 0.01)


@pytest.mark.parametrize("options", [{}, {"class_labels": 1}, {"class_labels": 1, "guidance_scale": 3.0}], ids=str)
@pytest.mark.parametrize("seeds", [[1, 2], 3])
def test_ends_are_the_plain_images_of_their_noises(seeds, options):
    unet = our_unet(num_class_embeds=3) if options else our_unet()
    pipe = our_pipe(unet, DDIMScheduler())

    def generator():
        return seeded(seeds) if isinstance(seeds, int) else [seeded(seed) for seed in seeds]

    plain = pipe(2, generator(), 4, output_type="pt", **options).images
    images = edit(editor(InterpolationPipeline, unet), steps=4, count=4, generator=generator(), **options)
    assert_close(images[[0, -1]], plain, **ROUNDING)
    noise = torch.cat([torch.randn(1, 3, 8, 8, generator=g) for g in generator()]) if isinstance(seeds, list) else None
    given = edit(editor(InterpolationPipeline, unet), steps=4, count=4, generator=seeded(9), sample=noise, **options)
    assert (noise is None) or torch.equal(given, images)


@pytest.mark.parametrize(
    "options, argument",
    [
        ({"count": 1}, "count=1"),
        ({"generator": [seeded()]}, "generator is a list of 1"),
        ({"sample": torch.zeros(3, 3, SIZE, SIZE)}, "sample has the shape"),
        ({"output_type": "jpeg"}, "output_type"),
    ],
)
def test_interpolation_refuses_what_it_cannot_honour(options, argument):
    with refused(argument):
        edit(editor(InterpolationPipeline), **options)


@pytest.mark.parametrize("cls", [InterpolationPipeline, InversionPipeline])
@pytest.mark.parametrize("scheduler", [DDPMScheduler(), diffusers.EulerAncestralDiscreteScheduler()])
def test_samplers_other_than_ddim_are_refused(cls, scheduler):
    with refused(f"scheduler={type(scheduler).__name__}"):
        edit(editor(cls, scheduler=scheduler))


# ---------------------------------------------------------------- image-to-image


@pytest.mark.parametrize(
    "scheduler, steps, strength",
    [
        ("ours", 500, 0.3),
        ("ours", 500, 0.6),
        ("ours", 500, 1.0),
        ("DDIMScheduler", 500, 0.6),
        ("EulerDiscreteScheduler", 500, 0.6),
        ("HeunDiscreteScheduler", 100, 0.6),
        ("KDPM2DiscreteScheduler", 100, 0.6),
        ("DPMSolverMultistepScheduler", 100, 0.6),
        ("DPMSolverSinglestepScheduler", 200, 0.6),
        ("DEISMultistepScheduler", 100, 0.6),
        ("UniPCMultistepScheduler", 100, 0.6),
    ],
)
def test_image_is_noised_to_its_timestep_and_follows_the_flow_from_there(scheduler, steps, strength):
    pipe = gaussian_pipe(ImageToImagePipeline, DDIMScheduler if scheduler == "ours" else getattr(diffusers, scheduler))
    given = some_images(2, 1)
    images = pipe(given, strength, generator=seeded(), num_inference_steps=steps, output_type="pt").images
    alpha_bar = ALPHA_BAR[round(strength * 1000) - 1]
    assert pipe.unet.seen[0] == round(strength * 1000) - 1
    x_t = alpha_bar.sqrt() * (2 * given - 1) + (1 - alpha_bar).sqrt() * torch.randn(2, 1, 8, 8, generator=seeded())
    close(pipe.unet.first_input, x_t, 1e-4)
    std = (alpha_bar * Gaussian.STD**2 + 1 - alpha_bar).sqrt()
    expected = Gaussian.MEAN + Gaussian.STD * (x_t - alpha_bar.sqrt() * Gaussian.MEAN) / std
    close(2 * images - 1, expected, 0.02)


@pytest.mark.parametrize("strength", [0.05, 0.2])
@pytest.mark.parametrize("scheduler, options", [(DDPMScheduler, {}), (DDIMScheduler, {"eta": 1.0})])
def test_ancestral_sampling_draws_from_the_posterior_of_the_noised_image(scheduler, options, strength):
    """x0 | x_t ~ N(m + g (x_t - sqrt(alpha_bar) m), STD^2 (1 - alpha_bar) / v), with g = sqrt(alpha_bar) STD^2 / v."""
    pipe = gaussian_pipe(ImageToImagePipeline, scheduler)
    options = options | {"generator": seeded(), "num_inference_steps": 1000, "output_type": "pt"}
    images = pipe(torch.full((256, 1, 8, 8), 0.7), strength, **options).images
    alpha_bar = ALPHA_BAR[round(strength * 1000) - 1].item()
    total = alpha_bar * Gaussian.STD**2 + 1 - alpha_bar
    gain = alpha_bar**0.5 * Gaussian.STD**2 / total
    mean = Gaussian.MEAN + gain * alpha_bar**0.5 * (0.4 - Gaussian.MEAN)
    std = (Gaussian.STD**2 * (1 - alpha_bar) / total + gain**2 * (1 - alpha_bar)) ** 0.5
    x0, count = 2 * images - 1, images.numel()
    assert abs(x0.mean().item() - mean) < 4 * std / count**0.5 + 0.001
    assert abs(x0.std().item() / std - 1) < 4 / (2 * count) ** 0.5 + 0.02  # 2 % for the discretisation of the chain


@pytest.mark.parametrize("strength, expected", [(1.0, [900, 800, 700]), (0.29, [200, 100, 0]), (0.1, [0]), (1e-6, [0])])
def test_strength_is_the_share_of_the_timesteps(strength, expected):
    pipe = gaussian_pipe(ImageToImagePipeline, spacing="leading")
    pipe(some_images(1, 1), strength, generator=seeded(), num_inference_steps=10)
    assert pipe.unet.seen[:3] == expected


@pytest.mark.parametrize("scheduler, expected", [("EulerDiscreteScheduler", 2), ("HeunDiscreteScheduler", 4)])
def test_schedulers_that_count_are_told_where_to_begin(scheduler, expected):
    """Timesteps alone do not tell: with the noise levels of Karras et al. some of them coincide."""
    pipe = gaussian_pipe(ImageToImagePipeline, getattr(diffusers, scheduler))
    pipe(some_images(1, 1), 0.8, generator=seeded(), num_inference_steps=10)
    assert pipe.scheduler.begin_index == expected


@pytest.mark.parametrize("kind", ["DDPMScheduler", "DDIMScheduler"])
def test_image_to_image_is_the_same_with_the_schedulers_of_diffusers(kind):
    ours = {"DDPMScheduler": DDPMScheduler, "DDIMScheduler": DDIMScheduler}[kind]()
    stock = getattr(diffusers, kind).from_config(ours.config)
    images = [edit(editor(ImageToImagePipeline, scheduler=scheduler)) for scheduler in (ours, stock)]
    assert_close(*images, **ROUNDING)


@pytest.mark.parametrize("cls", [ImageToImagePipeline, InpaintPipeline])
def test_an_argument_that_is_not_known_is_an_error_as_of_any_call(cls):
    with pytest.raises(TypeError, match="unexpected keyword argument 'sample'"):
        edit(editor(cls), sample=None)


@pytest.mark.parametrize("strength", [0, -0.1, 1.01])
def test_strength_outside_of_0_and_1_is_refused(strength):
    with refused(f"strength={strength}"):
        edit(editor(ImageToImagePipeline), strength=strength)


def test_scheduler_that_counts_its_steps_is_refused():
    with refused("scheduler=PNDMScheduler"):
        edit(editor(ImageToImagePipeline, scheduler=diffusers.PNDMScheduler()))


# ---------------------------------------------------------------- inpainting


def original_order(steps: int, jump_length: int, resamplings: int) -> list[int]:
    """The steps of `get_schedule_jump` in the code of the paper, which lists the levels, steps - 1 to 0 and then -1."""
    jumps = dict.fromkeys(range(0, steps - jump_length, jump_length), resamplings - 1)
    level, levels = steps, []
    while level >= 1:
        level -= 1
        levels.append(level)
        if jumps.get(level, 0) > 0:
            jumps[level] -= 1
            for _ in range(jump_length):
                level += 1
                levels.append(level)
    levels.append(-1)
    return [steps - 1 - a for a, b in pairwise(levels) if b < a]


@pytest.mark.parametrize(
    "steps, jump_length, resamplings", [(6, 1, 3), (20, 10, 10), (50, 10, 4), (9, 4, 2), (7, 3, 1)]
)
def test_order_is_that_of_the_code_of_the_paper(steps, jump_length, resamplings):
    assert resampling_order(steps, jump_length, resamplings) == original_order(steps, jump_length, resamplings)


def test_order_of_jumps_of_one_is_algorithm_1():
    expected = [step for step in range(5) for _ in range(3 if step < 4 else 1)]
    assert resampling_order(5, 1, 3) == expected


def moments_of_repaint(steps: int, jump_length: int, resamplings: int, pixel: float, correlation: float):
    """Mean and covariance of two pixels, the first of which is kept, through every move of RePaint with DDPM steps."""
    chosen = [round(i * 1000 / steps) - 1 for i in range(steps, 0, -1)]
    level = [ALPHA_BAR[t].item() for t in chosen] + [1.0]
    prior = Gaussian.STD**2 * np.array([[1, correlation], [correlation, 1]])
    mean, covariance = np.zeros(2), np.eye(2)
    order = resampling_order(steps, jump_length, resamplings)
    for i, step in enumerate(order):
        t, s = level[step], level[step + 1]
        gain = t**0.5 * prior @ np.linalg.inv(t * prior + (1 - t) * np.eye(2))
        of_x0, of_x_t = s**0.5 * (1 - t / s) / (1 - t), (t / s) ** 0.5 * (1 - s) / (1 - t)
        x0 = Gaussian.MEAN + gain @ (mean - t**0.5 * Gaussian.MEAN)
        mean, slope = of_x0 * x0 + of_x_t * mean, of_x0 * gain + of_x_t * np.eye(2)
        covariance = slope @ covariance @ slope.T + (1 - s) / (1 - t) * (1 - t / s) * np.eye(2)
        mean[0], covariance = s**0.5 * pixel, np.diag([1 - s, covariance[1, 1]])
        if i + 1 < len(order) and order[i + 1] <= step:
            back = level[order[i + 1]] / s
            mean, covariance = back**0.5 * mean, back * covariance + (1 - back) * np.eye(2)
    return mean[1], covariance[1, 1] ** 0.5


CONDITIONAL = {"pixel": 0.5, "correlation": 0.9}


def inpaint_a_pixel(resamplings: int, jump_length: int = 2, steps: int = 20, scheduler=DDPMScheduler, **options):
    """The second of two correlated pixels, 4000 times; the first is kept at 0.5 in [-1, 1]."""
    size = {"sample_size": (1, 2), "correlation": CONDITIONAL["correlation"]}
    image = torch.full((4000, 1, 1, 2), (CONDITIONAL["pixel"] + 1) / 2)
    pipe = gaussian_pipe(InpaintPipeline, scheduler, **size)
    mask = torch.tensor([0, 1]).view(1, 1, 1, 2)
    options |= {"generator": seeded(), "num_inference_steps": steps, "output_type": "pt"}
    images = pipe(image, mask, jump_length, resamplings, **options).images
    assert torch.equal(images[..., 0], image[..., 0])
    return 2 * images[:, 0, 0, 1] - 1


@pytest.mark.parametrize("resamplings, jump_length, steps", [(1, 2, 20), (2, 1, 20), (4, 2, 100), (10, 5, 50)])
@pytest.mark.parametrize("scheduler, options", [(DDPMScheduler, {}), (DDIMScheduler, {"eta": 1.0})])
def test_drawn_pixel_has_the_mean_and_deviation_of_algorithm_1(scheduler, options, resamplings, jump_length, steps):
    mean, std = moments_of_repaint(steps, jump_length, resamplings, **CONDITIONAL)
    drawn = inpaint_a_pixel(resamplings, jump_length, steps, scheduler=scheduler, **options)
    assert abs(drawn.mean().item() - mean) < 4 * std / len(drawn) ** 0.5
    assert abs(drawn.std().item() / std - 1) < 4 / (2 * len(drawn)) ** 0.5


def test_resampling_moves_the_drawn_pixel_to_its_conditional_mean():
    conditional = Gaussian.MEAN + CONDITIONAL["correlation"] * (CONDITIONAL["pixel"] - Gaussian.MEAN)
    errors = [abs(inpaint_a_pixel(often, 1, 100).mean().item() - conditional) for often in (1, 3, 10)]
    assert errors[0] > 0.1 and errors[0] > 1.7 * errors[1] > 1.7 * 1.4 * errors[2]


def test_inpainting_everything_is_plain_ddim_and_nothing_is_the_image():
    pipe, image = editor(InpaintPipeline), some_images()
    everything, nothing = torch.ones(1, 1, SIZE, SIZE), torch.zeros(1, 1, SIZE, SIZE)
    plain = DDPMPipeline.from_pipe(pipe)(2, seeded(), 6, output_type="pt").images
    assert_close(edit(pipe, mask=everything, resamplings=1), plain, rtol=0, atol=0)
    assert torch.equal(edit(pipe, mask=nothing), image)


@pytest.mark.parametrize(
    "scheduler", [DDPMScheduler(), DDIMScheduler(), DDIMScheduler(set_alpha_to_one=False, rescale_betas_zero_snr=True)]
)
def test_what_is_kept_is_the_given_image_to_the_bit(scheduler):
    image = some_images()
    masks = torch.rand(2, 1, SIZE, SIZE, generator=seeded(3)).round()
    images = edit(editor(InpaintPipeline, scheduler=scheduler), image=image, mask=masks)
    kept = (masks == 0).expand_as(image)
    assert torch.equal(images[kept], image[kept])
    assert ((images - image)[~kept].abs() > 1e-3).float().mean() > 0.9


def test_pil_images_and_masks_are_kept_to_the_bit():
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[2:5] = 255
    pipe = editor(InpaintPipeline)
    inpainted = edit(pipe, image=Image.fromarray(pixels), mask=Image.fromarray(mask), output_type="pil")
    np.testing.assert_array_equal(np.asarray(inpainted[0])[mask == 0], pixels[mask == 0])
    assert (np.asarray(inpainted[0])[mask > 0] != pixels[mask > 0]).mean() > 0.9


@pytest.mark.parametrize("value, drawn", [(0.49, False), (0.5, True)])
def test_mask_counts_from_one_half_on(value, drawn):
    images = edit(editor(InpaintPipeline), mask=torch.full((1, 1, SIZE, SIZE), value))
    assert torch.equal(images, some_images()) is not drawn


@pytest.mark.parametrize(
    "options, argument",
    [
        ({"resamplings": 0}, "resamplings=0"),
        ({"jump_length": 0}, "jump_length=0"),
        ({"jump_length": 6}, "jump_length=6 must lie between 1 and 5"),
        ({"mask": torch.zeros(3, 1, SIZE, SIZE)}, "mask holds 3 masks for 2 images"),
        ({"mask": torch.zeros(1, 3, SIZE, SIZE)}, "mask"),
    ],
)
def test_inpainting_refuses_what_it_cannot_honour(options, argument):
    with refused(argument):
        edit(editor(InpaintPipeline), **options)


@pytest.mark.parametrize("cls", [InpaintPipeline, InversionPipeline])
@pytest.mark.parametrize("scheduler", [diffusers.DDIMScheduler(clip_sample=False), diffusers.EulerDiscreteScheduler()])
def test_schedulers_without_noise_levels_are_refused(cls, scheduler):
    with refused(f"scheduler={type(scheduler).__name__}"):
        edit(editor(cls, scheduler=scheduler))


# ---------------------------------------------------------------- inversion


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("spacing, first", [("leading", 0), ("trailing", 99)])
def test_inversion_of_a_gaussian_is_a_product_of_known_factors(spacing, first, prediction_type):
    pipe = gaussian_pipe(InversionPipeline, spacing=spacing, prediction_type=prediction_type)
    given = some_images(2, 1)
    x_T = pipe(given, 10)
    levels = ALPHA_BAR[sorted({0, *range(first, 1000, 100)})]
    centred = (2 * given - 1) - levels[0].sqrt() * Gaussian.MEAN
    for s, t in pairwise(levels):
        signal, noise = (s * t).sqrt() * Gaussian.STD**2, ((1 - s) * (1 - t)).sqrt()
        centred = centred * (signal + noise) / (s * Gaussian.STD**2 + 1 - s)
    close(x_T, levels[-1].sqrt() * Gaussian.MEAN + centred, 1e-4)


@pytest.mark.parametrize("label", [None, 0, [2, 1]])
def test_inversion_ends_at_the_noise_of_the_exact_flow(label):
    pipe = gaussian_pipe(InversionPipeline, num_class_embeds=None if label is None else 4)
    given = 0.5 + 0.3 * (some_images(2, 1) - 0.5)
    x_T = pipe(given, class_labels=label)
    mean = Gaussian.MEAN + Gaussian.SHIFT * torch.tensor(label or 0).view(-1, 1, 1, 1)
    std = (ALPHA_BAR[-1] * Gaussian.STD**2 + 1 - ALPHA_BAR[-1]).sqrt()
    expected = ALPHA_BAR[-1].sqrt() * mean + std * (2 * given - 1 - mean) / Gaussian.STD
    close(x_T, expected, 0.03)


def test_error_of_the_round_trip_falls_with_the_steps():
    given, errors = some_images(2, 1), []
    for steps in (50, 200, 1000):
        pipe = gaussian_pipe(InversionPipeline)
        x_T = pipe(given, steps)
        again = DDPMPipeline.from_pipe(pipe)(sample=x_T, num_inference_steps=steps, output_type="pt").images
        errors.append((again - given).square().mean().sqrt().item())
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert errors[2] < 0.005


@pytest.mark.parametrize("options", [{"clip_sample": True}, {"clip_sample": False, "thresholding": True}], ids=str)
def test_what_cannot_be_undone_is_refused(options):
    with refused("clip_sample=True|thresholding=True"):
        edit(editor(InversionPipeline, scheduler=DDIMScheduler(**options)))


# ---------------------------------------------------------------- what all promise


@pytest.mark.parametrize("cls", EDITORS)
def test_self_conditioned_network_sees_zeros_and_then_its_estimates(cls):
    unet, seen = our_unet(self_condition=True), []
    unet.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["self_cond"]), with_kwargs=True)
    assert edit(editor(cls, unet)).isfinite().all()
    assert seen[0].abs().max() == 0 and all(0 < estimate.abs().max() <= 1 for estimate in seen[1:])


@pytest.mark.parametrize("cls", [ImageToImagePipeline, InpaintPipeline])
@pytest.mark.parametrize("scheduler", [DDPMScheduler(), DDIMScheduler()])
def test_image_of_a_list_of_generators_depends_on_its_own_alone(cls, scheduler):
    pipe, given = editor(cls, scheduler=scheduler), some_images(3)
    together = edit(pipe, image=given, generator=[seeded(seed) for seed in (1, 2, 3)])
    alone = edit(pipe, image=given[[2, 0]], generator=[seeded(3), seeded(1)])
    assert_close(alone, together[[2, 0]], **ROUNDING)
    with refused("generator is a list of 1"):
        edit(pipe, image=given, generator=[seeded()])


@pytest.mark.parametrize("cls", EDITORS)
def test_labels_matter_and_are_checked(cls):
    unet = our_unet(num_class_embeds=3)
    unet.class_embedding.weight.data = 2 * torch.randn(4, unet.class_embedding.weight.shape[1], generator=seeded(7))
    pipe = editor(cls, unet)
    assert_close(edit(pipe, class_labels=1), edit(pipe, class_labels=torch.tensor(1)), rtol=0, atol=0)
    assert (edit(pipe, class_labels=1) - edit(pipe, class_labels=2)).abs().max() > 1e-3
    if cls is not InversionPipeline:
        assert (edit(pipe, class_labels=1, guidance_scale=3.0) - edit(pipe, class_labels=1)).abs().max() > 1e-3
    with refused("class_labels"):
        edit(pipe, class_labels=7)


@pytest.mark.parametrize("cls", EDITORS[:3])
def test_output_types_are_those_of_the_plain_pipeline(cls):
    pipe = editor(cls)
    images = edit(pipe)
    assert_close(torch.from_numpy(edit(pipe, output_type="np")), images.permute(0, 2, 3, 1), rtol=0, atol=0)
    assert [(image.size, image.mode) for image in edit(pipe, output_type="pil")] == [((SIZE, SIZE), "RGB")] * len(
        images
    )
    with refused("output_type='jpeg'"):
        edit(pipe, output_type="jpeg")


@pytest.mark.parametrize("cls, count", [*zip(EDITORS, ("6/6", "4/4", "10/10", "5/5"))])
def test_progress_bar_counts_the_steps(cls, count, capsys):
    pipe = editor(cls)
    pipe.set_progress_bar_config(disable=False)
    edit(pipe)
    assert count in capsys.readouterr().err


# ---------------------------------------------------------------- images that are given


def test_images_are_read_from_pil_lists_and_tensors():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    pil = [Image.fromarray(image) for image in pixels]
    expected = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    for images in (pil, expected, list(expected)):
        assert_close(read_images("image", images, (3, 8, 8)), expected, rtol=0, atol=0)
    assert_close(read_images("image", pil[0], (3, 8, 8)), expected[:1], rtol=0, atol=0)


def test_pil_images_are_fitted_to_the_size_and_channels():
    image = Image.new("RGBA", (40, 20), (255, 0, 0, 255))
    assert_close(read_images("image", image, (3, 8, 8)), torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1).expand(1, 3, 8, 8))
    assert read_images("image", image, (1, 6, 9)).shape == (1, 1, 6, 9)


def test_photographs_are_turned_upright(tmp_path):
    exif, image = Image.Exif(), Image.new("L", (8, 8), 0)
    image.paste(255, (0, 0, 8, 4))  # the upper half
    exif[0x0112] = 6  # orientation: to be turned by 90 degrees clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    pixels = read_images("image", Image.open(tmp_path / "turned.png"), (1, 8, 8))[0, 0]
    assert pixels[:, 4:].min() == 1 and pixels[:, :4].max() == 0


@pytest.mark.parametrize(
    "images, complaint",
    [
        ([], "must be a PIL image"),
        (None, "must be a PIL image"),
        (Image.new("RGB", (0, 5)), "must be a PIL image"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.complex64), "must be a PIL image"),
        (torch.tensor(0.0), "entry of shape"),
        ([np.zeros((3, 8, 8))], "must be a PIL image"),
        (torch.zeros(3, 8, 8), "entry of shape"),
        (torch.zeros(2, 3, 8, 9), "entry of shape"),
        (torch.full((1, 3, 8, 8), -0.1), "must lie in"),
        (torch.full((1, 3, 8, 8), 255), "must lie in"),
        (torch.full((1, 3, 8, 8), torch.nan), "must lie in"),
    ],
)
def test_images_of_another_form_are_refused(images, complaint):
    with refused(f"image .*{complaint}|image {complaint}"):
        read_images("image", images, (3, 8, 8))
