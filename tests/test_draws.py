"""What chance decides in a step: a function of the seed and the step, however the batch is cut."""

import pytest
import torch
from runs import draw_parts

from ddpm_pipe.randomness import generator
from ddpm_pipe.training.config import TrainConfig
from ddpm_pipe.training.draws import Draws

SHAPE = (3, 4, 4)
UNIFORM = torch.full((20,), 1 / 20, dtype=torch.float64)


def parts(step: int = 5, processes: int = 1, **options) -> list[Draws]:
    defaults = {"num_train_timesteps": 20, "sample_steps": 1, "batch_size": 8, "flip": True, "class_dropout": 0.5}
    return draw_parts(TrainConfig(data="x", **defaults | options), step, UNIFORM, SHAPE, processes)


def whole(draws: list[Draws]) -> dict[str, torch.Tensor]:
    """The parts put together again."""
    return {name: torch.cat([getattr(each, name) for each in draws]) for name in Draws._fields[:5]}


def same(first: list[Draws], second: list[Draws]) -> bool:
    first, second = whole(first), whole(second)
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 4), (2, 2), (4, 1)])
def test_draws_do_not_depend_on_how_the_batch_is_cut(processes, accumulation):
    cut = parts(processes=processes, gradient_accumulation_steps=accumulation)
    assert len(cut) == 4 and same(cut, parts())
    assert [each.dropout_seed for each in cut] == [
        each.dropout_seed for each in parts(gradient_accumulation_steps=4)
    ], "that of a part goes with its place in the batch"


def test_draws_depend_on_the_seed_and_the_step_alone():
    first = parts()
    torch.rand(1)
    parts(step=6)
    again = parts()
    assert same(first, again) and first[0].dropout_seed == again[0].dropout_seed
    for other in (parts(step=6), parts(seed=1)):
        differ = [not torch.equal(a, b) for a, b in zip(whole(first).values(), whole(other).values())]
        assert differ == [True, False, True, True, True]  # all but the weights, which are 1
        assert other[0].dropout_seed != first[0].dropout_seed


def test_every_part_has_a_dropout_of_its_own():
    seeds = [each.dropout_seed for step in range(3) for each in parts(step, gradient_accumulation_steps=4)]
    assert len(set(seeds)) == 12


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


def test_half_of_the_images_are_mirrored_and_none_without_flip():
    (draws,) = parts(batch_size=1000)
    assert 440 < draws.mirror.sum() < 560  # 3.8 standard deviations
    (draws,) = parts(batch_size=1000, flip=False)
    assert not draws.mirror.any()
