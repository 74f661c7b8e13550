"""Differentiable causal attention over packed rows, without attention across rows.

Rows are gathered into buckets of similar length, each one dense [rows, length] product. A row shorter than its
bucket is filled up with its own last token, which no earlier token can see and whose output nobody reads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorikeet.kernels.batch import Batch
from lorikeet.kernels.precision import bf16_products

LENGTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # bucket lengths; longer rows stand alone
FEW_TOKENS = 512  # a bucket smaller than this joins the next longer one


@dataclass(frozen=True, slots=True)
class Bucket:
    """`count` rows filled up to `length`: `source` [count * length] token of each place."""

    count: int
    length: int
    source: Tensor


@dataclass(frozen=True, slots=True)
class RowBuckets:
    """How the rows of a batch are laid out for attention.

    `place` [T]: where each token stands in the buckets laid end to end. `ordered`: the buckets are the batch itself.
    """

    buckets: list[Bucket]
    place: Tensor

    @staticmethod
    def of(batch: Batch) -> RowBuckets:
        starts = batch.query_start[:-1].long()
        lengths = batch.query_start[1:].long() - starts
        place = torch.empty(len(batch.tokens), dtype=torch.int64)
        buckets = []
        offset = 0
        for rows in _group_by_length(lengths.tolist()):
            index = torch.tensor(rows)
            length = int(lengths[index].max())
            steps = torch.arange(length)
            real = steps[None, :] < lengths[index, None]
            source = starts[index, None] + torch.minimum(steps[None, :], lengths[index, None] - 1)
            place[source[real]] = offset + real.flatten().nonzero().squeeze(1)
            buckets.append(Bucket(len(rows), length, source.flatten()))
            offset += source.numel()
        return RowBuckets(buckets, place)


def _group_by_length(lengths: list[int]) -> list[list[int]]:
    """Row numbers, grouped so that the rows of a group fill most of it."""
    groups: list[list[int]] = []
    current: list[int] = []
    limits = iter((*LENGTHS, math.inf))
    limit = next(limits)
    for row in sorted(range(len(lengths)), key=lambda row: (lengths[row], row)):
        longest = lengths[row] > LENGTHS[-1]
        while lengths[row] > limit:
            limit = next(limits)
            if current and (longest or sum(lengths[r] for r in current) >= FEW_TOKENS):
                groups.append(current)
                current = []
        if longest and current:
            groups.append(current)
            current = []
        current.append(row)
    return [*groups, current]


def packed_attention(q: Tensor, k: Tensor, v: Tensor, layout: RowBuckets, window: int | None) -> Tensor:
    """q [T, heads, D], k and v [T, kv_heads, D] -> [T, heads * D], causal inside each row.

    `window`: a token sees itself and the `window - 1` tokens before it.
    """
    out: Tensor = _PackedAttention.apply(q, k, v, layout, window)  # type: ignore[no-untyped-call]
    return out


class _PackedAttention(torch.autograd.Function):
    """Saves q, k, v and the probabilities of short buckets; long rows are computed again in backward."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: RowBuckets, window: int | None) -> Tensor:
        outputs, saved = [], []
        for bucket in layout.buckets:
            shape = _Shape(bucket, q.shape[1], k.shape[1], q.shape[2])
            qb, kb, vb = shape.queries(q), shape.keys(k), shape.keys(v)
            if bucket.length > LENGTHS[-1]:
                out, probabilities = _long_rows(qb, kb, vb, shape, window), None
            else:
                probabilities = _probabilities(qb, kb, shape, window)
                out = torch.bmm(probabilities, vb)
            outputs.append(shape.flat(out))
            saved += [qb, kb, vb, probabilities]
        ctx.save_for_backward(*saved)
        ctx.layout, ctx.window, ctx.heads = layout, window, (q.shape[1], k.shape[1], q.shape[2])
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).index_select(0, layout.place)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        layout: RowBuckets = ctx.layout
        places = sum(bucket.source.numel() for bucket in layout.buckets)
        dout = grads[0].new_zeros(places, grads[0].shape[1]).index_copy_(0, layout.place, grads[0])
        saved, at = iter(ctx.saved_tensors), 0
        dq, dk, dv = [], [], []
        for bucket in layout.buckets:
            shape = _Shape(bucket, *ctx.heads)
            qb, kb, vb, probabilities = (next(saved) for _ in range(4))
            dout_b = shape.queries(dout[at : at + bucket.source.numel()].unflatten(1, (shape.heads, -1)), gather=False)
            at += bucket.source.numel()
            if probabilities is None:
                dqb, dkb, dvb = _long_rows_backward(qb, kb, vb, dout_b, shape, ctx.window)
            else:
                dqb, dkb, dvb = _short_rows_backward(qb, kb, vb, dout_b, probabilities)
            dq.append(shape.flat(dqb))
            dk.append(shape.flat_keys(dkb))
            dv.append(shape.flat_keys(dvb))
        dq_flat, dk_flat, dv_flat = (
            torch.cat(parts).index_select(0, layout.place).unflatten(1, (-1, ctx.heads[2])) for parts in (dq, dk, dv)
        )
        return dq_flat, dk_flat, dv_flat, None, None


