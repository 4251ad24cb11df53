"""The training state: the network, its averages and the optimizer, which are updated, saved and restored together."""

import math
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from torch import Tensor

from ddpm_pipe.checks import check_choice
from ddpm_pipe.launch import from_main
from ddpm_pipe.pipeline import null_class
from ddpm_pipe.run.checkpoint import Checkpoints
from ddpm_pipe.run.files import CheckpointError, replace_folder, save_tensors, shapes, write_manifest
from ddpm_pipe.run.folder import Run
from ddpm_pipe.training.config import TrainConfig
from ddpm_pipe.training.dropout import use_image_dropout
from ddpm_pipe.training.ema import EMA, power_decay, warmup_decay
from ddpm_pipe.training.optimizer import make_optimizer
from ddpm_pipe.training.recipe import cooldown_start, lr_at
from ddpm_pipe.training.timestep_sampling import TIMESTEP_SAMPLERS


class TrainState:
    """The network, its averages, the optimizer and the timestep sampler: all that a checkpoint holds.

    Args:
        config: the config of the run.
        unet: the network to train.
        accelerator: the processes and the device to train with.

    Raises:
        ValueError: where processes times accumulation steps do not divide batch_size, or the timestep sampling is
            unknown.
    """

    def __init__(self, config: TrainConfig, unet: ModelMixin, accelerator: Accelerator):
        parts = accelerator.num_processes * config.gradient_accumulation_steps
        if config.batch_size % parts:
            raise ValueError(
                f"batch_size={config.batch_size} must be a multiple of {parts} (processes times accumulation)."
            )
        on_cuda = accelerator.device.type == "cuda"
        self.channels_last = on_cuda if config.channels_last is None else config.channels_last
        if self.channels_last:
            unet.to(memory_format=torch.channels_last)
        if config.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        self.config, self.accelerator = config, accelerator
        self.null_class = null_class(unet)
        unet.to(accelerator.device)
        self.average = EMA(unet, lambda step: warmup_decay(step, config.ema_decay, config.ema_power))
        self.profiles = {f"{w:g}": EMA(unet, partial(power_decay, sigma_rel=w)) for w in config.ema_sigma_rel}
        self.dropouts = use_image_dropout(unet)  # after the averages are copied, which have no use for it
        check_choice("timestep_sampling", config.timestep_sampling, TIMESTEP_SAMPLERS)
        self.timesteps = TIMESTEP_SAMPLERS[config.timestep_sampling](config.num_train_timesteps)
        self.bad_steps, self.skipped, self.gradient_norm = 0, 0, 0.0
        self.parameters = list(unet.parameters())
        optimizer = make_optimizer(config, unet)
        if config.compile != "none":
            unet.compile(mode=config.compile)
        # a replay of a CUDA graph overwrites what it returned before, so gradients to add to must lie outside of it
        self.keeps_gradients = config.compile != "none" and config.gradient_accumulation_steps > 1
        for parameter in self.parameters if self.keeps_gradients else ():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        self.unet, self.optimizer = accelerator.prepare(unet, optimizer)
        self.unet.train()

    def optimizer_step(self, step: int, seen: list[tuple[Tensor, Tensor]]) -> None:
        """Clip the gradient, step the optimizer and update the averages; skip and count a gradient that is not finite.

        Args:
            step: optimizer steps done.
            seen: timesteps (n,) and losses (n,) of this process, one pair per accumulation step.

        Raises:
            ValueError: after `max_bad_steps` steps in a row without a finite gradient.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(step, self.config)
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.config.max_grad_norm or math.inf)
        self.gradient_norm = float(norm)
        finite = math.isfinite(self.gradient_norm)
        if finite or self.accelerator.scaler is not None:  # a loss scaler skips such a step by itself, and adapts
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.keeps_gradients)
        if not finite:
            self.bad_steps, self.skipped = self.bad_steps + 1, self.skipped + 1
            self._check_bad_steps()
            return
        self.bad_steps = 0
        for average in (self.average, *self.profiles.values()):
            average.update(step)
        if self.config.timestep_sampling != "uniform":
            t, losses = self._whole_batch(seen).cpu()  # both in one copy
            self.timesteps.update(t.long(), losses)

    def _check_bad_steps(self) -> None:
        """Stop a run whose gradients stay not finite; going back to a checkpoint would repeat the same computation.

        Raises:
            ValueError: after `max_bad_steps` such steps in a row.
        """
        if self.bad_steps >= self.config.max_bad_steps:
            raise ValueError(
                f"{self.bad_steps} steps in a row had no finite gradient; what was saved before them is intact: resume "
                "it, or start again, with a lower learning_rate or more lr_warmup_steps."
            )

    def _whole_batch(self, seen: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Gather timesteps and losses, (2, B), in the order of the whole batch, whatever the number of processes."""
        mine = torch.stack([torch.stack([t.double(), losses.detach().double()]) for t, losses in seen])
        everyone = self.accelerator.gather(mine[None])  # (processes, accumulation steps, 2, n)
        return everyone.permute(2, 1, 0, 3).flatten(1)

    # ------------------------------------------------------------ checkpoints

    def check_finite(self, step: int) -> None:
        """Check that the weights are finite, so that no others are saved or exported.

        Raises:
            CheckpointError: where a weight of the network or of its averages is not finite.
        """
        models = [self.accelerator.unwrap_model(self.unet), self.average.module]
        models += [profile.module for profile in self.profiles.values()]
        finite = [torch.isfinite(p).all() for model in models for p in model.parameters()]
        if not torch.stack(finite).all():  # a single transfer from the device for all weights
            raise CheckpointError(
                f"the weights at step {step} are not finite and were not saved; earlier ones are intact."
            )

    def save(self, run: Run, step: int) -> None:
        """Write the checkpoint after `step` optimizer steps.

        Raises:
            CheckpointError: where the checkpoint cannot be written; earlier ones are intact.
        """
        unet = self.accelerator.unwrap_model(self.unet)
        weights = {"unet": unet.state_dict(), "ema": self.average.module.state_dict()}
        state = {
            "optimizer": self.optimizer.state_dict(),
            "timesteps": self.timesteps.state_dict(),
            "skipped": self.skipped,
        }
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        weights |= {f"ema-{name}": profile.module.state_dict() for name, profile in self.profiles.items()}
        keep = (self.config.keep_last, self.config.keep_every, cooldown_start(self.config))
        Checkpoints(run, *keep).save(step, weights, state)

    def snapshot(self, run: Run, step: int) -> None:
        """Write the power-function averages to `<run>/ema/step-*/<sigma_rel>.safetensors`, for `posthoc`.

        Raises:
            CheckpointError: where the snapshots cannot be written.
        """
        profiles = {name: profile.module.state_dict() for name, profile in self.profiles.items()}

        def write(folder: Path) -> None:
            save_tensors(folder, profiles)
            write_manifest(folder, step)

        replace_folder(run.snapshot(step), write)

    def restore(self, run: Run, last: float = math.inf) -> int:
        """Load the newest checkpoint of the main process and return its optimizer steps, 0 where there is none.

        All processes receive what the main process reads, because machines may hold checkpoints of their own.
        Checkpoints of steps after `last` are left out.

        Raises:
            ValueError: where the checkpoint has another network, other averages or another timestep sampling.
            CheckpointError: where there are checkpoints, but none can be read.
        """
        loaded = from_main(lambda: Checkpoints(run).load(last))
        if loaded is None:
            return 0
        step, weights, state = loaded
        modules = {f"ema-{name}": profile.module for name, profile in self.profiles.items()}
        modules |= {"unet": self.accelerator.unwrap_model(self.unet), "ema": self.average.module}
        for name, module in modules.items():
            if shapes(weights.get(name, {})) != shapes(module.state_dict()):
                raise ValueError(
                    f"the checkpoint of {run} does not fit this config: its weights {name!r} are not those that unet, "
                    "class_conditional, channels, variance_type and ema_sigma_rel ask for."
                )
            module.load_state_dict(weights[name])
        if state["timesteps"].keys() != self.timesteps.state_dict().keys():
            raise ValueError(f"the checkpoint of {run} does not fit this config: it has another timestep_sampling.")
        if len(state["optimizer"]["param_groups"]) != len(self.optimizer.param_groups):
            raise ValueError(f"the checkpoint of {run} does not fit this config: it has another optimizer.")
        self.optimizer.load_state_dict(state["optimizer"])
        self.timesteps.load_state_dict(state["timesteps"])
        if self.accelerator.scaler is not None and "scaler" in state:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.bad_steps, self.skipped = 0, state["skipped"]
        return step

    def metrics(self) -> dict[str, float]:
        """Return the values of the last step for the log."""
        return {"gradient_norm": self.gradient_norm, "skipped_steps": self.skipped}

    def describe_network(self) -> str:
        """Describe the network, the device and the options chosen for it in one line, for the plan."""
        device = self.accelerator.device.type
        device = f"{torch.get_num_threads()} CPU threads" if device == "cpu" else device
        precision = self.accelerator.mixed_precision
        chosen = ["float32" if precision == "no" else precision]
        chosen += ["channels-last"] * self.channels_last
        chosen.append({"adamw": "fused AdamW", "muon": "Muon and fused AdamW"}[self.config.optimizer])
        chosen += [f"compiled ({self.config.compile})"] * (self.config.compile != "none")
        parameters = sum(p.numel() for p in self.average.module.parameters())
        return f"{type(self.average.module).__name__} of {parameters:,} parameters on {device}: {', '.join(chosen)}"

    def describe_batches(self) -> str:
        """Describe the steps and how their batches are cut in one line, for the plan."""
        accumulation = self.config.gradient_accumulation_steps
        parts = f"{self.accelerator.num_processes} processes x {accumulation} accumulation steps"
        return f"{self.config.steps} steps of {self.config.batch_size} images ({parts})"
