"""A whole forward pass as one launch: a list of recorded operations that the threads carry out side by side.

A *program* is an array of operations, each a row of integers: what to do, on which rows, whether the threads meet
afterwards, and addresses and sizes. What changes from step to step is not in it but in the *fields*, an array of
integers that every operation may look at: numbers of rows, addresses of the batch, of the segments and of the slab.
`cpu_record` writes both.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

from enum import IntEnum

import numba
import numpy as np

from lorikeet.kernels.cpu_attention import ROWS as TASK_ROWS
from lorikeet.kernels.cpu_attention import attend_share, list_tasks, store_rows
from lorikeet.kernels.cpu_lowrank import FIELDS as ENTRY_FIELDS
from lorikeet.kernels.cpu_lowrank import expand_share, list_entries, scale_share, shrink_share
from lorikeet.kernels.cpu_products import PANEL, dot_share, panel_share
from lorikeet.kernels.cpu_rows import F1, norm_rows, rope_rows, silu_rows
from lorikeet.kernels.cpu_runtime import at, device_function, hold, kernel, narrow, size, use_threads, widen
from lorikeet.kernels.cpu_team import meet
from lorikeet.kernels.cpu_tiles import F0, I0

WIDTH = 24  # integers of an operation: code, kind of rows, whether threads meet after it, up to 20 arguments, and
TURN = WIDTH - 1  # how far away the operation is that threads of odd number carry out in its place
U8 = np.uint8(0)


class Code(IntEnum):
    """Operations. Those up to BY_ROW_LAST divide the rows among the threads, always in the same way."""

    TAKE = 0
    TAKE_PANELS = 1
    NORM = 2
    ROPE = 3
    STORE = 4
    SILU = 5
    LINEAR = 6
    SHRINK = 7
    EXPAND = 8
    ATTENTION = 9
    LOGITS = 10
    PANEL_LOGITS = 11
    SCALE = 12


BY_ROW_LAST = Code.SILU


class Field(IntEnum):
    """Of a step. Rows come in two kinds: those of the batch's tokens, and those that logits are wanted of."""

    TOKEN_ROWS = 0
    LOGIT_ROWS = 1
    TOKENS = 2
    POSITIONS = 3
    WANTED = 4
    QUERY_START = 5
    KV_LEN = 6
    SEQUENCES = 7
    BLOCK_TABLE = 8
    TABLE_STRIDE = 9
    CACHE_SLOT = 10
    LOGITS = 11
    SLAB_TABLE = 12
    SLAB_SITES = 13
    SLAB_SCALE = 14
    SLAB_DATA = 15
    SCRATCH = 16
    TOKEN_SEGMENTS = 17  # rows, start, adapters, how many
    LOGIT_SEGMENTS = 21
    SCALED = 25  # whether an adapter has a gain or a shift
    SLAB_VECTORS = 26


# Numba takes plain integers as constants.
TAKE, TAKE_PANELS, NORM, ROPE, STORE, SILU, LINEAR, SHRINK, EXPAND, ATTENTION, LOGITS, PANEL_LOGITS, SCALE = map(
    int, Code
)
QUERY_START, KV_LEN, SEQUENCES, TABLE, TABLE_STRIDE, CACHE_SLOT, LOGITS_AT = (
    int(field) for field in (
        Field.QUERY_START, Field.KV_LEN, Field.SEQUENCES, Field.BLOCK_TABLE, Field.TABLE_STRIDE, Field.CACHE_SLOT,
        Field.LOGITS,
    )
)  # fmt: skip
SLAB_TABLE, SLAB_SITES, SLAB_SCALE, SLAB_DATA, SCRATCH, SEGMENTS, SCALED, SLAB_VECTORS = (
    int(field) for field in (
        Field.SLAB_TABLE, Field.SLAB_SITES, Field.SLAB_SCALE, Field.SLAB_DATA, Field.SCRATCH, Field.TOKEN_SEGMENTS,
        Field.SCALED, Field.SLAB_VECTORS,
    )
)  # fmt: skip


@device_function
def take(a, f, begin, end, rows):
    """out = table[index]: (field of the index, table, bytes from row to row, bytes of a row, out)."""
    field, table, stride, width, out = a[3], a[4], a[5], a[6], a[7]
    index = at(f[field], I0)
    for row in range(begin, end):
        source, target = at(table + index[row] * stride, U8), at(out + row * width, U8)
        for i in range(width):
            target[i] = source[i]


@device_function
def take_panels(a, f, begin, end, act, stored):
    """out = rows of a weight: (field of the index, panels, pairs, scale, which only int8 has, out)"""
    panels, pairs, scale, out = a[4], a[5], at(a[6], F0), a[7]
    index, length = at(f[a[3]], I0), 2 * PANEL * size(stored)  # bytes of a pair of inputs for all outputs of a panel
    for row in range(begin, end):
        wanted = index[row]
        first = panels + wanted // PANEL * pairs * length + wanted % PANEL * 2 * size(stored)
        target = at(out + row * 2 * pairs * size(act), act)
        factor = scale[wanted] if size(stored) == 1 else F1
        for i in range(pairs):
            two = at(first + i * length, stored)
            for j in range(2):
                target[2 * i + j] = narrow(widen(two[j]) * factor, act)


