"""The pipeline: closed form, then diffusers' pipelines as reference, then each argument by itself."""

import copy
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from conftest import one_sentence
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch.testing import assert_close

import ddpm_pipe
from ddpm_pipe import DDIMScheduler, DDPMPipeline, DDPMScheduler, DDPMUNet2DModel

SIZE = 8
ROUNDING = {"rtol": 0, "atol": 1e-4}  # of images in [0, 1]: what float32 in another order may change over some steps

STOCK_SCHEDULERS = [
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
]
OURS = {"DDPM": DDPMScheduler, "DDIM": DDIMScheduler}
STOCK = {"DDPM": diffusers.DDPMScheduler, "DDIM": diffusers.DDIMScheduler}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def our_unet(**options) -> DDPMUNet2DModel:
    torch.manual_seed(0)
    small = {"block_out_channels": (8, 16), "norm_num_groups": 4, "num_attention_heads": 2, "attention_head_dim": 4}
    return DDPMUNet2DModel(**{"sample_size": SIZE, **small, **options}).eval()


def stock_unet(**options) -> diffusers.UNet2DModel:
    torch.manual_seed(0)
    small = {
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return diffusers.UNet2DModel(**{"sample_size": SIZE, **small, **options}).eval()


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def refused(argument: str):
    """Expect a ValueError of one line, ended by a full stop, that names the argument."""
    return pytest.raises(ValueError, match=rf"\A[^\n]*{argument}[^\n]*\.\Z")


def our_pipe(unet=None, scheduler=None) -> DDPMPipeline:
    return quiet(DDPMPipeline(our_unet() if unet is None else unet, scheduler or DDPMScheduler()))


def sample(pipe, seed: int = 0, steps: int = 4, **options) -> torch.Tensor:
    """Images (B, C, H, W) of one seeded call."""
    options = {"batch_size": 2, "generator": seeded(seed), "output_type": "pt", **options}
    return pipe(num_inference_steps=steps, **options).images


def final_sample(pipe, **options) -> torch.Tensor:
    """x_0 as the loop leaves it, before it is clipped to the range of images."""
    last = {}
    sample(pipe, callback_on_step_end=lambda pipe, i, t, tensors: last.update(tensors), **options)
    return last["sample"]


# ---------------------------------------------------------------- closed form: x0 ~ N(MEAN, STD^2) in every pixel

MEAN, STD = 0.3, 0.5
ALPHA_BAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)


class GaussianDenoiser(ModelMixin, ConfigMixin):
    """What a network learns in the limit from images whose pixels are independent draws of N(MEAN, STD^2)."""

    @register_to_config
    def __init__(self, sample_size: int = 16, in_channels: int = 3, prediction_type: str = "epsilon"):
        super().__init__()
        self.register_buffer("sigma", (1 / ALPHA_BAR - 1).sqrt().float())

    def forward(self, sample, timestep):
        below = timestep.long()  # Euler and its kin ask at fractions of a timestep, and interpolate sigma
        sigma = torch.lerp(self.sigma[below], self.sigma[(below + 1).clamp(max=999)], timestep.float() - below)
        alpha_bar = 1 / (1 + sigma**2)
        signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        surprise = (sample - signal * MEAN) / (alpha_bar * STD**2 + 1 - alpha_bar)
        x0, eps = MEAN + signal * STD**2 * surprise, noise * surprise
        outputs = {"epsilon": eps, "sample": x0, "v_prediction": signal * eps - noise * x0}
        return UNet2DOutput(sample=outputs[self.config.prediction_type])


def gaussian_pipe(scheduler: str, prediction_type: str = "epsilon", **config) -> DDPMPipeline:
    ours = OURS.get(scheduler, DDPMScheduler)(clip_sample=False, prediction_type=prediction_type, **config)
    unet = GaussianDenoiser(prediction_type=prediction_type)
    return our_pipe(unet, ours if scheduler in OURS else getattr(diffusers, scheduler).from_config(ours.config))


