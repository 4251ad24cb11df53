"""The loss: closed forms, and what it shows the network."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ddpm_pipe.objective import Objective
from ddpm_pipe.schedulers import DDPMScheduler


class Constant(nn.Module):
    """Answers `value` whatever it sees, and remembers what it saw."""

    def __init__(self, value: torch.Tensor):
        super().__init__()
        self.value, self.seen = value, []

    def forward(self, x, t, **conditions):
        self.seen.append((x, t, conditions, torch.is_grad_enabled()))
        return SimpleNamespace(sample=self.value.expand_as(x))


@pytest.fixture
def batch():
    draw = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 6, 3, 4, 4, generator=draw)
    return x0, torch.arange(6) * 180 + 5, eps


@pytest.mark.parametrize(("loss", "of_error"), [("l1", abs), ("l2", lambda e: e**2)])
def test_loss_of_each_image_is_the_mean_over_its_pixels(batch, loss, of_error):
    x0, t, eps = batch
    losses = Objective(DDPMScheduler(), loss)(Constant(torch.tensor(0.25)), x0, t, eps)
    expected = torch.stack([of_error(noise - 0.25).mean() for noise in eps])
    torch.testing.assert_close(losses, expected)


def test_huber_is_quadratic_near_zero_and_linear_beyond():
    x0, eps = torch.zeros(2, 1, 1, 1), torch.tensor([0.5, 3.0]).view(2, 1, 1, 1)
    losses = Objective(DDPMScheduler(), "huber")(Constant(torch.tensor(0.0)), x0, torch.tensor([1, 2]), eps)
    assert losses.tolist() == pytest.approx([0.5**2 / 2, 3 - 0.5])


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_a_perfect_network_has_no_loss(batch, prediction_type):
    x0, t, eps = batch
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    target = {"epsilon": eps, "sample": x0, "v_prediction": scheduler.get_velocity(x0, eps, t)}[prediction_type]
    assert Objective(scheduler, weight="min_snr")(Constant(target), x0, t, eps).abs().max() == 0


@pytest.mark.parametrize("weight", ["p2", "min_snr"])
def test_equal_x0_errors_cost_the_same_whatever_the_network_predicts(batch, weight):
    x0, t, eps = batch
    wrong = x0 + 0.1
    losses = []
    for prediction_type in ("epsilon", "sample", "v_prediction"):
        scheduler = DDPMScheduler(beta_schedule="cosine", prediction_type=prediction_type)
        x_t, alpha_bar = scheduler.add_noise(x0, eps, t), scheduler.alphas_cumprod[t].double().view(-1, 1, 1, 1)
        wrong_eps = (x_t - alpha_bar.sqrt() * wrong) / (1 - alpha_bar).sqrt()
        velocity = alpha_bar.sqrt() * wrong_eps - (1 - alpha_bar).sqrt() * wrong
        output = {"epsilon": wrong_eps, "sample": wrong, "v_prediction": velocity}[prediction_type]
        losses.append(Objective(scheduler, "l2", weight, gamma=1.0)(Constant(output), x0, t, eps))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=0)
    torch.testing.assert_close(losses[2], losses[1], rtol=1e-3, atol=0)


def test_the_network_sees_x_t_and_its_own_estimate_without_gradient(batch):
    x0, t, eps = batch
    scheduler = DDPMScheduler(prediction_type="sample")
    network = Constant(torch.tensor(0.5))
    Objective(scheduler)(network, x0, t, eps, True, class_labels=torch.arange(6))
    (x_first, _, first, grad_first), (x_second, _, second, grad_second) = network.seen
    assert torch.equal(x_first, scheduler.add_noise(x0, eps, t)) and torch.equal(x_first, x_second)
    assert "self_cond" not in first and (second["self_cond"] == 0.5).all()
    assert torch.equal(second["class_labels"], torch.arange(6))
    assert not grad_first and grad_second


def test_half_precision_outputs_are_compared_in_float32(batch):
    x0, t, eps = batch
    loss = Objective(DDPMScheduler())(Constant(torch.tensor(0.0, dtype=torch.bfloat16)), x0, t, eps)
    torch.testing.assert_close(loss, eps.pow(2).flatten(1).mean(1))


@pytest.mark.parametrize("options", [{"loss": "l3"}, {"weight": "snr"}])
def test_unknown_values_name_the_accepted_ones(options):
    with pytest.raises(ValueError, match=r"is unknown; use one of (l1, l2, huber|none, p2, min_snr)"):
        Objective(DDPMScheduler(), **options)
