"""Rows in 8-bit floats: each is scaled by its own largest magnitude, in one pass over memory."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FP8 = torch.float8_e4m3fn
LARGEST = tl.constexpr(448.0)
SMALLEST = tl.constexpr(1e-12)
CHUNK = 4096  # numbers of a row that are held at once


@triton.jit
def quantise_kernel(X, OUT, SCALE, ldx, d, WIDTH: tl.constexpr):
    """One row: its largest magnitude, then the row again (out of cache) divided by the scale, NaN if any of it is."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDTH)
    peak, broken = tl.zeros((WIDTH,), tl.float32), tl.zeros((WIDTH,), tl.int32)
    for start in range(0, d, WIDTH):
        x = tl.load(X + row * ldx + start + at, mask=start + at < d, other=0).to(tl.float32)
        peak, broken = tl.maximum(peak, tl.abs(x)), broken | (x != x).to(tl.int32)
    scale = tl.maximum(tl.max(peak, 0), SMALLEST) / LARGEST
    tl.store(SCALE + row, tl.where(tl.max(broken, 0) > 0, float("nan"), scale))
    for start in range(0, d, WIDTH):
        inside = start + at < d
        x = tl.load(X + row * ldx + start + at, mask=inside, other=0).to(tl.float32) / scale
        x = tl.minimum(tl.maximum(x, -LARGEST), LARGEST)
        tl.store(OUT + row * d + start + at, x.to(OUT.dtype.element_ty), mask=inside)


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, d] -> (fp8 [T, d], scale fp32 [T, 1]) with x about fp8 * scale; a row with a NaN has a scale of NaN."""
    if x.dim() != 2 or x.stride(1) != 1:
        raise ValueError(f"x is {tuple(x.shape)} with strides {x.stride()}; expected [T, d] with dense rows")
    rows, d = x.shape
    out = torch.empty((rows, d), dtype=FP8, device=x.device)
    scale = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    width = min(triton.next_power_of_2(d), CHUNK)
    if rows:
        quantise_kernel[(rows,)](x, out, scale, x.stride(0), d, WIDTH=width, num_warps=4 if width <= 2048 else 8)
    return out, scale
