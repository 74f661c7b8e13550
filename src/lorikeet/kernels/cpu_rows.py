"""What happens to each row by itself: norms, rotary positions, the gated activation, logits. Sums are in float32.

A launch on several threads costs a few microseconds and waits for the slowest, so small inputs stay on the caller's.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from lorikeet.kernels.cpu_products import AVAILABLE, STEP, dot_linear
from lorikeet.kernels.cpu_runtime import (
    at,
    device_function,
    exp2,
    kernel,
    narrow,
    share_threads,
    size,
    tag_of,
    use_threads,
    widen,
)
from lorikeet.kernels.cpu_tiles import F0, dot, dot_1x4, dot_4x4

ONE_THREAD = 1 << 16  # elements up to which one thread does it all
F1 = np.float32(1)
LOG2E = np.float32(1.4426950408889634)


def parts_for(elements: int) -> int:
    return share_threads() if elements > ONE_THREAD else 1


def check_rows(name: str, *tensors: Tensor) -> None:
    """Kernels trust addresses: one dtype, dense in the last dimension."""
    for tensor in tensors:
        if tensor.dtype != tensors[0].dtype or tensor.stride(-1) != 1:
            found = ", ".join(f"{t.dtype} with strides {t.stride()}" for t in tensors)
            raise ValueError(f"{name}: found {found}; expected one dtype, dense in the last dimension")


@device_function
def norm_rows(begin, end, x, ldx, heads, d, residual, ldr, total, out, weight, eps, act):
    """Rows are (token, head). With a residual, total = x + residual is written and normed instead of x."""
    w = at(weight, act)
    for row in range(begin, end):
        source = x + row // heads * ldx + row % heads * d * size(act)
        p, o = at(source, act), at(out + row * d * size(act), act)
        squares = F0
        if residual != 0:
            r, t = at(residual + row * ldr, act), at(total + row * d * size(act), act)
            for i in range(d):
                t[i] = narrow(widen(p[i]) + widen(r[i]), act)
            p = t
        for i in range(d):
            squares += widen(p[i]) * widen(p[i])
        scale = F1 / np.sqrt(squares / np.float32(d) + eps)
        for i in range(d):
            o[i] = narrow(widen(p[i]) * scale * widen(w[i]), act)


@kernel
def norm_kernel(rows, x, ldx, heads, d, residual, ldr, total, out, weight, eps, parts, act):
    if parts == 1:
        norm_rows(0, rows, x, ldx, heads, d, residual, ldr, total, out, weight, eps, act)
    else:
        use_threads(parts)
        for part in numba.prange(parts):
            begin, end = rows * part // parts, rows * (part + 1) // parts
            norm_rows(begin, end, x, ldx, heads, d, residual, ldr, total, out, weight, eps, act)


@device_function
def rope_rows(begin, end, x, ldx, heads, d, cos, sin, ld_angles, out, act):
    half = d // 2
    for row in range(begin, end):
        token = row // heads
        c, s = at(cos + token * ld_angles, F0), at(sin + token * ld_angles, F0)
        source = x + token * ldx + row % heads * d * size(act)
        target = out + row * d * size(act)
        x1, x2 = at(source, act), at(source + half * size(act), act)
        o1, o2 = at(target, act), at(target + half * size(act), act)
        for i in range(half):
            o1[i] = narrow(widen(x1[i]) * c[i] - widen(x2[i]) * s[i], act)
            o2[i] = narrow(widen(x2[i]) * c[i] + widen(x1[i]) * s[i], act)


@kernel
def rope_kernel(rows, x, ldx, heads, d, cos, sin, ld_angles, out, parts, act):
    if parts == 1:
        rope_rows(0, rows, x, ldx, heads, d, cos, sin, ld_angles, out, act)
    else:
        use_threads(parts)
        for part in numba.prange(parts):
            begin, end = rows * part // parts, rows * (part + 1) // parts
            rope_rows(begin, end, x, ldx, heads, d, cos, sin, ld_angles, out, act)


@device_function
def silu_rows(begin, end, x, ldx, d, out, act):
    for row in range(begin, end):
        gate, up = at(x + row * ldx, act), at(x + row * ldx + d * size(act), act)
        o = at(out + row * d * size(act), act)
        for i in range(d):
            g = widen(gate[i])
            o[i] = narrow(g / (F1 + exp2(-g * LOG2E)) * widen(up[i]), act)


@kernel
def silu_kernel(rows, x, ldx, d, out, parts, act):
    if parts == 1:
        silu_rows(0, rows, x, ldx, d, out, act)
    else:
        use_threads(parts)
        for part in numba.prange(parts):
            silu_rows(rows * part // parts, rows * (part + 1) // parts, x, ldx, d, out, act)


@device_function
def logit_columns(begin, end, weight, ldw, x, ldx, rows, d, out, columns, act):
    """out[:, begin:end] [rows, columns] = x . rows [begin, end) of W, four by four."""
    column = begin
    while column < end:
        w = weight + column * ldw
        four = column + 4 <= end
        row = 0
        while row < rows:
            source, target = x + row * ldx, out + 4 * (row * columns + column)
            if four and row + 4 <= rows:
                dot_4x4(w, w + ldw, w + 2 * ldw, w + 3 * ldw, source, ldx, d, target, columns, act, act)
                row += 4
            elif four:
                dot_1x4(source, w, ldw, d, target, 1, act, act)
                row += 1
            else:
                at(target, F0)[0] = dot(source, w, d, act, act)
                row += 1
        column += 4 if four else 1


@kernel
def logits_kernel(weight, ldw, x, ldx, rows, d, out, columns, parts, act):
    use_threads(parts)
    for part in numba.prange(parts):
        begin, end = columns // 4 * part // parts * 4, columns // 4 * (part + 1) // parts * 4
        if part == parts - 1:
            end = columns
        logit_columns(begin, end, weight, ldw, x, ldx, rows, d, out, columns, act)


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `ReferenceOps.add_rms_norm`, in one pass over the rows."""
    rows, d = x.shape
    check_rows("add_rms_norm", x, weight, *(() if residual is None else (residual,)))
    out = torch.empty(rows, d, dtype=x.dtype)
    total = x if residual is None else torch.empty(rows, d, dtype=x.dtype)
    width = x.element_size()
    norm_kernel(
        rows, x.data_ptr(), x.stride(0) * width, 1, d, 0 if residual is None else residual.data_ptr(),
        0 if residual is None else residual.stride(0) * width, total.data_ptr(), out.data_ptr(), weight.data_ptr(),
        np.float32(eps), parts_for(x.numel()), tag_of(x),
    )  # fmt: skip
    return out, total


