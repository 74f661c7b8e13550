"""From logits to tokens on a GPU, without a word to the host: the parameters of all slots lie there, so do the results.

The same choices as `engine.sampler.sample`, up to the rounding of sums: temperature, top-k, top-p, min-p, then the
inverse of the distribution over the vocabulary in the order of its ids, at the request's own uniform number. What a row
gets depends on that row alone, and never on the order in which programs run.

A row of logits is cut into chunks. `peaks` finds the largest logit; `weigh` sums the weights of every `BLOCK`
neighbours and, where a row is limited by top-k or top-p, what lies above each of a ladder of levels; `gather` lists the
tokens above the lowest level that the limit can need, most often a few hundred; `pick` finds the limit among them by
bisection over the bits of a float, and the token. Only rows whose limit admits thousands of tokens are read again and
again.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = tl.constexpr(64)  # neighbours in the vocabulary whose weights are summed first
CHUNK = tl.constexpr(4096)  # tokens of one program
LEVELS = tl.constexpr(16)  # e ** -1 to e ** -16 of the largest weight
LISTED = tl.constexpr(1024)  # tokens that a chunk may list
CANDIDATES = tl.constexpr(2048)  # tokens that one program holds at once
SLAB = tl.constexpr(4096)  # tokens of one step where a whole row is read
EVERY_BIT = tl.constexpr(0x7FFFFFFF)
INFINITY = tl.constexpr(float("inf"))
NOWHERE = tl.constexpr(0x7FFFFFFF)


class SamplingTable:
    """The parameters of every slot, on the device. `load` sets those of some slots in the order of the stream."""

    def __init__(self, slots: int, device: torch.device | str) -> None:
        self.temperature = torch.zeros(slots, dtype=torch.float32, device=device)
        self.top_k = torch.zeros(slots, dtype=torch.int64, device=device)
        self.top_p = torch.ones(slots, dtype=torch.float64, device=device)
        self.min_p = torch.zeros(slots, dtype=torch.float64, device=device)
        self.seed = torch.zeros(slots, dtype=torch.int64, device=device)

    def load(
        self, slots: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seed: Tensor
    ) -> None:
        """Of `slots` [N] int64: temperature, top_p, min_p float64, top_k int64, seed int64 (the bits of a uint64)."""
        device = self.seed.device
        slots = slots.to(device, non_blocking=True)
        columns = ((self.temperature, temperature), (self.top_k, top_k), (self.top_p, top_p), (self.min_p, min_p))
        for column, values in (*columns, (self.seed, seed)):
            column[slots] = values.to(device, column.dtype, non_blocking=True)


@triton.jit
def mixed(x):
    x = x + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def uniform_of(seed, position):
    """As `engine.sampler.uniform`: of the bits of a uint64, and a position."""
    step = position.to(tl.uint64) * 0x9E3779B97F4A7C15
    bits = mixed(mixed(seed.to(tl.uint64, bitcast=True)) + step) >> 11
    return bits.to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def scaled_at(LOGITS, row, ldx, ids, inside, peak, temperature):
    """Logits less the largest, over the temperature: all at most 0."""
    x = tl.load(LOGITS + row * ldx + ids, mask=inside, other=float("-inf"))
    return tl.div_rn(x - peak, temperature)


@triton.jit
def depth(scaled):
    """An integer that is larger the less likely a token is: the bits of what is at most 0, without the sign."""
    return scaled.to(tl.int32, bitcast=True) & EVERY_BIT


@triton.jit
def peaks_kernel(LOGITS, SLOTS, PEAKS, PLACES, ldx, vocab, chunks):
    row, chunk = tl.program_id(1).to(tl.int64), tl.program_id(0)
    if tl.load(SLOTS + row) < 0:
        return
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(LOGITS + row * ldx + ids, mask=ids < vocab, other=float("-inf"))
    x = tl.where(x != x, INFINITY, x)  # not a number: the largest of all, and not finite
    peak = tl.max(x, 0)
    tl.store(PEAKS + row * chunks + chunk, peak)
    tl.store(PLACES + row * chunks + chunk, tl.min(tl.where(x == peak, ids, NOWHERE), 0))


@triton.jit
def peak_of(PEAKS, row, chunks, WIDTH: tl.constexpr):
    at = tl.arange(0, WIDTH)
    return tl.max(tl.load(PEAKS + row * chunks + at, mask=at < chunks, other=float("-inf")), 0)


@triton.jit
def limits_of(TOP_K, TOP_P, slot, vocab):
    """(top_k, whether it limits, top_p, whether it does)."""
    top_k, top_p = tl.load(TOP_K + slot), tl.load(TOP_P + slot)
    return top_k, (top_k > 0) & (top_k < vocab), top_p, top_p < 1


@triton.jit
def floor_of(MIN_P, slot):
    """The greatest depth that min-p keeps."""
    min_p = tl.load(MIN_P + slot)
    level = tl.log(tl.where(min_p > 0, min_p, 1.0)).to(tl.float32)
    return tl.where(min_p > 0, depth(level), EVERY_BIT)


@triton.jit
def weigh_kernel(LOGITS, SLOTS, TEMPERATURE, TOP_K, TOP_P, MIN_P, PEAKS, SUMS, MASSES, COUNTS, ldx, vocab, chunks,
                 WIDTH: tl.constexpr):  # fmt: skip
    """SUMS [R, chunks * CHUNK / BLOCK] of what min-p keeps, or, where a row is limited, MASSES and COUNTS
    [R, chunks, LEVELS + 1] of what lies above each level; the last is of everything."""
    row, chunk = tl.program_id(1).to(tl.int64), tl.program_id(0)
    slot = tl.load(SLOTS + row)
    if slot < 0:
        return
    temperature = tl.load(TEMPERATURE + slot)
    if temperature <= 0:
        return
    peak = peak_of(PEAKS, row, chunks, WIDTH)
    if tl.abs(peak) == INFINITY:
        return
    temperature = tl.maximum(temperature, 1e-7)
    _, limits_k, _, limits_p = limits_of(TOP_K, TOP_P, slot, vocab)
    blocks: tl.constexpr = CHUNK // BLOCK
    ids = chunk * CHUNK + tl.arange(0, blocks)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    scaled = scaled_at(LOGITS, row, ldx, ids, ids < vocab, peak, temperature)
    weights = tl.exp(scaled)
    if limits_k | limits_p:
        place = (row * chunks + chunk) * (LEVELS + 1)
        for level in range(LEVELS):
            above = scaled >= -(level + 1.0)
            tl.store(MASSES + place + level, tl.sum(tl.where(above, weights, 0.0)))
            tl.store(COUNTS + place + level, tl.sum(above.to(tl.int32)))
        tl.store(MASSES + place + LEVELS, tl.sum(weights))
        tl.store(COUNTS + place + LEVELS, tl.sum((ids < vocab).to(tl.int32)))
    else:
        kept = tl.where(depth(scaled) <= floor_of(MIN_P, slot), weights, 0.0)
        tl.store(SUMS + (row * chunks + chunk) * blocks + tl.arange(0, blocks), tl.sum(kept, 1))


@triton.jit
def totals_of(MASSES, COUNTS, row, chunks, WIDTH: tl.constexpr, STEPS: tl.constexpr):
    """Over all chunks of a row, for each level: mass fp64, count int64 [STEPS], 0 beyond the levels."""
    at, level = tl.arange(0, WIDTH), tl.arange(0, STEPS)
    place = (row * chunks + at)[:, None] * (LEVELS + 1) + level[None, :]
    inside = (at < chunks)[:, None] & (level <= LEVELS)[None, :]
    mass = tl.sum(tl.load(MASSES + place, mask=inside, other=0).to(tl.float64), 0)
    return mass, tl.sum(tl.load(COUNTS + place, mask=inside, other=0).to(tl.int64), 0)


@triton.jit
def gather_kernel(LOGITS, SLOTS, TEMPERATURE, TOP_K, TOP_P, PEAKS, MASSES, COUNTS, IDS, LENGTHS, ldx, vocab, chunks,
                  WIDTH: tl.constexpr, STEPS: tl.constexpr):  # fmt: skip
    """IDS [R, chunks, LISTED], ascending: the tokens above the highest level that holds all that the limits keep.
    LENGTHS [R, chunks] counts them, also those there is no room for."""
    row, chunk = tl.program_id(1).to(tl.int64), tl.program_id(0)
    slot = tl.load(SLOTS + row)
    if slot < 0:
        return
    temperature = tl.load(TEMPERATURE + slot)
    top_k, limits_k, top_p, limits_p = limits_of(TOP_K, TOP_P, slot, vocab)
    if (temperature <= 0) | ((limits_k | limits_p) == 0):
        return
    peak = peak_of(PEAKS, row, chunks, WIDTH)
    if tl.abs(peak) == INFINITY:
        return
    mass, count = totals_of(MASSES, COUNTS, row, chunks, WIDTH, STEPS)
    level = tl.arange(0, STEPS)
    total = tl.sum(tl.where(level == LEVELS, mass, 0.0), 0)
    # A limit by top-k alone decides first: top-p keeps some of what it keeps. Sums of fp32 are trusted to 1e-4.
    enough = tl.where(limits_k, count >= top_k, mass >= top_p * total * 1.0001)
    chosen = tl.min(tl.where(enough & (level < LEVELS), level, LEVELS), 0)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    scaled = scaled_at(LOGITS, row, ldx, ids, ids < vocab, peak, tl.maximum(temperature, 1e-7))
    kept = (ids < vocab) & (scaled >= tl.where(chosen == LEVELS, float("-inf"), -(chosen + 1.0)))
    place = tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(IDS + (row * chunks + chunk) * LISTED + place, ids, mask=kept & (place < LISTED))
    tl.store(LENGTHS + row * chunks + chunk, tl.sum(kept.to(tl.int32), 0))


@triton.jit
def deepest(depths, weights, target):
    """The largest depth d so that the weights of what is less deep sum to less than `target`."""
    found = 0
    for i in range(31):
        trial = found | (1 << (30 - i))
        less = tl.sum(tl.where(depths < trial, weights, 0.0), 0)
        found = tl.where(less < target, trial, found)
    return found


@triton.jit
def deepest_in_row(LOGITS, row, ldx, vocab, peak, temperature, target, COUNTS: tl.constexpr):
    """As `deepest`, over a whole row, by the number of tokens or by their weights."""
    found = 0
    for i in range(31):
        trial = found | (1 << (30 - i))
        less, _ = sums_in_row(LOGITS, row, ldx, vocab, peak, temperature, trial, COUNTS)
        found = tl.where(less < target, trial, found)
    return found


@triton.jit
def sums_in_row(LOGITS, row, ldx, vocab, peak, temperature, trial, COUNTS: tl.constexpr):
    """Numbers or weights, fp64, of a row's tokens less deep than `trial`, and of those as deep."""
    at = tl.arange(0, SLAB)
    less = tl.zeros([SLAB], tl.float64)
    equal = tl.zeros([SLAB], tl.float64)
    for first in range(0, vocab, SLAB):
        scaled = scaled_at(LOGITS, row, ldx, first + at, first + at < vocab, peak, temperature)
        weights = tl.exp(scaled).to(tl.float64)
        if COUNTS:
            weights = (first + at < vocab).to(tl.float64)
        depths = depth(scaled)
        less += tl.where(depths < trial, weights, 0.0)
        equal += tl.where(depths == trial, weights, 0.0)
    return tl.sum(less, 0), tl.sum(equal, 0)


