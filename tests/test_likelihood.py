"""The variational bound: its Gaussians against torch.distributions and scipy, its sum against closed forms."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.polynomial.hermite_e import hermegauss
from scipy import stats
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from ddpm_pipe.likelihood import (
    bits,
    discretized_gaussian_log_likelihood,
    normal_kl,
    prior_term,
    variational_bound,
    vlb_term,
)
from ddpm_pipe.prediction import PREDICTIONS
from ddpm_pipe.schedulers import DDPMScheduler

reliable = settings(deadline=None, derandomize=True, database=None)
every_prediction = pytest.mark.parametrize("prediction_type", PREDICTIONS)
every_variance = pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned", "learned_range"])
EXACT = {"rtol": 1e-9, "atol": 1e-9}
PIXELS = torch.arange(256, dtype=torch.float64) * 2 / 255 - 1  # all 8-bit values
STEPS = 8
BETAS = torch.linspace(0.05, 0.6, STEPS, dtype=torch.float64)
ALPHA_BAR = torch.cumprod(1 - BETAS, 0)  # entry t is alpha_bar_t, t >= 0


def chain(**options) -> DDPMScheduler:
    return DDPMScheduler(STEPS, trained_betas=BETAS.tolist(), **options)


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def column(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def network_output(prediction_type: str, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """What a network answers whose estimate of the clean image is x0."""
    alpha_bar = column(ALPHA_BAR[t])
    eps = (x_t - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()
    return {"epsilon": eps, "sample": x0, "v_prediction": alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x0}[
        prediction_type
    ]


def product_of_gaussians(x0: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Normal:
    """q(x_s | x_t, x0) from q(x_s | x0) q(x_t | x_s): precisions add, and means weighted by them."""
    alpha_bar_s, alpha = column(ALPHA_BAR[s]), column(ALPHA_BAR[t] / ALPHA_BAR[s])
    of_x0, of_x_t = 1 / (1 - alpha_bar_s), alpha / (1 - alpha)
    mean = (of_x0 * alpha_bar_s.sqrt() * x0 + of_x_t * x_t / alpha.sqrt()) / (of_x0 + of_x_t)
    return Normal(mean, (of_x0 + of_x_t) ** -0.5)


# ---------------------------------------------------------------- Gaussians


@reliable
@given(*[st.floats(-5, 5)] * 2, *[st.floats(-10, 10)] * 2)
def test_kl_is_that_of_torch(mean1, mean2, log_variance1, log_variance2):
    arguments = torch.tensor([mean1, log_variance1, mean2, log_variance2], dtype=torch.float64)
    first, second = (Normal(mean, (log_variance / 2).exp()) for mean, log_variance in arguments.view(2, 2))
    assert_close(normal_kl(*arguments), kl_divergence(first, second), **EXACT)


def test_bits_are_the_mean_over_the_dimensions_of_each_image():
    nats = images(2, 3, 4, 5)
    assert_close(bits(nats).tolist(), [image.mean().item() * math.log2(math.e) for image in nats], **EXACT)


# ---------------------------------------------------------------- the decoder of 8-bit pixels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mean", [0.001, 0.3, -1.0, 1.0, -1.5, 40.0, -1e4])
@pytest.mark.parametrize("log_variance", [-46.0, -20.0, -7.0, -2.0, 3.0, 12.0, 30.0])
def test_the_masses_of_all_values_sum_to_one(mean, log_variance, dtype):
    mean, log_variance = torch.tensor([mean, log_variance], dtype=dtype)
    masses = discretized_gaussian_log_likelihood(PIXELS.to(dtype), mean, log_variance).exp()
    assert_close(masses.sum().item(), 1.0, rtol=0, atol={torch.float32: 2e-3, torch.float64: 1e-9}[dtype])


@pytest.mark.parametrize("sigma", [1e-3, 0.004, 0.05, 0.5, 3.0, 100.0])
@pytest.mark.parametrize("mean", [0.0, 0.1, -0.998, 1.3])
def test_mass_is_a_difference_of_scipys_cdfs(mean, sigma):
    arguments = torch.tensor([mean, 2 * math.log(sigma)], dtype=torch.float64)
    ours = discretized_gaussian_log_likelihood(PIXELS, *arguments)
    edges = (PIXELS[1:] + PIXELS[:-1]).numpy() / 2
    below, above = stats.norm.cdf(edges, mean, sigma), stats.norm.sf(edges, mean, sigma)
    # of both differences the one of the smaller tails keeps its digits
    inner = [b - a if b < 0.5 else c - d for a, b, c, d in zip(below, below[1:], above, above[1:])]
    expected = torch.tensor([below[0], *inner, above[-1]], dtype=torch.float64)
    accurate = expected > 1e-290
    assert_close(ours[accurate].exp(), expected[accurate], rtol=1e-7, atol=0)


@pytest.mark.parametrize("side", [-1, 1])
@pytest.mark.parametrize("sigma", [0.002, 0.02, 0.04, 1.0])
def test_float32_tails_are_finite_and_fall_with_the_distance(side, sigma):
    """The mean lies at one end; the inner values are up to 1000 (or 50, or 2) standard deviations away from it."""
    inner = side * PIXELS[1:-1].float()
    log_mass = discretized_gaussian_log_likelihood(inner, torch.tensor(-side * 1.0), torch.tensor(2 * math.log(sigma)))
    assert log_mass.isfinite().all()
    assert (log_mass.diff() < 0).all()


@pytest.mark.parametrize("sigma", [0.002, 0.04, 1.0, 30.0])
def test_float32_has_the_numbers_of_float64(sigma):
    mean, log_variance = torch.tensor(-0.7), torch.tensor(2 * math.log(sigma))
    single = discretized_gaussian_log_likelihood(PIXELS.float(), mean, log_variance)
    double = discretized_gaussian_log_likelihood(PIXELS, mean.double(), log_variance.double())
    assert_close(single.double(), double, rtol=1e-3, atol=3e-3)


@pytest.mark.parametrize("log_variance", [12.0, 20.0, 25.0, 30.0, 46.0])
def test_a_float32_bin_that_is_narrow_beside_sigma_has_a_finite_mass(log_variance):
    log_mass = discretized_gaussian_log_likelihood(torch.zeros(1), torch.tensor(0.0), torch.tensor(log_variance))
    assert log_mass.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("log_variance", [-20.0, -14.0, -8.0, 0.0, 8.0])
def test_gradients_are_finite(log_variance, dtype):
    mean = torch.linspace(-1.2, 1.2, 25, dtype=dtype)[:, None].requires_grad_()
    log_variance = torch.full((25, 1), log_variance, dtype=dtype, requires_grad=True)
    discretized_gaussian_log_likelihood(PIXELS.to(dtype), mean, log_variance).sum().backward()
    assert mean.grad.isfinite().all() and log_variance.grad.isfinite().all()


@pytest.mark.parametrize("log_variance", [-10.0, -6.0, 0.0])
def test_float32_has_the_gradients_of_float64(log_variance):
    """The smallest is about that of a decoder of 1000 steps."""
    gradients = []
    for dtype in (torch.float32, torch.float64):
        arguments = [torch.tensor(value, dtype=dtype, requires_grad=True) for value in (-0.7, log_variance)]
        log_masses = discretized_gaussian_log_likelihood(PIXELS.to(dtype), *arguments)
        gradients.append(torch.stack(torch.autograd.grad(log_masses.sum(), arguments)))
    assert_close(gradients[0].double(), gradients[1], rtol=5e-3, atol=0)


def test_gradients_are_those_of_finite_differences():
    x0, mean = PIXELS[::15], torch.tensor(0.1).double().requires_grad_()
    log_variance = torch.tensor(-3.0).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda *of: discretized_gaussian_log_likelihood(x0, *of), (mean, log_variance))


# ---------------------------------------------------------------- the reverse kernel


def variance_channels(variance_type: str, seed: int, *shape: int) -> Tensor:
    """What a network may answer beside its prediction: none, a variance, or a share in about [-1, 1]."""
    values = images(*shape, seed=seed)
    return {"learned": values.exp(), "learned_range": values.tanh()}.get(variance_type, values[:, :0])


def variance_of(variance_type: str, channels: Tensor, small: Tensor, large: Tensor) -> Tensor:
    """The kernel's, between beta_tilde (small) and beta (large), with the variance channels."""
    if variance_type == "learned_range":
        return small ** ((1 - channels) / 2) * large ** ((1 + channels) / 2)
    return {"fixed_small": small, "fixed_large": large, "learned": channels}[variance_type]


