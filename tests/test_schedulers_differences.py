"""Where our schedulers differ from diffusers' on purpose: one test per difference.

Each asserts what diffusers does today, so that it fails when that is fixed upstream, and that ours is right.
"""

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ddpm_pipe.noise import make_betas
from ddpm_pipe.schedulers import DDIMScheduler, DDPMScheduler

OURS = {"DDPMScheduler": DDPMScheduler, "DDIMScheduler": DDIMScheduler}
both = pytest.mark.parametrize("name", OURS)
half_precision = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)

ALPHA_BAR = torch.cumprod(1 - make_betas("linear", 1000), 0)
X_T, OUTPUT = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def pair(name: str, **config) -> tuple:
    """Ours and diffusers' scheduler of that name and config."""
    return OURS[name](**config), getattr(diffusers, name)(**config)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- timesteps


def ddim_step(t: int, s: int) -> Tensor:
    """DDIM eq. 12 with eta = 0 for noise prediction, from t to s; s < 0 is the clean image."""
    level_t, level_s = ALPHA_BAR[t], ALPHA_BAR[s] if s >= 0 else torch.tensor(1.0)
    x0 = (X_T - (1 - level_t).sqrt() * OUTPUT) / level_t.sqrt()
    return level_s.sqrt() * x0 + (1 - level_s).sqrt() * OUTPUT


