"""What would make the host wait for a GPU, or mix its tensors with those of the CPU: looked for where there is no GPU.

The meta device has shapes but no numbers. Whatever asks one of its tensors for a number raises, as does whatever
combines it with a tensor of the CPU; on a GPU the first would wait for all that was begun there, and the second raise.
"""

import diffusers
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_pipe import DDIMScheduler, DDPMPipeline, DDPMScheduler, DDPMUNet2DModel
from ddpm_pipe.data.memory import load_images
from ddpm_pipe.editing import ImageToImagePipeline, InpaintPipeline, InversionPipeline
from ddpm_pipe.likelihood import variational_bound
from ddpm_pipe.objective import LOSSES, Objective
from ddpm_pipe.prediction import LOSS_WEIGHTS, PREDICTIONS
from ddpm_pipe.sampling.config import SCHEDULERS
from ddpm_pipe.sampling.protocol import plug_in
from ddpm_pipe.training.draws import micro_batches
from ddpm_pipe.training.ema import EMA
from ddpm_pipe.training.launcher import make_accelerator
from ddpm_pipe.training.recipe import make_objective, make_scheduler, make_unet
from ddpm_pipe.training.state import TrainState

META = torch.device("meta")
OPTIONS = {"num_inference_steps": 5, "class_labels": 3, "output_type": "pt", "return_dict": False}
PICTURES = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def scheduler(**options) -> DDPMScheduler:
    return DDPMScheduler(beta_schedule="squaredcos_cap_v2", **options)


def network(scheduler: DDPMScheduler, **options) -> DDPMUNet2DModel:
    learned = scheduler.config.variance_type.startswith("learned")
    small = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "num_class_embeds": 10}
    shape = {"sample_size": 8, "in_channels": 1, "out_channels": 1 + learned}
    return DDPMUNet2DModel(**shape, **small, attention_types=("none", "linear"), **options).to(META)


def pipeline(own: DDPMScheduler, **options) -> DDPMPipeline:
    made = DDPMPipeline(network(own, **options), own)
    made.set_progress_bar_config(disable=True)
    return made


# ---------------------------------------------------------------- that the meta device finds what it is to find


@pytest.mark.parametrize("ask", [float, bool, torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy], ids=str)
def test_a_number_that_is_asked_for_is_found(ask):
    with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
        ask(torch.ones(1, device=META))


def test_tensors_of_two_devices_are_found():
    with pytest.raises(RuntimeError, match="device"):
        torch.ones(3, device=META) + torch.ones(3)


# ---------------------------------------------------------------- training


@pytest.mark.parametrize(
    ("chain", "loss", "options"),
    [
        *(({"prediction_type": name}, {}, {}) for name in PREDICTIONS),
        *(({}, {"weight": name}, {}) for name in LOSS_WEIGHTS),
        *(({}, {"loss": name}, {}) for name in LOSSES),
        ({"variance_type": "learned_range"}, {}, {}),
        ({}, {}, {"self_condition": True}),
        ({}, {}, {"dropout": 0.1}),
    ],
    ids=str,
)
def test_loss_gradient_and_average_wait_for_nothing(chain, loss, options):
    own = scheduler(**chain)
    unet = network(own, **options)
    average, objective = EMA(unet, lambda step: 0.9), Objective(own, **loss)
    x0, t = PICTURES.to(META), torch.zeros(2, dtype=torch.long, device=META)
    self_condition = options.get("self_condition", False)
    objective(unet, x0, t, torch.randn_like(x0), self_condition, class_labels=t).mean().backward()
    average.update(3)
    assert all(parameter.grad.device == META for parameter in unet.parameters())


# ---------------------------------------------------------------- sampling


@pytest.mark.parametrize("name", SCHEDULERS)
def test_sampling_waits_for_nothing_whatever_the_scheduler(name):
    made = pipeline(scheduler(prediction_type="v_prediction"))
    made.scheduler = plug_in(made.scheduler, name, {}, fewer=True)
    (images,) = made(2, [torch.Generator().manual_seed(i) for i in (0, 1)], guidance_scale=2.0, **OPTIONS)
    assert images.device == META and images.shape == (2, 1, 8, 8)


