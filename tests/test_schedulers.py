"""DDPMScheduler and DDIMScheduler against closed forms, and against diffusers wherever diffusers is right.

`test_schedulers_differences.py` has the places where it is not.
"""

import inspect
import itertools
import json
import math

import diffusers
import pytest
import torch
from conftest import one_sentence
from diffusers.configuration_utils import register_to_config
from torch import Tensor
from torch.testing import assert_close

import ddpm_pipe.schedulers
from ddpm_pipe.noise import BETA_SCHEDULES, add_noise
from ddpm_pipe.prediction import PREDICTIONS, eps_from_x0, velocity
from ddpm_pipe.schedulers import TIMESTEP_SPACINGS, VARIANCE_TYPES, DDIMScheduler, DDPMScheduler, DiffusionScheduler

STOCK_BETAS = ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"]
CLIPS = {
    "no clipping": {"clip_sample": False},
    "clipping": {"clip_sample": True, "clip_sample_range": 0.7},
    "thresholding": {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5},
}
both = pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DDIMScheduler])
every_prediction = pytest.mark.parametrize("prediction_type", PREDICTIONS)


def stock_class(scheduler_class: type) -> type:
    return getattr(diffusers, scheduler_class.__name__)


def stock_in_float64(ours):
    """diffusers' scheduler with our config, its tables replaced by our float64 ones: its formulas without its rounding.

    That our tables are diffusers' is a test of its own below.
    """
    stock = stock_class(type(ours)).from_config(ours.config)
    stock.alphas_cumprod = ours.alpha_bar(torch.arange(len(ours)))
    stock.final_alpha_cumprod = ours.alpha_bar(-1)  # DDIM only
    return stock


def images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def values(scheduler) -> dict:
    """The config without diffusers' note, unsaved and unordered, of which values are defaults."""
    return {key: value for key, value in scheduler.config.items() if key != "_use_default_values"}


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def network_output(variance_type: str, seed: int) -> Tensor:
    """A prediction for two images of three channels, with the variance channels where they are learned."""
    prediction = images(2, 3, 4, 4, seed=seed)
    if variance_type == "learned":  # the variance itself
        return torch.cat([prediction, images(2, 3, 4, 4, seed=seed + 1).exp()], dim=1)
    if variance_type == "learned_range":  # in [-1, 1]
        return torch.cat([prediction, images(2, 3, 4, 4, seed=seed + 1).tanh()], dim=1)
    return prediction


def assert_same_steps(
    ours, stock, variance_type: str = "fixed_small", stride: int = 1, note: object = "", **kwargs
) -> None:
    """Every `stride`-th step from the same x_t with the same noise; the next x_t is diffusers'.

    The last step is compared in x0 alone where diffusers adds noise to the finished image. We take the quantile of
    dynamic thresholding in float32.
    """
    close = {"rtol": 1e-9, "atol": 1e-6 if ours.config.thresholding else 1e-9}
    assert ours.timesteps.tolist() == stock.timesteps.tolist()
    x_t = images(2, 3, 4, 4, seed=100)
    for t in dict.fromkeys([*stock.timesteps.tolist()[::stride], stock.timesteps[-1].item()]):
        output, (g, h) = network_output(variance_type, seed=t), generators(t, t)
        expected = stock.step(output, t, x_t, generator=g, **kwargs)
        actual = ours.step(output, t, x_t, generator=h, **kwargs)

        def message(text: str, t: int = t) -> str:
            return f"{note} t={t} {kwargs}: {text}"

        assert_close(actual.pred_original_sample, expected.pred_original_sample, **close, msg=message)
        if t == 0 or t != stock.timesteps[-1] or variance_type.startswith("fixed_small"):
            assert_close(actual.prev_sample, expected.prev_sample, **close, msg=message)
        x_t = expected.prev_sample


# ---------------------------------------------------------------- the same numbers as diffusers


@both
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("schedule", STOCK_BETAS)
def test_noise_levels_equal_diffusers(scheduler_class, schedule, zero_snr):
    """sigmoid and laplace are in diffusers' DDPM only. 2e-6: it multiplies up a thousand alphas in float32."""
    stock = diffusers.DDPMScheduler(beta_schedule=schedule, rescale_betas_zero_snr=zero_snr)
    ours = scheduler_class(beta_schedule=schedule, rescale_betas_zero_snr=zero_snr)
    for table in ("betas", "alphas", "alphas_cumprod"):
        assert getattr(ours, table).dtype == torch.float32
        tolerance = 3e-4 if zero_snr and table != "alphas_cumprod" else 2e-6  # ratios of rounded alpha_bars
        assert_close(getattr(ours, table), getattr(stock, table), rtol=1e-5, atol=tolerance)
    assert_close(ours.alpha_bar(torch.arange(1000)).float(), ours.alphas_cumprod, rtol=0, atol=0)


@every_prediction
@pytest.mark.parametrize("schedule", STOCK_BETAS)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("count", [10, 7], ids=["dividing", "not dividing"])
def test_ddpm_steps_equal_diffusers(schedule, prediction_type, spacing, count):
    variance_types = [name for name in VARIANCE_TYPES if name != "fixed_large_log"]  # NaN in diffusers
    for variance_type, (clip, clip_config) in itertools.product(variance_types, CLIPS.items()):
        ours = DDPMScheduler(
            num_train_timesteps=100,
            beta_schedule=schedule,
            prediction_type=prediction_type,
            timestep_spacing=spacing,
            variance_type=variance_type,
            **clip_config,
        )
        stock = stock_in_float64(ours)
        ours.set_timesteps(count)
        stock.set_timesteps(count)
        assert_same_steps(ours, stock, variance_type, note=(variance_type, clip))


