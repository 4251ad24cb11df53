"""Power-function averages of the weights, and those of other widths rebuilt from their snapshots."""

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import one_sentence
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import make_recipe
from safetensors.torch import load_file, save_file
from scipy.integrate import quad
from torch import nn

from ddpm_pipe import DDPMPipeline
from ddpm_pipe.run.folder import Run
from ddpm_pipe.training import posthoc
from ddpm_pipe.training.config import AverageConfig, TrainConfig
from ddpm_pipe.training.ema import EMA, posthoc_coefficients, power_decay, power_exponent, profile_products
from ddpm_pipe.training.loop import train
from ddpm_pipe.training.posthoc import reconstruct

reliable = settings(deadline=None, derandomize=True, database=None)
FLAT = 12**-0.5  # the widest profile
TRACKED = (0.05, 0.1)


def snapshots(every: int, total: int, widths: tuple[float, ...] = TRACKED) -> list[tuple[int, float]]:
    return [(step, width) for step in range(every, total + 1, every) for width in widths]


def profile(u: float, step: float, gamma: float) -> float:
    return (gamma + 1) * u**gamma / step ** (gamma + 1)


# ---------------------------------------------------------------- one profile


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94), (FLAT, 0.0)])
def test_exponents_are_the_published_ones(sigma_rel, gamma):
    """Karras et al. 2024, section 3.1; the flat profile is the uniform distribution."""
    assert power_exponent(sigma_rel) == pytest.approx(gamma, abs=0.005)


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.15, 0.2, 0.28, FLAT])
def test_the_width_is_the_standard_deviation_of_the_profile(sigma_rel):
    gamma = power_exponent(sigma_rel)
    moments = [quad(lambda u, n=n: u**n * profile(u, 1, gamma), 0, 1, points=[0.9])[0] for n in range(3)]
    assert moments[0] == pytest.approx(1)
    assert (moments[2] - moments[1] ** 2) ** 0.5 == pytest.approx(sigma_rel, rel=1e-6)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.29, 1.0, float("nan"), float("inf")])
def test_a_width_that_no_profile_has_is_one_sentence(sigma_rel):
    with one_sentence(match=rf"^sigma_rel={sigma_rel} must lie in \(0, 0\.2887\]\.$"):
        power_exponent(sigma_rel)


@pytest.mark.parametrize("sigma_rel", [0.03, 0.1, 0.2])
def test_update_k_of_t_has_the_weight_of_its_slice_of_the_profile(sigma_rel):
    updates, gamma = 50, power_exponent(sigma_rel)
    weights = np.zeros(updates)
    for step in range(updates):
        decay = power_decay(step, sigma_rel)
        weights *= decay
        weights[step] = 1 - decay
    edges = np.arange(updates + 1) / updates
    np.testing.assert_allclose(weights, np.diff(edges ** (gamma + 1)), rtol=1e-9, atol=1e-300)


@pytest.mark.parametrize("sigma_rel", [0.03, 0.1, 0.2])
def test_the_unrolled_weights_get_the_width_as_their_relative_deviation(sigma_rel):
    """The slices are 1/t wide: the error falls with t."""
    errors = []
    for updates in (100, 1000):
        decays = np.array([power_decay(step, sigma_rel) for step in range(updates)])
        weights = (1 - decays) * np.append(np.cumprod(decays[:0:-1])[::-1], 1)
        at = np.arange(1, updates + 1) / updates
        deviation = (weights @ at**2 - (weights @ at) ** 2) ** 0.5
        errors.append(abs(deviation / sigma_rel - 1))
    assert errors[1] < 2e-3
    assert errors[1] < errors[0]


def test_the_first_update_copies_the_weights():
    assert power_decay(0, 0.1) == 0


# ---------------------------------------------------------------- mixing profiles

ends, gammas = st.floats(1, 1e3), st.floats(0, 40)


@reliable
@given(ends, gammas, ends, gammas)
def test_products_are_integrals(step_a, gamma_a, step_b, gamma_b):
    ours = profile_products(*(np.array([value]) for value in (step_a, gamma_a, step_b, gamma_b)))[0, 0]
    end = min(step_a, step_b)
    integral, error = quad(
        lambda v: end * profile(v * end, step_a, gamma_a) * profile(v * end, step_b, gamma_b), 0, 1, points=[0.5, 0.9]
    )
    assert ours == pytest.approx(integral, rel=1e-6, abs=10 * error)


