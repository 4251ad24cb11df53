"""Evaluation of a whole model: the JSON, its protocol, sweeps, bits per dimension, and what is refused."""

import json
import math
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from conftest import one_sentence
from feature_network import feature_file  # noqa: F401
from huggingface_hub import ModelCard
from runs import NETWORK, REPO, make_recipe, write_config

from ddpm_pipe import DDPMPipeline
from ddpm_pipe.config import parse
from ddpm_pipe.data.images import to_unit_range
from ddpm_pipe.data.memory import load_images
from ddpm_pipe.data.sources import open_dataset
from ddpm_pipe.evaluation import evaluate as evaluation
from ddpm_pipe.evaluation.bits import denoiser
from ddpm_pipe.evaluation.config import EvaluateConfig
from ddpm_pipe.evaluation.evaluate import evaluate
from ddpm_pipe.evaluation.results import Metric, Point, Results
from ddpm_pipe.likelihood import variational_bound
from ddpm_pipe.run.files import replace_folder
from ddpm_pipe.run.folder import Run
from ddpm_pipe.samplers import Sampler, read_samplers
from ddpm_pipe.sharing.card import make_card

DATA = str(REPO / "examples" / "fashion_mnist")


@pytest.fixture(scope="session")
def split_images(tmp_path_factory) -> str:
    """A folder of 60 of the bundled images to train on and 40 others held out."""
    folder = tmp_path_factory.mktemp("data") / "split"
    images = open_dataset(DATA, "test")
    splits = {"train": images.select(range(60)), "test": images.select(range(60, 100))}
    datasets.DatasetDict(splits).save_to_disk(folder)
    return str(folder)


@pytest.fixture(scope="module")
def run(lives, split_images, tmp_path_factory) -> Path:
    """A finished run of a few steps, with classes and self-conditioning."""
    config = make_recipe(
        tmp_path_factory.mktemp("evaluated") / "run",
        unet=NETWORK | {"self_condition": True},
        data=split_images,
        split="train",
        class_conditional=True,
    )
    lives.complete(write_config(config))
    return Path(config.output_dir)


@pytest.fixture
def measure(run, feature_file, split_images, tmp_path, fresh_accelerate):  # noqa: F811
    """evaluate() with flags as on the command line; what it wrote."""

    def measure(*argv: str, features: str = feature_file) -> dict:
        argv = ("--model", str(run / "pipeline"), "--data", split_images, "--steps", "2", *argv)
        argv += ("--features", features, "--output_dir", str(tmp_path / "out"), "--batch_size", "16")
        return json.loads(evaluate(parse(EvaluateConfig, argv)).read_text())

    return measure


def values(result: dict) -> dict[str, float]:
    return {row["name"]: row["value"] for row in result["metrics"]}


def test_all_metrics_of_the_images_are_written_with_their_protocol(measure, run):
    result = measure("--num_images", "40", "--class_labels", "balanced")
    names = ["FID-40", "KID-40", "IS-40", "precision-40", "recall-40"]
    assert list(values(result)) == [f"{name} of feature_network.pt" for name in names]
    assert all(math.isfinite(value) for value in values(result).values())
    for row in result["metrics"]:
        assert "40 generated and 60 reference images" in row["protocol"]
        assert "DDPMScheduler, 2 steps, classes balanced, seeds 0-39" in row["protocol"]
    (point,) = result["points"]
    assert point["sampling"]["unet_sha256"] and point["sampling"]["steps"] == 2 and point["seconds_per_image"] > 0
    assert result["data"]["train"] == 60 and result["features"]["hash"]


def test_the_same_images_have_the_same_distance_in_other_batches(measure):
    first = values(measure("--num_images", "40"))
    second = values(measure("--num_images", "40", "--batch_size", "7"))
    for name, value in first.items():  # but for the rounding of the network to 8 bits
        assert second[name] == pytest.approx(value, rel=0.02, abs=0.03), name


