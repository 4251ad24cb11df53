"""The loops of this package on a GPU, emulated where there is none: no devices are mixed, and the host rarely waits.

A step of training waits once, for the norm of the gradient, which says whether it is finite. A step of sampling waits
for nothing.
"""

import shutil
from contextlib import ExitStack

import diffusers
import pytest
import torch
from accelerate.state import AcceleratorState
from emulated_device import CPU, CUDA, check, emulated_device
from PIL import Image
from runs import NETWORK, STOCK, assert_same, final_state
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_pipe import DDIMScheduler, DDPMPipeline, DDPMScheduler, DDPMUNet2DModel
from ddpm_pipe.demo.config import DemoConfig
from ddpm_pipe.demo.draw import Model, draw, interpolate, redraw, similar, watch
from ddpm_pipe.editing import ImageToImagePipeline, InpaintPipeline, InterpolationPipeline, InversionPipeline, slerp
from ddpm_pipe.evaluation.bits import denoiser
from ddpm_pipe.evaluation.features import load_features
from ddpm_pipe.likelihood import variational_bound
from ddpm_pipe.objective import LOSSES, Objective
from ddpm_pipe.prediction import LOSS_WEIGHTS, PREDICTIONS
from ddpm_pipe.randomness import generator
from ddpm_pipe.run.folder import Run
from ddpm_pipe.sampling.config import ALIASES
from ddpm_pipe.sampling.generate import sample_images
from ddpm_pipe.sampling.protocol import plug_in
from ddpm_pipe.training.interruption import Interruption
from ddpm_pipe.training.launcher import make_accelerator
from ddpm_pipe.training.log import Log, named_means
from ddpm_pipe.training.loop import claim_folder, run_steps
from ddpm_pipe.training.state import TrainState

OPTIONS = {"num_inference_steps": 4, "class_labels": 3, "output_type": "pt", "return_dict": False}
PICTURES = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as choose_kernels sets it for deterministic runs
    with emulated_device() as emulated:
        yield emulated
    torch.use_deterministic_algorithms(False)


def scheduler(**options) -> DDPMScheduler:
    return DDPMScheduler(beta_schedule="squaredcos_cap_v2", **options)


def network(scheduler: DDPMScheduler, **options) -> DDPMUNet2DModel:
    learned = scheduler.config.variance_type.startswith("learned")
    shape = {"sample_size": 8, "in_channels": 1, "out_channels": 1 + learned, "num_class_embeds": 10}
    return DDPMUNet2DModel(**NETWORK | {"attention_types": ("none", "linear")} | shape | options).to(CUDA)


def pipeline(own: DDPMScheduler, **options) -> DDPMPipeline:
    made = DDPMPipeline(network(own, **options), own)
    made.set_progress_bar_config(disable=True)
    return made


# ---------------------------------------------------------------- the rules of the emulation


def test_tensors_are_where_they_were_made(device):
    x = torch.ones(2, 3, device="cuda")
    layer = torch.nn.Linear(3, 3).to(CUDA)
    for there in (x, x[0], x.T, x.double(), x.new_zeros(3), torch.zeros_like(x), layer(x), layer(x).detach().to(CUDA)):
        assert there.device == CUDA
    layer(x).sum().backward()
    assert layer.weight.device == layer.weight.grad.device == CUDA
    for here in (x.cpu(), x.to("cpu"), torch.ones(3), x.new_zeros(3, device="cpu"), x.to(torch.ones(1))):
        assert here.device == CPU


def test_what_is_copied_is_another_tensor(device):
    x = torch.zeros(3)
    there = x.to(CUDA)
    there += 1
    assert x.tolist() == [0, 0, 0] and there.cpu().tolist() == [1, 1, 1]
    assert there.to(CUDA) is there