@device_function
def by_row(code, a, f, number, begin, end, act, stored):
    """Rows [begin, end) of an operation that takes each row by itself."""
    if code == TAKE:
        take(a, f, begin, end, end - begin)
    elif code == TAKE_PANELS:
        take_panels(a, f, begin, end, act, stored)
    elif code == NORM:  # x, stride, heads, d, residual, stride, total, out, weight
        heads = a[5]
        norm_rows(begin * heads, end * heads, a[3], a[4], heads, a[6], a[7], a[8], a[9], a[10], a[11], number, act)
    elif code == ROPE:  # x, stride, heads, d, cos, sin, stride, out
        heads = a[5]
        rope_rows(begin * heads, end * heads, a[3], a[4], heads, a[6], a[7], a[8], a[9], a[10], act)
    elif code == STORE:  # rows, stride, cache, its strides by block and slot, block size, heads, stride, d
        store_rows(begin, end, f[CACHE_SLOT], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], act)
    elif code == SILU:  # x, stride, d, out
        silu_rows(begin, end, a[3], a[4], a[5], a[6], act)


@device_function
def low_rank(code, a, f, s, part, parts, act, slab):
    """One half of y += s B A x: (y, stride, x, stride, d_in, sites, how many); `s`: first field of the segments."""
    rows, start, adapters, segments, n_sites = f[s], f[s + 1], f[s + 2], f[s + 3], a[9]
    entries = np.empty((segments * n_sites, ENTRY_FIELDS), np.int64)
    count, _, shrink_work, expand_work = list_entries(
        entries, start, adapters, segments, a[8], n_sites, f[SLAB_TABLE], f[SLAB_SITES], f[SLAB_DATA], slab
    )
    if code == SHRINK:
        low, high = shrink_work * part // parts, shrink_work * (part + 1) // parts
        shrink_share(low, high, entries, count, rows, a[5], a[6], a[7], f[SCRATCH], act, slab)
    else:
        low, high = expand_work * part // parts, expand_work * (part + 1) // parts
        expand_share(low, high, entries, count, rows, a[3], a[4], f[SCRATCH], f[SLAB_SCALE], act, slab)


@device_function
def attend(a, f, queries, number, part, parts, act):
    """(q, stride, out, stride, kv heads, group, window, cache as in `cpu_attention`, d)"""
    kv_heads, group, window, sequences = a[7], a[8], a[9], f[SEQUENCES]
    source, head_strides, d = (a[10], a[11], a[12], a[13], a[14], a[15], a[16]), (a[17], a[18]), a[19]
    tasks = np.empty((kv_heads * (sequences + queries * group // TASK_ROWS), 5), np.int64)
    count, work = list_tasks(tasks, f[QUERY_START], f[KV_LEN], sequences, kv_heads, group, window)
    low, high = work * part // parts, work * (part + 1) // parts
    attend_share(
        low, high, tasks, count, f[QUERY_START], f[KV_LEN], group, window, a[3], a[4], a[5], a[6],
        source, head_strides, f[TABLE], f[TABLE_STRIDE], number, d, act,
    )  # fmt: skip


@device_function
def logits(code, a, f, rows, part, parts, stored):
    """(x, stride, head, stride, vocabulary, d / STEP), or
    (x, stride, panels, pairs, how many, scale, bias, bytes of a row of logits)"""
    if code == PANEL_LOGITS:
        panel_share(part, parts, rows, a[3], a[4], a[5], a[6], a[7], a[8], a[9], f[LOGITS_AT], a[10], F0, stored)
        return
    numbers = np.arange(rows)
    columns = a[7]
    dot_share(part, parts, rows, a[3], a[4], numbers.ctypes.data, a[5], a[6], columns, a[8], f[LOGITS_AT], 4 * columns)
    hold(numbers)


@device_function
def carry_out(program, count, numbers, fields, counter, part, parts, act, slab, stored):
    """What one thread does of a program."""
    f = at(fields, I0)
    for place in range(count):
        listed = at(program + place * 8 * WIDTH, I0)
        i = place + (part & 1) * listed[TURN]
        a, number = at(program + i * 8 * WIDTH, I0), at(numbers, F0)[i]
        code, kind = a[0], a[1]
        rows = f[kind]
        s = SEGMENTS + 4 * kind
        if code <= SILU:
            by_row(code, a, f, number, rows * part // parts, rows * (part + 1) // parts, act, stored)
        elif code == LINEAR:  # x, stride, panels, pairs, how many, scale, bias, out, stride
            panel_share(part, parts, rows, a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], act, stored)
        elif code == SHRINK:
            if f[s + 3] > 0:
                low_rank(code, a, f, s, part, parts, act, slab)
        elif code == EXPAND:
            if f[s + 3] == 0:
                continue
            low_rank(code, a, f, s, part, parts, act, slab)
        elif code == SCALE:  # y, stride, sites, how many
            if f[s + 3] == 0 or f[SCALED] == 0:
                continue
            scale_share(part, parts, f[s], f[s + 1], f[s + 2], f[s + 3], a[5], a[6], a[3], a[4], f[SLAB_VECTORS],
                        f[SLAB_SITES], f[SLAB_DATA], act, slab)  # fmt: skip
        elif code == ATTENTION:
            attend(a, f, rows, number, part, parts, act)
        else:
            logits(code, a, f, rows, part, parts, stored)
        if listed[2]:
            meet(counter, parts)


@kernel
def program_kernel(program, count, numbers, fields, counter, parts, act, slab, stored):
    use_threads(parts)
    for part in numba.prange(parts):
        carry_out(program, count, numbers, fields, counter, part, parts, act, slab, stored)