@every_prediction
@pytest.mark.parametrize("schedule", STOCK_BETAS)
@pytest.mark.parametrize(
    ("spacing", "count", "stride"),
    [("leading", 10, 1), ("leading", 7, 1), ("trailing", 10, 1), ("trailing", 4, 1), ("linspace", 100, 13)],
)
def test_ddim_steps_equal_diffusers(schedule, prediction_type, spacing, count, stride):
    """In the spacings where diffusers' previous timestep, t - T // count, is the next timestep."""
    for clip, clip_config in CLIPS.items():
        ours = DDIMScheduler(
            num_train_timesteps=100,
            beta_schedule=schedule,
            prediction_type=prediction_type,
            timestep_spacing=spacing,
            **clip_config,
        )
        stock = stock_in_float64(ours)
        ours.set_timesteps(count)
        stock.set_timesteps(count)
        for eta, reclip in itertools.product([0.0, 0.5, 1.0], [False, True]):
            assert_same_steps(ours, stock, stride=stride, note=clip, eta=eta, use_clipped_model_output=reclip)


@pytest.mark.parametrize("set_alpha_to_one", [True, False])
@pytest.mark.parametrize("steps_offset", [0, 1])
def test_the_end_of_ddim_equals_diffusers(set_alpha_to_one, steps_offset):
    ours = DDIMScheduler(set_alpha_to_one=set_alpha_to_one, steps_offset=steps_offset)
    stock = stock_in_float64(ours)
    assert ours.final_alpha_cumprod.item() == pytest.approx(
        stock_class(DDIMScheduler)(set_alpha_to_one=set_alpha_to_one).final_alpha_cumprod.item(), abs=1e-7
    )
    ours.set_timesteps(20)
    stock.set_timesteps(20)
    assert_same_steps(ours, stock, eta=0.3)


@both
def test_steps_of_a_zero_terminal_snr_chain_equal_diffusers(scheduler_class):
    ours = scheduler_class(
        rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False
    )
    stock = stock_in_float64(ours)
    ours.set_timesteps(20)
    stock.set_timesteps(20)
    assert ours.alpha_bar(ours.timesteps[0]).item() == 0
    assert_same_steps(ours, stock)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
def test_custom_timesteps_of_ddpm_equal_diffusers(variance_type):
    ours = DDPMScheduler(variance_type=variance_type)
    stock = stock_in_float64(ours)
    ours.set_timesteps(timesteps=[900, 899, 500, 20, 0])
    stock.set_timesteps(timesteps=[900, 899, 500, 20, 0])
    assert_same_steps(ours, stock, variance_type)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_whole_training_chain_of_ddpm_equals_diffusers(prediction_type):
    """No set_timesteps: all 1,000 steps, of which every 37th is looked at."""
    ours = DDPMScheduler(prediction_type=prediction_type)
    assert_same_steps(ours, stock_in_float64(ours), stride=37)


@both
@every_prediction
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_a_whole_trajectory_equals_untouched_diffusers_in_float32(scheduler_class, prediction_type, schedule):
    samples = []
    for cls in (scheduler_class, stock_class(scheduler_class)):
        scheduler = cls(prediction_type=prediction_type, beta_schedule=schedule)
        scheduler.set_timesteps(50)
        x_t, (generator,) = images(2, 3, 4, 4, dtype=torch.float32), generators(0)
        for t in scheduler.timesteps:
            x_t = scheduler.step((0.7 * x_t + 0.3 * torch.sin(t / 100)).tanh(), t, x_t, generator=generator).prev_sample
        samples.append(x_t)
    assert_close(*samples, rtol=0, atol=5e-5)


@both
@pytest.mark.parametrize("method", ["add_noise", "get_velocity"])
@pytest.mark.parametrize("schedule", STOCK_BETAS)
def test_the_forward_process_equals_diffusers(scheduler_class, method, schedule):
    stock = diffusers.DDPMScheduler(beta_schedule=schedule)
    x0, eps = images(6, 3, 4, 4, dtype=torch.float32), images(6, 3, 4, 4, seed=1, dtype=torch.float32)
    t = torch.tensor([0, 1, 250, 500, 998, 999])
    ours = scheduler_class(beta_schedule=schedule)
    assert_close(getattr(ours, method)(x0, eps, t), getattr(stock, method)(x0, eps, t), rtol=0, atol=2e-5)


@both
def test_the_forward_process_is_eq_4_and_velocity_at_each_images_timestep(scheduler_class):
    scheduler, t = scheduler_class(), torch.tensor([3, 700])
    x0, eps = images(2, 3, 4, 4), images(2, 3, 4, 4, seed=1)
    alpha_bar = torch.tensor([scheduler.alpha_bar(3), scheduler.alpha_bar(700)], dtype=torch.float64)
    assert torch.equal(scheduler.add_noise(x0, eps, t), add_noise(x0, eps, alpha_bar))
    assert torch.equal(scheduler.get_velocity(x0, eps, t), velocity(x0, eps, alpha_bar))


# ---------------------------------------------------------------- timesteps


@both
@pytest.mark.parametrize("spacing", ["leading", "linspace"])
@pytest.mark.parametrize("steps", [1000, 37])
def test_timesteps_equal_diffusers_for_every_count(scheduler_class, spacing, steps):
    ours = scheduler_class(num_train_timesteps=steps, timestep_spacing=spacing)
    stock = stock_class(scheduler_class).from_config(ours.config)
    for count in range(1, steps + 1):
        ours.set_timesteps(count)
        stock.set_timesteps(count)
        assert torch.equal(ours.timesteps, stock.timesteps), count


