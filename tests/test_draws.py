"""What chance decides in a step: a function of the seed and the step, however the batch is cut."""

import pytest
import torch
from runs import Largest, draw_parts

from ddpm_pipe.randomness import generator
from ddpm_pipe.training.config import TrainConfig
from ddpm_pipe.training.draws import BLOCK, Draws

SHAPE = (3, 4, 4)
TENSORS = ("t", "weight", "eps", "mirror", "hide_label", "dropout_keys")
UNIFORM = torch.full((20,), 1 / 20, dtype=torch.float64)


def parts(step: int = 5, processes: int = 1, **options) -> list[Draws]:
    defaults = {"num_train_timesteps": 20, "sample_steps": 1, "batch_size": 8, "unet": {"dropout": 0.1}}
    defaults |= {"flip": True, "class_conditional": True, "class_dropout": 0.5}
    return draw_parts(TrainConfig(data="x", **defaults | options), step, UNIFORM, SHAPE, processes)


def whole(draws: list[Draws]) -> dict[str, torch.Tensor]:
    """The parts put together again."""
    return {name: torch.cat([getattr(each, name) for each in draws]) for name in TENSORS}


def same(first: list[Draws], second: list[Draws]) -> bool:
    first, second = whole(first), whole(second)
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 4), (2, 2), (4, 1)])
def test_draws_do_not_depend_on_how_the_batch_is_cut(processes, accumulation):
    cut = parts(processes=processes, gradient_accumulation_steps=accumulation)
    assert len(cut) == 4 and same(cut, parts())
    assert {each.dropout_seed for each in cut} == {parts()[0].dropout_seed}


def test_draws_depend_on_the_seed_and_the_step_alone():
    first = parts()
    torch.rand(1)
    parts(step=6)
    again = parts()
    assert same(first, again) and first[0].dropout_seed == again[0].dropout_seed
    for other in (parts(step=6), parts(seed=1)):
        differ = [not torch.equal(a, b) for a, b in zip(whole(first).values(), whole(other).values())]
        assert differ == [True, False, True, True, True, True]  # all but the weights, which are 1
        assert other[0].dropout_seed != first[0].dropout_seed


def test_nothing_is_drawn_that_the_config_has_no_use_for():
    (draws,) = parts(flip=False, class_conditional=False, unet={})
    assert draws.mirror is draws.hide_label is draws.dropout_keys is None
    assert parts(class_dropout=0)[0].hide_label is None
    x0, labels = torch.randn(8, *SHAPE), torch.arange(8)
    assert draws.mirrored(x0) is x0
    assert draws.conditions(labels, 8)["class_labels"] is labels
    state = torch.get_rng_state()
    draws.seed_dropout([])
    assert torch.equal(torch.get_rng_state(), state)


def test_labels_are_hidden_by_the_draws_of_earlier_versions():
    """Runs that these have begun go on as they would have."""
    (draws,) = parts()
    hidden = torch.rand(8, generator=generator(0, "class_dropout", 5)) < 0.5
    expected = torch.arange(8).masked_fill(hidden, 9)
    assert torch.equal(draws.conditions(torch.arange(8), 9)["class_labels"], expected)


@pytest.mark.parametrize("step", [0, 5])
def test_images_are_mirrored_by_the_draws_of_earlier_versions(step):
    """Runs that these have begun go on as they would have."""
    x0 = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(0))
    expected = x0.clone()
    chosen = torch.rand(8, generator=generator(0, "flip", step)) < 0.5
    expected[chosen] = x0[chosen].flip(-1)
    (draws,) = parts(step)
    assert torch.equal(draws.mirrored(x0), expected)
    pieces = [each.mirrored(x0[2 * i : 2 * i + 2]) for i, each in enumerate(parts(step, processes=4))]
    assert torch.equal(torch.cat(pieces), expected)


def test_half_of_the_images_are_mirrored():
    (draws,) = parts(batch_size=1000)
    assert 440 < draws.mirror.sum() < 560  # 3.8 standard deviations


@pytest.mark.parametrize(("processes", "most"), [(1, 1024), (64, 16 + 2 * BLOCK)])
def test_a_process_draws_the_noise_of_its_share_and_hardly_more(processes, most):
    config = TrainConfig(data="x", num_train_timesteps=20, sample_steps=1, batch_size=1024)
    with Largest() as largest:
        draw_parts(config, 0, UNIFORM, SHAPE, processes)
    assert largest.numbers <= most * 3 * 4 * 4
