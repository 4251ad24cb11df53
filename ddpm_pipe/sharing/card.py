"""Make the model card of a run: what the model is, how to use it, how it was trained and how good it is."""

import json
import math
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download

from ddpm_pipe.run.folder import EVALUATION, TRAINING, Run
from ddpm_pipe.samplers import OWN_SCHEDULERS, Sampler, read_samplers
from ddpm_pipe.sharing.privacy import shared_name
from ddpm_pipe.weights import CODE_FILES, read_json, saved_variants, weights_sha256

PICTURE = "samples.png"
TEMPLATES = [Path(__file__).parents[up] / "model_cards" / "TEMPLATE.md" for up in (1, 2)]
"""Where the template may lie: in the installed package, or beside the package in a checkout."""
TASK = "unconditional-image-generation"
PRIVATE = ("output_dir", "push_to", "push_every", "push_public", "resume", "overwrite", "plan")
"""Config keys of a run that concern its machine alone; a card does not show them."""
STOCK_SAMPLES = ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler")
"""Schedulers with which the stock DDPMPipeline, beside DDPM and DDIM, draws the right images."""


def make_card(
    run: Run | None,
    pipeline: Path,
    repo_id: str,
    license: str | None = None,
    dataset: str | None = None,
    dataset_license: str | None = None,
) -> ModelCard:
    """Make the model card of a run, or of a pipeline alone; the same arguments always give the same text.

    Args:
        run: the run folder; None for a pipeline that comes without its run.
        pipeline: the pipeline folder that is shared.
        repo_id: the repository in which it is shared.
        license: licence of the weights, as the Hub names licences.
        dataset: name of the training data, or their id on the Hub; None takes the id that the run was trained on.
        dataset_license: licence of the training data.

    Raises:
        ValueError: where the run lacks its config or plan, or its evaluation cannot be read.
    """
    facts: dict[str, Any] = read_pipeline(pipeline) | {"plan": {"class_names": []}}
    metrics: list[dict[str, Any]] = []
    if run is not None:
        facts |= read_run(run, pipeline)
        metrics += read_held_out_loss(run, pipeline, facts["recipe"])
        dataset = dataset or facts["dataset"]
    metrics += read_evaluation(run, pipeline).get("metrics", [])
    card_data = ModelCardData(
        model_name=repo_id.split("/")[-1] if metrics else None,  # only results need the name
        license=license,
        library_name="diffusers",
        pipeline_tag=TASK,
        tags=["ddpm_pipe", "diffusion", "ddpm"],
        base_model=(facts["plan"].get("start") or {}).get("model"),
        datasets=[dataset] if dataset and "/" in dataset else None,
        class_names=facts["plan"]["class_names"] or None,
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
        ]
        or None,
    )
    template = str(next(path for path in TEMPLATES if path.exists()))
    facts |= {"repo_id": repo_id, "dataset": dataset, "data_license": dataset_license, "metrics": metrics}
    return ModelCard.from_template(card_data, template, **facts)


