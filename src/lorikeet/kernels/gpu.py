"""The kernels on a CUDA device: Triton where something is fused, gathered or paged, vendor libraries for the rest.

Thin glue: the kernels lie in `gpu_*.py`, what each means is said in `reference.py`.
"""

from __future__ import annotations

from torch import Tensor

from lorikeet.kernels.batch import Segments, Slab
from lorikeet.kernels.gpu_lowrank import lowrank_add, output_scale
from lorikeet.kernels.gpu_overrides import adapt_embedding, adapt_logits
from lorikeet.kernels.gpu_tables import tables_of
from lorikeet.kernels.reference import ReferenceOps
from lorikeet.types import Site, SiteGroup


class GpuOps(ReferenceOps):
    """As `ReferenceOps`, for inference in bf16 or fp32 on a CUDA device. Used by one thread at a time.

    Under Triton's interpreter (`TRITON_INTERPRET=1`, set before the first import) it takes tensors on the CPU.
    """

    # --- adapters -------------------------------------------------------------------------------------------------

    def lowrank_add(self, y: Tensor, x: Tensor, slab: Slab, group: SiteGroup, segments: Segments) -> Tensor:
        slab.wait(group.sites[0].layer)
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