@pytest.mark.parametrize(
    "scheduler, config, options",
    [
        ("DDPM", {}, {"steps": 1000}),
        ("DDPM", {"variance_type": "fixed_large"}, {"steps": 1000}),
        ("DDPM", {"prediction_type": "v_prediction"}, {"steps": 1000}),
        ("DDPM", {"prediction_type": "sample"}, {"steps": 1000}),
        ("DDIM", {}, {"steps": 500}),
        ("DDIM", {}, {"steps": 1000, "eta": 1.0}),
        ("DPMSolverMultistepScheduler", {}, {"steps": 50}),
        ("EulerDiscreteScheduler", {}, {"steps": 500}),
        ("EulerAncestralDiscreteScheduler", {}, {"steps": 1000}),
    ],
    ids=str,
)
def test_optimal_network_gives_the_distribution_it_was_made_for(scheduler, config, options):
    x0 = final_sample(gaussian_pipe(scheduler, **config), batch_size=64, **options)
    count = x0.numel()  # 49152 independent pixels; 4 standard errors, and 1 % for the discretisation of the chain
    assert abs(x0.mean().item() - MEAN) < 4 * STD / count**0.5
    assert abs(x0.std().item() / STD - 1) < 4 / (2 * count) ** 0.5 + 0.01


@pytest.mark.parametrize(
    "scheduler, steps",
    [
        ("DDIM", 500),
        ("DDIMScheduler", 500),
        ("DEISMultistepScheduler", 100),
        ("DPMSolverMultistepScheduler", 100),
        ("DPMSolverSinglestepScheduler", 200),
        ("EulerDiscreteScheduler", 500),
        ("HeunDiscreteScheduler", 100),
        ("KDPM2DiscreteScheduler", 100),
        ("PNDMScheduler", 100),
        ("UniPCMultistepScheduler", 100),
    ],
)
def test_deterministic_samplers_follow_the_exact_flow_from_noise_to_image(scheduler, steps):
    """The ODE keeps (x_t - mean_t) / std_t of a Gaussian, so that each pixel's end is known from its beginning."""
    alpha_bar = ALPHA_BAR[-1].item()
    x_T = torch.randn(2, 3, 16, 16, generator=seeded())
    expected = MEAN + STD * (x_T - alpha_bar**0.5 * MEAN) / (alpha_bar * STD**2 + 1 - alpha_bar) ** 0.5
    assert_close(
        final_sample(gaussian_pipe(scheduler, timestep_spacing="trailing"), steps=steps), expected, rtol=0, atol=0.03
    )


def test_parallel_scheduler_takes_a_learned_variance():
    own = DDPMScheduler(variance_type="learned_range")
    unet = our_unet(out_channels=6)
    parallel = diffusers.DDPMParallelScheduler.from_config(own.config)
    stock = diffusers.DDPMScheduler.from_config(own.config)
    images = [sample(our_pipe(unet, scheduler), steps=10) for scheduler in (parallel, stock)]
    assert_close(*images, rtol=0, atol=1e-6)


# ---------------------------------------------------------------- diffusers as reference


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"variance_type": "fixed_large", "beta_schedule": "squaredcos_cap_v2"},
        {"prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    ],
    ids=str,
)
def test_stock_network_gives_the_images_of_the_stock_ddpm_pipeline(config):
    stock = quiet(diffusers.DDPMPipeline(stock_unet(), diffusers.DDPMScheduler(**config)))
    ours = our_pipe(stock.unet, DDPMScheduler(**config))
    assert_close(sample(ours, steps=10), sample(stock, steps=10), **ROUNDING)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_stock_network_gives_the_images_of_the_stock_ddim_pipeline(eta):
    stock = quiet(diffusers.DDIMPipeline(stock_unet(), diffusers.DDIMScheduler()))
    ours = our_pipe(stock.unet, DDIMScheduler())
    options = {"steps": 10, "eta": eta, "use_clipped_model_output": False}
    assert_close(sample(ours, **options), sample(stock, **options), **ROUNDING)


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("pipeline", [diffusers.DDPMPipeline, diffusers.DDIMPipeline])
def test_our_schedulers_inside_the_stock_pipelines_give_the_stock_images(pipeline, kind):
    unet = stock_unet()
    ours, stock = (quiet(pipeline(unet, schedulers[kind]())) for schedulers in (OURS, STOCK))
    assert_close(sample(ours, steps=10), sample(stock, steps=10), **ROUNDING)


