"""What a GPU does row by row: norms, rotary positions with the cache write, gated activation.

All of it is bound by memory, or by the launch where rows are few, so what can be one kernel is one. Statistics and
products are fp32 whatever the tensors are; every result is rounded once.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorikeet.kernels.batch import LayerCache

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FP8 = torch.float8_e4m3fn
FP8_LARGEST = tl.constexpr(448.0)
TILE_ELEMENTS = 2048  # of a program that takes several short rows at once


def next_power(n: int) -> int:
    """The power of two that a tile of `n` needs."""
    return 1 << max(n - 1, 0).bit_length()


def check_rows(kernel: str, *tensors: Tensor) -> None:
    """Raise ValueError, which says what was found, unless all have one float dtype and dense last dimensions."""
    first = tensors[0]
    for tensor in tensors:
        if tensor.dtype != first.dtype or tensor.dtype not in FLOATS or tensor.stride(-1) != 1:
            found = ", ".join(f"{t.dtype} {tuple(t.shape)} with strides {t.stride()}" for t in tensors)
            raise ValueError(f"{kernel}: found {found}; expected one of {FLOATS} for all, the last dimension dense")


@triton.jit
def add_rms_norm_kernel(X, RESIDUAL, TOTAL, OUT, WEIGHT, ldx, ldr, d, eps,
                        ADDS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDTH)
    inside = at < d
    x = tl.load(X + row * ldx + at, mask=inside, other=0).to(tl.float32)
    if ADDS:
        x += tl.load(RESIDUAL + row * ldr + at, mask=inside, other=0).to(tl.float32)
        rounded = x.to(TOTAL.dtype.element_ty)
        tl.store(TOTAL + row * d + at, rounded, mask=inside)
        x = rounded.to(tl.float32)  # the norm is of what the next layer will read
    scale = tl.rsqrt(tl.sum(x * x, 0) / d + eps)
    weight = tl.load(WEIGHT + at, mask=inside, other=0).to(tl.float32)
    tl.store(OUT + row * d + at, (x * scale * weight).to(OUT.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def rms_norm_heads_kernel(X, OUT, WEIGHT, rows, heads, ldx, d, eps, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (at < d)[None, :]
    source = row // heads * ldx + row % heads * d
    x = tl.load(X + source[:, None] + at[None, :], mask=inside, other=0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1) / d + eps)
    weight = tl.load(WEIGHT + at, mask=at < d, other=0).to(tl.float32)
    out = x * scale[:, None] * weight[None, :]
    tl.store(OUT + row[:, None] * d + at[None, :], out.to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def silu_mul_kernel(X, OUT, ldx, d, WIDTH: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    inside = at < d
    gate = tl.load(X + row * ldx + at, mask=inside, other=0).to(tl.float32)
    up = tl.load(X + row * ldx + d + at, mask=inside, other=0).to(tl.float32)
    out = gate / (1 + tl.exp2(gate * -1.4426950408889634)) * up
    tl.store(OUT + row * d + at, out.to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def stored(x, scale, CACHE):
    """x as the cache holds it: divided by the head's scale and clamped where it is fp8, NaN staying NaN."""
    if CACHE.dtype.element_ty == tl.float8e4nv:
        x = tl.clamp(x / scale, -FP8_LARGEST, FP8_LARGEST, propagate_nan=tl.PropagateNan.ALL)
    return x.to(CACHE.dtype.element_ty)


@triton.jit
def rotate(X, place, inside, half, cos, sin):
    """Both halves of a tile of heads, each rounded to the dtype of X."""
    first = tl.load(X + place, mask=inside, other=0).to(tl.float32)
    second = tl.load(X + place + half, mask=inside, other=0).to(tl.float32)
    rotated = first * cos - second * sin
    return rotated.to(X.dtype.element_ty), (second * cos + first * sin).to(X.dtype.element_ty)


@triton.jit
def put(first, second, half, head, at, inside, CACHE, SCALE, slot, block_stride, slot_stride, head_stride, heads,
        BLOCK: tl.constexpr, SCALED: tl.constexpr):  # fmt: skip
    """Write both halves of a tile of heads to their slot. A negative slot: a row that only fills up a batch."""
    if slot >= 0:
        scale = tl.load(SCALE + head, mask=head < heads, other=1)[:, None] if SCALED else 1.0
        target = CACHE + slot // BLOCK * block_stride + slot % BLOCK * slot_stride
        target += head[:, None] * head_stride + at[None, :]
        tl.store(target, stored(first.to(tl.float32), scale, CACHE), mask=inside)
        tl.store(target + half, stored(second.to(tl.float32), scale, CACHE), mask=inside)


