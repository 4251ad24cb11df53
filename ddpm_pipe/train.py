"""Training: Algorithm 1 of DDPM under Accelerate.

Everything scheduled is a pure function of the optimizer step, everything random a function of the seed and counters,
and the batch is cut into equal parts for processes and accumulation steps: the run is the same however it is cut.
"""

import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import is_tensorboard_available
from diffusers import ModelMixin
from diffusers.utils import make_image_grid
from torch import Tensor
from tqdm.auto import tqdm

from ddpm_pipe.checkpoint import Checkpoints, replace_folder
from ddpm_pipe.config import save_config
from ddpm_pipe.data import Batches, load_images
from ddpm_pipe.ema import EMA, warmup_decay
from ddpm_pipe.objective import Objective
from ddpm_pipe.pipeline import DDPMPipeline
from ddpm_pipe.randomness import derive_seed, generator
from ddpm_pipe.recipe import TrainConfig, lr_at, make_scheduler, make_unet
from ddpm_pipe.schedulers import DDIMScheduler

__all__ = ["TrainConfig", "lr_at", "train"]

CONFIG = "config.yaml"
"""The config of a run, in its folder; where it exists there is a run."""


def train(config: TrainConfig) -> Path:
    """Train a network and leave a pipeline in `<output_dir>/pipeline`.

    Returns:
        The folder of the pipeline, for `DDPMPipeline.from_pretrained`.

    Raises:
        ValueError: for a config or data that cannot work, in one sentence.
        CheckpointError: where a checkpoint cannot be written; earlier ones are intact.
    """
    accelerator = make_accelerator(config)
    run = open_run(config, accelerator)
    with accelerator.main_process_first():
        data = load_images(
            config.data,
            config.split,
            image_column=config.image_column,
            label_column=config.label_column,
            with_labels=config.class_conditional,
            resolution=config.resolution,
            channels=config.channels,
        )
    unet, scheduler = make_unet(config, data), make_scheduler(config)
    objective = Objective(scheduler, config.loss, config.loss_weight, config.loss_gamma, config.loss_k)
    state = TrainState(config, unet, accelerator)
    first_step = state.restore(run) if config.resume else 0
    accelerator.print(f"{data.describe()}\n{state.describe()}")
    if accelerator.is_main_process:
        save_config(config, run / CONFIG)

    batches = Batches(data, config.batch_size, config.seed, config.flip)
    log = Log(config, accelerator, first_step)

    for step in range(first_step, config.steps):  # Algorithm 1
        for part, draws in micro_batches(config, accelerator, step, data.shape):
            x0, labels = batches(step, part, accelerator.device)
            conditions = (
                {} if labels is None else {"class_labels": torch.where(draws.hide_label, state.null_class, labels)}
            )
            with accelerator.accumulate(state.unet):
                loss = objective(state.unet, x0, draws.t, draws.eps, draws.self_condition, **conditions).mean()
                accelerator.backward(loss)
                state.optimizer_step(step)
            log.add(loss)
        state.ema.update(accelerator.unwrap_model(state.unet), step)

        done = step + 1
        log.write(done, state)
        last = done == config.steps
        if accelerator.is_main_process and config.sample_every and (last or done % config.sample_every == 0):
            save_samples(config, DDPMPipeline(state.ema.module, scheduler), run / "samples" / f"step-{done:08d}.png")
        if accelerator.is_main_process and (last or done % config.save_every == 0):
            state.save(run, done)
            replace_folder(run / "pipeline", DDPMPipeline(state.ema.module, scheduler).save_pretrained)
    accelerator.wait_for_everyone()
    log.close()
    return run / "pipeline"


# ---------------------------------------------------------------- randomness of one step


class Draws(NamedTuple):
    """What chance decides about a part of the batch."""

    t: Tensor
    """timesteps, (n,), uniform over the chain"""
    eps: Tensor
    """noise, (n, C, H, W)"""
    hide_label: Tensor
    """whether the label gives way to the null class, (n,)"""
    self_condition: bool
    """whether the network is shown its own estimate; the same for the whole batch"""


