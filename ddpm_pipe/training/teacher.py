"""The teacher whose guidance a student learns: the model that a run starts from, frozen and kept in the run folder."""

import copy

import safetensors
from accelerate import Accelerator
from diffusers import ModelMixin
from safetensors.torch import load_file, save_file

from ddpm_pipe.launch import from_main
from ddpm_pipe.run.files import whole_file
from ddpm_pipe.run.folder import Run
from ddpm_pipe.training.config import TrainConfig


def frozen_copy(config: TrainConfig, unet: ModelMixin) -> ModelMixin | None:
    """Return a copy of the network that is not trained; None where the loss has no use for a teacher."""
    return copy.deepcopy(unet).requires_grad_(False).eval() if config.consistency_guidance != 1 else None


def first_teacher(config: TrainConfig, unet: ModelMixin, copied: str | None) -> ModelMixin | None:
    """Return the teacher of a new run, whose network has just received the weights of the model that it starts from.

    Args:
        config: the config of the run.
        unet: the network.
        copied: what the plan says of the weights.

    Raises:
        ValueError: where the network is not the model that the run starts from.
    """
    if config.consistency_guidance != 1 and copied != "all weights copied":
        raise ValueError(
            f"consistency_guidance={config.consistency_guidance} needs a model that the run takes over as it is, but "
            f"of init_from={config.init_from!r}: {copied}."
        )
    return frozen_copy(config, unet)


def prepared(teacher: ModelMixin | None, accelerator: Accelerator) -> ModelMixin | None:
    """Put the teacher on the device of a run, where it computes in the precision of the run."""
    return None if teacher is None else accelerator.prepare_model(teacher, evaluation_mode=True)


def keep_teacher(teacher: ModelMixin, run: Run) -> None:
    """Write the weights of the teacher into the run folder, so that a resumed run has the same."""
    with whole_file(run.teacher) as new:
        save_file({name: weight.cpu().contiguous() for name, weight in teacher.state_dict().items()}, new)


def kept_teacher(config: TrainConfig, unet: ModelMixin, run: Run) -> ModelMixin | None:
    """Return the teacher that the run folder keeps; all processes receive what the main process reads.

    Args:
        config: the config of the run.
        unet: a network like the teacher.
        run: the run folder.

    Raises:
        ValueError: where its file cannot be read.
    """
    teacher = frozen_copy(config, unet)
    if teacher is not None:
        teacher.load_state_dict(from_main(lambda: _read(run)))
    return teacher


def _read(run: Run) -> dict:
    try:
        return load_file(run.teacher)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"{run.teacher}, the teacher whose guidance this run learns, cannot be read ({error}); start the run again."
        ) from None
