"""The network: the reference's numbers, each block against its formula written anew, and every option of the config."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import one_sentence
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from ddpm_pipe.convert.lucidrains import from_reference
from ddpm_pipe.unet import (
    AttentionBlock,
    ChannelLayerNorm,
    ChannelRMSNorm,
    DDPMUNet2DModel,
    FourierEmbedding,
    FullAttention,
    LinearAttention,
    PixelUnshuffleConv2d,
    SinusoidalEmbedding,
    WeightStandardizedConv2d,
)

TIMES = torch.tensor([0, 1, 37, 500, 999])


def tiny(**options) -> DDPMUNet2DModel:
    """A small network in eval mode with every weight, gains and biases too, moved off its initial value."""
    torch.manual_seed(0)
    small = {"block_out_channels": (8, 16), "norm_num_groups": 4, "num_attention_heads": 2, "attention_head_dim": 4}
    network = DDPMUNet2DModel(**{**small, **options}).eval()
    with torch.no_grad():
        for weight in network.parameters():
            weight += 0.1 * torch.randn_like(weight)
    return network


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def run(network: DDPMUNet2DModel, x: torch.Tensor, timestep=500, **inputs) -> torch.Tensor:
    return network(x, timestep, **inputs).sample


# ---------------------------------------------------------------- the reference implementation

REFERENCE_CONFIGS = {
    "plain": {"block_out_channels": (8, 16, 32), "norm_num_groups": 4},
    "selfcond": {"block_out_channels": (8, 16), "norm_num_groups": 4, "self_condition": True},
}


@pytest.fixture(params=REFERENCE_CONFIGS)
def reference(request):
    """A network, the reference's weights by their own names, its inputs and its output."""
    with np.load(Path(__file__).parent / "golden" / f"seed_unet_{request.param}.npz") as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    output = arrays.pop("y")
    weights = {name.removeprefix("param/"): arrays.pop(name) for name in list(arrays) if name.startswith("param/")}
    return DDPMUNet2DModel(**REFERENCE_CONFIGS[request.param]).eval(), weights, arrays, output


