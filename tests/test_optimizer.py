"""Muon: its matrices against the closed form and torch's own, the other parameters against AdamW."""

import pytest
import torch
from diffusers import UNet2DModel
from runs import NETWORK, STOCK
from torch import nn

from ddpm_pipe import DDPMUNet2DModel
from ddpm_pipe.training.optimizer import Muon, hidden_matrices, orthogonalized

OPTIONS = {"lr": 1e-2, "weight_decay": 0.1, "fused": True}


def parameters(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (7, 7)])
def test_orthogonalization_changes_only_the_singular_values_and_these_by_its_polynomial(shape):
    matrix = parameters(shape)[0].detach().double()
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    torch.testing.assert_close(orthogonalized([matrix])[0], u @ s.diag() @ vh)


def test_singular_values_end_near_one_in_single_precision():
    values = torch.linalg.svdvals(
        orthogonalized([torch.randn(128, 1152, generator=torch.Generator().manual_seed(0))])[0]
    )
    assert values.min() > 0.67 and values.max() < 1.15


def test_a_gradient_of_zeros_moves_nothing():
    assert orthogonalized([torch.zeros(3, 5)])[0].count_nonzero() == 0


def test_matrices_move_as_under_torchs_muon_whose_iterations_are_in_bfloat16():
    ours, theirs = parameters((12, 20)), parameters((12, 20))
    muon = Muon(ours, ours, rms=0.2, **OPTIONS)
    reference = torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(5):
        before = ours[0].detach().clone()
        for matrix in (ours[0], theirs[0]):
            matrix.grad = torch.randn(12, 20, generator=torch.Generator().manual_seed(step))
        muon.step()
        reference.step()
        moved = (ours[0] - before).norm()
        assert (ours[0] - theirs[0]).norm() < 0.05 * (step + 1) * moved


def test_the_filters_of_a_convolution_are_rows_and_its_strides_do_not_matter():
    flat, filters, strided = parameters((8, 36)), parameters((8, 4, 3, 3)), parameters((8, 4, 3, 3))
    strided[0].data = strided[0].data.to(memory_format=torch.channels_last)
    with torch.no_grad():
        filters[0].copy_(flat[0].view(8, 4, 3, 3))
        strided[0].copy_(filters[0])
    for each in (flat, filters, strided):
        optimizer = Muon(each, each, rms=0.2, **OPTIONS)
        each[0].grad = torch.arange(288.0).sin().view_as(each[0])
        optimizer.step()
    torch.testing.assert_close(filters[0].flatten(1), flat[0])
    torch.testing.assert_close(strided[0], filters[0])


def test_the_other_parameters_move_as_under_adamw():
    ours, theirs = parameters((4, 6), (6,)), parameters((4, 6), (6,))
    muon, adamw = Muon(ours, ours[:1], rms=0.2, **OPTIONS), torch.optim.AdamW(theirs[1:], **OPTIONS)
    for step in range(3):
        for parameter in (*ours, *theirs):
            parameter.grad = torch.full_like(parameter, step - 0.5)
        muon.step()
        adamw.step()
        muon.zero_grad()
    assert torch.equal(ours[1], theirs[1])
    assert all(parameter.grad is None for parameter in ours)


@pytest.mark.parametrize(
    "unet", [DDPMUNet2DModel(**NETWORK), UNet2DModel(**{k: v for k, v in STOCK.items() if k != "_class_name"})]
)
def test_the_first_and_the_last_convolution_are_no_matrices_of_muon(unet):
    chosen = {id(parameter) for parameter in hidden_matrices(unet)}
    convolutions = [name for name, p in unet.named_parameters() if p.ndim == 4 and id(p) not in chosen]
    assert convolutions == ["conv_in.weight", "conv_out.weight"]
    assert all(parameter.ndim == 4 for parameter in hidden_matrices(unet))