def read_pipeline(pipeline: Path) -> dict[str, Any]:
    """Read what the template shows of a pipeline folder: sizes, classes, timesteps, variant, code files and samplers.

    Raises:
        ValueError: where a config is missing or cannot be read.
    """
    network = read_json(pipeline / "unet" / "config.json")
    scheduler = read_json(pipeline / "scheduler" / "scheduler_config.json")
    variants = saved_variants(path.name for path in (pipeline / "unet").iterdir())
    size = network["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    classes = network.get("num_class_embeds") or 0  # in a stock network, the last is the null class
    variant = None if None in variants else min(filter(None, variants), default=None)
    code_files = [name for name in CODE_FILES if (pipeline / name).exists()]
    samplers = read_samplers(pipeline, variant)
    recommended = samplers and samplers.recommended
    return {
        "height": height,
        "width": width,
        "channels": network["in_channels"],
        "num_classes": classes - (classes > 0 and network["_class_name"] == "UNet2DModel"),
        "timesteps": scheduler["num_train_timesteps"],
        "few_steps": scheduler["_class_name"] == "LCMScheduler",
        "variant": variant,
        "code_files": code_files,
        "learned": samplers.learned if samplers else [],
        "recommended": recommended,
        "recommended_call": recommended and call_in_diffusers(recommended, code_files),
    }


def call_in_diffusers(sampler: Sampler, code_files: list[str]) -> dict[str, Any] | None:
    """Return the keywords of a call that draws with a sampler where only diffusers is installed.

    The DDPMPipeline of diffusers takes a number of steps and no timesteps, and neither scales the input of the network
    nor the first noise, which all schedulers but DPM-Solver++ need. The pipeline whose code travels with the weights
    does both.

    Returns:
        The keywords; None where diffusers does not have the scheduler, or its pipeline would draw wrong images.
    """
    if sampler.scheduler in OWN_SCHEDULERS:
        return None
    if CODE_FILES[-1] in code_files:
        return sampler.call_options()
    return {"num_inference_steps": sampler.steps} if sampler.scheduler in STOCK_SAMPLES else None


def read_run(run: Run, pipeline: Path) -> dict[str, Any]:
    """Read what the template shows of a run: its recipe, plan, picture, steps and duration."""
    plan = run.read_plan()
    recipe = {key: value for key, value in run.read_config().items() if key not in PRIVATE}
    data = recipe["data"]
    recipe["data"] = shared_name(data)
    recipe["init_from"] = (plan.get("start") or {"model": None})["model"]
    entries = trained_entries(run, pipeline)
    return {
        "picture": PICTURE if find_picture(run, pipeline) else None,
        "dataset": data if recipe["data"] == data and not Path(data).exists() else None,
        "recipe": recipe,
        "recipe_yaml": yaml.safe_dump(recipe, sort_keys=False).strip(),
        "plan": plan,
        "steps": entries[-1]["step"] if entries else 0,
        "average": describe_average(pipeline, recipe),
        "duration": str(timedelta(seconds=round(training_seconds(entries, recipe["batch_size"])))),
    }


def trained_steps(pipeline: Path) -> float:
    """Return the number of optimizer steps after which a pipeline was saved; infinity where its folder does not say."""
    file = pipeline / TRAINING
    return read_json(file)["step"] if file.exists() else math.inf


def trained_entries(run: Run, pipeline: Path) -> list[dict[str, Any]]:
    """Return the entries of the log of a run up to the step at which a pipeline was saved."""
    last = trained_steps(pipeline)
    return [entry for entry in run.read_metrics() if entry["step"] <= last]


def find_picture(run: Run, pipeline: Path) -> Path | None:
    """Find the newest sample grid that was drawn before a pipeline was saved, or with it.

    Returns:
        The file; None where there is no grid, or the pipeline holds an average that draws none.
    """
    if Run.width(pipeline) is not None:
        return None
    last = trained_steps(pipeline)
    grids = [run.grids(step)["average"] for step in reversed(run.steps(run.samples)) if step <= last]
    return next((grid for grid in grids if grid.exists()), None)


# ---------------------------------------------------------------- its classes


def read_class_names(model: str, revision: str | None = None) -> list[str]:
    """Read the names of the classes of a pipeline, by label: from its run, or else from the metadata of its card.

    Args:
        model: the pipeline folder, or the id of a repository on the Hub.
        revision: branch, tag or commit of a repository.

    Returns:
        The names; [] where they are not known or cannot be read.
    """
    folder = Path(model)
    try:
        if folder.is_dir() and Run(folder.resolve().parent).plan.exists():
            return Run(folder.resolve().parent).read_plan().get("class_names", [])
        card = folder / "README.md" if folder.is_dir() else hf_hub_download(model, "README.md", revision=revision)
        names = ModelCard.load(card).data.get("class_names")
    except (ValueError, OSError, yaml.YAMLError):  # errors of the Hub are OSErrors
        return []
    return [str(name) for name in names] if isinstance(names, list) else []


# ---------------------------------------------------------------- how good it is


def read_held_out_loss(run: Run, pipeline: Path, recipe: dict[str, Any]) -> list[dict[str, Any]]:
    """Return type, name, value and protocol of the last held-out loss; [] where it was not measured of this average."""
    held_out = [entry for entry in trained_entries(run, pipeline) if "held_out_loss" in entry]
    if not held_out or Run.width(pipeline) is not None:
        return []
    loss = f"{recipe['loss']} loss of {recipe['prediction_type']}"
    if recipe.get("objective") == "consistency":
        loss = "consistency loss of the last stage"
    protocol = f"{loss}, averaged weights after {held_out[-1]['step']} steps, {recipe['holdout']} images"
    value = round(held_out[-1]["held_out_loss"], 5)
    return [{"type": "loss", "name": "held-out loss", "value": value, "protocol": protocol}]


def read_evaluation(run: Run | None, pipeline: Path) -> dict[str, Any]:
    """Read the evaluation.json of a pipeline folder or of its run, where earlier versions wrote it.

    Metrics of other weights than those in the pipeline folder are left out, and a printed sentence says so.

    Returns:
        The content, with only the metrics of these weights; {} where there is no evaluation of them.

    Raises:
        ValueError: where the file cannot be read, has another shape, or a metric is not finite.
    """
    folders = [pipeline] if run is None else [pipeline, run.folder]
    file = next((folder / EVALUATION for folder in folders if (folder / EVALUATION).exists()), None)
    if file is None:
        return {}
    try:
        result = json.loads(file.read_text())
        metrics, measured = result["metrics"], result["sampling"]["unet_sha256"]
        of_points: dict[bool, list] = {True: [], False: []}  # metrics of these weights, and of others in a sweep
        for point in result.get("points", []):
            of_points[point["sampling"]["unet_sha256"] == measured] += point["metrics"]
        foreign = [row for row in of_points[False] if row not in of_points[True]]
        values = [float(row["value"]) for row in metrics if row["type"] and row["name"] and row["protocol"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not what ddpm-pipe evaluate writes ({error!r}); evaluate again.") from error
    if not all(map(math.isfinite, values)):
        raise ValueError(f"{file} holds a metric that is not finite; evaluate again.")
    if measured != weights_sha256(pipeline):
        print(f"{file} was measured on other weights than those of {pipeline}; it is left out: evaluate again.")
        return {}
    if any(row in foreign for row in metrics):
        print(f"{file} holds metrics of other weights than those of {pipeline}; they are left out.")
    return result | {"metrics": [row for row in metrics if row not in foreign]}


def describe_average(pipeline: Path, recipe: dict[str, Any]) -> str:
    """Say which average of the weights a pipeline folder of a run holds."""
    width = Run.width(pipeline)
    if width is not None:
        return f"power-function average, sigma_rel {width} (Karras et al. 2024)"
    return f"exponential moving average, decay {recipe['ema_decay']} with warm-up of power {recipe['ema_power']:.3g}"


def training_seconds(entries: list[dict[str, Any]], batch_size: int) -> float:
    """Compute the seconds that a run took from its log, with its checkpoints and samples but without interruptions."""
    timed = [entry for entry in entries if "images_per_second" in entry]
    steps = [entry["step"] for entry in timed]
    done = [step - before for before, step in zip([0, *steps], steps, strict=False)]
    return sum(n * batch_size / entry["images_per_second"] for n, entry in zip(done, timed, strict=True))