@pytest.mark.parametrize(
    "mix",
    [
        lambda there, here: there + here,
        lambda there, here: torch.cat([there, here]),
        lambda there, here: torch.where(here > 0, there, there),
        lambda there, here: here.add_(there[0]),
        lambda there, here: here[there.long()],
        lambda there, here: torch.take(there, here[0].long()),
        lambda there, here: torch.nn.functional.linear(there, here),
    ],
)
def test_tensors_of_two_devices_do_not_mix(device, mix):
    with pytest.raises(RuntimeError, match="device"):
        mix(torch.ones(3, device=CUDA), torch.ones(3))


def test_a_scalar_of_the_cpu_and_a_tensor_of_the_gpu_do_mix(device):
    with device.waits(0):
        assert (torch.tensor(2.0) * torch.ones(3, device=CUDA)).device == CUDA


@pytest.mark.parametrize("at, wanted", [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_generator_draws_only_on_its_own_device(device, at, wanted):
    draw = torch.Generator(at)
    assert torch.randn(3, generator=draw, device=at).device.type == at
    probabilities = torch.ones(3, device=wanted)
    for wrong in (
        lambda: torch.randn(3, generator=draw, device=wanted),
        lambda: torch.multinomial(probabilities, 1, generator=draw),
        lambda: probabilities.normal_(generator=draw),
    ):
        with pytest.raises(RuntimeError, match="generator"):
            wrong()


def test_numbers_reach_numpy_only_from_the_cpu(device):
    with pytest.raises(TypeError, match="cuda:0"):
        torch.ones(3, device=CUDA).numpy()


def read_in_the_backward_pass(x: torch.Tensor) -> None:
    y = x.clone().requires_grad_()
    y.register_hook(lambda gradient: gradient * gradient.sum().item())
    y.sum().backward()


LARGE = torch.zeros(1, 1, 160, 160)  # 100 KiB


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: float(x[0]),
        lambda x: bool(x.any()),
        lambda x: x[0].item(),
        lambda x: x.tolist(),
        lambda x: torch.equal(x, x),
        lambda x: x.nonzero(),
        lambda x: x[x > 1],
        lambda x: x[torch.tensor([0, 1])],
        lambda x: x[x[0].long()],
        lambda x: x.unique(),
        lambda x: x.masked_select(x > 1),
        lambda x: x.index_put_((x < 1,), torch.ones_like(x)),
        read_in_the_backward_pass,
        lambda x: x.cpu(),
        lambda x: x.copy_(torch.zeros(3)),
        lambda x: torch.zeros(3).copy_(x),
        lambda x: torch.zeros(3).copy_(x, non_blocking=True),
        lambda x: torch.zeros(3).to(CUDA),
        lambda x: torch.tensor([1.0, 2.0], device=CUDA),
        lambda x: torch.as_tensor(5, device=CUDA),
        lambda x: x.new_tensor([1.0]),
        lambda x: LARGE.to(CUDA, non_blocking=True),
        lambda x: LARGE.pin_memory().to(CUDA),
        lambda x: LARGE.pin_memory().to(CUDA, torch.float64, non_blocking=True),
        lambda x: LARGE[0, 0].pin_memory().T.to(CUDA, non_blocking=True),
    ],
)
def test_what_waits_is_counted(device, ask):
    x = torch.zeros(3, device=CUDA)
    with device.waits(1):
        ask(x)


def test_what_does_not_wait_is_not_counted(device):
    x = torch.zeros(3, device=CUDA)
    with device.waits(0):
        torch.zeros(3).to(CUDA, non_blocking=True)
        LARGE.pin_memory().to(CUDA, non_blocking=True)
        torch.zeros(3).pin_memory().copy_(x, non_blocking=True)
        torch.where(x > 0, 1.0, x).clamp_(0, 1)[:2].sum()
        torch.arange(3, device=CUDA)
        torch.full((3,), 2.0, device=CUDA)
        x[x > 0] = 1
        torch.zeros(3).tolist()