def test_a_sweep_measures_each_setting_and_draws_it(measure, tmp_path):
    result = measure("--num_images", "20", "--scheduler", "ddim", "--sweep", "steps=2,4", "eta=0,1")
    settings = [point["settings"] for point in result["points"]]
    assert settings == [{"steps": s, "eta": e} for s in (2, 4) for e in (0.0, 1.0)]
    assert [point["sampling"]["steps"] for point in result["points"]] == [2, 2, 4, 4]
    distances = [point["metrics"][0]["value"] for point in result["points"]]
    assert len(set(distances)) == 4 and values(result)["FID-20 of feature_network.pt"] == min(distances)
    assert "eta 1" in result["points"][1]["metrics"][0]["protocol"]
    assert (tmp_path / "out" / "sweep.png").stat().st_size > 10_000


def test_a_sweep_over_models_compares_averages(measure, run, tmp_path):
    other = tmp_path / "ema-0.05"
    pipeline = DDPMPipeline.from_pretrained(run / "pipeline")
    with torch.no_grad():
        pipeline.unet.conv_out.weight.zero_()
    pipeline.save_pretrained(other)
    result = measure("--num_images", "20", "--sweep", f"model={run / 'pipeline'},{other}")
    first, second = (point["metrics"][0]["value"] for point in result["points"])
    assert first != second
    hashes = [point["sampling"]["unet_sha256"] for point in result["points"]]
    assert hashes[0] != hashes[1]


def test_bits_per_dimension_are_the_bound_of_the_held_out_images(measure, run, split_images):
    result = measure("--num_images", "0", "--bits_images", "30", "--bits_terms", "19", "--class_labels", "balanced")
    (row,) = result["metrics"]
    assert list(row) == ["type", "name", "value", "protocol", "standard_error", "terms"]
    assert row["value"] == pytest.approx(sum(row["terms"].values())) and row["standard_error"] > 0
    assert "given their labels" in row["protocol"] and "19 of 19 terms" in row["protocol"]

    data = load_images(split_images, "test", with_labels=True, resolution=[8, 8], channels=1)
    pipeline = DDPMPipeline.from_pretrained(run / "pipeline")
    images, labels = data.take(torch.arange(30))
    totals = []
    for seed in range(4):  # other draws of the noise
        draw = torch.Generator().manual_seed(seed)
        bound = variational_bound(denoiser(pipeline, labels), pipeline.scheduler, to_unit_range(images), 19, draw)
        totals.append(bound.total.mean().item())
    assert min(totals) - 0.2 < row["value"] < max(totals) + 0.2


def test_other_seeds_give_another_distance_and_are_named(measure):
    first, second = (measure("--num_images", "0", "--seeds", seeds)["metrics"][0] for seeds in ("0-19", "20-34,90-94"))
    assert first["name"] == second["name"] == "FID-20 of feature_network.pt"
    assert first["protocol"].endswith("seeds 0-19") and second["protocol"].endswith("seeds 20-34,90-94")
    assert abs(first["value"] - second["value"]) > 1e-3
    counted = measure("--num_images", "20")["metrics"][0]
    assert counted["protocol"] == first["protocol"] and counted["value"] == pytest.approx(first["value"])


def test_neighbours_are_drawn_and_compared_with_those_of_real_images(measure, tmp_path):
    result = measure("--num_images", "20", "--neighbours", "5")
    row = result["metrics"][-1]
    assert row["type"] == "memorisation" and row["value"] > 0 and "5 samples" in row["protocol"]
    assert (tmp_path / "out" / "neighbours.png").exists()


@pytest.fixture
def own_run(run, tmp_path) -> Path:
    """A copy of the run, with an average of other weights beside its pipeline."""
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    pipeline = DDPMPipeline.from_pretrained(copy / "pipeline")
    with torch.no_grad():
        pipeline.unet.conv_out.weight.zero_()
    pipeline.save_pretrained(copy / "ema-0.05")
    return copy


@pytest.fixture
def evaluated(own_run, feature_file, split_images, fresh_accelerate):  # noqa: F811
    """evaluate() of a pipeline of that run, with its results inside; the path of evaluation.json."""

    def evaluated(pipeline: str = "pipeline", *argv: str) -> Path:
        argv = ("--model", str(own_run / pipeline), "--data", split_images, "--steps", "2", "--num_images", "20", *argv)
        return evaluate(parse(EvaluateConfig, [*argv, "--features", feature_file]))

    return evaluated


def shown(run: Path, pipeline: str) -> dict[str, float]:
    """Name and value of the metrics in the metadata of the card."""
    data = ModelCard(str(make_card(Run(run), run / pipeline, "org/mine"))).data
    return {result.metric_name: result.metric_value for result in data.eval_results or []}