@every_variance
@pytest.mark.parametrize("clip", [True, False])
def test_the_kernel_is_the_posterior_of_the_estimate(variance_type, clip):
    """From any t to any earlier s, also over several steps."""
    s, t = (torch.tensor(steps) for steps in zip(*itertools.combinations(range(STEPS), 2)))
    estimate, x_t = images(2, len(t), 2, 2, 2)
    channels = variance_channels(variance_type, 1, *x_t.shape)
    scheduler = chain(variance_type=variance_type, prediction_type="sample")
    kernel = scheduler.reverse_kernel(torch.cat([estimate, channels], 1), t, s, x_t, clip)

    shown = estimate.clamp(-1, 1) if clip else estimate
    posterior = product_of_gaussians(shown, x_t, t, s)
    variance = variance_of(variance_type, channels, posterior.variance, column(1 - ALPHA_BAR[t] / ALPHA_BAR[s]))
    assert_close(kernel.x0, shown, **EXACT)
    assert_close(kernel.mean, posterior.mean, **EXACT)
    assert_close(kernel.log_variance.exp().expand_as(x_t), variance.expand_as(x_t), **EXACT)


@pytest.mark.parametrize("t", [0, 1, 5])
def test_the_last_kernel_has_the_mean_of_the_estimate_and_the_variance_of_the_step_before(t):
    """beta_tilde is 0 where s = -1; the kernel takes that of 1 -> 0 (DDPM, section 3.3)."""
    x_t, estimate = images(2, 1, 1, 2, 2)
    scheduler = chain(prediction_type="sample", clip_sample=False)
    kernel = scheduler.reverse_kernel(estimate, torch.tensor(t), torch.tensor(-1), x_t)
    assert_close(kernel.mean, estimate, **EXACT)
    floor = (1 - ALPHA_BAR[0]) / (1 - ALPHA_BAR[1]) * BETAS[1]
    assert kernel.log_variance.item() == pytest.approx(floor.log().item(), abs=1e-6)