@pytest.mark.parametrize("name", STOCK_SCHEDULERS)
@pytest.mark.parametrize(
    "config",
    [{}, {"beta_start": 1e-3, "beta_end": 0.01}, {"beta_schedule": "cosine"}, {"beta_schedule": "sigmoid_alpha_bar"}],
    ids=str,
)
def test_stock_scheduler_from_our_config_has_our_noise_levels(name, config):
    ours = DDPMScheduler(**config)
    stock = getattr(diffusers, name).from_config(ours.config)
    assert_close(stock.alphas_cumprod, ours.alphas_cumprod, rtol=1e-4, atol=1e-6)


NETWORKS = {
    "plain": ({}, {}),
    "self-conditioned": ({"self_condition": True}, {}),
    "learned variance": ({"out_channels": 6}, {"variance_type": "learned_range"}),
    "grey learned variance": ({"in_channels": 1, "out_channels": 2}, {"variance_type": "learned_range"}),
    "v learned variance": ({"out_channels": 6}, {"variance_type": "learned_range", "prediction_type": "v_prediction"}),
    "not square": ({"sample_size": (6, 9)}, {}),
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", STOCK_SCHEDULERS)
def test_stock_scheduler_from_our_config_samples(name, network):
    unet_config, scheduler_config = NETWORKS[network]
    pipe = our_pipe(our_unet(**unet_config), DDPMScheduler(**scheduler_config))
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    images = sample(pipe, steps=6)
    size = unet_config.get("sample_size", (SIZE, SIZE))
    assert images.shape == (2, unet_config.get("in_channels", 3), *size)
    assert images.isfinite().all() and images.std() > 0.01


# ---------------------------------------------------------------- generators


@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler, diffusers.EulerAncestralDiscreteScheduler])
def test_image_of_a_list_of_generators_depends_on_its_own_alone(scheduler):
    pipe = our_pipe(scheduler=scheduler.from_config(DDPMScheduler().config))
    options = {"eta": 1.0} if scheduler is DDIMScheduler else {}

    def images(*seeds: int) -> torch.Tensor:
        return sample(pipe, generator=[seeded(seed) for seed in seeds], batch_size=len(seeds), **options)

    together = images(1, 2, 3)
    assert (together[0] - together[1]).abs().max() > 0.05
    assert_close(images(3, 1), together[[2, 0]], **ROUNDING)
    assert_close(images(2), together[1:2], **ROUNDING)


def test_the_same_generator_gives_the_same_images():
    pipe = our_pipe()
    assert_close(sample(pipe, seed=1), sample(pipe, seed=1), rtol=0, atol=0)
    assert (sample(pipe, seed=1) - sample(pipe, seed=2)).abs().max() > 0.05


@pytest.mark.parametrize("scheduler", [DDIMScheduler, diffusers.EulerDiscreteScheduler])
def test_given_noise_of_unit_variance_takes_the_place_of_the_draw(scheduler):
    pipe = our_pipe(scheduler=scheduler.from_config(DDPMScheduler().config))
    noise = torch.randn(2, 3, SIZE, SIZE, generator=seeded(1))
    images = sample(pipe, batch_size=None, sample=noise, seed=2)
    assert_close(images, sample(pipe, seed=1), rtol=0, atol=0)


# ---------------------------------------------------------------- classes and guidance

LABELS = torch.tensor([0, 2])
NULL = torch.tensor([3, 3])


@torch.no_grad()
def sample_by_hand(pipe: DDPMPipeline, denoise, steps: int = 4) -> torch.Tensor:
    """Algorithm 2 with `denoise(x_t, t)` as the network."""
    generator = seeded()
    of_ddim = {"use_clipped_model_output": True} if isinstance(pipe.scheduler, DDIMScheduler) else {}
    x = torch.randn(2, 3, SIZE, SIZE, generator=generator)
    pipe.scheduler.set_timesteps(steps)
    for t in pipe.scheduler.timesteps:
        x = pipe.scheduler.step(denoise(x, t), t, x, generator=generator, **of_ddim).prev_sample
    return (x / 2 + 0.5).clamp(0, 1)


CLASS_NETWORKS = {"ours": lambda: our_unet(num_class_embeds=3), "stock": lambda: stock_unet(num_class_embeds=4)}