def test_products_are_all_of_a_with_all_of_b():
    steps_a, gammas_a = np.array([10.0, 20.0, 30.0]), np.array([1.0, 2.0, 3.0])
    steps_b, gammas_b = np.array([15.0, 25.0]), np.array([0.0, 5.0])
    table = profile_products(steps_a, gammas_a, steps_b, gammas_b)
    assert table.shape == (3, 2)
    for i, j in np.ndindex(3, 2):
        one = profile_products(steps_a[[i]], gammas_a[[i]], steps_b[[j]], gammas_b[[j]])
        assert table[i, j] == pytest.approx(one.item())


@pytest.mark.parametrize("step", [100, 60])
@pytest.mark.parametrize("sigma_rel", TRACKED)
def test_a_stored_profile_is_taken_as_it_is(sigma_rel, step):
    stored = snapshots(20, step)
    coefficients, error = posthoc_coefficients(stored, step, sigma_rel)
    np.testing.assert_allclose(coefficients, [float(snapshot == (step, sigma_rel)) for snapshot in stored], atol=1e-6)
    assert error < 1e-6


@pytest.mark.parametrize("sigma_rel", [0.03, 0.07, 0.15, 0.2])
def test_the_error_is_the_distance_of_the_mixed_profile(sigma_rel):
    stored = snapshots(20, 100)
    coefficients, error = posthoc_coefficients(stored, 100, sigma_rel)
    u = (np.arange(200_000) + 0.5) / 2_000  # in [0, 100]
    mixed = sum(c * np.where(u < s, profile(u, s, power_exponent(w)), 0) for c, (s, w) in zip(coefficients, stored))
    wanted = profile(u, 100, power_exponent(sigma_rel))
    assert np.linalg.norm(mixed - wanted) / np.linalg.norm(wanted) == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("sigma_rel", [0.03, 0.07, 0.15, 0.2])
def test_no_other_mixture_is_nearer(sigma_rel):
    """At a minimum, what is left over is orthogonal to each stored profile, or to those mixtures that sum to 0."""
    stored, target = snapshots(20, 100), (np.array([100.0]), np.array([power_exponent(sigma_rel)]))
    coefficients, _ = posthoc_coefficients(stored, 100, sigma_rel)
    steps, exponents = np.array([s for s, _ in stored]) * 1.0, np.array([power_exponent(w) for _, w in stored])
    products = profile_products(steps, exponents, *target)[:, 0]
    left_over = products - profile_products(steps, exponents, steps, exponents) @ coefficients
    assert np.ptp(left_over) < 1e-6 * products.max()


