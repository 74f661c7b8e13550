"""Backward row kernels against autograd through the reference."""

from __future__ import annotations

import pytest
import torch

from lorikeet.kernels import cpu_backward
from lorikeet.kernels.reference import ReferenceOps

reference = ReferenceOps()
TOLERANCE = {torch.float32: {"rtol": 2e-5, "atol": 2e-6}, torch.bfloat16: {"rtol": 1e-2, "atol": 1e-2}}


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "d"), [(1, 3), (7, 32), (900, 96)])
def test_add_rms_norm_backward(dtype: torch.dtype, rows: int, d: int) -> None:
    total, dnormed, dtotal = (normal(rows, d, dtype=dtype, seed=i) for i in range(3))
    weight = normal(d, dtype=dtype, seed=3)
    x = total.double().requires_grad_()
    normed = reference.rms_norm(x, weight.double(), 1e-5)
    (expected,) = torch.autograd.grad((normed * dnormed).sum() + (x * dtotal).sum(), x)
    found = cpu_backward.add_rms_norm_backward(dnormed, dtotal, total, weight, 1e-5)
    torch.testing.assert_close(found, expected.to(dtype), **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "m"), [(1, 3), (7, 32), (900, 96)])
def test_silu_mul_backward(dtype: torch.dtype, rows: int, m: int) -> None:
    gate_up, dout = normal(rows, 2 * m, dtype=dtype).mul_(4), normal(rows, m, dtype=dtype, seed=1)
    x = gate_up.double().requires_grad_()
    (expected,) = torch.autograd.grad((reference.silu_mul(x) * dout).sum(), x)
    torch.testing.assert_close(cpu_backward.silu_mul_backward(dout, gate_up), expected.to(dtype), **TOLERANCE[dtype])
