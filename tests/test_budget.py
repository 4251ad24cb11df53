"""A budget becomes a plain config before the first step; a run can be lengthened from where its cool-down began."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import one_sentence
from runs import NETWORK, assert_same, final_state, loss_curve, write_config
from torch.utils.flop_counter import FlopCounterMode

from ddpm_pipe.cli import PRESETS, main
from ddpm_pipe.config import parse
from ddpm_pipe.data.memory import ImageData
from ddpm_pipe.run.checkpoint import Checkpoints
from ddpm_pipe.run.folder import Run
from ddpm_pipe.training import loop, settling
from ddpm_pipe.training.budget import LENGTHS, Budget, lengths, steps_in
from ddpm_pipe.training.config import TrainConfig
from ddpm_pipe.training.loop import train
from ddpm_pipe.training.probe import flops_per_image
from ddpm_pipe.training.recipe import make_unet
from ddpm_pipe.training.sizing import SIZES, choose

# ---------------------------------------------------------------- closed form


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("90s", Budget(seconds=90)),
        ("30min", Budget(seconds=1800)),
        ("2h", Budget(seconds=7200)),
        ("1.5d", Budget(seconds=129_600)),
        ("96img", Budget(images=96)),
        ("200kimg", Budget(images=200_000)),
        ("0.5Mimg", Budget(images=500_000)),
    ],
)
def test_budgets_are_times_or_images(text, budget):
    assert Budget.parse(text) == budget


@pytest.mark.parametrize("text", ["2 weeks", "2", "h", "0h", "-1h", "0.1img", "5mimg", "1h30min", ""])
def test_what_is_no_budget_is_one_sentence(text):
    with one_sentence(f"budget={text!r} must be a time such as 90s, 30min, 2h or 1d, or images such as 200kimg"):
        TrainConfig(data="x", budget=text)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"seconds": 1000, "step": 0.5, "showing": 0.0}, (2000, 10)),
        ({"seconds": 1000, "step": 0.5, "showing": 10.0}, (1800, 10)),  # ten grids are a tenth of the time
        ({"seconds": 1000, "step": 0.5, "showing": 50.0}, (1600, 4)),  # four grids are a fifth of it
        ({"seconds": 1000, "step": 0.5, "showing": 201.0}, (2000, 0)),
        ({"seconds": 1000, "step": 0.5, "showing": 50.0, "sample_every": 100}, (1000, 10)),
        ({"seconds": 1000, "step": 0.5, "showing": 50.0, "sample_every": 0}, (2000, 0)),
        ({"seconds": 1, "step": 5.0, "showing": 0.0}, (1, 10)),
    ],
)
def test_steps_and_grids_fill_a_time(options, expected):
    assert steps_in(**options) == expected


def test_lengths_follow_from_the_steps():
    chosen = lengths(4000, grids=8)
    assert chosen["lr_warmup_steps"] == chosen["save_every"] == 200
    assert chosen["sample_every"] == 500
    assert 1 / (1 - chosen["ema_decay"]) == pytest.approx(200)
    longest = lengths(10**6, grids=0)
    assert (longest["lr_warmup_steps"], longest["ema_decay"], longest["sample_every"]) == (5000, 0.9999, 0)
    assert set(chosen) <= LENGTHS
    for steps in (1, 7, 95):
        TrainConfig(data="x", **lengths(steps))
        assert math.ceil(steps / lengths(steps)["sample_every"]) <= 10


# ---------------------------------------------------------------- what wins


def test_a_budget_on_the_command_line_replaces_the_lengths_of_a_preset(tmp_path):
    file = str(PRESETS["fashion_mnist"])
    config = parse(TrainConfig, [file, "--budget", "2h", "--save_every", "7"], data="x")
    assert config.undecided() == LENGTHS - {"save_every"}
    assert (config.save_every, config.batch_size, config.guidance_scale) == (7, 16, 2.0)
    (tmp_path / "c.yaml").write_text("data: x\nbudget: 2h\nlr_warmup_steps: 3\n")
    assert parse(TrainConfig, [str(tmp_path / "c.yaml"), "--steps", "5"]).budget is None
    longer = parse(TrainConfig, [str(tmp_path / "c.yaml"), "--budget", "4h"])
    assert (longer.budget, longer.lr_warmup_steps) == ("4h", 3), "what a file with a budget names is kept"


@pytest.mark.parametrize("way", ["python", "file", "flags"])
def test_a_budget_and_steps_contradict_each_other(tmp_path, way):
    (tmp_path / "c.yaml").write_text("data: x\nbudget: 2h\nsteps: 5\n")
    with one_sentence("budget='2h' and steps=5 contradict each other; give one of them."):
        if way == "python":
            TrainConfig(data="x", budget="2h").replace(steps=5)
        elif way == "file":
            parse(TrainConfig, [str(tmp_path / "c.yaml")])
        else:
            parse(TrainConfig, ["--data", "x", "--budget", "2h", "--steps", "5"])


def test_a_config_with_a_budget_is_read_back(tmp_path):
    config = TrainConfig(data="x", budget="2h", batch_size=8, save_every=3)
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    again = parse(TrainConfig, [str(tmp_path / "c.yaml")])
    assert again == config and again.undecided() == config.undecided() and "unet" in again.undecided()


def test_pushes_keep_their_interval():
    config = TrainConfig(data="x", unet=NETWORK, budget="2h", push_to="a/b", save_every=50, push_every=100)
    assert config.replace(push_every=10_000, save_every=5_000).undecided() == LENGTHS - {"save_every"}
    assert "save_every" not in TrainConfig(data="x", budget="2h", push_to="a/b", push_every=10_000).undecided()


# ---------------------------------------------------------------- the table of sizes


def test_the_smallest_row_is_the_preset_of_small_pictures():
    preset = parse(TrainConfig, [str(PRESETS["fashion_mnist"])], data="x")
    values, _ = choose((1, 28, 28), 9500, 1, lambda _: 16_000)
    assert values["unet"].pop("dropout") == 0
    (name,) = preset.unet.keys() - values["unet"].keys() - {"norm_num_groups"}
    assert name == "_class_name" and preset.unet["norm_num_groups"] == 8
    assert values["unet"].items() <= preset.unet.items()
    assert not values["flip"]
    assert all(values[name] == getattr(preset, name) for name in values if name != "unet")


@pytest.mark.parametrize("size", [1, 13, 28, 100, 256])
@pytest.mark.parametrize("row", SIZES)
def test_every_row_makes_a_network_for_every_size(size, row):
    values = row.values((3, size, 2 * size), parts=3)
    assert values["batch_size"] % 3 == 0 and values["batch_size"] - row.batch_size < 3
    config = TrainConfig(data="x", **values)
    data = ImageData(torch.zeros(2, 3, size, 2 * size, dtype=torch.uint8), torch.arange(2))
    assert flops_per_image(config, data) > 0


def test_a_larger_network_is_taken_where_the_budget_is_worth_it():
    def width(images: float) -> int:
        values, shown = choose((3, 32, 32), 50_000, 1, lambda _: images)
        assert shown == images
        return values["unet"]["block_out_channels"][0]

    assert [width(images) for images in (1e4, 2e6, 9e6, 1e7)] == [32, 64, 64, 128]
    costs = {32: 1.0, 64: 10.0, 128: 100.0}
    values, _ = choose((3, 32, 32), None, 1, lambda row: 2.1e7 / costs[row["unet"]["block_out_channels"][0]])
    assert values["unet"]["block_out_channels"] == [64, 128, 256], "a slower network shows fewer images"


@pytest.mark.parametrize(("count", "often"), [(10_000, True), (10_001, False), (None, False)])
def test_images_shown_often_are_mirrored_and_the_network_drops_out(count, often):
    values, _ = choose((3, 32, 32), count, 1, lambda _: 1e6)
    assert (values["flip"], values["unet"]["dropout"] > 0) == (often, often)


def test_operations_are_counted_without_computing(recipe):
    config = recipe(class_conditional=True)
    data = ImageData(
        torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.arange(2), labels=torch.zeros(2), class_names=("a", "b")
    )
    inputs = torch.zeros(1, 1, 8, 8), torch.zeros(1)
    with FlopCounterMode(display=False) as counter:
        make_unet(config, data)(*inputs, class_labels=torch.zeros(1, dtype=torch.long)).sample.sum().backward()
    assert flops_per_image(config, data) == counter.get_total_flops()


# ---------------------------------------------------------------- runs with a budget


@pytest.fixture
def budgeted(recipe):
    """The small recipe with a budget in the place of its lengths."""

    def make(folder: str, budget: str, **options) -> TrainConfig:
        plain = recipe(folder, **options)
        kept = plain.model_fields_set - (LENGTHS - options.keys())
        return TrainConfig(**{name: getattr(plain, name) for name in kept}, budget=budget)

    return make


def written(config: TrainConfig) -> dict:
    return Run(config.output_dir).read_config()


def test_a_budget_of_images_is_resolved_into_plain_numbers(budgeted, recipe, capsys):
    config = budgeted("budget", "320img", log_every=4, sample_every=40)
    train(config)
    values = written(config)
    expected = lengths(40) | {"sample_every": 40}
    assert {name: values[name] for name in expected} == expected and values["budget"] is None
    assert loss_curve(config)[-1][0] == 40
    (told,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("budget ")]
    assert told.startswith("budget 320img, with 8 images a step: steps=40, lr_schedule=warmup_stable_decay, ")
    again = TrainConfig(**values | {"output_dir": str(Path(config.output_dir).with_name("again"))})
    train(again)
    assert_same(final_state(config), final_state(again))


def test_a_budget_of_time_is_measured_and_leaves_no_trace(budgeted):
    unet = NETWORK | {"dropout": 0.2, "self_condition": True}
    config = budgeted(
        "budget", "2s", unet=unet, class_conditional=True, holdout=10, gradient_accumulation_steps=2, save_every=50
    )
    train(config)
    values, plan = written(config), Run(config.output_dir).read_plan()
    assert values["budget"] is None and plan["budget"] == "2s"
    measured = plan["measured"]
    every = values["sample_every"]
    grids = math.ceil(values["steps"] / every) if every else 0
    seconds = values["steps"] * measured["step_seconds"] + grids * measured["showing_seconds"]
    assert seconds <= 2 < seconds + measured["step_seconds"] + 10 * measured["showing_seconds"]
    assert measured["flops"] > 0 and measured["peak_memory"] > 2**20
    again = TrainConfig(**values | {"output_dir": str(Path(config.output_dir).with_name("again"))})
    train(again)
    assert_same(final_state(config), final_state(again))


@pytest.mark.parametrize("sampling", ["uniform", "loss_second_moment"])
def test_a_run_that_is_measured_first_is_the_same_run(recipe, monkeypatch, sampling):
    unet = NETWORK | {"dropout": 0.2, "self_condition": True}
    options = {"unet": unet, "class_conditional": True, "flip": True, "timestep_sampling": sampling, "holdout": 5}
    plain, measured = recipe("plain", **options), recipe("measured", **options)
    train(plain)
    monkeypatch.setattr(settling, "WORTH_A_PROBE", 1)
    train(measured)
    plans = [Run(config.output_dir).read_plan() for config in (plain, measured)]
    assert plans[0]["measured"] is None and plans[1]["measured"]["step_seconds"] > 0
    assert " expected" in plans[1]["compute"] and " expected" not in plans[0]["compute"]
    assert_same(final_state(plain), final_state(measured))
    grids = [Run(config.output_dir).grids(6)["raw"].read_bytes() for config in (plain, measured)]
    assert grids[0] == grids[1]


@pytest.mark.parametrize("budget", ["160img", "1s"])
def test_a_resumed_run_keeps_the_numbers_of_its_budget(budgeted, budget):
    config = budgeted("run", budget, save_every=19, sample_every=0)
    train(config)
    whole, values = final_state(config), written(config)
    run = Run(config.output_dir)
    shutil.rmtree(run.checkpoint(Checkpoints(run).steps()[-1]))
    assert Checkpoints(run).steps()
    train(config.replace(resume=True))
    assert written(config) == values
    assert_same(whole, final_state(config))
    train(TrainConfig(**values | {"resume": True}))
    assert written(config) == values and run.read_plan()["budget"] == budget


def test_a_larger_budget_goes_on_from_the_cooldown(budgeted, recipe, capsys):
    config = budgeted("run", "160img", log_every=1, save_every=10, sample_every=20)
    train(config)
    values = written(config)
    train(config.replace(resume=True, budget="320img"))
    told = capsys.readouterr().out
    assert "the run is lengthened from step 16; the cool-down of steps 17 to 20 is thrown away.\n" in told
    assert written(config) == values | {"steps": 40}, "the rest is as the run was started"
    whole = TrainConfig(**values | {"steps": 40, "output_dir": str(Path(config.output_dir).with_name("whole"))})
    train(whole)
    assert_same(final_state(whole), final_state(config))
    assert loss_curve(whole) == loss_curve(config)


def test_the_table_chooses_what_is_not_given(budgeted, few_images, capsys):
    options = {"data": few_images, "batch_size": 4, "resolution": [8], "sample_every": 0, "num_train_timesteps": 20}
    options |= {"mixed_precision": "no", "tracker": "none", "sample_steps": 2}
    config = TrainConfig(output_dir=budgeted("run", "1s").output_dir, budget="20img", **options)
    train(config)
    values = written(config)
    assert values["unet"]["block_out_channels"] == [32] and values["learning_rate"] == 2e-3
    assert (values["batch_size"], values["steps"], values["prediction_type"]) == (4, 5, "v_prediction")
    (told,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("recipe for about 20 images")]
    assert "learning_rate=0.002" in told and "batch_size" not in told
    train(config.replace(resume=True))
    assert written(config) == values


@pytest.mark.slow
@pytest.mark.parametrize("given", [[], ["--sample_every", "0"]])
def test_two_processes_agree_on_the_steps_of_a_time(lives, few_images, recipe, given):
    config = recipe("two", data=few_images, log_every=1, num_samples=2)
    main_life = lives.complete(write_config(config), "--budget", "1s", "--save_every", "50", *given, processes=2)
    assert "2 processes x 1 accumulation steps" in main_life.output
    steps = written(config)["steps"]
    assert Checkpoints(Run(config.output_dir)).steps()[-1] == steps == loss_curve(config)[-1][0]
    one = TrainConfig(**written(config) | {"output_dir": config.output_dir + "-one", "steps": min(steps, 6)})
    train(one)
    first = torch.tensor(loss_curve(one))[:4]
    torch.testing.assert_close(first, torch.tensor(loss_curve(config))[:4], rtol=1e-3, atol=1e-4)


def test_a_plan_is_printed_and_nothing_is_written(recipe, capsys):
    config = recipe()
    main(["train", write_config(config), "--plan"])
    told = capsys.readouterr().out
    assert "6 steps of 8 images" in told and " GFLOPs per image, forward and backward, " in told
    assert " epochs, " in told and " s per step and " in told and " expected, peak memory " in told
    assert not Path(config.output_dir).exists()
    train(config)
    before = {path: path.read_bytes() for path in Path(config.output_dir).rglob("*") if path.is_file()}
    main(["train", write_config(config), "--plan", "--budget", "1s", "--resume"])
    assert "budget 1s, with " in capsys.readouterr().out
    main(["train", write_config(config), "--plan", "--overwrite"])
    assert {path: path.read_bytes() for path in Path(config.output_dir).rglob("*") if path.is_file()} == before


# ---------------------------------------------------------------- lengthening

STABLE = {"lr_schedule": "warmup_stable_decay", "lr_cooldown": 0.4, "lr_warmup_steps": 2, "log_every": 1}


def test_a_lengthened_run_is_the_run_that_had_the_longer_length_from_the_start(recipe, capsys):
    short, long = recipe("short", steps=10, **STABLE), recipe("long", steps=20, **STABLE)
    train(short)
    assert Checkpoints(Run(short.output_dir)).steps() == [6, 10]
    train(long)
    capsys.readouterr()
    train(short.replace(resume=True, steps=20))
    told = capsys.readouterr().out
    assert "the run is lengthened from step 6; the cool-down of steps 7 to 10 is thrown away.\n" in told
    assert Run.steps(Run(short.output_dir).snapshots) == [20], "no average mixes weights that were thrown away"
    assert_same(final_state(long), final_state(short))
    assert_same(final_state(long, 12), final_state(short, 12))
    assert loss_curve(long) == loss_curve(short)


def test_the_start_of_the_cooldown_outlives_later_checkpoints(recipe):
    config = recipe(steps=10, save_every=1, keep_last=1, **STABLE)
    train(config)
    assert Checkpoints(Run(config.output_dir)).steps() == [6, 10]


def test_a_cooldown_that_was_interrupted_is_resumed(recipe):
    config = recipe(steps=10, save_every=2, **STABLE)
    train(config)
    whole = final_state(config)
    shutil.rmtree(Run(config.output_dir).checkpoint(10))
    train(config.replace(resume=True))
    assert_same(whole, final_state(config))


def test_a_run_that_has_not_cooled_yet_is_lengthened_from_its_newest_checkpoint(recipe, capsys):
    config = recipe(steps=10, save_every=2, keep_last=9, **STABLE)
    train(config)
    for step in (6, 8, 10):
        shutil.rmtree(Run(config.output_dir).checkpoint(step))
    capsys.readouterr()
    train(config.replace(resume=True, steps=20))
    assert "thrown away" not in capsys.readouterr().out
    assert loss_curve(config)[-1][0] == 20


def test_lengthening_that_was_killed_at_once_never_goes_on_from_the_cooled_end(recipe, monkeypatch):
    short, long = recipe("short", steps=10, **STABLE), recipe("long", steps=20, **STABLE)
    train(short)
    train(long)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "Log", killed)
        train(short.replace(resume=True, steps=20))
    assert yaml.safe_load(Run(short.output_dir).config.read_text())["steps"] == 20
    train(short.replace(resume=True, steps=20))
    assert_same(final_state(long), final_state(short))


def test_without_the_start_of_its_cooldown_a_run_is_not_lengthened(recipe):
    config = recipe(steps=10, **STABLE)
    train(config)
    shutil.rmtree(Run(config.output_dir).checkpoint(6))
    with one_sentence("holds no checkpoint of step 6 or before to go on from."):
        train(config.replace(resume=True, steps=20))
    assert Checkpoints(Run(config.output_dir)).steps() == [10] and written(config)["steps"] == 10


def test_the_plan_is_json(recipe):
    config = recipe(steps=1)
    train(config)
    plan = json.loads(Run(config.output_dir).plan.read_text())
    assert plan["reasons"] == [] and plan["budget"] is None and plan["compute"].endswith(" epochs")
