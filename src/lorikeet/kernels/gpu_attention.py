"""Attention over the paged cache on a GPU: decode rows, prefill chunks and any mix of them, of any lengths.

The rows of a sequence and a kv head are flat: row r is head `r % group` of query `r // group`, so that a group's heads
share each read of a key. Few rows (decode) are bound by reading the cache: such a sequence is cut by its keys into
pieces that fill the device, and a second kernel puts them together (Dao et al., Flash-Decoding, 2023). Many rows
(prefill) are bound by products: they are cut into tiles of rows (Dao, FlashAttention-2, 2023).

Which pieces and tiles there are is written by a small kernel, once a batch (`AttentionWork`), from lengths that lie on
the device. Every grid depends on capacities alone, and programs without work end at once: one captured graph serves
whatever lengths its buffers hold. Sequences without queries are skipped, those without keys get zeros.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache as remember

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorikeet.kernels.batch import Batch, LayerCache
from lorikeet.kernels.gpu_rows import check_cache, check_rows, next_power

SHORT_ROWS = 16  # rows of a tensor core's smallest product: a sequence with more of them is not short
SHORT_KEYS = 64  # keys of one step over a short sequence
PIECE_KEYS = 256  # a piece is at least as long, or writing and reading its result back would show
PIECES_PER_PROCESSOR = 4  # wanted over all kv heads; at 2 resident at a time no processor waits long for the last
LONG_ROWS = 128
LONG_KEYS = 64
FIELDS = tl.constexpr(8)  # int32 numbers that describe one piece or tile
EVERYTHING = 1 << 30  # a window that hides nothing
MINUS_INFINITY = tl.constexpr(float("-inf"))


@triton.jit(do_not_specialize=["sequences"])
def work_kernel(QUERY_START, KV_LEN, PIECES, FIRST_PIECE, TILES, COUNTS, sequences, group, window, wanted,
                SHORT: tl.constexpr, KEYS: tl.constexpr, PIECE: tl.constexpr, ROWS: tl.constexpr,
                LISTS_LONG: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Lists the pieces of short sequences and the tiles of long ones, each in `FIELDS` numbers, and counts them.

    A piece: sequence, its first query in the batch, rows, position of that query, first key, end of the keys, whether
    it is the only one. A tile: the first four, the tile's first row. `wanted`: how many pieces would fill the device.
    """
    b = tl.arange(0, WIDTH)
    known = b < sequences
    start = tl.load(QUERY_START + b, mask=known, other=0)
    queries = tl.load(QUERY_START + b + 1, mask=known, other=0) - start
    length = tl.load(KV_LEN + b, mask=known, other=0)
    rows, position = queries * group, length - queries
    is_short = (rows > 0) & (rows <= SHORT)
    begin = tl.maximum(position - window + 1, 0)
    keys = tl.where(is_short, tl.maximum(length - begin, 0), 0)

    share = tl.maximum(tl.cdiv(tl.sum(keys, 0), wanted), PIECE)
    pieces = tl.cdiv(keys, share)
    each = tl.cdiv(tl.cdiv(keys, tl.maximum(pieces, 1)), KEYS) * KEYS  # even pieces
    pieces = tl.cdiv(keys, tl.maximum(each, 1))
    ends = tl.cumsum(pieces, 0)
    first = ends - pieces
    tl.store(FIRST_PIECE + b, first, mask=known)
    tl.store(FIRST_PIECE + sequences, tl.sum(pieces, 0))
    tl.store(COUNTS, tl.sum(pieces, 0))
    for j in range(0, tl.max(pieces, 0)):
        record = PIECES + (first + j) * FIELDS
        mine = j < pieces
        tl.store(record, b, mask=mine)
        tl.store(record + 1, start, mask=mine)
        tl.store(record + 2, rows, mask=mine)
        tl.store(record + 3, position, mask=mine)
        tl.store(record + 4, begin + j * each, mask=mine)
        tl.store(record + 5, tl.minimum(begin + (j + 1) * each, length), mask=mine)
        tl.store(record + 6, (pieces == 1).to(tl.int32), mask=mine)

    if LISTS_LONG:
        tiles = tl.where(rows > SHORT, tl.cdiv(rows, ROWS), 0)
        first = tl.cumsum(tiles, 0) - tiles
        tl.store(COUNTS + 1, tl.sum(tiles, 0))
        for j in range(0, tl.max(tiles, 0)):
            record = TILES + (first + j) * FIELDS
            mine = j < tiles
            tl.store(record, b, mask=mine)
            tl.store(record + 1, start, mask=mine)
            tl.store(record + 2, rows, mask=mine)
            tl.store(record + 3, position, mask=mine)
            tl.store(record + 4, (tiles - 1 - j) * ROWS, mask=mine)  # the longest first


