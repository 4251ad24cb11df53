"""Rebuilding averages of any width from the snapshots of a run, and writing them as pipelines."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ddpm_pipe.launch import processes
from ddpm_pipe.pretrained import DDPMPipeline
from ddpm_pipe.run.files import MANIFEST, CheckpointError, check_manifest, shapes
from ddpm_pipe.run.folder import Run
from ddpm_pipe.training.config import AverageConfig, TrainConfig
from ddpm_pipe.training.ema import posthoc_coefficients
from ddpm_pipe.training.log import named_means
from ddpm_pipe.training.loop import load_training_images
from ddpm_pipe.training.recipe import make_objective, make_scheduler
from ddpm_pipe.training.teacher import kept_teacher
from ddpm_pipe.training.validation import held_out_sums


def find_snapshots(run: Run) -> list[tuple[int, float, Path]]:
    """Return (step, sigma_rel, file) of each snapshot of a run, sorted by step.

    Raises:
        ValueError: where the run has no snapshots.
    """
    files = [(step, path) for step in run.steps(run.snapshots) for path in run.snapshot(step).glob("*.safetensors")]
    if not files:
        raise ValueError(f"run={str(run)!r} has no snapshots in {run.snapshots}; train with ema_sigma_rel set.")
    return sorted((step, float(path.stem), path) for step, path in files)


def reconstruct(run: Run, sigma_rel: float, step: int | None = None) -> tuple[dict[str, Tensor], float]:
    """Return the averaged weights of width `sigma_rel` at `step`, and the relative L2 error of their profile.

    Raises:
        ValueError: where the run has no snapshot at `step`, or its snapshots are of several networks.
        CheckpointError: where a snapshot is damaged or holds numbers that are not finite.
    """
    found = find_snapshots(run)
    step = found[-1][0] if step is None else step
    used = [snapshot for snapshot in found if snapshot[0] <= step]
    if not used or used[-1][0] != step:
        steps = ", ".join(str(s) for s in sorted({s for s, _, _ in found}))
        raise ValueError(f"step={step} has no snapshot; there are snapshots at {steps}.")
    coefficients, error = posthoc_coefficients([(s, width) for s, width, _ in used], step, sigma_rel)
    for folder in sorted({path.parent for _, _, path in used}):
        if (folder / MANIFEST).exists():  # earlier versions wrote none
            check_manifest(folder)
    mixed: dict[str, Tensor] = {}
    for coefficient, (_, _, path) in zip(coefficients, used, strict=True):
        weights = read_snapshot(path)
        if mixed and shapes(mixed) != shapes(weights):
            raise ValueError(f"the snapshot {path} is of another network than those before it.")
        for name, tensor in weights.items():
            term = tensor.double() * coefficient if tensor.is_floating_point() else tensor
            mixed[name] = mixed[name] + term if name in mixed and tensor.is_floating_point() else term
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in mixed.items()}, error


def read_snapshot(path: Path) -> dict[str, Tensor]:
    """Load the weights of one snapshot.

    Raises:
        CheckpointError: where the snapshot is damaged or holds numbers that are not finite.
    """
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the snapshot {path} cannot be read ({error}).") from error
    if not all(torch.isfinite(tensor).all() for tensor in weights.values()):
        raise CheckpointError(f"the snapshot {path} holds numbers that are not finite.")
    return weights


def average(config: AverageConfig) -> list[Path]:
    """Write the pipeline of each average into the run folder and return the folders.

    It prints the error of the profile of each. Where the run has held-out images, it also prints the loss of each
    average and of the run's own on them, and names the best.

    Raises:
        ValueError: where the run has no pipeline, or one of another network than the snapshots.
        CheckpointError: where a snapshot cannot be read or a pipeline cannot be written.
    """
    run, written = Run(config.run), []
    step = find_snapshots(run)[-1][0] if config.step is None else config.step
    for width in config.sigma_rel:
        weights, error = reconstruct(run, width, step)
        if not run.pipeline.is_dir():
            raise ValueError(f"run={config.run!r} has no pipeline whose network the averages could fill.")
        pipeline = DDPMPipeline.from_pretrained(run.pipeline)
        if shapes(weights) != shapes(pipeline.unet.state_dict()):
            raise ValueError(f"the snapshots in {run.snapshots} are of another network than {run.pipeline}.")
        settings = {key: value for key, value in pipeline.unet.config.items() if key[0] != "_"}  # omits its old path
        unet = type(pipeline.unet).from_config(settings)
        unet.load_state_dict(weights)
        folder = run.average(width)
        run.save_pipeline(folder, DDPMPipeline(unet, pipeline.scheduler), step)
        print(f"{folder}: sigma_rel {width:g}, error of its profile {error:.2%}")
        written.append(folder)
    compare(run, [run.pipeline, *written])
    return written


# ---------------------------------------------------------------- which is the best


def compare(run: Run, pipelines: list[Path]) -> None:
    """Print the loss of pipelines on the held-out images of their run, if it has any, and name the best."""
    try:
        losses = held_out_losses(run, pipelines) if run.read_config().get("holdout") else {}
    except ValueError as error:
        print(f"the averages are written, but were not compared on held-out images: {error}")
        return
    if not losses:
        return
    for pipeline, loss in losses.items():
        print(f"{pipeline}: loss {loss:.5f} on the held-out images")
    best = min(losses, key=losses.__getitem__)
    print(f"{best.name} has the least loss; share it with `ddpm-pipe push --run {run} --pipeline {best.name}`.")


def held_out_losses(run: Run, pipelines: list[Path]) -> dict[Path, float]:
    """Return the loss of pipelines on the held-out images of their run, as the run itself measures it.

    Raises:
        ValueError: where the images cannot be read, or the config of the run is not of this version.
    """
    config, state = TrainConfig(**run.read_config()), processes()
    _, held_out = load_training_images(config, state)
    losses = {}
    for pipeline in pipelines:
        unet = DDPMPipeline.from_pretrained(pipeline).unet.to(state.device)
        objective = make_objective(config, make_scheduler(config), kept_teacher(config, unet, run))
        sums = held_out_sums(config, unet, objective, held_out, state.device)
        losses[pipeline] = named_means("held_out_loss", sums)["held_out_loss"]
    return losses
