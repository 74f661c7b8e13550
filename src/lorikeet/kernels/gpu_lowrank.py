"""`y += s B A x` for a batch of adapters on a GPU, at their true ranks: two launches for all sites of a product.

*Shrink* writes `u = A x` in fp32, in as many partial sums over stretches of d_in as it takes to fill the device with
programs; *expand* adds these up, multiplies by s B and adds the result into y, rounded once. Each program takes the
rows of one tile (`gpu_tables`) and one site, and leaves at once where the tile is empty or the adapter has nothing.

With few rows the time is that of reading A and B, each once for up to 16 rows: rows of A and B are read along d, 16
bytes a thread. A is held in registers, so that one to `FEW` rows are multiplied as they come, without the padding that
matrix units need. With many rows (prefill) both passes are matrix products over tiles of 64 rows.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorikeet.kernels.batch import Slab
from lorikeet.kernels.gpu_tables import DECODE_ROWS, PROMPT_ROWS, DeviceSegments
from lorikeet.types import SiteGroup

FEW = 4  # rows that are multiplied by A one by one
PROGRAMS = 512  # that fill a large device, about four to a multiprocessor
SPLITS = 32  # partial sums at most, where registers allow
RANKS_AT_ONCE = (16, 64)  # of a product with many rows, by the highest rank in the batch
SITES = 3  # of a group, at most
EARLY_LAUNCH = False  # decode kernels read weights before the kernel in front of them has ended (Hopper and later)
FIELDS = tl.constexpr(8)  # of an entry's line
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def entry_of(entries, tile, site, all_sites):
    """Where the line of a site of a tile's adapter is."""
    return entries + (tile.to(tl.int64) * all_sites + site) * FIELDS


@triton.jit
def product(x, y, total, WIDE: tl.constexpr):
    """total + x y: in bf16 on matrix units, or in fp32 without a loss where one of the tensors at hand is fp32.

    The interpreter has no products in bf16; those in fp32 of values that were rounded to bf16 are the same.
    """
    if WIDE or INTERPRETED:
        return tl.dot(x.to(tl.float32), y.to(tl.float32), total, input_precision="ieee")
    return tl.dot(x, y, total)