@pytest.mark.parametrize(
    ("sigma_rel", "few", "many"), [(0.03, 0.2, 0.008), (0.07, 0.05, 0.001), (0.15, 0.25, 0.002), (0.2, 0.5, 0.005)]
)
def test_errors_fall_with_the_number_of_snapshots(sigma_rel, few, many):
    """Bounds for 2 and for 40 snapshots of both widths."""
    errors = [posthoc_coefficients(snapshots(400 // n, 400), 400, sigma_rel)[1] for n in (2, 4, 8, 20, 40)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < few and errors[-1] < many


@pytest.mark.parametrize("count", [1, 10])
@pytest.mark.parametrize("sigma_rel", [0.15, FLAT])
def test_weights_that_never_moved_come_back_as_they_were(sigma_rel, count):
    """As frozen ones (random Fourier features): the coefficients sum to 1 however far the profile is off."""
    coefficients, _ = posthoc_coefficients(snapshots(400 // count, 400), 400, sigma_rel)
    assert coefficients.sum() == pytest.approx(1, abs=1e-6)


@pytest.fixture(scope="module")
def random_walk():
    """Averages of a small module after a walk of 400 steps: snapshots of both widths, and all widths at the end."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(16, 16)
    torch.nn.init.normal_(model.weight, generator=generator)
    widths = (*TRACKED, 0.03, 0.07, 0.15, 0.2)
    averages, stored = {width: EMA(model, partial(power_decay, sigma_rel=width)) for width in widths}, {}
    for step in range(400):
        with torch.no_grad():
            model.weight.add_(torch.randn(16, 16, generator=generator) / 20)  # in all, as far as the start from 0
        for tracked in averages.values():
            tracked.update(step)
        if (step + 1) % 20 == 0:
            stored |= {(step + 1, width): averages[width].module.weight.double().clone() for width in TRACKED}
    return stored, {width: average.module.weight.double() for width, average in averages.items()}


@pytest.mark.parametrize(
    ("sigma_rel", "bound"), [(0.05, 1e-6), (0.1, 1e-6), (0.03, 2e-3), (0.07, 2e-4), (0.15, 5e-4), (0.2, 3e-3)]
)
def test_a_rebuilt_average_of_a_random_walk_is_the_one_tracked(random_walk, sigma_rel, bound):
    """From 20 snapshots of both widths; the nearest average that was tracked is 3 % to 16 % off."""
    stored, tracked = random_walk
    coefficients, _ = posthoc_coefficients(list(stored), 400, sigma_rel)
    rebuilt = sum(coefficient * weight for coefficient, weight in zip(coefficients, stored.values(), strict=True))
    assert (rebuilt - tracked[sigma_rel]).norm() / tracked[sigma_rel].norm() < bound


# ---------------------------------------------------------------- a real run


def make_run(folder: Path, **options) -> Path:
    """A run of 40 steps with ten snapshots of each width."""
    defaults = {"steps": 40, "learning_rate": 4e-3, "sample_every": 0, "save_every": 4, "ema_sigma_rel": list(TRACKED)}
    train(make_recipe(folder, **(defaults | options)))
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder


def last(run: Path, name: str) -> dict[str, torch.Tensor]:
    """Weights of the last checkpoint."""
    return load_file(max((run / "checkpoints").iterdir()) / f"{name}.safetensors")


def distance(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Of all weights together."""
    assert first.keys() == second.keys()
    return sum((first[name] - second[name]).double().square().sum().item() for name in first) ** 0.5


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """One run that tracked both widths, and the same that tracked the third instead."""
    folder = tmp_path_factory.mktemp("runs")
    return SimpleNamespace(
        tracked=make_run(folder / "tracked"),
        third=make_run(folder / "third", ema_sigma_rel=[0.15], save_every=40),
    )


a_real_run = pytest.mark.xdist_group("ema_profiles")


@a_real_run
def test_what_is_tracked_does_not_change_the_run(pair):
    assert distance(last(pair.tracked, "unet"), last(pair.third, "unet")) == 0


@a_real_run
def test_the_command_writes_pipelines_of_tracked_and_other_widths(pair, repo):
    command = [sys.executable, "-m", "ddpm_pipe", "average", "--run", str(pair.tracked), "--sigma-rel", "0.05,0.15"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=repo, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for width in ("0.05", "0.15"):
        assert f"ema-{width}: sigma_rel {width}, error of its profile" in done.stdout
        pipeline = DDPMPipeline.from_pretrained(pair.tracked / f"ema-{width}")
        pipeline.set_progress_bar_config(disable=True)
        images = pipeline(2, torch.Generator().manual_seed(0), output_type="pt").images
        assert images.shape == (2, 1, 8, 8) and images.isfinite().all()
        assert distance(pipeline.unet.state_dict(), reconstruct(Run(pair.tracked), float(width))[0]) == 0
    assert "sigma_rel 0.05, error of its profile 0.00%" in done.stdout


@a_real_run
def test_averages_are_compared_on_the_held_out_images_of_the_run(tmp_path, capsys):
    run = Run(make_run(tmp_path / "run", holdout=20, sample_every=40))
    widths = {0.05: run.average(0.05), 0.1: run.average(0.1), 0.25: run.average(0.25)}
    posthoc.average(AverageConfig(run=str(run), sigma_rel=list(widths)))
    told = capsys.readouterr().out
    losses = posthoc.held_out_losses(run, [run.pipeline, *widths.values()])
    measured = [entry["held_out_loss"] for entry in run.read_metrics() if "held_out_loss" in entry]
    assert losses[run.pipeline] == pytest.approx(measured[-1], rel=1e-6)  # as the run measured its own average
    assert len(set(losses.values())) == 4 and all(f"{place}: loss {loss:.5f}" in told for place, loss in losses.items())
    best = min(losses, key=losses.__getitem__)
    assert f"{best.name} has the least loss; share it with `ddpm-pipe push --run {run} --pipeline {best.name}`." in told


@a_real_run
def test_averages_are_written_though_the_images_are_gone(tmp_path, few_images, capsys):
    data = tmp_path / "images"
    shutil.copytree(few_images, data)
    run = Run(make_run(tmp_path / "run", data=str(data), holdout=20))
    shutil.rmtree(data)
    (folder,) = posthoc.average(AverageConfig(run=str(run), sigma_rel=[0.05]))
    assert DDPMPipeline.from_pretrained(folder)
    assert "the averages are written, but were not compared on held-out images: data=" in capsys.readouterr().out


@a_real_run
@pytest.mark.parametrize("width", TRACKED)
def test_a_tracked_average_comes_back(pair, width):
    rebuilt, tracked = reconstruct(Run(pair.tracked), width)[0], last(pair.tracked, f"ema-{width}")
    for name in tracked:
        torch.testing.assert_close(rebuilt[name], tracked[name], rtol=1e-6, atol=1e-7)


@a_real_run
def test_an_average_that_ends_earlier_is_made_of_earlier_snapshots(pair):
    rebuilt, _ = reconstruct(Run(pair.tracked), 0.1, step=20)
    stored = load_file(pair.tracked / "ema" / "step-00000020" / "0.1.safetensors")
    assert distance(rebuilt, stored) < 1e-6 * distance(stored, {name: 0 * tensor for name, tensor in stored.items()})
    assert distance(rebuilt, last(pair.tracked, "ema-0.1")) > 0.1


@a_real_run
def test_an_average_that_was_not_tracked_is_near_the_one_that_would_have_been(pair):
    """Within 0.02 % of all weights, and 2 % of the way to the nearest one that was tracked."""
    rebuilt, direct = reconstruct(Run(pair.tracked), 0.15)[0], last(pair.third, "ema-0.15")
    error = distance(rebuilt, direct)
    assert error < 2e-4 * distance(direct, {name: 0 * tensor for name, tensor in direct.items()})
    assert error < 0.02 * distance(last(pair.tracked, "ema-0.1"), direct)


def test_a_run_averages_its_weights_with_those_of_the_profile(tmp_path):
    """Update k of 3 has the weight (k/3)^(gamma + 1) - ((k - 1)/3)^(gamma + 1)."""
    run = make_run(tmp_path / "run", steps=3, save_every=1, keep_last=3, ema_sigma_rel=[0.2])
    raw = [load_file(folder / "unet.safetensors") for folder in sorted((run / "checkpoints").iterdir())]
    weights = np.diff((np.arange(4) / 3) ** (power_exponent(0.2) + 1))
    for name, tensor in last(run, "ema-0.2").items():
        expected = sum(weight * step[name] for weight, step in zip(weights, raw, strict=True))
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("every", "expected"), [(2, [2, 4, 6]), (4, [4, 6]), (None, [3, 6])])
def test_snapshots_are_taken_when_the_config_says(tmp_path, every, expected):
    """And at the end; also between checkpoints."""
    run = make_run(tmp_path / "run", steps=6, save_every=3, ema_snapshot_every=every)
    assert Run.steps(run / "ema") == expected


# ---------------------------------------------------------------- what cannot work


def refuses(run: Path, *parts: str, **options):
    """Averages of this run are refused in one sentence with these parts."""
    with one_sentence(*parts):
        posthoc.average(AverageConfig(run=str(run), **options))


@pytest.fixture
def stored(tmp_path):
    """A folder with snapshots of steps 2 and 4."""
    for step in (2, 4):
        folder = tmp_path / "ema" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        save_file({"weight": torch.ones(1)}, folder / "0.1.safetensors")
    return tmp_path


@pytest.mark.parametrize("text", ["", "wide", "0.05;0.1", "0.05,", "0.05 0.1", "0.3", "0", "-0.1", "nan"])
def test_a_width_that_cannot_be_is_one_sentence(stored, text):
    refuses(stored, "sigma_rel=", sigma_rel=text)


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_step_without_a_snapshot_names_those_that_have_one(stored, step):
    refuses(stored, f"step={step} has no snapshot; there are snapshots at 2, 4.", sigma_rel="0.1", step=step)


@pytest.mark.parametrize("folder", ["run", "nowhere"])
def test_a_run_without_snapshots_is_one_sentence(tmp_path, folder):
    (tmp_path / "run" / "ema").mkdir(parents=True)
    run = tmp_path / folder
    refuses(run, f"run='{run}' has no snapshots in {run / 'ema'}; train with ema_sigma_rel set.", sigma_rel="0.1")


def test_snapshots_without_a_pipeline_are_one_sentence(stored):
    refuses(stored, f"run='{stored}' has no pipeline", sigma_rel="0.1")


@pytest.mark.parametrize("width", [0.0, 0.3])
def test_training_refuses_a_width_that_no_profile_has(width):
    with one_sentence(f"ema_sigma_rel={width} must be"):
        TrainConfig(data="x", ema_sigma_rel=[0.05, width])


@a_real_run
def test_weights_that_are_not_finite_are_refused_and_what_was_written_stays(pair, tmp_path):
    run = shutil.copytree(pair.tracked, tmp_path / "run")
    (written,) = posthoc.average(AverageConfig(run=str(run), sigma_rel="0.1"))
    before = load_file(written / "unet" / "diffusion_pytorch_model.safetensors")
    bad = run / "ema" / "step-00000040" / "0.05.safetensors"
    save_file({name: torch.full_like(tensor, float("nan")) for name, tensor in load_file(bad).items()}, bad)
    (bad.parent / "manifest.json").unlink()
    refuses(run, f"the snapshot {bad} holds numbers that are not finite.", sigma_rel="0.1,0.12")
    assert distance(before, load_file(written / "unet" / "diffusion_pytorch_model.safetensors")) == 0
    assert not (run / "ema-0.12").exists()


@a_real_run
@pytest.mark.parametrize("damage", ["a flipped bit", "cut short", "missing", "a damaged manifest"])
def test_a_damaged_snapshot_is_one_sentence_and_nothing_is_written(pair, tmp_path, damage):
    run = shutil.copytree(pair.tracked, tmp_path / "run")
    folder = run / "ema" / "step-00000020"
    content = (folder / "0.05.safetensors").read_bytes()
    if damage == "a flipped bit":
        (folder / "0.05.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "cut short":
        (folder / "0.05.safetensors").write_bytes(content[:-4])
    elif damage == "missing":
        (folder / "0.05.safetensors").unlink()
    else:
        (folder / "manifest.json").write_text("[]")
    refuses(run, str(folder), sigma_rel="0.1")
    assert not (run / "ema-0.1").exists()


@a_real_run
def test_snapshots_of_earlier_versions_have_no_checksums(pair, tmp_path):
    run = shutil.copytree(pair.tracked, tmp_path / "run")
    for manifest in run.glob("ema/*/manifest.json"):
        manifest.unlink()
    assert distance(reconstruct(Run(run), 0.15)[0], reconstruct(Run(pair.tracked), 0.15)[0]) == 0


@a_real_run
def test_a_snapshot_without_checksums_that_cannot_be_read_is_one_sentence(pair, tmp_path):
    run = shutil.copytree(pair.tracked, tmp_path / "run")
    bad = run / "ema" / "step-00000020" / "0.05.safetensors"
    bad.write_bytes(b"short")
    (bad.parent / "manifest.json").unlink()
    refuses(run, f"the snapshot {bad} cannot be read (", sigma_rel="0.1")


@a_real_run
def test_snapshots_of_another_network_are_one_sentence(pair, tmp_path):
    run = shutil.copytree(pair.tracked, tmp_path / "run")
    for path in run.glob("ema/*/*.safetensors"):
        save_file({"weight": torch.ones(1)}, path)
        (path.parent / "manifest.json").unlink(missing_ok=True)
    refuses(run, f"the snapshots in {run / 'ema'} are of another network than {run / 'pipeline'}.", sigma_rel="0.1")
    odd = run / "ema" / "step-00000020" / "0.05.safetensors"
    save_file({"weight": torch.ones(2)}, odd)
    refuses(run, f"the snapshot {odd} is of another network than those before it.", sigma_rel="0.1")


@a_real_run
def test_pipelines_hold_no_path_of_the_machine(pair, tmp_path):
    run = shutil.copytree(pair.tracked, tmp_path / "run")
    (written,) = posthoc.average(AverageConfig(run=str(run), sigma_rel="0.07"))
    for folder in (written, run / "pipeline"):
        texts = {path.name: path.read_text() for path in folder.rglob("*.json")}
        assert {"model_index.json", "config.json", "scheduler_config.json"} <= texts.keys()
        for name, text in texts.items():
            assert "_name_or_path" not in text and str(tmp_path) not in text and str(pair.tracked) not in text, name