@triton.jit
def rope_kernel(
    Q, K, V, COS, SIN, OUT, K_CACHE, V_CACHE, SLOTS, K_SCALE, V_SCALE,
    ldq, ldk, ldv, heads, kv_heads, d, k_block, k_slot, k_head, v_block, v_slot, v_head,
    BLOCK: tl.constexpr, SCALED: tl.constexpr, TURNS: tl.constexpr, STORES: tl.constexpr,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One token's `HEADS` heads of q, of k or of v: q and (where TURNS) k are rotated, k and v go to their slot.

    A tile is [HEADS, HALF]: the first and the second halves of the heads.
    """
    token = tl.program_id(1).to(tl.int64)
    q_parts, kv_parts = tl.cdiv(heads, HEADS), tl.cdiv(kv_heads, HEADS)
    part = tl.program_id(0)
    half = d // 2
    at = tl.arange(0, HALF)
    head = tl.arange(0, HEADS)
    if TURNS:
        cos = tl.load(COS + token * half + at, mask=at < half, other=0)[None, :]
        sin = tl.load(SIN + token * half + at, mask=at < half, other=0)[None, :]
        if part < q_parts:
            mine = part * HEADS + head
            inside = (mine < heads)[:, None] & (at < half)[None, :]
            place = mine[:, None] * d + at[None, :]
            first, second = rotate(Q + token * ldq, place, inside, half, cos, sin)
            tl.store(OUT + token * heads * d + place, first, mask=inside)
            tl.store(OUT + token * heads * d + place + half, second, mask=inside)
    if STORES:
        slot = tl.load(SLOTS + token)
        if (part >= q_parts) & (part < q_parts + kv_parts):
            mine = (part - q_parts) * HEADS + head
            inside = (mine < kv_heads)[:, None] & (at < half)[None, :]
            place = mine[:, None] * d + at[None, :]
            if TURNS:
                first, second = rotate(K + token * ldk, place, inside, half, cos, sin)
            else:
                first = tl.load(K + token * ldk + place, mask=inside, other=0)
                second = tl.load(K + token * ldk + place + half, mask=inside, other=0)
            put(first, second, half, mine, at, inside, K_CACHE, K_SCALE, slot, k_block, k_slot, k_head, kv_heads,
                BLOCK, SCALED)  # fmt: skip
        if part >= q_parts + kv_parts:
            mine = (part - q_parts - kv_parts) * HEADS + head
            inside = (mine < kv_heads)[:, None] & (at < half)[None, :]
            place = mine[:, None] * d + at[None, :]
            first = tl.load(V + token * ldv + place, mask=inside, other=0)
            second = tl.load(V + token * ldv + place + half, mask=inside, other=0)
            put(first, second, half, mine, at, inside, V_CACHE, V_SCALE, slot, v_block, v_slot, v_head, kv_heads,
                BLOCK, SCALED)  # fmt: skip


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `ReferenceOps.add_rms_norm`: x and residual [T, hidden], rows at any stride."""
    check_rows("add_rms_norm", x, weight, *(() if residual is None else (residual,)))
    rows, d = x.shape
    out = torch.empty(rows, d, dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(out)
    if rows:
        width = next_power(d)
        add_rms_norm_kernel[(rows,)](
            x, x if residual is None else residual, total, out, weight, x.stride(0),
            0 if residual is None else residual.stride(0), d, eps, ADDS=residual is not None, WIDTH=width,
            num_warps=min(max(width // 512, 1), 16),
        )  # fmt: skip
    return out, total


def rms_norm_heads(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of each head: x [T, heads, head_dim] with dense heads, tokens at any stride."""
    check_rows("rms_norm", x, weight)
    _check_heads("rms_norm", x)
    tokens, heads, d = x.shape
    out = torch.empty(tokens, heads, d, dtype=x.dtype, device=x.device)
    if out.numel():
        width = next_power(d)
        rows = max(TILE_ELEMENTS // width, 1)
        rms_norm_heads_kernel[(triton.cdiv(tokens * heads, rows),)](
            x, out, weight, tokens * heads, heads, x.stride(0), d, eps, ROWS=rows, WIDTH=width
        )
    return out


def silu_mul(gate_up: Tensor) -> Tensor:
    """As `ReferenceOps.silu_mul`, rounded once."""
    check_rows("silu_mul", gate_up)
    rows, d = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, d, dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        width = min(next_power(d), 1024)
        silu_mul_kernel[(triton.cdiv(d, width), rows)](gate_up, out, gate_up.stride(0), d, WIDTH=width)
    return out


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `ReferenceOps.rope`: x [T, heads, head_dim] with dense heads, tokens at any stride."""
    check_rows("rope", x)
    _check_heads("rope", x)
    _check_angles(x, cos, sin)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _rope(x, None, None, cos, sin, out, None, None)
    return out


def rope_and_store(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache, slots: Tensor
) -> Tensor:
    """Rotated q [T, heads, head_dim]; k is rotated into the cache and v copied, at `slots` [T] int64 (-1: nowhere).

    In one kernel. A cache in fp8 holds what is divided by its scales, clamped to what fp8 can say.
    """
    check_rows("rope_and_store", q, k, v)
    for part in (q, k, v):
        _check_heads("rope_and_store", part)
    _check_angles(q, cos, sin)
    check_cache(q, cache)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _rope(q, k, v, cos, sin, out, cache, slots)
    return out


def store(k: Tensor, v: Tensor, cache: LayerCache, slots: Tensor) -> None:
    """Copy new keys and values [T, kv_heads, head_dim] to `slots` [T] int64 of the cache (-1: nowhere)."""
    check_rows("store", k, v)
    for part in (k, v):
        _check_heads("store", part)
    check_cache(k, cache)
    _rope(None, k, v, None, None, None, cache, slots)


def _rope(
    q: Tensor | None, k: Tensor | None, v: Tensor | None, cos: Tensor | None, sin: Tensor | None, out: Tensor | None,
    cache: LayerCache | None, slots: Tensor | None,
) -> None:  # fmt: skip
    any_rows = q if q is not None else k
    assert any_rows is not None
    tokens, _, d = any_rows.shape
    heads, kv_heads = 0 if q is None else q.shape[1], 0 if k is None else k.shape[1]
    if tokens == 0:
        return
    half = next_power(d // 2)
    per_program = min(max(TILE_ELEMENTS // 2 // half, 1), next_power(max(heads, kv_heads)))
    scales = None if cache is None else cache.k_scale
    rows = [any_rows if one is None else one for one in (q, k, v)]
    caches = (any_rows, any_rows) if cache is None else (cache.k, cache.v)
    strides = [0] * 6 if cache is None else [*cache.k.stride()[:3], *cache.v.stride()[:3]]
    parts = triton.cdiv(heads, per_program) + 2 * triton.cdiv(kv_heads, per_program)
    rope_kernel[(parts, tokens)](
        *rows, any_rows if cos is None else cos, any_rows if sin is None else sin, any_rows if out is None else out,
        *caches, any_rows if slots is None else slots, any_rows if scales is None else scales,
        any_rows if cache is None or cache.v_scale is None else cache.v_scale,
        *(one.stride(0) for one in rows), heads, kv_heads, d, *strides,
        BLOCK=1 if cache is None else cache.k.shape[1], SCALED=scales is not None, TURNS=cos is not None,
        STORES=slots is not None, HEADS=per_program, HALF=half, num_warps=4,
    )  # fmt: skip


def check_cache(rows: Tensor, cache: LayerCache) -> None:
    """Raise ValueError where the cache is neither of the rows' dtype nor in fp8 with scales, or its heads lie apart."""
    for name, side, scale in (("k", cache.k, cache.k_scale), ("v", cache.v, cache.v_scale)):
        if side.stride(3) != 1:
            raise ValueError(f"cache.{name} has strides {side.stride()}, expected a dense last dimension")
        if side.dtype == FP8 and scale is None:
            raise ValueError(f"cache.{name} is {FP8} and has no scale; expected [kv_heads] float32 (ones: unscaled)")
        if side.dtype != FP8 and (side.dtype != rows.dtype or scale is not None):
            found = f"{side.dtype}{'' if scale is None else ' with a scale'}"
            raise ValueError(f"cache.{name} is {found}, expected {rows.dtype}, or {FP8} with a scale")
        if scale is not None and (scale.dtype != torch.float32 or scale.shape != side.shape[2:3]):
            raise ValueError(
                f"the scale of cache.{name} is {scale.dtype} {tuple(scale.shape)}, "
                f"expected torch.float32 {tuple(side.shape[2:3])}, one for each head"
            )


def _check_heads(kernel: str, x: Tensor) -> None:
    if x.dim() != 3 or x.stride(1) != x.shape[2]:
        raise ValueError(
            f"{kernel}: found {tuple(x.shape)} with strides {x.stride()}; "
            "expected [T, heads, head_dim], a token's heads dense behind one another"
        )


def _check_angles(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    wanted = (x.shape[0], x.shape[2] // 2)
    for angles in (cos, sin):
        if angles.dtype != torch.float32 or angles.shape != wanted or not angles.is_contiguous():
            raise ValueError(
                f"rope: angles are {angles.dtype} {tuple(angles.shape)} with strides {angles.stride()}; "
                f"expected dense torch.float32 {wanted}, [T, head_dim / 2]"
            )