@triton.jit(do_not_specialize=["first_site", "u_rows"])
def shrink_few_kernel(u, x, data, tiles, entries, rows, first_site, all_sites, ldx, u_rows, ranks,
                      D_IN: tl.constexpr, N_SITES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
                      BLOCK_K: tl.constexpr, AT_ONCE: tl.constexpr, WIDE: tl.constexpr,
                      EARLY: tl.constexpr):  # fmt: skip
    """u[split, p, site, r] = A[r, columns of the split] x[row p]: one stretch of columns, all ranks."""
    tile, site, split = tl.program_id(1), tl.program_id(0) % N_SITES, tl.program_id(0) // N_SITES
    entry = entry_of(entries, tile, first_site + site, all_sites)
    first, count = tl.load(tiles + tile * 4), tl.load(tiles + tile * 4 + 1).to(tl.int32)
    a_at, stride = tl.multiple_of(tl.load(entry), 16), tl.multiple_of(tl.load(entry + 2), 16)
    rank = tl.load(entry + 4).to(tl.int32)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    if (count == 0) | (rank == 0):
        return
    k = split * BLOCK_K + tl.arange(0, BLOCK_K)
    m = tl.arange(0, BLOCK_M)
    within = k < D_IN
    for r0 in range(0, rank, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        a = tl.load(data + a_at + r[:, None] * stride + k[None, :], mask=(r < rank)[:, None] & within[None, :], other=0)
        if EARLY:
            tl.extra.cuda.gdc_wait()
        if count <= AT_ONCE:
            for i in range(count):
                row = tl.load(rows + first + i)
                one = tl.load(x + row * ldx + k, mask=within, other=0).to(tl.float32)
                place = ((split.to(tl.int64) * u_rows + first + i) * N_SITES + site) * ranks
                tl.store(u + place + r, tl.sum(a.to(tl.float32) * one[None, :], 1), mask=r < rank)
        else:
            row = tl.load(rows + first + m, mask=m < count, other=0)
            inside = (m < count)[:, None] & within[None, :]
            some = tl.load(x + row[:, None] * ldx + k[None, :], mask=inside, other=0)
            total = product(some, tl.trans(a), tl.zeros((BLOCK_M, BLOCK_R), tl.float32), WIDE)
            place = ((split.to(tl.int64) * u_rows + first + m) * N_SITES + site) * ranks
            tl.store(u + place[:, None] + r[None, :], total, mask=(m < count)[:, None] & (r < rank)[None, :])


@triton.jit(do_not_specialize=["first_site", "u_rows", "splits", "split_k"])
def shrink_many_kernel(u, x, data, tiles, entries, rows, first_site, all_sites, ldx, u_rows, ranks, splits, split_k,
                       D_IN: tl.constexpr, N_SITES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
                       BLOCK_K: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """As `shrink_few_kernel`, for tiles of many rows: one stretch of `split_k` columns, one block of ranks."""
    tile, site = tl.program_id(1), tl.program_id(0) % N_SITES
    split, r_block = tl.program_id(0) // N_SITES % splits, tl.program_id(0) // N_SITES // splits
    split_k = tl.multiple_of(split_k, BLOCK_K)
    entry = entry_of(entries, tile, first_site + site, all_sites)
    first, count = tl.load(tiles + tile * 4), tl.load(tiles + tile * 4 + 1).to(tl.int32)
    a_at, stride = tl.multiple_of(tl.load(entry), 16), tl.multiple_of(tl.load(entry + 2), 16)
    rank = tl.load(entry + 4).to(tl.int32)
    if (count == 0) | (r_block * BLOCK_R >= rank):
        return
    m, r = tl.arange(0, BLOCK_M), r_block * BLOCK_R + tl.arange(0, BLOCK_R)
    row = tl.load(rows + first + m, mask=m < count, other=0)
    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k0 in range(0, split_k, BLOCK_K):
        k = split * split_k + k0 + tl.arange(0, BLOCK_K)
        inside = (m < count)[:, None] & (k < D_IN)[None, :]
        some = tl.load(x + row[:, None] * ldx + k[None, :], mask=inside, other=0)
        inside = (r < rank)[:, None] & (k < D_IN)[None, :]
        a = tl.load(data + a_at + r[:, None] * stride + k[None, :], mask=inside, other=0)
        total = product(some, tl.trans(a), total, WIDE)
    place = ((split.to(tl.int64) * u_rows + first + m) * N_SITES + site) * ranks
    tl.store(u + place[:, None] + r[None, :], total, mask=(m < count)[:, None] & (r < rank)[None, :])


@triton.jit
def shrink_tokens_kernel(u, tokens, data, tiles, entries, rows, site, all_sites, ranks,
                         BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr):  # fmt: skip
    """u[0, p, 0, r] = A[r, token of row p]: the shrink of the embedding, whose input is a choice of columns."""
    tile = tl.program_id(0)
    entry = entry_of(entries, tile, site, all_sites)
    first, count = tl.load(tiles + tile * 4), tl.load(tiles + tile * 4 + 1).to(tl.int32)
    a_at, stride, rank = tl.load(entry), tl.load(entry + 2), tl.load(entry + 4).to(tl.int32)
    m = tl.arange(0, BLOCK_M)
    token = tl.load(tokens + tl.load(rows + first + m, mask=m < count, other=0), mask=m < count, other=0)
    for r0 in range(0, tl.where(count == 0, 0, rank), BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        inside = (m < count)[:, None] & (r < rank)[None, :]
        a = tl.load(data + a_at + r[None, :] * stride + token[:, None], mask=inside, other=0)
        tl.store(u + (first + m)[:, None] * ranks + r[None, :], a.to(tl.float32), mask=inside)


@triton.jit
def expand_ranks(total, u, data, b_at, stride, rank, scale, first, count, column, inside, splits, u_rows, u_sites, site,
                 ranks, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, AT_ONCE: tl.constexpr, WIDE: tl.constexpr,
                 EARLY: tl.constexpr):  # fmt: skip
    """total + s u B over all ranks, `BLOCK_R` of them at a time; `AT_ONCE` partial sums of u are read at a time."""
    m, s = tl.arange(0, BLOCK_M), tl.arange(0, AT_ONCE)
    for r0 in range(0, rank, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        b = tl.load(data + b_at + r[:, None] * stride + column[None, :], mask=(r < rank)[:, None] & inside[None, :],
                    other=0)  # fmt: skip
        if EARLY:
            tl.extra.cuda.gdc_wait()
        weight = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        there = (m < count)[:, None] & (r < rank)[None, :]
        for s0 in range(0, splits, AT_ONCE):
            split = (s0 + s).to(tl.int64)[:, None]
            place = ((split * u_rows + first + m[None, :]) * u_sites + site) * ranks
            part = tl.load(u + place[:, :, None] + r[None, None, :],
                           mask=there[None, :, :] & (s0 + s < splits)[:, None, None], other=0)  # fmt: skip
            weight += tl.sum(part, 0)
        weight *= scale
        if WIDE:
            total = product(weight, b, total, WIDE)
        else:  # fp32 in two bf16 parts: what is lost is beyond the 16th bit
            high = weight.to(b.dtype)
            total = product(high, b, total, WIDE)
            total = product((weight - high.to(tl.float32)).to(b.dtype), b, total, WIDE)
    return total


@triton.jit(do_not_specialize=["first_site", "u_rows", "splits"])
def expand_kernel(y, u, data, tiles, entries, rows, first_site, all_sites, ldy, u_rows, ranks, splits,
                  N_SITES: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
                  BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SMALL_R: tl.constexpr, BLOCK_R: tl.constexpr,
                  AT_ONCE: tl.constexpr, WIDE: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    """y[row p, columns of the site] += s B^T u[p], the sum over all partial sums: one block of columns, all ranks."""
    tile, block = tl.program_id(1), tl.program_id(0)
    first_1, first_2 = (D0 + BLOCK_N - 1) // BLOCK_N, (D0 + BLOCK_N - 1) // BLOCK_N + (D1 + BLOCK_N - 1) // BLOCK_N
    site = (block >= first_1).to(tl.int32) + (block >= first_2).to(tl.int32)
    width = tl.where(site == 0, D0, tl.where(site == 1, D1, D2))
    begun = tl.where(site == 0, 0, tl.where(site == 1, first_1, first_2))
    offset = tl.where(site == 0, 0, tl.where(site == 1, D0, D0 + D1))
    entry = entry_of(entries, tile, first_site + site, all_sites)
    first, count = tl.load(tiles + tile * 4), tl.load(tiles + tile * 4 + 1).to(tl.int32)
    b_at, stride = tl.multiple_of(tl.load(entry + 1), 16), tl.multiple_of(tl.load(entry + 3), 16)
    rank = tl.load(entry + 4).to(tl.int32)
    scale = tl.load(entry + 5).to(tl.int32).to(tl.float32, bitcast=True)
    if (count == 0) | (rank == 0):
        return
    m = tl.arange(0, BLOCK_M)
    column = (block - begun) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < width
    row = tl.load(rows + first + m, mask=m < count, other=0)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if rank <= SMALL_R:
        total = expand_ranks(total, u, data, b_at, stride, rank, scale, first, count, column, inside, splits, u_rows,
                             N_SITES, site, ranks, BLOCK_M, SMALL_R, AT_ONCE, WIDE, EARLY)  # fmt: skip
    else:
        total = expand_ranks(total, u, data, b_at, stride, rank, scale, first, count, column, inside, splits, u_rows,
                             N_SITES, site, ranks, BLOCK_M, BLOCK_R, AT_ONCE, WIDE, EARLY)  # fmt: skip
    target = y + row[:, None] * ldy + (offset + column)[None, :]
    both = (m < count)[:, None] & inside[None, :]
    total += tl.load(target, mask=both, other=0).to(tl.float32)
    tl.store(target, total.to(y.dtype.element_ty), mask=both)


@triton.jit(do_not_specialize=["site", "offset"])
def scale_kernel(y, vectors, tiles, entries, rows, site, all_sites, ldy, offset, width, ELEMENTS: tl.constexpr,
                 BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """y = gain * y + shift for one site; `vectors` is the slab as fp32, of which an offset takes `ELEMENTS` each."""
    tile = tl.program_id(1)
    entry = entry_of(entries, tile, site, all_sites)
    first, count = tl.load(tiles + tile * 4), tl.load(tiles + tile * 4 + 1).to(tl.int32)
    gain, shift = tl.load(entry + 6), tl.load(entry + 7)
    if (count == 0) | ((gain < 0) & (shift < 0)):
        return
    m, column = tl.arange(0, BLOCK_M), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < width
    row = tl.load(rows + first + m, mask=m < count, other=0)
    target = y + row[:, None] * ldy + (offset + column)[None, :]
    both = (m < count)[:, None] & inside[None, :]
    value = tl.load(target, mask=both, other=0).to(tl.float32)
    if gain >= 0:
        value *= tl.load(vectors + gain // ELEMENTS + column, mask=inside, other=0)[None, :]
    if shift >= 0:
        value += tl.load(vectors + shift // ELEMENTS + column, mask=inside, other=0)[None, :]
    tl.store(target, value.to(y.dtype.element_ty), mask=both)


class Shrink(NamedTuple):
    """How `u` is computed. A stretch of `split_k` columns gives one partial sum."""

    few: bool
    block_r: int
    block_k: int
    split_k: int
    splits: int
    warps: int


@lru_cache(maxsize=1024)
def plan_shrink(tiles: int, block_m: int, sites: int, d_in: int, rank: int, wide: bool) -> Shrink:
    """By shape alone, so that a captured graph has one. Few stretches where tiles and sites are many already."""
    if block_m == DECODE_ROWS:
        block_k = 256
        while not wide and block_k < 1024 and tiles * sites * triton.cdiv(d_in, 2 * block_k) >= PROGRAMS:
            block_k *= 2
        while not wide and triton.cdiv(d_in, block_k) > SPLITS and block_k < 1024:
            block_k *= 2
        return Shrink(True, 16, block_k, block_k, triton.cdiv(d_in, block_k), 8 if block_k == 1024 else 4)
    block_r = RANKS_AT_ONCE[rank > RANKS_AT_ONCE[0]]
    programs = tiles * sites * triton.cdiv(rank, block_r)
    splits = 1
    while splits < 4 and programs * splits < PROGRAMS // 2 and d_in // (2 * splits) >= 512:
        splits *= 2
    block_k = 32 if wide else 64
    split_k = triton.cdiv(triton.cdiv(d_in, splits), block_k) * block_k
    return Shrink(False, block_r, block_k, split_k, triton.cdiv(d_in, split_k), 4)


@lru_cache(maxsize=1024)
def plan_expand(tiles: int, block_m: int, widths: tuple[int, ...], wide: bool) -> tuple[int, int]:
    """(columns of a program, warps), by shape alone."""
    if block_m != DECODE_ROWS:
        return (64, 4) if wide else (128, 4)
    columns = 64
    while not wide and columns < 256 and tiles * sum(triton.cdiv(d, 2 * columns) for d in widths) >= PROGRAMS:
        columns *= 2
    return columns, 4 if columns == 256 else 2


@lru_cache(maxsize=4096)
def widths_of(group: SiteGroup) -> tuple[int, ...]:
    """d_out of each site. Raises ValueError where sites do not stand one behind the other, in the table and in y."""
    widths = tuple(site.d_out for site in group.sites)
    indices = [site.index - group.sites[0].index for site in group.sites]
    if indices != list(range(len(widths))) or list(group.offsets) != [sum(widths[:i]) for i in indices]:
        raise ValueError(f"sites {group.sites} at columns {group.offsets}; expected neighbours, without gaps")
    if len(widths) > SITES:
        raise ValueError(f"a product of {len(widths)} sites; expected at most {SITES}")
    return widths


def lowrank_add(y: Tensor, x: Tensor, slab: Slab, group: SiteGroup, tables: DeviceSegments) -> Tensor:
    """Add s B A x into y [T, group.d_out] for the rows of each segment; x [T, d_in]. Both are bf16 or fp32 and dense in
    their last dimension; y may be x."""
    _check("lowrank_add", x, y)
    tiles, widths = len(tables.tiles), widths_of(group)
    if tiles == 0 or tables.max_rank == 0:
        return y
    wide = torch.float32 in (x.dtype, slab.data.dtype)
    plan = plan_shrink(tiles, tables.block_m, len(widths), group.d_in, tables.max_rank, wide)
    ranks = triton.cdiv(tables.max_rank, 16) * 16
    u = torch.empty((plan.splits, len(tables.rows), len(widths), ranks), dtype=torch.float32, device=x.device)
    where = (slab.data, tables.tiles, tables.entries, tables.rows, group.sites[0].index, tables.entries.shape[1])
    sizes = (x.stride(0), len(tables.rows), ranks)
    if plan.few:
        shrink_few_kernel[(len(widths) * plan.splits, tiles)](
            u, x, *where, *sizes, group.d_in, len(widths), tables.block_m, plan.block_r, plan.block_k, FEW, wide,
            EARLY_LAUNCH, num_warps=plan.warps, **_early(),
        )  # fmt: skip
    else:
        blocks = triton.cdiv(tables.max_rank, plan.block_r)
        shrink_many_kernel[(len(widths) * plan.splits * blocks, tiles)](
            u, x, *where, *sizes, plan.splits, plan.split_k, group.d_in, len(widths), tables.block_m, plan.block_r,
            plan.block_k, wide, num_warps=plan.warps, num_stages=4,
        )  # fmt: skip
    expand(y, u, slab, group.sites[0].index, widths, tables)
    return y


def expand(y: Tensor, u: Tensor, slab: Slab, first_site: int, widths: tuple[int, ...], tables: DeviceSegments) -> None:
    """Add s B^T u into y [T, sum of widths]; u [splits, rows, sites, ranks] fp32 is summed over its splits."""
    tiles, splits = len(tables.tiles), u.shape[0]
    few = tables.block_m == DECODE_ROWS
    wide = torch.float32 in (y.dtype, slab.data.dtype)
    columns, warps = plan_expand(tiles, tables.block_m, widths, wide)
    blocks = sum(triton.cdiv(width, columns) for width in widths)
    block_r = 32 if few else RANKS_AT_ONCE[u.shape[3] > RANKS_AT_ONCE[0]]
    at_once = 1 if splits == 1 or not few else 4 if splits <= 4 else 16
    expand_kernel[(blocks, tiles)](
        y, u, slab.data, tables.tiles, tables.entries, tables.rows, first_site, tables.entries.shape[1], y.stride(0),
        u.shape[1], u.shape[3], splits, len(widths), *widths, *[0] * (SITES - len(widths)), tables.block_m, columns, 16,
        block_r, at_once, wide, EARLY_LAUNCH and few,
        num_warps=warps, num_stages=2, **(_early() if few else {}),
    )  # fmt: skip


def embedding_add(x: Tensor, tokens: Tensor, slab: Slab, site: int, tables: DeviceSegments) -> Tensor:
    """Add s B A e into x [T, hidden] for the rows of each segment, e the unit vector of the row's token [T]."""
    _check("embedding_add", x)
    if len(tables.tiles) == 0 or tables.max_rank == 0:
        return x
    ranks = triton.cdiv(tables.max_rank, 16) * 16
    u = torch.empty((1, len(tables.rows), 1, ranks), dtype=torch.float32, device=x.device)
    shrink_tokens_kernel[(len(tables.tiles),)](
        u, tokens, slab.data, tables.tiles, tables.entries, tables.rows, site, tables.entries.shape[1], ranks,
        tables.block_m, 16,
    )  # fmt: skip
    expand(x, u, slab, site, (x.shape[1],), tables)
    return x


def output_scale(y: Tensor, slab: Slab, group: SiteGroup, tables: DeviceSegments) -> Tensor:
    """gain * y + shift for the rows of each segment, in fp32, rounded once; y [T, group.d_out] bf16 or fp32."""
    _check("output_scale", y)
    if len(tables.tiles) == 0:
        return y
    elements = 4 // slab.data.itemsize
    vectors = slab.data[: len(slab.data) // elements * elements].view(torch.float32)
    columns = 256 if tables.block_m == DECODE_ROWS else 128
    for site, offset in zip(group.sites, group.offsets, strict=True):
        scale_kernel[(triton.cdiv(site.d_out, columns), len(tables.tiles))](
            y, vectors, tables.tiles, tables.entries, tables.rows, site.index, tables.entries.shape[1], y.stride(0),
            offset, site.d_out, elements, tables.block_m, columns,
        )  # fmt: skip
    return y


def compile_products(slab: Slab, groups: Iterable[SiteGroup], dtype: torch.dtype) -> None:
    """Compile (or load, where that was done before) the kernels for these products in every size that a batch may
    choose, so that no request waits for it."""
    kinds = {(group.d_in, widths_of(group)): group for group in groups}.values()
    shapes = [(DECODE_ROWS, 2**i, 16) for i in range(10)] + [(PROMPT_ROWS, 1, rank) for rank in RANKS_AT_ONCE]
    for block_m, tiles, rank in shapes:
        tables = DeviceSegments(slab, block_m, tiles, block_m, rank)
        for group in kinds:
            x = torch.zeros((1, group.d_in), dtype=dtype, device=slab.data.device)
            lowrank_add(x.new_zeros((1, group.d_out)), x, slab, group, tables)


def _early() -> dict[str, bool]:
    return {"launch_pdl": True} if EARLY_LAUNCH else {}


def _check(kernel: str, *tensors: Tensor) -> None:
    for tensor in tensors:
        if tensor.dtype not in (torch.bfloat16, torch.float32) or tensor.stride(1) != 1:
            raise ValueError(
                f"{kernel}: found {tensor.dtype} with strides {tensor.stride()}; expected bfloat16 or float32 in rows "
                "that are dense"
            )
