"""What a run tells of itself: each rule on series in closed form, near its edge on either side, and on real runs."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import NETWORK, Largest, make_recipe

from ddpm_pipe.data.memory import ImageData
from ddpm_pipe.objective import Objective
from ddpm_pipe.run.folder import Run
from ddpm_pipe.training.comparison import BLOCK, Comparison, to_pixels
from ddpm_pipe.training.diagnosis import LEAST_SIGNAL, PAGE, diagnose
from ddpm_pipe.training.log import TIMESTEP_BINS
from ddpm_pipe.training.loop import train
from ddpm_pipe.training.recipe import make_scheduler
from ddpm_pipe.training.report import write_report
from ddpm_pipe.training.validation import mean_signal

LEVELS = [f"t_{i}0%" for i in range(TIMESTEP_BINS)]
SIGNAL = {name: 1 - (i + 0.5) / TIMESTEP_BINS for i, name in enumerate(LEVELS)}


def states(entries: list[dict], signal=SIGNAL) -> set[str]:
    return set(diagnose(entries, signal))


# ---------------------------------------------------------------- held-out loss


def held_out(*losses: float) -> list[dict]:
    """Losses by check, the same at all levels."""
    return [
        {"step": 100 * (check + 1), "held_out_loss": loss} | {f"held_out_loss/{name}": loss for name in LEVELS}
        for check, loss in enumerate(losses)
    ]


@pytest.mark.parametrize(
    ("losses", "rises"),
    [
        ((1.0, 0.5, 0.52, 0.53), True),
        ((1.0, 0.5, 0.52, 0.505), False),  # the last is back within 2 %
        ((1.0, 0.5, 0.505, 0.53), False),  # only the last is above
        ((0.5, 0.53), False),  # one check after the lowest
        ((1.0, 0.9, 0.8, 0.7), False),
        ((0.5, 0.52, 0.53, 0.49), False),
    ],
    ids=str,
)
def test_a_held_out_loss_rises_where_two_checks_lie_above_the_lowest(losses, rises):
    assert states(held_out(*losses)) == ({"Held-out loss rises"} if rises else set())


@pytest.mark.parametrize(("outweigh", "rises"), [(5.1, True), (4.9, False)])
def test_rising_levels_must_outweigh_falling_ones(outweigh, rises):
    entries = held_out(1.0, 1.05, 1.1)
    for entry in entries[1:]:
        entry["held_out_loss/t_00%"] = 1 + 0.2 * outweigh
        entry["held_out_loss/t_90%"] = 0.8
        entry |= {f"held_out_loss/{name}": 1.0 for name in LEVELS[1:-1]}
    assert bool(states(entries)) == rises


def test_the_sentence_names_rise_step_flag_and_heading():
    (told,) = diagnose(held_out(1.0, 0.5, 0.55, 0.6), SIGNAL).values()
    assert "risen by 20% since step 200" in told and "--flip" in told
    assert told.endswith(f'See "Held-out loss rises" in {PAGE}.')


# ---------------------------------------------------------------- noise levels


def curves(stuck: dict[str, float], rows: int = 80, fall: float = 0.3, noise: float = 0.005) -> list[dict]:
    """Losses exp(-fall * step / rows * 4) of all levels, but of those that are stuck at a value, with a ripple."""
    entries = []
    for row in range(1, rows + 1):
        ripple = 1 + noise * (-1) ** row
        levels = {name: stuck.get(name, math.exp(-fall * 4 * row / rows)) * ripple for name in LEVELS}
        entries.append(
            {"step": 20 * row, "loss": sum(levels.values()) / len(levels)} | {f"loss/{k}": v for k, v in levels.items()}
        )
    return entries


@pytest.mark.parametrize(("level", "flag"), [("t_30%", "--unet"), ("t_90%", "--prediction_type")])
def test_a_level_that_stays_while_the_others_fall_stalls(level, flag):
    """The mean of exp(-1.2 x) is 0.640 in the second quarter and 0.413 in the second half, by integration."""
    (told,) = diagnose(curves({level: 0.9}), SIGNAL).values()
    assert f"level {level}" in told and "by 36%" in told and flag in told


@pytest.mark.parametrize(
    "entries",
    [
        curves({}),
        curves({"t_30%": 0.9}, fall=0.06),  # the others hardly fall either
        curves({"t_30%": 0.9}, noise=0.4),  # too noisy to tell
        curves({"t_30%": 0.9}, rows=12),  # too few rows in a quarter
        curves(dict.fromkeys(LEVELS[:6], 0.9)),  # most have stopped: the run has converged
        [{"step": 20, "loss": None}],
    ],
    ids=["all fall", "none falls", "noise", "few rows", "most stay", "bad step"],
)
def test_no_level_stalls_where_the_log_does_not_show_it(entries):
    assert states(entries) == set()


def test_a_level_that_has_fallen_before_has_converged():
    entries = curves({"t_30%": 0.5})  # the others fall from 1 to 0.3
    assert states(entries) == {"A noise level stalls"}
    entries[0]["loss/t_30%"] = 1.0  # it has fallen by 0.69, and they by about 0.87, in logarithms
    assert states(entries) == set()


@pytest.mark.parametrize("signal", [0.01, 0.99])
def test_a_level_with_hardly_any_image_or_noise_is_not_judged(signal):
    entries = curves({"t_90%": 0.9})
    assert states(entries) == {"A noise level stalls"}
    assert states(entries, SIGNAL | {"t_90%": signal}) == set()


# ---------------------------------------------------------------- colours


def grids(*gaps: tuple[float, float, float]) -> list[dict]:
    """One entry for each (gap, error, distance of the average); the raw network is off by 0.4."""
    names = ("colour_gap", "colour_gap_error", "colour/average")
    return [{"step": i} | dict(zip(names, gap)) | {"colour/raw": 0.4} for i, gap in enumerate(gaps)]


@pytest.mark.parametrize(
    ("gaps", "flag"),
    [
        ([(0.6, 0.1, 0.9), (0.6, 0.1, 0.9)], "--ema_decay"),
        ([(0.6, 0.1, 0.1), (0.6, 0.1, 0.1)], "--learning_rate"),
        ([(0.6, 0.1, 0.9)], None),
        ([(0.4, 0.1, 0.9), (0.6, 0.1, 0.9)], None),
        ([(0.6, 0.1, 0.9), (0.49, 0.1, 0.9)], None),
        ([(0.6, 0.19, 0.9), (0.6, 0.21, 0.9)], None),
    ],
    ids=str,
)
def test_colours_are_apart_where_two_grids_show_it(gaps, flag):
    told = diagnose(grids(*gaps), SIGNAL)
    assert set(told) == ({"Wrong colours"} if flag else set())
    assert flag is None or flag in told["Wrong colours"]


def image_of(pixels: torch.Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).squeeze(-1).numpy())


@pytest.fixture(scope="module")
def real() -> ImageData:
    """400 RGB images of noise around a brightness of their own: 60 to 180."""
    drawn = torch.Generator().manual_seed(0)
    brightness = torch.linspace(60, 180, 400).view(-1, 1, 1, 1)
    pixels = brightness + 20 * torch.randn(400, 3, 8, 8, generator=drawn)
    return ImageData(pixels.round().clamp(0, 255).to(torch.uint8), torch.arange(400))


def test_a_shift_of_one_channel_is_measured_in_deviations_of_the_images(real):
    data, held_out = real.hold_out(100, 0)
    pixels = held_out.take(torch.arange(16))[0]
    shifted = pixels.clone()
    shifted[:, 2] += 24
    measured = Comparison(data, held_out, 0)([image_of(each) for each in pixels], [image_of(each) for each in shifted])
    spread = data.images[data.rows].double().mean((2, 3)).std(0)[2].item()
    assert measured["colour_gap"] == pytest.approx(24 / spread, rel=1e-6)
    assert measured["colour_gap_error"] == pytest.approx(0, abs=1e-9), "each pair is shifted by as much"
    assert abs(measured["colour/raw"] - measured["colour/average"]) == pytest.approx(24 / spread, rel=1e-6)


def test_the_colours_of_many_images_are_taken_in_blocks(real):
    samples = real.take(torch.arange(8))[0]
    with Largest() as largest:
        Comparison(real, real, 0).colours(samples, samples)
    assert largest.numbers == BLOCK * 3 * 8 * 8


# ---------------------------------------------------------------- copies


@pytest.mark.parametrize(("share", "copied"), [(5 / 16, False), (6 / 16, True)])
def test_a_third_of_the_samples_must_be_near(share, copied):
    told = diagnose([{"step": 1, "near_copies": share}], SIGNAL)
    assert set(told) == ({"Copies of training images"} if copied else set())


@pytest.mark.parametrize("holdout", [100, 0])
def test_copies_are_near_and_real_images_are_not(real, holdout):
    """With nothing held out, each training image is compared with all others."""
    training, fresh = real.hold_out(100, 1)
    data, held_out = training.hold_out(holdout, 0)
    compare = Comparison(data, held_out, 0)
    noise = torch.randint(-5, 6, (16, 3, 8, 8), generator=torch.Generator().manual_seed(1))
    copies = (data.take(torch.arange(0, 160, 10))[0] + noise).clamp(0, 255).to(torch.uint8)
    assert compare.copies(copies) == {"near_copies": 1.0}
    assert compare.copies(fresh.take(torch.arange(0, 96, 6))[0])["near_copies"] < 1 / 3
    flat = torch.full((16, 3, 8, 8), 120, dtype=torch.uint8)  # nearer to all images than these to each other
    assert compare.copies(flat) == {"near_copies": 0.0}


def test_where_there_is_nothing_to_compare_with_nothing_is_told(real):
    data, none = real.hold_out(0, 0)
    few = [image_of(each) for each in data.take(torch.arange(9))[0]]
    assert "near_copies" not in Comparison(data, none, 0)(few, few)
    assert Comparison(data, none, 0)(few[:1], few[:1]) == {}
    stream = object()  # what is not in memory is not looked at
    assert Comparison(stream, none, 0)(few, few) == {}


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_samples_of_any_mode_become_pixels(mode):
    image = Image.new(mode, (5, 4), 7 if mode == "L" else tuple(range(1, 1 + len(mode))))
    pixels = to_pixels([image, image])
    assert pixels.shape == (2, len(mode), 4, 5)
    assert pixels[0, :, 0, 0].tolist() == ([7] if mode == "L" else list(range(1, 1 + len(mode))))


# ---------------------------------------------------------------- real runs


@pytest.fixture
def dark(tmp_path) -> str:
    """A folder of 60 dark images. An untrained network draws medium grey."""
    folder = tmp_path / "dark"
    folder.mkdir()
    for i in range(60):
        Image.new("L", (8, 8), 10 + i).save(folder / f"{i}.png")
    return str(folder)


@pytest.mark.slow
def test_an_average_that_is_too_long_is_told_once_and_again_after_a_kill(recipe, dark, capsys):
    average = {"ema_decay": 0.9999, "ema_power": 3.0, "ema_sigma_rel": []}
    shown = {"steps": 60, "sample_every": 20, "save_every": 20, "keep_last": 9, "num_samples": 10}
    config = recipe(data=dark, split="train", prediction_type="v_prediction", **average, **shown)
    run = Run(train(config).parent)
    printed = [line for line in capsys.readouterr().out.splitlines() if "--ema_decay" in line]
    entries = run.read_metrics()
    ((step, (sentence,)),) = told(entries)
    assert printed == [f"step {step}: {sentence}"] and step >= 40, "not before the second grid"
    for later in range(step, 80, 20):
        shutil.rmtree(run.checkpoint(later))
    train(config.replace(resume=True))
    assert told(run.read_metrics()) == [(step, [sentence])]
    assert compared(run.read_metrics()) == compared(entries)


@pytest.mark.slow
def test_a_network_that_learns_its_images_by_heart_is_told(recipe):
    options = {"steps": 900, "sample_every": 90, "save_every": 900, "num_samples": 16, "sample_steps": 20}
    options |= {"num_train_timesteps": 100, "prediction_type": "v_prediction", "ema_decay": 0.99, "ema_sigma_rel": []}
    options |= {"unet": NETWORK | {"block_out_channels": [16, 32]}, "learning_rate": 3e-3, "holdout": 400}
    config = recipe(split="test[:408]", **options)
    train(config)
    sentences = [sentence for _, found in told(Run(config.output_dir).read_metrics()) for sentence in found]
    assert len(sentences) == 2, "each once"
    assert any("by heart" in sentence for sentence in sentences)
    assert any("Copies of training images" in sentence for sentence in sentences)


def told(entries: list[dict]) -> list[tuple[int, list[str]]]:
    return [(entry["step"], entry["diagnosis"]) for entry in entries if "diagnosis" in entry]


def compared(entries: list[dict]) -> list[dict]:
    return [entry for entry in entries if "colour_gap" in entry]


def test_most_of_the_image_is_seen_at_the_first_level_and_hardly_any_at_the_last():
    config = make_recipe(Path("none"), num_train_timesteps=1000)
    signal = mean_signal(Objective(make_scheduler(config)))
    assert list(signal) == LEVELS
    assert signal["t_00%"] == pytest.approx(1, abs=0.02) and signal["t_90%"] < LEAST_SIGNAL < signal["t_80%"]


def test_the_report_shows_the_sentences(tmp_path):
    run, pictures = Run(tmp_path), []
    for entries in (held_out(1.0, 0.5, 0.6), [*held_out(1.0, 0.5, 0.6), {"step": 300, "diagnosis": ["A sentence."]}]):
        run.metrics.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
        pictures.append(np.asarray(Image.open(write_report(run)).convert("L")))
    corners = [picture[-18:, 10:100] for picture in pictures]
    assert (corners[0] == 255).all() and (corners[1] < 128).any()
