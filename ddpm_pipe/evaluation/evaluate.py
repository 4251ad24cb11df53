"""How good a model is: distances of its images to real ones, bits per dimension, nearest training images; in one JSON.

Every number carries its protocol: the model by the hash of its weights, the sampler, the seeds, the reference and the
versions of what computed it.
"""

import itertools
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from ddpm_pipe.config import option
from ddpm_pipe.data.images import to_unit_range
from ddpm_pipe.data.memory import ImageData, load_images
from ddpm_pipe.evaluation.features import FeatureNetwork, extract, load_features, reference_features
from ddpm_pipe.evaluation.metrics import evaluate_features
from ddpm_pipe.evaluation.neighbours import nearest, neighbour_grid, share_of_copies
from ddpm_pipe.likelihood import Bound, variational_bound
from ddpm_pipe.pipeline import PixelDiffusionPipeline
from ddpm_pipe.prediction import PREDICTIONS
from ddpm_pipe.randomness import generator
from ddpm_pipe.run.files import replace_text
from ddpm_pipe.sampling.protocol import SampleConfig, pipeline_for, processes, protocol, sample_images, shared_name
from ddpm_pipe.schedulers import DDPMScheduler
from ddpm_pipe.sharing.card import EVALUATION

Row = dict[str, Any]
"""One metric: type, name, value, protocol (as the model card shows it), and what else belongs to it."""