@pytest.mark.parametrize("t", [0, 1, STEPS - 1])
@pytest.mark.parametrize(("output", "fixed"), [(-1.0, "fixed_small"), (1.0, "fixed_large")])
def test_learned_range_ends_at_both_fixed_variances(output, fixed, t):
    x_t = images(2, 3, 2, 2)
    channels = torch.cat([x_t, torch.full_like(x_t, output)], 1)
    steps = torch.tensor([t, t]), torch.tensor([t - 1, t - 1])
    learned = chain(variance_type="learned_range").reverse_kernel(channels, *steps, x_t)
    expected = chain(variance_type=fixed).reverse_kernel(x_t, *steps, x_t)
    assert_close(learned.log_variance, expected.log_variance.expand_as(x_t), **EXACT)
    assert_close(learned.mean, expected.mean, **EXACT)


@pytest.mark.parametrize("steps", [1, 2])
def test_the_shortest_chains_have_a_finite_decoder(steps):
    kernel = DDPMScheduler(steps).reverse_kernel(
        images(1, 1, 2, 2), torch.tensor(0), torch.tensor(-1), images(1, 1, 2, 2)
    )
    assert kernel.log_variance.isfinite().all()


# ---------------------------------------------------------------- one term of the bound


@every_variance
@every_prediction
@pytest.mark.parametrize("clip", [True, False])
def test_later_terms_are_the_divergence_of_posterior_and_kernel(variance_type, prediction_type, clip):
    t = torch.arange(1, STEPS)
    x0, x_t, estimate = images(3, len(t), 2, 3, 3)
    channels = variance_channels(variance_type, 1, *x_t.shape)
    output = torch.cat([network_output(prediction_type, estimate, x_t, t), channels], 1)
    scheduler = chain(variance_type=variance_type, prediction_type=prediction_type)
    ours = vlb_term(scheduler, output, x0, x_t, t, clip)

    posterior = product_of_gaussians(x0, x_t, t, t - 1)
    kernel_mean = product_of_gaussians(estimate.clamp(-1, 1) if clip else estimate, x_t, t, t - 1).mean
    variance = variance_of(variance_type, channels, posterior.variance, column(BETAS[t]))
    divergence = kl_divergence(posterior, Normal(kernel_mean, variance.sqrt()))
    assert_close(ours, divergence.mean((1, 2, 3)) / math.log(2), **EXACT)


