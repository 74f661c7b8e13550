"""Products of bf16 rows with the processor's own instruction (AVX512-BF16), summed in float32 registers.

`vdpbf16ps` adds 16 dot products of two bf16 numbers each to 16 float32 sums. Two tiles are made of it: one for
weights in *panels*, where a register holds 16 outputs of the layer for two neighbouring inputs and x is broadcast; one
for weights as they lie (a head tied to the embedding, A of an adapter), where a register holds 32 neighbouring inputs
and sums are added up at the end. One layout serves every number of rows: a single row reads it at the speed of memory,
hundreds of rows multiply at the processor's rate.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import extending, types
from numba.core import cgutils
from torch import Tensor

from lorikeet.kernels.cpu_runtime import (
    at,
    device_function,
    emit_prefetch,
    hold,
    kernel,
    literal_intrinsic,
    share_threads,
    size,
    tag_of,
    use_threads,
)
from lorikeet.kernels.precision import native_bf16_products

AVAILABLE = native_bf16_products()

LANES = 16  # float32 of a register
WIDE = 2  # registers of outputs in a panel: 32 outputs
PANEL = LANES * WIDE
STEP = 2 * LANES  # bf16 numbers of a register
BLOCK = 16  # rows of a weight that several rows of x meet at once
STREAM = 2048  # bytes that panels are called ahead while few rows wait for them
AHEAD = 256  # bytes that rows of B are called ahead
STORED = {torch.bfloat16: np.uint16(0), torch.int8: np.int8(0)}  # tags of what panels hold
KEPT, WIDENED = np.uint8(0), np.int16(0)  # tags of int8 panels that are widened to bf16 for others, and that were
I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
SUMS, PAIRS, HALVES = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES), ir.VectorType(I16, LANES)
ZERO = ir.Constant(SUMS, [0.0] * LANES)


def products(function):
    """A device function made of the tiles; an empty one where the processor has no such instruction."""
    return device_function(function if AVAILABLE else lambda *arguments: None)


def add_products(builder: Any, sums: Any, a: Any, b: Any) -> Any:
    """sums[i] + a[2i] b[2i] + a[2i + 1] b[2i + 1]"""
    kind = ir.FunctionType(SUMS, [SUMS, PAIRS, PAIRS])
    return builder.call(ir.InlineAsm(kind, "vdpbf16ps $3, $2, $0", "=v,0,v,v"), [sums, a, b])


def _rounded(builder: Any, sums: Any) -> Any:
    """float32 to bf16, to nearest even; NaN stays NaN."""
    return builder.call(ir.InlineAsm(ir.FunctionType(HALVES, [SUMS]), "vcvtneps2bf16 $1, $0", "=v,v"), [sums])


def plus(builder: Any, address: Any, offset: int) -> Any:
    return builder.add(address, ir.Constant(I64, offset)) if offset else address


def load(builder: Any, address: Any, kind: Any, align: int) -> Any:
    value = builder.load(builder.inttoptr(address, kind.as_pointer()))
    value.align = align
    return value


def store(builder: Any, value: Any, address: Any, align: int) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = align


def broadcast(builder: Any, scalar: Any) -> Any:
    empty = ir.Constant(PAIRS, ir.Undefined)
    first = builder.insert_element(empty, scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, empty, ir.Constant(PAIRS, [0] * LANES))


def _total(builder: Any, sums: Any) -> Any:
    """The sum of a register's numbers."""
    kind = ir.FunctionType(F32, (F32, SUMS))
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.vector.reduce.fadd.v16f32")
    return builder.call(function, (ir.Constant(F32, -0.0), sums), fastmath=("reassoc",))


def sum_over(builder: Any, steps: Any, initial: list[Any], body: Any) -> list[Any]:
    """The sums after `steps` (at least one) turns of a loop: body(step, sums) gives the next ones."""
    entry, loop, done = builder.block, builder.append_basic_block("step"), builder.append_basic_block("done")
    builder.branch(loop)
    builder.position_at_end(loop)
    step = builder.phi(I64)
    step.add_incoming(ir.Constant(I64, 0), entry)
    sums = [builder.phi(SUMS) for _ in initial]
    for phi, start in zip(sums, initial, strict=True):
        phi.add_incoming(start, entry)
    following: list[Any] = body(step, sums)
    next_step = builder.add(step, ir.Constant(I64, 1))
    step.add_incoming(next_step, loop)
    for phi, value in zip(sums, following, strict=True):
        phi.add_incoming(value, loop)
    builder.cbranch(builder.icmp_signed("<", next_step, steps), loop, done)
    builder.position_at_end(done)
    return following