@both
def test_trailing_timesteps_equal_diffusers_where_they_are_whole_numbers(scheduler_class):
    ours = scheduler_class(timestep_spacing="trailing")
    stock = stock_class(scheduler_class)(timestep_spacing="trailing")
    for count in [n for n in range(1, 1001) if 1000 % n == 0]:
        ours.set_timesteps(count)
        stock.set_timesteps(count)
        assert torch.equal(ours.timesteps, stock.timesteps), count


@both
@pytest.mark.parametrize("steps", [1000, 37])
def test_trailing_timesteps_are_exact_for_every_count(scheduler_class, steps):
    """T - i T / count - 1 rounded, which is Table 2 of Lin et al. (2024), here in whole numbers: times 2 count."""
    scheduler = scheduler_class(num_train_timesteps=steps, timestep_spacing="trailing")
    for count in range(1, steps + 1):
        scheduler.set_timesteps(count)
        twice_exact = 2 * (steps * (count - torch.arange(count)) - count)
        assert ((2 * count * scheduler.timesteps - twice_exact).abs() <= count).all(), count
        assert len(scheduler.timesteps) == count


@both
@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
def test_every_count_gives_that_many_falling_timesteps_inside_the_chain(scheduler_class, spacing):
    scheduler = scheduler_class(num_train_timesteps=200, timestep_spacing=spacing)
    for count in range(1, 201):
        scheduler.set_timesteps(count)
        t = scheduler.timesteps
        assert t.shape == (count,) and scheduler.num_inference_steps == count and t.dtype == torch.int64
        assert (t.diff() < 0).all() and t[-1] >= 0 and t[0] < 200, count


@both
@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
def test_the_previous_timestep_is_the_next_one_in_the_list(scheduler_class, spacing):
    scheduler = scheduler_class(timestep_spacing=spacing)
    scheduler.set_timesteps(7)
    expected = [*scheduler.timesteps.tolist()[1:], -1]
    assert scheduler.previous_timestep(scheduler.timesteps).tolist() == expected
    assert [scheduler.previous_timestep(t) for t in scheduler.timesteps.tolist()] == expected


@both
def test_without_set_timesteps_the_chain_is_whole(scheduler_class):
    scheduler = scheduler_class(num_train_timesteps=12)
    assert scheduler.timesteps.tolist() == list(range(11, -1, -1))
    assert scheduler.previous_timestep(torch.arange(12)).tolist() == list(range(-1, 11))


@both
def test_custom_timesteps_replace_the_spacing(scheduler_class):
    scheduler = scheduler_class()
    scheduler.set_timesteps(timesteps=[999, 640, 3])
    assert scheduler.timesteps.tolist() == [999, 640, 3]
    assert scheduler.previous_timestep(torch.tensor([999, 640, 3])).tolist() == [640, 3, -1]
    assert (scheduler.custom_timesteps, scheduler.num_inference_steps) == (True, 3)
    scheduler.set_timesteps(4)
    assert scheduler.custom_timesteps is False


@both
@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ({}, "exactly one of num_inference_steps and timesteps"),
        ({"num_inference_steps": 3, "timesteps": [2, 1, 0]}, "exactly one of num_inference_steps and timesteps"),
        ({"num_inference_steps": 0}, "num_inference_steps=0 must lie between 1 and num_train_timesteps=100"),
        ({"num_inference_steps": 101}, "num_inference_steps=101 must lie between 1 and num_train_timesteps=100"),
        ({"timesteps": []}, "strictly decreasing values from 99 to 0"),
        ({"timesteps": [5, 5, 0]}, "strictly decreasing values from 99 to 0"),
        ({"timesteps": [0, 5]}, "strictly decreasing values from 99 to 0"),
        ({"timesteps": [100, 5]}, "strictly decreasing values from 99 to 0"),
        ({"timesteps": [5, -1]}, "strictly decreasing values from 99 to 0"),
    ],
    ids=str,
)
def test_impossible_timesteps_are_refused(scheduler_class, kwargs, sentence):
    with pytest.raises(ValueError, match=sentence):
        scheduler_class(num_train_timesteps=100).set_timesteps(**kwargs)


@both
def test_an_offset_past_the_end_of_the_chain_is_refused(scheduler_class):
    with pytest.raises(ValueError, match="steps_offset=1 "):
        scheduler_class(num_train_timesteps=100, steps_offset=1).set_timesteps(100)


# ---------------------------------------------------------------- config


@both
def test_constructor_keys_and_defaults_are_those_of_diffusers(scheduler_class):
    def keys(cls):
        return [(p.name, p.default) for p in inspect.signature(cls.__init__).parameters.values()]

    assert keys(scheduler_class) == keys(stock_class(scheduler_class))


@both
def test_the_default_config_is_that_of_diffusers(scheduler_class):
    ours, stock = scheduler_class(), stock_class(scheduler_class)()
    assert values(ours) == values(stock)


@both
def test_no_key_counts_as_left_at_its_default(scheduler_class):
    """diffusers would give such keys the defaults of the scheduler made of our config, and Heun's chain is another."""
    assert list(scheduler_class().config["_use_default_values"]) == []


@both
@pytest.mark.parametrize("method", ["step", "add_noise", "get_velocity", "scale_model_input", "set_timesteps"])
def test_methods_take_the_arguments_of_diffusers_in_its_order(scheduler_class, method):
    ours, stock = (
        list(inspect.signature(getattr(cls, method)).parameters)
        for cls in (scheduler_class, stock_class(scheduler_class))
    )
    assert ours[: len(stock)] == stock


