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
from PIL import Image
from torch import Tensor

from ddpm_pipe.card import EVALUATION
from ddpm_pipe.checkpoint import replace_text
from ddpm_pipe.config import option
from ddpm_pipe.data import ImageData, load_images
from ddpm_pipe.features import FeatureNetwork, extract, load_features, reference_features
from ddpm_pipe.images import to_unit_range
from ddpm_pipe.likelihood import Bound, variational_bound
from ddpm_pipe.memorisation import nearest, neighbour_grid, without_copies
from ddpm_pipe.metrics import MIN_COUNT, check_features, evaluate_features, import_torchmetrics
from ddpm_pipe.pipeline import PixelDiffusionPipeline
from ddpm_pipe.prediction import PREDICTIONS
from ddpm_pipe.randomness import generator
from ddpm_pipe.sampling import (
    SampleConfig,
    pipeline_for,
    processes,
    protocol,
    sample_images,
    shared_name,
    try_out,
    weights_sha256,
)
from ddpm_pipe.schedulers import DDPMScheduler

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
        if 0 < self.num_images < MIN_COUNT:
            raise ValueError(f"num_images={self.num_images} must be 0, or at least {MIN_COUNT}.")
        if not (self.num_images or self.bits_images):
            raise ValueError("num_images and bits_images are both 0, so there is nothing to measure.")
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


@dataclass
class Subject:
    """A model with its sampler, which can be measured: that was tried.

    Attributes:
        settings: what the sweep changes of the config.
        config: with these changes.
        folder: of the pipeline.
        sampling: the protocol; its hash of the weights is older than anything that is loaded to be measured.
    """

    settings: dict[str, Any]
    config: EvaluateConfig
    folder: Path
    sampling: dict[str, Any]

    @property
    def model(self) -> Path:
        """The model as the config has it."""
        return Path(self.config.model)

    def load(self, device: torch.device) -> PixelDiffusionPipeline:
        """The pipeline, from the folder whose weights have the hash."""
        return pipeline_for(replace(self.config, model=str(self.folder), revision=None)).to(device)

    def check_weights(self) -> None:
        """Raise ValueError where the folder no longer holds the weights of the protocol."""
        if weights_sha256(self.folder) != self.sampling["unet_sha256"]:
            raise ValueError(
                f"the weights in {self.folder} changed while they were measured, and nothing is written; measure a "
                "copy, or after training."
            )


def subjects(config: EvaluateConfig, device: torch.device) -> tuple[Subject, list[Subject]]:
    """The model of the config, and of each point to be sampled its own: the settings of the sweep, or that one model.

    Raises:
        ValueError: for anything in one of them that cannot work.
    """

    def subject(settings: dict[str, Any], is_sampled: bool) -> Subject:
        changed = replace(config, sweep=[], **settings)
        pipeline = pipeline_for(changed)
        if is_sampled:
            try_out(changed, pipeline.to(device))
        return Subject(settings, changed, Path(pipeline.name_or_path), protocol(changed, pipeline))

    own = subject({}, is_sampled=config.neighbours > 0 or (config.num_images > 0 and not config.sweep))
    if not config.num_images:
        return own, []
    return own, [subject(settings, is_sampled=True) for settings in config.points()] if config.sweep else [own]


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
        own, points = subjects(config, state.device)
        pipeline = own.load(state.device)
        training = real_images(config, config.train_split, pipeline)
        held_out = held_out_images(config, pipeline, training)
    folder = folders[Path(config.model)]
    folder.mkdir(parents=True, exist_ok=True)
    shared: dict[str, Any] = {"data": {"name": shared_name(config.data), config.train_split: len(training)}}
    if held_out is not training:
        shared["data"][config.split] = len(held_out)
    measured: list[dict[str, Any]] = []
    if config.num_images:
        import_torchmetrics("fid")  # where it is missing, that is said before hours of work
        network = load_features(config.features, state.device)
        shared["features"] = {"name": network.name, "hash": network.hash}
        measured = measure_points(points, pipeline, training, network, state)
    rest: list[Row] = []
    if config.bits_images:
        rest.append(measure_bits(config, pipeline, held_out, state))
    if state.is_main_process:
        pictures = {}
        if config.neighbours:
            row, pictures["neighbours.png"] = measure_neighbours(config, pipeline, training, held_out)
            rest.append(row)
        measured, rest = only_finite(measured, rest)
        for subject in (own, *points):
            subject.check_weights()
        for name, picture in pictures.items():
            picture.save(folder / name)
        with_fid = [point for point in measured if distance(point) < math.inf]
        if config.sweep and with_fid:
            draw_sweep(with_fid, folder / "sweep.png")
        for model, place in folders.items():
            write_results(own, points, model, place, shared, measured, rest)
        print(table([row for point in measured for row in point["metrics"]] + rest))
    state.wait_for_everyone()
    return folder / EVALUATION


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
    own: Subject,
    points: list[Subject],
    model: Path,
    folder: Path,
    shared: dict[str, Any],
    measured: list[dict[str, Any]],
    rest: list[Row],
) -> None:
    """Write the evaluation.json of one model: all points, but as `metrics` only its own, those of its best point.

    `rest` is of `own`, the model of the config, and goes nowhere else.
    """
    of_model = [point for subject, point in zip(points, measured, strict=True) if subject.model == model]
    is_own = model == own.model
    result = shared | {
        "sampling": own.sampling if is_own else of_model[0]["sampling"],
        "points": measured,
        "metrics": (min(of_model, key=distance)["metrics"] if of_model else []) + rest * is_own,
    }
    replace_text(folder / EVALUATION, json.dumps(result, indent=2, allow_nan=False) + "\n")