def _from_halves(builder: Any, address: Any) -> Any:
    """16 bf16 as float32."""
    halves = load(builder, address, HALVES, 2)
    return builder.bitcast(builder.shl(builder.zext(halves, PAIRS), ir.Constant(PAIRS, [16] * LANES)), SUMS)


def _widened(builder: Any, address: Any) -> Any:
    """32 int8 as bf16, which holds them exactly."""
    octets = load(builder, address, ir.VectorType(I8, 2 * LANES), 1)
    floats = []
    for first in (0, LANES):
        lanes = ir.Constant(PAIRS, list(range(first, first + LANES)))
        part = builder.shuffle_vector(octets, ir.Constant(octets.type, ir.Undefined), lanes)
        floats.append(builder.sitofp(builder.sext(part, PAIRS), SUMS))
    kind = ir.FunctionType(PAIRS, [SUMS, SUMS])
    return builder.call(ir.InlineAsm(kind, "vcvtne2ps2bf16 $1, $2, $0", "=v,v,v"), floats)


@literal_intrinsic
def panel_tile(typing_context, x, ldx, panel, pairs, ahead, called, scale, bias, out, ldo, rows, tag, stored, wide):
    """out[rows, PANEL] = x[rows, 2 pairs] . panel [pairs, PANEL, 2] * scale [PANEL] + bias [PANEL] (float32 both).

    Addresses and strides in bytes; `rows` and `called` are literals. Types by tag: `tag` of out, `stored` of the panel
    (bf16, which has no scale, int8, or int8 as bf16). Meanwhile what lies `ahead` bytes behind the panel is called into
    the cache: as much as a panel (`called` is 1), half as much (2), or nothing (0). With the tag KEPT the panel is left
    in bf16 at `wide`.
    """
    if not isinstance(rows, types.IntegerLiteral) or not isinstance(called, types.IntegerLiteral):
        return None
    count, fraction = rows.literal_value, called.literal_value
    halves, held = types.unliteral(tag) == types.uint16, types.unliteral(stored)
    int8, kept, scaled = held in (types.int8, types.uint8), held == types.uint8, held != types.uint16

    def generate(context, builder, signature, arguments):
        x, ldx, panel, pairs, ahead, _, scale, bias, out, ldo, *_, wide = arguments
        row_at = [builder.add(x, builder.mul(ldx, ir.Constant(I64, row))) for row in range(count)]
        following = builder.add(panel, ahead)
        shift = [load(builder, plus(builder, bias, 4 * LANES * v), SUMS, 4) for v in range(WIDE)]

        def body(step, sums):
            width = 1 if int8 else 2
            place = builder.add(panel, builder.mul(step, ir.Constant(I64, 2 * PANEL * width)))
            at_register = [plus(builder, place, 2 * LANES * width * v) for v in range(WIDE)]
            fetched = 64 * width // fraction if fraction else 0  # bytes
            address = builder.add(following, builder.mul(step, ir.Constant(I64, fetched)))
            for offset in range(0, fetched, 64):
                emit_prefetch(builder, plus(builder, address, offset))
            weights = [_widened(builder, at) if int8 else load(builder, at, PAIRS, 4) for at in at_register]
            if kept:
                target = builder.add(wide, builder.mul(step, ir.Constant(I64, 4 * PANEL)))
                for v in range(WIDE):
                    store(builder, weights[v], plus(builder, target, 4 * LANES * v), 2)
            inputs = [builder.add(at_row, builder.mul(step, ir.Constant(I64, 4))) for at_row in row_at]
            result = []
            for row, address in enumerate(inputs):
                pair = broadcast(builder, load(builder, address, I32, 2))
                for v in range(WIDE):
                    result.append(add_products(builder, sums[row * WIDE + v], weights[v], pair))
            return result

        sums = sum_over(builder, pairs, [ZERO] * (count * WIDE) if scaled else shift * count, body)
        if scaled:
            factor = [load(builder, plus(builder, scale, 4 * LANES * v), SUMS, 4) for v in range(WIDE)]
            sums = [builder.fadd(builder.fmul(s, factor[i % WIDE]), shift[i % WIDE]) for i, s in enumerate(sums)]
        for row in range(count):
            target = builder.add(out, builder.mul(ldo, ir.Constant(I64, row)))
            for v in range(WIDE):
                total = sums[row * WIDE + v]
                total, width = (_rounded(builder, total), 2) if halves else (total, 4)
                store(builder, total, plus(builder, target, width * LANES * v), width)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5, called, *[types.int64] * 4, rows, tag, stored, types.int64), generate