@triton.jit
def candidates_of(IDS, LENGTHS, row, chunks):
    """The ids that a row's chunks listed, one behind the other, and which of them are there."""
    at = tl.arange(0, CANDIDATES)
    chunk = tl.zeros([CANDIDATES], tl.int32)
    first = tl.zeros([CANDIDATES], tl.int32)
    end = 0
    for c in range(0, chunks):
        end += tl.load(LENGTHS + row * chunks + c)
        chunk += (at >= end).to(tl.int32)
        first = tl.where(at >= end, end, first)
    there = at < end
    return tl.load(IDS + (row * chunks + chunk) * LISTED + at - first, mask=there, other=0), there


@triton.jit
def pick_listed(LOGITS, IDS, LENGTHS, row, ldx, chunks, peak, temperature, top_k, limits_k, top_p, limits_p, total,
                floor, u):  # fmt: skip
    """The token of a limited row whose candidates fit into one program."""
    ids, there = candidates_of(IDS, LENGTHS, row, chunks)
    scaled = scaled_at(LOGITS, row, ldx, ids, there, peak, temperature)
    depths = tl.where(there, depth(scaled), EVERY_BIT)
    weights = tl.where(there, tl.exp(scaled), 0.0).to(tl.float64)
    limit = floor
    if limits_k:
        ones = there.to(tl.float64)
        of_k = deepest(depths, ones, top_k.to(tl.float64))
        limit = tl.minimum(limit, of_k)
        before = tl.sum(tl.where(depths < of_k, weights, 0.0), 0)
        tied = top_k.to(tl.float64) - tl.sum(tl.where(depths < of_k, ones, 0.0), 0)
        total = before + tied * tl.max(tl.where(depths == of_k, weights, 0.0), 0)
    if limits_p:
        limit = tl.minimum(limit, deepest(depths, weights, top_p * total))
    weights = tl.where(depths <= limit, weights, 0.0)
    cumulative = tl.cumsum(weights, 0)
    target = u * tl.sum(weights, 0)
    at = tl.arange(0, CANDIDATES)
    last = tl.max(tl.where(weights > 0, at, 0), 0)
    chosen = tl.minimum(tl.sum((cumulative <= target).to(tl.int32), 0), last)
    return tl.sum(tl.where(at == chosen, ids, 0), 0)