def test_a_wait_is_named_by_the_line_that_causes_it(device):
    x = torch.zeros(2, 10, device=CUDA)
    here = r"a number is read: \S*test_device.py:\d+: x.sum\(\).item\(\)"
    with pytest.raises(AssertionError, match=f"^1 waits instead of 0:\n{here}"), device.waits(0):
        x.sum().item()
    there = r"a copy to the CPU: \S*training/log.py:\d+: totals, counts = sums.cpu\(\)"
    with pytest.raises(AssertionError, match=f"^1 waits instead of 2:\n{there}"), device.waits(2):
        named_means("loss", x + 1)


# ---------------------------------------------------------------- training


class Steps(list):
    """The waits that were noted during each optimizer step, without those of the log and of saving."""

    def __init__(self, device, monkeypatch):
        super().__init__()
        self.device, self.start, self.write = device, 0, Log.write
        monkeypatch.setattr(Log, "write", lambda *args, **values: self.end(*args, **values))

    def end(self, *args, **values):
        self.append(self.device.noted[self.start :])
        self.write(*args, **values)
        self.start = len(self.device.noted)


def run(config) -> None:
    """Train as `train` does, without the report, which has nothing to do with the device."""
    accelerator, folder = make_accelerator(config), Run(config.output_dir)
    with ExitStack() as stack:
        claim_folder(config, folder, stack)
        run_steps(config, accelerator, folder, Interruption())


@pytest.mark.parametrize(
    ("options", "waits"),
    [
        ({}, 1),
        ({"mixed_precision": "bf16"}, 1),
        ({"mixed_precision": "fp16"}, 1),
        ({"deterministic": True, "optimizer": "muon", "unet": NETWORK | {"dropout": 0.1}}, 1),
        ({"gradient_accumulation_steps": 2, "class_conditional": True, "flip": True, "offset_noise": 0.1}, 1),
        ({"unet": NETWORK | {"self_condition": True, "dropout": 0.1}}, 1),
        ({"unet": STOCK, "class_conditional": True}, 1),
        ({"variance_type": "learned_range", "gradient_checkpointing": True}, 1),
        ({"timestep_sampling": "loss_second_moment"}, 2),  # it reads the losses
    ],
    ids=str,
)
def test_a_training_step_waits_once(recipe, few_images, device, monkeypatch, options, waits):
    config = recipe(data=few_images, steps=3, **options)
    steps = Steps(device, monkeypatch)
    run(config)
    for noted in steps[1:]:  # what comes before the first step is counted with it
        check(noted, waits)
    assert all(tensor.isfinite().all() for tensor in final_state(config).values())


def test_a_run_on_the_device_is_that_on_the_cpu_though_it_is_resumed(recipe, few_images):
    """The emulation computes what the CPU does, and a resumed run is the same run."""
    options = {"data": few_images, "steps": 4, "save_every": 2, "class_conditional": True, "channels_last": False}
    here, there = recipe("here", **options), recipe("there", **options)
    run(here)
    AcceleratorState._reset_state(reset_partial_state=True)
    with emulated_device():
        run(there)
        shutil.rmtree(Run(there.output_dir).checkpoint(4))
        run(there.replace(resume=True))
    assert_same(final_state(here), final_state(there))


def test_the_loss_of_held_out_images_is_read_once(recipe, few_images, device):
    config = recipe(data=few_images, steps=2, sample_every=2, holdout=20, class_conditional=True)
    run(config)
    (entry,) = [entry for entry in Run(config.output_dir).read_metrics() if "held_out_loss" in entry]
    assert entry["step"] == 2 and all(grid.exists() for grid in Run(config.output_dir).grids(2).values())
    check([wait for wait in device.noted if "training/validation.py" in wait], 0)
    check([wait for wait in device.noted if "training/log.py" in wait], 2)  # that loss, and the loss of training


def test_the_check_of_all_weights_waits_once(recipe, device):
    config = recipe()
    state = TrainState(config, network(scheduler()), make_accelerator(config))
    with device.waits(1):
        state.check_finite(1)


