"""`y += s B A x` for a batch of adapters on a GPU, at their true ranks: two launches for all sites of a product.

*Shrink* writes `u = A x` in fp32, in as many partial sums over stretches of d_in as it takes to fill the device with
programs; *expand* adds these up, multiplies by s B and adds the result into y, rounded once. Each program takes the
rows of one tile (`gpu_tables`) and one site, and leaves at once where the tile is empty or the adapter has nothing.

With few rows the time is that of reading A and B, each once for up to 16 rows, along d. Each program is one loop over
blocks of 8 KB, whatever the rank, so that the compiler keeps several of them under way to shared memory, and little
else; matrix units multiply from there, their padding to 16 rows costs no time. With many rows tiles have 64.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from itertools import product as product_of
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorikeet.kernels.batch import Slab
from lorikeet.kernels.gpu_tables import DECODE_ROWS, PROMPT_ROWS, DeviceSegments
from lorikeet.types import SiteGroup

PROGRAMS = 256  # that keep a large device reading: about two to a multiprocessor
MOST_SPLITS = {DECODE_ROWS: 16, PROMPT_ROWS: 4}  # partial sums, by the rows of a tile
RANKS_AT_ONCE = (16, 64)  # of a product with many rows, by the highest rank in the batch
SITES = 3  # of a group, at most
MOST_TILES = 512  # that kernels are compiled for ahead of time: more take what these take
EARLY_LAUNCH = False  # let decode kernels find their place before the one in front of them has ended (Hopper and later)
FIELDS = tl.constexpr(8)  # of an entry's line
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def entry_of(entries, tile, site, all_sites):
    """Where the line of a site of a tile's adapter is."""
    return entries + (tile.to(tl.int64) * all_sites + site) * FIELDS


@triton.jit
def sixteens(rank):
    """How many ranks of u there are: it is written in whole sixteens, with zeros behind the last, and read so too."""
    return (rank + 15) // 16 * 16


@triton.jit
def product(x, y, total, WIDE: tl.constexpr):
    """total + x y: in bf16 on matrix units, or in fp32 without a loss where one of the tensors at hand is fp32.

    The interpreter has no products in bf16; those in fp32 of values that were rounded to bf16 are the same.
    """
    if WIDE or INTERPRETED:
        return tl.dot(x.to(tl.float32), y.to(tl.float32), total, input_precision="ieee")
    return tl.dot(x, y, total)


@triton.jit(do_not_specialize=["first_site", "u_rows", "steps"])
def shrink_kernel(u, x, data, tiles, entries, rows, first_site, all_sites, ldx, u_rows, ranks, steps,
                  D_IN: tl.constexpr, N_SITES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
                  BLOCK_K: tl.constexpr, WIDE: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    """u[split, p, site, r] = A[r, columns of the split] x[row p], all ranks; a split has `steps` blocks of columns."""
    tile, site, split = tl.program_id(1), tl.program_id(0) % N_SITES, tl.program_id(0) // N_SITES
    entry = entry_of(entries, tile, first_site + site, all_sites)
    first, count = tl.load(tiles + tile * 4), tl.load(tiles + tile * 4 + 1).to(tl.int32)
    a_at, stride = tl.multiple_of(tl.load(entry), 16), tl.multiple_of(tl.load(entry + 2), 16)
    rank = tl.load(entry + 4).to(tl.int32)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    if (count == 0) | (rank == 0):
        return
    m = tl.arange(0, BLOCK_M)
    row = tl.load(rows + first + m, mask=m < count, other=0)
    place = ((split.to(tl.int64) * u_rows + first + m) * N_SITES + site) * ranks
    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    for i in range(0, tl.cdiv(rank, BLOCK_R) * steps):
        r = i // steps * BLOCK_R + tl.arange(0, BLOCK_R)
        k = (split * steps + i % steps) * BLOCK_K + tl.arange(0, BLOCK_K)
        a = tl.load(data + a_at + r[:, None] * stride + k[None, :], mask=(r < rank)[:, None] & (k < D_IN)[None, :],
                    other=0)  # fmt: skip
        some = tl.load(x + row[:, None] * ldx + k[None, :], mask=(m < count)[:, None] & (k < D_IN)[None, :], other=0)
        total = product(some, tl.trans(a), total, WIDE)
        if i % steps == steps - 1:
            tl.store(u + place[:, None] + r[None, :], total, mask=(m < count)[:, None] & (r < sixteens(rank))[None, :])
            total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)


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
        tl.store(u + (first + m)[:, None] * ranks + r[None, :], a.to(tl.float32), mask=(m < count)[:, None])


