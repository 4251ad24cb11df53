"""Averages of weights."""

import pytest
import torch
from torch import nn

from ddpm_pipe.training.ema import EMA, warmup_decay


def network(value: float) -> nn.Module:
    model = nn.BatchNorm1d(3)  # has weights and buffers
    fill(model, value)
    return model


def fill(model: nn.Module, value: float) -> None:
    for tensor in (*model.parameters(), model.running_mean):
        tensor.data.fill_(value)


def test_average_follows_the_recursion():
    decays, expected, model = [0.0, 0.5, 0.9], 9.0, network(9.0)
    average = EMA(model, lambda step: decays[step])
    for step, (decay, value) in enumerate(zip(decays, [1.0, 2.0, 3.0])):
        fill(model, value)
        average.update(step)
        expected = decay * expected + (1 - decay) * value
        assert average.module.weight.tolist() == pytest.approx([expected] * 3)
        assert average.module.running_mean.tolist() == [value] * 3, "buffers are copied"


def test_warmup_grows_from_zero_to_the_ceiling():
    decays = [warmup_decay(step, 0.999) for step in range(0, 100_000, 100)]
    assert decays[0] == 0
    assert decays == sorted(decays) and decays[-1] == 0.999
    assert warmup_decay(7, 0.999, power=2 / 3) == pytest.approx(0.75)
    assert warmup_decay(15, 0.999, power=3 / 4) == pytest.approx(0.875)


def test_average_is_an_eval_mode_module_of_its_own_without_gradients():
    model = network(1.0).train()
    average = EMA(model, lambda step: 0.5)
    assert not average.module.training and model.training
    assert not any(parameter.requires_grad for parameter in average.module.parameters())
    model.weight.data.fill_(5.0)
    assert average.module.weight.tolist() == [1.0] * 3
    with torch.no_grad():
        average.update(0)
    assert average.module.weight.tolist() == [3.0] * 3
