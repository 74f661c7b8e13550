"""Differentiable kernels: the same names and meaning as `kernels.reference`, with backward passes of their own.

The base is frozen, so a linear layer's backward is one product for dx. Every non-linear piece is one autograd
function that saves its inputs, not its intermediates. Nothing here mixes tokens of different rows or adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorikeet.kernels.batch import Batch, LayerCache, Segments
from lorikeet.kernels.weight import Weight
from lorikeet.train.attention import RowBuckets, packed_attention
from lorikeet.train.losses import completion_loss
from lorikeet.train.parameters import AdapterParameters, GroupPair
from lorikeet.types import SiteGroup


@dataclass(frozen=True, slots=True)
class Dropout:
    """Dropout of one adapter's LoRA inputs as a pure function of (seed, step, site, row, token).

    `tokens` [n] int64 holds, for each token of the adapter's segment, row * 2^20 + position: the mask of a token
    does not depend on what it is packed with. Sites that read the same input share the mask.
    """

    rate: float
    seed: int
    step: int
    tokens: Tensor

    def mask(self, site: int, width: int, dtype: torch.dtype) -> Tensor:
        """[n, width]: 0 with probability `rate`, else 1 / (1 - rate)."""
        key = _mix(_mix(_mix(self.seed) ^ self.step) ^ site)
        rows = _mix_tensor((self.tokens ^ key) & _LOW)
        columns = _mix_tensor(torch.arange(width) + (key >> 32))
        bits = _mix_tensor((rows[:, None] ^ columns[None, :]) & _LOW)
        return (bits >= int(self.rate * 2**32)).to(dtype).mul_(1 / (1 - self.rate))


_LOW = 2**32 - 1


def _mix(x: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014), kept to 62 bits so that it fits a signed integer."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return (x ^ (x >> 31)) >> 2


def _mix_tensor(x: Tensor) -> Tensor:
    """A 32-bit integer hash (two rounds of multiply and xor-shift) on int64 values below 2^32."""
    x = ((x ^ (x >> 16)) * 0x45D9F3B) & _LOW
    x = ((x ^ (x >> 16)) * 0x45D9F3B) & _LOW
    return x ^ (x >> 16)


@dataclass(slots=True)
class TrainedAdapters:
    """What `lowrank_add` is given in training: segment handle -> parameters, and dropout where there is any."""

    parameters: Sequence[AdapterParameters]
    dropout: Sequence[Dropout | None]


class TrainOps:
    """Kernels of one training or validation pass over `batch`.

    With `targets` [L] (one per logit row) `logits` gives each row's negative log likelihood [L] instead of logits,
    so that logits of all rows never exist at once.
    """

    inplace = False

    def __init__(self, batch: Batch, targets: Tensor | None = None) -> None:
        self.buckets = RowBuckets.of(batch)
        self.targets = targets

    def linear(self, weight: Weight, x: Tensor) -> Tensor:
        out: Tensor = _FrozenLinear.apply(x, weight)  # type: ignore[no-untyped-call]
        return out

    def logits(self, weight: Weight, x: Tensor) -> Tensor:
        return completion_loss(x, weight, self.targets)

    def lowrank_add(
        self, y: Tensor, x: Tensor, adapters: TrainedAdapters, group: SiteGroup, segments: Segments
    ) -> Tensor:
        """y + s B A x, written into y. Gradients of A and B are added to the adapters' own buffers in backward."""
        assert segments.contiguous
        parts = []
        for i, handle in enumerate(segments.adapter):
            parameters = adapters.parameters[handle]
            pair = parameters.group(group)
            if pair is not None:
                rows = slice(segments.start[i], segments.start[i + 1])
                parts.append(_Part(rows, pair, parameters.scale, adapters.dropout[handle], group.sites[0].index))
        if not parts:
            return y
        anchor = adapters.parameters[segments.adapter[0]].anchor
        out: Tensor = _LowRankAdd.apply(y, x, anchor, parts)  # type: ignore[no-untyped-call]
        return out

    def embed(self, table: Tensor, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, table)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self.add_rms_norm(x, None, weight, eps)[0]

    def add_rms_norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        normed, total = _AddRmsNorm.apply(x, residual, weight, eps)  # type: ignore[no-untyped-call]
        return normed, total

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        out: Tensor = _Rope.apply(x, cos, sin)  # type: ignore[no-untyped-call]
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        out: Tensor = _SiluMul.apply(gate_up)  # type: ignore[no-untyped-call]
        return out

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, batch: Batch, cache: LayerCache | None, window: int | None
    ) -> Tensor:
        assert cache is None, "training has no cache"
        return packed_attention(q, k, v, self.buckets, window)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight) -> Tensor:
        ctx.weight = weight
        return weight.linear(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        return grads[0] @ ctx.weight.dequantised(), None


@dataclass(frozen=True, slots=True)
class _Part:
    """One adapter's share of a low-rank product."""

    rows: slice
    pair: GroupPair
    scale: float
    dropout: Dropout | None
    site: int

    def input(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The rows of x that A reads, and the dropout mask on them."""
        rows = x[self.rows]
        if self.dropout is None:
            return rows, None
        mask = self.dropout.mask(self.site, rows.shape[1], rows.dtype)
        return rows * mask, mask


class _LowRankAdd(torch.autograd.Function):
    """y[rows] += s (x[rows] A^T) B for each adapter; saves x and h = x A^T only.

    bf16 products accumulate in fp32 inside the product and round once; gradients are summed in the master dtype.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, anchor: Tensor, parts: list[_Part]) -> Tensor:
        hidden = []
        for part in parts:
            h = part.input(x)[0] @ part.pair.a.T
            y[part.rows].addmm_(h, part.pair.b, alpha=part.scale)
            hidden.append(h)
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, *hidden)
        ctx.parts = parts
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (dy,) = grads
        x, *hidden = ctx.saved_tensors
        dx = torch.empty_like(x) if ctx.needs_input_grad[1] else None
        done = 0
        for part, h in zip(ctx.parts, hidden, strict=True):
            dy_rows, pair = dy[part.rows], part.pair
            x_rows, mask = part.input(x)
            dh = (dy_rows @ pair.b.T).mul_(part.scale)
            db = h.T @ dy_rows
            pair.grad_a.add_(dh.T @ x_rows)
            for rows, columns, _, grad_b in pair.blocks:
                grad_b.add_(db[rows, columns], alpha=part.scale)
            if dx is not None:
                dx[done : part.rows.start].zero_()
                torch.mm(dh, pair.a, out=dx[part.rows])
                if mask is not None:
                    dx[part.rows].mul_(mask)
                done = part.rows.stop
        if dx is not None:
            dx[done:].zero_()
        return dy, dx, None, None


