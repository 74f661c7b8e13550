"""Weights in four bits on a CPU: what torch's operator multiplies is what was quantised."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorikeet.kernels.int4_weight import GROUP, Int4Weight, WhereItFits, quantise_groups
from lorikeet.kernels.weight import Weight


@pytest.mark.parametrize("shape", [(64, 64), (96, 320), (16, 128), (48, 896)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_products_are_those_of_the_weight(shape: tuple[int, int], with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(*shape, generator=generator).bfloat16()
    weight[3] = 0
    weight[5] += 4
    bias = torch.randn(shape[0], generator=generator).bfloat16() if with_bias else None
    held = Int4Weight(weight, bias)
    index, scale = quantise_groups(weight)
    groups = index.view(shape[0], -1, GROUP).double() - 8
    wanted = (groups * scale[..., 0].T.double()[:, :, None] + scale[..., 1].T.double()[:, :, None]).view(shape)
    assert held.shape == shape and held.bias is bias
    torch.testing.assert_close(held.dequantised().double(), wanted, rtol=2**-7, atol=1e-6)
    assert torch.allclose(held.row_norms(), wanted.norm(dim=1).float(), rtol=1e-2, atol=1e-6)
    for rows in (1, 2, 5, 33):
        x = torch.randn(rows, shape[1] + 6, generator=generator).bfloat16()[:, 6:]
        expected = x.double() @ wanted.T + (0 if bias is None else bias.double())
        assert (held.linear(x).double() - expected).norm() < 1e-2 * expected.norm()
    stored = sum(value.nbytes for value in vars(held).values() if isinstance(value, Tensor) and value is not bias)
    assert stored <= 0.5625 * weight.numel()


def test_indices_are_the_nearest_of_sixteen_steps() -> None:
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(1))
    index, scale = quantise_groups(weight)
    steps = torch.arange(16) - 8.0
    values = steps * scale[..., :1].float() + scale[..., 1:].float()  # [groups, d_out, 16]
    far = (weight.view(32, 2, GROUP, 1) - values.transpose(0, 1)[:, :, None]).abs()
    chosen = far.gather(3, index.view(32, 2, GROUP, 1).long()).squeeze(3)
    assert torch.allclose(chosen, far.amin(3), rtol=1e-4, atol=1e-6)
    assert chosen.max() < 0.51 * scale[..., 0].max().float() + 2**-8 * weight.abs().max()


def test_what_does_not_fit_stays_bf16() -> None:
    make = WhereItFits(Int4Weight)

    def held(d_out: int, d_in: int) -> Weight:
        return make(torch.randn(d_out, d_in), None)

    assert isinstance(held(32, 64), Int4Weight)
    for shape in ((32, 96), (24, 64), (1, 5)):
        weight = held(*shape)
        assert not isinstance(weight, Int4Weight) and weight.dequantised().dtype == torch.bfloat16
