"""The model card of a run: what it is, how to use it, how it was made and how good it is."""

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ddpm_pipe.config import read_config_file
from ddpm_pipe.log import read_metrics
from ddpm_pipe.recipe import CONFIG, PLAN

EVALUATION = "evaluation.json"
PICTURE = "samples.png"
TEMPLATES = [Path(__file__).parents[up] / "model_cards" / "TEMPLATE.md" for up in (0, 1)]
"""Where the template lies: in the installed package, or beside it in a checkout."""
TASK = "unconditional-image-generation"
PRIVATE = ("output_dir", "push_to", "push_every", "push_public", "resume", "overwrite")
"""Choices of a run that concern its machine alone."""


def make_card(
    run: Path,
    pipeline: Path,
    repo_id: str,
    license: str | None = None,
    dataset: str | None = None,
    dataset_license: str | None = None,
) -> ModelCard:
    """The model card of a run, the same text every time it is made of the same run.

    Args:
        run: the run folder.
        pipeline: the folder of its pipeline that is shared.
        repo_id: where it is shared.
        license: of the weights, as the Hub names licences.
        dataset: name of the data, or its id on the Hub; None takes the id that the run was trained on.
        dataset_license: of the data.

    Raises:
        ValueError: where the run lacks its config or plan.
    """
    recipe = read_config_file(run / CONFIG)
    plan = read_config_file(run / PLAN)
    network = json.loads((pipeline / "unet" / "config.json").read_text())
    entries = read_metrics(run)
    dataset = dataset or (None if Path(recipe["data"]).exists() else recipe["data"])
    recipe = {key: value for key, value in recipe.items() if key not in PRIVATE}
    recipe["data"] = Path(recipe["data"]).name if Path(recipe["data"]).exists() else recipe["data"]
    size = network["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    metrics = read_results(run, recipe, entries)
    card_data = ModelCardData(
        model_name=repo_id.split("/")[-1],
        license=license,
        library_name="diffusers",
        pipeline_tag=TASK,
        tags=["ddpm_pipe", "diffusion", "ddpm"],
        datasets=[dataset] if dataset and "/" in dataset else None,
        eval_results=[
            EvalResult(
                task_type=TASK,
                dataset_type=dataset or "unnamed",
                dataset_name=dataset or "unnamed",
                metric_type=metric["type"],
                metric_name=metric["name"],
                metric_value=metric["value"],
                metric_args={"protocol": metric["protocol"]},
            )
            for metric in metrics
        ],
    )
    return ModelCard.from_template(
        card_data,
        str(next(path for path in TEMPLATES if path.exists())),
        repo_id=repo_id,
        picture=PICTURE,
        height=height,
        width=width,
        channels=network["in_channels"],
        class_names=plan["class_names"],
        code_files=sorted(path.name for path in pipeline.rglob("*.py")),
        recipe=recipe,
        recipe_yaml=yaml.safe_dump(recipe, sort_keys=False).strip(),
        plan=plan,
        dataset=dataset,
        data_license=dataset_license,
        steps=entries[-1]["step"] if entries else 0,
        average=describe_average(pipeline, recipe),
        duration=str(timedelta(seconds=round(training_seconds(entries, recipe["batch_size"])))),
        metrics=metrics,
    )


def read_results(run: Path, recipe: dict[str, Any], entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """type, name, value and protocol of each metric: the last loss on images held out, and those of evaluation.json."""
    results = []
    held_out = [entry for entry in entries if "held_out_loss" in entry]
    if held_out:
        protocol = f"{recipe['loss']} loss of {recipe['prediction_type']}, averaged weights, {recipe['holdout']} images"
        value = round(held_out[-1]["held_out_loss"], 5)
        results.append({"type": "loss", "name": "held-out loss", "value": value, "protocol": protocol})
    if (run / EVALUATION).exists():
        results += json.loads((run / EVALUATION).read_text())["metrics"]
    return results


def describe_average(pipeline: Path, recipe: dict[str, Any]) -> str:
    """Which average of the weights a pipeline folder of a run holds."""
    if pipeline.name.startswith("ema-"):
        return f"power-function average, sigma_rel {pipeline.name.removeprefix('ema-')} (Karras et al. 2024)"
    return f"exponential moving average, decay {recipe['ema_decay']} with warm-up of power {recipe['ema_power']:.3g}"


def training_seconds(entries: list[dict[str, Any]], batch_size: int) -> float:
    """Time of a run, with its checkpoints and samples and without interruptions, from its log."""
    timed = [entry for entry in entries if "images_per_second" in entry]
    steps = [entry["step"] for entry in timed]
    done = [step - before for before, step in zip([0, *steps], steps, strict=False)]
    return sum(n * batch_size / entry["images_per_second"] for n, entry in zip(done, timed, strict=True))
