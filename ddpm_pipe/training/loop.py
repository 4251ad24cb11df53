"""Training: Algorithm 1 of DDPM under Accelerate.

Everything scheduled is a pure function of the optimizer step, everything random a function of the seed and counters,
and the batch is cut into equal parts for processes and accumulation steps: the run is the same however it is cut.
"""

import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, is_tensorboard_available, parse_flag_from_env
from filelock import FileLock, Timeout

from ddpm_pipe.config import read_config_file, save_config
from ddpm_pipe.data.memory import ImageData, load_images
from ddpm_pipe.data.stream import ImageStream, stream_images
from ddpm_pipe.objective import Objective
from ddpm_pipe.pretrained import DDPMPipeline
from ddpm_pipe.run.files import replace_text, save_pipeline
from ddpm_pipe.schedulers import DDPMScheduler
from ddpm_pipe.sharing.card import EVALUATION
from ddpm_pipe.sharing.push import PushConfig, Pusher
from ddpm_pipe.training.draws import micro_batches
from ddpm_pipe.training.interruption import Interrupted, Interruption
from ddpm_pipe.training.log import METRICS, Log
from ddpm_pipe.training.recipe import CONFIG, PLAN, TrainConfig, lr_at, make_scheduler, make_unet
from ddpm_pipe.training.report import write_report
from ddpm_pipe.training.state import TrainState
from ddpm_pipe.training.validation import show_health

__all__ = ["Interrupted", "TrainConfig", "lr_at", "train"]

RUN_PARTS: tuple[str, ...] = ("checkpoints", "ema", "ema-[0-9]*", "pipeline", "samples", "logs", METRICS)
RUN_PARTS += ("report.png", EVALUATION, "neighbours.png", "sweep.png", PLAN, CONFIG)
"""What a run and the evaluation of its model write into the run folder, the config last."""

LOCK = "run.lock"
"""The file that a process holds locked in the folder of the run that it trains; the system frees a killed one's."""

UNSUPPORTED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}
"""What `accelerate launch` sets for a process -> what it then expects of it."""


def train(config: TrainConfig) -> Path:
    """Train a network and leave a pipeline in `<output_dir>/pipeline`.

    Returns:
        The folder of the pipeline, for `DDPMPipeline.from_pretrained`.

    Raises:
        ValueError: for a config or data that cannot work, in one sentence.
        CheckpointError: where a checkpoint cannot be written; earlier ones are intact.
        Interrupted: after SIGTERM, SIGINT or the end of the launcher, when the checkpoint is written.
    """
    interruption = Interruption()
    config = follow_launcher(config)
    accelerator = make_accelerator(config)
    with open_run(config, accelerator) as run:
        run_steps(config, accelerator, run, interruption)
        if accelerator.is_main_process:
            write_report(run)
    # The network is gone by now and its wrapper goes here: freed after the process group it talks through, it would
    # wait, holding the interpreter's lock, for a thread that may be waiting for that lock.
    accelerator.free_memory()
    accelerator.end_training()
    return run / "pipeline"