@literal_intrinsic
def dot_tile(typing_context, x, ldx, row_of, weight, ldw, steps, out, ld_row, ld_column, rows, columns):
    """out[row, column] (float32) = x[row_of[row]] . weight[column] over 32 steps numbers.

    Addresses and strides in bytes, `row_of` of int64; `rows` and `columns` are literals. The rows of the weight behind
    these are called into the cache.
    """
    if not isinstance(rows, types.IntegerLiteral) or not isinstance(columns, types.IntegerLiteral):
        return None
    n, m = rows.literal_value, columns.literal_value

    def generate(context, builder, signature, arguments):
        x, ldx, row_of, weight, ldw, steps, out, ld_row, ld_column = arguments[:9]
        numbers = [load(builder, plus(builder, row_of, 8 * row), I64, 8) for row in range(n)]
        row_at = [builder.add(x, builder.mul(ldx, number)) for number in numbers]
        column_at = [builder.add(weight, builder.mul(ldw, ir.Constant(I64, c))) for c in range(m)]
        following = builder.mul(ldw, ir.Constant(I64, m))

        def body(step, sums):
            offset = builder.mul(step, ir.Constant(I64, 64))
            for place in column_at:
                emit_prefetch(builder, builder.add(builder.add(place, offset), following))
            weights = [load(builder, builder.add(place, offset), PAIRS, 2) for place in column_at]
            result = []
            for row, place in enumerate(row_at):
                pairs = load(builder, builder.add(place, offset), PAIRS, 2)
                result += [add_products(builder, sums[row * m + c], weights[c], pairs) for c in range(m)]
            return result

        sums = sum_over(builder, steps, [ZERO] * (n * m), body)
        for row in range(n):
            target = builder.add(out, builder.mul(ld_row, ir.Constant(I64, row)))
            for c in range(m):
                value = _total(builder, sums[row * m + c])
                store(builder, value, builder.add(target, builder.mul(ld_column, ir.Constant(I64, c))), 4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 9, rows, columns), generate


@literal_intrinsic
def dot_run(typing_context, x, row, turns, registers):
    """x . row (float32) over `turns` (at least one) times `registers` (a literal) times STEP numbers, in one stream."""
    if not isinstance(registers, types.IntegerLiteral):
        return None
    count = registers.literal_value

    def generate(context, builder, signature, arguments):
        x, row, turns = arguments[:3]

        def body(turn, sums):
            offset = builder.mul(turn, ir.Constant(I64, 4 * LANES * count))
            result = []
            for i, total in enumerate(sums):
                places = [plus(builder, builder.add(start, offset), 4 * LANES * i) for start in (x, row)]
                result.append(add_products(builder, total, *(load(builder, place, PAIRS, 2) for place in places)))
            return result

        sums = sum_over(builder, turns, [ZERO] * count, body)
        while len(sums) > 1:
            sums = [builder.fadd(a, b) for a, b in zip(sums[::2], sums[1::2], strict=True)]
        return _total(builder, sums[0])

    return types.float32(*[types.int64] * 3, registers), generate