@dataclass
class EvaluateConfig(SampleConfig):
    """What to measure of which model, beside how it samples."""

    data: str = option("", "real images: folder, parquet or arrow file, or dataset id on the Hub")
    train_split: str = option("train", "split of the training images, which samples are compared with")
    split: str = option("test", "split of the images held out, for bits per dimension and neighbours")
    output_dir: str | None = option(
        None, "folder of evaluation.json and pictures; by default the pipeline folder measured"
    )
    num_images: int = option(50_000, "generated images; 0 for none")
    features: str = option(
        "inception",
        "inception, or a file of TorchScript or an exported program: a program that is run here, so one that you trust",
    )
    bits_images: int = option(0, "real images whose bits per dimension are measured; 0 for none")
    bits_terms: int = option(100, "terms of the bound computed for each of them, of T - 1")
    neighbours: int = option(0, "generated images shown with their nearest training images; 0 for none")
    sweep: list[str] = field(
        default_factory=list,
        metadata={"help": "values of options to measure one after another: steps=10,20,50 eta=0,1 model=a,b"},
    )

    def __post_init__(self):
        """Check the values.

        Raises:
            ValueError: for one that cannot be, naming it.
        """
        super().__post_init__()
        if not self.data:
            raise ValueError("data must name the real images: a folder, a parquet or arrow file, or a dataset id.")
        for name in ("num_images", "bits_images", "neighbours"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0.")
        if self.bits_images == 1:
            raise ValueError("bits_images=1 has no standard error; it must be 0, or at least 2.")
        if self.neighbours > self.num_images:
            raise ValueError(f"neighbours={self.neighbours} must be at most num_images={self.num_images}.")
        self.points()

    def points(self) -> list[dict[str, Any]]:
        """The settings of the sweep, one dict of changed options for each; a single empty one without a sweep.

        Raises:
            ValueError: for an option that does not belong to sampling, or a value that is not one of it.
        """
        numbers: dict[str, type] = {"steps": int, "eta": float, "guidance_scale": float}
        words = ("model", "revision", "dtype", "scheduler", "class_labels")
        kinds = numbers | dict.fromkeys(words, str)
        axes = []
        for text in self.sweep:
            name, _, values = text.partition("=")
            if name not in kinds or not values:
                raise ValueError(f"sweep={text!r} must be option=value,value,... with one of {', '.join(kinds)}.")
            try:
                axes.append([(name, kinds[name](value)) for value in values.split(",")])
            except ValueError as error:
                raise ValueError(f"sweep={text!r}: {name} takes values of type {kinds[name].__name__}.") from error
        return [dict(point) for point in itertools.product(*axes)]


def evaluate(config: EvaluateConfig) -> Path:
    """Measure, print a table, and write evaluation.json and the pictures.

    Without `output_dir` they go into the pipeline folder that they measure, and with its weights they are replaced; in
    a sweep over models each gets an evaluation.json of its own.

    Returns:
        The path of the evaluation.json of `config.model`.

    Raises:
        ValueError: for a config, model, data or feature network that cannot work, in one sentence.
    """
    state = processes()
    folders = output_folders(config)
    with state.main_process_first():  # it fills the caches
        pipeline = pipeline_for(config).to(state.device)
        training = real_images(config, config.train_split, pipeline)
        held_out = held_out_images(config, pipeline, training)
    shared: dict[str, Any] = {"data": {"name": shared_name(config.data), config.train_split: len(training)}}
    points: list[dict[str, Any]] = []
    if config.num_images:
        network = load_features(config.features, state.device)
        shared["features"] = {"name": network.name, "hash": network.hash}
        points = measure_points(config, pipeline, training, network, state)
    rest: list[Row] = []
    if config.bits_images:
        rest.append(measure_bits(config, pipeline, held_out, state))
    if state.is_main_process:
        folder = folders[Path(config.model)]
        folder.mkdir(parents=True, exist_ok=True)
        if config.neighbours:
            rest.append(measure_neighbours(config, pipeline, training, held_out, folder / "neighbours.png"))
        if config.sweep and points:
            draw_sweep(points, folder / "sweep.png")
        check_finite(rest)
        for model, folder in folders.items():
            write_results(config, pipeline, model, folder, shared, points, rest)
        print(table([row for point in points for row in point["metrics"]] + rest))
    state.wait_for_everyone()
    return folders[Path(config.model)] / EVALUATION


def output_folders(config: EvaluateConfig) -> dict[Path, Path]:
    """Each model -> the folder of its evaluation.json: as told, or the pipeline itself, where its model card finds it.

    Raises:
        ValueError: where it is not told and a model is not a folder here.
    """
    if config.output_dir is not None:
        return {Path(config.model): Path(config.output_dir)}
    models = [config.model, *(point["model"] for point in config.points() if "model" in point and config.num_images)]
    for model in models:
        if not (Path(model) / "model_index.json").exists():
            raise ValueError(f"output_dir must be given: model={model!r} is not a pipeline folder here.")
    return {Path(model): Path(model) for model in models}


def write_results(
    config: EvaluateConfig,
    pipeline: PixelDiffusionPipeline,
    model: Path,
    folder: Path,
    shared: dict[str, Any],
    points: list[dict[str, Any]],
    rest: list[Row],
) -> None:
    """Write the evaluation.json of one model: all points, but as `metrics` only its own, those of its best point.

    `rest` is of `pipeline`, the model of the config, and goes nowhere else.
    """
    settings = zip(config.points(), points, strict=False)  # without images there are no points
    own = [point for point_settings, point in settings if Path(point_settings.get("model", config.model)) == model]
    best = min(own, key=distance)["metrics"] if own else []
    is_main = model == Path(config.model)
    result = shared | {
        "sampling": protocol(config, pipeline) if is_main else own[0]["sampling"],
        "points": points,
        "metrics": best + rest * is_main,
    }
    replace_text(folder / EVALUATION, json.dumps(result, indent=2) + "\n")


def check_finite(rows: list[Row]) -> None:
    """Raise ValueError for a metric that is not finite: it would say nothing in a model card."""
    for row in rows:
        if not math.isfinite(row["value"]):
            raise ValueError(
                f"{row['name']} is {row['value']}; nothing is written. Are the weights of the model finite?"
            )


def real_images(config: EvaluateConfig, split: str, pipeline: PixelDiffusionPipeline) -> ImageData:
    """Real images of the size and channels of the model's; with labels where it is sampled with labels."""
    channels, *size = pipeline.image_shape
    with_labels = config.class_labels is not None
    return load_images(config.data, split, with_labels=with_labels, resolution=size, channels=channels)


def held_out_images(config: EvaluateConfig, pipeline: PixelDiffusionPipeline, training: ImageData) -> ImageData:
    """The images of `config.split`, where something is measured on them; otherwise those of training stand in.

    Raises:
        ValueError: where there are fewer than asked for, or most of them are training images.
    """
    if not (config.bits_images or config.neighbours):
        return training
    held_out = real_images(config, config.split, pipeline)
    if config.bits_images > len(held_out):
        raise ValueError(f"bits_images={config.bits_images} is more than the {len(held_out)} images of the data.")
    copies = share_of_copies(first_images(held_out), training)
    if copies > 0.5:
        raise ValueError(
            f"bits_images and neighbours need images that were held out of training, but {copies:.0%} of those of "
            f"split={config.split!r} are also in train_split={config.train_split!r} of data={config.data!r}; give "
            "data that hold both splits."
        )
    return held_out


def first_images(data: ImageData) -> Tensor:
    """Up to 1,000 images, uint8 (N, C, H, W): as many as stand for a split."""
    return data.take(torch.arange(min(len(data), 1000)))[0]


# ---------------------------------------------------------------- samples


def measure_points(
    config: EvaluateConfig,
    pipeline: PixelDiffusionPipeline,
    training: ImageData,
    network: FeatureNetwork,
    state: PartialState,
) -> list[dict[str, Any]]:
    """Measure the samples of each setting of the sweep, or of the one of the config."""
    reference = reference_features(network, lambda rows: training.take(torch.tensor(rows))[0], len(training))
    points = []
    for settings in config.points():
        changed = replace(config, sweep=[], **settings)
        sampled = pipeline_for(changed).to(state.device) if settings else pipeline
        point = measure_samples(changed, sampled, network, reference, state)
        if "model" in settings:
            settings |= {"model": shared_name(settings["model"])}
        points.append({"settings": settings} | point)
    return points


def measure_samples(
    config: EvaluateConfig,
    pipeline: PixelDiffusionPipeline,
    network: FeatureNetwork,
    reference: Tensor,
    state: PartialState,
) -> dict[str, Any]:
    """Draw the images of one setting and compare them with the reference; of each batch only the features are kept."""

    def images(rows: range) -> Tensor:
        ((_, drawn, _),) = sample_images(pipeline, list(rows), len(rows), **config.call_options())
        return drawn

    start = time.perf_counter()
    features, logits = extract(network, images, config.num_images, config.batch_size)
    seconds = (time.perf_counter() - start) * state.num_processes / config.num_images
    metrics = evaluate_features(features, reference, logits, network.name)
    sampler = describe_sampler(config, pipeline)
    for row in metrics:
        if config.features != "inception":  # no number of another network may pass for an FID
            row["name"] += f" of {Path(config.features).name}"
            row["type"] += "_of_other_features"
        row["protocol"] += f"; {sampler}, seeds 0-{config.num_images - 1}"
    return {"sampling": protocol(config, pipeline), "seconds_per_image": seconds, "metrics": metrics}


def distance(point: dict[str, Any]) -> float:
    """The FID of a measured setting."""
    (fid,) = [row["value"] for row in point["metrics"] if row["type"].startswith("fid")]
    return fid


def describe_sampler(config: SampleConfig, pipeline: PixelDiffusionPipeline) -> str:
    """The sampler of a protocol, in a few words."""
    steps = config.steps or pipeline.scheduler.config.num_train_timesteps
    parts = [f"{type(pipeline.scheduler).__name__}, {steps} steps"]
    parts += [f"eta {config.eta:g}"] if config.eta else []
    parts += [f"guidance {config.guidance_scale:g}"] if config.guidance_scale != 1 else []
    parts += [f"classes {config.class_labels}"] if config.class_labels else []
    return ", ".join(parts)


def measure_neighbours(
    config: EvaluateConfig,
    pipeline: PixelDiffusionPipeline,
    training: ImageData,
    held_out: ImageData,
    file: Path,
) -> Row:
    """Draw generated images beside their nearest training images, and say whether they are nearer than real ones."""
    seeds = list(range(config.neighbours))
    batches = sample_images(pipeline, seeds, config.batch_size, **config.call_options())
    images = torch.cat([drawn for _, drawn, _ in batches])
    distances, positions = nearest(images, training, min(8, len(training)))
    neighbour_grid(images, training, positions).save(file)
    real, _ = nearest(first_images(held_out), training, 1)
    ratio = (distances[:, 0].median() / real.median().clamp(min=1e-6)).item()
    protocol = (
        f"median distance of {len(images)} samples to their nearest of {len(training)} training images, over that of "
        f"{len(real)} images of split {config.split}; below 1 is nearer than real images are, 0 is copies"
    )
    return {"type": "memorisation", "name": "nearest-neighbour distance ratio", "value": ratio, "protocol": protocol}


# ---------------------------------------------------------------- bits per dimension


def denoiser(pipeline: PixelDiffusionPipeline, labels: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
    """The network of the bound: (x_t, t (B,)) -> output. A self-conditioned one is asked twice, the second time with
    its own first answer, so that what it does depends on x_t alone."""

    network = pipeline._denoiser(labels)

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        output = network(x_t, t, torch.zeros_like(x_t))
        if not pipeline.unet.config.get("self_condition"):
            return output
        row = PREDICTIONS[pipeline.scheduler.config.prediction_type]
        x0 = row.x0(output[:, : x_t.shape[1]], x_t, pipeline.scheduler.alpha_bar(t))
        return network(x_t, t, x0)

    return denoise


def measure_bits(config: EvaluateConfig, pipeline: PixelDiffusionPipeline, data: ImageData, state: PartialState) -> Row:
    """The variational bound on the bits per dimension of real images, with its standard error over them, and its terms.

    Raises:
        ValueError: where there are not as many terms.
    """
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    pipeline = PixelDiffusionPipeline(pipeline.unet, scheduler)
    parts = []
    starts = range(0, config.bits_images, config.batch_size)[state.process_index :: state.num_processes]
    for start in starts:
        images, labels = data.take(torch.arange(start, min(start + config.batch_size, config.bits_images)))
        labels = pipeline._labels(labels, len(images), 1.0)
        draw = generator(0, "bound", start)
        x0 = to_unit_range(images.to(state.device))
        bound = variational_bound(denoiser(pipeline, labels), scheduler, x0, config.bits_terms, draw)
        parts.append(Bound(*(term.cpu() for term in bound)))
    bound = Bound(*(torch.cat(terms).double() for terms in zip(*gather_object(parts), strict=True)))
    means = {name: term.mean().item() for name, term in bound._asdict().items()}
    error = (bound.total.std() / len(bound.total) ** 0.5).item()
    given = "given their labels" if data.labels is not None else "without labels"
    of_terms = ", ".join(f"{name} {value:.4f}" for name, value in means.items())
    protocol = (
        f"variational bound, standard error {error:.2g} over {config.bits_images} images of split {config.split} "
        f"{given}; {of_terms}; {scheduler.config.variance_type}, {config.bits_terms} of {len(scheduler) - 1} terms"
    )
    row = {"type": "bits_per_dim", "name": "bits/dim", "value": bound.total.mean().item(), "protocol": protocol}
    return row | {"standard_error": error, "terms": means}


# ---------------------------------------------------------------- what is shown


def table(metrics: list[Row]) -> str:
    """The metrics as a Markdown table."""
    lines = ["| metric | value | protocol |", "| --- | --- | --- |"]
    return "\n".join(lines + [f"| {row['name']} | {row['value']:.4g} | {row['protocol']} |" for row in metrics])


def draw_sweep(points: list[dict[str, Any]], file: Path) -> None:
    """Draw FID over the number of steps and over the seconds of an image; one line for each of the other settings."""
    from matplotlib.figure import Figure  # heavy, and needed once at the end

    figure = Figure(figsize=(12, 5), layout="constrained")
    by_steps, by_time = figure.subplots(1, 2)
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for point in points:
        rest = ", ".join(f"{name}={value}" for name, value in point["settings"].items() if name != "steps")
        lines.setdefault(rest, []).append((point["sampling"]["steps"], point["seconds_per_image"], distance(point)))
    for rest, values in lines.items():
        steps, seconds, distances = zip(*sorted(values), strict=True)
        by_steps.plot(steps, distances, marker="o", label=rest)
        by_time.plot(seconds, distances, marker="o", label=rest)
    for axis, label in ((by_steps, "steps"), (by_time, "seconds per image and process")):
        axis.set(xscale="log", yscale="log", xlabel=label, ylabel=points[0]["metrics"][0]["name"])
        if any(lines):
            axis.legend(fontsize="x-small")
    figure.savefig(file, dpi=100)