@pytest.fixture(params=CLASS_NETWORKS)
def class_pipe(request) -> DDPMPipeline:
    """Three classes, the null class being the fourth embedding."""
    pipe = our_pipe(CLASS_NETWORKS[request.param](), DDIMScheduler())
    embeddings = pipe.unet.class_embedding.weight
    embeddings.data = 2 * torch.randn(embeddings.shape, generator=seeded(7))  # classes that matter
    return pipe


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_guidance_moves_away_from_the_unconditional_prediction(class_pipe, scale):
    def guided(x, t):
        conditional, unconditional = (class_pipe.unet(x, t, class_labels=labels).sample for labels in (LABELS, NULL))
        return unconditional + scale * (conditional - unconditional)

    expected = sample_by_hand(class_pipe, guided)
    images = sample(class_pipe, class_labels=LABELS, guidance_scale=scale)
    assert_close(images, expected, **ROUNDING)
    assert (sample(class_pipe, class_labels=LABELS) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("labels", [LABELS, None], ids=["classes", "no class"])
def test_a_guide_takes_the_place_of_the_null_class(class_pipe, labels):
    """Where every class of the guide is the null class of the network, its guidance is that of Ho & Salimans."""
    pipe = DDPMPipeline.from_pipe(class_pipe)
    pipe.guide = copy.deepcopy(pipe.unet)
    rows = pipe.guide.class_embedding.weight
    rows.data = rows.data[3].expand_as(rows).clone()
    expected = sample(class_pipe, class_labels=labels, guidance_scale=1.0 if labels is None else 3.0)
    assert_close(sample(pipe, class_labels=labels, guidance_scale=3.0), expected, **ROUNDING)


@pytest.mark.parametrize("unet", [our_unet, stock_unet])
def test_a_network_without_classes_is_guided_by_a_weaker_one(unet):
    pipe = our_pipe(unet(), DDIMScheduler())
    pipe.guide = copy.deepcopy(pipe.unet)
    for parameter in pipe.guide.parameters():
        parameter.data *= 0.9

    def guided(x, t):
        output, weaker = (network(x, t).sample for network in (pipe.unet, pipe.guide))
        return weaker + 2.0 * (output - weaker)

    expected = sample_by_hand(pipe, guided)
    assert_close(sample(pipe, guidance_scale=2.0), expected, **ROUNDING)
    assert (sample(pipe) - expected).abs().max() > 1e-3
    assert_close(sample(DDPMPipeline.from_pipe(pipe), guidance_scale=2.0), expected, **ROUNDING)


@pytest.mark.parametrize(
    ("guide", "told"),
    [
        (lambda: our_unet(sample_size=4, num_class_embeds=3), "sample_size=4"),
        (our_unet, "num_class_embeds=None"),
        (lambda: our_unet(num_class_embeds=3, self_condition=True), "self_condition=True"),
        (lambda: stock_unet(num_class_embeds=3), "whose null class"),
    ],
)
def test_a_guide_for_other_images_is_one_sentence(guide, told):
    pipe = our_pipe(our_unet(num_class_embeds=3))
    pipe.guide = guide()
    with one_sentence("guide", told):
        sample(pipe, class_labels=LABELS, guidance_scale=2.0)


@pytest.mark.parametrize("ddim", [DDIMScheduler, diffusers.DDIMScheduler])
def test_noise_of_ddim_is_that_of_the_clipped_image_unless_told_otherwise(ddim):
    pipe = our_pipe(scheduler=ddim(prediction_type="v_prediction"))
    assert_close(sample(pipe), sample(pipe, use_clipped_model_output=True), rtol=0, atol=0)
    assert (sample(pipe) - sample(pipe, use_clipped_model_output=False)).abs().max() > 1e-3


def test_guidance_of_one_is_the_conditional_network(class_pipe):
    expected = sample_by_hand(class_pipe, lambda x, t: class_pipe.unet(x, t, class_labels=LABELS).sample)
    assert_close(sample(class_pipe, class_labels=LABELS, guidance_scale=1.0), expected, **ROUNDING)


@pytest.mark.parametrize("options", [{}, {"class_labels": 3}, {"class_labels": LABELS, "guidance_scale": 0.0}], ids=str)
def test_no_class_the_null_class_and_no_guidance_are_the_same(class_pipe, options):
    expected = sample_by_hand(class_pipe, lambda x, t: class_pipe.unet(x, t, class_labels=NULL).sample)
    assert_close(sample(class_pipe, **options), expected, **ROUNDING)


@pytest.mark.parametrize("labels", [1, [1, 1], torch.tensor(1), torch.tensor([1, 1])], ids=repr)
def test_one_class_for_all_or_one_per_image(class_pipe, labels):
    assert_close(sample(class_pipe, class_labels=labels), sample(class_pipe, class_labels=[1, 1]), rtol=0, atol=0)
    assert (sample(class_pipe, class_labels=labels) - sample(class_pipe, class_labels=2)).abs().max() > 1e-3


def test_variance_channels_are_not_guided():
    unet = our_unet(num_class_embeds=3, out_channels=6)
    unet.class_embedding.weight.data *= 2
    pipe = our_pipe(unet, DDPMScheduler(variance_type="learned_range"))

    def guided(x, t):
        conditional, unconditional = (unet(x, t, class_labels=labels).sample for labels in (LABELS, NULL))
        prediction = unconditional[:, :3] + 3 * (conditional[:, :3] - unconditional[:, :3])
        return torch.cat([prediction, conditional[:, 3:]], dim=1)

    expected = sample_by_hand(pipe, guided)
    assert_close(sample(pipe, class_labels=LABELS, guidance_scale=3.0), expected, **ROUNDING)


# ---------------------------------------------------------------- self-conditioning


class Recorder(ModelMixin, ConfigMixin):
    """Writes down what it is given, and predicts a little noise."""

    @register_to_config
    def __init__(self, sample_size: int = SIZE, in_channels: int = 3, self_condition: bool = True):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.3))
        self.calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def forward(self, sample, timestep, self_cond):
        self.calls.append((sample, timestep, self_cond))
        return UNet2DOutput(sample=self.weight * sample + 0.1 * self_cond)


