"""Products of bf16 rows with weights in 8 or 4 bits on a GPU: what is read of a weight are its stored bytes.

A program has all columns for some outputs: it reads blocks of the weight ahead of their use, widens them in registers
and multiplies on matrix units, with sums in fp32. int8 becomes bf16 without a loss and is scaled once at the end. Four
bits come in groups of 64 columns, of which one byte holds two that are 32 apart, so that x is read along its rows as
well; each becomes the bf16 number that dequantising makes of it: `(index - 8) * scale + zero` (int4), or the value of a
table times a scale (NF4).

With many rows every tile of rows widens the weight anew: it pays to widen it once, for the vendor library's product
(`dequantise_int8`, `dequantise_four_bits`). Block sizes and the number of rows are reasoned, not measured: in units of
the time in which a large device reads an int8 weight, dequantising costs 5 (1 read, 2 written, 2 read again) and the
vendor's product of 256 rows 3; the product here has about 6 of arithmetic at 256 rows, and 3 at 128.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorikeet.kernels.gpu_lowrank import product

MOST_ROWS = 256  # of a product with the stored form; one with more takes the dequantised weight
GROUP = 64  # columns that share a scale, where a weight has four bits
PROGRAMS = 256  # that keep a large device reading
WIDTH = 1024  # numbers that a program dequantises
_HALF = tl.constexpr(32)
_MIDDLE = tl.constexpr(8)  # of the sixteen steps of int4


@triton.jit
def finish(out, total, bias, m, at, rows, n, BIAS: tl.constexpr):
    """total [rows, outputs] and the bias, rounded once, into out."""
    if BIAS:
        total += tl.load(bias + at, mask=at < n, other=0).to(tl.float32)[None, :]
    inside = (m < rows)[:, None] & (at < n)[None, :]
    tl.store(out + m.to(tl.int64)[:, None] * n + at[None, :], total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def int8_kernel(out, x, stored, scale, bias, rows, n, k, ldx,
                BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """out = x (stored * scale)^T + bias: stored int8 [n, k], scale fp32 [n]."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    at = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, k, BLOCK_K):
        column = k0 + tl.arange(0, BLOCK_K)
        some = tl.load(x + m.to(tl.int64)[:, None] * ldx + column[None, :],
                       mask=(m < rows)[:, None] & (column < k)[None, :], other=0)  # fmt: skip
        w = tl.load(stored + at.to(tl.int64)[:, None] * k + column[None, :],
                    mask=(at < n)[:, None] & (column < k)[None, :], other=0)  # fmt: skip
        total = product(some, tl.trans(w.to(tl.float32).to(some.dtype)), total, False)
    total *= tl.load(scale + at, mask=at < n, other=0)[None, :]
    finish(out, total, bias, m, at, rows, n, BIAS)


@triton.jit
def halves(pair):
    """The two bf16 numbers in each int32, the first in its low half, as fp32."""
    first = (pair << 16).to(tl.float32, bitcast=True)
    return first, (pair >> 16 << 16).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["rows"])
def four_bits_kernel(out, x, packed, scale, table, bias, rows, n, k, ldx, TABLE: tl.constexpr, BIAS: tl.constexpr,
                     BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr):  # fmt: skip
    """out = x W^T + bias, `GROUPS` groups of columns at a time; what is stored is said in `four_bits_linear`."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    at = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    c, groups = tl.arange(0, _HALF), k // (2 * _HALF)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if TABLE:
        sixteen = tl.load(table + tl.arange(0, 16))
    for first in range(0, groups, GROUPS):
        for i in tl.static_range(GROUPS):
            column = c + (first + i) * (2 * _HALF)
            byte = at.to(tl.int64)[:, None] * (k // 2) + (c + (first + i) * _HALF)[None, :]
            both = tl.load(packed + byte, mask=(at < n)[:, None] & (column < k)[None, :], other=0).to(tl.int32)
            of_x = x + m.to(tl.int64)[:, None] * ldx + column[None, :]
            inside = (m < rows)[:, None] & (column < k)[None, :]
            one, two = tl.load(of_x, mask=inside, other=0), tl.load(of_x + _HALF, mask=inside, other=0)
            place = tl.minimum(first + i, groups - 1) * n + at  # behind the last group x is zero
            told = tl.load(scale + place, mask=at < n, other=0)
            if TABLE:  # sixteen products a group instead of 64
                values = (sixteen[None, :] * told[:, None]).to(one.dtype)
                low, high = tl.gather(values, both & 15, 1), tl.gather(values, both >> 4, 1)
            else:
                step, zero = halves(told)
                low = (((both & 15) - _MIDDLE).to(tl.float32) * step[:, None] + zero[:, None]).to(one.dtype)
                high = (((both >> 4) - _MIDDLE).to(tl.float32) * step[:, None] + zero[:, None]).to(one.dtype)
            total = product(one, tl.trans(low), total, False)
            total = product(two, tl.trans(high), total, False)
    finish(out, total, bias, m, at, rows, n, BIAS)


@triton.jit
def dequantise_int8_kernel(out, stored, scale, k, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    w = tl.load(stored + row * k + at, mask=at < k, other=0).to(tl.float32) * tl.load(scale + row)
    tl.store(out + row * k + at, w.to(out.dtype.element_ty), mask=at < k)


@triton.jit
def dequantise_four_bits_kernel(out, packed, scale, table, n, k, TABLE: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside, g = at < k, at // (2 * _HALF)
    both = tl.load(packed + row * (k // 2) + g * _HALF + at % _HALF, mask=inside, other=0).to(tl.int32)
    index = tl.where(at % (2 * _HALF) < _HALF, both & 15, both >> 4)
    told = tl.load(scale + g.to(tl.int64) * n + row, mask=inside, other=0)
    if TABLE:
        w = tl.load(table + index) * told
    else:
        step, zero = halves(told)
        w = (index - _MIDDLE).to(tl.float32) * step + zero
    tl.store(out + row * k + at, w.to(out.dtype.element_ty), mask=inside)


def int8_linear(x: Tensor, stored: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x bf16 [T, d_in], stored int8 [d_out, d_in], scale fp32 [d_out] -> x W^T + b [T, d_out] in bf16."""
    n, k = stored.shape
    out = _out(x, n, k)
    if len(x):
        block_m, block_n = _blocks(len(x), n)
        int8_kernel[(triton.cdiv(len(x), block_m), triton.cdiv(n, block_n))](
            out, x, stored, scale, scale if bias is None else bias, len(x), n, k, x.stride(0), BIAS=bias is not None,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=256 if block_m <= 32 else 128,
            num_warps=4 if block_m <= 64 else 8, num_stages=4 if block_m <= 32 else 3,
        )  # fmt: skip
    return out


