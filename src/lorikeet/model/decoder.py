"""The decoder: one function for prefill, decode and training, with or without adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from lorikeet.kernels.batch import Batch, LayerCache, Segments, Slab
from lorikeet.kernels.weight import Weight
from lorikeet.model.spec import ModelSpec
from lorikeet.types import SiteGroup


class Ops(Protocol):
    """The kernels a forward pass is made of; `kernels.reference.ReferenceOps` says what each means.

    `adapters` is opaque to the decoder: the slab in serving, the trained parameters in training.
    """

    def linear(self, weight: Weight, x: Tensor) -> Tensor: ...
    def logits(self, weight: Weight, x: Tensor) -> Tensor: ...
    def lowrank_add(self, y: Tensor, x: Tensor, adapters: Any, group: SiteGroup, segments: Segments) -> Tensor: ...
    def output_scale(self, y: Tensor, adapters: Any, group: SiteGroup, segments: Segments) -> Tensor: ...
    def embed(self, table: Tensor, tokens: Tensor) -> Tensor: ...
    def take(self, table: Tensor, index: Tensor) -> Tensor: ...
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...
    def add_rms_norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]: ...
    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor: ...
    def silu_mul(self, gate_up: Tensor) -> Tensor: ...
    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, batch: Batch, cache: LayerCache | None, window: int | None
    ) -> Tensor: ...


class ServingOps(Ops, Protocol):
    """Kernels that an engine runs on: they may choose how a whole forward pass is carried out."""

    def prepare(
        self, forward: Callable[..., Tensor], slab: Slab, cache: Sequence[LayerCache], rows: int
    ) -> Callable[[Batch], Tensor]: ...


@dataclass(slots=True)
class LayerWeights:
    """One layer. `qkv` is [q + 2 kv, hidden], `gate_up` is [2 m, hidden]: what reads the same input is one product."""

    attn_norm: Tensor
    qkv: Weight
    o: Weight
    mlp_norm: Tensor
    gate_up: Weight
    down: Weight
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


@dataclass(slots=True)
class DecoderWeights:
    """A base model in memory. `rope_cos` and `rope_sin` are [max_context, head_dim / 2] fp32."""

    embed: Tensor
    layers: list[LayerWeights]
    norm: Tensor
    head: Weight
    rope_cos: Tensor
    rope_sin: Tensor


def forward(
    spec: ModelSpec,
    weights: DecoderWeights,
    batch: Batch,
    ops: Ops,
    adapters: Any = None,
    cache: Sequence[LayerCache] | None = None,
) -> Tensor:
    """Logits of the rows in `batch.logit_rows` (of every row when None): [L, vocabulary], fp32 and unrounded.

    Without a cache the attention stays inside each packed row (training); with one, new keys and values are
    written to `batch.cache_slot` and the sequences are read through `batch.block_table`.
    """
    segments, wanted = batch.token_segments, batch.logit_rows
    if segments is not None and batch.logit_segments is None:
        wanted = None  # which adapter the rows of logits belong to is not known, so they are taken at the end

    def project(weight: Weight, x: Tensor, group: SiteGroup) -> Tensor:
        y = ops.linear(weight, x)
        if segments is not None:
            y = ops.lowrank_add(y, x, adapters, group, segments)
            if batch.scaled:
                y = ops.output_scale(y, adapters, group, segments)
        return y

    cos, sin = ops.take(weights.rope_cos, batch.positions), ops.take(weights.rope_sin, batch.positions)
    residual: Tensor | None = None
    x = ops.embed(weights.embed, batch.tokens)
    for i, layer in enumerate(weights.layers):
        group = spec.groups[i]
        h, residual = ops.add_rms_norm(x, residual, layer.attn_norm, spec.norm_eps)
        q, k, v = project(layer.qkv, h, group["qkv"]).split((spec.q_size, spec.kv_size, spec.kv_size), dim=-1)
        q, k, v = (part.unflatten(-1, (-1, spec.head_dim)) for part in (q, k, v))
        if layer.q_norm is not None and layer.k_norm is not None:
            q = ops.rms_norm(q, layer.q_norm, spec.norm_eps)
            k = ops.rms_norm(k, layer.k_norm, spec.norm_eps)
        q, k = ops.rope(q, cos, sin), ops.rope(k, cos, sin)
        attended = ops.attention(q, k, v, batch, None if cache is None else cache[i], spec.window(i))
        if i == spec.num_layers - 1 and wanted is not None:
            # Keys and values were the last that the other rows were for.
            attended, residual, segments = ops.take(attended, wanted), ops.take(residual, wanted), batch.logit_segments
        x = project(layer.o, attended, group["o"])
        h, residual = ops.add_rms_norm(x, residual, layer.mlp_norm, spec.norm_eps)
        x = project(layer.down, ops.silu_mul(project(layer.gate_up, h, group["gate_up"])), group["down"])
    if batch.logit_rows is not None and wanted is None:
        assert residual is not None
        x, residual = ops.take(x, batch.logit_rows), ops.take(residual, batch.logit_rows)
    h, _ = ops.add_rms_norm(x, residual, weights.norm, spec.norm_eps)
    return ops.logits(weights.head, h)
