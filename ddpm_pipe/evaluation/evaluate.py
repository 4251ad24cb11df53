"""Measure how good a model is, and write all results to evaluation.json.

The results are distances of generated images to real ones, bits per dimension, and nearest training images. Every
number carries its protocol: the hash of the model's weights, the sampler, the seeds, the reference, and the versions
of the software that computed it.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image
from torch import Tensor

from ddpm_pipe.data.memory import ImageData, load_images
from ddpm_pipe.evaluation.bits import check_bound, measure_bits
from ddpm_pipe.evaluation.config import EvaluateConfig
from ddpm_pipe.evaluation.features import FeatureNetwork, extract, load_features, reference_features
from ddpm_pipe.evaluation.metrics import check_features, evaluate_features, import_torchmetrics
from ddpm_pipe.evaluation.neighbours import nearest, neighbour_grid, without_copies
from ddpm_pipe.evaluation.results import Metric, Point, Results
from ddpm_pipe.launch import processes
from ddpm_pipe.pipeline import PixelDiffusionPipeline
from ddpm_pipe.run.files import replace_text
from ddpm_pipe.run.folder import EVALUATION
from ddpm_pipe.samplers import Sampler, Samplers, read_samplers
from ddpm_pipe.sampling.config import SampleConfig
from ddpm_pipe.sampling.protocol import (
    learned_timesteps,
    pipeline_for,
    protocol,
    sample_images,
    sampler_of,
    try_out,
)
from ddpm_pipe.sharing.privacy import shared_name
from ddpm_pipe.weights import weights_sha256


@dataclass(frozen=True)
class Subject:
    """A model with its sampler, which has been checked and is ready to be measured.

    Attributes:
        settings: the options that the sweep changes in the config.
        config: the config with these changes.
        folder: the pipeline folder.
        sampling: the protocol; it holds a hash of the weights that was taken before `load` reads them.
    """

    settings: dict[str, Any]
    config: EvaluateConfig
    folder: Path
    sampling: dict[str, Any]

    @property
    def model(self) -> Path:
        """The model as the config names it."""
        return Path(self.config.model)

    def load(self, device: torch.device) -> PixelDiffusionPipeline:
        """Load the pipeline from the folder whose weights were hashed."""
        return pipeline_for(self.config.replace(model=str(self.folder), revision=None)).to(device)

    def check_weights(self) -> None:
        """Raise ValueError where the folder no longer holds the weights that the protocol names."""
        if weights_sha256(self.folder) != self.sampling["unet_sha256"]:
            raise ValueError(
                f"the weights in {self.folder} changed while they were measured, and nothing is written; measure a "
                "copy, or after training."
            )


def subjects(config: EvaluateConfig, device: torch.device) -> tuple[Subject, list[Subject]]:
    """Return the model of the config, and the models of all points to be sampled.

    There is one point for each setting of the sweep; without a sweep the model of the config is the only point.

    Raises:
        ValueError: where one of them cannot work.
    """

    def subject(settings: dict[str, Any], is_sampled: bool) -> Subject:
        changed = config.replace(sweep=[], **settings)
        pipeline = pipeline_for(changed)
        if is_sampled:
            try_out(changed, pipeline.to(device))
        return Subject(settings, changed, Path(pipeline.name_or_path), protocol(changed, pipeline))

    own = subject({}, is_sampled=bool(config.neighbours or (config.sample_seeds and not config.sweep)))
    if not config.sample_seeds:
        return own, []
    return own, [subject(settings, is_sampled=True) for settings in config.points()] if config.sweep else [own]


def evaluate(config: EvaluateConfig) -> Path:
    """Measure, print a table, and write evaluation.json and the pictures.

    Without `output_dir` they go into the pipeline folder that was measured, and they are deleted when it is replaced.
    In a sweep over models, each model gets its own evaluation.json.

    Returns:
        The path of the evaluation.json of `config.model`.

    Raises:
        ValueError: where the config, model, data or feature network cannot work.
    """
    state = processes()
    folders = output_folders(config)
    with state.main_process_first():  # the main process fills the caches, and the others read them
        own, points = subjects(config, state.device)
        pipeline = own.load(state.device)
        training = real_images(config, config.train_split, pipeline)
        held_out = held_out_images(config, pipeline, training)
    folders[own.model].mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {"data": describe_data(config, training, held_out)}
    measured: list[Point] = []
    if config.sample_seeds:
        import_torchmetrics("fid")  # a missing package is reported before hours of work
        network = load_features(config.features, state.device)
        facts["features"] = {"name": network.name, "hash": network.hash}
        measured = measure_points(points, pipeline, training, network, state)
    others = [measure_bits(config, pipeline, held_out, state)] if config.bits_images else []
    if state.is_main_process:
        picture = None
        if config.neighbours:
            ratio, picture = measure_neighbours(config, pipeline, training, held_out)
            others.append(ratio)
        results = Results(own.model, own.sampling, facts, measured, others).finite()
        for subject in (own, *points):
            subject.check_weights()
        write(results, folders, picture)
    state.wait_for_everyone()
    return folders[own.model] / EVALUATION


def output_folders(config: EvaluateConfig) -> dict[Path, Path]:
    """Map each model to the folder for its evaluation.json.

    The folder is `output_dir` or, without it, the pipeline folder itself, where the model card looks for the file.

    Raises:
        ValueError: where `output_dir` is not given and a model is not a local pipeline folder.
    """
    if config.output_dir is not None:
        return {Path(config.model): Path(config.output_dir)}
    models = [config.model, *(point["model"] for point in config.points() if "model" in point and config.sample_seeds)]
    for model in models:
        if not (Path(model) / "model_index.json").exists():
            raise ValueError(f"output_dir must be given: model={model!r} is not a pipeline folder here.")
    return {Path(model): Path(model) for model in models}


def write(results: Results, folders: dict[Path, Path], neighbours: Image.Image | None) -> None:
    """Write the evaluation.json of each model of `folders`, and the pictures beside the config's; print a table."""
    folder = folders[results.model]
    if neighbours is not None:
        neighbours.save(folder / "neighbours.png")
    if any(point.settings for point in results.points):
        results.draw_sweep(folder / "sweep.png")
    for model, place in folders.items():
        replace_text(place / EVALUATION, json.dumps(results.of(model), indent=2, allow_nan=False) + "\n")
        recommended = results.recommended(model)
        if recommended is not None and place == model:
            keep_recommended(model, recommended)
    print(results.table())


