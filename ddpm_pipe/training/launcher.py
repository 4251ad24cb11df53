"""Settings that `accelerate launch` and the machine give a run: processes, precision and trackers."""

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
"""Maps an environment variable of `accelerate launch` to the unsupported feature that it requests."""


def follow_launcher(config: TrainConfig) -> TrainConfig:
    """Return the config with the precision that `accelerate launch` was given; `no` counts as not given.

    Raises:
        ValueError: where the launcher was given an option that is not supported, or contradicts the config.
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
    """Make the Accelerator with the precision and the tracker that the config names or, for auto, the machine allows.

    Raises:
        ValueError: for fp16 without a CUDA device.
    """
    tracker = config.tracker
    if tracker == "auto":
        tracker = "tensorboard" if is_tensorboard_available() else "none"
    precision = config.mixed_precision
    if precision == "auto":
        precision = "bf16" if _computes_bf16() else "no"
    if precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("mixed_precision='fp16' needs a CUDA device; use bf16 or no.")
    choose_kernels(config.deterministic)
    return Accelerator(
        cpu=not torch.accelerator.is_available(),  # explicit, so that several processes on CPUs find each other
        mixed_precision=precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.gradient_accumulation_steps),
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=PATIENCE),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # saves one copy of the gradients
        ],
        log_with=None if tracker == "none" else tracker,
        project_dir=config.output_dir,
    )


def choose_kernels(deterministic: bool) -> None:
    """Choose how CUDA computes: fast, or with the same bits in every run. What each choice gains was not measured.

    float32 products are rounded to TF32, as torch does in convolutions anyway. That has three bits more than bf16, in
    which training computes by default, and gives the same bits each time. NVIDIA_TF32_OVERRIDE=0 turns it off.

    cuDNN times its algorithms at the first batch, since the shapes of all batches are the same. Which one is the
    fastest may change from run to run, so that deterministic runs do without.

    Memory is channels-last (`TrainState`), the layout in which tensor cores take convolutions. GroupNorm is computed
    in the other, which costs copies between the two.
    """
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")  # max-autotune reads it; with fp32_precision alone this raises
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, cuBLAS raises an error
        torch.use_deterministic_algorithms(True)


def _computes_bf16() -> bool:
    """Return whether the device of this run has bf16 instructions and does not merely emulate them."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
