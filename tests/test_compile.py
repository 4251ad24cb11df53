"""torch.compile: one graph for each way to call the network, no break in it, and outputs that a replay may overwrite.

A backend that runs the captured graphs as they are takes the place of inductor, which needs a minute for each. There is
no CUDA graph without a GPU; a network whose every call spoils its last output stands in for one.
"""

import math
from collections.abc import Iterator

import pytest
import torch
from conftest import one_sentence
from runs import NETWORK, STOCK, assert_same, final_state, run_on_two
from torch._dynamo.utils import counters

from ddpm_pipe import DDPMPipeline, DDPMScheduler, DDPMUNet2DModel
from ddpm_pipe.data.memory import load_images
from ddpm_pipe.objective import Objective
from ddpm_pipe.prediction import PREDICTIONS
from ddpm_pipe.sampling.config import ALIASES, GenerateConfig
from ddpm_pipe.sampling.protocol import pipeline_for, plug_in, sample_images
from ddpm_pipe.training.config import TrainConfig
from ddpm_pipe.training.launcher import make_accelerator
from ddpm_pipe.training.loop import train
from ddpm_pipe.training.recipe import make_unet
from ddpm_pipe.training.state import TrainState

KINDS = NETWORK | {"attention_types": ["linear", "linear_sum"], "num_attention_heads": 2, "attention_head_dim": 4}
OTHERS = NETWORK | {
    "attention_types": ["none", "full"],
    "norm_type": "rms",
    "attention_norm_type": "rms",
    "num_mem_kv": 2,
    "downsample_type": "pixel_unshuffle",
    "time_embedding_type": "learned_fourier",
}


@pytest.fixture
def graphs() -> Iterator[list[torch.fx.GraphModule]]:
    """All graphs that are compiled in the test; a break in one is an error."""
    captured = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        captured.append(graph)
        return graph

    torch._dynamo.reset()
    counters.clear()
    with torch.compiler.set_stance("default", force_backend=backend):
        yield captured
    assert not counters["graph_break"]
    torch._dynamo.reset()


# ---------------------------------------------------------------- training


@pytest.mark.parametrize(
    ("unet", "options", "expected"),
    [
        (KINDS | {"dropout": 0.1}, {"class_conditional": True, "gradient_accumulation_steps": 2}, 1),
        (KINDS | {"self_condition": True}, {"variance_type": "learned_range"}, 3),  # estimate, with it, without it
        (OTHERS, {"gradient_checkpointing": True, "mixed_precision": "bf16", "resolution": [9, 11]}, 1),
        (STOCK, {"class_conditional": True, "gradient_checkpointing": True}, 1),
    ],
    ids=str,
)
def test_a_compiled_run_is_the_same_run_of_few_graphs(recipe, graphs, unet, options, expected):
    """The grids of the raw network, which have another batch size, are not compiled."""
    options |= {"unet": unet, "ema_sigma_rel": []}
    eager, compiled = recipe("eager", **options), recipe("compiled", compile="reduce-overhead", **options)
    train(compiled)
    assert len(graphs) == expected
    train(eager)
    assert_same(final_state(eager), final_state(compiled), rtol=1e-2, atol=2e-4)


def train_compiled(config: TrainConfig) -> None:
    torch.set_num_threads(1)
    with torch.compiler.set_stance("default", force_backend="eager"):
        train(config)
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 3, counters


@pytest.mark.slow
def test_two_processes_compile_the_same_graphs(recipe):
    unet = NETWORK | {"block_out_channels": [8], "mid_attention_type": "none", "self_condition": True}
    options = {"unet": unet, "gradient_accumulation_steps": 2, "ema_sigma_rel": [], "steps": 4}
    eager, compiled = recipe("eager", **options), recipe("compiled", compile="reduce-overhead", **options)
    run_on_two(train_compiled, compiled)
    train(eager)
    assert_same(final_state(eager), final_state(compiled), rtol=1e-2, atol=2e-4)


def test_gradients_that_are_added_to_stay_where_no_replay_overwrites_them(recipe):
    config = recipe(compile="reduce-overhead", gradient_accumulation_steps=2)
    data = load_images(config.data, config.split, resolution=config.resolution)
    state = TrainState(config, make_unet(config, data), make_accelerator(config))
    places = [parameter.grad.data_ptr() for parameter in state.parameters]
    state.optimizer_step(0, [])
    assert [parameter.grad.data_ptr() for parameter in state.parameters] == places
    assert not any(parameter.grad.any() for parameter in state.parameters)


