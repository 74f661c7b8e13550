"""The decoder: one function for prefill, decode and training, with or without adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

from torch import Tensor

from lorikeet.kernels.batch import Batch, LayerCache, Segments, Slab
from lorikeet.kernels.weight import Table, Weight
from lorikeet.model.spec import ModelSpec
from lorikeet.types import Site, SiteGroup

if TYPE_CHECKING:
    from lorikeet.kernels.ranks import Ranks


class Ops(Protocol):
    """The kernels a forward pass is made of; `kernels.reference.ReferenceOps` says what each means.

    `adapters` is opaque to the decoder: the slab in serving, the trained parameters in training.
    """

    def linear(self, weight: Weight, x: Tensor) -> Tensor: ...
    def logits(self, weight: Weight, x: Tensor) -> Tensor: ...
    def lowrank_add(self, y: Tensor, x: Tensor, adapters: Any, group: SiteGroup, segments: Segments) -> Tensor: ...
    def embed(self, table: Table, tokens: Tensor) -> Tensor: ...
    def take(self, table: Tensor, index: Tensor) -> Tensor: ...
    def reduce(self, x: Tensor) -> Tensor: ...
    def gather(self, logits: Tensor, tokens: int) -> Tensor: ...
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...
    def add_rms_norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]: ...
    def silu_mul(self, gate_up: Tensor) -> Tensor: ...
    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, batch: Batch, cache: LayerCache | None,
        window: int | None,
    ) -> Tensor: ...  # fmt: skip


class ServingOps(Ops, Protocol):
    """Kernels that an engine runs on: for all that adapters may be beside pairs on linear layers. They may choose how
    a whole forward pass is carried out. `ranks` are the processes that hold the model together, None: this one does.
    `spare_blocks` of the cache, at its end, are the kernels' own."""

    ranks: Ranks | None
    spare_blocks: int

    def output_scale(self, y: Tensor, adapters: Any, group: SiteGroup, segments: Segments) -> Tensor: ...
    def adapt_embedding(self, x: Tensor, tokens: Tensor, adapters: Any, site: Site, segments: Segments) -> Tensor: ...
    def adapt_norm(
        self, h: Tensor, residual: Tensor, adapters: Any, role: str, layer: int | None, segments: Segments, eps: float
    ) -> Tensor: ...
    def adapt_residual(
        self, x: Tensor, residual: Tensor, adapters: Any, site: Site, segments: Segments
    ) -> tuple[Tensor, Tensor | None]: ...
    def adapt_logits(self, logits: Tensor, x: Tensor, adapters: Any, site: Site, segments: Segments) -> Tensor: ...
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
    """A base model in memory. `rope_cos` and `rope_sin` are [max_context, head_dim / 2] fp32, `cache_scales` what the
    checkpoint says of an fp8 key-value cache (`model.cache_scales`); None: nothing."""

    embed: Table
    layers: list[LayerWeights]
    norm: Tensor
    head: Weight
    rope_cos: Tensor
    rope_sin: Tensor
    cache_scales: list[tuple[Tensor, Tensor]] | None = None