@both
def test_attributes_that_pipelines_read(scheduler_class):
    scheduler, stock = scheduler_class(num_train_timesteps=77), stock_class(scheduler_class)(num_train_timesteps=77)
    for attribute in ("init_noise_sigma", "order", "_compatibles", "num_inference_steps", "config_name"):
        assert getattr(scheduler, attribute) == getattr(stock, attribute)
    assert len(scheduler) == len(stock) == 77
    x = images(1, 3, 4, 4)
    assert scheduler.scale_model_input(x, 5) is x


@both
def test_compatibles_are_itself_and_the_classes_of_diffusers(scheduler_class):
    compatibles = scheduler_class().compatibles
    assert scheduler_class in compatibles
    assert set(stock_class(scheduler_class)().compatibles) <= set(compatibles)


FOLLOWERS = [
    "DDPMScheduler",
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "PNDMScheduler",
]


@both
@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("follower", FOLLOWERS)
def test_diffusers_schedulers_made_from_our_config_have_our_noise_levels(scheduler_class, schedule, follower):
    """Also of schedules that diffusers lacks: those travel as `trained_betas`."""
    ours = scheduler_class(beta_schedule=schedule, num_train_timesteps=500, beta_start=2e-4, beta_end=0.03)
    theirs = getattr(diffusers, follower).from_config(ours.config)
    assert_close(theirs.alphas_cumprod, ours.alphas_cumprod, rtol=1e-4, atol=1e-6)


@both
@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
def test_ours_made_from_a_config_of_diffusers_is_the_same_chain(scheduler_class, name):
    values = {"beta_schedule": "scaled_linear", "num_train_timesteps": 300, "timestep_spacing": "trailing",
              "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "clip_sample": False}  # fmt: skip
    theirs = getattr(diffusers, name)(**values)
    ours = scheduler_class.from_config(theirs.config)
    assert {key: ours.config[key] for key in values} == values
    assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=0, atol=1e-6)


@both
def test_cosine_is_saved_under_the_name_by_which_diffusers_knows_it(scheduler_class):
    config = scheduler_class(beta_schedule="cosine").config
    assert (config.beta_schedule, config.trained_betas) == ("squaredcos_cap_v2", None)
    theirs = diffusers.DDPMScheduler.from_config(config)
    assert_close(theirs.alphas_cumprod, scheduler_class(beta_schedule="cosine").alphas_cumprod, rtol=0, atol=1e-6)


@both
def test_what_was_set_by_hand_survives_the_way_through_diffusers(scheduler_class):
    values = {"beta_schedule": "sigmoid", "prediction_type": "sample", "clip_sample_range": 0.5, "steps_offset": 1}
    theirs = diffusers.DPMSolverMultistepScheduler.from_config(scheduler_class(**values).config)
    again = scheduler_class.from_config(theirs.config)
    assert {key: again.config[key] for key in values} == values
    assert torch.equal(again.alphas_cumprod, scheduler_class(**values).alphas_cumprod)


@both
@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_saving_and_loading_gives_the_same_scheduler(scheduler_class, schedule, zero_snr, tmp_path):
    saved = scheduler_class(
        beta_schedule=schedule, num_train_timesteps=60, timestep_spacing="quadratic", rescale_betas_zero_snr=zero_snr
    )
    saved.save_pretrained(tmp_path)
    loaded = scheduler_class.from_pretrained(tmp_path)
    assert values(loaded) == values(saved)
    assert torch.equal(loaded.alpha_bar(torch.arange(-1, 60)), saved.alpha_bar(torch.arange(-1, 60)))


@both
def test_a_saved_scheduler_is_the_file_of_diffusers_and_loads_there(scheduler_class, tmp_path):
    scheduler_class(beta_schedule="cosine", num_train_timesteps=60).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert config["_class_name"] == scheduler_class.__name__
    loaded = stock_class(scheduler_class).from_pretrained(tmp_path)
    ours = scheduler_class(beta_schedule="cosine", num_train_timesteps=60)
    assert_close(loaded.alphas_cumprod, ours.alphas_cumprod, rtol=1e-5, atol=1e-7)


@both
@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2", "scaled_linear"])
def test_betas_are_written_out_only_where_diffusers_lacks_the_schedule(scheduler_class, beta_schedule):
    assert scheduler_class(beta_schedule=beta_schedule).config.trained_betas is None


@both
@pytest.mark.parametrize(
    ("key", "accepted"),
    [("beta_schedule", BETA_SCHEDULES), ("prediction_type", PREDICTIONS), ("timestep_spacing", TIMESTEP_SPACINGS)],
)
@pytest.mark.parametrize("betas", [None, [0.1] * 1000], ids=["named betas", "trained betas"])
def test_an_unknown_value_is_refused_at_construction(scheduler_class, key, accepted, betas):
    with pytest.raises(ValueError, match=f"{key}='nonsense' is unknown; use one of ") as error:
        scheduler_class(**{key: "nonsense"}, trained_betas=betas)
    assert all(name in str(error.value) for name in accepted)


@both
@pytest.mark.parametrize("betas", [[0.1] * 9, [0.1] * 9 + [0.0], [0.1] * 9 + [1.1], [0.1] * 9 + [math.nan]], ids=str)
def test_impossible_trained_betas_are_refused(scheduler_class, betas):
    with pytest.raises(ValueError, match="trained_betas must hold num_train_timesteps=10 values in"):
        scheduler_class(num_train_timesteps=10, trained_betas=betas)


# ---------------------------------------------------------------- step: shapes, generators, precision

