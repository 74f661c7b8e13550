"""The two products of attention on bf16 keys and values, one or four query rows at a time (see `cpu_products`).

Keys and values are found through lists of addresses, so that a tile does not care which blocks they lie in. Meanwhile
those of the next tile are called into the cache: memory works while the processor does.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from lorikeet.kernels.cpu_products import (
    I32,
    I64,
    LANES,
    PAIRS,
    STEP,
    SUMS,
    ZERO,
    add_products,
    broadcast,
    load,
    plus,
    products,
    store,
    sum_over,
)
from lorikeet.kernels.cpu_runtime import emit_prefetch, literal_intrinsic

HALVES = ir.VectorType(ir.IntType(16), 2 * LANES)
# Interleaving two rows of 32 bf16 works in quarters of a register: these put the sums of both results in order again.
FIRST = [lane + quarter * 4 + half * LANES for quarter in (0, 1) for half in (0, 1) for lane in range(4)]
SECOND = [lane + quarter * 4 + half * LANES for quarter in (2, 3) for half in (0, 1) for lane in range(4)]


def _shuffled(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


def _totals(builder: Any, sums: list[Any]) -> Any:
    """The totals of 16 registers in one, in their order: halves are added pair by pair, four times."""
    width = LANES
    while len(sums) > 1:
        groups = [range(start, start + width) for start in range(0, 2 * LANES, width)]
        low = [lane for group in groups for lane in group[: width // 2]]
        high = [lane for group in groups for lane in group[width // 2 :]]
        pairs = zip(sums[::2], sums[1::2], strict=True)
        sums = [builder.fadd(_shuffled(builder, a, b, low), _shuffled(builder, a, b, high)) for a, b in pairs]
        width //= 2
    return sums[0]


@literal_intrinsic
def score_tile(typing_context, queries, keys, steps, out, ldo, following, rows):
    """out[row, key] (float32, rows `ldo` bytes apart) = q . k for `rows` queries and 16 / rows keys.

    `rows` is a literal, 1 or 4. `queries` and `keys` are the addresses of their addresses; each has `steps` times STEP
    numbers. As many keys, whose addresses are at `following`, are called into the cache.
    """
    if not isinstance(rows, types.IntegerLiteral):
        return None
    n, m = rows.literal_value, LANES // rows.literal_value

    def generate(context, builder, signature, arguments):
        queries, keys, steps, out, ldo, following = arguments[:6]
        query_at = [load(builder, plus(builder, queries, 8 * i), I64, 8) for i in range(n)]
        key_at = [load(builder, plus(builder, keys, 8 * i), I64, 8) for i in range(m)]
        called = [load(builder, plus(builder, following, 8 * i), I64, 8) for i in range(m)]

        def body(step, sums):
            offset = builder.mul(step, ir.Constant(I64, 2 * STEP))
            for place in called:
                emit_prefetch(builder, builder.add(place, offset))
            k = [load(builder, builder.add(place, offset), PAIRS, 2) for place in key_at]
            q = [load(builder, builder.add(place, offset), PAIRS, 2) for place in query_at]
            return [add_products(builder, sums[m * i + j], q[i], k[j]) for i in range(n) for j in range(m)]

        totals = _totals(builder, sum_over(builder, steps, [ZERO] * 16, body))
        for i in range(n):
            row = _shuffled(builder, totals, totals, list(range(m * i, m * i + m)))
            store(builder, row, builder.add(out, builder.mul(ldo, ir.Constant(I64, i))), 4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6, rows), generate


def _two_rows(builder: Any, listed: Any, column: Any) -> list[Any]:
    return [builder.add(load(builder, plus(builder, listed, 8 * i), I64, 8), column) for i in (0, 1)]


def _call(builder: Any, places: list[Any], registers: int) -> None:
    for place in places:
        for i in range(registers):
            emit_prefetch(builder, plus(builder, place, 2 * STEP * i))


@literal_intrinsic
def value_tile(typing_context, weights, ldw, values, pairs, column, totals, ldt, following, halves, rows):
    """totals[row, :32 halves] += sum over 2 `pairs` keys of weights[row, key] (bf16) * v[column:], for `rows` rows.

    `values` is the address of the values' addresses, `column` an offset in bytes into each. `halves` and `rows` are
    literals. As much of other values, whose addresses are at `following`, is called into the cache.
    """
    if not isinstance(halves, types.IntegerLiteral) or not isinstance(rows, types.IntegerLiteral):
        return None
    count, n = halves.literal_value, rows.literal_value
    low = [lane for start in range(0, 2 * LANES, 8) for i in range(start, start + 4) for lane in (i, i + 2 * LANES)]
    high = [lane + 4 for lane in low]

    def generate(context, builder, signature, arguments):
        weights, ldw, values, pairs, column, totals, ldt, following = arguments[:8]
        weights_at = [builder.add(weights, builder.mul(ldw, ir.Constant(I64, row))) for row in range(n)]
        totals_at = [builder.add(totals, builder.mul(ldt, ir.Constant(I64, row))) for row in range(n)]

        def body(pair, sums):
            at_pair = builder.mul(pair, ir.Constant(I64, 16))
            rows_at, called = (_two_rows(builder, builder.add(at, at_pair), column) for at in (values, following))
            _call(builder, called, count)
            interleaved = []
            for half in range(count):
                a, b = (load(builder, plus(builder, place, 2 * STEP * half), HALVES, 2) for place in rows_at)
                for lanes in (low, high):
                    interleaved.append(builder.bitcast(_shuffled(builder, a, b, lanes), PAIRS))
            result = []
            for row, place in enumerate(weights_at):
                address = builder.add(place, builder.mul(pair, ir.Constant(I64, 4)))
                weight = broadcast(builder, load(builder, address, I32, 2))
                for i, value in enumerate(interleaved):
                    result.append(add_products(builder, sums[row * 2 * count + i], value, weight))
            return result

        for row, sums in enumerate(_chunks(sum_over(builder, pairs, [ZERO] * (2 * n * count), body), 2 * count)):
            for i in range(0, 2 * count, 2):
                for part, lanes in enumerate((FIRST, SECOND)):
                    place = plus(builder, totals_at[row], 4 * LANES * (i + part))
                    total = builder.fadd(load(builder, place, SUMS, 4), _shuffled(builder, sums[i], sums[i + 1], lanes))
                    store(builder, total, place, 4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8, halves, rows), generate


def _chunks(values: list[Any], size: int) -> list[list[Any]]:
    return [values[start : start + size] for start in range(0, len(values), size)]


@products
def score_keys(queries, keys, count, d, out, ldo, following, rows):
    """Scores of 4 queries (of one where `rows` is 1) with `count` keys, and with some more, up to a whole tile."""
    if rows == 1:
        for j in range(0, count, LANES):
            score_tile(queries, keys + 8 * j, d // STEP, out + 4 * j, ldo, following + 8 * j, 1)
    else:
        for j in range(0, count, 4):
            score_tile(queries, keys + 8 * j, d // STEP, out + 4 * j, ldo, following + 8 * j, 4)


@products
def add_values(weights, ldw, values, pairs, d, totals, ldt, following, rows):
    """totals[4, d] += weights[4, 2 pairs] . values, or the first row alone where `rows` is 1."""
    column = 0
    while column + 64 <= d:
        if rows == 1:
            value_tile(weights, ldw, values, pairs, 2 * column, totals + 4 * column, ldt, following, 2, 1)
        else:
            value_tile(weights, ldw, values, pairs, 2 * column, totals + 4 * column, ldt, following, 2, 4)
        column += 64
    if column < d:
        if rows == 1:
            value_tile(weights, ldw, values, pairs, 2 * column, totals + 4 * column, ldt, following, 1, 1)
        else:
            value_tile(weights, ldw, values, pairs, 2 * column, totals + 4 * column, ldt, following, 1, 4)