@dataclass(frozen=True, slots=True)
class _Shape:
    """Moves between tokens [T, heads, D] and the batched products of a bucket, one per row and key head.

    The query heads that share a key head stand below each other, so keys are never repeated.
    """

    bucket: Bucket
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    def queries(self, x: Tensor, gather: bool = True) -> Tensor:
        """[T, heads, D] -> [count * kv_heads, group * length, D]."""
        x = x.index_select(0, self.bucket.source) if gather else x
        x = x.view(self.bucket.count, self.bucket.length, self.kv_heads, self.group, self.head_dim)
        return x.permute(0, 2, 3, 1, 4).reshape(-1, self.group * self.bucket.length, self.head_dim)

    def keys(self, x: Tensor) -> Tensor:
        """[T, kv_heads, D] -> [count * kv_heads, length, D]."""
        x = x.index_select(0, self.bucket.source)
        x = x.view(self.bucket.count, self.bucket.length, self.kv_heads, self.head_dim)
        return x.transpose(1, 2).reshape(-1, self.bucket.length, self.head_dim)

    def flat(self, x: Tensor) -> Tensor:
        """The inverse of `queries` without its gather: [count * length, heads * D]."""
        x = x.view(self.bucket.count, self.kv_heads, self.group, self.bucket.length, self.head_dim)
        return x.permute(0, 3, 1, 2, 4).reshape(-1, self.heads * self.head_dim)

    def flat_keys(self, x: Tensor) -> Tensor:
        x = x.view(self.bucket.count, self.kv_heads, self.bucket.length, self.head_dim)
        return x.transpose(1, 2).reshape(-1, self.kv_heads * self.head_dim)


def _mask(length: int, window: int | None) -> Tensor:
    """True where a query (row) sees a key (column)."""
    seen = torch.ones(length, length, dtype=torch.bool).tril_()
    return seen if window is None else seen.triu_(1 - window)


def _probabilities(q: Tensor, k: Tensor, shape: _Shape, window: int | None) -> Tensor:
    """Softmax of the scaled, masked scores: [count * kv_heads, group * length, length] in the dtype of q."""
    length = shape.bucket.length
    wide = torch.promote_types(q.dtype, torch.float32)
    with bf16_products(q.dtype == torch.bfloat16):
        scores = torch.bmm(q.to(wide), k.to(wide).transpose(1, 2))
    bias = torch.zeros(length, length, dtype=wide).masked_fill_(~_mask(length, window), -math.inf)
    per_head = scores.view(-1, length, length)
    per_head = torch.add(bias, per_head, alpha=1 / math.sqrt(shape.head_dim))
    return torch.softmax(per_head, -1).to(q.dtype).view(scores.shape)


def _short_rows_backward(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, probabilities: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    dv = torch.bmm(probabilities.transpose(1, 2), dout)
    dp = torch.bmm(dout, v.transpose(1, 2)).to(wide)
    p = probabilities.to(wide)
    dp -= (dp * p).sum(-1, keepdim=True)
    ds = dp.mul_(p).mul_(1 / math.sqrt(q.shape[-1])).to(q.dtype)
    return torch.bmm(ds, k), torch.bmm(ds.transpose(1, 2), q), dv


def _long_rows(q: Tensor, k: Tensor, v: Tensor, shape: _Shape, window: int | None) -> Tensor:
    """The same through torch's fused attention, which never holds all scores."""
    length = shape.bucket.length
    q = q.view(-1, shape.group, length, shape.head_dim)
    k, v = (x.unsqueeze(1).expand(-1, shape.group, -1, -1) for x in (k, v))
    mask = None if window is None or window >= length else _mask(length, window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None).flatten(1, 2)


def _long_rows_backward(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, shape: _Shape, window: int | None
) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(_long_rows(inputs[0], inputs[1], inputs[2], shape, window), inputs, dout)
