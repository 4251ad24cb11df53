"""Dropout: each image has a mask of its own, and the same one whatever shares the batch with it."""

import pytest
import torch
from diffusers import UNet2DModel
from runs import NETWORK, STOCK
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from ddpm_pipe import DDPMScheduler, DDPMUNet2DModel
from ddpm_pipe.objective import Objective
from ddpm_pipe.training.dropout import ImageDropout, draw_keys, use_image_dropout

IMAGES, NUMBERS = 24, 4096
NETWORKS = {"ours": (DDPMUNet2DModel, NETWORK), "stock": (UNet2DModel, STOCK)}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def kept(p: float = 0.3, images: slice = slice(None), step: int = 0, calls: int = 1) -> torch.Tensor:
    """Where a module keeps the numbers of images of a batch: those of each call, bool (calls, images, NUMBERS)."""
    module = ImageDropout(p)
    module.keys = draw_keys(IMAGES, seeded(step))[images]
    ones = torch.ones(len(module.keys), 4, 32, 32)
    torch.manual_seed(100 + step)
    return torch.stack([module(ones).flatten(1) != 0 for _ in range(calls)])


@pytest.mark.parametrize("p", [0.1, 0.3, 0.75])
def test_a_share_p_of_each_image_is_dropped_and_the_rest_scaled(p):
    module = ImageDropout(p)
    module.keys = draw_keys(IMAGES, seeded())
    x = torch.randn(IMAGES, 4, 32, 32, generator=seeded())
    y = module(x)
    assert torch.equal(y[y != 0], (x / (1 - p))[y != 0])
    shares = (y == 0).flatten(1).double().mean(1)
    assert ((shares - p) / (p * (1 - p) / NUMBERS) ** 0.5).abs().max() < 4.5  # standard deviations
    module.eval()
    assert module(x) is x


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_masks_of_images_calls_and_steps_are_independent(p):
    """The correlation of n pairs of independent numbers is N(0, 1 / n): of two masks, and of neighbours in them."""
    masks = torch.cat([*kept(p, calls=2), *kept(p, step=1)]).double()
    count = len(masks)
    correlations = torch.corrcoef(masks)[*torch.triu_indices(count, count, 1)] * NUMBERS**0.5
    assert correlations.abs().max() < 5
    assert abs(correlations.std() - 1) < 0.1
    for lag in (1, 2, 32, 1024):
        pairs = (masks[:, lag:] - 1 + p) * (masks[:, :-lag] - 1 + p) / (p * (1 - p))
        assert abs(pairs.mean()) < 4 / pairs.numel() ** 0.5


def test_the_mask_of_an_image_does_not_depend_on_the_others():
    whole = kept(calls=2)
    for cut in (1, 2, 8):
        parts = [kept(images=slice(start, start + IMAGES // cut), calls=2) for start in range(0, IMAGES, IMAGES // cut)]
        assert torch.equal(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_loss_and_gradient_of_a_batch_are_those_of_its_parts(name, checkpointing):
    """Whether the backward pass computes the masks again or not, and with two passes for self-conditioning."""
    kind, options = NETWORKS[name]
    options = {key: value for key, value in options.items() if not key.startswith("_")} | {"dropout": 0.3}
    own = {"self_condition": True} if name == "ours" else {}
    torch.manual_seed(0)
    unet = kind(sample_size=8, in_channels=3, out_channels=3, **options, **own).train()
    modules, keys = use_image_dropout(unet), draw_keys(8, seeded())
    objective, x0, eps = Objective(DDPMScheduler()), *torch.randn(2, 8, 3, 8, 8, generator=seeded())

    def losses_and_gradient(parts: int, checkpointing: bool = False) -> tuple[torch.Tensor, ...]:
        unet.zero_grad()
        (unet.enable_gradient_checkpointing if checkpointing else unet.disable_gradient_checkpointing)()
        losses = []
        for part in torch.arange(8).chunk(parts):
            torch.manual_seed(1)
            for module in modules:
                module.keys = keys[part]
            losses.append(objective(unet, x0[part], 100 * part, eps[part], bool(own)))
            losses[-1].sum().backward()
        gradient = nn.utils.parameters_to_vector([p.grad for p in unet.parameters() if p.grad is not None])
        return torch.cat(losses).detach(), gradient

    expected = losses_and_gradient(1)
    assert expected[0].std() > 1e-3
    for parts in (1, 2, 8):
        for value, reference in zip(losses_and_gradient(parts, checkpointing), expected, strict=True):
            torch.testing.assert_close(value, reference, rtol=1e-3, atol=1e-4 * reference.abs().max().item())


@pytest.mark.parametrize("name", NETWORKS)
def test_every_module_that_drops_something_is_replaced_and_no_weight_renamed(name):
    kind, options = NETWORKS[name]
    options = {key: value for key, value in options.items() if not key.startswith("_")}
    plain, unet = kind(**options), kind(**options, dropout=0.3)
    replaced = use_image_dropout(unet)
    assert not use_image_dropout(plain)
    assert {module.p for module in replaced} == {0.3}
    assert [type(module) for module in unet.modules() if isinstance(module, nn.Dropout) and module.p > 0] == []
    assert len(replaced) == sum(isinstance(module, ImageDropout) for module in unet.modules()) >= 5
    assert unet.state_dict().keys() == plain.state_dict().keys()


def test_keys_are_new_for_every_image_and_multiply_without_loss():
    keys = draw_keys(1000, seeded())
    assert keys.dtype == torch.int32 and (keys % 2 == 1).all() and len(keys.unique()) == 1000


def test_a_compiled_network_has_one_graph_for_all_steps():
    counter = CompileCounterWithBackend("aot_eager")
    unet = DDPMUNet2DModel(sample_size=8, **NETWORK, dropout=0.3).train()
    modules, x, t = use_image_dropout(unet), torch.randn(4, 3, 8, 8, generator=seeded()), torch.arange(4)
    compiled = torch.compile(unet, fullgraph=True, backend=counter)
    nn.init.normal_(unet.conv_out.weight)
    outputs = []
    for step in (0, 0, 1):
        for module in modules:
            module.keys = draw_keys(4, seeded(step))
        torch.manual_seed(step)
        outputs.append(compiled(x, t).sample.detach())
    assert counter.frame_count == 1
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[1], outputs[2])
