"""Attention over the paged cache: decode rows, prefill chunks and any mix of them in one launch.

A *task* is one kv head of one sequence and a block of its queries. Its keys and values are visited once, in *pieces*
that stay in the cache, with an online softmax in fp32 (Dao et al., FlashAttention, 2022); a group's query heads are
rows of the same task, so that they share each read. Those of the next piece are called into the cache meanwhile. Keys
beyond `kv_len` or before every row's window are never read.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import math

import numba
import numpy as np
import torch
from torch import Tensor

from lorikeet.kernels.batch import Batch, LayerCache
from lorikeet.kernels.cpu_heads import add_values, score_keys
from lorikeet.kernels.cpu_products import AVAILABLE, STEP
from lorikeet.kernels.cpu_runtime import (
    SERIAL,
    at,
    device_function,
    exp2,
    hold,
    kernel,
    maximum,
    narrow,
    prefetch,
    share_threads,
    size,
    tag_of,
    use_threads,
    widen,
)
from lorikeet.kernels.cpu_tiles import F0, I0, TILE, add_1x1, add_1x4, add_4x4, dot, dot_1x4, dot_4x4

I32 = np.int32(0)
U16 = np.uint16(0)
KEYS = 64  # of one piece, at most: pieces end at multiples of it
SPARE = 15  # keys that a tile of scores may reach beyond the piece's last one
LISTED = KEYS + SPARE + 1
ROWS = 32  # (query, head) rows of one task, at most
EVERYTHING = 1 << 40  # a window that hides nothing
MINUS_INFINITY = np.float32(-np.inf)


@device_function
def score_run(q, first, rows, keys, key_stride, count, d, scores, act):
    """scores[key, row] (4 rows wide) = q . k for `count` keys that lie `key_stride` bytes apart."""
    address, out = at(q, I0), at(scores, F0)
    j = 0
    while j < count:
        key, target = keys + j * key_stride, scores + 16 * j
        if j + 4 > count:
            for i in range(rows):
                out[4 * j + i] = dot(address[first + i], key, d, act, act)
            j += 1
            continue
        if rows == 4:
            q0, q1, q2, q3 = address[first], address[first + 1], address[first + 2], address[first + 3]
            dot_4x4(q0, q1, q2, q3, key, key_stride, d, target, 4, act, act)
        else:
            for i in range(rows):
                dot_1x4(address[first + i], key, key_stride, d, target + 4 * i, 4, act, act)
        j += 4


@device_function
def sum_run(totals, rows, values, value_stride, count, d, weights, act):
    """totals[row] += sum over keys of weights[key, row] * v."""
    j = 0
    while j < count:
        value, weight = values + j * value_stride, weights + 16 * j
        if j + 4 > count:
            for i in range(rows):
                add_1x1(totals + 4 * TILE * i, at(weight + 4 * i, F0)[0], value, d, act)
            j += 1
            continue
        if rows == 4:
            add_4x4(totals, weight, 4, value, value_stride, d, act)
        else:
            for i in range(rows):
                add_1x4(totals + 4 * TILE * i, weight + 4 * i, 4, value, value_stride, d, act)
        j += 4


@device_function
def take_in(largest, summed, log2_scale, state, total, d):
    """Bring a row's sums to the new maximum, and add the tile's weights to theirs. `state` is (maximum, sum)."""
    row, out = at(state, F0), at(total, F0)
    if largest != row[0]:
        kept = exp2((row[0] - largest) * log2_scale)
        for i in range(d):
            out[i] *= kept
        row[1] *= kept
        row[0] = largest
    row[1] += summed


@device_function
def weigh(scores, begin, end, count, log2_scale, state, total, d):
    """Turn one row's scores of a tile into weights, and rescale its sums to the new maximum.

    Only keys [begin, end) of the tile's `count` are visible. `state` is (maximum, sum of weights).
    """
    s, row = at(scores, F0), at(state, F0)
    for j in range(begin):
        s[4 * j] = F0
    for j in range(end, count):
        s[4 * j] = F0
    if begin >= end:
        return
    largest = row[0]
    for j in range(begin, end):
        largest = maximum(largest, s[4 * j])
    summed = F0
    for j in range(begin, end):
        weight = exp2((s[4 * j] - largest) * log2_scale)
        s[4 * j] = weight
        summed += weight
    take_in(largest, summed, log2_scale, state, total, d)


@device_function
def attend_tile(first, rows, begin, end, task, source, table, scratch, log2_scale, d, act):
    """Add the keys [begin, end) to at most 4 rows of a task, from its row `first`."""
    q, states, totals, scores = scratch
    k, k_block, k_slot, v, v_block, v_slot, block_size = source
    blocks, (position, flat, group, window) = at(table, I32), task
    p = begin
    while p < end:
        block, slot = p // block_size, p % block_size
        count = min(block_size - slot, end - p)
        keys = k + blocks[block] * k_block + slot * k_slot
        score_run(q, first, rows, keys, k_slot, count, d, scores + 16 * (p - begin), act)
        p += count
    for i in range(rows):
        at_position = position + (flat + first + i) // group
        low, high = max(at_position - window + 1 - begin, 0), min(at_position + 1, end) - begin
        row = first + i
        weigh(scores + 4 * i, low, high, end - begin, log2_scale, states + 8 * row, totals + 4 * TILE * row, d)
    p = begin
    while p < end:
        block, slot = p // block_size, p % block_size
        count = min(block_size - slot, end - p)
        values = v + blocks[block] * v_block + slot * v_slot
        sum_run(totals + 4 * TILE * first, rows, values, v_slot, count, d, scores + 16 * (p - begin), act)
        p += count


@device_function
def weigh_halves(scores, begin, end, count, log2_scale, state, total, d, weights):
    """As `weigh`, for scores that lie side by side; the weights of all `count` keys are written as bf16.

    What is summed is the rounded weight, which is what multiplies the value.
    """
    s, row, w = at(scores, F0), at(state, F0), at(weights, U16)
    for j in range(count):
        w[j] = U16
    if begin >= end:
        return
    largest = row[0]
    for j in range(begin, end):
        largest = maximum(largest, s[j])
    summed = F0
    for j in range(begin, end):
        weight = exp2((s[j] - largest) * log2_scale)
        rounded = narrow(weight, U16)
        w[j] = rounded
        summed += widen(rounded)
    take_in(largest, summed, log2_scale, state, total, d)


@device_function
def list_keys(begin, end, source, table, lists, called):
    """Addresses of the keys and values [begin, end), and of the last one up to the lists' ends. All but the first
    `called` are called into the cache."""
    k, k_block, k_slot, v, v_block, v_slot, block_size = source
    blocks, keys, values = at(table, I32), at(lists, I0), at(lists + 8 * LISTED, I0)
    p, n = begin, 0
    while p < end:
        block, slot = np.int64(blocks[p // block_size]), p % block_size
        count = min(block_size - slot, end - p)
        key, value = k + block * k_block + slot * k_slot, v + block * v_block + slot * v_slot
        for i in range(count):
            keys[n + i], values[n + i] = key + i * k_slot, value + i * v_slot
        p, n = p + count, n + count
    for i in range(called, n):
        prefetch(keys[i])
        prefetch(keys[i] + 64)
        prefetch(values[i])
        prefetch(values[i] + 64)
    for i in range(n, LISTED):
        keys[i], values[i] = keys[n - 1], values[n - 1]


@device_function
def attend_halves(first, rows, begin, end, task, lists, following, scratch, log2_scale, d):
    """As `attend_tile`, by products of bf16; `lists` are the addresses of what begins at key `begin`, and `following`
    those of what comes next."""
    q, states, totals, scores = scratch
    position, flat, group, window = task
    weights, count = scores + 16 * LISTED, end - begin
    padded = (count + 1) // 2 * 2
    score_keys(q + 8 * first, lists, count, d, scores, 4 * LISTED, following, rows)
    for i in range(1 if rows == 1 else 4):
        row = first + min(i, rows - 1)
        at_position = position + (flat + row) // group
        low, high = max(at_position - window + 1 - begin, 0), min(at_position + 1, end) - begin
        if i >= rows:
            high = low  # a row too many: no weight
        state, total = states + 8 * row, totals + 4 * TILE * row
        weigh_halves(scores + 4 * LISTED * i, low, high, padded, log2_scale, state, total, d, weights + 2 * LISTED * i)
    values, following, total = lists + 8 * LISTED, following + 8 * LISTED, totals + 4 * TILE * first
    add_values(weights, 2 * LISTED, values, padded // 2, d, total, 4 * TILE, following, rows)


@device_function
def begin_task(n, task, q_base, ldq, scratch, d, act):
    """`n` flat rows (query, head) of one kv head: row r is head `r % group` of query `r // group`.

    `task` is (position of the sequence's first query, first flat row, heads in the group, window).
    """
    q, states, totals, scores = scratch
    position, flat, group, window = task
    address, state = at(q, I0), at(states, F0)
    for i in range(n):
        address[i] = q_base + (flat + i) // group * ldq + (flat + i) % group * d * size(act)
        state[2 * i], state[2 * i + 1] = MINUS_INFINITY, F0
        total = at(totals + 4 * TILE * i, F0)
        for j in range(d):
            total[j] = F0
    for i in range(n, (n + 3) // 4 * 4):
        address[i] = address[0]


@device_function
def attend_piece(n, begin, end, task, source, table, lists, following, scratch, log2_scale, d, act, halves):
    """Add the keys [begin, end) to the rows of a task."""
    position, flat, group, window = task
    for first in range(0, n, 4):
        rows = min(4, n - first)
        low = max(position + (flat + first) // group - window + 1, begin)
        high = min(position + (flat + first + rows - 1) // group + 1, end)
        skipped = 8 * (low - begin)
        if low < high and halves:
            attend_halves(first, rows, low, high, task, lists + skipped, following + skipped, scratch, log2_scale, d)
        elif low < high:
            attend_tile(first, rows, low, high, task, source, table, scratch, log2_scale, d, act)


@device_function
def end_task(n, task, out_base, ldo, scratch, d, act):
    q, states, totals, scores = scratch
    position, flat, group, window = task
    state = at(states, F0)
    for i in range(n):
        target = at(out_base + (flat + i) // group * ldo + (flat + i) % group * d * size(act), act)
        total, weight = at(totals + 4 * TILE * i, F0), state[2 * i + 1]
        for j in range(d):
            target[j] = narrow(total[j] / weight, act)


@device_function
def list_tasks(tasks, query_start, kv_len, sequences, kv_heads, group, window):
    """Fill [sequence, kv head, first flat row, rows, work]; returns (tasks, work)."""
    start, length = at(query_start, I32), at(kv_len, I32)
    count, work = 0, 0
    for b in range(sequences):
        flat_rows = (start[b + 1] - start[b]) * group
        position = length[b] - (start[b + 1] - start[b])
        for h in range(kv_heads):
            for flat in range(0, flat_rows, ROWS):
                n = min(ROWS, flat_rows - flat)
                last = position + (flat + n - 1) // group
                seen = last + 1 - max(position + flat // group - window + 1, 0)
                t = tasks[count]
                t[0], t[1], t[2], t[3], t[4] = b, h, flat, n, 32 + seen * (n + 2)
                work += t[4]
                count += 1
    return count, work


@device_function
def list_pieces(low, high, tasks, count, start, length, group, window, pieces):
    """Fill [task, first key, last key + 1] with the pieces of the tasks that begin in [low, high) of the work; how many
    they are. Where `pieces` is too short they are only counted.

    Pieces end at multiples of KEYS: in whatever chunks a prompt comes, sums of bf16 are the same to the last bit.
    """
    begun, n = 0, 0
    for i in range(count):
        b, _, flat, rows, work = tasks[i]
        begun += work
        if not low <= begun - work < high:
            continue
        position = length[b] - (start[b + 1] - start[b])
        begin = max(position + flat // group - window + 1, 0)
        end = position + (flat + rows - 1) // group + 1
        while begin < end:
            stop = min((begin // KEYS + 1) * KEYS, end)
            if n < len(pieces):
                piece = pieces[n]
                piece[0], piece[1], piece[2] = i, begin, stop
            begin, n = stop, n + 1
    return n


@device_function
def heads_of(b, h, start, source, head_strides, table, table_stride):
    """Where the keys and values of a sequence's kv head lie, and its blocks."""
    k, k_block, k_slot, v, v_block, v_slot, block_size = source
    own = 0 if block_size < EVERYTHING else start[b]  # without a cache the sequence's own rows are its one block
    k_head, v_head = k + h * head_strides[0] + own * k_slot, v + h * head_strides[1] + own * v_slot
    return (k_head, k_block, k_slot, v_head, v_block, v_slot, block_size), table + 4 * table_stride * b


@device_function
def attend_share(low, high, tasks, count, query_start, kv_len, group, window, q, ldq, out, ldo,
                 source, head_strides, table, table_stride, log2_scale, d, act):  # fmt: skip
    start, length = at(query_start, I32), at(kv_len, I32)
    addresses = np.empty(ROWS + 4 * LISTED, np.int64)
    floats = np.empty(2 * ROWS + ROWS * TILE + 6 * LISTED, np.float32)
    states, lists = floats.ctypes.data, addresses.ctypes.data + 8 * ROWS
    totals = states + 8 * ROWS
    scratch = (addresses.ctypes.data, states, totals, totals + 4 * ROWS * TILE)
    halves = size(act) == 2 and AVAILABLE and d % STEP == 0
    pieces = np.empty((list_pieces(low, high, tasks, count, start, length, group, window, tasks[:0]), 3), np.int64)
    list_pieces(low, high, tasks, count, start, length, group, window, pieces)
    for p in range(len(pieces)):
        i, begin, end = pieces[p]
        b, h, flat, n, _ = tasks[i]
        heads, blocks = heads_of(b, h, start, source, head_strides, table, table_stride)
        here, following = lists + p % 2 * 16 * LISTED, lists + (p + 1) % 2 * 16 * LISTED
        if halves and p == 0:
            list_keys(begin, end, heads, blocks, here, 0)
        if halves and p + 1 < len(pieces):
            j, first, stop = pieces[p + 1]
            next_heads, next_blocks = heads_of(
                tasks[j, 0], tasks[j, 1], start, source, head_strides, table, table_stride
            )
            list_keys(first, stop, next_heads, next_blocks, following, end - begin)
        elif halves:
            following = here
        task = (length[b] - (start[b + 1] - start[b]), flat, group, window)
        group_bytes = h * group * d * size(act)
        if p == 0 or pieces[p - 1, 0] != i:
            begin_task(n, task, q + start[b] * ldq + group_bytes, ldq, scratch, d, act)
        attend_piece(n, begin, end, task, heads, blocks, here, following, scratch, log2_scale, d, act, halves)
        if p + 1 == len(pieces) or pieces[p + 1, 0] != i:
            end_task(n, task, out + start[b] * ldo + group_bytes, ldo, scratch, d, act)
    hold(addresses)
    hold(floats)


@device_function
def store_rows(begin, end, slots, rows, ld, cache, block, slot_stride, block_size, heads, head_stride, d, act):
    """Copy new keys (or values) [begin, end) into their cache slots."""
    slot_of = at(slots, I0)
    for t in range(begin, end):
        base = cache + slot_of[t] // block_size * block + slot_of[t] % block_size * slot_stride
        for h in range(heads):
            source, target = at(rows + t * ld + h * d * size(act), act), at(base + h * head_stride, act)
            for i in range(d):
                target[i] = source[i]


@kernel
def store_kernel(k, ldk, v, ldv, slots, rows, source, head_strides, heads, d, parts, act):
    k_cache, k_block, k_slot, v_cache, v_block, v_slot, block_size = source
    if rows * heads * d < SERIAL:
        parts = 1
    use_threads(parts)
    for part in numba.prange(parts):
        begin, end = rows * part // parts, rows * (part + 1) // parts
        store_rows(begin, end, slots, k, ldk, k_cache, k_block, k_slot, block_size, heads, head_strides[0], d, act)
        store_rows(begin, end, slots, v, ldv, v_cache, v_block, v_slot, block_size, heads, head_strides[1], d, act)


@kernel
def attention_kernel(q, ldq, out, ldo, query_start, kv_len, sequences, queries, kv_heads, group, window,
                     source, head_strides, table, table_stride, d, log2_scale, parts, act):  # fmt: skip
    tasks = np.empty((kv_heads * (sequences + queries * group // ROWS), 5), np.int64)  # each sequence may round up
    count, work = list_tasks(tasks, query_start, kv_len, sequences, kv_heads, group, window)
    if work * d < SERIAL:
        parts = 1
    use_threads(parts)
    for part in numba.prange(parts):
        low, high = work * part // parts, work * (part + 1) // parts
        attend_share(low, high, tasks, count, query_start, kv_len, group, window, q, ldq, out, ldo,
                     source, head_strides, table, table_stride, log2_scale, d, act)  # fmt: skip


NO_TABLE = np.zeros(1, np.int32)  # without a cache: one block a sequence


class BatchArguments:
    """The addresses of a batch that every layer's attention reads, checked once per batch."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        for name, dtype in (
            ("query_start", torch.int32),
            ("kv_len", torch.int32),
            ("block_table", torch.int32),
            ("cache_slot", torch.int64),
        ):
            tensor = getattr(batch, name)
            if tensor is not None and (tensor.dtype != dtype or tensor.stride(-1) != 1):
                raise ValueError(f"{name} is {tensor.dtype} with strides {tensor.stride()}, expected dense {dtype}")
        self.sequences = (batch.query_start.data_ptr(), batch.kv_len.data_ptr(), batch.kv_len.shape[0])
        self.slots = 0 if batch.cache_slot is None else batch.cache_slot.data_ptr()
        self.table = (NO_TABLE.ctypes.data, 0)
        if batch.block_table is not None:
            self.table = (batch.block_table.data_ptr(), batch.block_table.stride(0))


def attention(
    q: Tensor, k: Tensor, v: Tensor, batch: BatchArguments, cache: LayerCache | None, window: int | None
) -> Tensor:
    """As `ReferenceOps.attention`; q, k, v in bf16 or fp32, a token's heads dense behind one another."""
    queries, heads, d = q.shape
    kv_heads = k.shape[1]
    if d > TILE:
        raise ValueError(f"attention: head_dim is {d}, the CPU kernel takes at most {TILE}")
    if any(part.stride(2) != 1 or part.stride(1) != d or part.dtype != q.dtype for part in (q, k, v)):
        raise ValueError("attention: q, k and v must have one dtype and dense heads")
    act, width, parts = tag_of(q), q.element_size(), share_threads()
    ldk, ldv = k.stride(0) * width, v.stride(0) * width
    if cache is None:
        source = (k.data_ptr(), 0, ldk, v.data_ptr(), 0, ldv, EVERYTHING)
        head_strides = (d * width, d * width)
        table = (NO_TABLE.ctypes.data, 0)
    else:
        ck, cv = cache.k, cache.v
        if ck.dtype != q.dtype or cv.dtype != q.dtype or ck.stride(3) != 1 or cv.stride(3) != 1:
            raise ValueError(f"attention: the cache is {ck.dtype}, {cv.dtype}; expected {q.dtype} with dense heads")
        source = (
            ck.data_ptr(), ck.stride(0) * width, ck.stride(1) * width,
            cv.data_ptr(), cv.stride(0) * width, cv.stride(1) * width, ck.shape[1],
        )  # fmt: skip
        head_strides = (ck.stride(2) * width, cv.stride(2) * width)
        store_kernel(
            k.data_ptr(), ldk, v.data_ptr(), ldv, batch.slots, queries, source, head_strides, kv_heads, d, parts, act
        )
        table = batch.table
    out = torch.empty(queries, heads * d, dtype=q.dtype)
    attention_kernel(
        q.data_ptr(), q.stride(0) * width, out.data_ptr(), heads * d * width, *batch.sequences, queries, kv_heads,
        heads // kv_heads, EVERYTHING if window is None else window, source, head_strides, *table,
        d, np.float32(math.log2(math.e) / math.sqrt(d)), parts, act,
    )  # fmt: skip
    return out
