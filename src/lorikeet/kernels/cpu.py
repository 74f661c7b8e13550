"""The kernels on a CPU: Numba where a fused or gathered loop wins, oneDNN and torch for the rest."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from lorikeet.kernels.batch import Batch, LayerCache, Segments, Slab
from lorikeet.kernels.cpu_attention import BatchArguments, attention
from lorikeet.kernels.cpu_lowrank import SegmentArrays, SiteArray, lowrank_add, output_scale
from lorikeet.kernels.cpu_products import panel_linear
from lorikeet.kernels.cpu_record import NotRecordable, Program
from lorikeet.kernels.cpu_rows import add_rms_norm, logits, rms_norm_heads, rope, silu_mul
from lorikeet.kernels.cpu_runtime import cache_folder
from lorikeet.kernels.reference import Forward, ReferenceOps, Step
from lorikeet.kernels.weight import DenseWeight, Panels, Weight
from lorikeet.types import SiteGroup

log = logging.getLogger(__name__)


class CpuOps(ReferenceOps):
    """As `ReferenceOps`, for inference in bf16 or fp32 on a CPU. Used by one thread at a time."""

    def __init__(self) -> None:
        self._segments: SegmentArrays | None = None
        self._batch: BatchArguments | None = None
        self._sites: dict[int, SiteArray] = {}

    def prepare(self, forward: Forward, slab: Slab, cache: Sequence[LayerCache], rows: int) -> Step:
        """A recorded program, one launch a step, where there are kernels for all of it; else kernel by kernel.

        So are all steps where several processes hold the model: programs do not wait for one another.
        """
        one_by_one = super().prepare(forward, slab, cache, rows)
        if self.ranks is not None:
            return one_by_one
        if not cache_folder().exists():
            log.info("compiling kernels for this processor, once: about half a minute")
        try:
            return Program(forward, slab, cache, rows, self)
        except NotRecordable as reason:
            log.info("kernels are launched one by one: programs do not take %s", reason)
            return one_by_one

    def logits(self, weight: Weight, x: Tensor) -> Tensor:
        """A plain head is read as it lies. A packed fp32 product is unrounded already; oneDNN's bf16 is unpacked."""
        panels: Panels | None = getattr(weight, "panels", None)
        if panels is not None:
            return panel_linear(x, *panels, torch.float32)
        if isinstance(weight, DenseWeight) or x.dtype == torch.bfloat16:
            return logits(weight.dequantised(), x)
        return weight.linear(x)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm_heads(x, weight, eps) if x.dim() == 3 else add_rms_norm(x, None, weight, eps)[0]

    def add_rms_norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return add_rms_norm(x, residual, weight, eps)

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rope(x, cos, sin)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return silu_mul(gate_up)

    def lowrank_add(self, y: Tensor, x: Tensor, slab: Slab, group: SiteGroup, segments: Segments) -> Tensor:
        return lowrank_add(y, x, slab, *self._arrays(group, segments))

    def output_scale(self, y: Tensor, slab: Slab, group: SiteGroup, segments: Segments) -> Tensor:
        return output_scale(y, slab, *self._arrays(group, segments))

    def _arrays(self, group: SiteGroup, segments: Segments) -> tuple[SiteArray, SegmentArrays]:
        if self._segments is None or self._segments.segments is not segments:
            self._segments = SegmentArrays(segments)
        sites = self._sites.get(group.sites[0].index)
        if sites is None or sites.group is not group:
            sites = self._sites[group.sites[0].index] = SiteArray(group)
        return sites, self._segments

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, batch: Batch, cache: LayerCache | None, window: int | None
    ) -> Tensor:
        if self._batch is None or self._batch.batch is not batch:
            self._batch = BatchArguments(batch)
        return attention(q, k, v, self._batch, cache, window)
