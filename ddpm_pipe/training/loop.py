"""Training: Algorithm 1 of DDPM under Accelerate.

Every schedule is a pure function of the optimizer step, and every random number a function of the seed and of counters.
The batch is cut into equal parts for processes and accumulation steps. So a run takes the same steps however it is cut.
"""

from contextlib import ExitStack
from functools import partial
from pathlib import Path

from accelerate import Accelerator, PartialState

from ddpm_pipe.data.memory import ImageData, load_images
from ddpm_pipe.data.stream import ImageStream, stream_images
from ddpm_pipe.launch import from_main
from ddpm_pipe.pretrained import DDPMPipeline
from ddpm_pipe.run.folder import Run
from ddpm_pipe.schedulers import DDPMScheduler
from ddpm_pipe.sharing.config import PushConfig
from ddpm_pipe.sharing.push import Pusher
from ddpm_pipe.training.config import TrainConfig
from ddpm_pipe.training.interruption import Interrupted, Interruption
from ddpm_pipe.training.launcher import follow_launcher, make_accelerator
from ddpm_pipe.training.log import Log
from ddpm_pipe.training.plan import announce, check_folder, print_changes
from ddpm_pipe.training.recipe import cooldown_start, lr_at, make_objective, make_sampler, make_scheduler, make_unet
from ddpm_pipe.training.report import write_report
from ddpm_pipe.training.settling import settle
from ddpm_pipe.training.start import find_source, start_from, take_over
from ddpm_pipe.training.state import TrainState
from ddpm_pipe.training.step import training_step
from ddpm_pipe.training.teacher import first_teacher, keep_teacher, kept_teacher, prepared
from ddpm_pipe.training.validation import Validation

__all__ = ["Interrupted", "TrainConfig", "train"]


def train(config: TrainConfig) -> Path:
    """Train a network and save its averaged weights as a pipeline in `<output_dir>/pipeline`.

    With `config.plan` only the plan is printed, and nothing is written.

    Returns:
        The folder of the pipeline, for `DDPMPipeline.from_pretrained`.

    Raises:
        ValueError: for a config or data that cannot work, or gradients that are not finite for `max_bad_steps` steps.
        CheckpointError: where a checkpoint cannot be written, or none can be read; earlier ones are intact.
        Interrupted: after SIGTERM, SIGINT or the end of the launcher, once a checkpoint is written.
    """
    interruption = Interruption()
    config = follow_launcher(config)
    accelerator, run = make_accelerator(config), Run(config.output_dir)
    with ExitStack() as stack:
        if not config.plan:
            from_main(lambda: claim_folder(config, run, stack))
        run_steps(config, accelerator, run, interruption)
        if accelerator.is_main_process and not config.plan:
            write_report(run)
    # The wrapper of the network must be freed before the process group that it communicates through. Freed later, it
    # would hold the interpreter's lock while it waits for a thread that may itself be waiting for that lock.
    accelerator.free_memory()
    accelerator.end_training()
    return run.pipeline


def claim_folder(config: TrainConfig, run: Run, stack: ExitStack) -> None:
    """Check the run folder, and keep other processes from training in it as long as the stack is open.

    Raises:
        ValueError: where the folder must not be used, or another process trains in it.
    """
    check_folder(config, run)
    stack.enter_context(run.locked())


def run_steps(config: TrainConfig, accelerator: Accelerator, run: Run, interruption: Interruption) -> None:
    """Take all optimizer steps of a run; a resumed run starts at its newest checkpoint."""
    source = from_main(partial(find_source, config, run))
    config = take_over(config, source)
    data, held_out = load_training_images(config, accelerator)
    settled = settle(config, data, held_out, accelerator, run)
    config = settled.config
    if config.resume and accelerator.is_main_process:
        print_changes(config, run)
    scheduler = make_scheduler(config)
    unet = make_unet(config, data)
    start = None if source is None else start_from(source, unet, config)
    is_new = source is not None and bool(source.weights)
    del source  # its weights are copied
    teacher = first_teacher(config, unet, start["told"]) if start and is_new else kept_teacher(config, unet, run)
    objective = make_objective(config, scheduler, prepared(teacher, accelerator))
    state = TrainState(config, unet, accelerator)
    first = state.restore(run, settled.last) if config.resume else 0
    announce(settled, data, state, run, first, start)
    if config.plan:
        return
    if teacher is not None and not first and accelerator.is_main_process:
        keep_teacher(teacher, run)
    batches = data.batches(config.batch_size, config.seed)
    log = Log(config, accelerator, run, first)
    validation = Validation(config, objective, data, held_out, log)
    pusher = Pusher(PushConfig(run=str(run), repo=config.push_to or "none", public=config.push_public))

    with interruption:
        if first and accelerator.is_main_process:
            validation.show(state, first)  # draws grids that are missing if the run was killed after this checkpoint
        for step in range(first, config.steps):  # Algorithm 1
            seen = training_step(state, objective, batches, data.shape, step)

            done = step + 1
            log.write(done, seen, learning_rate=lr_at(step, config), **state.metrics())
            interrupted = interruption.agreed(done, config.log_every, accelerator)
            if accelerator.is_main_process:
                save(config, state, scheduler, run, done, interrupted)
                validation.show(state, done)
                if config.is_due(done, config.push_every):
                    pusher.push()
            if interrupted and done < config.steps:
                accelerator.wait_for_everyone()
                accelerator.print(f"stopped at step {done}; resume with --resume.")
                raise Interrupted

    accelerator.wait_for_everyone()
    log.close()
    pusher.finish()


def save(
    config: TrainConfig, state: TrainState, scheduler: DDPMScheduler, run: Run, step: int, interrupted: bool
) -> None:
    """Write the snapshots, the pipeline and the checkpoint that are due after `step` optimizer steps.

    Raises:
        CheckpointError: where the weights are not finite, or a file cannot be written.
    """
    saving = interrupted or config.is_due(step, config.save_every) or step == cooldown_start(config)
    snapping = config.ema_sigma_rel and config.is_due(step, config.ema_snapshot_every or config.save_every)
    if saving or snapping:
        state.check_finite(step)
    if snapping:
        state.snapshot(run, step)
    if saving:
        run.save_pipeline(run.pipeline, DDPMPipeline(state.average.module, make_sampler(config, scheduler)), step)
        state.save(run, step)  # last, so that where a checkpoint exists, the rest does too


def load_training_images(
    config: TrainConfig, accelerator: Accelerator | PartialState
) -> tuple[ImageData | ImageStream, ImageData]:
    """Return the images to train on and those held out.

    On each machine one process reads them first and fills the caches for the others.

    Raises:
        ValueError: for data that cannot be read, or where this machine has other images than the main process.
    """
    load = stream_images if config.streaming else load_images
    with accelerator.local_main_process_first():
        data = load(
            config.data,
            config.split,
            image_column=config.image_column,
            label_column=config.label_column,
            with_labels=config.class_conditional,
            resolution=config.resolution,
            channels=config.channels,
        )
    expected = from_main(data.summary)
    if data.summary() != expected:
        raise ValueError(f"data={config.data!r} is {data.summary()} here, but {expected} on the main process.")
    return data.hold_out(config.holdout, config.seed)