def run_steps(config: TrainConfig, accelerator: Accelerator, run: Path, interruption: Interruption) -> None:
    """All optimizer steps of a run, from the newest checkpoint on where it is resumed."""
    data, held_out = load_training_images(config, accelerator)
    scheduler = make_scheduler(config)
    objective = Objective(
        scheduler, config.loss, config.loss_weight, config.loss_gamma, config.loss_k, config.vlb_weight
    )
    state = TrainState(config, make_unet(config, data), accelerator)
    step = state.restore(run) if config.resume else 0
    announce(config, data, state, run)
    batches = data.batches(config.batch_size, config.seed, config.flip)
    log = Log(config, accelerator, run, step)
    pusher = Pusher(PushConfig(str(run), config.push_to or "", config.push_public))

    def show() -> None:
        if accelerator.is_main_process and config.is_due(step, config.sample_every):
            show_health(config, state, objective, held_out, log, step)

    with interruption:
        if step:
            show()  # what a kill between a checkpoint and its grids left out
        while step < config.steps:  # Algorithm 1
            seen = []
            for part, draws in micro_batches(config, accelerator, state.timesteps.probabilities(), step, data.shape):
                x0, labels = batches(step, part, accelerator.device)
                conditions = draws.conditions(labels, state.null_class)
                with accelerator.accumulate(state.unet):
                    losses = objective(state.unet, x0, draws.t, draws.eps, draws.self_condition, **conditions)
                    accelerator.backward((losses * draws.weight).mean())
                seen.append((draws.t, losses.detach()))
            state.optimizer_step(step, seen)
            if state.bad_steps >= config.max_bad_steps:
                step = state.roll_back(run)
                log.rewind(step)
                continue

            step += 1
            log.write(step, seen, learning_rate=lr_at(step - 1, config), **state.metrics())
            interrupted = interruption.agreed(step, config.log_every, accelerator)
            if accelerator.is_main_process:
                keep(config, state, scheduler, run, step, interrupted)
                show()
                if config.is_due(step, config.push_every):
                    pusher.push()
            if interrupted and step < config.steps:
                accelerator.wait_for_everyone()
                accelerator.print(f"stopped at step {step}; go on with --resume.")
                raise Interrupted

    accelerator.wait_for_everyone()
    log.bar.close()
    pusher.finish()


def keep(
    config: TrainConfig, state: TrainState, scheduler: DDPMScheduler, run: Path, step: int, interrupted: bool
) -> None:
    """Write snapshots, pipeline and checkpoint where it is time for them, never from weights that are not finite."""
    saving = interrupted or config.is_due(step, config.save_every)
    snapping = config.ema_sigma_rel and config.is_due(step, config.ema_snapshot_every or config.save_every)
    if saving or snapping:
        state.check_finite(step)
    if snapping:
        state.snapshot(run, step)
    if saving:
        save_pipeline(run / "pipeline", DDPMPipeline(state.average.module, scheduler), step)
        state.save(run, step)  # last of all: where it exists, so does the rest


# ---------------------------------------------------------------- before the first step


def follow_launcher(config: TrainConfig) -> TrainConfig:
    """The config with what `accelerate launch` was told of precision; its `no` is the same as not being told.

    Raises:
        ValueError: where the launcher was told what is not supported, or what contradicts the config.
    """
    for variable, name in UNSUPPORTED.items():
        if parse_flag_from_env(variable):
            raise ValueError(
                f"accelerate launch was told to use {name}, which is not supported; processes share a batch by DDP."
            )
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend != "no":
        raise ValueError(
            f"accelerate launch was told dynamo_backend={backend}, which is not supported; set compile in the config."
        )
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision == "no":
        return config
    if config.mixed_precision not in ("auto", precision):
        raise ValueError(
            f"mixed_precision={config.mixed_precision!r} contradicts mixed_precision={precision!r}, which accelerate "
            "launch was told; give it once."
        )
    return replace(config, mixed_precision=precision)


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Accelerate for this machine, with the precision and tracker that the config or the machine choose."""
    tracker = config.tracker
    if tracker == "auto":
        tracker = "tensorboard" if is_tensorboard_available() else "none"
    precision = config.mixed_precision
    if precision == "auto":
        precision = "bf16" if _computes_bf16() else "no"
    if precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("mixed_precision='fp16' needs a CUDA device; use bf16 or no.")
    return Accelerator(
        cpu=not torch.accelerator.is_available(),  # said outright, so that several processes on CPUs find each other
        mixed_precision=precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.gradient_accumulation_steps),
        log_with=None if tracker == "none" else tracker,
        project_dir=config.output_dir,
    )


def _computes_bf16() -> bool:
    """Whether the device of this run has bf16 instructions, not an emulation."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@contextmanager