def rms_norm_heads(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of each head: x [T, heads, head_dim] with dense heads, tokens at any stride."""
    tokens, heads, d = x.shape
    check_rows("rms_norm", x, weight)
    out = torch.empty(tokens, heads, d, dtype=x.dtype)
    norm_kernel(
        tokens * heads, x.data_ptr(), x.stride(0) * x.element_size(), heads, d, 0, 0, 0, out.data_ptr(),
        weight.data_ptr(), np.float32(eps), parts_for(x.numel()), tag_of(x),
    )  # fmt: skip
    return out


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `ReferenceOps.rope`: x [T, heads, head_dim] with dense heads, tokens at any stride."""
    tokens, heads, d = x.shape
    check_rows("rope", cos, sin)
    if x.stride(1) != d or cos.dtype != torch.float32 or cos.shape != (tokens, d // 2):
        raise ValueError(
            f"rope: x {tuple(x.shape)} with strides {x.stride()}, cos {cos.dtype} {tuple(cos.shape)}; "
            "expected dense heads, and float32 angles [T, head_dim / 2]"
        )
    out = torch.empty(tokens, heads, d, dtype=x.dtype)
    rope_kernel(
        tokens * heads, x.data_ptr(), x.stride(0) * x.element_size(), heads, d, cos.data_ptr(), sin.data_ptr(),
        cos.stride(0) * 4, out.data_ptr(), parts_for(x.numel()), tag_of(x),
    )  # fmt: skip
    return out


def silu_mul(gate_up: Tensor) -> Tensor:
    """As `ReferenceOps.silu_mul`, rounded once."""
    rows, d = gate_up.shape[0], gate_up.shape[1] // 2
    check_rows("silu_mul", gate_up)
    out = torch.empty(rows, d, dtype=gate_up.dtype)
    silu_kernel(
        rows, gate_up.data_ptr(), gate_up.stride(0) * gate_up.element_size(), d, out.data_ptr(),
        parts_for(gate_up.numel()), tag_of(gate_up),
    )  # fmt: skip
    return out


def logits(weight: Tensor, x: Tensor) -> Tensor:
    """x [L, hidden] times a plain head [vocabulary, hidden] of the same dtype: float32 [L, vocabulary], unrounded."""
    check_rows("logits", weight, x)
    (rows, d), columns, width = x.shape, weight.shape[0], x.element_size()
    if AVAILABLE and x.dtype == torch.bfloat16 and d % STEP == 0:
        return dot_linear(x, weight)
    out = torch.empty(rows, columns, dtype=torch.float32)
    logits_kernel(
        weight.data_ptr(), weight.stride(0) * width, x.data_ptr(), x.stride(0) * width, rows, d, out.data_ptr(),
        columns, share_threads(), tag_of(x),
    )  # fmt: skip
    return out