@pytest.mark.parametrize(
    ("chain", "loss"),
    [
        *(({"prediction_type": name}, {}) for name in PREDICTIONS),
        *(({}, {"weight": name}) for name in LOSS_WEIGHTS),
        *(({}, {"loss": name}) for name in LOSSES),
    ],
    ids=str,
)
def test_loss_and_gradient_wait_for_nothing(device, chain, loss):
    own = scheduler(**chain)
    unet, objective = network(own), Objective(own, **loss)
    x0, t = PICTURES.to(CUDA), torch.zeros(2, dtype=torch.long, device=CUDA)
    with device.waits(0):
        objective(unet, x0, t, torch.randn_like(x0), class_labels=t).mean().backward()
    assert all(parameter.grad.device == CUDA for parameter in unet.parameters())


# ---------------------------------------------------------------- sampling


def waits_between_calls(device, pipeline, *args, **options) -> list[str]:
    """The waits that were noted between the first and the last call of the network, which are those of the steps."""
    marks = []
    hook = pipeline.unet.register_forward_pre_hook(lambda *_: marks.append(len(device.noted)))
    (images,) = pipeline(*args, **OPTIONS | options)
    hook.remove()
    assert images.device == CUDA
    return device.noted[marks[0] : marks[-1]]


NOISE_OF_DIFFUSERS = ("dpm++sde", "euler_a", "kdpm2_a")
"""Schedulers of diffusers that draw noise; what a generator of the CPU draws, they copy and wait, once in a step."""


@pytest.mark.parametrize("at", ["cuda", "cpu"])
@pytest.mark.parametrize("name", ALIASES)
def test_a_sampling_step_waits_for_nothing(device, name, at):
    made = pipeline(DDPMScheduler(prediction_type="v_prediction"))
    made.scheduler = plug_in(made.scheduler, name, {}, fewer=True)
    noted = waits_between_calls(device, made, 2, [torch.Generator(at), torch.Generator(at)], guidance_scale=2.0)
    if name == "unipc":  # diffusers makes its coefficients on the device in each step
        assert noted and all("scheduling_unipc_multistep.py" in wait for wait in noted)
    else:
        check(noted, 3 if at == "cpu" and name in NOISE_OF_DIFFUSERS else 0)


@pytest.mark.parametrize(
    ("chain", "options"),
    [({"variance_type": "learned_range"}, {}), ({"thresholding": True}, {}), ({}, {"self_condition": True})],
    ids=str,
)
def test_a_sampling_step_waits_for_nothing_whatever_the_model(device, chain, options):
    check(waits_between_calls(device, pipeline(scheduler(**chain), **options), 2), 0)


def test_a_network_waits_neither_for_the_timestep_nor_for_the_null_class(device):
    unet, x_t = network(scheduler()), PICTURES.to(CUDA)
    with device.waits(0):
        unet(x_t, 5), unet(x_t, torch.tensor([3, 4]))


@pytest.mark.parametrize(("cls", "options"), [(DDPMScheduler, {}), (DDIMScheduler, {"eta": 1.0})])
def test_the_noise_of_many_pixels_is_copied_without_a_wait(device, cls, options):
    x, draw = LARGE.to(CUDA), torch.Generator()
    with device.waits(0):
        assert cls().step(x, 500, x, generator=draw, **options).prev_sample.device == CUDA


def test_the_noise_of_many_pixels_for_the_bound_is_copied_without_a_wait(device):
    x0 = LARGE.to(CUDA)
    with device.waits(0):
        bound = variational_bound(lambda x_t, t: x_t, DDPMScheduler(), x0, 1, torch.Generator())
    assert bound.total.device == CUDA


def test_the_images_of_seeds_are_those_of_the_cpu(device):
    made = pipeline(scheduler())
    ((_, images, _),) = sample_images(made, [3, 4], 2, num_inference_steps=4)
    made.to("cpu")
    ((_, same, _),) = sample_images(made, [3, 4], 2, num_inference_steps=4)
    assert torch.equal(images, same) and images.device == CPU