def micro_batches(
    config: TrainConfig, accelerator: Accelerator, step: int, shape: tuple[int, ...]
) -> Iterator[tuple[slice, Draws]]:
    """The parts of the batch of a step that fall to this process, one per accumulation step.

    All is drawn for the whole batch and then cut, so that it does not depend on the number of processes.
    """
    size, device = config.batch_size, accelerator.device

    def draw(stream: str) -> torch.Generator:
        return generator(config.seed, stream, step, device=device)

    t = torch.randint(config.num_train_timesteps, (size,), generator=draw("timestep"), device=device)
    eps = torch.randn(size, *shape, generator=draw("noise"), device=device)
    hide = torch.rand(size, generator=draw("class_dropout"), device=device) < config.class_dropout
    self_condition = (
        config.unet.get("self_condition", False) and derive_seed(config.seed, "self_condition", step) % 2 == 0
    )

    parts = accelerator.num_processes * config.gradient_accumulation_steps
    for micro in range(config.gradient_accumulation_steps):
        index = micro * accelerator.num_processes + accelerator.process_index
        torch.manual_seed(derive_seed(config.seed, "dropout", step, index))
        part = slice(index * size // parts, (index + 1) * size // parts)
        yield part, Draws(t[part], eps[part], hide[part], self_condition)


# ---------------------------------------------------------------- what is trained


class TrainState:
    """The network, its average and the optimizer: all that a checkpoint holds."""

    def __init__(self, config: TrainConfig, unet: ModelMixin, accelerator: Accelerator):
        parts = accelerator.num_processes * config.gradient_accumulation_steps
        if config.batch_size % parts:
            raise ValueError(
                f"batch_size={config.batch_size} must be a multiple of {parts} (processes times accumulation)."
            )
        if config.channels_last or (config.channels_last is None and accelerator.device.type == "cuda"):
            unet.to(memory_format=torch.channels_last)
        if config.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        self.config, self.accelerator = config, accelerator
        self.null_class = getattr(unet, "null_class", (unet.config.num_class_embeds or 0) - 1)
        self.ema = EMA(unet.to(accelerator.device), lambda step: warmup_decay(step, config.ema_decay, config.ema_power))
        optimizer = torch.optim.AdamW(
            unet.parameters(),
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        if config.compile:
            unet.compile()
        self.unet, self.optimizer = accelerator.prepare(unet, optimizer)
        self.unet.train()

    def optimizer_step(self, step: int) -> None:
        """Clip and step once all gradients of the batch are there; before that, Accelerate makes it do nothing."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(step, self.config)
        if self.accelerator.sync_gradients and self.config.max_grad_norm:
            self.accelerator.clip_grad_norm_(self.unet.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, run: Path, step: int) -> None:
        """Write a checkpoint of `step` optimizer steps."""
        weights = {
            "unet": self.accelerator.unwrap_model(self.unet).state_dict(),
            "ema": self.ema.module.state_dict(),
        }
        state = {"optimizer": self.optimizer.state_dict()}
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        Checkpoints(run, self.config.keep_last, self.config.keep_every).save(step, weights, state)

    def restore(self, run: Path) -> int:
        """Load the newest checkpoint and return its number of optimizer steps; 0 where there is none."""
        loaded = Checkpoints(run).load()
        if loaded is None:
            return 0
        step, weights, state = loaded
        self.accelerator.unwrap_model(self.unet).load_state_dict(weights["unet"])
        self.ema.module.load_state_dict(weights["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        return step

    def describe(self) -> str:
        """The part of the plan that concerns the network and the machine."""
        accelerator, config = self.accelerator, self.config
        parameters = sum(p.numel() for p in self.ema.module.parameters())
        parts = f"{accelerator.num_processes} processes x {config.gradient_accumulation_steps} accumulation steps"
        return (
            f"{type(self.ema.module).__name__} of {parameters:,} parameters on {accelerator.device.type}, "
            f"{accelerator.mixed_precision if accelerator.mixed_precision != 'no' else 'float32'}\n"
            f"{config.steps} steps of {config.batch_size} images ({parts})"
        )


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
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=None if tracker == "none" else tracker,
        project_dir=config.output_dir,
    )


def _computes_bf16() -> bool:
    """Whether the device of this run has bf16 instructions, not an emulation."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def open_run(config: TrainConfig, accelerator: Accelerator) -> Path:
    """Make the run folder, on the main process.

    Raises:
        ValueError: where it cannot be written, or holds a run and neither `resume` nor `overwrite` is set.
    """
    run = Path(config.output_dir)
    if accelerator.is_main_process:
        if (run / CONFIG).exists() and not (config.resume or config.overwrite):
            raise ValueError(
                f"output_dir={config.output_dir!r} holds a run; pass --resume, --overwrite or another folder."
            )
        try:
            if config.overwrite:
                for part in ("checkpoints", "samples", "pipeline", "logs"):
                    shutil.rmtree(run / part, ignore_errors=True)
            (run / "samples").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"output_dir={config.output_dir!r} cannot be written: {error.strerror}.") from error
    accelerator.wait_for_everyone()
    return run


# ---------------------------------------------------------------- what is seen of it


class Log:
    """Progress bar and tracker. Losses stay on the device between entries."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator, first_step: int):
        self.config, self.accelerator = config, accelerator
        self.bar = tqdm(
            initial=first_step, total=config.steps, disable=not accelerator.is_local_main_process, unit="step"
        )
        self.losses: list[Tensor] = []
        self.since = (time.perf_counter(), first_step)
        accelerator.init_trackers("logs")

    def add(self, loss: Tensor) -> None:
        self.losses.append(loss.detach())

    def write(self, done: int, state: TrainState) -> None:
        """One entry every `log_every` steps: mean loss since the last one over all processes, learning rate, speed."""
        self.bar.update()
        if done % self.config.log_every and done != self.config.steps:
            return
        loss = self.accelerator.reduce(torch.stack(self.losses).mean(), "mean").item()
        now, (then, step) = time.perf_counter(), self.since
        speed = (done - step) * self.config.batch_size / (now - then)
        self.losses, self.since = [], (now, done)
        self.bar.set_postfix(loss=f"{loss:.4f}", images_per_s=f"{speed:.0f}")
        rate = state.optimizer.param_groups[0]["lr"]
        self.accelerator.log({"loss": loss, "learning_rate": rate, "images_per_second": speed}, step=done)

    def close(self) -> None:
        self.bar.close()
        self.accelerator.end_training()


def save_samples(config: TrainConfig, pipeline: DDPMPipeline, path: Path) -> None:
    """Draw a grid with DDIM from the same noise each time; with classes, one column per class."""
    pipeline = DDPMPipeline(
        pipeline.unet, DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    )
    pipeline.set_progress_bar_config(disable=True)
    count, columns, options = config.num_samples, math.ceil(math.sqrt(config.num_samples)), {}
    if config.class_conditional:
        classes = pipeline.unet.config.num_class_embeds - (not hasattr(pipeline.unet, "null_class"))
        columns = min(classes, count)
        options = {"class_labels": torch.arange(count) % classes, "guidance_scale": config.guidance_scale}
    noise = generator(config.seed, "sample")
    (images,) = pipeline(count, noise, config.sample_steps, **options, return_dict=False)
    rows = math.ceil(count / columns)
    blank = [images[0].point(lambda _: 0)] * (rows * columns - count)
    make_image_grid(images + blank, rows, columns).save(path)
