"""The kernels on a CUDA device: Triton where something is fused, gathered or paged, vendor libraries for the rest.

Thin glue: the kernels lie in `gpu_*.py`, what each means is said in `reference.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorikeet.kernels.batch import Batch, LayerCache, Segments, Slab
from lorikeet.kernels.gpu_attention import AttentionWork, choose_attention, tuning_of
from lorikeet.kernels.gpu_graphs import CudaCapture, DecodeGraphs
from lorikeet.kernels.gpu_lowrank import compile_products, lowrank_add, output_scale, widths_of
from lorikeet.kernels.gpu_overrides import adapt_embedding, adapt_logits
from lorikeet.kernels.gpu_rows import add_rms_norm, rms_norm_heads, rope, rope_and_store, silu_mul, store
from lorikeet.kernels.gpu_tables import tables_of
from lorikeet.kernels.reference import Forward, ReferenceOps, Step
from lorikeet.kernels.weight import DenseWeight, Table, Weight
from lorikeet.types import Site, SiteGroup


class GpuOps(ReferenceOps):
    """As `ReferenceOps`, for inference in bf16 or fp32 on a CUDA device. Used by one thread at a time.

    Under Triton's interpreter (`TRITON_INTERPRET=1`, set before the first import) it takes tensors on the CPU.
    """

    spare_blocks = 1  # that padding of captured decode steps writes to

    def __init__(self) -> None:
        super().__init__()
        self._work: dict[int | None, AttentionWork] = {}  # by window
        self._ahead = False  # kernels of a product are compiled for all batches when it comes for the first time
        self._compiled: set[tuple[int, tuple[int, ...], torch.dtype]] = set()

    def prepare(self, forward: Forward, slab: Slab, cache: Sequence[LayerCache], rows: int) -> Step:
        """Decode steps as CUDA graphs, all others kernel by kernel."""
        one_by_one = super().prepare(forward, slab, cache, rows)
        if not slab.data.is_cuda:
            return one_by_one
        self._ahead = True
        capture = CudaCapture()
        if self.ranks is not None:
            self.ranks.before_leaving(capture.destroy)
        return DecodeGraphs(one_by_one, slab, cache, rows, capture)

    # --- rows ------------------------------------------------------------------------------------------------------

    def embed(self, table: Table, tokens: Tensor) -> Tensor:
        self._work = {}  # a forward pass begins: the batch's buffers may hold other lengths than in the last one
        return super().embed(table, tokens)

    def add_rms_norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return add_rms_norm(x, residual, weight, eps)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm_heads(x, weight, eps) if x.dim() == 3 else add_rms_norm(x, None, weight, eps)[0]

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rope(x, cos, sin)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return silu_mul(gate_up)

    def logits(self, weight: Weight, x: Tensor) -> Tensor:
        if isinstance(weight, DenseWeight) and x.is_cuda and weight.bias is None and x.dtype == torch.bfloat16:
            return torch.mm(x, weight.weight.T, out_dtype=torch.float32)
        return super().logits(weight, x)

    # --- attention -------------------------------------------------------------------------------------------------

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, batch: Batch, cache: LayerCache | None,
        window: int | None,
    ) -> Tensor:  # fmt: skip
        if cache is None or batch.cache_slot is None:
            return super().attend(q, k, v, cos, sin, batch, cache, window)
        q = rope_and_store(q, k, v, cos, sin, cache, batch.cache_slot)
        return choose_attention(q, cache)(q, k, v, self._listed(q, k, batch, window), cache)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, batch: Batch, cache: LayerCache | None, window: int | None
    ) -> Tensor:
        if cache is not None and batch.cache_slot is not None:
            store(k, v, cache, batch.cache_slot)
        return choose_attention(q, cache)(q, k, v, self._listed(q, k, batch, window), cache)

    def _listed(self, q: Tensor, k: Tensor, batch: Batch, window: int | None) -> AttentionWork:
        """What there is to do for the layers with this window, listed by the first of them."""
        heads, work = (q.shape[1], k.shape[1], q.shape[2]), self._work.get(window)
        if work is None or work.batch is not batch or work.heads != heads:
            work = self._work[window] = AttentionWork(batch, heads, window, tuning_of(q))
        return work

    # --- adapters -------------------------------------------------------------------------------------------------

    def lowrank_add(self, y: Tensor, x: Tensor, slab: Slab, group: SiteGroup, segments: Segments) -> Tensor:
        slab.wait(group.sites[0].layer)
        if self._ahead and (kind := (group.d_in, widths_of(group), x.dtype)) not in self._compiled:
            self._compiled.add(kind)
            compile_products(slab, [group], x.dtype)
        return lowrank_add(y, x, slab, group, tables_of(segments, slab))

    def output_scale(self, y: Tensor, slab: Slab, group: SiteGroup, segments: Segments) -> Tensor:
        slab.wait(group.sites[0].layer)
        return output_scale(y, slab, group, tables_of(segments, slab))

    def adapt_embedding(self, x: Tensor, tokens: Tensor, slab: Slab, site: Site, segments: Segments) -> Tensor:
        slab.wait(None)
        return adapt_embedding(x, tokens, slab, site, segments)

    def adapt_logits(self, logits: Tensor, x: Tensor, slab: Slab, site: Site, segments: Segments) -> Tensor:
        slab.wait(None)
        return adapt_logits(logits, x, slab, site, segments, self.logits)