class _AddRmsNorm(torch.autograd.Function):
    """(rms_norm(x + residual), x + residual); saves the sum and one scalar a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total = x if residual is None else x + residual
        wide = total.to(torch.promote_types(x.dtype, torch.float32))
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(total, inverse, weight)
        ctx.has_residual = residual is not None
        return (wide * inverse).mul_(weight).to(x.dtype), total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        total, inverse, weight = ctx.saved_tensors
        normed = total.to(inverse.dtype) * inverse
        g = grads[0].to(inverse.dtype) * weight
        g -= normed * (g * normed).mean(-1, keepdim=True)
        g *= inverse
        dx = g.add_(grads[1]).to(total.dtype)
        return dx, dx if ctx.has_residual else None, None, None


class _Rope(torch.autograd.Function):
    """Rotation of halves; its backward is the rotation by the opposite angle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    c, s = cos.unsqueeze(1), sin.unsqueeze(1)
    out = torch.empty(x.shape, dtype=x.dtype)
    half = first.shape[-1]
    out[..., :half] = (first * c).sub_(second * s)
    out[..., half:] = (second * c).add_(first * s)
    return out


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        out = torch.empty_like(gate_up)
        width = gate.shape[-1]
        torch.ops.aten.silu_backward.grad_input(grads[0] * up, gate, grad_input=out[:, :width])
        torch.mul(F.silu(gate), grads[0], out=out[:, width:])
        return out