def test_the_model_card_shows_what_was_measured(evaluated, own_run):
    file = evaluated()
    assert file == own_run / "pipeline" / "evaluation.json"
    fid = json.loads(file.read_text())["metrics"][0]
    assert shown(own_run, "pipeline")["FID-20 of feature_network.pt"] == pytest.approx(fid["value"])
    assert fid["protocol"] in make_card(Run(own_run), own_run / "pipeline", "org/mine").text


def test_the_card_of_other_weights_shows_none_of_it(evaluated, own_run, capsys):
    file = evaluated()
    assert not shown(own_run, "ema-0.05")
    shutil.copyfile(file, own_run / "ema-0.05" / "evaluation.json")
    assert not shown(own_run, "ema-0.05")
    assert "was measured on other weights than those of" in capsys.readouterr().out
    (own_run / "ema-0.05" / "evaluation.json").unlink()
    file.rename(own_run / "evaluation.json")  # where earlier versions wrote it
    assert shown(own_run, "pipeline") and not shown(own_run, "ema-0.05")


def test_results_go_with_the_weights_when_the_pipeline_is_written_again(evaluated, own_run):
    file = evaluated()
    pipeline = DDPMPipeline.from_pretrained(own_run / "ema-0.05")
    replace_folder(own_run / "pipeline", pipeline.save_pretrained)  # as training does at each checkpoint
    assert not file.exists() and not shown(own_run, "pipeline")


def test_of_a_sweep_over_models_each_card_shows_its_own(evaluated, own_run):
    models = f"model={own_run / 'pipeline'},{own_run / 'ema-0.05'}"
    result = json.loads(evaluated("pipeline", "--bits_images", "4", "--bits_terms", "2", "--sweep", models).read_text())
    for point, pipeline in zip(result["points"], ("pipeline", "ema-0.05"), strict=True):
        metrics = {row["name"]: pytest.approx(row["value"]) for row in point["metrics"]}
        bits = {"bits/dim": pytest.approx(result["metrics"][-1]["value"])} if pipeline == "pipeline" else {}
        assert shown(own_run, pipeline) == metrics | bits
    assert [point["settings"] for point in result["points"]] == [{"model": "pipeline"}, {"model": "ema-0.05"}]
    file = own_run / "pipeline" / "evaluation.json"  # as earlier versions wrote it, the best of whichever model
    file.write_text(json.dumps(result | {"metrics": result["points"][1]["metrics"]}))
    assert "FID-20 of feature_network.pt" not in shown(own_run, "pipeline")


def test_the_best_sampler_of_a_sweep_for_its_cost_is_kept_and_recommended(evaluated, own_run, capsys):
    folder = own_run / "pipeline"
    sweep = ("--scheduler", "dpm++", "--class_labels", "balanced", "--sweep", "steps=2,4", "guidance_scale=1,2")
    points = json.loads(evaluated("pipeline", *sweep).read_text())["points"]
    assert [point["network_calls"] for point in points] == [2, 4, 4, 8]
    recommended = read_samplers(folder).recommended
    assert f"recommended for {folder}: DPMSolverMultistepScheduler" in capsys.readouterr().out
    assert recommended.scheduler_options == {"timestep_spacing": "trailing"} and recommended.class_labels == "balanced"
    pipeline = DDPMPipeline.from_pretrained(folder)
    images = pipeline(batch_size=2, class_labels=0, **pipeline.use_recommended_sampler()).images
    assert len(images) == 2 and len(pipeline.scheduler.timesteps) == recommended.steps
    assert recommended.protocol in make_card(Run(own_run), folder, "org/mine").text
    evaluated()  # without a sweep there is nothing to choose from
    assert read_samplers(folder).recommended == recommended


@pytest.mark.parametrize(
    "content", ["", '{"metrics": [', "[]", "{}", '{"metrics": 3}', '{"metrics": [{"value": NaN}], "sampling": {}}']
)
def test_an_evaluation_that_cannot_be_read_is_one_sentence(own_run, content):
    (own_run / "pipeline" / "evaluation.json").write_text(content)
    with one_sentence(match=r"evaluation\.json is not what ddpm-pipe evaluate writes .*; evaluate again"):
        make_card(Run(own_run), own_run / "pipeline", "org/mine")


