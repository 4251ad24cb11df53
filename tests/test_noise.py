"""The forward process against closed forms, and the beta schedules against independently written ones."""

import math
import re

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr as stock_rescale
from diffusers.training_utils import compute_snr
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from ddpm_pipe.noise import (
    BETA_SCHEDULES,
    add_noise,
    broadcast,
    make_betas,
    posterior,
    posterior_coefficients,
    rescale_zero_terminal_snr,
    snr,
)

EXACT = {"rtol": 1e-12, "atol": 1e-12}
every_schedule = pytest.mark.parametrize("schedule", BETA_SCHEDULES)
half_precision = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
one_level_or_per_image = pytest.mark.parametrize("batch", [(), (2,)], ids=["one level", "one per image"])


def alpha_bars(schedule: str, steps: int = 1000) -> torch.Tensor:
    return torch.cumprod(1 - make_betas(schedule, steps), 0)


def images(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# ---------------------------------------------------------------- eq. 4


@every_schedule
def test_a_thousand_one_step_kernels_compose_to_eq_4(schedule):
    """q(x_t | x_{t-1}) takes N(m, v) to N(sqrt(1 - beta) m, (1 - beta) v + beta), so mean and variance propagate."""
    mean, variance, means, variances = 1.0, 0.0, [], []
    for beta in make_betas(schedule, 1000).tolist():
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        means.append(mean)
        variances.append(variance)

    alpha_bar = alpha_bars(schedule)
    one, zero = torch.ones(1000, 1, dtype=torch.float64), torch.zeros(1000, 1, dtype=torch.float64)
    assert_close(add_noise(one, zero, alpha_bar).flatten().tolist(), means, rtol=1e-11, atol=0)
    assert_close(add_noise(zero, one, alpha_bar).flatten().square().tolist(), variances, rtol=1e-10, atol=1e-14)


def test_unit_variance_is_preserved():
    x_t = add_noise(images(4000, 5, 5), images(4000, 5, 5, seed=1), torch.tensor(0.3))
    assert x_t.var().item() == pytest.approx(1, abs=0.01)
    assert x_t.mean().item() == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("shape", [(3, 7), (3, 1, 4, 5), (3, 2, 2, 4, 4)], ids=str)
def test_one_noise_level_per_image_equals_each_image_alone(shape):
    x0, eps, alpha_bar = images(*shape), images(*shape, seed=1), torch.tensor([0.9, 0.5, 1e-4], dtype=torch.float64)
    together = add_noise(x0, eps, alpha_bar)
    alone = [add_noise(x0[i : i + 1], eps[i : i + 1], alpha_bar[i]) for i in range(3)]
    assert torch.equal(together, torch.cat(alone))


# ---------------------------------------------------------------- precision


@half_precision
@one_level_or_per_image
@pytest.mark.parametrize("t", [0, 1, 10, 500, 999])
def test_half_precision_is_the_float32_result_rounded(dtype, batch, t):
    x0, eps = images(2, 3, 4, 4, dtype=dtype), images(2, 3, 4, 4, dtype=dtype, seed=1)
    alpha_bar = alpha_bars("linear")[t].expand(batch)
    in_float32 = add_noise(x0.float(), eps.float(), alpha_bar)
    assert_close(add_noise(x0, eps, alpha_bar), in_float32.to(dtype), rtol=0, atol=0)


@half_precision
@one_level_or_per_image
def test_half_precision_keeps_the_noise_of_the_first_timestep(dtype, batch):
    """beta_0 = 1e-4, so its noise is 0.01 eps; 1 - alpha_bar rounded to half precision would be 0."""
    eps = images(2, 3, 4, 4, dtype=dtype)
    x_t = add_noise(torch.zeros_like(eps), eps, alpha_bars("linear")[0].expand(batch))
    assert_close(x_t.float(), 0.01 * eps.float(), rtol=0.01, atol=1e-6)


@one_level_or_per_image
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_noisy_images_have_the_dtype_of_the_images(dtype, batch):
    x0 = images(2, 3, 4, 4, dtype=dtype)
    assert add_noise(x0, x0, torch.full(batch, 0.5, dtype=torch.float64)).dtype == dtype


@every_schedule
def test_tables_are_float64_and_fall_strictly(schedule):
    betas = make_betas(schedule, 1000)
    assert betas.dtype == torch.float64
    assert betas.shape == (1000,)
    assert (alpha_bars(schedule).diff() < 0).all()


def test_float64_images_get_float64_coefficients():
    coefficient = torch.tensor(1 / 3, dtype=torch.float64)
    assert broadcast(coefficient, images(1, 1)).item() == coefficient.item()
    assert broadcast(coefficient.view(1), images(1, 1)).item() == coefficient.item()


# ---------------------------------------------------------------- eq. 6 and 7


def bayes(x0: float, x_t: float, alpha_bar_t: float, alpha_bar_s: float) -> tuple[float, float]:
    """q(x_s | x_t, x0) as the normalised product of q(x_s | x0) and q(x_t | x_s), two Gaussians in x_s."""
    alpha = alpha_bar_t / alpha_bar_s  # the kernel q(x_t | x_s) = N(sqrt(alpha) x_s, 1 - alpha)
    precision_prior, precision_kernel = 1 / (1 - alpha_bar_s), alpha / (1 - alpha)
    variance = 1 / (precision_prior + precision_kernel)
    return variance * (
        precision_prior * math.sqrt(alpha_bar_s) * x0 + precision_kernel * x_t / math.sqrt(alpha)
    ), variance


@settings(deadline=None, derandomize=True, database=None)
@given(
    schedule=st.sampled_from(list(BETA_SCHEDULES)),
    pair=st.sets(st.integers(0, 998), min_size=2, max_size=2).map(sorted),
    x0=st.floats(-1, 1),
    x_t=st.floats(-4, 4),
)
def test_posterior_is_bayes_rule_for_any_earlier_step(schedule, pair, x0, x_t):
    s, t = pair
    alpha_bar = alpha_bars(schedule)
    mean, variance = posterior(*torch.tensor([[x0], [x_t]], dtype=torch.float64), alpha_bar[t], alpha_bar[s])
    expected_mean, expected_variance = bayes(x0, x_t, alpha_bar[t].item(), alpha_bar[s].item())
    assert mean.item() == pytest.approx(expected_mean, rel=1e-8, abs=1e-9)
    assert variance.item() == pytest.approx(expected_variance, rel=1e-8)


def test_posterior_density_is_the_product_of_densities():
    """The same by brute force: multiply both densities on a fine grid of x_s and take the moments."""
    alpha_bar_t, alpha_bar_s, x0, x_t = 0.3, 0.7, 0.4, -0.9
    alpha = alpha_bar_t / alpha_bar_s
    x_s = np.linspace(-8, 8, 200_001)
    density = np.exp(
        -((x_s - math.sqrt(alpha_bar_s) * x0) ** 2) / (2 * (1 - alpha_bar_s))
        - (x_t - math.sqrt(alpha) * x_s) ** 2 / (2 * (1 - alpha))
    )
    density /= density.sum()
    expected_mean = (density * x_s).sum()
    expected_variance = (density * (x_s - expected_mean) ** 2).sum()

    levels = torch.tensor([alpha_bar_t, alpha_bar_s], dtype=torch.float64)
    mean, variance = posterior(*torch.tensor([[x0], [x_t]], dtype=torch.float64), *levels)
    assert mean.item() == pytest.approx(expected_mean, abs=1e-10)
    assert variance.item() == pytest.approx(expected_variance, abs=1e-10)


@every_schedule
@pytest.mark.parametrize("stride", [1, 7, 250])
def test_averaging_the_posterior_over_x_t_gives_back_eq_4(schedule, stride):
    alpha_bar = alpha_bars(schedule)
    alpha_bar_t, alpha_bar_s = alpha_bar[stride:], alpha_bar[:-stride]
    of_x0, of_x_t, variance = posterior_coefficients(alpha_bar_t, alpha_bar_s)
    assert_close(of_x0 + of_x_t * alpha_bar_t.sqrt(), alpha_bar_s.sqrt(), **EXACT)
    assert_close(of_x_t**2 * (1 - alpha_bar_t) + variance, 1 - alpha_bar_s, **EXACT)


def test_posterior_of_the_clean_image_is_the_clean_image():
    x0, x_t = images(2, 3, 4, 4), images(2, 3, 4, 4, seed=1)
    mean, variance = posterior(x0, x_t, alpha_bars("linear")[[0, 40]], torch.ones(2, dtype=torch.float64))
    assert_close(mean, x0, **EXACT)
    assert torch.equal(variance, torch.zeros(2, dtype=torch.float64))


def test_snr_is_the_power_of_signal_over_noise():
    alpha_bar = alpha_bars("linear")
    one, zero = torch.ones(1000, 1, dtype=torch.float64), torch.zeros(1000, 1, dtype=torch.float64)
    power = add_noise(one, zero, alpha_bar).square() / add_noise(zero, one, alpha_bar).square()
    assert_close(snr(alpha_bar), power.flatten(), **EXACT)


def test_snr_equals_diffusers():
    stock = diffusers.DDPMScheduler()
    assert_close(snr(alpha_bars("linear")).float(), compute_snr(stock, torch.arange(1000)), rtol=1e-3, atol=0)


# ---------------------------------------------------------------- schedules


def betas_of(alpha_bar, steps: int) -> list[float]:
    return [min(1 - alpha_bar((i + 1) / steps) / alpha_bar(i / steps), 0.999) for i in range(steps)]


def logistic(u: float) -> float:
    return 1 / (1 + math.exp(-u))


def cosine(steps: int) -> list[float]:
    return betas_of(lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2, steps)


def laplace(steps: int) -> list[float]:
    """alpha_bar = sqrt of the logistic of a Laplace quantile of scale 1/2, its tails cut by 1e-6."""

    def log_snr(u: float) -> float:
        return (-0.5 if u <= 0.5 else 0.5) * math.log(2 * min(u, 1 - u) + 1e-6)

    return betas_of(lambda u: math.sqrt(logistic(log_snr(u))), steps)


INDEPENDENT = {
    "linear": lambda T: [1e-4 + (0.02 - 1e-4) * i / (T - 1) for i in range(T)],
    "linear_rescaled": lambda T: [(1e-4 + (0.02 - 1e-4) * i / (T - 1)) * 1000 / T for i in range(T)],
    "scaled_linear": lambda T: [(0.01 + (math.sqrt(0.02) - 0.01) * i / (T - 1)) ** 2 for i in range(T)],
    "squaredcos_cap_v2": cosine,
    "cosine": cosine,
    "sigmoid": lambda T: [1e-4 + (0.02 - 1e-4) * logistic(-6 + 12 * i / (T - 1)) for i in range(T)],
    "sigmoid_alpha_bar": lambda T: betas_of(lambda u: logistic(3) - logistic(6 * u - 3), T),
    "laplace": laplace,
}


def test_every_schedule_has_an_independent_formula_here():
    assert set(INDEPENDENT) == set(BETA_SCHEDULES)


@every_schedule
@pytest.mark.parametrize("steps", [50, 1000, 4000])
def test_schedule_equals_an_independent_formula(schedule, steps):
    assert_close(make_betas(schedule, steps).tolist(), INDEPENDENT[schedule](steps), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"])
@pytest.mark.parametrize("beta_range", [(1e-4, 0.02), (0.00085, 0.012)], ids=str)
def test_schedule_equals_diffusers(schedule, beta_range):
    start, end = beta_range
    stock = diffusers.DDPMScheduler(beta_schedule=schedule, beta_start=start, beta_end=end)
    assert_close(make_betas(schedule, 1000, start, end).float(), stock.betas, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_ends_of_the_range_are_the_first_and_last_beta(schedule):
    betas = make_betas(schedule, 30, beta_start=0.003, beta_end=0.4)
    assert betas[[0, -1]].tolist() == pytest.approx([0.003, 0.4], rel=1e-12)


@pytest.mark.parametrize("steps", [100, 250, 4000])
def test_linear_rescaled_destroys_the_image_equally_at_any_length(steps):
    """log alpha_bar_T = sum of log(1 - beta), about -1000 (beta_start + beta_end) / 2 = -10.05 at first order."""
    plain, rescaled = alpha_bars("linear", steps)[-1].log(), alpha_bars("linear_rescaled", steps)[-1].log()
    assert rescaled.item() == pytest.approx(-10.05, rel=0.08)
    assert plain.item() == pytest.approx(-10.05 * steps / 1000, rel=0.02)


def test_linear_rescaled_is_linear_at_1000_steps():
    assert torch.equal(make_betas("linear_rescaled", 1000), make_betas("linear", 1000))


@pytest.mark.parametrize("schedule", ["linear_rescaled", "cosine", "sigmoid_alpha_bar", "laplace"])
def test_betas_are_capped_at_0_999(schedule):
    assert make_betas(schedule, 10).max().item() <= 0.999


@pytest.mark.parametrize("schedule", ["linear_rescaled", "cosine", "sigmoid_alpha_bar"])
def test_the_cap_is_reached_where_the_formula_passes_it(schedule):
    assert make_betas(schedule, 10)[-1].item() == 0.999


# ---------------------------------------------------------------- zero terminal SNR


@every_schedule
def test_zero_terminal_snr_leaves_exactly_nothing_of_the_image(schedule):
    betas = rescale_zero_terminal_snr(make_betas(schedule, 1000))
    assert betas[-1].item() == 1
    assert torch.cumprod(1 - betas, 0)[-1].item() == 0


@every_schedule
def test_zero_terminal_snr_moves_sqrt_alpha_bar_affinely_and_keeps_the_first(schedule):
    root = alpha_bars(schedule).sqrt()
    rescaled = torch.cumprod(1 - rescale_zero_terminal_snr(make_betas(schedule, 1000)), 0).sqrt()
    assert_close(rescaled, root[0] * (root - root[-1]) / (root[0] - root[-1]), rtol=1e-9, atol=1e-12)
    assert rescaled[0].item() == pytest.approx(root[0].item(), rel=1e-14)


@every_schedule
def test_zero_terminal_snr_equals_diffusers(schedule):
    betas = make_betas(schedule, 1000)
    assert_close(rescale_zero_terminal_snr(betas), stock_rescale(betas), rtol=1e-9, atol=1e-12)


def test_zero_terminal_snr_computes_in_float64_and_leaves_its_argument():
    betas = make_betas("linear", 1000).float()
    before = betas.clone()
    assert rescale_zero_terminal_snr(betas).dtype == torch.float64
    assert torch.equal(betas, before)


# ---------------------------------------------------------------- refusals


def refusal(*args, **kwargs) -> str:
    with pytest.raises(ValueError) as error:
        make_betas(*args, **kwargs)
    message = str(error.value)
    assert "\n" not in message and not re.search(r"[.!?]\s", message), f"more than one sentence: {message}"
    return message


def test_an_unknown_schedule_is_refused_naming_the_known_ones():
    message = refusal("cosin", 1000)
    assert "beta_schedule='cosin'" in message
    assert all(name in message for name in BETA_SCHEDULES)


@pytest.mark.parametrize("steps", [0, -5])
@every_schedule
def test_a_chain_without_steps_is_refused(schedule, steps):
    assert f"num_train_timesteps={steps} must be at least 1" in refusal(schedule, steps)


@pytest.mark.parametrize("schedule", ["linear", "linear_rescaled", "scaled_linear", "sigmoid"])
@pytest.mark.parametrize(
    ("start", "end"), [(-1e-4, 0.02), (1e-4, -0.02), (0.0, 0.0), (math.nan, 0.02), (1e-4, math.inf)], ids=str
)
def test_a_range_outside_0_to_1_is_refused_naming_it(schedule, start, end):
    message = refusal(schedule, 1000, beta_start=start, beta_end=end)
    assert f"beta_start={start}, beta_end={end}" in message
    assert "(0, 1)" in message


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_a_beta_of_1_is_refused(schedule):
    assert "outside (0, 1)" in refusal(schedule, 10, beta_end=1.0)