@triton.jit
def pick_in_row(LOGITS, row, ldx, vocab, peak, temperature, top_k, limits_k, top_p, limits_p, total, floor, u):
    """The token of a limited row that has too many candidates: the whole row is read some thirty times."""
    limit = floor
    if limits_k:
        of_k = deepest_in_row(LOGITS, row, ldx, vocab, peak, temperature, top_k.to(tl.float64), True)
        limit = tl.minimum(limit, of_k)
        before, equal = sums_in_row(LOGITS, row, ldx, vocab, peak, temperature, of_k, False)
        fewer, as_many = sums_in_row(LOGITS, row, ldx, vocab, peak, temperature, of_k, True)
        total = before + (top_k.to(tl.float64) - fewer) * equal / tl.maximum(as_many, 1.0)
    if limits_p:
        of_p = deepest_in_row(LOGITS, row, ldx, vocab, peak, temperature, top_p * total, False)
        limit = tl.minimum(limit, of_p)
    below, at_limit = sums_in_row(LOGITS, row, ldx, vocab, peak, temperature, limit, False)
    target = u * (below + at_limit)
    at = tl.arange(0, SLAB)
    passed = target - target  # 0 in fp64
    token = -1
    last = 0
    for first in range(0, vocab, SLAB):
        ids = first + at
        scaled = scaled_at(LOGITS, row, ldx, ids, ids < vocab, peak, temperature)
        weights = tl.where((depth(scaled) <= limit) & (ids < vocab), tl.exp(scaled), 0.0).to(tl.float64)
        cumulative = passed + tl.cumsum(weights, 0)
        here = tl.min(tl.where((cumulative > target) & (weights > 0), ids, NOWHERE), 0)
        token = tl.where((token < 0) & (here != NOWHERE), here, token)
        last = tl.maximum(last, tl.max(tl.where(weights > 0, ids, 0), 0))
        passed += tl.sum(weights, 0)
    return tl.where(token < 0, last, token)


