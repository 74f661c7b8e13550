"""The meaning of every kernel, in plain torch. Slow where it must be, differentiable, the oracle of the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorikeet.kernels.batch import Batch, LayerCache, Segments, Slab
from lorikeet.kernels.weight import DenseWeight, Table, Weight
from lorikeet.types import Site, SiteGroup

if TYPE_CHECKING:
    from lorikeet.kernels.ranks import Ranks

Forward = Callable[[Batch, Any, Any, Sequence[LayerCache]], Tensor]  # batch, kernels, adapters, cache -> logits
Step = Callable[[Batch], Tensor]


class ReferenceOps:
    """The set of kernels that `model.decoder` is given. Works in any float dtype, fp64 included."""

    inplace = True  # lowrank_add may write into y; the differentiable twins set this to False
    spare_blocks = 0  # of the cache, at its end: no sequence has them, and a prepared step may write there
    ranks: Ranks | None = None  # the processes that hold the model together, None: this one holds it

    def prepare(self, forward: Forward, slab: Slab, cache: Sequence[LayerCache], rows: int) -> Step:
        """The forward pass over this slab and cache as these kernels run it best, for batches of up to `rows` rows."""
        return lambda batch: forward(batch, self, slab, cache)

    def linear(self, weight: Weight, x: Tensor) -> Tensor:
        """x [T, d_in] -> [T, d_out]."""
        return weight.linear(x)

    def logits(self, weight: Weight, x: Tensor) -> Tensor:
        """x [L, hidden] -> unrounded logits [L, vocabulary], fp32 (fp64 stays fp64)."""
        if x.dtype == torch.float64:
            return weight.linear(x)
        return F.linear(x.float(), weight.dequantised().float())

    def lowrank_add(self, y: Tensor, x: Tensor, slab: Slab, group: SiteGroup, segments: Segments) -> Tensor:
        """y + s B A x for the rows of each segment; y [T, group.d_out], x [T, d_in]. One rounding at the end."""
        slab.wait(group.sites[0].layer)
        wide = torch.promote_types(x.dtype, torch.float32)
        for i, handle in enumerate(segments.adapter):
            rows = segments.rows[segments.start[i] : segments.start[i + 1]]
            x_rows = x[rows].to(wide)
            for site, offset in zip(group.sites, group.offsets, strict=True):
                entry = slab.pair(handle, site.index, site.d_in, site.d_out)
                if entry is None:
                    continue
                a, b, scale = entry
                delta = (x_rows @ a.to(wide).T) @ b.to(wide) * scale
                columns = slice(offset, offset + site.d_out)
                y[rows, columns] = (y[rows, columns].to(wide) + delta).to(y.dtype)
        return y

    def output_scale(self, y: Tensor, slab: Slab, group: SiteGroup, segments: Segments) -> Tensor:
        """gain * y + shift for the rows of each segment, [T, group.d_out]; computed in fp32."""
        slab.wait(group.sites[0].layer)
        wide = torch.promote_types(y.dtype, torch.float32)
        for i, handle in enumerate(segments.adapter):
            rows = segments.rows[segments.start[i] : segments.start[i + 1]]
            for site, offset in zip(group.sites, group.offsets, strict=True):
                gain, shift = slab.gain_and_shift(handle, site.index, site.d_out)
                columns = slice(offset, offset + site.d_out)
                if gain is None and shift is None:
                    continue
                value = y[rows, columns].to(wide)
                if gain is not None:
                    value = value * gain
                if shift is not None:
                    value = value + shift
                y[rows, columns] = value.to(y.dtype)
        return y

    def adapt_embedding(self, x: Tensor, tokens: Tensor, slab: Slab, site: Site, segments: Segments) -> Tensor:
        """Rows of the adapters' own tables in place of the base's, then s B A of the token: x [T, hidden].

        What stands in x for tokens that the base does not have is never kept: their adapters have rows for them.
        """
        slab.wait(None)
        wide = torch.promote_types(x.dtype, torch.float32)
        for i, handle in enumerate(segments.adapter):
            rows = segments.rows[segments.start[i] : segments.start[i + 1]]
            values, index = slab.override(handle, "embed", None) or (None, None)
            entry = slab.pair(handle, site.index, slab.vocabulary.get(handle, site.d_in), site.d_out)
            if values is not None and index is None:
                x[rows] = values[tokens[rows]].to(x.dtype)
            elif values is not None and index is not None:
                at = torch.searchsorted(index, tokens[rows]).clamp_(max=len(index) - 1)
                mine = index[at] == tokens[rows]
                x[rows[mine]] = values[at[mine]].to(x.dtype)
            if entry is not None:
                a, b, scale = entry
                x[rows] = (x[rows].to(wide) + a[:, tokens[rows]].T.to(wide) @ b.to(wide) * scale).to(x.dtype)
        return x

    def adapt_norm(
        self, h: Tensor, residual: Tensor, slab: Slab, role: str, layer: int | None, segments: Segments, eps: float
    ) -> Tensor:
        """The norm of the residual stream [T, hidden] with the adapters' own weights, where they have one."""
        slab.wait(None)
        for i, handle in enumerate(segments.adapter):
            own = slab.override(handle, role, layer)
            if own is not None:
                rows = segments.rows[segments.start[i] : segments.start[i + 1]]
                h[rows] = self.rms_norm(residual[rows], own[0][0].to(h.dtype), eps)
        return h

    def adapt_residual(
        self, x: Tensor, residual: Tensor, slab: Slab, site: Site, segments: Segments
    ) -> tuple[Tensor, Tensor | None]:
        """The residual stream x + residual [T, hidden] after a layer, with what adapters do to it: as its two parts,
        or as one and None."""
        stream, group = x + residual, SiteGroup((site,), (0,))
        stream = self.lowrank_add(stream, stream, slab, group, segments)
        return self.output_scale(stream, slab, group, segments), None

    def adapt_logits(self, logits: Tensor, x: Tensor, slab: Slab, site: Site, segments: Segments) -> Tensor:
        """The adapters' own heads, or rows of them, then pairs on the head: logits [L, V] fp32 of x [L, hidden].

        Where adapters have more tokens than the base the result is as wide as the widest; only the first columns of a
        row, as many as its adapter has tokens, mean anything.
        """
        slab.wait(None)
        widest = max(slab.vocabulary.get(handle, 0) for handle in segments.adapter) if segments.adapter else 0
        if widest > site.d_out:
            logits = F.pad(logits, (0, widest - site.d_out))
        wide = x.to(logits.dtype)
        for i, handle in enumerate(segments.adapter):
            rows = segments.rows[segments.start[i] : segments.start[i + 1]]
            tokens = slab.vocabulary.get(handle, site.d_out)
            own = slab.override(handle, "head", None)
            if own is not None:
                values = self.logits(DenseWeight(own[0].to(x.dtype).contiguous()), x[rows])
                if own[1] is None:
                    logits[rows, :tokens] = values
                else:
                    logits[rows.unsqueeze(1), own[1]] = values
            entry = slab.pair(handle, site.index, site.d_in, tokens)
            if entry is None and slab.gain_and_shift(handle, site.index, tokens) == (None, None):
                continue
            segment = Segments(rows, [0, len(rows)], [handle], segments.contiguous)
            group = SiteGroup((replace(site, d_out=tokens),), (0,))
            logits = ReferenceOps.lowrank_add(self, logits, wide, slab, group, segment)
            logits = ReferenceOps.output_scale(self, logits, slab, group, segment)
        return logits

    def embed(self, table: Table, tokens: Tensor) -> Tensor:
        """tokens [T] -> [T, hidden]."""
        return table.rows(tokens)

    def take(self, table: Tensor, index: Tensor) -> Tensor:
        """Rows [N, d] of a table [R, d], or of a result, by index [N]."""
        return table[index]

    def reduce(self, x: Tensor) -> Tensor:
        """The sum of x [T, d] over the processes that hold the model together, on each of them; x may be written to."""
        return x if self.ranks is None else self.ranks.sum(x)

    def gather(self, logits: Tensor, tokens: int) -> Tensor:
        """The logits [L, tokens] of the whole vocabulary, of which each process has computed a part."""
        return logits if self.ranks is None else self.ranks.gather(logits, tokens)

    def add_rms_norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(normed, x + residual): the residual stream is summed first, both [T, hidden]. Statistics in fp32."""
        if residual is not None:
            x = x + residual
        return self.rms_norm(x, weight, eps), x

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMSNorm over the last dimension (any leading shape)."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return (normed * weight.to(wide.dtype)).to(x.dtype)

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate halves: x [T, heads, head_dim], cos and sin [T, head_dim / 2] (fp32; fp64 with an fp64 x)."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        first, second = wide.chunk(2, dim=-1)
        c, s = cos.unsqueeze(1), sin.unsqueeze(1)
        return torch.cat((first * c - second * s, second * c + first * s), dim=-1).to(x.dtype)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """[T, 2 m] -> silu(gate) * up [T, m]."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, batch: Batch, cache: LayerCache | None,
        window: int | None,
    ) -> Tensor:  # fmt: skip
        """`rope` of q and k, then `attention`: what a GPU does in one kernel less for each."""
        return self.attention(self.rope(q, cos, sin), self.rope(k, cos, sin), v, batch, cache, window)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, batch: Batch, cache: LayerCache | None, window: int | None
    ) -> Tensor:
        """Causal attention within each sequence.

        q [T, heads, head_dim], k and v [T, kv_heads, head_dim] -> [T, heads * head_dim]. With a cache the new keys
        and values are written first, then each sequence reads its own blocks up to `kv_len` and nothing beyond.
        `window`: a token sees itself and the `window - 1` tokens before it.
        """
        if cache is not None:
            assert batch.cache_slot is not None and batch.block_table is not None
            blocks, slots = batch.cache_slot // cache.k.shape[1], batch.cache_slot % cache.k.shape[1]
            cache.k[blocks, slots] = _held(k, cache.k.dtype, cache.k_scale)
            cache.v[blocks, slots] = _held(v, cache.v.dtype, cache.v_scale)
        bounds, lengths = batch.query_start.tolist(), batch.kv_len.tolist()
        outputs = []
        for b, length in enumerate(lengths):
            rows = slice(bounds[b], bounds[b + 1])
            if cache is None:
                keys, values = k[rows], v[rows]
            else:
                assert batch.block_table is not None
                blocks = batch.block_table[b, : -(-length // cache.k.shape[1])].long()
                keys = _meant(cache.k[blocks].flatten(0, 1)[:length], q.dtype, cache.k_scale)
                values = _meant(cache.v[blocks].flatten(0, 1)[:length], q.dtype, cache.v_scale)
            outputs.append(_attend(q[rows], keys, values, window))
        return torch.cat(outputs)


def _held(rows: Tensor, dtype: torch.dtype, scale: Tensor | None) -> Tensor:
    """Keys or values [T, kv_heads, head_dim] as a cache holds them: clamped to what fp8 can say, where it is fp8."""
    if scale is None:
        return rows
    largest = torch.finfo(dtype).max
    return (rows.float() / scale[:, None]).clamp(-largest, largest).to(dtype)


def _meant(held: Tensor, dtype: torch.dtype, scale: Tensor | None) -> Tensor:
    return held if scale is None else (held.float() * scale[:, None]).to(dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """One sequence: q [Q, heads, D] are the last Q of the K positions in k, v [K, kv_heads, D] -> [Q, heads * D]."""
    queries, keys = q.shape[0], k.shape[0]
    at = torch.arange(keys - queries, keys, device=q.device).unsqueeze(1)
    seen = torch.arange(keys, device=q.device).unsqueeze(0)
    mask = seen <= at
    if window is not None:
        mask &= seen > at - window
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    out = F.scaled_dot_product_attention(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), attn_mask=mask)
    return out.transpose(0, 1).flatten(1)