def test_a_metric_that_is_not_a_number_is_not_shown(evaluated, own_run):
    file = evaluated()
    result = json.loads(file.read_text())
    result["metrics"][0]["value"] = math.nan
    file.write_text(json.dumps(result))
    with pytest.raises(ValueError, match="holds a metric that is not finite"):
        make_card(Run(own_run), own_run / "pipeline", "org/mine")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"data": ""}, "data='' must have at least 1 character"),
        ({"bits_images": 1}, "bits_images=1 has no standard error"),
        ({"num_images": -1}, "num_images=-1 must be greater than or equal to 0"),
        ({"bits_terms": 0}, "bits_terms=0 must be greater than or equal to 1"),
        ({"neighbours": 9, "num_images": 8}, "neighbours=9 must be at most num_images=8"),
        ({"num_images": 19}, "num_images=19 must be 0, or at least 20"),
        ({"seeds": "0-18"}, r"seeds='0-18' \(19 images\) must be at least 20"),
        ({"neighbours": 21, "seeds": "5-24"}, r"neighbours=21 must be at most the 20 images of seeds='5-24'"),
        ({"num_images": 0}, "num_images and bits_images are both 0"),
        ({"sweep": ["shape=1"]}, "sweep='shape=1' must be option=value"),
        ({"sweep": ["steps"]}, "sweep='steps' must be option=value"),
        ({"sweep": ["steps=1,few"]}, "sweep='steps=1,few': steps takes values of type int"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(options, told):
    with one_sentence(match=told):
        EvaluateConfig(**{"model": "m", "data": DATA} | options)


@pytest.fixture
def nothing_drawn(monkeypatch):
    """Fail where images are drawn for the metrics."""

    def sampled(*_):
        raise AssertionError("images were drawn")

    monkeypatch.setattr(evaluation, "measure_samples", sampled)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            ["--bits_images", "4", "--bits_terms", "20"],
            "bits_terms=20 must lie between 1 and the 19 that the model has",
        ),
        (["--sweep", "steps=2,21"], "steps=21 must lie between 1 and the 20"),
        (["--sweep", "scheduler=ddim,no-such"], "scheduler='no-such' is unknown; use one of ddpm, ddim"),
        (["--sweep", "model=PIPELINE,/no/such/folder"], "model='/no/such/folder' is neither a folder"),
        (["--sweep", "class_labels=balanced,10"], "class_labels='10' must be balanced, or classes from 0 to 9"),
        (["--class_labels", "10"], "class_labels='10' must be balanced"),
        (["--scheduler", "ddim", "--sweep", "eta=0,2"], "eta=2.0 must lie between 0"),
    ],
)
def test_what_cannot_work_is_refused_before_an_image_is_drawn(measure, nothing_drawn, run, options, told):
    options = [option.replace("PIPELINE", str(run / "pipeline")) for option in options]
    with pytest.raises(ValueError, match=told):
        measure("--num_images", "20", *options)


def test_too_few_training_images_are_refused_before_an_image_is_drawn(measure, nothing_drawn, tmp_path):
    datasets.DatasetDict(train=open_dataset(DATA, "test").select(range(19))).save_to_disk(tmp_path / "few")
    with pytest.raises(ValueError, match=r"reference of shape \(19, 128\) must be one line for each of at least 20"):
        measure("--num_images", "20", "--data", str(tmp_path / "few"))


# ---------------------------------------------------------------- images held out


def test_more_images_than_there_are_have_no_bits(measure):
    with pytest.raises(
        ValueError, match=r"need at least 41 images held out of training, but test_split='test' .* has 40,"
    ):
        measure("--num_images", "0", "--bits_images", "41")


@pytest.mark.parametrize("asked", [("--bits_images", "4"), ("--neighbours", "2")])
def test_training_images_do_not_pass_for_held_out_ones(measure, few_images, nothing_drawn, asked):
    told = "test_split='test' of data=.* has 0, beside 60 that are also in train_split='train'"
    with pytest.raises(ValueError, match=told):  # a folder of one split, whatever its name
        measure("--num_images", "20", "--data", few_images, *asked)