@pytest.mark.parametrize(
    "scheduler",
    [
        "DDPM",
        "DDIM",
        "DPMSolverMultistepScheduler",
        "EulerDiscreteScheduler",
        "PNDMScheduler",
        "UniPCMultistepScheduler",
    ],
)
def test_network_sees_zeros_and_then_its_last_estimate_of_the_image(scheduler):
    cls = OURS.get(scheduler) or getattr(diffusers, scheduler)
    pipe = our_pipe(Recorder(), cls.from_config(DDPMScheduler(timestep_spacing="trailing").config))
    sample(pipe, steps=5)
    estimate = torch.zeros(2, 3, SIZE, SIZE)
    for x_t, t, self_cond in pipe.unet.calls:
        assert_close(self_cond, estimate, rtol=0, atol=2e-4)
        alpha_bar = ALPHA_BAR[t.long()].float()
        eps = 0.3 * x_t + 0.1 * self_cond
        estimate = ((x_t - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()).clamp(-1, 1)
    assert len(pipe.unet.calls) >= 5


def test_guided_network_sees_one_estimate_for_both_halves():
    unet = our_unet(num_class_embeds=3, self_condition=True)
    seen = []
    unet.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["self_cond"]), with_kwargs=True)
    sample(our_pipe(unet), class_labels=LABELS, guidance_scale=2.0)
    assert [len(self_cond) for self_cond in seen] == [4] * 4
    assert all(torch.equal(self_cond[:2], self_cond[2:]) for self_cond in seen)
    assert seen[-1].abs().max() > 0


# ---------------------------------------------------------------- the callback