EVERY_STEP = [
    *[(DDPMScheduler, {"variance_type": variance_type}) for variance_type in VARIANCE_TYPES],
    (DDPMScheduler, {"thresholding": True}),
    (DDPMScheduler, {"prediction_type": "v_prediction"}),
    (DDIMScheduler, {}),
    (DDIMScheduler, {"prediction_type": "sample", "timestep_spacing": "trailing"}),
    (DDIMScheduler, {"thresholding": True, "set_alpha_to_one": False}),
]
every_step = pytest.mark.parametrize(
    ("scheduler_class", "config"), EVERY_STEP, ids=[f"{c.__name__[:4]} {v}" for c, v in EVERY_STEP]
)


def noisy(scheduler_class: type) -> dict:
    """Arguments of `step` that make it add noise."""
    return {"eta": 0.5} if scheduler_class is DDIMScheduler else {}


@every_step
def test_one_timestep_per_image_equals_each_image_alone(scheduler_class, config):
    scheduler = scheduler_class(**config)
    scheduler.set_timesteps(7)
    t = scheduler.timesteps[[0, 4, 6]]  # the last of them finishes its image
    x_t, output = images(3, 3, 4, 4), torch.cat([network_output(config.get("variance_type", ""), 5)] * 2)[:3]
    together = scheduler.step(output, t, x_t, generator=generators(1, 2, 3), **noisy(scheduler_class))
    for i, generator in enumerate(generators(1, 2, 3)):
        alone = scheduler.step(output[i : i + 1], t[i], x_t[i : i + 1], generator=generator, **noisy(scheduler_class))
        for field in ("prev_sample", "pred_original_sample"):
            assert_close(together[field][i : i + 1], alone[field], rtol=1e-12, atol=1e-12)


@both
@pytest.mark.parametrize("kind", [int, torch.tensor, lambda t: torch.tensor([t, t])], ids=["int", "0-d", "(B,)"])
def test_a_timestep_is_an_int_or_a_tensor_of_any_integer_type(scheduler_class, kind):
    scheduler = scheduler_class()
    scheduler.set_timesteps(10)
    x_t, output, t = images(2, 3, 4, 4), images(2, 3, 4, 4, seed=1), kind(500)
    expected = scheduler.step(output, 500, x_t, generator=generators(0)[0]).prev_sample
    for timestep in [t] if isinstance(t, int) else [t, t.int()]:
        assert_close(scheduler.step(output, timestep, x_t, generator=generators(0)[0]).prev_sample, expected)


@both
def test_a_list_of_generators_has_one_per_image(scheduler_class):
    """So that an image depends on its own seed alone, whatever it is batched with."""
    scheduler = scheduler_class()
    scheduler.set_timesteps(10)
    x_t, output = images(3, 3, 4, 4), images(3, 3, 4, 4, seed=1)
    kwargs = noisy(scheduler_class)
    forward = scheduler.step(output, 500, x_t, generator=generators(1, 2, 3), **kwargs).prev_sample
    backward = scheduler.step(output.flip(0), 500, x_t.flip(0), generator=generators(3, 2, 1), **kwargs).prev_sample
    assert torch.equal(forward, backward.flip(0))
    same_noise = scheduler.step(output, 500, x_t, generator=generators(1, 1, 1), **kwargs).prev_sample
    assert torch.equal(forward[0], same_noise[0])
    assert not torch.equal(forward[1], same_noise[1])