@every_variance
@every_prediction
def test_the_first_term_is_the_decoder(variance_type, prediction_type):
    t = torch.zeros(4, dtype=torch.long)
    x0 = PIXELS[torch.randint(256, (4, 2, 3, 3), generator=torch.Generator().manual_seed(0))]
    x_t, estimate = images(2, *x0.shape)
    channels = variance_channels(variance_type, 1, *x_t.shape)
    output = torch.cat([network_output(prediction_type, estimate, x_t, t), channels], 1)
    scheduler = chain(variance_type=variance_type, prediction_type=prediction_type)
    ours = vlb_term(scheduler, output, x0, x_t, t, clip=False)

    small = (1 - ALPHA_BAR[0]) / (1 - ALPHA_BAR[1]) * BETAS[1]
    log_variance = variance_of(variance_type, channels, small, BETAS[0]).log()
    log_masses = discretized_gaussian_log_likelihood(x0, estimate, log_variance)
    assert_close(ours, -log_masses.mean((1, 2, 3)) / math.log(2), **EXACT)


@every_prediction
def test_a_network_that_knows_the_image_has_no_divergence(prediction_type):
    t = torch.arange(1, STEPS)
    x0, eps = images(2, len(t), 2, 3, 3)
    scheduler = chain(prediction_type=prediction_type)
    x_t = scheduler.add_noise(x0, eps, t)
    term = vlb_term(scheduler, network_output(prediction_type, x0, x_t, t), x0, x_t, t, clip=False)
    assert term.abs().max() < 1e-12