def open_run(config: TrainConfig, accelerator: Accelerator) -> Iterator[Path]:
    """Make the run folder and keep other processes from training in it, on the main process.

    Raises:
        ValueError: where it cannot be written, another process trains in it, it holds a run and neither `resume` nor
            `overwrite` is set, or `overwrite` is set and it holds none.
    """
    run = Path(config.output_dir)
    lock = FileLock(run / LOCK, timeout=0)
    if accelerator.is_main_process:
        check_folder(config, run)
        try:
            run.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout as error:
            raise ValueError(f"output_dir={config.output_dir!r} is being trained in by another process.") from error
        except OSError as error:
            raise ValueError(f"output_dir={config.output_dir!r} cannot be written: {error.strerror}.") from error
    try:
        if config.resume and accelerator.is_main_process:
            print_changes(run / CONFIG, config)
        accelerator.wait_for_everyone()
        yield run
    finally:
        lock.release()


def check_folder(config: TrainConfig, run: Path) -> None:
    """Refuse a run folder whose contents the config would mix with or delete."""
    if (run / CONFIG).exists() and not (config.resume or config.overwrite):
        raise ValueError(f"output_dir={config.output_dir!r} holds a run; pass --resume, --overwrite or another folder.")
    found = [path.name for path in written_parts(run)]
    if config.overwrite and found and not is_run(run):
        raise ValueError(
            f"output_dir={config.output_dir!r} holds {', '.join(found)} but not the {CONFIG} of a run, so --overwrite "
            "deletes nothing there; choose another folder."
        )


def is_run(folder: Path) -> bool:
    """Whether a folder holds the config of a run, not that of something else."""
    try:
        return {"data", "output_dir"} <= read_config_file(folder / CONFIG).keys()
    except ValueError:
        return False


def written_parts(run: Path) -> list[Path]:
    """What runs wrote into a folder, and what a kill left half-written beside it; the config is the last."""
    names = [form.format(name) for name in RUN_PARTS for form in ("{}", ".{}.new", ".{}.old")]
    return [path for name in names for path in sorted(run.glob(name))]


def clear(run: Path) -> None:
    """Delete what runs wrote into a folder, and nothing else.

    Raises:
        ValueError: where something cannot be deleted.
    """
    try:
        for path in written_parts(run):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    except OSError as error:
        raise ValueError(f"output_dir={str(run)!r} cannot be cleared: {error}.") from error


def print_changes(saved: Path, config: TrainConfig) -> None:
    """Say which choices differ from those the run was started with; it then is another run from here on."""
    before = read_config_file(saved) if saved.exists() else {}
    for name, value in before.items():
        now = getattr(config, name, value)
        if now != value and name not in ("resume", "overwrite"):
            print(f"resumed with {name}={now!r}, was {value!r}")


def announce(config: TrainConfig, data: ImageData | ImageStream, state: TrainState, run: Path) -> None:
    """Print the plan, and write it and the config into the run folder, now that nothing more speaks against them."""
    accelerator = state.accelerator
    accelerator.print(f"{data.describe()}\n{state.describe()}")
    if accelerator.is_main_process:
        if config.overwrite:
            clear(run)
        save_config(replace(config, resume=False, overwrite=False), run / CONFIG)
        network, batches = state.describe().splitlines()
        plan = {
            "data": data.describe().splitlines()[0].split(";")[0],
            "class_names": data.class_names if config.class_conditional else [],
            "network": network,
            "batches": batches,
            "device": describe_device(accelerator.device),
            "versions": {name: version(name) for name in ("ddpm_pipe", "torch", "diffusers")},
        }
        replace_text(run / PLAN, json.dumps(plan, indent=2) + "\n")


def describe_device(device: torch.device) -> str:
    """The name of a GPU, or the number and kind of CPU cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} {platform.machine()} CPU cores"


def load_training_images(config: TrainConfig, accelerator: Accelerator) -> tuple[ImageData | ImageStream, ImageData]:
    """The images to train on, and those held out; read by the main process first, which fills the caches."""
    load = stream_images if config.streaming else load_images
    with accelerator.main_process_first():
        data = load(
            config.data,
            config.split,
            image_column=config.image_column,
            label_column=config.label_column,
            with_labels=config.class_conditional,
            resolution=config.resolution,
            channels=config.channels,
        )
    return data.hold_out(config.holdout, config.seed)