@pytest.mark.parametrize(
    ("chain", "options"),
    [({"variance_type": "learned_range"}, {}), ({"thresholding": True}, {}), ({}, {"self_condition": True})],
    ids=str,
)
def test_sampling_waits_for_nothing_whatever_the_model(chain, options):
    made = pipeline(scheduler(**chain), **options)
    assert made(2, **OPTIONS)[0].device == META


def test_editing_waits_for_nothing():
    ddpm = pipeline(scheduler())
    ddim = DDIMScheduler.from_config(ddpm.scheduler.config, clip_sample=False)
    for own in (ddpm.scheduler, ddim, diffusers.DPMSolverMultistepScheduler.from_config(ddim.config)):
        assert ImageToImagePipeline.from_pipe(ddpm, scheduler=own)(PICTURES, **OPTIONS)[0].device == META
    for own in (ddpm.scheduler, ddim):
        inpaint = InpaintPipeline.from_pipe(ddpm, scheduler=own)
        assert inpaint(PICTURES, torch.ones(2, 1, 8, 8), jump_length=2, **OPTIONS)[0].device == META
    invert = InversionPipeline.from_pipe(ddpm, scheduler=ddim)
    assert invert(PICTURES, num_inference_steps=5, class_labels=3).device == META


def test_the_bound_waits_for_nothing():
    made = pipeline(scheduler(variance_type="learned_range"))
    labels = torch.zeros(2, dtype=torch.long, device=META)
    network_of = made.denoiser(labels)
    draw = torch.Generator().manual_seed(0)
    bound = variational_bound(
        lambda x_t, t: network_of(x_t, t, torch.zeros_like(x_t)), made.scheduler, PICTURES.to(META), 10, draw
    )
    assert bound.total.device == META


# ---------------------------------------------------------------- waits that the meta device cannot count


class Waits(TorchDispatchMode):
    """Counts how often a number is taken out of a tensor."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **kwargs or {})


class Launches(TorchDispatchMode):
    """Counts the operations that compute: all but views, each of which is one kernel or more on a GPU."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **kwargs or {})


def test_a_pass_through_the_network_takes_few_kernels():
    unet = DDPMUNet2DModel(sample_size=8).to(META)
    with Launches() as forward:
        output = unet(torch.zeros(2, 3, 8, 8, device=META), torch.zeros(2, device=META)).sample
    with Launches() as backward:
        output.backward(torch.ones_like(output))
    assert forward.count <= 440 and backward.count <= 500, (forward.count, backward.count)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_training_step_waits_once_whatever_it_is_cut_into(recipe, accumulation):
    config = recipe(gradient_accumulation_steps=accumulation, class_conditional=True, flip=True, offset_noise=0.1)
    accelerator = make_accelerator(config)
    data = load_images(config.data, config.split, resolution=config.resolution, with_labels=True)
    state, batches = TrainState(config, make_unet(config, data), accelerator), data.batches(config.batch_size, 0)
    objective = make_objective(config, make_scheduler(config))
    for step in range(2):
        batch = slice(0, config.batch_size // accumulation), slice(config.batch_size // accumulation, config.batch_size)
        images = {part.start: batches(step, part) for part in batch}  # looked up on the CPU, wherever they go
        with Waits() as waits:
            seen, probabilities = [], state.timesteps.probabilities()
            for part, draws in micro_batches(config, accelerator, probabilities, step, data.shape):
                x0, labels = images[part.start]
                conditions = draws.conditions(labels, state.null_class)
                with accelerator.accumulate(state.unet):
                    losses = objective(state.unet, draws.mirrored(x0), draws.t, draws.eps, **conditions)
                    accelerator.backward((losses * draws.weight).mean())
                seen.append((draws.t, losses.detach()))
            state.optimizer_step(step, seen)
        assert waits.count == 1, "the norm of the gradient, which says whether it is finite"
    with Waits() as waits:
        state.check_finite(2)
    assert waits.count == 1
