"""Norms, rotary positions, gated activation and logits against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorikeet.kernels.cpu import CpuOps
from lorikeet.kernels.reference import ReferenceOps
from lorikeet.kernels.weight import DenseWeight, PackedWeight

DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
ROWS = st.sampled_from((1, 2, 3, 4, 5, 31, 300))
WIDTHS = st.integers(1, 200) | st.sampled_from([32, 64, 160])  # a multiple of 32 takes another kernel


def assert_close(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    error = (found.float() - wanted.float()).abs().max() / wanted.float().abs().max().clamp(min=1)
    assert error <= TOLERANCE[wanted.dtype]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(DTYPES), ROWS, st.integers(1, 400), st.booleans())
def test_norms_of_rows(seed: int, dtype: torch.dtype, rows: int, d: int, first: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, residual = (torch.randn(rows, d, generator=generator).to(dtype) for _ in range(2))
    weight = torch.randn(d, generator=generator).to(dtype)
    before = x.clone()
    found = CpuOps().add_rms_norm(x, None if first else residual, weight, 1e-5)
    wanted = ReferenceOps().add_rms_norm(x, None if first else residual, weight, 1e-5)
    assert_close(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])
    assert torch.equal(x, before)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(DTYPES), ROWS, st.integers(1, 7), st.sampled_from((2, 10, 32, 64, 80)))
def test_norm_and_rope_of_heads(seed: int, dtype: torch.dtype, rows: int, heads: int, d: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    joined = torch.randn(rows, heads * d + 48, generator=generator).to(dtype)
    x = joined[:, 16 : 16 + heads * d].unflatten(-1, (-1, d))
    weight = torch.randn(d, generator=generator).to(dtype)
    cos, sin = (torch.randn(rows, d // 2, generator=generator) for _ in range(2))
    assert_close(CpuOps().rms_norm(x, weight, 1e-6), ReferenceOps().rms_norm(x, weight, 1e-6))
    assert_close(CpuOps().rope(x, cos, sin), ReferenceOps().rope(x, cos, sin))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(DTYPES), ROWS, st.integers(1, 500))
def test_gated_activation(seed: int, dtype: torch.dtype, rows: int, d: int) -> None:
    x = (torch.randn(rows, 2 * d, generator=torch.Generator().manual_seed(seed)) * 8).to(dtype)
    x[0, 0] = -200.0
    assert_close(CpuOps().silu_mul(x), ReferenceOps().silu_mul(x))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(DTYPES), ROWS, WIDTHS, st.integers(1, 150), st.booleans())
def test_logits_are_unrounded(seed: int, dtype: torch.dtype, rows: int, d: int, columns: int, packed: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    head, x = (torch.randn(n, d, generator=generator).to(dtype) for n in (columns, rows))
    found = CpuOps().logits((PackedWeight if packed else DenseWeight)(head), x)
    assert_close(found, x.double().mm(head.double().T).float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_row(dtype: torch.dtype) -> None:
    ops, generator = CpuOps(), torch.Generator().manual_seed(0)
    x = torch.randn(6, 64, generator=generator).to(dtype)
    weight, head = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((64,), (50, 64)))
    cos, sin = torch.randn(6, 32), torch.randn(6, 32)

    def everything(x: Tensor) -> list[Tensor]:
        return [
            *ops.add_rms_norm(x, x, weight, 1e-5), ops.rope(x.unsqueeze(1), cos, sin).flatten(1), ops.silu_mul(x),
            ops.logits(DenseWeight(head), x),
        ]  # fmt: skip

    poisoned = x.clone()
    poisoned[2] = float("nan")
    others = torch.tensor([0, 1, 3, 4, 5])
    for clean, found in zip(everything(x), everything(poisoned), strict=True):
        assert found[2].isnan().all()
        assert torch.equal(found[others], clean[others])


def test_what_kernels_cannot_read_is_refused() -> None:
    ops, x = CpuOps(), torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"add_rms_norm: found torch.float32 .* torch.bfloat16"):
        ops.add_rms_norm(x, None, torch.ones(4, dtype=torch.bfloat16), 1e-5)
    with pytest.raises(ValueError, match="silu_mul"):
        ops.silu_mul(torch.zeros(4, 2).T)
    with pytest.raises(ValueError, match="rope"):
        ops.rope(torch.zeros(2, 1, 8), x.double(), x.double())
    with pytest.raises(TypeError, match=r"float16"):
        ops.silu_mul(x.half())
