"""The kernels on a CPU: Numba where a fused or gathered loop wins, oneDNN and torch for the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from lorikeet.kernels.batch import Batch, LayerCache, Segments, Slab
from lorikeet.kernels.cpu_attention import BatchArguments, attention
from lorikeet.kernels.cpu_lowrank import SegmentArrays, SiteArray, lowrank_add
from lorikeet.kernels.cpu_products import STEP
from lorikeet.kernels.cpu_rows import add_rms_norm, logits, rms_norm_heads, rope, silu_mul
from lorikeet.kernels.reference import ReferenceOps
from lorikeet.kernels.weight import DenseWeight, PanelWeight, Weight
from lorikeet.types import Site, SiteGroup


class CpuOps(ReferenceOps):
    """As `ReferenceOps`, for inference in bf16 or fp32 on a CPU. Used by one thread at a time."""

    def __init__(self) -> None:
        self._segments: SegmentArrays | None = None
        self._batch: BatchArguments | None = None
        self._sites: dict[int, SiteArray] = {}

    def warm(self, dtype: torch.dtype, adapter_dtype: torch.dtype) -> None:
        """Run every kernel once for activations in `dtype` and a slab in `adapter_dtype`, so that it is compiled, or
        loaded from the cache of compiled kernels, before the first request. The product of a weight depends on what
        the weight is held as: whoever holds one runs that. Raises TypeError for other dtypes."""
        x, angles, weight = torch.zeros(1, 1, dtype=dtype), torch.zeros(1, 1), torch.zeros(1, dtype=dtype)
        heads = torch.zeros(1, 1, 2, dtype=dtype)
        self.add_rms_norm(x, x, weight, 1e-5)
        self.silu_mul(heads[0])
        self.rope(heads, angles, angles)
        for width in (1, STEP):  # the head's own kernel takes whole steps only
            self.logits(DenseWeight(x.new_zeros(1, width)), x.new_zeros(1, width))
        site = Site(0, 0, "o", 1, 1)
        slab = Slab(torch.zeros(2, dtype=adapter_dtype), torch.tensor([[[0, 1, 1, 1, 1]]]), torch.ones(1, 1))
        segments = Segments(torch.zeros(1, dtype=torch.int64), [0, 1], [0], True)
        self.lowrank_add(x, x, slab, SiteGroup((site,), (0,)), segments)
        one, zero = torch.ones(1, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)
        start, slot = torch.tensor([0, 1], dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
        cache = LayerCache(heads.clone().unsqueeze(0), heads.clone().unsqueeze(0))
        self.attention(heads, heads, heads, Batch(slot, slot, start, one, 1, 1, zero, slot), cache, None)

    def logits(self, weight: Weight, x: Tensor) -> Tensor:
        """A plain head is read as it lies. A packed fp32 product is unrounded already; oneDNN's bf16 is unpacked."""
        if isinstance(weight, PanelWeight):
            return weight.linear(x, torch.float32)
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