def test_the_page_draws_on_the_device_what_it_draws_on_the_cpu(device):
    model = Model(DemoConfig(model="org/name"), pipeline(scheduler()), [str(label) for label in range(10)])
    settings = model.first_settings.replace(steps=2)
    picture, mask = Image.new("RGB", (9, 9), "red"), Image.new("L", (9, 9), 255)

    def everything() -> list[bytes]:
        calls = [draw(model, settings, 1), interpolate(model, settings, 1, 2)]
        calls += [similar(model, settings, picture, 1, 0.5), redraw(model, settings, picture, mask, 1, 1)]
        images = [image for call in calls for image in call.run(model)]
        images += [frame.x0 for frame in watch(model, draw(model, settings, 1))]
        return [image.tobytes() for image in images]

    there = everything()
    assert 'from_pretrained("org/name").to("cuda")\n' in draw(model, settings, 1).code(model)
    model.pipeline.to("cpu")
    assert everything() == there


# ---------------------------------------------------------------- editing, likelihood, features


def test_editing_waits_for_nothing_in_a_step(device):
    ddpm = pipeline(scheduler())
    ddim = DDIMScheduler.from_config(ddpm.scheduler.config, clip_sample=False)
    for own in (ddpm.scheduler, ddim, diffusers.DPMSolverMultistepScheduler.from_config(ddim.config)):
        check(waits_between_calls(device, ImageToImagePipeline.from_pipe(ddpm, scheduler=own), PICTURES), 0)
    mask = torch.ones(2, 1, 8, 8)
    for own in (ddpm.scheduler, ddim):
        inpaint = InpaintPipeline.from_pipe(ddpm, scheduler=own)
        check(waits_between_calls(device, inpaint, PICTURES, mask, jump_length=2), 0)
    check(waits_between_calls(device, InterpolationPipeline.from_pipe(ddpm, scheduler=ddim), 3), 0)
    invert = InversionPipeline.from_pipe(ddpm, scheduler=ddim)
    with device.waits(2):  # for its images and timesteps
        assert invert(PICTURES, num_inference_steps=5, class_labels=3).device == CUDA


def test_points_on_an_arc_wait_for_nothing(device):
    with device.waits(0):
        assert slerp(*torch.ones(2, 1, 8, 8, device=CUDA), torch.linspace(0, 1, 5)).device == CUDA


@pytest.mark.parametrize("options", [{}, {"self_condition": True}], ids=str)
def test_the_bound_waits_for_nothing(device, options):
    made = pipeline(scheduler(variance_type="learned_range"), **options)
    x0, labels = PICTURES.to(CUDA), torch.zeros(2, dtype=torch.long, device=CUDA)
    with device.waits(0):
        bound = variational_bound(denoiser(made, labels), made.scheduler, x0, 3, generator(0, "bound"))
    assert bound.total.device == CUDA


class Distances(torch.nn.Module):
    """Features of a program that makes a tensor by itself."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean((2, 3)) - torch.arange(3)


def test_features_wait_for_their_numbers(tmp_path):
    images = torch.randint(256, (2, 1, 8, 8), dtype=torch.uint8)
    exported = torch.export.export(Distances(), (images.expand(-1, 3, -1, -1),))
    torch.export.save(exported, tmp_path / "distances.pt2")
    with emulated_device() as device:
        network = load_features(str(tmp_path / "distances.pt2"), "cuda")
        with device.waits(1):
            features, _ = network(images)
        assert features.device == CPU
    assert torch.equal(features, Distances()(images.expand(-1, 3, -1, -1)))


# ---------------------------------------------------------------- kernels


class Launches(TorchDispatchMode):
    """Counts the operations that compute: all but views, each of which is one kernel or more on a GPU."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **kwargs or {})


def test_a_pass_through_the_network_takes_few_kernels():
    unet = DDPMUNet2DModel(sample_size=8).to("meta")
    with Launches() as forward:
        output = unet(torch.zeros(2, 3, 8, 8, device="meta"), torch.zeros(2, device="meta")).sample
    with Launches() as backward:
        output.backward(torch.ones_like(output))
    assert forward.count <= 440 and backward.count <= 500, (forward.count, backward.count)
