"""What the network's output means: targets and their inverses, and the weights of the loss in closed form."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from ddpm_pipe.noise import add_noise, snr
from ddpm_pipe.prediction import LOSS_WEIGHTS, PREDICTIONS, eps_from_x0, loss_weight, velocity, x0_from_eps

reliable = settings(deadline=None, derandomize=True, database=None)
every_prediction = pytest.mark.parametrize("prediction_type", PREDICTIONS)
CLOSE = {"rtol": 1e-9, "atol": 1e-8}
SNRS = torch.logspace(-6, 6, 49, dtype=torch.float64)


@st.composite
def problems(draw):
    """Two images (x0 and eps, or any other pair) and the noise level: one for the batch, or one per image."""
    shape = draw(st.tuples(*[st.integers(1, 3)] * 4))
    levels = st.floats(1e-4, 1 - 1e-4)
    batch = st.lists(levels, min_size=shape[0], max_size=shape[0])
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    first, second = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return first, second, torch.tensor(draw(st.one_of(levels, batch)), dtype=torch.float64)


# ---------------------------------------------------------------- targets and inverses


@every_prediction
@reliable
@given(problems())
def test_the_target_gives_back_image_and_noise(prediction_type, problem):
    x0, eps, alpha_bar = problem
    row = PREDICTIONS[prediction_type]
    x_t, target = add_noise(x0, eps, alpha_bar), row.target(x0, eps, alpha_bar)
    assert_close(row.x0(target, x_t, alpha_bar), x0, **CLOSE)
    assert_close(row.eps(target, x_t, alpha_bar), eps, **CLOSE)


@every_prediction
@reliable
@given(problems())
def test_image_and_noise_of_any_output_make_up_x_t_and_that_output(prediction_type, problem):
    output, x_t, alpha_bar = problem
    row = PREDICTIONS[prediction_type]
    x0, eps = row.x0(output, x_t, alpha_bar), row.eps(output, x_t, alpha_bar)
    assert_close(add_noise(x0, eps, alpha_bar), x_t, **CLOSE)
    assert_close(row.target(x0, eps, alpha_bar), output, **CLOSE)


def test_velocity_is_the_derivative_along_the_circle():
    """With alpha_bar = cos^2 phi, x_t = cos(phi) x0 + sin(phi) eps; v = d x_t / d phi (Salimans & Ho, appendix D)."""
    x0, eps = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    phi, h = torch.tensor([0.1, 0.8, 1.5], dtype=torch.float64), 1e-5
    derivative = (add_noise(x0, eps, (phi + h).cos() ** 2) - add_noise(x0, eps, (phi - h).cos() ** 2)) / (2 * h)
    assert_close(velocity(x0, eps, phi.cos() ** 2), derivative, rtol=0, atol=1e-8)


def test_signs_and_factors_on_numbers_done_by_hand():
    """alpha_bar = 0.64: signal 0.8, noise 0.6; x0 = 2, eps = -1 give x_t = 1 and v = -2."""
    x0, eps, x_t = (torch.full((1, 1), value, dtype=torch.float64) for value in (2.0, -1.0, 1.0))
    alpha_bar = torch.tensor(0.64, dtype=torch.float64)
    assert velocity(x0, eps, alpha_bar).item() == pytest.approx(-2.0)
    assert x0_from_eps(eps, x_t, alpha_bar).item() == pytest.approx(2.0)
    assert eps_from_x0(x0, x_t, alpha_bar).item() == pytest.approx(-1.0)


def test_velocity_has_an_image_where_the_signal_is_gone():
    """At alpha_bar = 0 (zero terminal SNR) v = -x0, so v still determines x0; eps does not."""
    x0, eps = torch.randn(2, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    alpha_bar, row = torch.tensor(0.0), PREDICTIONS["v_prediction"]
    assert torch.equal(row.target(x0, eps, alpha_bar), -x0)
    assert torch.equal(row.x0(-x0, eps, alpha_bar), x0)


# ---------------------------------------------------------------- how the plain loss becomes one of the noise


@every_prediction
@reliable
@given(problems())
def test_eps_weight_relates_the_plain_loss_to_the_error_of_the_noise(prediction_type, problem):
    x0, eps, alpha_bar = problem
    row, x_t = PREDICTIONS[prediction_type], add_noise(x0, eps, alpha_bar)
    target = row.target(x0, eps, alpha_bar)
    output = target + 0.1 * torch.sin(7 * target + 1)  # any output that is wrong
    plain = (target - output).square().flatten(1).sum(1)
    of_eps = (eps - row.eps(output, x_t, alpha_bar)).square().flatten(1).sum(1)
    assert_close(row.eps_weight(snr(alpha_bar)) * plain, of_eps, rtol=1e-6, atol=1e-10)


# ---------------------------------------------------------------- loss weights

CLOSED_FORMS = {  # what multiplies the plain loss, at gamma and k
    ("none", "epsilon"): lambda s, gamma, k: 1.0,
    ("none", "sample"): lambda s, gamma, k: 1.0,
    ("none", "v_prediction"): lambda s, gamma, k: 1.0,
    ("p2", "epsilon"): lambda s, gamma, k: 1 / (k + s) ** gamma,
    ("p2", "sample"): lambda s, gamma, k: s / (k + s) ** gamma,
    ("p2", "v_prediction"): lambda s, gamma, k: s / (s + 1) / (k + s) ** gamma,
    ("min_snr", "epsilon"): lambda s, gamma, k: min(s, gamma) / s,
    ("min_snr", "sample"): lambda s, gamma, k: min(s, gamma),
    ("min_snr", "v_prediction"): lambda s, gamma, k: min(s, gamma) / (s + 1),
}


def test_every_weight_has_a_closed_form_here():
    assert set(CLOSED_FORMS) == {(name, prediction) for name in LOSS_WEIGHTS for prediction in PREDICTIONS}


@pytest.mark.parametrize(("name", "prediction_type"), CLOSED_FORMS)
@pytest.mark.parametrize(("gamma", "k"), [(1.0, 1.0), (0.5, 1.0), (5.0, 2.5)])
def test_weight_is_its_closed_form(name, prediction_type, gamma, k):
    expected = [CLOSED_FORMS[name, prediction_type](s, gamma, k) for s in SNRS.tolist()]
    assert_close(loss_weight(name, prediction_type, SNRS, gamma, k).tolist(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["p2", "min_snr"])
@reliable
@given(problems())
def test_weights_of_x0_make_one_loss_of_all_predictions(name, problem):
    """p2 and min_snr weigh the error of x0, so the same x0 estimate costs the same whatever the network predicts."""
    x0, eps, alpha_bar = problem
    x_t = add_noise(x0, eps, alpha_bar)
    estimate = x0 + 0.1 * torch.cos(5 * x0)
    implied_eps = eps_from_x0(estimate, x_t, alpha_bar)

    losses = []
    for prediction_type, row in PREDICTIONS.items():
        output, target = row.target(estimate, implied_eps, alpha_bar), row.target(x0, eps, alpha_bar)
        weight = loss_weight(name, prediction_type, snr(alpha_bar), gamma=1.5)
        losses.append(weight * (target - output).square().flatten(1).sum(1))
    assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-10)
    assert_close(losses[2], losses[0], rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize(("name", "prediction_type"), CLOSED_FORMS)
@pytest.mark.parametrize("k", [1.0, 2.0])
def test_weight_at_zero_snr_is_the_limit(name, prediction_type, k):
    at_zero = loss_weight(name, prediction_type, torch.zeros(2, dtype=torch.float64), 2.0, k)
    near_zero = CLOSED_FORMS[name, prediction_type](1e-12, 2.0, k)
    assert at_zero.tolist() == pytest.approx([near_zero] * 2, abs=1e-10)


@pytest.mark.parametrize(("name", "prediction_type"), CLOSED_FORMS)
def test_weight_keeps_shape_and_dtype(name, prediction_type):
    weight = loss_weight(name, prediction_type, torch.rand(3, 2), 1.0)
    assert weight.shape == (3, 2)
    assert weight.dtype == torch.float32


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weight_of_x0_never_passes_its_ceiling(gamma):
    weight = loss_weight("min_snr", "sample", SNRS, gamma)
    assert weight.max().item() == pytest.approx(gamma, rel=1e-12)
    assert math.isclose(weight.min().item(), SNRS.min().item())


@pytest.mark.parametrize(
    ("name", "prediction_type", "argument", "accepted"),
    [("min-snr", "epsilon", "min-snr", LOSS_WEIGHTS), ("p2", "eps", "eps", PREDICTIONS)],
    ids=["weight", "prediction"],
)
def test_an_unknown_name_is_refused_naming_the_known_ones(name, prediction_type, argument, accepted):
    with pytest.raises(ValueError, match=re.escape(argument)) as error:
        loss_weight(name, prediction_type, torch.ones(1), 1.0)
    assert all(choice in str(error.value) for choice in accepted)