@both
def test_step_leaves_its_arguments_and_repeats_itself(scheduler_class):
    scheduler = scheduler_class()
    scheduler.set_timesteps(10)
    x_t, output = images(2, 3, 4, 4), images(2, 3, 4, 4, seed=1)
    first, second = (scheduler.step(output, 500, x_t, generator=generators(0)[0])[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(x_t, images(2, 3, 4, 4)) and torch.equal(output, images(2, 3, 4, 4, seed=1))


@both
def test_step_returns_a_tuple_where_asked(scheduler_class):
    scheduler = scheduler_class()
    x_t, output = images(2, 3, 4, 4), images(2, 3, 4, 4, seed=1)
    as_tuple = scheduler.step(output, 9, x_t, generator=generators(0)[0], return_dict=False)
    as_dict = scheduler.step(output, 9, x_t, generator=generators(0)[0])
    assert type(as_tuple) is tuple
    assert torch.equal(as_tuple[0], as_dict.prev_sample) and torch.equal(as_tuple[1], as_dict.pred_original_sample)


@every_prediction
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("t", [torch.tensor(900), torch.tensor([900, 0])], ids=["0-d", "(B,)"])
def test_a_half_precision_step_is_the_float32_step_rounded(prediction_type, dtype, t):
    scheduler = DDIMScheduler(prediction_type=prediction_type)
    scheduler.set_timesteps(10)
    x_t, output = images(2, 3, 4, 4, dtype=dtype), images(2, 3, 4, 4, seed=1, dtype=dtype)
    half, full = scheduler.step(output, t, x_t), scheduler.step(output.float(), t, x_t.float())
    for field in ("prev_sample", "pred_original_sample"):
        assert_close(half[field], full[field].to(dtype), rtol=0, atol=0)


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_step_keeps_the_dtype_of_the_sample(scheduler_class, dtype):
    x_t = images(2, 3, 4, 4, dtype=dtype)
    result = scheduler_class().step(x_t.float(), 500, x_t, **noisy(scheduler_class))
    assert (result.prev_sample.dtype, result.pred_original_sample.dtype) == (dtype, dtype)


def test_ddim_takes_the_noise_itself_or_a_generator_and_not_both():
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(10)
    x_t, output = images(2, 3, 4, 4), images(2, 3, 4, 4, seed=1)
    noise = images(2, 3, 4, 4, seed=7)
    given = scheduler.step(output, 500, x_t, eta=0.5, variance_noise=noise).prev_sample
    assert torch.equal(given, scheduler.step(output, 500, x_t, eta=0.5, generator=generators(7)[0]).prev_sample)
    with pytest.raises(ValueError, match="generator or variance_noise, not both"):
        scheduler.step(output, 500, x_t, eta=0.5, variance_noise=noise, generator=generators(7)[0])


@pytest.mark.parametrize(
    ("variance_type", "channels", "expected"), [("fixed_small", 6, 3), ("learned", 3, 6), ("learned_range", 4, 6)]
)
def test_output_channels_that_do_not_fit_the_variance_are_refused(variance_type, channels, expected):
    scheduler = DDPMScheduler(variance_type=variance_type)
    with pytest.raises(ValueError, match=f"'{variance_type}' needs a network output of {expected} channels"):
        scheduler.step(images(2, channels, 4, 4), 10, images(2, 3, 4, 4))


def test_learned_range_interpolates_between_both_variances_in_the_log_domain():
    """At -1 and 1 it is fixed_small and fixed_large, at 0 their geometric mean (Improved DDPM, eq. 15)."""
    x_t, prediction = images(2, 3, 4, 4), images(2, 3, 4, 4, seed=1)

    def noise_added(variance_type: str, share: float | None = None) -> Tensor:
        scheduler = DDPMScheduler(variance_type=variance_type)
        scheduler.set_timesteps(10)
        output = prediction if share is None else torch.cat([prediction, torch.full_like(prediction, share)], 1)
        samples = [scheduler.step(output, 500, x_t, generator=g).prev_sample for g in generators(0, 1)]
        return samples[0] - samples[1]

    small, large = noise_added("fixed_small"), noise_added("fixed_large")
    assert_close(noise_added("learned_range", -1.0), small)
    assert_close(noise_added("learned_range", 1.0), large)
    assert_close(noise_added("learned_range", 0.0), small.sign() * (small * large).sqrt())


@every_prediction
@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
def test_ddim_at_eta_1_is_ddpm_with_the_posterior_variance(prediction_type, spacing):
    """DDIM, section 4.1: sigma of eta = 1 makes the generative process a DDPM, for any timesteps."""
    config = {"prediction_type": prediction_type, "timestep_spacing": spacing, "clip_sample": False}
    ddpm, ddim = DDPMScheduler(**config), DDIMScheduler(**config)
    ddpm.set_timesteps(7)
    ddim.set_timesteps(7)
    x_t = images(2, 3, 4, 4)
    for t in ddpm.timesteps:
        output, (g, h) = images(2, 3, 4, 4, seed=t.item()), generators(0, 0)
        expected = ddpm.step(output, t, x_t, generator=g).prev_sample
        assert_close(ddim.step(output, t, x_t, eta=1.0, generator=h).prev_sample, expected, rtol=1e-9, atol=1e-9)


@both
@pytest.mark.parametrize("timestep", [-1, 1000, 0.5])
def test_a_number_that_is_no_timestep_is_one_sentence(scheduler_class, timestep):
    x_t = images(1, 3, 4, 4)
    with one_sentence(match=rf"timestep={timestep} must be a whole number from 0 to 999\."):
        scheduler_class().step(x_t, timestep, x_t)


@every_step
def test_a_number_takes_the_step_of_a_tensor(scheduler_class, config):
    scheduler, x_t = scheduler_class(**config), images(2, 3, 4, 4)
    scheduler.set_timesteps(7)
    output = network_output(config.get("variance_type", ""), 0)
    for t in scheduler.timesteps[[0, 3, -1]]:
        g, h = generators(0, 0)
        of_tensor = scheduler.step(output, t, x_t, **noisy(scheduler_class), generator=g)
        of_number = scheduler.step(output, t.item(), x_t, **noisy(scheduler_class), generator=h)
        assert_close(of_number.prev_sample, of_tensor.prev_sample, rtol=1e-12, atol=1e-12)
        assert_close(of_number.pred_original_sample, of_tensor.pred_original_sample, rtol=1e-12, atol=1e-12)


def test_eta_outside_its_range_is_one_sentence():
    x_t = images(1, 3, 4, 4)
    with one_sentence(match=r"eta=1\.5 must lie between 0 \(DDIM\) and 1 \(DDPM\)\."):
        DDIMScheduler().step(x_t, 5, x_t, eta=1.5)


# ---------------------------------------------------------------- no host sync, torch.compile


def step_without_data(scheduler_class, config: dict, per_image: bool) -> Tensor:
    """A step on the meta device, whose tensors have no data: reading any of it on the host raises."""
    scheduler = scheduler_class(**config)
    scheduler.set_timesteps(7, device="meta")
    t = scheduler.timesteps[:2] if per_image else scheduler.timesteps[0]
    x_t = images(2, 3, 4, 4, dtype=torch.float32).to("meta")
    output = network_output(config.get("variance_type", ""), 0).float().to("meta")
    return scheduler.step(output, t, x_t, **noisy(scheduler_class)).prev_sample


@every_step
@pytest.mark.parametrize("per_image", [False, True], ids=["0-d", "(B,)"])
def test_step_never_waits_for_the_device(scheduler_class, config, per_image):
    x_s = step_without_data(scheduler_class, config, per_image)
    assert x_s.is_meta and x_s.shape == (2, 3, 4, 4)


@both
@pytest.mark.parametrize("method", ["add_noise", "get_velocity"])
def test_the_forward_process_never_waits_for_the_device(scheduler_class, method):
    x0 = images(2, 3, 4, 4).to("meta")
    result = getattr(scheduler_class(), method)(x0, x0, torch.tensor([1, 2]).to("meta"))
    assert result.is_meta and result.shape == x0.shape


@both
def test_what_is_asked_on_one_device_is_still_known_on_another(scheduler_class):
    scheduler, t = scheduler_class(), torch.tensor([3, 999])
    before = scheduler.alpha_bar(t), scheduler.previous_timestep(t)
    scheduler.set_timesteps(1000, device="meta")
    assert scheduler.alpha_bar(t.to("meta")).is_meta and scheduler.previous_timestep(t.to("meta")).is_meta
    assert_close((scheduler.alpha_bar(t), scheduler.previous_timestep(t)), before, rtol=0, atol=0)


@both
@pytest.mark.parametrize("reading", ["item", "__bool__", "__int__", "cpu", "tolist", "nonzero"])
def test_the_meta_device_notices_a_wait(scheduler_class, reading, monkeypatch):
    """What the tests above rest on: each way of reading a timestep on the host fails there."""
    alpha_bar = scheduler_class.alpha_bar

    def waiting(self, timestep):
        getattr(timestep, reading)()
        return alpha_bar(self, timestep)

    monkeypatch.setattr(scheduler_class, "alpha_bar", waiting)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        step_without_data(scheduler_class, {}, per_image=False)


@both
@pytest.mark.parametrize("per_image", [False, True], ids=["0-d", "(B,)"])
def test_a_compiled_step_is_the_eager_step(scheduler_class, per_image):
    scheduler = scheduler_class()
    scheduler.set_timesteps(7)
    torch._dynamo.reset()
    compiled = torch.compile(scheduler.step, fullgraph=True, backend="aot_eager")
    x_t, output = images(2, 3, 4, 4, dtype=torch.float32), images(2, 3, 4, 4, seed=1, dtype=torch.float32)
    for i in (0, 3, 6):
        t = scheduler.timesteps[[i, 6]] if per_image else scheduler.timesteps[i]
        results = []
        for step in (scheduler.step, compiled):
            torch.manual_seed(0)
            results.append(step(output, t, x_t, **noisy(scheduler_class)).prev_sample)
        assert_close(*results, rtol=0, atol=1e-6)


# ---------------------------------------------------------------- closed form: Gaussian data
#
# For pixels x0 ~ N(m, s^2) the optimal denoiser is known, E[x0 | x_t] = m + gain (x_t - sqrt(alpha_bar) m), and it is
# affine. Every step is then x_s = A x_t + B + C z, so mean and variance propagate exactly through any sampler.

SAMPLERS = {
    "DDPM fixed_small": (DDPMScheduler, {"variance_type": "fixed_small"}, {}),
    "DDPM fixed_large": (DDPMScheduler, {"variance_type": "fixed_large"}, {}),
    "DDIM eta 0": (DDIMScheduler, {}, {"eta": 0.0}),
    "DDIM eta 0.5": (DDIMScheduler, {}, {"eta": 0.5}),
    "DDIM eta 1": (DDIMScheduler, {}, {"eta": 1.0}),
}
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS)


def optimal_output(prediction_type: str, x_t: Tensor, alpha_bar: Tensor, m: float, s: float) -> Tensor:
    gain = alpha_bar.sqrt() * s**2 / (alpha_bar * s**2 + 1 - alpha_bar)
    x0 = m + gain * (x_t - alpha_bar.sqrt() * m)
    return PREDICTIONS[prediction_type].target(x0, eps_from_x0(x0, x_t, alpha_bar), alpha_bar)


def moments_through_the_sampler(sampler, monkeypatch, m, s, count, mean, variance, **config):
    """Mean and variance of x_s after each step, from the A, B and C of `step` probed with three one-pixel images."""
    scheduler_class, own_config, kwargs = SAMPLERS[sampler]
    scheduler = scheduler_class(clip_sample=False, **own_config, **config)
    scheduler.set_timesteps(count)
    x_t, z = torch.tensor([[0, 1, 0], [0, 0, 1]], dtype=torch.float64).view(2, 3, 1, 1, 1)
    monkeypatch.setattr(ddpm_pipe.schedulers, "draw_noise", lambda *args: z)
    moments = []
    for t in scheduler.timesteps:
        output = optimal_output(scheduler.config.prediction_type, x_t, scheduler.alpha_bar(t), m, s)
        at_0, at_1, with_noise = scheduler.step(output, t, x_t, **kwargs).prev_sample.flatten().tolist()
        mean, variance = (at_1 - at_0) * mean + at_0, (at_1 - at_0) ** 2 * variance + (with_noise - at_0) ** 2
        moments.append((mean, variance))
    levels = scheduler.alpha_bar(torch.cat([scheduler.timesteps, torch.tensor([-1])])).tolist()
    return moments, levels


def expected_variances(sampler: str, levels: list[float], s: float, variance: float) -> list[float]:
    """The recursion by hand. With b = sqrt(1 - alpha_bar) and eps the noise of the optimal x0, DDIM eq. 12 is
    x_s = sqrt(alpha_bar_s) x0 + sqrt(b_s^2 - sigma^2) eps + sigma z; DDPM is its eta = 1, with another factor of z for
    fixed_large.
    """
    variances = []
    for level_t, level_s in itertools.pairwise(levels):
        gain = math.sqrt(level_t) * s**2 / (level_t * s**2 + 1 - level_t)
        gain_eps = (1 - math.sqrt(level_t) * gain) / math.sqrt(1 - level_t)
        beta = 1 - level_t / level_s
        eta = float(sampler.split()[-1]) if "eta" in sampler else 1.0
        sigma2 = eta**2 * (1 - level_s) / (1 - level_t) * beta
        slope = math.sqrt(level_s) * gain + math.sqrt(max(1 - level_s - sigma2, 0)) * gain_eps
        if sampler == "DDPM fixed_large":
            sigma2 = beta if level_s < 1 else 0.0  # the finished image gets no noise
        variance = slope**2 * variance + sigma2
        variances.append(variance)
    return variances


def marginal(level: float, m: float, s: float) -> tuple[float, float]:
    """Mean and variance of q(x_t)."""
    return math.sqrt(level) * m, level * s**2 + 1 - level


@every_sampler
@every_prediction
@pytest.mark.parametrize(("m", "s"), [(0.3, 0.0), (-0.4, 0.5), (0.2, 1.0)])
@pytest.mark.parametrize(
    ("spacing", "count"), [("leading", 10), ("trailing", 7), ("linspace", 13), ("quadratic", 20)], ids=str
)
def test_mean_and_variance_propagate_exactly(sampler, prediction_type, m, s, spacing, count, monkeypatch):
    """From the exact q(x_T): the mean is that of q(x_s) at every step, the variance that of the recursion by hand."""
    scheduler = DDPMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(count)
    mean, variance = marginal(scheduler.alpha_bar(scheduler.timesteps[0]).item(), m, s)
    moments, levels = moments_through_the_sampler(
        sampler, monkeypatch, m, s, count, mean, variance, timestep_spacing=spacing, prediction_type=prediction_type
    )
    assert_close([mean for mean, _ in moments], [marginal(level, m, s)[0] for level in levels[1:]], rtol=0, atol=1e-9)
    expected = expected_variances(sampler, levels, s, variance)
    assert_close([variance for _, variance in moments], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "DDPM fixed_large"])