def keep_recommended(model: Path, sampler: Sampler) -> None:
    """Keep the sampler of a sweep that is the best for its cost in the pipeline folder, and print it."""
    samplers = read_samplers(model) or Samplers(unet_sha256=weights_sha256(model))
    samplers.replace(recommended=sampler).write(model)
    print(f"recommended for {model}: {sampler.scheduler}, {sampler.steps} steps ({sampler.protocol})")


# ---------------------------------------------------------------- real images


def real_images(config: EvaluateConfig, split: str, pipeline: PixelDiffusionPipeline) -> ImageData:
    """Load real images with the model's size and channels, and with labels where the model is sampled with labels."""
    channels, *size = pipeline.image_shape
    with_labels = config.class_labels is not None
    return load_images(config.data, split, with_labels=with_labels, resolution=size, channels=channels)


def held_out_images(config: EvaluateConfig, pipeline: PixelDiffusionPipeline, training: ImageData) -> ImageData:
    """Return the images of `config.test_split` that are not in the training split.

    Where nothing is measured on them, return the training images instead.

    Raises:
        ValueError: where fewer images are left than the config asks for, or their bound cannot be computed.
    """
    if not (config.bits_images or config.neighbours):
        return training
    found = real_images(config, config.test_split, pipeline)
    held_out = without_copies(found, training)
    copies = f"{len(found) - len(held_out)} that are also in train_split={config.train_split!r}"
    if len(held_out) < max(config.bits_images, 1):
        raise ValueError(
            f"bits_images={config.bits_images} and neighbours={config.neighbours} need at least "
            f"{max(config.bits_images, 1)} images held out of training, but test_split={config.test_split!r} of "
            f"data={config.data!r} has {len(held_out)}, beside {copies}; ask for fewer, or give data that hold both "
            "splits."
        )
    if len(held_out) < len(found):
        processes().print(f"of the {len(found)} images of test_split={config.test_split!r}, {copies} are left out.")
    if config.bits_images:
        check_bound(config, pipeline, held_out)
    return held_out


