"""`y += s B A x` for a batch of adapters: each one's A and B are read once, at their true rank, summed in fp32.

Two passes, each split evenly over the threads: *shrink* (rows of A) into a scratch `u = s A x`, then *expand*
(columns of B). An *entry* is one (segment, site) pair with a rank above zero; its `u` is a [rank, rows] block.
Activations and slab may differ in dtype: both are widened as they are read.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from lorikeet.kernels.batch import Segments, Slab
from lorikeet.kernels.cpu_products import AVAILABLE, STEP, dot_columns, dot_rows, outer_columns
from lorikeet.kernels.cpu_runtime import (
    SERIAL,
    at,
    device_function,
    hold,
    kernel,
    narrow,
    prefetch,
    share_threads,
    size,
    tag_of,
    use_threads,
    widen,
)
from lorikeet.kernels.cpu_tiles import F0, I0, TILE, add_1x1, add_1x4, add_4x4, dot, dot_1x4, dot_4x4, share
from lorikeet.types import SiteGroup

STRETCH = 8192  # columns of sums of a few rows: 32 KB
HEAD = 1024  # bytes
FIELDS = 11  # of an entry: first row, rows, rank, A, stride A, B, stride B, place of u, d_out, offset in y, site


@device_function
def shrink_entry(e, begin, end, rows, x, ldx, d_in, u, act, slab):
    """Rank rows [begin, end) of one entry, for all its batch rows."""
    row_of = at(rows + 8 * e[0], I0)
    n, a, stride = e[1], e[3], e[4]
    if size(act) == 2 and size(slab) == 2 and d_in % STEP == 0 and AVAILABLE:
        if n == 1:
            dot_rows(begin, end, x + row_of[0] * ldx, a, stride, d_in // STEP, u + 4 * e[7])
            return
        dot_columns(begin, end, n, x, ldx, rows + 8 * e[0], a, stride, d_in // STEP, u + 4 * e[7], I0 + 4, 4 * n)
        return
    rank_row = begin
    while rank_row < end:
        a_row = a + rank_row * stride
        out = u + 4 * (e[7] + rank_row * n)
        four = rank_row + 4 <= end
        i = 0
        while four and i + 4 <= n:
            x0, x1, x2, x3 = row_of[i], row_of[i + 1], row_of[i + 2], row_of[i + 3]
            dot_4x4(
                x + x0 * ldx, x + x1 * ldx, x + x2 * ldx, x + x3 * ldx, a_row, stride, d_in, out + 4 * i, n, act, slab
            )
            i += 4
        while i < n:
            if four:
                dot_1x4(x + row_of[i] * ldx, a_row, stride, d_in, out + 4 * i, n, act, slab)
            else:
                at(out, F0)[i] = dot(x + row_of[i] * ldx, a_row, d_in, act, slab)
            i += 1
        rank_row += 4 if four else 1


@device_function
def round_into(y, total, scale, n, act):
    """y[:n] += scale * total[:n], summed in fp32 and rounded once."""
    out, values = at(y, act), at(total, F0)
    for i in range(n):
        out[i] = narrow(widen(out[i]) + scale * values[i], act)


@device_function
def columns_of(n, d_out):
    """Columns that one task of the expand takes.

    Many rows share what was read of B, so their sums are kept to a tile each. A few rows wait for memory: they take
    long stretches of B, which the processor fetches ahead of us.
    """
    return min(d_out, STRETCH if n < 4 else TILE)


@device_function
def expand_entry(e, begin, end, rows, y, ldy, u, totals, scale, act, slab):
    """Columns [begin, end) of one entry, as many as `columns_of` says, for all its batch rows."""
    row_of = at(rows + 8 * e[0], I0)
    n, rank, stride, width = e[1], e[2], e[6], end - begin
    columns = e[5] + begin * size(slab)
    target = y + (e[9] + begin) * size(act)
    if size(slab) == 2 and AVAILABLE:
        whole = width // STEP * STEP
        outer_columns(0, whole, n, u + 4 * e[7], rank, columns, stride, scale, target, ldy, rows + 8 * e[0], act)
        columns, target, width = columns + whole * size(slab), target + whole * size(act), width - whole
    i = 0
    while i < n and width > 0:
        count = 4 if i + 4 <= n else 1
        zeroed = at(totals, F0)
        for j in range(width if count == 1 else count * TILE):
            zeroed[j] = F0
        weights = u + 4 * (e[7] + i)
        r = 0
        while n >= 4 and r + 4 <= rank:  # fewer rows wait for memory: for them B is read in one stream
            if count == 4:
                add_4x4(totals, weights + 4 * r * n, n, columns + r * stride, stride, width, slab)
            else:
                add_1x4(totals, weights + 4 * r * n, n, columns + r * stride, stride, width, slab)
            r += 4
        while r < rank:
            for j in range(count):
                weight = at(weights + 4 * (r * n + j), F0)[0]
                add_1x1(totals + 4 * TILE * j, weight, columns + r * stride, width, slab)
            r += 1
        for j in range(count):
            round_into(target + row_of[i + j] * ldy, totals + 4 * TILE * j, scale, width, act)
        i += count


@device_function
def list_entries(entries, start, adapters, segments, sites, n_sites, table, table_sites, slab_data, slab):
    """Fill the entries from the slab's table; returns (entries, floats of scratch, shrink work, expand work)."""
    begin, handles, site_table, pairs = at(start, I0), at(adapters, I0), at(sites, I0), at(table, I0)
    element = size(slab)
    count, floats, shrink_work, expand_work = 0, 0, 0, 0
    for s in range(segments):
        n = begin[s + 1] - begin[s]
        for j in range(n_sites):
            site, offset, d_out = site_table[3 * j], site_table[3 * j + 1], site_table[3 * j + 2]
            pair = 5 * (handles[s] * table_sites + site)
            rank = pairs[pair + 4]
            if rank > 0 and n > 0:
                e = entries[count]
                e[0], e[1], e[2] = begin[s], n, rank
                e[3], e[4] = slab_data + pairs[pair] * element, pairs[pair + 2] * element
                e[5], e[6] = slab_data + pairs[pair + 1] * element, pairs[pair + 3] * element
                e[7], e[8], e[9], e[10] = floats, d_out, offset, handles[s] * table_sites + site
                count += 1
                floats += rank * n
                shrink_work += rank * (n + 2)
                columns = columns_of(n, d_out)
                expand_work += -(-d_out // columns) * columns * rank * (n + 2)
    return count, floats, shrink_work, expand_work


@device_function
def call_head(address):
    """Call the first bytes of what is read next into the cache: no prefetcher knows where that is."""
    for line in range(HEAD // 64):
        prefetch(address + 64 * line)


@device_function
def shrink_share(low, high, entries, count, rows, x, ldx, d_in, u, act, slab):
    begun = 0
    for i in range(count):
        e = entries[i]
        unit = e[1] + 2
        begin, end = share(low, high, begun, unit, e[2])
        begun += e[2] * unit
        if i + 1 < count and begin < end:
            call_head(entries[i + 1][3])
        shrink_entry(e, begin, end, rows, x, ldx, d_in, u, act, slab)


@device_function
def expand_share(low, high, entries, count, rows, y, ldy, u, scale, act, slab):
    totals = np.empty(max(4 * TILE, STRETCH), np.float32)
    scales = at(scale, F0)
    begun = 0
    for i in range(count):
        e = entries[i]
        columns = columns_of(e[1], e[8])
        unit, tiles = columns * (e[1] + 2) * e[2], -(-e[8] // columns)
        begin, end = share(low, high, begun, unit, tiles)
        begun += tiles * unit
        for tile in range(begin, end):
            stop = min((tile + 1) * columns, e[8])
            expand_entry(e, tile * columns, stop, rows, y, ldy, u, totals.ctypes.data, scales[e[10]], act, slab)
    hold(totals)


@device_function
def scale_share(part, parts, rows, start, adapters, segments, sites, n_sites, y, ldy, vectors, table_sites,
                slab_data, act, slab):  # fmt: skip
    """y = gain * y + shift: one of `parts` threads takes every `parts`-th row of each segment."""
    begin, handles, site_table = at(start, I0), at(adapters, I0), at(sites, I0)
    places, row_of = at(vectors, I0), at(rows, I0)
    element = size(slab)
    for s in range(segments):
        for i in range(begin[s] + part, begin[s + 1], parts):
            for j in range(n_sites):
                site, offset, d_out = site_table[3 * j], site_table[3 * j + 1], site_table[3 * j + 2]
                place = 2 * (handles[s] * table_sites + site)
                values = at(y + row_of[i] * ldy + offset * size(act), act)
                gain, shift = places[place], places[place + 1]
                if gain >= 0 and shift >= 0:
                    g, d = at(slab_data + gain * element, F0), at(slab_data + shift * element, F0)
                    for c in range(d_out):
                        values[c] = narrow(g[c] * widen(values[c]) + d[c], act)
                elif gain >= 0:
                    g = at(slab_data + gain * element, F0)
                    for c in range(d_out):
                        values[c] = narrow(g[c] * widen(values[c]), act)
                elif shift >= 0:
                    d = at(slab_data + shift * element, F0)
                    for c in range(d_out):
                        values[c] = narrow(widen(values[c]) + d[c], act)


@kernel
def scale_kernel(y, ldy, rows, start, adapters, segments, sites, n_sites, vectors, table_sites, slab_data, parts,
                 act, slab):  # fmt: skip
    use_threads(parts)
    for part in numba.prange(parts):
        scale_share(np.int64(part), np.int64(parts), rows, start, adapters, segments, sites, n_sites, y, ldy, vectors,
                    table_sites, slab_data, act, slab)  # fmt: skip


@kernel
def lowrank_kernel(
    y, ldy, x, ldx, d_in, rows, start, adapters, segments, sites, n_sites,
    table, table_sites, scale, slab_data, parts, act, slab,
):  # fmt: skip
    entries = np.empty((segments * n_sites, FIELDS), np.int64)
    count, floats, shrink_work, expand_work = list_entries(
        entries, start, adapters, segments, sites, n_sites, table, table_sites, slab_data, slab
    )
    scratch = np.empty(floats, np.float32)
    u = scratch.ctypes.data
    if shrink_work * d_in + expand_work < SERIAL:
        parts = 1
    use_threads(parts)
    for part in numba.prange(parts):
        low, high = shrink_work * part // parts, shrink_work * (part + 1) // parts
        shrink_share(low, high, entries, count, rows, x, ldx, d_in, u, act, slab)
    for part in numba.prange(parts):
        low, high = expand_work * part // parts, expand_work * (part + 1) // parts
        expand_share(low, high, entries, count, rows, y, ldy, u, scale, act, slab)
    hold(scratch)


class SegmentArrays:
    """The lists of a `Segments` as arrays that kernels read, built once per batch."""

    def __init__(self, segments: Segments) -> None:
        self.segments = segments
        self.rows = segments.rows.to(torch.int64).contiguous()
        self.start = np.asarray(segments.start, dtype=np.int64)
        self.adapters = np.asarray(segments.adapter, dtype=np.int64)
        self.arguments = (
            self.rows.data_ptr(), self.start.ctypes.data, self.adapters.ctypes.data, len(segments.adapter),
        )  # fmt: skip


class SiteArray:
    """(index in the slab's table, first column of y, columns) of each site of a group."""

    def __init__(self, group: SiteGroup) -> None:
        self.group = group
        sites = zip(group.sites, group.offsets, strict=True)
        self.array = np.array([(site.index, offset, site.d_out) for site, offset in sites], dtype=np.int64)
        self.arguments = (self.array.ctypes.data, len(group.sites))


def lowrank_add(y: Tensor, x: Tensor, slab: Slab, sites: SiteArray, segments: SegmentArrays) -> Tensor:
    """Add s B A x into y [T, d_out] for the rows of each segment; x [T, d_in], both dense in their last dimension."""
    if x.dtype != y.dtype or x.stride(1) != 1 or y.stride(1) != 1:
        raise ValueError(f"lowrank_add: x {x.dtype} {x.stride()} and y {y.dtype} {y.stride()} must be dense rows alike")
    lowrank_kernel(
        y.data_ptr(), y.stride(0) * y.element_size(), x.data_ptr(), x.stride(0) * x.element_size(), x.shape[1],
        *segments.arguments, *sites.arguments,
        slab.table.data_ptr(), slab.table.shape[1], slab.scale.data_ptr(), slab.data.data_ptr(),
        share_threads(), tag_of(x), tag_of(slab.data),
    )  # fmt: skip
    return y


def output_scale(y: Tensor, slab: Slab, sites: SiteArray, segments: SegmentArrays) -> Tensor:
    """gain * y + shift for the rows of each segment; y [T, d_out] is dense in its last dimension."""
    if y.stride(1) != 1:
        raise ValueError(f"output_scale: y has strides {y.stride()}; expected dense rows")
    assert slab.vectors is not None
    scale_kernel(
        y.data_ptr(), y.stride(0) * y.element_size(), *segments.arguments, *sites.arguments,
        slab.vectors.data_ptr(), slab.vectors.shape[1], slab.data.data_ptr(), share_threads(), tag_of(y),
        tag_of(slab.data),
    )  # fmt: skip
    return y
