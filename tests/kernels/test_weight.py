"""Packed weights against plain ones, and against products in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorikeet.kernels import precision
from lorikeet.kernels.cpu import CpuOps
from lorikeet.kernels.cpu_products import panel_linear
from lorikeet.kernels.weight import DenseWeight, Int8Weight, PackedWeight, PanelWeight, pack, pack_table

needs_bf16 = pytest.mark.skipif(not precision.native_bf16_products(), reason="the processor has no AVX512-BF16")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(96, 64), (33, 17), (1, 5), (5, 1)])
def test_packed_equals_plain(dtype: torch.dtype, with_bias: bool, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(*shape, generator=generator).to(dtype)
    bias = torch.randn(shape[0], generator=generator).to(dtype) if with_bias else None
    packed, plain = PackedWeight(weight, bias), DenseWeight(weight, bias)
    assert packed.shape == plain.shape == shape
    assert packed.bias is bias
    assert torch.equal(packed.dequantised(), weight)
    assert torch.allclose(packed.row_norms(), plain.row_norms())
    for rows in (1, 3, 70):
        x = torch.randn(rows, shape[1], generator=generator).to(dtype)
        found, wanted = packed.linear(x), plain.linear(x)
        assert found.dtype == dtype
        assert torch.allclose(found.float(), wanted.float(), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


@needs_bf16
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(64, 32), (96, 34), (32, 2), (160, 896)])
def test_panels(with_bias: bool, shape: tuple[int, int]) -> None:
    """Every number of rows up to a few tiles, rows that do not lie side by side, both output types."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(*shape, generator=generator).bfloat16()
    bias = torch.randn(shape[0], generator=generator).bfloat16() if with_bias else None
    panels = PanelWeight(weight, bias)
    assert panels.shape == shape and panels.bias is bias
    assert torch.equal(panels.dequantised(), weight)
    assert torch.allclose(panels.row_norms(), DenseWeight(weight).row_norms())
    for rows in (*range(1, 28), 70):
        x = torch.randn(rows, shape[1] + 6, generator=generator).bfloat16()[:, 6:]
        wanted = x.double() @ weight.double().T + (0 if bias is None else bias.double())
        exact, rounded = panel_linear(x, *panels.panels, torch.float32), panels.linear(x)
        assert (exact.double() - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        assert torch.equal(rounded, exact.bfloat16())


@needs_bf16
def test_panels_keep_not_a_number_in_its_row() -> None:
    panels, x = PanelWeight(torch.randn(64, 32).bfloat16()), torch.randn(14, 32).bfloat16()
    x[3, 5], x[13, 0] = float("nan"), float("inf")
    found = panels.linear(x)
    assert found[3].isnan().all() and not found[13].isfinite().any()
    assert found[[row for row in range(14) if row not in (3, 13)]].isfinite().all()
    with pytest.raises(ValueError, match="bfloat16 rows"):
        panels.linear(x.float())


@pytest.mark.parametrize("shape", [(64, 32), (160, 896), (48, 64)])
def test_int8(shape: tuple[int, int]) -> None:
    """The product is that of the dequantised weight, which is within half a step of the original."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(*shape, generator=generator).bfloat16()
    weight[3] = 0
    bias = torch.randn(shape[0], generator=generator).bfloat16()
    quantised = Int8Weight(weight, bias)
    assert quantised.shape == shape
    step = weight.float().abs().amax(1, keepdim=True) / 127
    kept = quantised.dequantised().float()
    assert ((kept - weight.float()).abs() <= step * 0.5 + weight.float().abs() * 2**-8).all()
    exact = (weight.float() / step.clamp(min=1e-30)).round() * step
    for rows in (1, 2, 3, 13, 23, 24, 25, 36, 70):
        x = torch.randn(rows, shape[1], generator=generator).bfloat16()
        wanted = x.double() @ exact.double().T + bias.double()
        assert (quantised.linear(x).double() - wanted).abs().max() <= 2**-7 * wanted.abs().max()
    held = sum(value.nbytes for value in vars(quantised).values() if isinstance(value, Tensor))
    assert held <= shape[0] * shape[1] + 12 * shape[0]


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("vocabulary", [96, 95])
def test_a_table_gives_rows_and_logits_that_are_not_rounded(vocabulary: int, int8: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(n, 64, generator=generator).bfloat16() for n in (vocabulary, 5))
    table, panels = pack_table(weight, int8), precision.native_bf16_products() and vocabulary == 96
    assert isinstance(table, (Int8Weight if int8 else PanelWeight) if panels else DenseWeight)
    exact = weight.double()
    if panels and int8:
        step = weight.float().abs().amax(1, keepdim=True) / 127
        exact = (weight.float() / step).round().double() * step.double()
    wanted, found = x.double() @ exact.T, CpuOps().logits(table, x)
    assert found.dtype == torch.float32 and (found.double() - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    index = torch.tensor([0, 31, 32, 94, 94])
    assert torch.equal(table.rows(index), table.dequantised()[index])
    assert (table.rows(index).double() - exact[index]).abs().max() <= 2**-8 * exact.abs().max()


def test_pack_chooses_by_dtype_and_shape() -> None:
    wide = torch.randn(64, 32)
    assert isinstance(pack(wide), PackedWeight)
    if precision.native_bf16_products():
        assert isinstance(pack(wide.bfloat16()), PanelWeight)
        assert not isinstance(pack(wide[:63].bfloat16()), PanelWeight)


def test_pack_keeps_one_copy() -> None:
    weight = torch.randn(64, 32)
    packed = pack(weight)
    assert isinstance(packed, PackedWeight)
    held = [value for value in vars(packed).values() if isinstance(value, Tensor)]
    assert len(held) == 1 and held[0].layout == torch._mkldnn  # type: ignore[attr-defined]


def test_pack_falls_back_to_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(pack(torch.zeros(4, 4, dtype=torch.float64)), DenseWeight)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert isinstance(pack(torch.zeros(4, 4)), DenseWeight)
