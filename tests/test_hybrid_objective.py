"""The hybrid loss of learned variances (Improved DDPM, eq. 16): a closed form, who learns from what, whole runs."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import NETWORK, STOCK, assert_same, final_state
from torch import Tensor, nn
from torch.testing import assert_close

from ddpm_pipe import DDPMPipeline
from ddpm_pipe.likelihood import vlb_term
from ddpm_pipe.objective import Objective
from ddpm_pipe.prediction import PREDICTIONS
from ddpm_pipe.schedulers import DDPMScheduler
from ddpm_pipe.training.loop import train

every_prediction = pytest.mark.parametrize("prediction_type", PREDICTIONS)


class Answers(nn.Module):
    """Answers `values` (B, 2C, H, W) whatever it sees, and remembers the conditions."""

    def __init__(self, values: Tensor):
        super().__init__()
        self.values, self.conditions = nn.Parameter(values), []

    def forward(self, x, t, **conditions):
        self.conditions.append(conditions)
        return SimpleNamespace(sample=self.values)


@pytest.fixture
def batch():
    """Clean images, timesteps with the decoder's among them, noise."""
    x0, eps = torch.randn(2, 6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return x0.clamp(-1, 1), torch.tensor([0, 1, 2, 50, 500, 999]), eps


@pytest.fixture
def network():
    return Answers(torch.randn(6, 6, 4, 4, generator=torch.Generator().manual_seed(1)).tanh())


def make_scheduler(prediction_type: str = "epsilon", steps: int = 1000, **options) -> DDPMScheduler:
    options = {"variance_type": "learned_range"} | options
    return DDPMScheduler(steps, beta_schedule="cosine", prediction_type=prediction_type, **options)


def gradient(objective: Objective, network: Answers, batch) -> tuple[Tensor, Tensor]:
    """Of the summed loss, for the prediction and for the variance channels."""
    (of_values,) = torch.autograd.grad(objective(network, *batch).sum(), network.values)
    return of_values[:, :3], of_values[:, 3:]


def bound(scheduler: DDPMScheduler, output: Tensor, batch, clip: bool = False) -> Tensor:
    x0, t, eps = batch
    return vlb_term(scheduler, output, x0, scheduler.add_noise(x0, eps, t), t, clip)


# ---------------------------------------------------------------- the loss


@every_prediction
@pytest.mark.parametrize(("options", "weight"), [({}, 0.001), ({"vlb_weight": 0.5}, 0.5), ({"vlb_weight": 0.0}, 0.0)])
def test_the_loss_is_the_simple_one_plus_the_weighted_bound(batch, network, prediction_type, options, weight):
    x0, t, eps = batch
    scheduler = make_scheduler(prediction_type)
    velocity = scheduler.get_velocity(x0, eps, t)
    target = {"epsilon": eps, "sample": x0, "v_prediction": velocity}[prediction_type]
    simple = (network.values[:, :3] - target).square().mean((1, 2, 3))
    expected = simple + weight * 1000 * bound(scheduler, network.values, batch)
    assert_close(Objective(scheduler, **options)(network, *batch), expected)


@pytest.mark.parametrize("steps", [20, 100])
def test_the_bound_grows_with_the_length_of_the_chain(batch, network, steps):
    """lambda is multiplied by T: t is drawn uniformly, and the bound is a sum."""
    (x0, _, eps), scheduler = batch, make_scheduler(steps=steps)
    batch = x0, torch.tensor([0, 1, 2, 5, 10, 19]), eps
    simple = (network.values[:, :3] - eps).square().mean((1, 2, 3))
    expected = simple + 0.001 * steps * bound(scheduler, network.values, batch)
    assert_close(Objective(scheduler)(network, *batch), expected)


def test_the_weight_of_the_simple_loss_does_not_touch_the_bound(batch, network):
    scheduler = make_scheduler()
    plain, weighted = (Objective(scheduler, weight=weight) for weight in ("none", "min_snr"))
    of_bound = bound(scheduler, network.values, batch)
    simple = plain(network, *batch) - of_bound
    assert_close(weighted(network, *batch), weighted.weights[batch[1]] * simple + of_bound, rtol=1e-4, atol=1e-5)


def test_the_bound_is_that_of_the_estimate_without_clipping(batch, network):
    scheduler = make_scheduler("sample")
    network.values.data[:, :3] *= 3  # out of [-1, 1]
    loss = Objective(scheduler)(network, *batch) - (network.values[:, :3] - batch[0]).square().mean((1, 2, 3))
    assert_close(loss, bound(scheduler, network.values, batch), rtol=1e-4, atol=1e-4)
    clipped = bound(scheduler, network.values, batch, clip=True)
    assert ((loss - clipped).abs() > 0.01 * clipped.abs()).all()


@every_prediction
def test_the_bound_teaches_the_prediction_nothing(batch, network, prediction_type):
    hybrid, _ = gradient(Objective(make_scheduler(prediction_type)), network, batch)
    simple, _ = gradient(Objective(make_scheduler(prediction_type), vlb_weight=0.0), network, batch)
    assert torch.equal(hybrid, simple)
    assert (hybrid != 0).all()


@every_prediction
def test_the_variance_learns_from_the_bound_alone(batch, network, prediction_type):
    scheduler = make_scheduler(prediction_type)
    _, ours = gradient(Objective(scheduler), network, batch)
    (expected,) = torch.autograd.grad(0.001 * 1000 * bound(scheduler, network.values, batch).sum(), network.values)
    assert_close(ours, expected[:, 3:])
    assert (ours != 0).all()
    _, of_simple = gradient(Objective(scheduler, vlb_weight=0.0), network, batch)
    assert not of_simple.any()


def test_the_bound_pulls_the_variance_towards_the_error(batch):
    """A network that knows the image should answer beta_tilde, one that is far off beta: -1 and 1."""
    x0, t, eps = (part[1:] for part in batch)
    for error, sign in ((0.0, 1), (1.0, -1)):
        network = Answers(torch.cat([eps + error, torch.zeros_like(eps)], 1))
        _, of_variance = gradient(Objective(make_scheduler()), network, (x0, t, eps))
        assert (of_variance.sign() == sign).all()


def test_a_fixed_variance_has_no_bound(batch):
    network = Answers(torch.zeros(6, 3, 4, 4))
    loss = Objective(make_scheduler(variance_type="fixed_small"), vlb_weight=1e9)(network, *batch)
    assert_close(loss, batch[2].square().mean((1, 2, 3)))


def test_self_conditioning_shows_the_prediction_without_the_variance(batch, network):
    Objective(make_scheduler("sample"))(network, *batch, True)
    assert torch.equal(network.conditions[1]["self_cond"], network.values[:, :3])


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_losses_and_gradients_are_finite_for_outputs_of_any_size(batch, network, size):
    network.values.data *= size
    objective = Objective(make_scheduler())
    assert objective(network, *batch).isfinite().all()
    assert all(part.isfinite().all() for part in gradient(objective, network, batch))


# ---------------------------------------------------------------- whole runs

OPTIONS = {
    "self-conditioning": {"unet": NETWORK | {"self_condition": True}},
    "labels": {"class_conditional": True},
    "offset noise": {"offset_noise": 0.1},
    "second moments": {"timestep_sampling": "loss_second_moment", "num_train_timesteps": 3, "batch_size": 32},
    "stock network": {"unet": STOCK},
    "all": {
        "unet": NETWORK | {"self_condition": True, "dropout": 0.1},
        "class_conditional": True,
        "sample_every": 2,
        "offset_noise": 0.1,
        "timestep_sampling": "loss_second_moment",
        "gradient_accumulation_steps": 2,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
    },
}


@pytest.fixture
def learned(recipe):
    """A run of four steps with learned variance."""
    defaults = {"variance_type": "learned_range", "steps": 4, "sample_every": 0, "num_samples": 2, "ema_sigma_rel": []}
    return lambda folder="run", **options: recipe(folder, **(defaults | options))


def saved_state(config) -> dict:
    """What the last checkpoint holds beside the weights."""
    folder = max((Path(config.output_dir) / "checkpoints").iterdir())
    return torch.load(folder / "state.pt", weights_only=True)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_run_leaves_finite_weights_and_a_pipeline_that_samples(learned, name):
    config = learned(**OPTIONS[name])
    folder = train(config)
    assert all(tensor.isfinite().all() for tensor in final_state(config).values())
    assert saved_state(config)["skipped"] == 0
    pipeline = DDPMPipeline.from_pretrained(folder)
    assert pipeline.scheduler.config.variance_type == "learned_range"
    assert pipeline.unet.config.out_channels == 2
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(2, torch.Generator().manual_seed(0), output_type="pt").images
    assert images.shape == (2, 1, 8, 8) and images.isfinite().all()


def test_the_sampler_remembers_the_loss_of_each_image_of_each_step(learned, monkeypatch):
    """Without the weights that make up for drawing some timesteps more often, in the order of the batch."""
    seen = []
    original = Objective.__call__

    def remember(self, unet, x0, t, *rest, **conditions):
        losses = original(self, unet, x0, t, *rest, **conditions)
        seen.append((t, losses.detach()))
        return losses

    monkeypatch.setattr(Objective, "__call__", remember)
    options = {"timestep_sampling": "loss_second_moment", "num_train_timesteps": 2, "batch_size": 16}
    config = learned(**options, gradient_accumulation_steps=2)
    train(config)
    t, losses = (torch.cat(parts) for parts in zip(*seen))
    state = saved_state(config)["timesteps"]
    assert state["counts"].tolist() == t.bincount(minlength=2).tolist()
    for step in range(2):
        assert sorted(state["losses"][step].tolist()) == sorted(losses[t == step][-10:].tolist())


def test_a_resumed_run_draws_the_timesteps_of_an_uninterrupted_one(learned):
    """The sampler's memory is part of the checkpoint."""
    options = {"timestep_sampling": "loss_second_moment", "num_train_timesteps": 2, "batch_size": 16}
    whole, cut = learned("whole", **options), learned("cut", **options, resume=True)
    train(whole)
    train(learned("cut", **options | {"steps": 3}))
    train(cut)
    remembered = saved_state(cut)["timesteps"]
    assert remembered["counts"].min() >= 10, "the second moments were in use"
    assert_same(remembered, saved_state(whole)["timesteps"])
    assert_same(final_state(cut), final_state(whole))
