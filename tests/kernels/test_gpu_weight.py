"""Weights in fp8, against the plain ones."""

from __future__ import annotations

import pytest
import torch

from lorikeet.kernels.gpu_weight import LARGEST, Fp8Weight


@pytest.mark.parametrize("shape", [(48, 64), (7, 33)])
@pytest.mark.parametrize("bias", [False, True])
def test_fp8_is_near_the_weight(shape: tuple[int, int], bias: bool, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    plain = (torch.randn(*shape, generator=generator) * torch.rand(shape[0], 1, generator=generator)).bfloat16()
    plain[1] = 0
    added = torch.randn(shape[0], generator=generator).bfloat16() if bias else None
    weight = Fp8Weight(plain.to(device), None if added is None else added.to(device))
    assert weight.shape == shape and weight.dequantised().dtype == torch.bfloat16
    error = (weight.dequantised().cpu().float() - plain.float()).abs()
    step = plain.float().abs().amax(1, keepdim=True) / LARGEST  # fp8 has 3 bits behind the first, or this near zero
    assert (error <= plain.float().abs() / 16 * 1.01 + step).all()
    x = torch.randn(5, shape[1], generator=generator).bfloat16()
    found = weight.linear(x.to(device)).cpu().double()
    expected = torch.nn.functional.linear(x.double(), plain.double(), None if added is None else added.double())
    assert found.shape == expected.shape and (found - expected).norm() < 0.06 * expected.norm()
    assert torch.allclose(weight.row_norms().cpu(), plain.float().norm(dim=1), rtol=0.02, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 64), (2, 5000), (1, 33)])
def test_rows_in_fp8(shape: tuple[int, int], device: str) -> None:
    from lorikeet.kernels.gpu_quantise import quantise_rows

    wide = torch.randn(shape[0], shape[1] + 5, generator=torch.Generator().manual_seed(1)).bfloat16()
    wide[0, :3] = torch.tensor([900.0, -1200.0, 0.01])
    wide[-1, 4] = float("nan") if shape[0] > 2 else 0.0
    x = wide.to(device)[:, : shape[1]]  # rows at a stride
    rounded, scale = (part.cpu() for part in quantise_rows(x))
    plain = x.cpu().float()
    fine = ~plain.isnan().any(1)
    peak = plain.nan_to_num().abs().amax(1, keepdim=True)
    assert torch.allclose(scale[fine], (peak / LARGEST)[fine])
    error = (rounded.float() * scale - plain).abs()
    wrong = (error > plain.abs() / 16 * 1.01 + peak / LARGEST)[fine].float().mean()
    assert wrong < 0.1 if device == "cpu" else wrong == 0  # the interpreter halves what rounds up to a power of two
    assert (rounded.float() * scale)[~fine].isnan().any() == (~fine).any()