@literal_intrinsic
def outer_tile(typing_context, u, ldu, rank, b, stride, scale, y, ldy, row_of, rows, tag):
    """y[row_of[row], :STEP] += scale * (u[:, row] . b[:, :STEP]) over `rank` (at least one) rows of b (bf16).

    u (float32) has `ldu` bytes from rank to rank. Sums stay in registers; y is rounded once, to the type of `tag`.
    `rows` is a literal. What follows in the rows of b is called into the cache.
    """
    if not isinstance(rows, types.IntegerLiteral):
        return None
    n, halves = rows.literal_value, types.unliteral(tag) == types.uint16

    def generate(context, builder, signature, arguments):
        u, ldu, rank, b, stride, scale, y, ldy, row_of = arguments[:9]
        flags = ("contract",)

        def body(r, sums):
            place = builder.add(b, builder.mul(stride, r))
            emit_prefetch(builder, plus(builder, place, AHEAD))
            weights = [_from_halves(builder, plus(builder, place, 2 * LANES * v)) for v in range(WIDE)]
            factors = builder.add(u, builder.mul(ldu, r))
            result = []
            for row in range(n):
                scalar = load(builder, plus(builder, factors, 4 * row), I32, 4)
                factor = builder.bitcast(broadcast(builder, scalar), SUMS)
                for v in range(WIDE):
                    product = builder.fmul(weights[v], factor, flags=flags)
                    result.append(builder.fadd(sums[row * WIDE + v], product, flags=flags))
            return result

        sums = sum_over(builder, rank, [ZERO] * (n * WIDE), body)
        factor = builder.bitcast(broadcast(builder, builder.bitcast(scale, I32)), SUMS)
        for row in range(n):
            number = load(builder, plus(builder, row_of, 8 * row), I64, 8)
            target = builder.add(y, builder.mul(ldy, number))
            for v in range(WIDE):
                place = plus(builder, target, (2 if halves else 4) * LANES * v)
                old = _from_halves(builder, place) if halves else load(builder, place, SUMS, 4)
                new = builder.fadd(old, builder.fmul(sums[row * WIDE + v], factor, flags=flags), flags=flags)
                store(builder, _rounded(builder, new) if halves else new, place, 2)
        return context.get_dummy_value()

    kinds = [*[types.int64] * 5, types.float32, *[types.int64] * 3]
    return types.void(*kinds, rows, tag), generate


@products
def outer_columns(begin, end, n, u, rank, b, stride, scale, y, ldy, row_of, tag):
    """Columns [begin, end), whole steps of them, of y[row_of] += scale * (u^T b) for n rows; u is [rank, n]."""
    for column in range(begin, end, STEP):
        place, target = b + 2 * column, y + column * size(tag)
        row = 0
        while row + 6 <= n:
            outer_tile(u + 4 * row, 4 * n, rank, place, stride, scale, target, ldy, row_of + 8 * row, 6, tag)
            row += 6
        while row + 2 <= n:
            outer_tile(u + 4 * row, 4 * n, rank, place, stride, scale, target, ldy, row_of + 8 * row, 2, tag)
            row += 2
        if row < n:
            outer_tile(u + 4 * row, 4 * n, rank, place, stride, scale, target, ldy, row_of + 8 * row, 1, tag)


@products
def panel_few(rows, x, ldx, panel, pairs, scale, bias, out, ldo, tag, stored):
    """Less than a dozen rows against one panel: they wait for memory.

    So they call what follows in the stream of panels, also across the ends of pages, where the processor stops.
    """
    if rows >= 8:
        panel_tile(x, ldx, panel, pairs, STREAM, 1, scale, bias, out, ldo, 8, tag, stored, 0)
        x, out, rows = x + 8 * ldx, out + 8 * ldo, rows - 8
    if rows >= 4:
        panel_tile(x, ldx, panel, pairs, STREAM, 1, scale, bias, out, ldo, 4, tag, stored, 0)
        x, out, rows = x + 4 * ldx, out + 4 * ldo, rows - 4
    if rows >= 2:
        panel_tile(x, ldx, panel, pairs, STREAM, 1, scale, bias, out, ldo, 2, tag, stored, 0)
        x, out, rows = x + 2 * ldx, out + 2 * ldo, rows - 2
    if rows == 1:
        panel_tile(x, ldx, panel, pairs, STREAM, 1, scale, bias, out, ldo, 1, tag, stored, 0)


@products
def panel_dozens(dozens, x, ldx, panel, pairs, length, scale, bias, out, ldo, tag, stored):
    """At least one dozen of rows against one panel, which is in the cache already.

    The last two dozens, or the only one, call the next panel, `length` bytes on.
    """
    if dozens == 1:
        panel_tile(x, ldx, panel, pairs, length, 1, scale, bias, out, ldo, 12, tag, stored, 0)
        return
    for _ in range(dozens - 2):
        panel_tile(x, ldx, panel, pairs, 0, 0, scale, bias, out, ldo, 12, tag, stored, 0)
        x, out = x + 12 * ldx, out + 12 * ldo
    panel_tile(x, ldx, panel, pairs, length, 2, scale, bias, out, ldo, 12, tag, stored, 0)
    x, out, half = x + 12 * ldx, out + 12 * ldo, length // 2
    panel_tile(x, ldx, panel, pairs, length + half, 2, scale, bias, out, ldo, 12, tag, stored, 0)