def test_copies_of_training_images_are_left_out_of_those_held_out(measure, split_images, tmp_path, capsys):
    images = open_dataset(DATA, "test")
    mixed = {"train": images.select(range(60)), "test": images.select([*range(15), *range(60, 100)])}
    datasets.DatasetDict(mixed).save_to_disk(tmp_path / "mixed")
    asked = ("--num_images", "20", "--bits_images", "40", "--bits_terms", "2", "--neighbours", "2")
    alone = measure(*asked)
    assert "are left out" not in capsys.readouterr().out
    beside_copies = measure(*asked, "--data", str(tmp_path / "mixed"))
    told = "of the 55 images of test_split='test', 15 that are also in train_split='train' are left out."
    assert told in capsys.readouterr().out
    assert values(alone) == values(beside_copies) and beside_copies["data"]["test"] == 40


# ---------------------------------------------------------------- weights that change


@pytest.mark.parametrize("meanwhile", ["measure_samples", "measure_bits", "measure_neighbours"])
def test_weights_that_change_while_they_are_measured_have_no_evaluation(evaluated, own_run, monkeypatch, meanwhile):
    measured, other = getattr(evaluation, meanwhile), DDPMPipeline.from_pretrained(own_run / "ema-0.05")

    def with_a_checkpoint(*arguments):
        replace_folder(own_run / "pipeline", other.save_pretrained)  # as training does
        return measured(*arguments)

    monkeypatch.setattr(evaluation, meanwhile, with_a_checkpoint)
    with pytest.raises(ValueError, match=r"^the weights in .*pipeline changed while they were measured, [^\n]*$"):
        evaluated("pipeline", "--bits_images", "4", "--bits_terms", "2", "--neighbours", "2")
    assert not {"evaluation.json", "neighbours.png"} & {path.name for path in (own_run / "pipeline").iterdir()}


# ---------------------------------------------------------------- numbers that are not finite


class WithoutLogits(torch.nn.Module):
    """Features of images, and logits that are not numbers."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = images.float().flatten(1)[:, ::7]
        return features, features * float("nan")


def test_one_metric_that_is_not_finite_does_not_cost_the_others(measure, tmp_path, capsys):
    torch.jit.script(WithoutLogits()).save(str(tmp_path / "nan.pt"))
    result = measure("--num_images", "20", features=str(tmp_path / "nan.pt"))
    names = ["FID-20", "KID-20", "precision-20", "recall-20"]
    assert list(values(result)) == [f"{name} of nan.pt" for name in names]
    assert values(result) == {row["name"]: row["value"] for row in result["points"][0]["metrics"]}
    (told,) = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert told.startswith("IS-20 of nan.pt (20 generated")
    assert told.endswith("is nan, not a finite number; it is left out.")


def test_no_number_that_is_written_is_infinite(measure, tmp_path):
    """The config of this scheduler has one."""
    measure("--num_images", "20", "--scheduler", "dpm++")

    def refuse(number: str):
        raise AssertionError(f"{number} is no JSON")

    content = (tmp_path / "out" / "evaluation.json").read_text()
    result = json.loads(content, parse_constant=refuse)
    assert result["sampling"]["scheduler"]["lambda_min_clipped"] == "-Infinity"


def results_of(point: list[Metric], others: list[Metric]) -> Results:
    """What one setting, and the rest, were measured to be."""
    sampler = Sampler(scheduler="DDPMScheduler", steps=1, protocol="")
    return Results(Path("m"), {}, {}, [Point(Path("m"), {}, {}, sampler, 1, 0.0, point)], others)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_where_no_metric_is_finite_there_is_nothing_to_write(value):
    bad, good = (Metric("bits_per_dim", "bits/dim", number, "bound") for number in (value, 1.0))
    with pytest.raises(ValueError, match="none of the metrics is finite; nothing is written"):
        results_of([], [bad]).finite()
    assert results_of([good, bad], [bad]).finite() == results_of([good], [])


def test_a_point_without_fid_is_never_the_best():
    (point,) = results_of([Metric("precision", "precision", 1.0, "")], []).points
    assert point.distance == math.inf


def test_results_of_a_model_that_is_no_folder_need_one(tmp_path):
    config = EvaluateConfig(model=str(tmp_path / "pipeline"), data=DATA)
    with pytest.raises(ValueError, match="output_dir must be given"):
        evaluate(config)