@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
def test_data_of_a_single_image_is_sampled_exactly_at_every_step(sampler, spacing, monkeypatch):
    """With s = 0 x0 is known, so each kernel is the true posterior and x_s ~ q(x_s) exactly, in however few steps."""
    scheduler = DDPMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(7)
    start = marginal(scheduler.alpha_bar(scheduler.timesteps[0]).item(), 0.3, 0.0)
    moments, levels = moments_through_the_sampler(sampler, monkeypatch, 0.3, 0.0, 7, *start, timestep_spacing=spacing)
    assert_close(moments, [marginal(level, 0.3, 0.0) for level in levels[1:]], rtol=0, atol=1e-9)


def test_ddim_of_unit_variance_data_turns_by_the_angle_between_noise_levels(monkeypatch):
    """With alpha_bar = cos^2 phi and s = 1, one step of eta 0 multiplies the deviation by cos(phi_t - phi_s)."""
    moments, levels = moments_through_the_sampler("DDIM eta 0", monkeypatch, 0.2, 1.0, 10, 0.0, 1.0)
    angles = [math.acos(math.sqrt(level)) for level in levels]
    cosines = itertools.accumulate((math.cos(t - s) for t, s in itertools.pairwise(angles)), lambda a, b: a * b)
    assert_close([math.sqrt(variance) for _, variance in moments], list(cosines), rtol=0, atol=1e-9)


