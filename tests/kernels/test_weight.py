"""Packed weights against plain ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorikeet.kernels.weight import DenseWeight, PackedWeight, pack


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