@triton.jit
def add_up(u, place, r, inside, splits, split_stride, SPLITS: tl.constexpr, AT_ONCE: tl.constexpr,
           BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr):  # fmt: skip
    """The sum [BLOCK_M, BLOCK_R] of the partial sums of u, of which `AT_ONCE` are read at a time."""
    s = tl.arange(0, AT_ONCE)
    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for s0 in tl.static_range(0, SPLITS, AT_ONCE):
        where = (s0 + s).to(tl.int64)[:, None, None] * split_stride + place[None, :, None] + r[None, None, :]
        part = tl.load(u + where, mask=inside[None, :, :] & (s0 + s < splits)[:, None, None], other=0)
        total += tl.sum(part, 0)
    return total


@triton.jit(do_not_specialize=["first_site", "u_rows", "splits", "steps"])
def expand_kernel(y, u, data, tiles, entries, rows, first_site, all_sites, ldy, u_rows, ranks, splits, steps,
                  N_SITES: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
                  BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, SPLITS: tl.constexpr,
                  AT_ONCE: tl.constexpr, WIDE: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    """y[row p, columns of the site] += s B^T u[p], all ranks of `steps` blocks of columns."""
    tile, chunk = tl.program_id(1), tl.program_id(0)
    first_1 = tl.cdiv(D0, BLOCK_N * steps)
    first_2 = first_1 + tl.cdiv(D1, BLOCK_N * steps)
    site = (chunk >= first_1).to(tl.int32) + (chunk >= first_2).to(tl.int32)
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
    row = tl.load(rows + first + m, mask=m < count, other=0)
    place, split_stride = ((first + m) * N_SITES + site) * ranks, u_rows.to(tl.int64) * N_SITES * ranks
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    blocks = tl.cdiv(rank, BLOCK_R)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    for i in range(0, blocks * steps):
        r = i % blocks * BLOCK_R + tl.arange(0, BLOCK_R)
        column = ((chunk - begun) * steps + i // blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = column < width
        b = tl.load(data + b_at + r[:, None] * stride + column[None, :], mask=(r < rank)[:, None] & inside[None, :],
                    other=0)  # fmt: skip
        weight = scale * add_up(u, place, r, (m < count)[:, None] & (r < sixteens(rank))[None, :], splits,
                                split_stride, SPLITS, AT_ONCE, BLOCK_M, BLOCK_R)  # fmt: skip
        if WIDE:
            total = product(weight, b, total, WIDE)
        else:  # fp32 in two bf16 parts: what is lost is beyond the 16th bit
            high = weight.to(b.dtype)
            total = product(high, b, total, WIDE)
            total = product((weight - high.to(tl.float32)).to(b.dtype), b, total, WIDE)
        if i % blocks == blocks - 1:
            target = y + row[:, None] * ldy + (offset + column)[None, :]
            both = (m < count)[:, None] & inside[None, :]
            total += tl.load(target, mask=both, other=0).to(tl.float32)
            tl.store(target, total.to(y.dtype.element_ty), mask=both)
            total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)


@triton.jit(do_not_specialize=["site"])
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
    """How `u` is computed: each of `splits` partial sums over `steps` blocks of `block_k` columns."""

    block_r: int
    block_k: int
    steps: int
    splits: int
    warps: int
    stages: int


class Expand(NamedTuple):
    """How y is: a program takes `steps` blocks of `block_n` columns, `block_r` ranks at a time."""

    block_r: int
    block_n: int
    steps: int
    warps: int
    stages: int


@lru_cache(maxsize=4096)
def plan_shrink(tiles: int, block_m: int, sites: int, d_in: int, rank: int, wide: bool) -> Shrink:
    """By shape alone, so that a captured graph has one: long stretches where tiles and sites are many already."""
    few = block_m == DECODE_ROWS
    block_k = (256 if few else 64) // (2 if wide else 1)
    blocks: int = triton.cdiv(d_in, block_k)
    steps = triton.next_power_of_2(blocks)
    while steps > 1 and tiles * sites * triton.cdiv(blocks, steps) < PROGRAMS:
        if triton.cdiv(blocks, steps // 2) > MOST_SPLITS[block_m]:
            break
        steps //= 2
    block_r = RANKS_AT_ONCE[not few and rank > RANKS_AT_ONCE[0]]
    return Shrink(block_r, block_k, steps, triton.cdiv(blocks, steps), 2 if few else 4, 4)


@lru_cache(maxsize=4096)
def plan_expand(tiles: int, block_m: int, widths: tuple[int, ...], rank: int, wide: bool) -> Expand:
    """By shape alone. Short programs where tiles are few, so that there are enough of them."""
    if block_m != DECODE_ROWS:
        return Expand(16 if rank <= RANKS_AT_ONCE[0] else 32, 64 if wide else 128, 1, 4, 2)

    def programs(columns: int) -> int:
        return sum(tiles * -(-width // columns) for width in widths)

    block_n, steps = 128 if wide else 256, 4
    while steps > 1 and programs(block_n * steps) < PROGRAMS:
        steps //= 2
    while block_n > 64 and programs(block_n * steps) < PROGRAMS:
        block_n //= 2
    return Expand(16, block_n, steps, 4 if block_n == 256 else 2, 4)


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
    ranks, first_site, early = triton.cdiv(tables.max_rank, 16) * 16, group.sites[0].index, _early(tables)
    u = torch.empty((plan.splits, len(tables.rows), len(widths), ranks), dtype=torch.float32, device=x.device)
    shrink_kernel[(len(widths) * plan.splits, tiles)](
        u, x, slab.data, tables.tiles, tables.entries, tables.rows, first_site, tables.entries.shape[1], x.stride(0),
        u.shape[1], ranks, plan.steps, group.d_in, len(widths), tables.block_m, plan.block_r, plan.block_k, wide,
        bool(early), num_warps=plan.warps, num_stages=plan.stages, **early,
    )  # fmt: skip
    expand(y, u, slab, first_site, widths, tables)
    return y


def expand(y: Tensor, u: Tensor, slab: Slab, first_site: int, widths: tuple[int, ...], tables: DeviceSegments) -> None:
    """Add s B^T u into y [T, sum of widths]; u [splits, rows, sites, ranks] fp32 is summed over its splits."""
    tiles, splits, early = len(tables.tiles), u.shape[0], _early(tables)
    wide = torch.float32 in (y.dtype, slab.data.dtype)
    plan = plan_expand(tiles, tables.block_m, widths, u.shape[3], wide)
    chunks = sum(triton.cdiv(width, plan.block_n * plan.steps) for width in widths)
    at_once = min(triton.next_power_of_2(splits), 16) if tables.block_m == DECODE_ROWS else 1
    expand_kernel[(chunks, tiles)](
        y, u, slab.data, tables.tiles, tables.entries, tables.rows, first_site, tables.entries.shape[1], y.stride(0),
        u.shape[1], u.shape[3], splits, plan.steps, len(widths), *widths, *[0] * (SITES - len(widths)), tables.block_m,
        plan.block_n, plan.block_r, triton.next_power_of_2(splits), at_once, wide, bool(early),
        num_warps=plan.warps, num_stages=plan.stages, **early,
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
    kinds = {(group.d_in, widths_of(group)): group for group in groups}
    wide, seen = torch.float32 in (dtype, slab.data.dtype), set()
    for block_m, rank, tiles in product_of((DECODE_ROWS, PROMPT_ROWS), RANKS_AT_ONCE, range(1, MOST_TILES + 1)):
        for (d_in, widths), group in kinds.items():
            plans = (
                plan_shrink(tiles, block_m, len(widths), d_in, rank, wide),
                plan_expand(tiles, block_m, widths, rank, wide),
            )
            if (d_in, widths, *plans) not in seen:
                seen.add((d_in, widths, *plans))
                x = torch.zeros((1, d_in), dtype=dtype, device=slab.data.device)
                tables = DeviceSegments(slab, block_m, tiles, block_m, rank)
                lowrank_add(x.new_zeros((1, group.d_out)), x, slab, group, tables)


def _early(tables: DeviceSegments) -> dict[str, bool]:
    return {"launch_pdl": True} if EARLY_LAUNCH and tables.block_m == DECODE_ROWS else {}


def _check(kernel: str, *tensors: Tensor) -> None:
    for tensor in tensors:
        if tensor.dtype not in (torch.bfloat16, torch.float32) or tensor.stride(1) != 1:
            raise ValueError(
                f"{kernel}: found {tensor.dtype} with strides {tensor.stride()}; expected bfloat16 or float32 in rows "
                "that are dense"
            )
