"""What follows from a config: learning rate, network, noise."""

import pytest
import torch
from conftest import one_sentence

from ddpm_pipe.cli import PRESETS
from ddpm_pipe.config import parse
from ddpm_pipe.data.memory import ImageData
from ddpm_pipe.training.config import TrainConfig
from ddpm_pipe.training.recipe import cooldown_start, lr_at, make_scheduler, make_unet

SMALL = {"block_out_channels": [8, 16], "norm_num_groups": 4}
STOCK = {
    "_class_name": "UNet2DModel",
    "down_block_types": ["DownBlock2D"] * 2,
    "up_block_types": ["UpBlock2D"] * 2,
    **SMALL,
}


def images(channels=3, height=8, width=8, classes=0) -> ImageData:
    return ImageData(
        torch.zeros(4, channels, height, width, dtype=torch.uint8),
        torch.arange(4),
        labels=torch.zeros(4, dtype=torch.long) if classes else None,
        class_names=tuple(f"class {i}" for i in range(classes)),
    )


def recipe(unet=SMALL, **options) -> TrainConfig:
    return TrainConfig(data="x", unet=unet, **options)


def test_learning_rate_warms_up_in_optimizer_steps_then_decays_to_zero():
    for schedule, halfway in (("constant", 1.0), ("linear", 0.5), ("cosine", 0.5)):
        config = recipe(steps=110, lr_warmup_steps=10, learning_rate=2.0, lr_schedule=schedule)
        assert [lr_at(step, config) for step in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])
        assert lr_at(10, config) == pytest.approx(2.0)
        assert lr_at(60, config) == pytest.approx(2.0 * halfway)
    assert lr_at(110, recipe(steps=110, lr_schedule="cosine")) == pytest.approx(0, abs=1e-12)
    assert lr_at(35, recipe(steps=140, learning_rate=1.0, lr_schedule="cosine")) == pytest.approx(0.5 + 0.5**1.5)


def test_learning_rate_is_constant_until_the_cooldown_and_then_decays_to_zero():
    config = recipe(
        steps=100, lr_warmup_steps=10, lr_schedule="warmup_stable_decay", lr_cooldown=0.36, learning_rate=2.0
    )
    assert cooldown_start(config) == 64
    rates = [lr_at(step, config) for step in (0, 9, 10, 64, 73, 80, 91)]
    assert rates == pytest.approx([0.2, 2, 2, 2, 2 * (1 - 3 / 6), 2 * (1 - 4 / 6), 2 * (1 - (27 / 36) ** 0.5)])
    assert lr_at(100, config) == 0
    longer = config.replace(steps=1000)
    assert [lr_at(step, config) for step in range(65)] == [lr_at(step, longer) for step in range(65)]
    assert cooldown_start(config.replace(lr_cooldown=0.99)) == 10, "the warm-up comes first"
    assert cooldown_start(config.replace(lr_cooldown=0)) == cooldown_start(config.replace(lr_schedule="cosine")) == 100


@pytest.mark.parametrize("unet", [SMALL, STOCK])
@pytest.mark.parametrize(("channels", "height", "width", "classes"), [(1, 8, 8, 0), (3, 12, 8, 5), (4, 8, 16, 2)])
def test_network_fits_the_images(unet, channels, height, width, classes):
    network = make_unet(recipe(unet, class_conditional=classes > 0), images(channels, height, width, classes))
    labels = {"class_labels": torch.tensor([classes])} if classes else {}  # the null class of both kinds
    output = network(torch.zeros(1, channels, height, width), torch.tensor([3]), **labels).sample
    assert output.shape == (1, channels, height, width)


def test_initial_weights_follow_the_seed():
    first, again, other = (make_unet(recipe(seed=seed), images()).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["conv_in.weight"], other["conv_in.weight"])


def test_cifar10_preset_has_the_published_number_of_weights():
    config = parse(TrainConfig, [str(PRESETS["cifar10"])])
    assert sum(p.numel() for p in make_unet(config, images(3, 32, 32)).parameters()) == 35_746_307


def test_scheduler_has_every_choice_of_the_config():
    chosen = {
        "num_train_timesteps": 50,
        "beta_schedule": "sigmoid",
        "beta_start": 0.001,
        "beta_end": 0.05,
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
        "variance_type": "fixed_large",
    }
    config = make_scheduler(recipe(**chosen, sample_steps=10)).config
    assert {key: config[key] for key in chosen} == chosen


IMPOSSIBLE = [
    ({"_class_name": "UNet3D"}, {}, "unet._class_name='UNet3D' is unknown; use one of DDPMUNet2DModel, UNet2DModel."),
    ({"_class_name": ["UNet2DModel"]}, {}, "unet._class_name=['UNet2DModel'] is unknown"),
    ({"block_channels": [8]}, {}, "unet='block_channels' is unknown; use one of sample_size"),
    ({"block_out_channels": "wide"}, {}, "unet.block_out_channels='wide' must be a valid tuple."),
    ({**SMALL, "dropout": None}, {}, "unet.dropout=None must be a valid number."),
    ({**STOCK, "layers_per_block": 1.5}, {}, "unet.layers_per_block=1.5 must be a valid integer"),
    ({**SMALL, "in_channels": 3}, {"channels": 1}, "unet.in_channels=3, but the data give 1."),
    (STOCK, {"height": 9}, "images of 8x9 do not suit a UNet2DModel of 2 levels"),
    ({**SMALL, "block_out_channels": [8, 8, 8, 8, 8]}, {}, "images of 8x8 are too small for 5 levels"),
]


@pytest.mark.parametrize(("unet", "data", "sentence"), IMPOSSIBLE)
def test_impossible_networks_are_one_sentence(unet, data, sentence):
    with one_sentence(sentence):
        make_unet(recipe(unet), images(**data))