# ---------------------------------------------------------------- sampling


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A pipeline folder."""
    torch.manual_seed(0)
    small = {"block_out_channels": (8, 16), "norm_num_groups": 4, "attention_types": "none", "num_class_embeds": 3}
    folder = tmp_path_factory.mktemp("model")
    network = DDPMUNet2DModel(sample_size=8, **small)
    DDPMPipeline(network, DDPMScheduler(20, beta_schedule="cosine")).save_pretrained(folder)
    return str(folder)


def test_sampling_compiles_one_graph(model, graphs):
    """Neither the trial of a single image nor a further timestep adds one."""
    config = GenerateConfig(model=model, compile="reduce-overhead", steps=5, class_labels="balanced")
    drawn = [
        next(sample_images(pipeline_for(each), [0, 1, 2], 3, **each.call_options()))[1]
        for each in (config, config.replace(compile="none"))
    ]
    assert len(graphs) == 1
    assert (drawn[0].int() - drawn[1].int()).abs().max() <= 1


def test_a_number_as_timestep_does_not_compile_again(model, graphs):
    network = DDPMPipeline.from_pretrained(model).unet
    network.compile(fullgraph=True)
    expected = [network(torch.ones(2, 3, 8, 8), torch.tensor(t)).sample for t in range(5)]
    first = len(graphs)
    found = [network(torch.ones(2, 3, 8, 8), t).sample for t in range(5)]
    assert len(graphs) <= first + 2  # torch.compile takes the first number for a constant and the second for a variable
    torch.testing.assert_close(found, expected)


# ---------------------------------------------------------------- outputs that are overwritten


def make_network(**options) -> DDPMUNet2DModel:
    torch.manual_seed(0)
    small = {"block_out_channels": (8,), "norm_num_groups": 4, "attention_types": "none", "mid_attention_type": "none"}
    return DDPMUNet2DModel(8, 1, 1, **small, **options)


def spoil_outputs(network: DDPMUNet2DModel) -> None:
    """Let each call of the network spoil what the last one returned."""
    returned: list[torch.Tensor] = []

    def spoil(*_) -> None:
        for output in returned:
            output.fill_(math.nan)

    network.register_forward_pre_hook(spoil)
    network.register_forward_hook(lambda network, inputs, output: returned.append(output.sample))


WITHOUT_SAMPLE = ("pndm", "euler_a", "kdpm2", "kdpm2_a")
"""Samplers that do not take a prediction of x0."""


@pytest.mark.parametrize(
    ("name", "prediction_type"),
    [*((name, "epsilon") for name in ALIASES), *((name, "sample") for name in ALIASES if name not in WITHOUT_SAMPLE)],
)
def test_no_sampler_reads_an_output_after_the_next_call(name, prediction_type):
    own = DDPMScheduler(prediction_type=prediction_type, clip_sample=False)
    pipeline = DDPMPipeline(make_network(), own)
    pipeline.scheduler = plug_in(own, name, {}, fewer=True)
    pipeline.set_progress_bar_config(disable=True)
    spoil_outputs(pipeline.unet)
    images = pipeline(2, torch.Generator().manual_seed(0), num_inference_steps=6, output_type="pt").images
    assert images.isfinite().all()


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_self_conditioning_reads_no_output_after_the_next_call(prediction_type):
    network, objective = make_network(self_condition=True), Objective(DDPMScheduler(prediction_type=prediction_type))
    x0, eps = torch.randn(2, 2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    spoil_outputs(network)
    assert objective(network, x0, torch.tensor([10, 900]), eps, True).isfinite().all()


# ---------------------------------------------------------------- the option


@pytest.mark.parametrize(("given", "mode"), [(True, "default"), (False, "none"), ("true", "default")])
def test_truth_values_of_earlier_configs_are_modes(given, mode):
    assert TrainConfig(data="images", compile=given).compile == mode


def test_the_modes_are_named():
    with one_sentence("compile='fast'", "'none'", "'reduce-overhead'"):
        TrainConfig(data="images", compile="fast")
    with one_sentence("deterministic", "compile='default'"):
        TrainConfig(data="images", compile="default", deterministic=True)