@triton.jit
def pick_by_blocks(LOGITS, SUMS, row, ldx, vocab, blocks, peak, temperature, floor, u, WIDTH: tl.constexpr):
    """The token of a row without limits: first the block, then the token in it."""
    at = tl.arange(0, WIDTH)
    sums = tl.load(SUMS + row * blocks + at, mask=at < blocks, other=0).to(tl.float64)
    cumulative = tl.cumsum(sums, 0)
    target = u * tl.sum(sums, 0)
    last = tl.max(tl.where(sums > 0, at, 0), 0)
    block = tl.minimum(tl.sum((cumulative <= target).to(tl.int32), 0), last)
    target -= tl.sum(tl.where(at < block, sums, 0.0), 0)
    ids = block * BLOCK + tl.arange(0, BLOCK)
    scaled = scaled_at(LOGITS, row, ldx, ids, ids < vocab, peak, temperature)
    weights = tl.where((depth(scaled) <= floor) & (ids < vocab), tl.exp(scaled), 0.0).to(tl.float64)
    within = tl.sum((tl.cumsum(weights, 0) <= target).to(tl.int32), 0)
    last_within = tl.max(tl.where(weights > 0, tl.arange(0, BLOCK), 0), 0)
    return block * BLOCK + tl.minimum(within, last_within)


