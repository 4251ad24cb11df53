"""What `accelerate launch` and the machine say of a run: processes, precision, trackers."""

import os

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    is_tensorboard_available,
    parse_flag_from_env,
)

from ddpm_pipe.launch import PATIENCE
from ddpm_pipe.training.config import TrainConfig

UNSUPPORTED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}
"""What `accelerate launch` sets for a process -> what it then expects of it."""


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
    return config.replace(mixed_precision=precision)


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
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=PATIENCE),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # one copy of the gradients less
        ],
        log_with=None if tracker == "none" else tracker,
        project_dir=config.output_dir,
    )


def _computes_bf16() -> bool:
    """Whether the device of this run has bf16 instructions, not an emulation."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
