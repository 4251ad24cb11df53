"""What would make the host wait for a GPU, or mix its tensors with those of the CPU: looked for where there is no GPU.

The meta device has shapes but no numbers. Whatever asks one of its tensors for a number raises, as does whatever
combines it with a tensor of the CPU; on a GPU the first would wait for all that was begun there, and the second raise.
"""

import diffusers
import pytest
import torch
from runs import NETWORK
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_pipe import DDIMScheduler, DDPMPipeline, DDPMScheduler, DDPMUNet2DModel
from ddpm_pipe.data.memory import ImageData, load_images
from ddpm_pipe.editing import ImageToImagePipeline, InpaintPipeline, InversionPipeline, slerp
from ddpm_pipe.launch import to_device
from ddpm_pipe.likelihood import variational_bound
from ddpm_pipe.objective import LOSSES, Objective
from ddpm_pipe.prediction import LOSS_WEIGHTS, PREDICTIONS
from ddpm_pipe.sampling.config import SCHEDULERS
from ddpm_pipe.sampling.protocol import plug_in
from ddpm_pipe.training.config import TrainConfig
from ddpm_pipe.training.draws import micro_batches
from ddpm_pipe.training.ema import EMA
from ddpm_pipe.training.launcher import make_accelerator
from ddpm_pipe.training.recipe import make_objective, make_scheduler, make_unet
from ddpm_pipe.training.state import TrainState
from ddpm_pipe.training.validation import held_out_sums

META = torch.device("meta")
CHANCY = NETWORK | {"dropout": 0.1}
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
    """Counts how often a number is taken out of a tensor, and how often the CPU waits for a copy to another device."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        made = function(*args, **kwargs)
        if function is torch.ops.aten._to_copy.default:
            self.count += made.device != args[0].device and not kwargs.get("non_blocking", False)
        elif function is torch.ops.aten.index.Tensor:  # indices are copied to where the tensor is
            self.count += sum(index is not None and index.device != args[0].device for index in args[1])
        else:
            self.count += function is torch.ops.aten._local_scalar_dense.default
        return made


class NumbersPlaced(TorchFunctionMode):
    """Counts the tensors on another device that are made of numbers of Python, which are copied with a wait."""

    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        elsewhere = torch.device(kwargs.get("device") or "cpu").type != "cpu"
        makes = function in (torch.tensor, torch.as_tensor) and not isinstance(args[0], torch.Tensor)
        self.count += makes and elsewhere
        return function(*args, **kwargs)


def test_a_copy_that_the_cpu_waits_for_is_found():
    placed = torch.ones(2, device=META)
    with Waits() as waits, NumbersPlaced() as numbers:
        torch.ones(2).to(META), placed[torch.tensor([1])]
        torch.tensor(3, device=META), torch.as_tensor([3], device=META)
    assert (waits.count, numbers.count) == (2, 2)
    with Waits() as waits, NumbersPlaced() as numbers:
        to_device(torch.ones(2), META), placed[:1], placed[torch.ones(1, dtype=torch.long, device=META)]
        torch.full((2,), 3, device=META), torch.as_tensor(placed, device=META)
    assert waits.count == numbers.count == 0


@pytest.mark.parametrize("labelled", [False, True])
def test_the_held_out_loss_waits_for_nothing(labelled):
    images = torch.randint(256, (5, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    data = ImageData(images, torch.arange(5), torch.arange(5) if labelled else None)
    own = scheduler()
    unet, objective = network(own), Objective(own)
    config = TrainConfig(data="x", batch_size=2)
    held_out_sums(config, unet, objective, data, META)  # the first call places the tables
    with Waits() as waits:
        sums = held_out_sums(config, unet, objective, data, META)
    assert waits.count == 0 and sums.device == META


@pytest.mark.parametrize("one_each", [False, True])
@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_no_sampling_step_waits_for_noise_drawn_on_the_cpu(name, one_each):
    made = pipeline(scheduler())
    made.scheduler = plug_in(made.scheduler, name, {}, fewer=True)
    counts = []
    for steps in (5, 10):
        drawn = [torch.Generator().manual_seed(i) for i in (0, 1)] if one_each else torch.Generator().manual_seed(0)
        with Waits() as waits:
            made(2, drawn, eta=1.0 if name == "ddim" else 0.0, **OPTIONS | {"num_inference_steps": steps})
        counts.append(waits.count)
    assert counts[0] == counts[1]


def test_no_term_of_the_bound_waits_for_what_is_drawn_on_the_cpu():
    own, x0, drawn = scheduler(variance_type="learned_range"), PICTURES.to(META), torch.Generator().manual_seed(0)
    unet = network(own)

    def bound(terms: int) -> int:
        with Waits() as waits:
            variational_bound(lambda x_t, t: unet(x_t, t).sample, own, x0, terms, drawn)
        return waits.count

    bound(1)
    assert bound(10) == 0


def test_a_network_waits_neither_for_the_timestep_nor_for_the_null_class():
    unet, x_t = network(scheduler()), PICTURES.to(META)
    with Waits() as waits, NumbersPlaced() as numbers:
        unet(x_t, 5), unet(x_t, torch.tensor([3, 4]))
    assert waits.count == numbers.count == 0


def test_points_on_an_arc_wait_for_nothing():
    with Waits() as waits:
        assert slerp(*torch.ones(2, 1, 8, 8, device=META), torch.linspace(0, 1, 5)).device == META
    assert waits.count == 0


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_training_step_waits_once_whatever_it_is_cut_into(recipe, accumulation):
    options = {"class_conditional": True, "flip": True, "offset_noise": 0.1, "unet": CHANCY}
    config = recipe(gradient_accumulation_steps=accumulation, **options)
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
                draws.seed_dropout(state.dropouts)
                with accelerator.accumulate(state.unet):
                    losses = objective(state.unet, draws.mirrored(x0), draws.t, draws.eps, **conditions)
                    accelerator.backward((losses * draws.weight).mean())
                seen.append((draws.t, losses.detach()))
            state.optimizer_step(step, seen)
        assert waits.count == 1, "the norm of the gradient, which says whether it is finite"
    with Waits() as waits:
        state.check_finite(2)
    assert waits.count == 1