def only_finite(measured: list[dict[str, Any]], rest: list[Row]) -> tuple[list[dict[str, Any]], list[Row]]:
    """Points and other metrics without those that are not finite, which would say nothing; a sentence names each.

    Raises:
        ValueError: where none is left.
    """

    def finite(rows: list[Row]) -> list[Row]:
        for row in rows:
            if not math.isfinite(row["value"]):
                print(f"{row['name']} ({row['protocol']}) is {row['value']}, not a finite number; it is left out.")
        return [row for row in rows if math.isfinite(row["value"])]

    measured, rest = [point | {"metrics": finite(point["metrics"])} for point in measured], finite(rest)
    if not rest and not any(point["metrics"] for point in measured):
        raise ValueError("none of the metrics is finite; nothing is written. Are the weights of the model finite?")
    return measured, rest


# ---------------------------------------------------------------- real images


def real_images(config: EvaluateConfig, split: str, pipeline: PixelDiffusionPipeline) -> ImageData:
    """Real images of the size and channels of the model's; with labels where it is sampled with labels."""
    channels, *size = pipeline.image_shape
    with_labels = config.class_labels is not None
    return load_images(config.data, split, with_labels=with_labels, resolution=size, channels=channels)


def held_out_images(config: EvaluateConfig, pipeline: PixelDiffusionPipeline, training: ImageData) -> ImageData:
    """The images of `config.split` that are not in the training split, where something is measured on them; otherwise
    those of training stand in.

    Raises:
        ValueError: where fewer are left than asked for, or the bound of theirs cannot be computed.
    """
    if not (config.bits_images or config.neighbours):
        return training
    found = real_images(config, config.split, pipeline)
    held_out = without_copies(found, training)
    copies = f"{len(found) - len(held_out)} that are also in train_split={config.train_split!r}"
    if len(held_out) < max(config.bits_images, 1):
        raise ValueError(
            f"bits_images={config.bits_images} and neighbours={config.neighbours} need at least "
            f"{max(config.bits_images, 1)} images held out of training, but split={config.split!r} of "
            f"data={config.data!r} has {len(held_out)}, beside {copies}; ask for fewer, or give data that hold both "
            "splits."
        )
    if len(held_out) < len(found):
        processes().print(f"of the {len(found)} images of split={config.split!r}, {copies} are left out.")
    if config.bits_images:
        check_bound(config, pipeline, held_out)
    return held_out


def first_images(data: ImageData) -> Tensor:
    """Up to 1,000 images, uint8 (N, C, H, W): as many as stand for a split."""
    return data.take(torch.arange(min(len(data), 1000)))[0]


# ---------------------------------------------------------------- samples


def measure_points(
    points: list[Subject],
    pipeline: PixelDiffusionPipeline,
    training: ImageData,
    network: FeatureNetwork,
    state: PartialState,
) -> list[dict[str, Any]]:
    """Measure the samples of each point; `pipeline` is that of the config, which has no settings of its own."""
    reference = reference_features(network, lambda rows: training.take(torch.tensor(rows))[0], len(training))
    check_features("reference", reference)
    measured = []
    for point in points:
        sampled = point.load(state.device) if point.settings else pipeline
        metrics = measure_samples(point, sampled, network, reference, state)
        point.check_weights()  # before more hours go into the next
        settings = point.settings | ({"model": shared_name(point.config.model)} if "model" in point.settings else {})
        measured.append({"settings": settings} | metrics)
    return measured


def measure_samples(
    point: Subject,
    pipeline: PixelDiffusionPipeline,
    network: FeatureNetwork,
    reference: Tensor,
    state: PartialState,
) -> dict[str, Any]:
    """Draw the images of one setting and compare them with the reference; of each batch only the features are kept."""

    config = point.config

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
    return {"sampling": point.sampling, "seconds_per_image": seconds, "metrics": metrics}


def distance(point: dict[str, Any]) -> float:
    """The FID of a measured setting; infinite where it has none."""
    return next((row["value"] for row in point["metrics"] if row["type"].startswith("fid")), math.inf)


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
) -> tuple[Row, Image.Image]:
    """Whether generated images are nearer to training images than real ones are, and a picture of both."""
    seeds = list(range(config.neighbours))
    batches = sample_images(pipeline, seeds, config.batch_size, **config.call_options())
    images = torch.cat([drawn for _, drawn, _ in batches])
    distances, positions = nearest(images, training, min(8, len(training)))
    real, _ = nearest(first_images(held_out), training, 1)
    ratio = (distances[:, 0].median() / real.median().clamp(min=1e-6)).item()
    protocol = (
        f"median distance of {len(images)} samples to their nearest of {len(training)} training images, over that of "
        f"{len(real)} images of split {config.split}; below 1 is nearer than real images are, 0 is copies"
    )
    row = {"type": "memorisation", "name": "nearest-neighbour distance ratio", "value": ratio, "protocol": protocol}
    return row, neighbour_grid(images, training, positions)


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


def check_bound(config: EvaluateConfig, pipeline: PixelDiffusionPipeline, data: ImageData) -> None:
    """Check that the bound of these images can be computed.

    Raises:
        ValueError: where the chain of the model has not as many terms, or the network not these labels.
    """
    last = pipeline.scheduler.config.num_train_timesteps - 1
    if not 1 <= config.bits_terms <= last:
        raise ValueError(f"bits_terms={config.bits_terms} must lie between 1 and the {last} that the model has.")
    pipeline._labels(None if data.labels is None else data.labels[data.rows], len(data), 1.0)


def measure_bits(config: EvaluateConfig, pipeline: PixelDiffusionPipeline, data: ImageData, state: PartialState) -> Row:
    """The variational bound on the bits per dimension of real images, its standard error over them, and its terms."""
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