@every_sampler
@pytest.mark.parametrize(("m", "s"), [(0.3, 0.05), (-0.4, 0.5), (0.2, 1.0)])
def test_the_full_chain_from_pure_noise_gives_back_the_data(sampler, m, s, monkeypatch):
    """1,000 steps from N(0, 1), to 0.01: the noise of the first timestep, and what is left of m at the last."""
    moments, _ = moments_through_the_sampler(sampler, monkeypatch, m, s, 1000, 0.0, 1.0)
    mean, variance = moments[-1]
    assert mean == pytest.approx(m, abs=0.01)
    assert math.sqrt(variance) == pytest.approx(s, abs=0.01)


def test_a_large_batch_has_the_moments_of_the_recursion():
    """The same without the probes: 40,000 one-pixel images through the real generator."""
    m, s, scheduler = -0.4, 0.5, DDPMScheduler(clip_sample=False)
    scheduler.set_timesteps(20)
    (generator,) = generators(0)
    x_t = torch.randn(40_000, 1, 1, 1, generator=generator, dtype=torch.float64)
    for t in scheduler.timesteps:
        output = optimal_output("epsilon", x_t, scheduler.alpha_bar(t), m, s)
        x_t = scheduler.step(output, t, x_t, generator=generator).prev_sample
    levels = scheduler.alpha_bar(torch.cat([scheduler.timesteps, torch.tensor([-1])])).tolist()
    deviation = math.sqrt(expected_variances("DDPM fixed_small", levels, s, 1.0)[-1])
    assert x_t.mean().item() == pytest.approx(m, abs=0.01)
    assert x_t.std().item() == pytest.approx(deviation, rel=0.015)


# ---------------------------------------------------------------- a sampler of one's own


class HalfwayScheduler(DiffusionScheduler):
    """Each step goes to the mean of x_t and x0."""

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 20,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "cosine",
        trained_betas: list[float] | None = None,
        prediction_type: str = "sample",
        timestep_spacing: str = "trailing",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
    ):
        self.build()

    def step(self, model_output: Tensor, timestep: int, sample: Tensor, return_dict: bool = True):
        return ((sample + model_output) / 2,)


def test_a_subclass_of_the_base_with_a_step_is_a_sampler():
    scheduler = HalfwayScheduler()
    scheduler.set_timesteps(4)
    x, x0 = images(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    assert scheduler.timesteps.tolist() == [19, 14, 9, 4]
    for t in scheduler.timesteps.tolist():
        (x,) = scheduler.step(x0, t, x)
    assert_close(x, images(2, 3, 4, 4) / 16)
    assert_close(scheduler.alphas_cumprod, DDPMScheduler(20, beta_schedule="cosine").alphas_cumprod)
    assert DDIMScheduler.from_config(scheduler.config).config.prediction_type == "sample"
