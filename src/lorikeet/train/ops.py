"""Differentiable kernels: the same names and meaning as `kernels.reference`, with backward passes of their own.

The base is frozen, so a linear layer's backward is one product for dx. Every non-linear piece is one autograd
function that saves its inputs, not its intermediates. Nothing here mixes tokens of different rows or adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorikeet.kernels.batch import Batch, LayerCache, Segments
from lorikeet.kernels.weight import Table, Weight
from lorikeet.train.attention import RowBuckets, packed_attention
from lorikeet.train.losses import completion_loss
from lorikeet.train.parameters import AdapterParameters, GroupPair
from lorikeet.train.rows import row_kernels
from lorikeet.types import SiteGroup


@dataclass(frozen=True, slots=True)
class Dropout:
    """Dropout of one adapter's LoRA inputs as a pure function of (seed, step, site, row, token).

    The mask of a token does not depend on what it is packed with. Sites that read the same input share the mask.
    """

    rate: float
    seed: int
    step: int

    def of(self, site: int, places: Tensor) -> DropoutMask:
        """The mask on a site's input; `places` [n] is row * 2^20 + position."""
        return DropoutMask(self.rate, _mix(_mix(_mix(self.seed) ^ self.step) ^ site), places)


@dataclass(frozen=True, slots=True)
class DropoutMask:
    """0 with probability `rate`, else 1 / (1 - rate), at each (token, column): a hash of `key`, made again each time.

    Keeping the mask for the backward pass would cost as many bytes as the input itself.
    """

    rate: float
    key: int
    places: Tensor

    def times(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x [n, width] times the mask, written into `out` where given (x itself is allowed)."""
        return row_kernels(x).dropout(x, self.places, self.key, self.rate, torch.empty_like(x) if out is None else out)


def _mix(x: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014), kept to 62 bits so that it fits a signed integer."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return (x ^ (x >> 31)) >> 2


@dataclass(slots=True)
class TrainedAdapters:
    """What `lowrank_add` is given in training: segment handle -> parameters, and dropout where there is any."""

    parameters: Sequence[AdapterParameters]
    dropout: Sequence[Dropout | None]


class TrainOps:
    """Kernels of one training or validation pass over `batch`.

    With `targets` [L] (one per logit row) `logits` gives each row's negative log likelihood [L] instead of logits,
    so that logits of all rows never exist at once. `places` [T] (row * 2^20 + position) is what dropout needs.
    """

    inplace = False

    def __init__(self, batch: Batch, targets: Tensor | None = None, places: Tensor | None = None) -> None:
        self.batch, self.targets, self.places = batch, targets, places
        self.buckets = RowBuckets.of(batch)

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
            parameters, dropout = adapters.parameters[handle], adapters.dropout[handle]
            pair = parameters.group(group)
            if pair is not None:
                rows = slice(segments.start[i], segments.start[i + 1])
                mask = None
                if dropout is not None:
                    mask = dropout.of(group.sites[0].index, self._places(segments)[rows])
                parts.append(_Part(rows, pair, parameters.scale, mask))
        if not parts:
            return y
        anchor = adapters.parameters[segments.adapter[0]].anchor
        out: Tensor = _LowRankAdd.apply(y, x, anchor, parts)  # type: ignore[no-untyped-call]
        return out

    def _places(self, segments: Segments) -> Tensor:
        assert self.places is not None, "dropout needs to know the rows"
        if segments is self.batch.token_segments:
            return self.places
        assert segments is self.batch.logit_segments and self.batch.logit_rows is not None
        return self.places[self.batch.logit_rows]

    def embed(self, table: Table, tokens: Tensor) -> Tensor:
        return table.rows(tokens)

    def take(self, table: Tensor, index: Tensor) -> Tensor:
        return table[index]

    def reduce(self, x: Tensor) -> Tensor:
        return x

    def gather(self, logits: Tensor, tokens: int) -> Tensor:
        return logits

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return self.add_rms_norm(rows, None, weight, eps)[0].view(x.shape)

    def add_rms_norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        normed, total = _AddRmsNorm.apply(x, residual, weight, eps)  # type: ignore[no-untyped-call]
        return normed, total

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        out: Tensor = _Rope.apply(x, cos, sin)  # type: ignore[no-untyped-call]
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        out: Tensor = _SiluMul.apply(gate_up)  # type: ignore[no-untyped-call]
        return out

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, batch: Batch, cache: LayerCache | None,
        window: int | None,
    ) -> Tensor:  # fmt: skip
        return self.attention(self.rope(q, cos, sin), self.rope(k, cos, sin), v, batch, cache, window)

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
    mask: DropoutMask | None

    def input(self, x: Tensor) -> Tensor:
        """The rows of x that A reads, dropout done."""
        rows = x[self.rows]
        return rows if self.mask is None else self.mask.times(rows)


class _LowRankAdd(torch.autograd.Function):
    """y[rows] += s (x[rows] A^T) B for each adapter; saves x and h = x A^T only.

    bf16 products accumulate in fp32 inside the product and round once; gradients are summed in the master dtype.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, anchor: Tensor, parts: list[_Part]) -> Tensor:
        hidden = []
        for part in parts:
            h = part.input(x) @ part.pair.a.T
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
            dh = (dy_rows @ pair.b.T).mul_(part.scale)
            db = h.T @ dy_rows
            pair.grad_a.add_(dh.T @ part.input(x))
            for rows, columns, _, grad_b in pair.blocks:
                grad_b.add_(db[rows, columns], alpha=part.scale)
            if dx is not None:
                dx[done : part.rows.start].zero_()
                dx_rows = torch.mm(dh, pair.a, out=dx[part.rows])
                if part.mask is not None:
                    part.mask.times(dx_rows, out=dx_rows)
                done = part.rows.stop
        if dx is not None:
            dx[done:].zero_()
        return dy, dx, None, None


class _AddRmsNorm(torch.autograd.Function):
    """(rms_norm(x + residual), x + residual); saves the sum only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        normed, total = row_kernels(x).add_rms_norm(x, residual, weight, eps)
        ctx.save_for_backward(total, weight)
        ctx.eps, ctx.has_residual = eps, residual is not None
        return normed, total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        total, weight = ctx.saved_tensors
        dx = row_kernels(total).add_rms_norm_backward(grads[0], grads[1], total, weight, ctx.eps)
        return dx, dx if ctx.has_residual else None, None, None


class _Rope(torch.autograd.Function):
    """Rotation of halves; its backward is the rotation by the opposite angle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return row_kernels(x).rope(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return row_kernels(grads[0]).rope(grads[0].contiguous(), cos, -sin), None, None


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return row_kernels(gate_up).silu_mul(gate_up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        return row_kernels(gate_up).silu_mul_backward(grads[0], gate_up)