def test_callback_sees_every_step_and_its_tensors():
    pipe, seen = our_pipe(), []

    def callback(caller, i, t, tensors):
        assert caller is pipe
        seen.append((i, int(t), tensors))

    names = ("sample", "pred_original_sample")
    images = sample(pipe, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
    assert [(i, t) for i, t, _ in seen] == [(0, 750), (1, 500), (2, 250), (3, 0)]
    assert all(set(tensors) == set(names) for _, _, tensors in seen)
    assert_close((seen[-1][2]["sample"] / 2 + 0.5).clamp(0, 1), images, rtol=0, atol=0)


@pytest.mark.parametrize("value, pixel", [(-1.0, 0.0), (0.0, 0.5), (0.5, 0.75), (7.0, 1.0), (-7.0, 0.0)])
def test_callback_may_replace_the_sample_and_images_are_clipped(value, pixel):
    def replace(pipe, i, t, tensors):
        return {"sample": torch.full_like(tensors["sample"], value)} if i == 3 else None

    images = sample(our_pipe(), callback_on_step_end=replace)
    assert_close(images, torch.full((2, 3, SIZE, SIZE), pixel), rtol=0, atol=0)


def test_callback_may_replace_the_estimate_that_the_network_sees_next():
    pipe = our_pipe(Recorder())

    def replace(pipe, i, t, tensors):
        return {"pred_original_sample": torch.full_like(tensors["sample"], 0.1 * (i + 1))}

    sample(pipe, callback_on_step_end=replace)
    seen = torch.stack([self_cond.mean() for _, _, self_cond in pipe.unet.calls])
    assert_close(seen, torch.tensor([0.0, 0.1, 0.2, 0.3]), rtol=0, atol=1e-6)


# ---------------------------------------------------------------- what comes out


@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB")])
def test_output_types_are_one_image_in_three_forms(channels, mode):
    pipe = our_pipe(our_unet(in_channels=channels, out_channels=channels, sample_size=(6, 9)))
    pt, array, pil = (sample(pipe, output_type=kind) for kind in ("pt", "np", "pil"))
    assert pt.shape == (2, channels, 6, 9) and array.shape == (2, 6, 9, channels)
    assert array.min() >= 0 and array.max() <= 1
    assert_close(torch.from_numpy(array), pt.permute(0, 2, 3, 1), rtol=0, atol=0)
    assert [image.mode for image in pil] == [mode] * 2
    pixels = np.stack([np.asarray(image).reshape(6, 9, channels) for image in pil])
    np.testing.assert_array_equal(pixels, (array * 255).round().astype(np.uint8))


def test_images_are_returned_as_an_object_or_a_tuple():
    pipe = our_pipe()
    images = sample(pipe)
    output = pipe(2, seeded(), 4, output_type="pt", return_dict=False)
    assert isinstance(output, tuple) and len(output) == 1
    assert_close(output[0], images, rtol=0, atol=0)


def test_defaults_are_one_pil_image_by_the_whole_chain():
    pipe, steps = our_pipe(scheduler=DDPMScheduler(num_train_timesteps=7)), []
    images = pipe(callback_on_step_end=lambda pipe, i, t, tensors: steps.append(int(t))).images
    assert steps == [6, 5, 4, 3, 2, 1, 0]
    assert [(image.size, image.mode) for image in images] == [((SIZE, SIZE), "RGB")]


@pytest.mark.parametrize("disable", [True, False])
def test_progress_bar_can_be_disabled(disable, capsys):
    pipe = our_pipe()
    pipe.set_progress_bar_config(disable=disable)
    sample(pipe)
    assert ("4/4" in capsys.readouterr().err) is not disable


@pytest.mark.parametrize("make, options", [(our_unet, {}), (our_unet, {"self_condition": True}), (stock_unet, {})])
def test_half_precision_network_gives_nearly_the_same_images(make, options):
    expected = sample(our_pipe(make(**options)))
    images = sample(our_pipe(make(**options).to(torch.bfloat16)))
    assert images.dtype == torch.float32 and images.isfinite().all()
    assert (images - expected).abs().mean() < 0.02


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "options, argument",
    [
        ({"generator": [seeded(), seeded(), seeded()]}, "list of 3.*batch_size=2"),
        ({"generator": [seeded()]}, "list of 1.*batch_size=2"),
        ({"steps": 1001}, "num_inference_steps=1001.*1000"),
        ({"steps": 0}, "num_inference_steps=0"),
        ({"steps": -1}, "num_inference_steps=-1"),
        ({"eta": 0.5}, "eta=0.5.*DDPMScheduler"),
        ({"class_labels": 0}, "class_labels"),
        ({"guidance_scale": 2.0}, "guidance_scale"),
        ({"output_type": "jpeg"}, "output_type='jpeg'.*pil, np, pt"),
        ({"sample": torch.zeros(3, 3, SIZE, SIZE)}, "sample has the shape"),
        ({"batch_size": None, "sample": torch.zeros(2, 1, SIZE, SIZE)}, "sample has the shape"),
        ({"sample": torch.full((2, 3, SIZE, SIZE), float("nan"))}, "sample must be finite"),
        ({"sample": torch.zeros(2, 3, SIZE, SIZE, dtype=torch.long)}, "sample must be finite floating-point"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 2.0}, "batch_size=2.0"),
        ({"generator": [seeded(), None]}, "generator=.*must be a torch.Generator or a list"),
        ({"generator": (seeded(), seeded())}, "generator=.*must be a torch.Generator or a list"),
        ({"generator": 7}, "generator=7"),
        ({"steps": 2.5}, "num_inference_steps=2.5"),
        ({"eta": float("nan")}, "eta=nan"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale=inf"),
        ({"batch_size": True}, "batch_size=True"),
        ({"eta": None}, "eta=None"),
        ({"guidance_scale": "2"}, "guidance_scale='2'"),
        ({"sample": [0.5]}, "sample must be a tensor"),
        ({"timesteps": [999, 0]}, "timesteps and num_inference_steps"),
        ({"callback_on_step_end_tensor_inputs": ("latents",)}, "'latents'.*sample, pred_original_sample"),
    ],
)
def test_argument_that_cannot_be_honoured_is_one_sentence_naming_it(options, argument):
    with refused(argument):
        sample(our_pipe(scheduler=diffusers.DDPMScheduler()), **options)


