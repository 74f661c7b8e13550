"""The row kernels of `cpu_rows` with their backward passes: each reads its inputs once, writes the gradient once."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from lorikeet.kernels.cpu_rows import F1, LOG2E, add_rms_norm, check_rows, parts_for, rope, silu_mul
from lorikeet.kernels.cpu_runtime import at, device_function, exp2, hold, kernel, narrow, size, tag_of, widen
from lorikeet.kernels.cpu_tiles import F0

__all__ = ["add_rms_norm", "add_rms_norm_backward", "dropout", "rope", "silu_mul", "silu_mul_backward"]

SHIFT, FACTOR = np.uint32(16), np.uint32(0x45D9F3B)


@device_function
def norm_backward_rows(begin, end, dnormed, dtotal, total, weight, d, eps, out, act):
    w = at(weight, act)
    for row in range(begin, end):
        step = row * d * size(act)
        dn, dt, t, o = at(dnormed + step, act), at(dtotal + step, act), at(total + step, act), at(out + step, act)
        squares, along = F0, F0
        for i in range(d):
            value = widen(t[i])
            squares += value * value
            along += widen(dn[i]) * widen(w[i]) * value
        inverse = F1 / np.sqrt(squares / np.float32(d) + eps)
        along *= inverse * inverse * inverse / np.float32(d)
        for i in range(d):
            gradient = widen(dn[i]) * widen(w[i]) * inverse - widen(t[i]) * along
            o[i] = narrow(gradient + widen(dt[i]), act)


@kernel
def norm_backward_kernel(rows, dnormed, dtotal, total, weight, d, eps, out, parts, act):
    if parts == 1:
        norm_backward_rows(0, rows, dnormed, dtotal, total, weight, d, eps, out, act)
    else:
        for part in numba.prange(parts):
            begin, end = rows * part // parts, rows * (part + 1) // parts
            norm_backward_rows(begin, end, dnormed, dtotal, total, weight, d, eps, out, act)


@device_function
def silu_backward_rows(begin, end, dout, x, d, out, act):
    width = d * size(act)
    for row in range(begin, end):
        gate, up = at(x + 2 * row * width, act), at(x + (2 * row + 1) * width, act)
        dy = at(dout + row * width, act)
        dgate, dup = at(out + 2 * row * width, act), at(out + (2 * row + 1) * width, act)
        for i in range(d):
            g, gradient = widen(gate[i]), widen(dy[i])
            sigmoid = F1 / (F1 + exp2(-g * LOG2E))
            activated = g * sigmoid
            dup[i] = narrow(gradient * activated, act)
            dgate[i] = narrow(gradient * widen(up[i]) * (sigmoid + activated * (F1 - sigmoid)), act)


@kernel
def silu_backward_kernel(rows, dout, x, d, out, parts, act):
    if parts == 1:
        silu_backward_rows(0, rows, dout, x, d, out, act)
    else:
        for part in numba.prange(parts):
            silu_backward_rows(rows * part // parts, rows * (part + 1) // parts, dout, x, d, out, act)


@device_function
def hashed(x):
    """A 32-bit integer hash: two rounds of multiply and xor-shift."""
    x = np.uint32((x ^ (x >> SHIFT)) * FACTOR)
    x = np.uint32((x ^ (x >> SHIFT)) * FACTOR)
    return np.uint32(x ^ (x >> SHIFT))


@device_function
def dropout_rows(begin, end, x, ldx, d, places, low, columns, limit, scale, out, ldo, act):
    of_row, of_column = at(places, np.int64(0)), at(columns, SHIFT)
    for row in range(begin, end):
        h = hashed(np.uint32(of_row[row]) ^ low)
        source, o = at(x + row * ldx, act), at(out + row * ldo, act)
        for i in range(d):
            keep = hashed(h ^ of_column[i]) >= limit
            o[i] = narrow(widen(source[i]) * scale, act) if keep else narrow(F0, act)


@kernel
def dropout_kernel(rows, x, ldx, d, places, low, high, limit, scale, out, ldo, parts, act):
    columns = np.empty(d, np.uint32)
    for i in range(d):
        columns[i] = hashed(np.uint32(i + high))
    address = columns.ctypes.data
    if parts == 1:
        dropout_rows(0, rows, x, ldx, d, places, low, address, limit, scale, out, ldo, act)
    else:
        for part in numba.prange(parts):
            begin, end = rows * part // parts, rows * (part + 1) // parts
            dropout_rows(begin, end, x, ldx, d, places, low, address, limit, scale, out, ldo, act)
    hold(columns)


def add_rms_norm_backward(dnormed: Tensor, dtotal: Tensor, total: Tensor, weight: Tensor, eps: float) -> Tensor:
    """d(x) = d(residual) of (normed, total) = add_rms_norm(x, residual): all [T, d] of one dtype."""
    dnormed, dtotal, total = dnormed.contiguous(), dtotal.contiguous(), total.contiguous()
    check_rows("add_rms_norm_backward", dnormed, dtotal, total, weight)
    out = torch.empty_like(total)
    norm_backward_kernel(
        total.shape[0], dnormed.data_ptr(), dtotal.data_ptr(), total.data_ptr(), weight.data_ptr(), total.shape[1],
        np.float32(eps), out.data_ptr(), parts_for(total.numel()), tag_of(total),
    )  # fmt: skip
    return out


def silu_mul_backward(dout: Tensor, gate_up: Tensor) -> Tensor:
    """d(gate_up) [T, 2 m] of silu_mul: dout [T, m]."""
    dout, gate_up = dout.contiguous(), gate_up.contiguous()
    check_rows("silu_mul_backward", dout, gate_up)
    out = torch.empty_like(gate_up)
    silu_backward_kernel(
        dout.shape[0], dout.data_ptr(), gate_up.data_ptr(), dout.shape[1], out.data_ptr(), parts_for(gate_up.numel()),
        tag_of(dout),
    )  # fmt: skip
    return out


def dropout(x: Tensor, places: Tensor, key: int, rate: float, out: Tensor) -> Tensor:
    """x [n, d] with each element zeroed with probability `rate`, else over (1 - rate), written into `out`.

    The choice is a hash of `key` (below 2^62), `places` [n] (int64, their lower 32 bits) and the column.
    """
    check_rows("dropout", x, out)
    if places.dtype != torch.int64 or not places.is_contiguous() or len(places) != len(x):
        raise ValueError(f"dropout: places {places.dtype} {tuple(places.shape)}; expected dense int64 [{len(x)}]")
    dropout_kernel(
        x.shape[0], x.data_ptr(), x.stride(0) * x.element_size(), x.shape[1], places.data_ptr(),
        np.uint32(key & 0xFFFFFFFF), key >> 32, np.uint32(int(rate * 2**32)), np.float32(1 / (1 - rate)),
        out.data_ptr(), out.stride(0) * out.element_size(), parts_for(x.numel()), tag_of(x),
    )  # fmt: skip
    return out