def forward(
    spec: ModelSpec,
    weights: DecoderWeights,
    batch: Batch,
    ops: Ops,
    adapters: Any = None,
    cache: Sequence[LayerCache] | None = None,
) -> Tensor:
    """Logits of the rows in `batch.logit_rows` (of every row when None): [L, vocabulary], fp32 and unrounded.

    `spec` and `weights` may be one rank's part of a model (`model.shard`); the logits are whole on every rank.

    They are wider where an adapter of the batch has more tokens than the base (`ReferenceOps.adapt_logits`).

    Without a cache the attention stays inside each packed row (training); with one, new keys and values are
    written to `batch.cache_slot` and the sequences are read through `batch.block_table`.
    """
    wanted = batch.logit_rows
    if batch.token_segments is not None and batch.logit_segments is None:
        wanted = None  # which adapter the rows of logits belong to is not known, so they are taken at the end
    adapted = _Adapted(ops, adapters, batch, spec)
    cos, sin = ops.take(weights.rope_cos, batch.positions), ops.take(weights.rope_sin, batch.positions)
    residual: Tensor | None = None
    x = adapted.embed(weights.embed, batch.tokens)
    for i, layer in enumerate(weights.layers):
        group = spec.groups[i]
        h, residual = adapted.norm(x, residual, layer.attn_norm, "attn_norm", i)
        q, k, v = adapted.project(layer.qkv, h, group["qkv"]).split((spec.q_size, spec.kv_size, spec.kv_size), dim=-1)
        q, k, v = (part.unflatten(-1, (-1, spec.head_dim)) for part in (q, k, v))
        if layer.q_norm is not None and layer.k_norm is not None:
            q = ops.rms_norm(q, layer.q_norm, spec.norm_eps)
            k = ops.rms_norm(k, layer.k_norm, spec.norm_eps)
        attended = ops.attend(q, k, v, cos, sin, batch, None if cache is None else cache[i], spec.window(i))
        if i == spec.num_layers - 1 and wanted is not None:
            # Keys and values were the last that the other rows were for.
            attended, residual = ops.take(attended, wanted), ops.take(residual, wanted)
            adapted.segments = batch.logit_segments
        x = adapted.project(layer.o, attended, group["o"], partial=True)
        h, residual = adapted.norm(x, residual, layer.mlp_norm, "mlp_norm", i)
        act = ops.silu_mul(adapted.project(layer.gate_up, h, group["gate_up"]))
        x = adapted.project(layer.down, act, group["down"], partial=True)
        x, residual = adapted.residual(x, residual, i)
    if batch.logit_rows is not None and wanted is None:
        assert residual is not None
        x, residual = ops.take(x, batch.logit_rows), ops.take(residual, batch.logit_rows)
    h, _ = adapted.norm(x, residual, weights.norm, "norm", None)
    return adapted.logits(weights.head, h)


@dataclass(slots=True)
class _Adapted:
    """The kernels with what a batch's adapters add to them. `segments` are those of the rows at hand."""

    ops: Ops
    adapters: Any
    batch: Batch
    spec: ModelSpec
    segments: Segments | None = None

    def __post_init__(self) -> None:
        self.segments = self.batch.token_segments

    @property
    def overriding(self) -> Segments | None:
        """The segments where adapters are more than what they do to linear layers."""
        return self.segments if self.batch.overridden else None

    @property
    def more(self) -> ServingOps:
        return cast("ServingOps", self.ops)

    def embed(self, table: Table, tokens: Tensor) -> Tensor:
        if (segments := self.overriding) is None:
            return self.ops.embed(table, tokens)
        x = self.ops.embed(table, tokens.clamp(max=table.shape[0] - 1))  # those that an adapter adds are not in it
        return self.more.adapt_embedding(x, tokens, self.adapters, self.spec.site(None, "embed"), segments)

    def project(self, weight: Weight, x: Tensor, group: SiteGroup, partial: bool = False) -> Tensor:
        """One product with its pairs, gains and shifts. `partial`: where several processes hold the model, x is a part
        of the layer's inputs, and the sum over all processes is what gains and shifts are for."""
        y = self.ops.linear(weight, x)
        if self.segments is not None:
            y = self.ops.lowrank_add(y, x, self.adapters, group, self.segments)
        if partial:
            y = self.ops.reduce(y)
        if self.segments is not None and self.batch.scaled:
            y = self.more.output_scale(y, self.adapters, group, self.segments)
        return y

    def norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, role: str, layer: int | None
    ) -> tuple[Tensor, Tensor]:
        eps = self.spec.norm_eps
        h, residual = self.ops.add_rms_norm(x, residual, weight, eps)
        if (segments := self.overriding) is not None:
            h = self.more.adapt_norm(h, residual, self.adapters, role, layer, segments, eps)
        return h, residual

    def residual(self, x: Tensor, residual: Tensor | None, layer: int) -> tuple[Tensor, Tensor | None]:
        """The stream after a layer is x + residual."""
        if (segments := self.overriding) is None or residual is None:
            return x, residual
        return self.more.adapt_residual(x, residual, self.adapters, self.spec.residual_sites[layer], segments)

    def logits(self, weight: Weight, x: Tensor) -> Tensor:
        logits = self.ops.gather(self.ops.logits(weight, x), self.spec.vocab_size)
        if (segments := self.overriding) is None:
            return logits
        return self.more.adapt_logits(logits, x, self.adapters, self.spec.site(None, "head"), segments)