@pytest.mark.parametrize(
    "labels",
    [
        4,
        -1,
        [0, 4],
        [0, 1, 2],
        [0],
        0.5,
        [0.0, 1.0],
        [True, False],
        "1",
        ["a", "b"],
        [[0], [1]],
        [None, 1],
        10**30,
        {},
        [],
    ],
    ids=str,
)
def test_labels_out_of_range_or_of_the_wrong_number_are_refused(class_pipe, labels):
    with refused("class_labels"):
        sample(class_pipe, class_labels=labels)


@pytest.mark.parametrize("output_type", ["pil", "np"])
def test_images_that_are_not_finite_are_refused_and_not_black(output_type):
    unet = our_unet()
    unet.conv_out.bias.data[0] = float("nan")
    with refused("images are not finite"):
        sample(our_pipe(unet), output_type=output_type)


def test_network_of_unknown_image_size_is_refused():
    with refused("sample_size"):
        sample(our_pipe(our_unet(sample_size=None)))


# ---------------------------------------------------------------- saving and loading


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("schedulers", [OURS, STOCK], ids=["our scheduler", "stock scheduler"])
@pytest.mark.parametrize("unet", [our_unet, stock_unet])
def test_loaded_pipeline_gives_the_same_images(tmp_path, unet, schedulers, kind):
    pipe = our_pipe(unet(), schedulers[kind](prediction_type="v_prediction"))
    pipe.save_pretrained(tmp_path)
    loaded = quiet(DDPMPipeline.from_pretrained(tmp_path))
    assert type(loaded.unet) is type(pipe.unet) and type(loaded.scheduler) is OURS[kind]
    assert_close(sample(loaded), sample(pipe), rtol=0, atol=0 if schedulers is OURS else 1e-4)


@pytest.mark.parametrize("load", [diffusers.DiffusionPipeline, diffusers.DDPMPipeline])
def test_stock_pipelines_load_an_all_stock_folder(tmp_path, load):
    pipe = our_pipe(stock_unet(), diffusers.DDPMScheduler())
    pipe.save_pretrained(tmp_path)
    loaded = quiet(load.from_pretrained(tmp_path))
    assert type(loaded) is diffusers.DDPMPipeline
    assert_close(sample(loaded), sample(pipe), rtol=0, atol=1e-6)


def test_a_new_process_loads_a_folder_with_the_pipeline_alone(tmp_path):
    """The classes that model_index.json names are found although only the pipeline was imported."""
    pipe = our_pipe()
    pipe.save_pretrained(tmp_path / "folder")
    code = f"""
import numpy, torch
from ddpm_pipe import DDPMPipeline
pipe = DDPMPipeline.from_pretrained({str(tmp_path / "folder")!r})
images = pipe(2, torch.Generator().manual_seed(0), 4, output_type="np").images
numpy.save({str(tmp_path / "images.npy")!r}, images)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=Path(ddpm_pipe.__file__).parents[1])
    np.testing.assert_allclose(np.load(tmp_path / "images.npy"), sample(pipe, output_type="np"), atol=1e-6)