def test_float32_has_the_terms_of_float64():
    scheduler = DDPMScheduler(variance_type="learned_range", clip_sample=False)
    t = torch.tensor([0, 1, 2, 10, 100, 500, 999])
    x0, eps = images(2, len(t), 1, 4, 4)
    x0 = ((x0.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
    x_t, channels = scheduler.add_noise(x0, eps, t), variance_channels("learned_range", 1, *x0.shape)
    double = torch.cat([eps + 0.1 * x0, channels], 1), x0, x_t
    single = (tensor.float() for tensor in double)
    assert_close(vlb_term(scheduler, *single, t).double(), vlb_term(scheduler, *double, t), rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------- the whole bound, on data whose entropy is known

MEAN, SIGMA = 0.1, 0.15


def optimal_terms(variance_type: str, prediction_type: str, sigma: float = SIGMA) -> Tensor:
    """E[L_t] in nats for x0 ~ N(MEAN, sigma^2) and the best denoiser, t = 0 ... T - 1; by quadrature over x0 and eps.

    With learned variance it is the optimal one too: the kernels are then exactly q(x_{t-1} | x_t).
    """
    nodes, weights = (torch.from_numpy(array) for array in hermegauss(24))
    weights = weights / weights.sum()
    t, x0, eps = (grid.flatten() for grid in torch.meshgrid(torch.arange(STEPS).double(), nodes, nodes, indexing="ij"))
    t = t.long()
    probability = (weights[:, None] * weights).flatten()
    alpha_bar, x0, eps = column(ALPHA_BAR[t]), column(MEAN + sigma * x0), column(eps)
    x_t = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps
    gain = sigma**2 * alpha_bar.sqrt() / (alpha_bar * sigma**2 + 1 - alpha_bar)
    output = network_output(prediction_type, MEAN + gain * (x_t - alpha_bar.sqrt() * MEAN), x_t, t)

    small, large, best = best_variances(sigma)
    answers = {"learned": best, "learned_range": 2 * (best / small).log() / (large / small).log() - 1}
    if variance_type in answers:
        output = torch.cat([output, column(answers[variance_type][t])], 1)
    scheduler = chain(variance_type=variance_type, prediction_type=prediction_type)
    terms = vlb_term(scheduler, output, x0, x_t, t, clip=False) * math.log(2)
    return (terms.view(STEPS, -1) * probability).sum(1)


def best_variances(sigma: float) -> tuple[Tensor, Tensor, Tensor]:
    """beta_tilde and beta of t -> t - 1 (at t = 0 as the decoder has them), and the variance of q(x_{t-1} | x_t)."""
    before = torch.cat([torch.ones(1), ALPHA_BAR[:-1]]).double()
    small = (1 - before) / (1 - ALPHA_BAR) * BETAS
    marginal = before * sigma**2 + 1 - before  # of x_{t-1}
    best = 1 / (1 / marginal + (1 - BETAS) / BETAS)  # seen through x_t = sqrt(1 - beta) x_{t-1} + noise
    small[0] = small[1]
    return small, BETAS, best


def information(sigma: float) -> Tensor:
    """I(x0; x_t) of a Gaussian channel, in nats."""
    return 0.5 * torch.log1p(sigma**2 * ALPHA_BAR / (1 - ALPHA_BAR))


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
@every_prediction
def test_the_terms_of_exact_kernels_are_the_information_lost_in_each_step(variance_type, prediction_type):
    """E[L_{t-1}] = I(x0; x_{t-1} | x_t) = I(x0; x_{t-1}) - I(x0; x_t), since x0, x_{t-1}, x_t is a Markov chain."""
    terms = optimal_terms(variance_type, prediction_type)
    assert_close(terms[1:], -information(SIGMA).diff(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_the_bound_of_exact_kernels_is_the_entropy(variance_type):
    """The sum telescopes to H(x0) - I(x0; x_T), and what is left is the first term of DDPM eq. 5; bins are narrow."""
    entropy = 0.5 * math.log(2 * math.pi * math.e * SIGMA**2) - math.log(2 / 255)
    total = optimal_terms(variance_type, "epsilon").sum() + information(SIGMA)[-1]
    assert total.item() == pytest.approx(entropy, abs=1e-3)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_a_fixed_variance_costs_its_divergence_from_the_exact_kernel(variance_type):
    small, large, best = best_variances(SIGMA)
    ratio = (best / (small if variance_type == "fixed_small" else large))[1:]
    expected = -information(SIGMA).diff() + 0.5 * (ratio - 1 - ratio.log())
    assert_close(optimal_terms(variance_type, "epsilon")[1:], expected, rtol=1e-9, atol=1e-12)


def test_the_large_variance_is_exact_for_data_of_unit_variance():
    """DDPM, section 3.2."""
    assert_close(optimal_terms("fixed_large", "epsilon", 1.0)[1:], -information(1.0).diff(), rtol=1e-9, atol=1e-12)


def gaussian_pixels(count: int, seed: int = 0) -> Tensor:
    """8-bit images (count, 1, 8, 8) with pixels from N(MEAN, SIGMA^2)."""
    pixels = MEAN + SIGMA * images(count, 1, 8, 8, seed=seed)
    return ((pixels + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1


def best_denoiser(prediction_type: str, variance_type: str):
    """The network that knows the data, with the best learned variance or none."""

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        alpha_bar = column(ALPHA_BAR[t])
        gain = SIGMA**2 * alpha_bar.sqrt() / (alpha_bar * SIGMA**2 + 1 - alpha_bar)
        output = network_output(prediction_type, MEAN + gain * (x_t - alpha_bar.sqrt() * MEAN), x_t, t)
        if variance_type == "learned":
            output = torch.cat([output, column(best_variances(SIGMA)[2][t]).expand_as(output)], 1)
        return output

    return denoise


def test_the_prior_term_is_the_divergence_of_the_end_of_the_chain():
    x0 = gaussian_pixels(3)
    end = Normal(ALPHA_BAR[-1].sqrt() * x0, (1 - ALPHA_BAR[-1]).sqrt())
    expected = kl_divergence(end, Normal(torch.zeros_like(x0), 1.0)).flatten(1).mean(1) / math.log(2)
    assert_close(prior_term(chain(), x0), expected, **EXACT)


@pytest.mark.parametrize("count", [1, 3, STEPS - 1])
@pytest.mark.parametrize(("variance_type", "prediction_type"), [("fixed_small", "epsilon"), ("learned", "sample")])
def test_the_estimated_bound_is_that_of_gaussian_data(variance_type, prediction_type, count):
    """Each part within five standard errors of its closed form, with all terms or one of each stratum."""
    scheduler = chain(variance_type=variance_type, prediction_type=prediction_type, clip_sample=False)
    x0 = gaussian_pixels(4000)
    bound = variational_bound(
        best_denoiser(prediction_type, variance_type), scheduler, x0, count, torch.Generator().manual_seed(1)
    )
    terms = optimal_terms(variance_type, prediction_type) / math.log(2)
    level = ALPHA_BAR[-1]
    prior = 0.5 * (level * (SIGMA**2 + MEAN**2) - level - torch.log1p(-level)) / math.log(2)
    for part, expected in ((bound.prior, prior), (bound.transitions, terms[1:].sum()), (bound.decoder, terms[0])):
        error = part.std() / len(part) ** 0.5
        assert abs(part.mean() - expected) < 5 * error and error < 0.05
    assert_close(bound.total, bound.prior + bound.transitions + bound.decoder)


@pytest.mark.parametrize("count", [0, STEPS])
def test_a_number_of_terms_that_cannot_be_is_refused(count):
    with pytest.raises(ValueError, match=rf"count={count} must lie between 1 and {STEPS - 1}"):
        variational_bound(lambda x_t, t: x_t, chain(), gaussian_pixels(1), count, torch.Generator())