def four_bits_linear(x: Tensor, packed: Tensor, scale: Tensor, table: Tensor | None, bias: Tensor | None) -> Tensor:
    """x bf16 [T, d_in] -> x W^T + b [T, d_out] in bf16.

    packed uint8 [d_out, d_in / 2]: byte 32 g + c of a row holds columns 64 g + c and, in its high half, 64 g + 32 + c.
    Without a table `scale` holds scale and zero, bf16 [d_in / 64, d_out, 2]; with one (fp32 [16]) it is fp32
    [d_in / 64, d_out].
    """
    n, k = packed.shape[0], packed.shape[1] * 2
    out = _out(x, n, k)
    if len(x):
        block_m, block_n = _blocks(len(x), n)
        four_bits_kernel[(triton.cdiv(len(x), block_m), triton.cdiv(n, block_n))](
            out, x, packed, _told(scale), scale if table is None else table, scale if bias is None else bias, len(x), n,
            k, x.stride(0), TABLE=table is not None, BIAS=bias is not None, BLOCK_M=block_m, BLOCK_N=block_n,
            GROUPS=4 if block_m <= 32 else 2, num_warps=4 if block_m <= 64 else 8,
            num_stages=6 if block_m <= 32 else 3,
        )  # fmt: skip
    return out


def dequantise_int8(stored: Tensor, scale: Tensor) -> Tensor:
    """W [d_out, d_in] in bf16; arguments as of `int8_linear`."""
    n, k = stored.shape
    out = torch.empty((n, k), dtype=torch.bfloat16, device=stored.device)
    dequantise_int8_kernel[(n, triton.cdiv(k, WIDTH))](out, stored, scale, k, WIDTH=WIDTH)
    return out


def dequantise_four_bits(packed: Tensor, scale: Tensor, table: Tensor | None) -> Tensor:
    """W [d_out, d_in] in bf16; arguments as of `four_bits_linear`."""
    n, k = packed.shape[0], packed.shape[1] * 2
    out = torch.empty((n, k), dtype=torch.bfloat16, device=packed.device)
    dequantise_four_bits_kernel[(n, triton.cdiv(k, WIDTH))](
        out, packed, _told(scale), scale if table is None else table, n, k, TABLE=table is not None, WIDTH=WIDTH
    )
    return out


def _told(scale: Tensor) -> Tensor:
    """[d_in / 64, d_out]: a scale in fp32, or scale and zero in one int32, which is copied ahead of its use."""
    return scale if scale.dim() == 2 else scale.view(torch.int32).squeeze(2)


def _out(x: Tensor, n: int, k: int) -> Tensor:
    if x.dtype != torch.bfloat16 or x.dim() != 2 or x.shape[1] != k or x.stride(1) != 1:
        found = f"{x.dtype} {tuple(x.shape)} with strides {x.stride()}"
        raise ValueError(f"x is {found}; expected bfloat16 rows of {k} numbers that lie side by side")
    return torch.empty((len(x), n), dtype=x.dtype, device=x.device)


def _blocks(rows: int, n: int) -> tuple[int, int]:
    """Rows and outputs of a program, by shape alone: a captured graph keeps what it was captured with."""
    block_m = min(max(triton.next_power_of_2(rows), 16), 128)
    return block_m, 64 if block_m >= 64 or n >= 64 * PROGRAMS else 32