@pytest.mark.parametrize(
    ("spacing", "count"), [("linspace", 10), ("linspace", 50), ("trailing", 7), ("trailing", 300)], ids=str
)
def test_a_ddim_step_ends_where_the_next_one_starts(spacing, count):
    """diffusers goes to t - T // count, whatever timestep comes next."""
    ours, stock = pair("DDIMScheduler", timestep_spacing=spacing, clip_sample=False)
    ours.set_timesteps(count)
    stock.set_timesteps(count)
    timesteps = ours.timesteps.tolist()
    assert stock.timesteps.tolist() == timesteps

    wrong = []
    for t, s in zip(timesteps, [*timesteps[1:], -1]):
        assert_close(ours.step(OUTPUT, t, X_T).prev_sample, ddim_step(t, s), rtol=1e-9, atol=1e-9)
        assert_close(stock.step(OUTPUT, t, X_T).prev_sample, ddim_step(t, t - 1000 // count), rtol=1e-4, atol=1e-4)
        wrong.append(t - 1000 // count != s)
    assert any(wrong)


def test_ddim_with_trailing_timesteps_ends_at_the_clean_image():
    """diffusers stops at the noise level of t = 142 - 1000 // 7 = 0."""
    ours, stock = pair("DDIMScheduler", timestep_spacing="trailing", clip_sample=False)
    ours.set_timesteps(7)
    stock.set_timesteps(7)
    last = ours.timesteps[-1].item()
    assert last == 142
    final = ours.step(OUTPUT, last, X_T)
    assert_close(final.prev_sample, final.pred_original_sample, rtol=0, atol=1e-12)
    unfinished = stock.step(OUTPUT, last, X_T)
    assert (unfinished.prev_sample - unfinished.pred_original_sample).abs().max() > 0.005


@both
@pytest.mark.parametrize(("steps", "count"), [(1000, 61), (1000, 103), (100, 29), (50, 31)])
def test_trailing_timesteps_are_as_many_as_asked_for(name, steps, count):
    """diffusers' np.arange with a float step runs past its end by rounding, to a timestep -1."""
    ours, stock = pair(name, num_train_timesteps=steps, timestep_spacing="trailing")
    ours.set_timesteps(count)
    stock.set_timesteps(count)
    assert (len(stock.timesteps), stock.timesteps[-1].item()) == (count + 1, -1)
    assert len(ours.timesteps) == count
    assert ours.timesteps.tolist() == stock.timesteps.tolist()[:-1]


@both
def test_quadratic_spacing_exists_here_only(name):
    ours, stock = pair(name, timestep_spacing="quadratic")
    with pytest.raises(ValueError, match="quadratic is not supported"):
        stock.set_timesteps(10)
    ours.set_timesteps(10)
    assert ours.timesteps.tolist() == [800, 632, 483, 355, 246, 158, 88, 39, 9, 0]


@pytest.mark.parametrize("steps", [1000, 100])
def test_quadratic_timesteps_are_those_of_the_ddim_paper_made_distinct(steps):
    """int(linspace(0, sqrt(0.8 T), count)^2); where these coincide, near 0, one more than the timestep before."""
    scheduler = DDIMScheduler(num_train_timesteps=steps, timestep_spacing="quadratic")
    for count in range(2, steps + 1):
        scheduler.set_timesteps(count)
        chosen = scheduler.timesteps.flip(0).numpy()
        paper = (np.linspace(0, np.sqrt(steps * 0.8), count) ** 2).astype(int)
        assert len(chosen) == count and (np.diff(chosen) > 0).all() and chosen[-1] < steps
        expected = [paper[0]]
        for square in paper[1:]:
            expected.append(max(square, expected[-1] + 1))
        assert chosen.tolist() == expected


def test_ddim_takes_custom_timesteps():
    ours, stock = pair("DDIMScheduler")
    with pytest.raises(TypeError, match="timesteps"):
        stock.set_timesteps(timesteps=[900, 100, 0])
    ours.set_timesteps(timesteps=[900, 100, 0])
    assert ours.timesteps.tolist() == [900, 100, 0]


# ---------------------------------------------------------------- variance


def test_fixed_large_log_is_fixed_large():
    """diffusers takes the square root of the logarithm of beta."""
    ours, stock = pair("DDPMScheduler", variance_type="fixed_large_log")
    large = DDPMScheduler(variance_type="fixed_large")
    assert stock.step(OUTPUT, 500, X_T, generator=seeded()).prev_sample.isnan().all()
    actual, expected = (scheduler.step(OUTPUT, 500, X_T, generator=seeded()).prev_sample for scheduler in (ours, large))
    assert torch.equal(actual, expected)


def test_a_negative_learned_variance_is_no_noise():
    """diffusers takes its square root."""
    ours, stock = pair("DDPMScheduler", variance_type="learned")
    output = torch.cat([OUTPUT, torch.full_like(OUTPUT, -0.1)], dim=1)
    assert stock.step(output, 500, X_T, generator=seeded()).prev_sample.isnan().all()
    first, second = (ours.step(output, 500, X_T, generator=seeded(seed)).prev_sample for seed in (0, 1))
    assert first.isfinite().all()
    assert_close(first, second, rtol=0, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_ignores_the_channels_of_a_learned_variance(eta):
    """So that a network trained with learned variance can be sampled in few steps; diffusers fails on the shapes."""
    ours, stock = pair("DDIMScheduler")
    ours.set_timesteps(10)
    stock.set_timesteps(10)
    output = torch.cat([OUTPUT, torch.ones_like(OUTPUT)], dim=1)
    with pytest.raises(RuntimeError, match="size of tensor"):
        stock.step(output, 500, X_T, eta=eta)
    actual = ours.step(output, 500, X_T, eta=eta, generator=seeded()).prev_sample
    assert torch.equal(actual, ours.step(OUTPUT, 500, X_T, eta=eta, generator=seeded()).prev_sample)


@pytest.mark.parametrize("variance_type", ["fixed_large", "learned", "learned_range"])
@pytest.mark.parametrize("spacing", [{"timestep_spacing": "trailing"}, {"steps_offset": 1}], ids=str)
def test_the_finished_image_gets_no_noise(variance_type, spacing):
    """diffusers leaves it out at t = 0 only, and trailing timesteps end before."""
    ours, stock = pair("DDPMScheduler", variance_type=variance_type, **spacing)
    ours.set_timesteps(10)
    stock.set_timesteps(10)
    last = ours.timesteps[-1].item()
    assert last > 0
    output = OUTPUT if variance_type == "fixed_large" else torch.cat([OUTPUT, torch.full_like(OUTPUT, 0.5)], dim=1)

    noisy = [stock.step(output, last, X_T, generator=seeded(seed)).prev_sample for seed in (0, 1)]
    assert (noisy[0] - noisy[1]).abs().max() > 1e-5
    finished = [ours.step(output, last, X_T, generator=seeded(seed)) for seed in (0, 1)]
    assert torch.equal(finished[0].prev_sample, finished[1].prev_sample)
    assert_close(finished[0].prev_sample, finished[0].pred_original_sample, rtol=0, atol=1e-12)


# ---------------------------------------------------------------- refusals


def test_an_unknown_variance_type_is_refused():
    """diffusers accepts it and samples as with fixed_small."""
    stock, small = (diffusers.DDPMScheduler(variance_type=name) for name in ("fixed_smal", "fixed_small"))
    accepted, expected = (
        scheduler.step(OUTPUT, 500, X_T, generator=seeded()).prev_sample for scheduler in (stock, small)
    )
    assert torch.equal(accepted, expected)
    with pytest.raises(
        ValueError, match="variance_type='fixed_smal' is unknown; use one of fixed_small, fixed_small_log"
    ):
        DDPMScheduler(variance_type="fixed_smal")


@both
@pytest.mark.parametrize("key", ["prediction_type", "timestep_spacing"])
def test_an_unknown_value_is_refused_at_construction(name, key):
    """diffusers finds out in the first step of sampling, hours of training later."""
    getattr(diffusers, name)(**{key: "nonsense"})
    with pytest.raises(ValueError, match=f"{key}='nonsense' is unknown"):
        OURS[name](**{key: "nonsense"})


@both
def test_trained_betas_of_another_length_are_refused(name):
    """diffusers builds a chain of 10 noise levels that says it has 1,000."""
    stock = getattr(diffusers, name)(trained_betas=[0.1] * 10)
    assert (len(stock), len(stock.alphas_cumprod)) == (1000, 10)
    with pytest.raises(ValueError, match="trained_betas must hold num_train_timesteps=1000 values"):
        OURS[name](trained_betas=[0.1] * 10)


@pytest.mark.parametrize("schedule", ["cosine", "linear_rescaled", "sigmoid_alpha_bar"])
@both
def test_schedules_that_exist_here_only(name, schedule):
    with pytest.raises(NotImplementedError, match=schedule):
        getattr(diffusers, name)(beta_schedule=schedule)
    assert torch.equal(OURS[name](beta_schedule=schedule).betas, make_betas(schedule, 1000).float())


@pytest.mark.parametrize("schedule", ["sigmoid", "laplace"])
def test_ddim_knows_the_schedules_of_ddpm(schedule):
    with pytest.raises(NotImplementedError, match=schedule):
        diffusers.DDIMScheduler(beta_schedule=schedule)
    assert torch.equal(DDIMScheduler(beta_schedule=schedule).betas, DDPMScheduler(beta_schedule=schedule).betas)


# ---------------------------------------------------------------- precision and devices


@both
@half_precision
def test_half_precision_keeps_the_noise_of_the_first_timestep(name, dtype):
    """diffusers rounds alpha_bar = 0.9999 to 1 before it subtracts it from 1."""
    ours, stock = pair(name)
    x0, eps, t = X_T.to(dtype), OUTPUT.to(dtype), torch.tensor([0, 0])
    assert torch.equal(stock.add_noise(x0, eps, t), x0)
    exact = ALPHA_BAR[0].sqrt() * x0.double() + (1 - ALPHA_BAR[0]).sqrt() * eps.double()
    assert_close(ours.add_noise(x0, eps, t), exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=0)


@both
@half_precision
def test_half_precision_keeps_the_image_in_the_velocity_of_the_first_timestep(name, dtype):
    ours, stock = pair(name)
    x0, eps, t = X_T.to(dtype), OUTPUT.to(dtype), torch.tensor([0, 0])
    assert torch.equal(stock.get_velocity(x0, eps, t), eps)
    exact = ALPHA_BAR[0].sqrt() * eps.double() - (1 - ALPHA_BAR[0]).sqrt() * x0.double()
    assert_close(ours.get_velocity(x0, eps, t), exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-7)


@both
def test_step_does_not_wait_for_the_device(name):
    """A meta tensor has no data to read on the host; diffusers compares and searches timesteps there."""
    ours, stock = pair(name)
    for scheduler in (ours, stock):
        scheduler.set_timesteps(10, device="meta")
    output, x_t = OUTPUT.to("meta"), X_T.to("meta")
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        stock.step(output, stock.timesteps[0], x_t)
    assert ours.step(output, ours.timesteps[0], x_t).prev_sample.is_meta


@both
def test_step_takes_one_timestep_per_image(name):
    ours, stock = pair(name)
    for scheduler in (ours, stock):
        scheduler.set_timesteps(10)
    t = torch.tensor([500, 100])
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        stock.step(OUTPUT, t, X_T)
    assert ours.step(OUTPUT, t, X_T).prev_sample.shape == X_T.shape