@triton.jit
def blocks_of(TABLE, key, end, BLOCK: tl.constexpr, KEYS: tl.constexpr, PAGED: tl.constexpr):
    """Where the keys [key, key + KEYS) are: read one step before they are, so that no read waits for another."""
    keys = key + tl.arange(0, KEYS)
    if PAGED:
        return tl.load(TABLE + keys // BLOCK, mask=keys < end, other=0)
    return keys


@triton.jit
def take_keys(
    q, largest, weight, total, seen, from_key, key, end, block, scale, K, V, k_block, k_slot, v_block, v_slot,
    at, inside_head, BLOCK: tl.constexpr, KEYS: tl.constexpr, PAGED: tl.constexpr, MASKED: tl.constexpr,
    ALL_OF_HEAD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over the keys [key, key + KEYS) of a sequence, of which those before `end` exist.

    A row sees the keys [from_key, seen]; MASKED: not every row sees all of them. In base 2, with `scale` for that.
    """
    keys = key + tl.arange(0, KEYS)
    if PAGED:
        block = block.to(tl.int64)
        k_row, v_row = block * k_block + keys % BLOCK * k_slot, block * v_block + keys % BLOCK * v_slot
    else:
        k_row, v_row = keys.to(tl.int64) * k_slot, keys.to(tl.int64) * v_slot
    k_at, v_at = K + k_row[:, None] + at[None, :], V + v_row[:, None] + at[None, :]
    if MASKED or not ALL_OF_HEAD:
        there = (keys < end)[:, None] & inside_head[None, :]
        k, v = tl.load(k_at, mask=there, other=0.0), tl.load(v_at, mask=there, other=0.0)
    else:
        k, v = tl.load(k_at), tl.load(v_at)
    if WIDE:
        scores = tl.dot(q, tl.trans(k.to(tl.float32)), input_precision="ieee") * scale
    else:
        scores = tl.dot(q, tl.trans(k.to(q.dtype))) * scale
    if MASKED:
        visible = (keys[None, :] <= seen[:, None]) & (keys[None, :] >= from_key[:, None])
        scores = tl.where(visible, scores, MINUS_INFINITY)
    new_largest = tl.maximum(largest, tl.max(scores, 1))
    base = new_largest
    if MASKED:  # a row may have seen nothing yet
        base = tl.where(new_largest == MINUS_INFINITY, 0.0, new_largest)
    weights = tl.exp2(scores - base[:, None])
    kept = tl.exp2(largest - base)
    weight = weight * kept + tl.sum(weights, 1)
    total = total * kept[:, None]
    if WIDE:
        total = tl.dot(weights, v.to(tl.float32), total, input_precision="ieee")
    else:
        total = tl.dot(weights.to(q.dtype), v.to(q.dtype), total)
    return new_largest, weight, total


@triton.jit(do_not_specialize=["ldt", "part_rows"])
def short_kernel(
    Q, K, V, TABLE, OUT, PIECES, COUNTS, PARTS, LOGS, K_SCALE, V_SCALE, ldq, ldt, group, kv_heads, d, part_rows, window,
    scale, k_block, k_slot, k_head, v_block, v_slot, v_head,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, ALL_OF_HEAD: tl.constexpr,
    SCALED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One piece of one kv head: its result goes to OUT if it is the sequence's only piece, else to PARTS with the
    logarithm of its weight."""
    h, piece = tl.program_id(0), tl.program_id(1)
    if piece >= tl.load(COUNTS):
        return
    record = PIECES + piece * FIELDS
    b, start, rows, position = tl.load(record), tl.load(record + 1), tl.load(record + 2), tl.load(record + 3)
    begin, end, alone = tl.load(record + 4), tl.load(record + 5), tl.load(record + 6)
    row, at = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    inside_head = at < d
    inside = (row < rows)[:, None] & inside_head[None, :]
    place = (start + row // group).to(tl.int64)
    head = h * group + row % group
    q = tl.load(Q + place[:, None] * ldq + head[:, None] * d + at[None, :], mask=inside, other=0)
    if WIDE:
        q = q.to(tl.float32)
    if SCALED:
        scale = scale * tl.load(K_SCALE + h)
    seen = position + row // group
    largest = tl.full([ROWS], MINUS_INFINITY, tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    table = TABLE + b.to(tl.int64) * ldt
    block = blocks_of(table, begin, end, BLOCK, KEYS, True)
    for key in range(begin, end, KEYS):
        next_block = blocks_of(table, key + KEYS, end, BLOCK, KEYS, True)
        largest, weight, total = take_keys(
            q, largest, weight, total, seen, seen - window + 1, key, end, block, scale, K + h * k_head, V + h * v_head,
            k_block, k_slot, v_block, v_slot, at, inside_head, BLOCK, KEYS, True, True, ALL_OF_HEAD, WIDE,
        )  # fmt: skip
        block = next_block
    total = total / tl.where(weight == 0, 1.0, weight)[:, None]  # 0: a row that sees none of this piece
    if SCALED:
        total = total * tl.load(V_SCALE + h)
    if alone != 0:
        target = OUT + (place * kv_heads * group + head)[:, None] * d + at[None, :]
        tl.store(target, total.to(OUT.dtype.element_ty), mask=inside)
    else:
        part = (piece.to(tl.int64) * kv_heads + h) * part_rows + row
        log = tl.where(weight == 0, MINUS_INFINITY, largest + tl.log2(tl.where(weight == 0, 1.0, weight)))
        tl.store(PARTS + part[:, None] * d + at[None, :], total, mask=inside)
        tl.store(LOGS + part, log, mask=row < rows)


@triton.jit(do_not_specialize=["part_rows"])
def combine_kernel(OUT, QUERY_START, FIRST_PIECE, PARTS, LOGS, group, kv_heads, d, part_rows, short,
                   PIECES: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """One kv head of one sequence: the mean of its pieces' results by their weights, `PIECES` of them at a time."""
    h, b = tl.program_id(0), tl.program_id(1)
    start = tl.load(QUERY_START + b)
    rows = (tl.load(QUERY_START + b + 1) - start) * group
    first, end = tl.load(FIRST_PIECE + b), tl.load(FIRST_PIECE + b + 1)
    if (rows == 0) | (rows > short) | (end - first == 1):
        return
    row, at = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    largest = tl.full([ROWS], MINUS_INFINITY, tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for piece in range(first, end, PIECES):
        pieces = piece + tl.arange(0, PIECES)
        part = ((pieces.to(tl.int64) * kv_heads + h) * part_rows)[:, None] + row[None, :]
        there = (pieces < end)[:, None] & (row < rows)[None, :]
        log = tl.load(LOGS + part, mask=there, other=MINUS_INFINITY)
        inside = there[:, :, None] & (at < d)[None, None, :]
        results = tl.load(PARTS + part[:, :, None] * d + at[None, None, :], mask=inside, other=0)
        new_largest = tl.maximum(largest, tl.max(log, 0))
        base = tl.where(new_largest == MINUS_INFINITY, 0.0, new_largest)
        weights, kept = tl.exp2(log - base[None, :]), tl.exp2(largest - base)
        weight = weight * kept + tl.sum(weights, 0)
        total = total * kept[:, None] + tl.sum(results * weights[:, :, None], 0)
        largest = new_largest
    total = total / tl.where(weight == 0, 1.0, weight)[:, None]
    place = (start + row // group).to(tl.int64) * kv_heads * group + h * group + row % group
    target = OUT + place[:, None] * d + at[None, :]
    tl.store(target, total.to(OUT.dtype.element_ty), mask=(row < rows)[:, None] & (at < d)[None, :])


@triton.jit(do_not_specialize=["ldt"])
def long_kernel(
    Q, K, V, TABLE, OUT, TILES, COUNTS, K_SCALE, V_SCALE, ldq, ldt, group, kv_heads, d, window, scale,
    k_block, k_slot, k_head, v_block, v_slot, v_head,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, ALL_OF_HEAD: tl.constexpr,
    PAGED: tl.constexpr, WINDOWED: tl.constexpr, SCALED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One tile of rows of one kv head. Only keys that some of its rows do not see are compared with positions."""
    h, tile = tl.program_id(0), tl.program_id(1)
    if tile >= tl.load(COUNTS + 1):
        return
    record = TILES + tile * FIELDS
    b, start, rows, position = tl.load(record), tl.load(record + 1), tl.load(record + 2), tl.load(record + 3)
    flat = tl.load(record + 4)
    row, at = flat + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    inside_head = at < d
    inside = (row < rows)[:, None] & inside_head[None, :]
    place = (start + row // group).to(tl.int64)
    head = h * group + row % group
    q = tl.load(Q + place[:, None] * ldq + head[:, None] * d + at[None, :], mask=inside, other=0)
    if WIDE:
        q = q.to(tl.float32)
    if SCALED:
        scale = scale * tl.load(K_SCALE + h)
    first_seen = position + flat // group  # by the tile's first row; the last one's:
    last_seen = position + (tl.minimum(flat + ROWS, rows) - 1) // group
    seen = tl.minimum(position + row // group, last_seen)
    k, v, table = K + h * k_head, V + h * v_head, TABLE
    if PAGED:
        table = TABLE + b.to(tl.int64) * ldt
    else:
        k, v = k + start.to(tl.int64) * k_slot, v + start.to(tl.int64) * v_slot
    end = last_seen + 1
    begin = tl.maximum(first_seen - window + 1, 0) if WINDOWED else 0
    largest = tl.full([ROWS], MINUS_INFINITY, tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    low = begin
    block = blocks_of(table, begin, end, BLOCK, KEYS, PAGED)
    if WINDOWED:
        all_see = tl.maximum(last_seen - window + 1, 0)
        low = tl.minimum(begin + tl.cdiv(tl.maximum(all_see - begin, 0), KEYS) * KEYS, end)
        for key in range(begin, low, KEYS):
            next_block = blocks_of(table, key + KEYS, end, BLOCK, KEYS, PAGED)
            largest, weight, total = take_keys(
                q, largest, weight, total, seen, seen - window + 1, key, end, block, scale, k, v,
                k_block, k_slot, v_block, v_slot, at, inside_head, BLOCK, KEYS, PAGED, True, ALL_OF_HEAD, WIDE,
            )  # fmt: skip
            block = next_block
    high = low + tl.maximum(first_seen + 1 - low, 0) // KEYS * KEYS
    for key in range(low, high, KEYS):
        next_block = blocks_of(table, key + KEYS, end, BLOCK, KEYS, PAGED)
        largest, weight, total = take_keys(
            q, largest, weight, total, seen, seen, key, end, block, scale, k, v,
            k_block, k_slot, v_block, v_slot, at, inside_head, BLOCK, KEYS, PAGED, False, ALL_OF_HEAD, WIDE,
        )  # fmt: skip
        block = next_block
    for key in range(high, end, KEYS):
        next_block = blocks_of(table, key + KEYS, end, BLOCK, KEYS, PAGED)
        largest, weight, total = take_keys(
            q, largest, weight, total, seen, seen - window + 1, key, end, block, scale, k, v,
            k_block, k_slot, v_block, v_slot, at, inside_head, BLOCK, KEYS, PAGED, True, ALL_OF_HEAD, WIDE,
        )  # fmt: skip
        block = next_block
    total = total / tl.where(weight == 0, 1.0, weight)[:, None]
    if SCALED:
        total = total * tl.load(V_SCALE + h)
    target = OUT + (place * kv_heads * group + head)[:, None] * d + at[None, :]
    tl.store(target, total.to(OUT.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True)
class Tuning:
    """Sizes of the kernels' tiles: reasoned, never measured. `benchmarks/gpu_attention.py --tune` tries others."""

    short_keys: int = SHORT_KEYS
    short_warps: int = 4
    short_stages: int = 3
    piece_keys: int = PIECE_KEYS
    pieces_per_processor: int = PIECES_PER_PROCESSOR
    long_rows: int = LONG_ROWS
    long_keys: int = LONG_KEYS
    long_warps: int = 8
    long_stages: int = 3


HALVES = Tuning()
FLOATS = Tuning(
    short_keys=32, short_stages=3, long_rows=32, long_keys=16, long_warps=4, long_stages=2
)  # no matrix units


def tuning_of(q: Tensor) -> Tuning:
    """The sizes for queries of this dtype."""
    return FLOATS if q.dtype == torch.float32 else HALVES


class AttentionWork:
    """What there is to do for one batch, one window and one shape of heads, listed on the device: all layers share it.

    Made anew for every forward pass, since the batch's buffers may hold other lengths than before.
    """

    def __init__(self, batch: Batch, heads: tuple[int, int, int], window: int | None, tuning: Tuning) -> None:
        for name in ("query_start", "kv_len", "block_table"):
            tensor = getattr(batch, name)
            if tensor is not None and (tensor.dtype != torch.int32 or tensor.stride(-1) != 1):
                raise ValueError(f"{name} is {tensor.dtype} with strides {tensor.stride()}, expected dense torch.int32")
        self.batch, self.heads, self.window, self.tuning = batch, heads, window, tuning
        n_heads, kv_heads, d = heads
        group, sequences, tokens = n_heads // kv_heads, len(batch.kv_len), len(batch.tokens)
        self.has_cache = batch.block_table is not None
        self.short = SHORT_ROWS if group <= SHORT_ROWS else next_power(group)
        if not self.has_cache:
            self.short = 0  # nothing is paged: all by rows
        self.any_short = self.has_cache
        self.any_long = batch.max_query * group > self.short
        wanted = max(tuning.pieces_per_processor * _processors(batch.kv_len.device) // kv_heads, 1)
        self.max_pieces = sequences + wanted if self.any_short else 0
        self.max_tiles = sequences + tokens * group // tuning.long_rows if self.any_long else 0
        self.part_rows = min(self.short, batch.max_query * group)
        device = batch.kv_len.device
        self.pieces = torch.empty(max(self.max_pieces, 1), FIELDS.value, dtype=torch.int32, device=device)
        self.tiles = torch.empty(max(self.max_tiles, 1), FIELDS.value, dtype=torch.int32, device=device)
        self.first_piece = torch.empty(sequences + 1, dtype=torch.int32, device=device)
        self.counts = torch.empty(2, dtype=torch.int32, device=device)
        self.parts = torch.empty(self.max_pieces * kv_heads * self.part_rows, d, device=device)
        self.logs = torch.empty(self.max_pieces * kv_heads * self.part_rows, device=device)
        width = max(next_power(sequences), 16)
        work_kernel[(1,)](
            batch.query_start, batch.kv_len, self.pieces, self.first_piece, self.tiles, self.counts, sequences, group,
            EVERYTHING if window is None else window, wanted, SHORT=self.short, KEYS=tuning.short_keys,
            PIECE=max(tuning.piece_keys, tuning.short_keys), ROWS=tuning.long_rows, LISTS_LONG=self.any_long,
            WIDTH=width, num_warps=min(max(width // 64, 1), 8),
        )  # fmt: skip


Attention = Callable[[Tensor, Tensor, Tensor, AttentionWork, LayerCache | None], Tensor]


def choose_attention(q: Tensor, cache: LayerCache | None) -> Attention:
    """The attention that was measured fastest for these queries and this cache.

    A library's kernels would be chosen here, by dtypes, head_dim and block size. torch's own do not read a paged cache,
    and `benchmarks/gpu_attention.py` shows them beside ours, so ours are the only ones so far.
    """
    return attention


def attention(q: Tensor, k: Tensor, v: Tensor, work: AttentionWork, cache: LayerCache | None) -> Tensor:
    """q [T, heads, head_dim] against the cache, which holds the batch's own keys and values already, or against k and
    v [T, kv_heads, head_dim] where there is none: [T, heads * head_dim].

    Rows of T that belong to no sequence are left as they are in memory.
    """
    check_rows("attention", q, k, v)
    (tokens, heads, d), kv_heads = q.shape, k.shape[1]
    if any(part.stride(1) != d for part in (q, k, v)):
        raise ValueError("attention: expected q, k and v with a token's heads dense behind one another")
    if (heads, kv_heads, d) != work.heads or (cache is None) == work.has_cache:
        raise ValueError(
            f"attention: the work was listed for (heads, kv_heads, head_dim) {work.heads} "
            f"{'with' if work.has_cache else 'without'} a cache, found {(heads, kv_heads, d)}"
        )
    if cache is not None:
        check_cache(q, cache)
    out = torch.empty(tokens, heads * d, dtype=q.dtype, device=q.device)
    if tokens == 0:
        return out
    if work.any_short and cache is not None:
        _attend_short(q, out, work, cache)
    if work.any_long:
        _attend_long(q, k, v, out, work, cache)
    return out


def _attend_short(q: Tensor, out: Tensor, work: AttentionWork, cache: LayerCache) -> None:
    (_, kv_heads, d), group = work.heads, work.heads[0] // work.heads[1]
    table, tuning, width = work.batch.block_table, work.tuning, max(next_power(d), 16)
    assert table is not None
    short_kernel[(kv_heads, work.max_pieces)](
        q, cache.k, cache.v, table, out, work.pieces, work.counts, work.parts, work.logs, *_scales(q, cache),
        q.stride(0), table.stride(0), group, kv_heads, d, work.part_rows, _window(work), _scale(d),
        *cache.k.stride()[:3], *cache.v.stride()[:3],
        BLOCK=cache.k.shape[1], ROWS=max(work.short, 16), KEYS=tuning.short_keys, WIDTH=width, ALL_OF_HEAD=width == d,
        SCALED=cache.k_scale is not None, WIDE=_wide(q), num_warps=tuning.short_warps, num_stages=tuning.short_stages,
    )  # fmt: skip
    rows = next_power(work.part_rows)
    combine_kernel[(kv_heads, len(work.batch.kv_len))](
        out, work.batch.query_start, work.first_piece, work.parts, work.logs, group, kv_heads, d, work.part_rows,
        work.short, PIECES=max(8192 // (rows * width), 1), ROWS=rows, WIDTH=width, num_warps=8,
    )  # fmt: skip


def _attend_long(q: Tensor, k: Tensor, v: Tensor, out: Tensor, work: AttentionWork, cache: LayerCache | None) -> None:
    (_, kv_heads, d), group = work.heads, work.heads[0] // work.heads[1]
    table, tuning, width = work.batch.block_table, work.tuning, max(next_power(d), 16)
    keys, values = (k, v) if cache is None else (cache.k, cache.v)
    strides: tuple[int, ...] = (0, k.stride(0), d, 0, v.stride(0), d)
    if cache is not None:
        strides = (*cache.k.stride()[:3], *cache.v.stride()[:3])
    long_kernel[(kv_heads, work.max_tiles)](
        q, keys, values, work.tiles if table is None else table, out, work.tiles, work.counts, *_scales(q, cache),
        q.stride(0), 0 if table is None else table.stride(0), group, kv_heads, d, _window(work), _scale(d), *strides,
        BLOCK=1 if cache is None else cache.k.shape[1], ROWS=tuning.long_rows, KEYS=tuning.long_keys, WIDTH=width,
        ALL_OF_HEAD=width == d, PAGED=cache is not None, WINDOWED=work.window is not None,
        SCALED=cache is not None and cache.k_scale is not None, WIDE=_wide(q),
        num_warps=tuning.long_warps, num_stages=tuning.long_stages,
    )  # fmt: skip


def _scales(q: Tensor, cache: LayerCache | None) -> tuple[Tensor, Tensor]:
    if cache is None or cache.k_scale is None or cache.v_scale is None:
        return q, q  # not read
    return cache.k_scale, cache.v_scale


def _window(work: AttentionWork) -> int:
    return EVERYTHING if work.window is None else work.window


def _scale(d: int) -> float:
    return math.log2(math.e) / math.sqrt(d)


def _wide(q: Tensor) -> bool:
    """Whether products are in fp32: for fp32 itself, and under the interpreter, which has none in bf16."""
    return q.dtype == torch.float32 or q.device.type == "cpu"


@remember
def _processors(device: torch.device) -> int:
    if device.type == "cpu":
        return 4  # under the interpreter: few programs, and still several pieces
    return torch.cuda.get_device_properties(device).multi_processor_count
