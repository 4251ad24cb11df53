"""Which timesteps are drawn, and that drawing some more often does not change what is minimised."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import draw_parts
from scipy import stats
from torch.testing import assert_close

from ddpm_pipe.training.config import TrainConfig
from ddpm_pipe.training.timestep_sampling import TIMESTEP_SAMPLERS, LossSecondMomentSampler, UniformSampler

STEPS = 6
reliable = settings(deadline=None, derandomize=True, database=None)
losses_of_each_step = st.lists(st.lists(st.floats(1e-3, 1e3), min_size=10, max_size=30), min_size=1, max_size=8)


def filled(losses: list[list[float]], **options: int) -> LossSecondMomentSampler:
    """A sampler that has seen the losses of each timestep, the oldest first."""
    sampler = LossSecondMomentSampler(len(losses), **options)
    for step, values in enumerate(losses):
        sampler.update(torch.full((len(values),), step), torch.tensor(values, dtype=torch.float64))
    return sampler


def draw(probabilities: torch.Tensor, size: int, step: int = 0):
    """One batch of draws on one process."""
    config = TrainConfig(data="x", num_train_timesteps=len(probabilities), sample_steps=1, batch_size=size)
    (draws,) = draw_parts(config, step, probabilities)
    return draws


# ---------------------------------------------------------------- probabilities


def test_uniform_stays_uniform_whatever_the_losses():
    sampler = UniformSampler(STEPS)
    sampler.update(torch.arange(STEPS), torch.arange(STEPS) * 100.0)
    sampler.load_state_dict(sampler.state_dict())
    assert_close(sampler.probabilities(), torch.full((STEPS,), 1 / STEPS, dtype=torch.float64))


def test_second_moments_count_only_when_every_timestep_has_ten_losses():
    sampler = filled([[float(1 + step)] * (9 if step == 2 else 25) for step in range(STEPS)])
    uniform = torch.full((STEPS,), 1 / STEPS, dtype=torch.float64)
    assert_close(sampler.probabilities(), uniform)
    sampler.update(torch.tensor([2]), torch.tensor([3.0]))
    expected = 0.999 * (torch.arange(STEPS).double() + 1) / 21 + 0.001 / STEPS
    assert_close(sampler.probabilities(), expected)


@reliable
@given(losses_of_each_step)
def test_probabilities_go_with_the_root_mean_square_of_the_last_ten_losses(losses):
    """Improved DDPM, eq. 18, and a share of 0.1 % that stays uniform."""
    root = [(sum(loss**2 for loss in values[-10:]) / 10) ** 0.5 for values in losses]
    expected = [0.999 * value / sum(root) + 0.001 / len(root) for value in root]
    assert_close(filled(losses).probabilities().tolist(), expected, rtol=1e-9, atol=0)


@reliable
@given(losses_of_each_step)
def test_probabilities_are_positive_and_sum_to_one(losses):
    probabilities = filled(losses).probabilities()
    assert probabilities.min() >= 0.001 / len(losses)
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-12)


def test_the_length_of_the_history_is_an_argument():
    probabilities = filled([[100.0, 1.0, 1.0], [100.0, 3.0, 3.0]], history=2).probabilities()
    assert_close(probabilities.tolist(), [0.999 / 4 + 0.0005, 0.999 * 3 / 4 + 0.0005])


def test_losses_of_one_batch_are_remembered_in_its_order():
    """Of twelve losses of the same timestep in one batch the first two are forgotten."""
    sampler = filled([[1.0] * 10, [1.0] * 10])
    sampler.update(torch.zeros(12, dtype=torch.long), torch.tensor([50.0, 50.0, *[2.0] * 10]))
    assert_close(sampler.probabilities().tolist(), [0.999 * 2 / 3 + 0.0005, 0.999 / 3 + 0.0005])


@pytest.mark.parametrize("seen", [30, 200], ids=["history not full", "history full"])
@pytest.mark.parametrize("name", TIMESTEP_SAMPLERS)
def test_a_restored_sampler_goes_on_as_the_one_saved(name, seen, tmp_path):
    generator = torch.Generator().manual_seed(0)
    t, losses = torch.randint(STEPS, (2, seen), generator=generator), torch.rand(2, seen, generator=generator)
    first, second = (TIMESTEP_SAMPLERS[name](STEPS) for _ in range(2))
    first.update(t[0], losses[0])
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for some in torch.arange(seen).split(7):
        assert torch.equal(first.probabilities(), second.probabilities())
        for sampler in (first, second):
            sampler.update(t[1, some], losses[1, some])
    assert torch.equal(first.probabilities(), second.probabilities())


def test_a_loaded_state_is_a_copy():
    first, second = filled([[1.0] * 10] * STEPS), LossSecondMomentSampler(STEPS)
    second.load_state_dict(first.state_dict())
    first.update(torch.zeros(10, dtype=torch.long), torch.full((10,), 9.0))
    assert_close(second.probabilities(), UniformSampler(STEPS).probabilities())


# ---------------------------------------------------------------- what is drawn

SKEWED = filled([[float(1 + step**2)] * 10 for step in range(STEPS)]).probabilities()


def test_timesteps_are_drawn_with_their_probabilities():
    t = draw(SKEWED, 20_000).t
    assert stats.chisquare(t.bincount(minlength=STEPS), 20_000 * SKEWED).pvalue > 1e-3


def test_the_weight_is_one_over_t_times_the_probability():
    draws = draw(SKEWED, 500)
    assert set(draws.t.tolist()) == set(range(STEPS))
    assert_close(draws.weight, (1 / (STEPS * SKEWED[draws.t])).float())


def test_uniform_draws_have_weight_one():
    assert_close(draw(UniformSampler(STEPS).probabilities(), 50).weight, torch.ones(50))


def test_the_weighted_loss_has_the_mean_of_uniform_draws():
    """Twenty batches of 5,000 draws; a bias of 1 % would be eight standard errors."""
    loss = torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0, 9.0])
    draws = [draw(SKEWED, 5_000, step) for step in range(20)]
    values = torch.cat([loss[batch.t] * batch.weight for batch in draws]).double()
    assert abs(values.mean() - loss.mean()) < 4 * values.std() / len(values) ** 0.5
    assert values.std() / len(values) ** 0.5 < 0.01 * loss.mean()


def test_weighted_losses_vary_least_where_probabilities_go_with_the_loss():
    """What the sampler is for: losses that are constant at each timestep become one constant, but for 0.1 %."""
    loss = torch.tensor([[3.0], [1.0], [4.0], [1.0], [5.0], [9.0]])
    draws = draw(filled(loss.expand(-1, 10).tolist()).probabilities(), 1_000)
    assert (loss[draws.t, 0] * draws.weight).std() < 0.005 * loss.mean()
