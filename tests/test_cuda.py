"""What only a real GPU can show. All of it is skipped where there is none; test_device.py emulates one there."""

import json
import shutil
import warnings

import pytest
import torch
from accelerate.state import AcceleratorState
from runs import NETWORK, STOCK, assert_same, final_state, loss_curve

from ddpm_pipe import DDPMPipeline, DDPMScheduler, DDPMUNet2DModel
from ddpm_pipe.objective import Objective
from ddpm_pipe.run.folder import Run
from ddpm_pipe.sampling.config import ALIASES, GenerateConfig
from ddpm_pipe.sampling.generate import generate
from ddpm_pipe.sampling.protocol import plug_in, sample_images
from ddpm_pipe.training import loop
from ddpm_pipe.training.loop import train
from ddpm_pipe.training.optimizer import Muon, hidden_matrices

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

SHAPE = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "num_class_embeds": 10}
WAITS_IN_DIFFUSERS = ("unipc", "dpm++sde", "euler_a", "kdpm2_a")
"""Schedulers of diffusers that wait for the GPU in each step."""


@pytest.fixture(autouse=True)
def kernels():
    """Full float32, and the settings of torch as they were."""
    precision, benchmark = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    convolutions, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = benchmark, convolutions


def network(**options) -> DDPMUNet2DModel:
    torch.manual_seed(0)
    return DDPMUNet2DModel(**NETWORK | {"attention_types": ("none", "linear")} | SHAPE | options)


def gradients(unet: DDPMUNet2DModel, device: str) -> list[torch.Tensor]:
    """The loss and the gradient of fixed images, timesteps and noise."""
    unet.zero_grad()
    generator = torch.Generator().manual_seed(1)
    x0, eps = (torch.randn(4, 1, 8, 8, generator=generator).to(device) for _ in range(2))
    t, labels = torch.tensor([0, 300, 700, 999]).to(device), torch.tensor([0, 3, 9, 10]).to(device)
    loss = Objective(DDPMScheduler(prediction_type="v_prediction"))(unet, x0, t, eps, class_labels=labels).mean()
    loss.backward()
    return [loss.detach().cpu(), *(parameter.grad.cpu().clone() for parameter in unet.parameters())]


@pytest.mark.parametrize("channels_last", [False, True])
def test_loss_and_gradient_are_those_of_the_cpu(channels_last):
    unet = network()
    here = gradients(unet, "cpu")
    there = gradients(unet.to("cuda", memory_format=torch.channels_last if channels_last else None), "cuda")
    torch.testing.assert_close(there, here, rtol=1e-3, atol=1e-5)


def test_muon_moves_the_weights_as_on_the_cpu():
    moved = {}
    for device in ("cpu", "cuda"):
        unet = network().to(device)
        gradients(unet, device)
        Muon(unet.parameters(), hidden_matrices(unet), 0.3, lr=1e-3, fused=True).step()
        moved[device] = [parameter.detach().cpu() for parameter in unet.parameters()]
    torch.testing.assert_close(moved["cuda"], moved["cpu"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_deterministic_run_that_is_resumed_has_the_same_bits(recipe, few_images, optimizer):
    options = {"data": few_images, "steps": 6, "save_every": 3, "class_conditional": True, "deterministic": True}
    options |= {"optimizer": optimizer, "mixed_precision": "bf16", "unet": NETWORK | {"dropout": 0.1}}
    whole, resumed = recipe("whole", **options), recipe("resumed", **options)
    train(whole)
    AcceleratorState._reset_state(reset_partial_state=True)
    train(resumed)
    shutil.rmtree(Run(resumed.output_dir).checkpoint(6))
    AcceleratorState._reset_state(reset_partial_state=True)
    train(resumed.replace(resume=True))
    assert_same(final_state(whole), final_state(resumed))


@pytest.mark.parametrize(
    "options",
    [
        {"mixed_precision": "bf16"},
        {"mixed_precision": "fp16"},
        {"mixed_precision": "bf16", "unet": STOCK},
        {"compile": "default"},
        {"compile": "reduce-overhead", "mixed_precision": "bf16"},
        {"compile": "reduce-overhead", "gradient_accumulation_steps": 2},
    ],
    ids=str,
)
def test_precisions_and_compiled_networks_learn_alike(recipe, few_images, options):
    common = {"data": few_images, "steps": 6, "log_every": 1, "class_conditional": True}
    plain = recipe("plain", **common | {"unet": options.get("unet", NETWORK)})
    train(plain)
    AcceleratorState._reset_state(reset_partial_state=True)
    other = recipe("other", **common | options)
    train(other)
    torch.testing.assert_close(torch.tensor(loss_curve(other)), torch.tensor(loss_curve(plain)), rtol=0.03, atol=0)


def test_a_training_step_waits_once(recipe, few_images, monkeypatch, recwarn):
    waits = []
    step = loop.training_step

    def watched(*arguments):
        recwarn.clear()
        torch.cuda.set_sync_debug_mode("warn")
        result = step(*arguments)
        torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchronizing CUDA operation" in str(warning.message) for warning in recwarn))
        return result

    monkeypatch.setattr(loop, "training_step", watched)
    warnings.simplefilter("always")  # the same line waits in every step
    train(recipe(data=few_images, steps=4, class_conditional=True, flip=True, optimizer="muon"))
    assert waits[1:] == [1, 1, 1]  # the norm of the gradient; in the first step the state of AdamW is made


@pytest.mark.parametrize("name", sorted(set(ALIASES) - set(WAITS_IN_DIFFUSERS)))
def test_a_sampling_step_waits_for_nothing(name):
    own = DDPMScheduler(prediction_type="v_prediction")
    pipeline = DDPMPipeline(network().to("cuda"), plug_in(own, name, {}, fewer=True))
    pipeline.set_progress_bar_config(disable=True)
    calls = []

    def forbid(*_):
        calls.append(1)
        torch.cuda.set_sync_debug_mode("error" if len(calls) < 4 else "default")

    pipeline.unet.register_forward_pre_hook(forbid)
    try:
        images = pipeline(2, class_labels=3, num_inference_steps=4, output_type="pt").images
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert images.isfinite().all() and len(calls) >= 4


def test_the_images_of_seeds_are_those_of_the_cpu():
    pipeline = DDPMPipeline(network(), DDPMScheduler(beta_schedule="squaredcos_cap_v2"))
    pipeline.set_progress_bar_config(disable=True)
    drawn = {}
    for device in ("cpu", "cuda"):
        ((_, images, _),) = sample_images(pipeline.to(device), [3, 4], 2, "balanced", num_inference_steps=20)
        drawn[device] = images.int()
    assert (drawn["cuda"] - drawn["cpu"]).abs().max() <= 1


def test_the_command_draws_the_same_images_in_any_batch(recipe, few_images, tmp_path):
    model = train(recipe(data=few_images, class_conditional=True))
    for size in (1, 5):
        AcceleratorState._reset_state(reset_partial_state=True)
        folder = tmp_path / str(size)
        generate(GenerateConfig(model=str(model), seeds="0-9", output_dir=str(folder), steps=5, batch_size=size))
    assert len(list((tmp_path / "5").glob("*.png"))) == 10
    assert json.loads((tmp_path / "5" / "generation.json").read_text())["seeds"] == "0-9"