@products
def panel_widened(rows, x, ldx, panel, pairs, length, wide, scale, bias, out, ldo, tag):
    """Dozens of rows against one panel in int8. The first dozen leaves it in bf16 at `wide`, for the others, and calls
    the next panel, `length` bytes on."""
    panel_tile(x, ldx, panel, pairs, length, 1, scale, bias, out, ldo, 12, tag, KEPT, wide)
    x, out = x + 12 * ldx, out + 12 * ldo
    for _ in range(rows // 12 - 1):
        panel_tile(x, ldx, wide, pairs, 0, 0, scale, bias, out, ldo, 12, tag, WIDENED, 0)
        x, out = x + 12 * ldx, out + 12 * ldo
    few = rows % 12
    if few > 0:
        panel_few(few, x, ldx, wide, pairs, scale, bias, out, ldo, tag, WIDENED)


@products
def panel_stored(part, parts, rows, x, ldx, weight, pairs, panels, scale, bias, out, ldo, tag, stored):
    """The panels that one of `parts` threads multiplies as they are stored."""
    length = pairs * 2 * PANEL * size(stored)
    for panel in range(panels * part // parts, panels * (part + 1) // parts):
        column = panel * PANEL
        place, target = weight + panel * length, out + column * size(tag)
        f, b = scale + 4 * column, bias + 4 * column
        few = rows % 12
        if few > 0:
            panel_few(few, x, ldx, place, pairs, f, b, target, ldo, tag, stored)
        if rows >= 12:
            first, last = x + few * ldx, target + few * ldo
            panel_dozens(rows // 12, first, ldx, place, pairs, length, f, b, last, ldo, tag, stored)


@products
def panel_int8(part, parts, rows, x, ldx, weight, pairs, panels, scale, bias, out, ldo, tag, stored):
    """As `panel_stored`, of int8. Many rows would widen each panel many times; keeping it wide pays from two dozens."""
    if rows < 24:
        panel_stored(part, parts, rows, x, ldx, weight, pairs, panels, scale, bias, out, ldo, tag, stored)
        return
    length, wide = pairs * 2 * PANEL, np.empty(pairs * 2 * PANEL, np.uint16)
    for panel in range(panels * part // parts, panels * (part + 1) // parts):
        column = panel * PANEL
        panel_widened(
            rows, x, ldx, weight + panel * length, pairs, length, wide.ctypes.data, scale + 4 * column,
            bias + 4 * column, out + column * size(tag), ldo, tag,
        )  # fmt: skip
    hold(wide)


def panel_share(part, parts, rows, x, ldx, weight, pairs, panels, scale, bias, out, ldo, tag, stored):
    """The panels that one of `parts` threads multiplies."""


@extending.overload(panel_share)
def _(part, parts, rows, x, ldx, weight, pairs, panels, scale, bias, out, ldo, tag, stored):
    share = panel_int8 if types.unliteral(stored) == types.int8 else panel_stored

    def chosen(part, parts, rows, x, ldx, weight, pairs, panels, scale, bias, out, ldo, tag, stored):
        share(part, parts, rows, x, ldx, weight, pairs, panels, scale, bias, out, ldo, tag, stored)

    return chosen


@kernel
def panel_kernel(rows, x, ldx, weight, pairs, panels, scale, bias, out, ldo, parts, tag, stored):
    use_threads(parts)
    for part in numba.prange(parts):
        panel_share(part, parts, rows, x, ldx, weight, pairs, panels, scale, bias, out, ldo, tag, stored)


@products
def dot_columns(begin, end, rows, x, ldx, row_of, weight, ldw, steps, out, ld_row, ld_column):
    """out[:, begin:end] = x[row_of] . rows [begin, end) of the weight.

    A few rows of x meet a block of the weight's rows while both are in the first-level cache.
    """
    block = begin
    while block < end:
        stop = min(block + BLOCK, end)
        fours = block + (stop - block) // 4 * 4
        row = 0
        while row + 6 <= rows:
            for column in range(block, fours, 4):
                place, target = weight + column * ldw, out + row * ld_row + column * ld_column
                dot_tile(x, ldx, row_of + 8 * row, place, ldw, steps, target, ld_row, ld_column, 6, 4)
            row += 6
        while row + 2 <= rows:
            for column in range(block, fours, 4):
                place, target = weight + column * ldw, out + row * ld_row + column * ld_column
                dot_tile(x, ldx, row_of + 8 * row, place, ldw, steps, target, ld_row, ld_column, 2, 4)
            row += 2
        if row < rows:
            for column in range(block, fours, 4):
                place, target = weight + column * ldw, out + row * ld_row + column * ld_column
                dot_tile(x, ldx, row_of + 8 * row, place, ldw, steps, target, ld_row, ld_column, 1, 4)
        for column in range(fours, stop):
            for row in range(rows):
                place, target = weight + column * ldw, out + row * ld_row + column * ld_column
                dot_tile(x, ldx, row_of + 8 * row, place, ldw, steps, target, ld_row, ld_column, 1, 1)
        block = stop


@products
def dot_rows(begin, end, x, weight, ldw, steps, out):
    """out[begin:end] = x . rows [begin, end) of the weight, which are read one after another.

    One row of x waits for memory: whole rows in turn are a stream that the processor fetches ahead of us.
    """
    whole, rest, numbers = steps // 4, steps % 4, at(out, np.float32(0))
    for row in range(begin, end):
        place, total = weight + row * ldw, np.float32(0)
        if whole > 0:
            total += dot_run(x, place, whole, 4)
        if rest > 0:
            total += dot_run(x + whole * 256, place + whole * 256, rest, 1)
        numbers[row] = total


@products
def dot_share(part, parts, rows, x, ldx, numbers, weight, ldw, columns, steps, out, ldo):
    """The rows of a weight that one of `parts` threads multiplies, with all rows of x; `numbers` are 0, 1, 2, ..."""
    begin, end = columns // 4 * part // parts * 4, columns // 4 * (part + 1) // parts * 4
    if part == parts - 1:
        end = columns
    dot_columns(begin, end, rows, x, ldx, numbers, weight, ldw, steps, out, ldo, np.int64(4))


@kernel
def dot_kernel(rows, x, ldx, weight, ldw, columns, steps, out, ldo, parts):
    row_of = np.arange(rows)
    numbers = row_of.ctypes.data
    use_threads(parts)
    for part in numba.prange(parts):
        dot_share(part, parts, rows, x, ldx, numbers, weight, ldw, columns, steps, out, ldo)
    hold(row_of)


def to_panels(weight: Tensor) -> Tensor:
    """[d_out, d_in] -> [d_out / PANEL, d_in / 2, PANEL, 2], dense."""
    rows, columns = weight.shape
    return weight.reshape(rows // PANEL, PANEL, columns // 2, 2).permute(0, 2, 1, 3).contiguous()


def from_panels(panels: Tensor) -> Tensor:
    """The inverse of `to_panels`."""
    count, pairs, outputs, _ = panels.shape
    return panels.permute(0, 2, 1, 3).reshape(count * outputs, pairs * 2)


def panel_rows(panels: Tensor, index: Tensor) -> Tensor:
    """Rows [N, d_in] of a weight in panels."""
    return panels[index // PANEL, :, index % PANEL].reshape(len(index), -1)


def panel_linear(x: Tensor, panels: Tensor, scale: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """x [T, d_in] (bf16) times panels in bf16 or int8; scale (int8 only), bias [d_out] (float32): [T, d_out]."""
    count, pairs, width, _ = panels.shape
    if x.dtype != torch.bfloat16 or x.dim() != 2 or x.shape[1] != 2 * pairs or x.stride(1) != 1:
        raise ValueError(
            f"linear: x {x.dtype} {tuple(x.shape)} with strides {x.stride()}; "
            f"expected dense bfloat16 rows [T, {2 * pairs}]"
        )
    out = torch.empty(x.shape[0], count * width, dtype=dtype)
    panel_kernel(
        x.shape[0], x.data_ptr(), x.stride(0) * 2, panels.data_ptr(), pairs, count, scale.data_ptr(),
        bias.data_ptr(), out.data_ptr(), out.stride(0) * out.element_size(), share_threads(), tag_of(out),
        STORED[panels.dtype],
    )  # fmt: skip
    return out


def dot_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, d] times the rows of a plain weight [n, d]: float32 [T, n]. Dense bf16 both, d a multiple of STEP."""
    (rows, d), columns = x.shape, weight.shape[0]
    out = torch.empty(rows, columns, dtype=torch.float32)
    dot_kernel(
        rows, x.data_ptr(), x.stride(0) * 2, weight.data_ptr(), weight.stride(0) * 2, columns, d // STEP,
        out.data_ptr(), columns * 4, share_threads(),
    )  # fmt: skip
    return out