def describe_data(config: EvaluateConfig, training: ImageData, held_out: ImageData) -> dict[str, Any]:
    """Return the name of the data and the number of images in each split, for evaluation.json."""
    splits = {config.train_split: len(training)}
    if held_out is not training:
        splits[config.test_split] = len(held_out)
    return {"name": shared_name(config.data)} | splits


def first_images(data: ImageData) -> Tensor:
    """Return the first 1,000 images at most, uint8 (N, C, H, W), which represent the whole split."""
    return data.take(torch.arange(min(len(data), 1000)))[0]


# ---------------------------------------------------------------- samples


def measure_points(
    points: list[Subject],
    pipeline: PixelDiffusionPipeline,
    training: ImageData,
    network: FeatureNetwork,
    state: PartialState,
) -> list[Point]:
    """Measure the samples of each point; a point that changes no settings uses `pipeline`, the config's own."""
    reference = reference_features(network, lambda rows: training.take(torch.tensor(rows))[0], len(training))
    check_features("reference", reference)
    measured = []
    for point in points:
        sampled = point.load(state.device) if point.settings else pipeline
        measured.append(measure_samples(point, sampled, network, reference, state))
        point.check_weights()  # before the next point takes more hours
    return measured


def measure_samples(
    subject: Subject,
    pipeline: PixelDiffusionPipeline,
    network: FeatureNetwork,
    reference: Tensor,
    state: PartialState,
) -> Point:
    """Draw the images of one setting and compare them with the reference; only the features of each batch are kept."""
    config, seeds = subject.config, subject.config.sample_seeds

    def images(rows: range) -> Tensor:
        drawn_seeds = [seeds[row] for row in rows]
        ((_, drawn, _),) = sample_images(pipeline, drawn_seeds, len(rows), **config.call_options())
        return drawn

    start = time.perf_counter()
    features, logits = extract(network, images, len(seeds), config.batch_size)
    seconds = (time.perf_counter() - start) * state.num_processes / len(seeds)
    network_calls = len(pipeline.scheduler.timesteps) * (1 if config.guidance_scale == 1 else 2)
    details = f"{network.name}; {describe_sampler(config, pipeline)}, seeds {config.described_seeds}"
    metrics = evaluate_features(features, reference, logits, details, network.file_name)
    settings = subject.settings
    if "model" in settings:
        settings = settings | {"model": shared_name(config.model)}
    sampler = sampler_of(config, pipeline, learned_timesteps(config, pipeline), details)
    return Point(subject.model, settings, subject.sampling, sampler, network_calls, seconds, metrics)


def describe_sampler(config: SampleConfig, pipeline: PixelDiffusionPipeline) -> str:
    """Describe the sampler in a few words, for a protocol."""
    steps = config.steps or pipeline.scheduler.config.num_train_timesteps
    parts = [f"{type(pipeline.scheduler).__name__}, {steps} steps"]
    parts += ["learned timesteps"] if learned_timesteps(config, pipeline) else []
    parts += [f"eta {config.eta:g}"] if config.eta else []
    parts += [f"guidance {config.guidance_scale:g}"] if config.guidance_scale != 1 else []
    parts += [f"guide {shared_name(config.guide)}"] if config.guide is not None else []
    parts += [f"classes {config.class_labels}"] if config.class_labels else []
    return ", ".join(parts)


def measure_neighbours(
    config: EvaluateConfig,
    pipeline: PixelDiffusionPipeline,
    training: ImageData,
    held_out: ImageData,
) -> tuple[Metric, Image.Image]:
    """Measure whether generated images are nearer to training images than real ones are.

    Returns:
        The ratio of the two distances, and a picture of the generated images beside their nearest training images.
    """
    seeds = config.sample_seeds[: config.neighbours]
    batches = sample_images(pipeline, seeds, config.batch_size, **config.call_options())
    images = torch.cat([drawn for _, drawn, _ in batches])
    distances, positions = nearest(images, training, min(8, len(training)))
    real, _ = nearest(first_images(held_out), training, 1)
    ratio = (distances[:, 0].median() / real.median().clamp(min=1e-6)).item()
    protocol = (
        f"median distance of {len(images)} samples to their nearest of {len(training)} training images, over that of "
        f"{len(real)} images of split {config.test_split}; below 1 is nearer than real images are, 0 is copies"
    )
    metric = Metric("memorisation", "nearest-neighbour distance ratio", ratio, protocol)
    return metric, neighbour_grid(images, training, positions)