@triton.jit
def pick_kernel(
    LOGITS, SLOTS, POSITIONS, TEMPERATURE, TOP_K, TOP_P, MIN_P, SEED, PEAKS, PLACES, SUMS, MASSES, COUNTS, IDS, LENGTHS,
    TOKENS, FINITE, ldx, vocab, chunks,
    RANDOM: tl.constexpr, LIMITED: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(SLOTS + row)
    if slot < 0:
        return
    at = tl.arange(0, WIDTH)
    peaks = tl.load(PEAKS + row * chunks + at, mask=at < chunks, other=float("-inf"))
    peak = tl.max(peaks, 0)
    places = tl.load(PLACES + row * chunks + at, mask=at < chunks, other=NOWHERE)
    token = tl.min(tl.where(peaks == peak, places, NOWHERE), 0)
    sound = tl.abs(peak) != INFINITY
    tl.store(FINITE + row, sound)
    if RANDOM:
        temperature = tl.load(TEMPERATURE + slot)
        if (temperature > 0) & sound:
            temperature = tl.maximum(temperature, 1e-7)
            u = uniform_of(tl.load(SEED + slot), tl.load(POSITIONS + row))
            top_k, limits_k, top_p, limits_p = limits_of(TOP_K, TOP_P, slot, vocab)
            floor = floor_of(MIN_P, slot)
            if (limits_k | limits_p) == 0:
                blocks = chunks * (CHUNK // BLOCK)
                token = pick_by_blocks(LOGITS, SUMS, row, ldx, vocab, blocks, peak, temperature, floor, u, BLOCKS)
            elif LIMITED:
                mass, _ = totals_of(MASSES, COUNTS, row, chunks, WIDTH, STEPS)
                total = tl.sum(tl.where(tl.arange(0, STEPS) == LEVELS, mass, 0.0), 0)
                lengths = tl.load(LENGTHS + row * chunks + at, mask=at < chunks, other=0)
                if (tl.sum(lengths, 0) <= CANDIDATES) & (tl.max(lengths, 0) <= LISTED):
                    token = pick_listed(LOGITS, IDS, LENGTHS, row, ldx, chunks, peak, temperature, top_k, limits_k,
                                        top_p, limits_p, total, floor, u)  # fmt: skip
                else:
                    token = pick_in_row(LOGITS, row, ldx, vocab, peak, temperature, top_k, limits_k,
                                        top_p, limits_p, total, floor, u)  # fmt: skip
    tl.store(TOKENS + row, token.to(tl.int64))


class Sampler:
    """Samples up to `rows` rows of a step, in buffers that stay where they are, so that a graph may be captured.

    The token and the verdict of row i are `tokens[i]` int64 and `finite[i]` bool, until the next step.
    """

    def __init__(self, table: SamplingTable, rows: int, vocab: int) -> None:
        device = table.seed.device
        self.table, self.vocab = table, vocab
        self.chunks = chunks = triton.cdiv(vocab, CHUNK.value)
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self.finite = torch.ones(rows, dtype=torch.bool, device=device)
        self._peaks = torch.empty(rows, chunks, device=device)
        self._places = torch.empty(rows, chunks, dtype=torch.int32, device=device)
        self._sums = torch.empty(rows, chunks * (CHUNK.value // BLOCK.value), device=device)
        self._masses = torch.empty(rows, chunks, LEVELS.value + 1, device=device)
        self._counts = torch.empty(rows, chunks, LEVELS.value + 1, dtype=torch.int32, device=device)
        self._ids = torch.empty(rows, chunks, LISTED.value, dtype=torch.int32, device=device)
        self._lengths = torch.empty(rows, chunks, dtype=torch.int32, device=device)

    def sample(
        self, logits: Tensor, slots: Tensor, positions: Tensor, *, random: bool = True, limited: bool = True
    ) -> tuple[Tensor, Tensor]:
        """(tokens [R] int64, finite [R] bool) of fp32 logits [R, V]; nothing waits for the device.

        `slots` [R] int64 say whose parameters hold (-1: no row, its results stay), `positions` [R] int64 where the
        tokens will stand. `random` and `limited`: whether any row may have a temperature, top-k or top-p; with both a
        captured graph serves all. Raises ValueError for logits that the buffers were not made for.
        """
        rows, vocab = logits.shape
        if logits.dtype != torch.float32 or logits.stride(1) != 1 or vocab != self.vocab or rows > len(self.tokens):
            raise ValueError(
                f"logits are {logits.dtype} {tuple(logits.shape)} with strides {logits.stride()}; expected dense "
                f"torch.float32 rows of {self.vocab}, at most {len(self.tokens)}"
            )
        if rows == 0:
            return self.tokens[:0], self.finite[:0]
        t, width = self.table, triton.next_power_of_2(self.chunks)
        shape = (logits.stride(0), vocab, self.chunks)
        grid = (self.chunks, rows)
        steps = triton.next_power_of_2(LEVELS.value + 1)
        limited = limited and random
        peaks_kernel[grid](logits, slots, self._peaks, self._places, *shape)
        if random:
            weigh_kernel[grid](
                logits, slots, t.temperature, t.top_k, t.top_p, t.min_p, self._peaks, self._sums, self._masses,
                self._counts, *shape, WIDTH=width,
            )  # fmt: skip
        if limited:
            gather_kernel[grid](
                logits, slots, t.temperature, t.top_k, t.top_p, self._peaks, self._masses, self._counts, self._ids,
                self._lengths, *shape, WIDTH=width, STEPS=steps,
            )  # fmt: skip
        pick_kernel[(rows,)](
            logits, slots, positions, t.temperature, t.top_k, t.top_p, t.min_p, t.seed, self._peaks, self._places,
            self._sums, self._masses, self._counts, self._ids, self._lengths, self.tokens, self.finite, *shape,
            RANDOM=random, LIMITED=limited, WIDTH=width, STEPS=steps,
            BLOCKS=triton.next_power_of_2(self.chunks * (CHUNK.value // BLOCK.value)), num_warps=8,
        )  # fmt: skip
        return self.tokens[:rows], self.finite[:rows]


def restrict(logits: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
    """A copy in which of each row in `rows` only the tokens of the pairs (rows[i], tokens[i]) are possible.

    A row that is not finite stays so, whatever the logits of its tokens are.
    """
    peak = logits.amax(dim=1)
    kept = logits[rows, tokens] + (peak - peak)[rows]
    masked = logits.index_fill(0, rows, -torch.inf)
    return masked.index_put_((rows, tokens), kept)
