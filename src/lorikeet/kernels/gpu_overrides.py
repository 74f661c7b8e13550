"""What adapters do beside linear layers, on a GPU: to the embedding and to the head. No call waits for the device.

Steps with such adapters are rare: what stands in place of a part of the base is put there by torch, adapter by adapter;
pairs go through the grouped kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lorikeet.kernels.batch import Segments, Slab
from lorikeet.kernels.gpu_lowrank import embedding_add, lowrank_add, output_scale
from lorikeet.kernels.gpu_tables import tables_of
from lorikeet.kernels.weight import DenseWeight, Weight
from lorikeet.types import Site, SiteGroup


def adapt_embedding(x: Tensor, tokens: Tensor, slab: Slab, site: Site, segments: Segments) -> Tensor:
    """As `ReferenceOps.adapt_embedding`: x [T, hidden], tokens [T]."""
    for i, handle in enumerate(segments.adapter):
        values, index = slab.override(handle, "embed", None) or (None, None)
        if values is None:
            continue
        rows = segments.rows[segments.start[i] : segments.start[i + 1]]
        wanted = tokens[rows]
        if index is None:
            x[rows] = values[wanted].to(x.dtype)
        else:
            at = torch.searchsorted(index, wanted).clamp_(max=len(index) - 1)
            x[rows] = torch.where((index[at] == wanted).unsqueeze(1), values[at].to(x.dtype), x[rows])
    return embedding_add(x, tokens, slab, site.index, tables_of(segments, slab))


def adapt_logits(
    logits: Tensor,
    x: Tensor,
    slab: Slab,
    site: Site,
    segments: Segments,
    product: Callable[[Weight, Tensor], Tensor],
) -> Tensor:
    """As `ReferenceOps.adapt_logits`: logits [L, V] fp32, x [L, hidden]; `product` gives the logits of a head."""
    tokens = {handle: slab.vocabulary.get(handle, site.d_out) for handle in segments.adapter}
    widest = max(tokens.values(), default=0)
    if widest > site.d_out:
        logits = F.pad(logits, (0, widest - site.d_out))
    for i, handle in enumerate(segments.adapter):
        own = slab.override(handle, "head", None)
        if own is None:
            continue
        rows = segments.rows[segments.start[i] : segments.start[i + 1]]
        values = product(DenseWeight(own[0].to(x.dtype).contiguous()), x[rows])
        if own[1] is None:
            logits[rows, : tokens[handle]] = values
        else:
            logits[rows.unsqueeze(1), own[1]] = values
    for count in sorted(set(tokens.values())):
        some = segments
        if len(set(tokens.values())) > 1:
            some = _select(segments, [i for i, handle in enumerate(segments.adapter) if tokens[handle] == count])
        group, tables = SiteGroup((replace(site, d_out=count),), (0,)), tables_of(some, slab)
        logits = output_scale(lowrank_add(logits, x, slab, group, tables), slab, group, tables)
    return logits


def _select(segments: Segments, chosen: list[int]) -> Segments:
    """Those segments alone."""
    parts = [segments.rows[segments.start[i] : segments.start[i + 1]] for i in chosen]
    start = [0]
    for part in parts:
        start.append(start[-1] + len(part))
    return Segments(torch.cat(parts), start, [segments.adapter[i] for i in chosen], False)
