"""The kernels on a CPU: Numba where a fused or gathered loop wins, oneDNN and torch for the rest."""

from __future__ import annotations

from torch import Tensor

from lorikeet.kernels.batch import Batch, LayerCache, Segments, Slab
from lorikeet.kernels.cpu_attention import BatchArguments, attention
from lorikeet.kernels.cpu_lowrank import SegmentArrays, SiteArray, lowrank_add
from lorikeet.kernels.reference import ReferenceOps
from lorikeet.types import SiteGroup


class CpuOps(ReferenceOps):
    """As `ReferenceOps`, for inference in bf16 or fp32 on a CPU. Used by one thread at a time."""

    def __init__(self) -> None:
        self._segments: SegmentArrays | None = None
        self._batch: BatchArguments | None = None
        self._sites: dict[int, SiteArray] = {}

    def lowrank_add(self, y: Tensor, x: Tensor, slab: Slab, group: SiteGroup, segments: Segments) -> Tensor:
        if self._segments is None or self._segments.segments is not segments:
            self._segments = SegmentArrays(segments)
        sites = self._sites.get(group.sites[0].index)
        if sites is None or sites.group is not group:
            sites = self._sites[group.sites[0].index] = SiteArray(group)
        return lowrank_add(y, x, slab, sites, self._segments)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, batch: Batch, cache: LayerCache | None, window: int | None
    ) -> Tensor:
        if self._batch is None or self._batch.batch is not batch:
            self._batch = BatchArguments(batch)
        return attention(q, k, v, self._batch, cache, window)