def test_reference_weights_give_the_reference_output(reference):
    network, weights, inputs, expected = reference
    network.load_state_dict(from_reference(weights))
    output = run(network, inputs["x"], inputs["t"], self_cond=inputs.get("x_self_cond"))
    assert_close(output, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_every_reference_weight_has_exactly_one_place(reference):
    network, weights, _, _ = reference
    ours = from_reference(weights)
    assert len(ours) == len(weights)
    assert {name: weight.shape for name, weight in ours.items()} == {
        name: weight.shape for name, weight in network.state_dict().items()
    }


@pytest.mark.parametrize("ours, theirs", [("weight", "gamma"), ("bias", "beta")])
def test_norms_of_the_reference_may_have_either_name(ours, theirs):
    prefix, value = "downs.0.0.block1.norm.", torch.ones(8)
    assert from_reference({prefix + ours: value}).keys() == from_reference({prefix + theirs: value}).keys()


def test_fourier_weights_of_the_reference_have_a_place():
    weights = {"time_mlp.0.weights": noise(4)}
    network = tiny(time_embedding_type="learned_fourier")
    assert from_reference(weights).keys() <= network.state_dict().keys()


def test_fourier_features_of_the_reference_have_a_width_of_their_own():
    """Its learned_sinusoidal_dim, 16 by default, beside the 4 * dim of its time MLP."""
    network = tiny(time_embedding_type="learned_fourier", time_fourier_dim=16)
    theirs = {
        "time_mlp.0.weights": noise(8),
        "time_mlp.1.weight": noise(32, 17),
        "time_mlp.1.bias": noise(32, seed=1),
        "time_mlp.3.weight": noise(32, 32),
        "time_mlp.3.bias": noise(32, seed=2),
    }
    missing, unexpected = network.load_state_dict(from_reference(theirs), strict=False)
    assert not unexpected and not [name for name in missing if name.startswith("time_")]
    features = FourierEmbedding(16, learned=True)
    features.load_state_dict({"weight": theirs["time_mlp.0.weights"]})
    hidden = torch.nn.functional.gelu(features(TIMES) @ theirs["time_mlp.1.weight"].T + theirs["time_mlp.1.bias"])
    expected = hidden @ theirs["time_mlp.3.weight"].T + theirs["time_mlp.3.bias"]
    assert_close(network.time_embedding(network.time_proj(TIMES)), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["surprise.weight", "downs.0.9.weight", "model.init_conv.weight", "model.downs.0.0.mlp.1.weight"]
)
def test_unknown_reference_name_is_refused_by_name(name):
    with pytest.raises(ValueError, match=name):
        from_reference({name: torch.zeros(1)})


# ---------------------------------------------------------------- time


@pytest.mark.parametrize("dim, theta", [(8, 10_000.0), (32, 10_000.0), (4, 100.0)])
def test_sinusoidal_embedding_is_sines_then_cosines_of_geometric_frequencies(dim, theta):
    half = dim // 2
    angles = [[t * theta ** (-i / (half - 1)) for i in range(half)] for t in TIMES.tolist()]
    expected = [[math.sin(a) for a in row] + [math.cos(a) for a in row] for row in angles]
    assert_close(SinusoidalEmbedding(dim, theta)(TIMES), torch.tensor(expected), rtol=0, atol=2e-4)


def test_theta_of_the_network_is_that_of_its_embedding():
    network = tiny(time_embedding_theta=50.0)
    assert_close(network.time_proj(TIMES), SinusoidalEmbedding(8, 50.0)(TIMES), rtol=0, atol=0)
    assert_close(tiny().time_proj(TIMES), SinusoidalEmbedding(8, 10_000.0)(TIMES), rtol=0, atol=0)


@pytest.mark.parametrize("learned", [True, False])
def test_fourier_embedding_is_t_then_sines_then_cosines(learned):
    embedding = FourierEmbedding(8, learned)
    t = torch.tensor([0.0, 0.25, 3.0])
    angles = [[2 * math.pi * time * w for w in embedding.weight.tolist()] for time in t.tolist()]
    expected = [[time, *map(math.sin, row), *map(math.cos, row)] for time, row in zip(t.tolist(), angles)]
    assert_close(embedding(t), torch.tensor(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind, learns", [("learned_fourier", True), ("random_fourier", False)])
def test_only_learned_fourier_frequencies_get_a_gradient(kind, learns):
    network = tiny(time_embedding_type=kind)
    network(noise(1, 3, 8, 8), torch.tensor([3])).sample.square().mean().backward()
    gradient = network.time_proj.weight.grad
    assert (gradient is not None and bool(gradient.abs().sum() > 0)) is learns


@pytest.mark.parametrize("timestep", [7, 7.0, torch.tensor(7), torch.tensor([7]), torch.tensor([7, 7, 7])], ids=repr)
def test_number_0d_and_batched_timesteps_agree(timestep):
    network, x = tiny(), noise(3, 3, 8, 8)
    assert_close(run(network, x, timestep), run(network, x, torch.full((3,), 7)), rtol=0, atol=0)


def test_each_image_has_its_own_timestep():
    network, x, t = tiny(), noise(3, 3, 8, 8), torch.tensor([0, 10, 900])
    alone = torch.cat([run(network, x[i : i + 1], t[i]) for i in range(3)])
    assert_close(run(network, x, t), alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(run(network, x, 0), alone, atol=1e-2)


# ---------------------------------------------------------------- blocks


@pytest.mark.parametrize("spread", [1.0, 0.003], ids=["unit filters", "filters near eps"])
def test_weight_standardisation_follows_its_formula(spread):
    conv = WeightStandardizedConv2d(3, 5, 3, padding=1)
    conv.weight.data = noise(5, 3, 3, 3) * spread + 0.5
    weight = conv.weight.detach().double().flatten(1)
    mean = weight.sum(1, keepdim=True) / 27
    variance = ((weight - mean) ** 2).sum(1, keepdim=True) / 27  # biased
    standard = ((weight - mean) / (variance + 1e-5) ** 0.5).view(5, 3, 3, 3)
    x = noise(2, 3, 6, 5)
    assert_close(conv(x).double(), F.conv2d(x.double(), standard, conv.bias.double(), padding=1), rtol=0, atol=2e-4)


def test_standardised_filters_have_zero_mean_and_unit_variance():
    conv = WeightStandardizedConv2d(3, 5, 3, bias=False)
    conv.weight.data = noise(5, 3, 3, 3) * 4 + 2
    filters = conv(torch.eye(27).view(27, 3, 3, 3)).view(27, 5)  # one impulse per weight reads the filters out
    assert_close(filters.mean(0), torch.zeros(5), rtol=0, atol=1e-5)
    assert_close(filters.var(0, correction=0), torch.ones(5), rtol=0, atol=1e-4)


@pytest.mark.parametrize("standardise", [True, False])
def test_scale_of_resnet_filters_matters_only_without_standardisation(standardise):
    network, x = tiny(weight_standardization=standardise, norm_num_groups=1), noise(1, 3, 8, 8)
    before = run(network, x)
    for name, weight in network.named_parameters():
        if name.startswith("mid_resnet") and name.endswith(("conv1.weight", "conv2.weight")):
            weight.data *= 10
            weight.data += 1
    assert torch.allclose(run(network, x), before, atol=1e-2) is standardise


def test_channel_layer_norm_normalises_each_pixel_over_channels():
    norm, x = ChannelLayerNorm(6), noise(2, 6, 3, 5) * 0.01 + 3
    norm.weight.data = noise(6, seed=2)
    centred = x.double() - x.double().sum(1, keepdim=True) / 6
    expected = centred / ((centred**2).sum(1, keepdim=True) / 6 + 1e-5) ** 0.5
    assert_close(norm(x).double(), expected * norm.weight.double().view(1, 6, 1, 1), rtol=0, atol=1e-3)


def test_channel_rms_norm_divides_each_pixel_by_its_root_mean_square():
    norm, x = ChannelRMSNorm(6), noise(2, 6, 3, 5) * 0.01 + 3
    norm.weight.data = noise(6, seed=2)
    expected = x.double() / ((x.double() ** 2).sum(1, keepdim=True) / 6) ** 0.5 * norm.weight.double().view(1, 6, 1, 1)
    assert_close(norm(x).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(4, 6), (5, 6), (4, 7)])
def test_pixel_unshuffle_mixes_each_square_of_pixels(size):
    conv, x = PixelUnshuffleConv2d(3, 5), noise(2, 3, *size)
    whole = x[..., :4, :6]
    squares = torch.stack([whole[..., i::2, j::2] for i in (0, 1) for j in (0, 1)], dim=2).flatten(1, 2)
    assert_close(conv(x), F.conv2d(squares, conv.weight, conv.bias), rtol=0, atol=1e-6)


def heads_of(attention: FullAttention | LinearAttention, x: torch.Tensor) -> list[list[torch.Tensor]]:
    """q, k and v of each head as float64 (B, features, pixels): queries of all heads first, then keys, then values."""
    weight = attention.to_qkv.weight.double().flatten(1)
    qkv = torch.einsum("oc,bcp->bop", weight, x.double().flatten(2))
    return [list(part.chunk(attention.heads, dim=1)) for part in qkv.chunk(3, dim=1)]


def project(attention: FullAttention | LinearAttention, heads: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    out = F.conv1d(torch.cat(heads, 1), attention.to_out.weight.double()[..., 0], attention.to_out.bias.double())
    return out.view(like.shape).float()


def memory_of(attention: FullAttention | LinearAttention, number: int) -> list[torch.Tensor]:
    """The learned keys and values of each head as float64 (heads, features, number)."""
    if number == 0:
        return [torch.zeros(2, 4, 0, dtype=torch.float64)] * 2
    memory = attention.mem_kv.detach().double()
    return list(memory if isinstance(attention, LinearAttention) else memory.transpose(-1, -2))


@pytest.mark.parametrize("number", [0, 3])
def test_full_attention_is_softmax_of_qk_times_v(number):
    attention, x = FullAttention(6, heads=2, head_dim=4, num_mem_kv=number), noise(2, 6, 3, 5) * 3
    heads = []
    for q, k, v, mem_k, mem_v in zip(*heads_of(attention, x), *memory_of(attention, number)):
        k, v = (torch.cat([m.expand(2, -1, -1), pixels], dim=2) for m, pixels in ((mem_k, k), (mem_v, v)))
        scores = torch.einsum("bdi,bdj->bij", q, k) / 4**0.5
        weights = scores.exp() / scores.exp().sum(2, keepdim=True)
        heads.append(torch.einsum("bij,bdj->bdi", weights, v))
    assert_close(attention(x), project(attention, heads, x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("number, mean", [(0, True), (0, False), (3, False)])
def test_linear_attention_is_q_times_the_mean_or_sum_of_k_and_v(number, mean):
    attention, x = LinearAttention(6, heads=2, head_dim=4, num_mem_kv=number, mean=mean), noise(2, 6, 3, 5) * 3
    attention.norm_out = torch.nn.Identity()  # its norm is checked by itself, and would hide a wrong scale
    heads = []
    for q, k, v, mem_k, mem_v in zip(*heads_of(attention, x), *memory_of(attention, number)):
        k, v = (torch.cat([m.expand(2, -1, -1), pixels], dim=2) for m, pixels in ((mem_k, k), (mem_v, v)))
        q = q.exp() / q.exp().sum(1, keepdim=True) / 4**0.5
        k = k.exp() / k.exp().sum(2, keepdim=True)
        heads.append(torch.einsum("bdj,bej,bdi->bei", k, v / 15 if mean else v, q))
    assert_close(attention(x), project(attention, heads, x), rtol=0, atol=1e-6 if mean else 1e-5)


def test_linear_attention_ends_in_a_channel_norm():
    attention, x = LinearAttention(6, heads=2, head_dim=4), noise(2, 6, 3, 5)
    assert_close(attention(x).mean(1), torch.zeros(2, 3, 5), rtol=0, atol=1e-5)


def test_attention_block_is_a_residual_on_normed_input():
    block, x = AttentionBlock(FullAttention(6, heads=2, head_dim=4), ChannelLayerNorm(6)), noise(2, 6, 3, 5)
    assert_close(block(x) - x, block.attention(F.layer_norm(x.movedim(1, -1), (6,)).movedim(-1, 1)), rtol=0, atol=1e-5)


def test_attention_kinds_are_given_from_the_highest_resolution_down():
    network = tiny(
        block_out_channels=(8, 8, 8), attention_types=("none", "linear", "full"), mid_attention_type="linear"
    )
    expected = [type(None), LinearAttention, FullAttention]
    assert [type(getattr(level.attention, "attention", None)) for level in network.down_blocks] == expected
    assert [type(getattr(level.attention, "attention", None)) for level in reversed(network.up_blocks)] == expected
    assert isinstance(network.mid_attention.attention, LinearAttention)


def test_heads_are_given_per_level_and_the_middle_takes_the_last():
    network = tiny(num_attention_heads=(2, 4), attention_head_dim=(8, 2))
    attentions = [level.attention.attention for level in (*network.down_blocks, *reversed(network.up_blocks))]
    attentions.append(network.mid_attention.attention)
    assert [attention.heads for attention in attentions] == [2, 4, 2, 4, 4]
    assert [attention.to_out.in_channels for attention in attentions] == [16, 8, 16, 8, 8]


def test_stem_and_time_embedding_have_widths_of_their_own():
    network = tiny(stem_channels=12, time_embedding_dim=6)
    assert network.conv_in.out_channels == network.conv_out.in_channels == 12
    assert network.time_embedding.linear_1.weight.shape == (24, 6)
    assert run(network, noise(2, 3, 8, 8)).shape == (2, 3, 8, 8)


# ---------------------------------------------------------------- what sizes and options work


@st.composite
def networks(draw):
    """A config and a size that should work, odd and non-square ones among them."""
    levels = draw(st.integers(1, 3))
    kind = st.sampled_from(["none", "linear", "linear_sum", "full"])
    config = {
        "block_out_channels": tuple(4 * draw(st.integers(1, 3)) for _ in range(levels)),
        "in_channels": draw(st.integers(1, 5)),
        "out_channels": draw(st.integers(1, 5)),
        "layers_per_block": draw(st.integers(1, 3)),
        "norm_num_groups": 2,
        "attention_types": draw(st.one_of(kind, st.tuples(*[kind] * levels))),
        "mid_attention_type": draw(kind),
        "time_embedding_type": draw(st.sampled_from(["positional", "learned_fourier", "random_fourier"])),
        "weight_standardization": draw(st.booleans()),
        "norm_type": draw(st.sampled_from(["group", "rms"])),
        "attention_norm_type": draw(st.sampled_from(["layer", "rms"])),
        "num_mem_kv": draw(st.sampled_from([0, 3])),
        "downsample_type": draw(st.sampled_from(["conv", "pixel_unshuffle"])),
        "stem_channels": draw(st.sampled_from([None, 12])),
        "time_embedding_dim": draw(st.sampled_from([None, 10])),
        "self_condition": draw(st.booleans()),
        "num_class_embeds": draw(st.sampled_from([None, 3])),
        "sample_size": (draw(st.integers(2 ** (levels - 1), 13)), draw(st.integers(2 ** (levels - 1), 13))),
    }
    return config, draw(st.integers(1, 2))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(networks())
def test_output_has_the_size_of_the_input(case):
    config, batch = case
    output = run(tiny(**config), noise(batch, config["in_channels"], *config["sample_size"]))
    assert output.shape == (batch, config["out_channels"], *config["sample_size"])
    assert output.isfinite().all()


@pytest.mark.parametrize(
    "options, argument",
    [
        ({"sample_size": 3, "block_out_channels": (8, 8, 8)}, "at least 4"),
        ({"sample_size": (8, 1)}, "at least 2"),
        ({"time_embedding_type": "cosine"}, "time_embedding_type.*positional"),
        ({"attention_types": "flash"}, "attention_types.*linear"),
        ({"attention_types": ("linear", "flash")}, "attention_types.*linear"),
        ({"mid_attention_type": "flash"}, "mid_attention_type.*full"),
        ({"attention_types": ("none",)}, "attention_types"),
        ({"attention_types": ("none", "none", "full")}, "attention_types"),
        ({"norm_type": "layer"}, "norm_type.*rms"),
        ({"attention_norm_type": "group"}, "attention_norm_type.*rms"),
        ({"downsample_type": "pool"}, "downsample_type.*pixel_unshuffle"),
        ({"num_mem_kv": -1}, "num_mem_kv"),
        ({"num_attention_heads": (2,)}, "num_attention_heads"),
        ({"attention_head_dim": (4, 0)}, "attention_head_dim"),
        ({"stem_channels": 10}, "stem_channels"),
        ({"time_embedding_dim": 7}, "time_embedding_dim"),
        ({"time_embedding_type": "learned_fourier", "time_fourier_dim": 7}, "time_fourier_dim"),
        ({"time_embedding_type": "learned_fourier", "time_fourier_dim": 0}, "time_fourier_dim"),
        ({"time_fourier_dim": 8}, "time_fourier_dim=8 is for time_embedding_type learned_fourier"),
        ({"time_embedding_theta": 0.0}, "time_embedding_theta"),
        ({"time_embedding_theta": math.nan}, "time_embedding_theta"),
        ({"norm_num_groups": 3}, "norm_num_groups"),
        ({"norm_num_groups": 0}, "norm_num_groups"),
        ({"block_out_channels": (8, 18)}, "norm_num_groups"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": -0.1}, "dropout"),
        ({"block_out_channels": (9, 18), "norm_num_groups": 9}, "block_out_channels"),
        ({"block_out_channels": (2, 4), "norm_num_groups": 2}, "block_out_channels"),
        (
            {"block_out_channels": (9, 18), "norm_num_groups": 9, "time_embedding_type": "random_fourier"},
            "block_out_channels",
        ),
        ({"block_out_channels": ()}, "block_out_channels"),
        ({"layers_per_block": 0}, "layers_per_block"),
    ],
    ids=str,
)
def test_config_that_cannot_work_is_one_sentence_naming_the_argument(options, argument):
    with one_sentence(match=rf"(?s)\A[^\n]*{argument}[^\n]*\.\Z"):
        tiny(**options)


@pytest.mark.parametrize("size", [(1, 8), (8, 1)])
def test_image_too_small_for_the_levels_is_refused(size):
    with pytest.raises(ValueError, match="at least 2"):
        run(tiny(), noise(1, 3, *size))


def test_learned_variance_doubles_the_output_channels():
    assert run(tiny(out_channels=6), noise(2, 3, 8, 8)).shape == (2, 6, 8, 8)


def test_tuple_is_returned_on_request():
    network, x = tiny(), noise(1, 3, 8, 8)
    with torch.no_grad():
        output = network(x, 5, return_dict=False)
    assert isinstance(output, tuple) and len(output) == 1
    assert_close(output[0], run(network, x, 5), rtol=0, atol=0)


# ---------------------------------------------------------------- classes and self-conditioning


def test_no_label_is_the_null_class():
    network, x = tiny(num_class_embeds=3), noise(2, 3, 8, 8)
    null = torch.full((2,), network.null_class)
    assert network.null_class == 3
    assert_close(run(network, x), run(network, x, class_labels=null), rtol=0, atol=0)


def test_classes_differ_from_each_other_and_from_none():
    network, x = tiny(num_class_embeds=3), noise(1, 3, 8, 8)
    outputs = [run(network, x, class_labels=torch.tensor([label])) for label in range(4)]
    differences = [(a - b).abs().max() for i, a in enumerate(outputs) for b in outputs[:i]]
    assert min(differences) > 1e-3


def test_each_image_has_its_own_class():
    network, x = tiny(num_class_embeds=3), noise(1, 3, 8, 8).expand(2, -1, -1, -1)
    together = run(network, x, class_labels=torch.tensor([0, 2]))
    alone = torch.cat([run(network, x[:1], class_labels=torch.tensor([label])) for label in (0, 2)])
    assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_labels_need_a_network_with_classes():
    with pytest.raises(ValueError, match="class_labels"):
        run(tiny(), noise(1, 3, 8, 8), class_labels=torch.tensor([0]))


def test_no_estimate_is_an_estimate_of_zeros():
    network, x = tiny(self_condition=True), noise(2, 3, 8, 8)
    assert_close(run(network, x), run(network, x, self_cond=torch.zeros_like(x)), rtol=0, atol=0)


def test_estimate_changes_the_output():
    network, x = tiny(self_condition=True), noise(2, 3, 8, 8)
    assert (run(network, x) - run(network, x, self_cond=noise(2, 3, 8, 8, seed=2))).abs().max() > 1e-2


def test_estimate_needs_a_network_with_self_conditioning():
    x = noise(1, 3, 8, 8)
    with pytest.raises(ValueError, match="self_cond"):
        run(tiny(), x, self_cond=x)


# ---------------------------------------------------------------- training and deployment


def gradients(network: DDPMUNet2DModel) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    network.train().zero_grad()
    loss = network(noise(2, 3, 8, 8), torch.tensor([3, 700])).sample.square().mean()
    loss.backward()
    return loss.detach(), {name: weight.grad for name, weight in network.named_parameters()}


def test_gradient_checkpointing_changes_neither_loss_nor_gradients():
    network = tiny()
    expected = gradients(network)
    network.enable_gradient_checkpointing()
    assert_close(gradients(network), expected, rtol=1e-5, atol=1e-7)


def test_gradient_checkpointing_recomputes_every_level():
    network, calls = tiny(), []
    levels = [*network.down_blocks, *network.up_blocks, network.mid_resnet_1, network.mid_resnet_2]
    for level in levels:
        level.register_forward_pre_hook(lambda module, _: calls.append(module))  # recomputing stops early
    network.enable_gradient_checkpointing()
    gradients(network)
    assert [calls.count(level) for level in levels] == [2] * len(levels)


def test_every_weight_gets_a_gradient():
    _, grads = gradients(tiny(num_class_embeds=2, self_condition=True, attention_types=("linear", "full")))
    assert [name for name, grad in grads.items() if grad is None or not grad.any()] == []


def test_dropout_acts_in_training_only():
    network, x = tiny(dropout=0.5), noise(1, 3, 8, 8)
    assert_close(run(network, x), run(tiny(), x), rtol=0, atol=0)
    network.train()
    assert (run(network, x) - run(network, x)).abs().max() > 1e-3


@pytest.mark.parametrize(
    "options", [{}, {"norm_type": "rms", "num_mem_kv": 2, "downsample_type": "pixel_unshuffle"}], ids=str
)
def test_network_compiles_without_a_graph_break(options):
    network = tiny(num_class_embeds=3, self_condition=True, attention_types=("linear", "full"), **options)
    x, inputs = noise(2, 3, 8, 9), {"class_labels": torch.tensor([0, 2]), "self_cond": noise(2, 3, 8, 9, seed=2)}
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    for t in (torch.tensor([3, 500]), torch.tensor(3)):
        assert_close(run(compiled, x, t, **inputs), run(network, x, t, **inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norms", ["group and layer", "rms"])
def test_bfloat16_weights_are_near_float32(norms):
    norms = {"norm_type": "rms", "attention_norm_type": "rms", "num_mem_kv": 2} if norms == "rms" else {}
    network = tiny(num_class_embeds=3, self_condition=True, **norms)
    x, labels = noise(2, 3, 8, 8), torch.tensor([0, 2])
    expected = run(network, x, class_labels=labels)
    output = run(network.to(torch.bfloat16), x.bfloat16(), class_labels=labels)
    assert output.dtype == torch.bfloat16
    assert (output.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("kind", ["linear", "full", "none"])
def test_channels_last_gives_the_same_result(kind):
    network, x = tiny(attention_types=kind), noise(2, 3, 8, 9)
    expected = run(network, x)
    output = run(network.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last))
    assert_close(output, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_class_embeds": 3, "self_condition": True, "sample_size": (8, 9), "attention_types": ("none", "full")},
        {"time_embedding_type": "random_fourier"},
        {"time_embedding_type": "learned_fourier", "time_fourier_dim": 6},
        {"time_embedding_theta": 50.0},
        {"norm_type": "rms", "attention_norm_type": "rms", "num_mem_kv": 2, "downsample_type": "pixel_unshuffle"},
        {"num_attention_heads": (1, 2), "stem_channels": 12, "time_embedding_dim": 6},
    ],
    ids=str,
)
def test_saved_network_is_the_same_network(tmp_path, options):
    network, x = tiny(**options), noise(2, 3, 8, 9)
    network.save_pretrained(tmp_path)
    loaded = DDPMUNet2DModel.from_pretrained(tmp_path)
    assert_close(run(loaded, x), run(network, x), rtol=0, atol=0)
