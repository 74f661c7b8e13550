"""Questions beside the table of cases: each starts what it needs, measures in interleaved repeats and returns JSON."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import cycle, islice

import numpy as np

from load import Ask, Clients, Json, compare, make_clients, median
from ours import CONTEXT, OfflineSide, ServerSide, Setup
from roofline import Meter, decode_work, rank_size, weight_bytes
from worker import progress

RANKS = (8, 16, 24, 32, 48, 64, 96, 128)  # 52 on average
STREAMS, ARRIVALS, LONG_PROMPT = 8, 8, 512


def prompts(setup: Setup, count: int, length: int, draw: np.random.Generator) -> list[list[int]]:
    return [asks[0].prompt for asks in make_clients("base", count, 1, 1, length, setup.fixture.spec.vocab_size, draw)]


def wave(setup: Setup, adapters: Sequence[int | None], options: Namespace, draw: np.random.Generator) -> Clients:
    """One request for each of `adapters`."""
    texts = prompts(setup, len(adapters), options.prompt, draw)
    return [[Ask(text, adapter)] for text, adapter in zip(texts, adapters, strict=True)]


def repeats(options: Namespace, question: str) -> Iterator[int]:
    for repeat in range(options.repeats):
        progress(f"{question}: repeat {repeat + 1} of {options.repeats}")
        yield repeat


def distinct(setup: Setup, options: Namespace) -> Json:
    """Does a step's time grow with the number of distinct adapters by more than 1.5x the time of reading them?

    And do rows of the base pay for their neighbours' adapters: is a batch in which only every other row has an
    adapter (as many distinct ones) slower than one in which every row has?
    """
    rows = max(options.batch)
    counts = [2**i for i in range(int(math.log2(min(rows, len(setup.adapters)))) + 1)]
    half = counts[-1] // 2
    kinds: dict[str, list[int | None]] = {str(count): [row % count for row in range(rows)] for count in counts}
    kinds["0"] = [None] * rows
    kinds["mixed"] = [row // 2 % half if row % 2 else None for row in range(rows)]
    meter, draw = Meter(setup.fixture.spec, setup.dtype, [rows]), np.random.default_rng(1)
    side = OfflineSide(setup)
    steps: dict[str, list[float]] = {kind: [] for kind in kinds}
    added, floor = [], []
    try:
        side.run(wave(setup, kinds[str(counts[-1])], options, draw), 2)
        for repeat in repeats(options, "distinct"):
            bandwidth = meter.measure().bandwidth
            names = list(kinds)
            for kind in names[repeat % len(names) :] + names[: repeat % len(names)]:
                steps[kind].append(side.run(wave(setup, kinds[kind], options, draw), options.new)["itl_p50"])
            one = options.rank * rank_size(setup.fixture.spec) * setup.dtype.itemsize
            added.append(steps[str(counts[-1])][-1] - steps["1"][-1])
            floor.append((counts[-1] - 1) * one / bandwidth)
    finally:
        side.close()
    return {
        "clients": rows,
        "step_seconds": {kind: median(values) for kind, values in steps.items()},
        "increment_seconds": median(added),
        "read_seconds": median(floor),
        "ratios": [
            compare("increment / reading the adapters", added, floor, 1.5, at_most=True, clients=rows),
            compare(f"{half} adapters, base rows between / none", steps["mixed"], steps[str(half)], 1.0, at_most=True,
                    clients=rows),
        ],
    }  # fmt: skip


def mixed_ranks(setup: Setup, options: Namespace) -> Json:
    """Do adapters of ranks 8 to 128 cost as much as equal ones with the same sum of ranks?"""
    rows = [clients // len(RANKS) * len(RANKS) for clients in options.batch if clients >= len(RANKS)]
    if not rows:
        raise SystemExit(f"--question mixed-ranks: found --batch {options.batch}; expected one of {len(RANKS)} or more")
    mixed = setup.fixture.adapters(list(islice(cycle(RANKS), max(rows))))
    equal = setup.fixture.adapters([sum(RANKS) // len(RANKS)] * max(rows))
    both = replace(setup, adapters=[*mixed, *equal])
    draw = np.random.default_rng(2)
    side = OfflineSide(both)
    samples: dict[tuple[str, int], list[Json]] = {(kind, n): [] for n in rows for kind in ("mixed", "equal")}
    try:
        for start in range(0, len(both.adapters), max(rows)):
            side.run(wave(both, list(range(start, start + max(rows))), options, draw), 2)
        for repeat in repeats(options, "mixed-ranks"):
            for kind, n in list(samples)[:: 1 if repeat % 2 else -1]:
                start = 0 if kind == "mixed" else max(rows)
                clients = wave(both, list(range(start, start + n)), options, draw)
                samples[kind, n].append(side.run(clients, options.new))
    finally:
        side.close()

    def values(kind: str, n: int, metric: str) -> list[float]:
        return [sample[metric] for sample in samples[kind, n]]

    return {
        "ranks": RANKS,
        "step_seconds": {f"{kind} x{n}": median(values(kind, n, "itl_p50")) for kind, n in samples},
        "ratios": [
            compare(f"mixed / equal ranks, {metric}", values("mixed", n, metric), values("equal", n, metric), 1.1,
                    at_most=True, clients=n)
            for n in rows
            for metric in ("itl_p50", "seconds")
        ],
    }  # fmt: skip


def interference(setup: Setup, options: Namespace) -> Json:
    """How much longer is the p99 gap of running streams while 8 new prompts of 512 tokens come in?"""
    side, draw = ServerSide(setup), np.random.default_rng(3)
    quiet, disturbed, first = [], [], []
    try:
        side.run(_base(setup, STREAMS, options, draw), 2)
        for _ in repeats(options, "interference"):
            streams = [(one, {}) for one in prompts(setup, STREAMS, options.prompt, draw)]
            arrivals = [(one, {}) for one in prompts(setup, ARRIVALS, LONG_PROMPT, draw)]
            sample = side.clients.ask(
                "interfere", streams=streams, arrivals=arrivals, room=CONTEXT - options.prompt, quiet=options.new
            )
            quiet.append(float(np.percentile(sample["quiet"], 99)))
            disturbed.append(float(np.percentile(sample["disturbed"] or sample["quiet"], 99)))
            first.append(max(sample["arrival_ttft"]))
    finally:
        side.close()
    return {
        "streams": STREAMS, "arrivals": ARRIVALS, "arrival_tokens": LONG_PROMPT,
        "quiet_p99": median(quiet), "disturbed_p99": median(disturbed), "last_first_token": median(first),
        "ratios": [compare("p99 gap, disturbed / quiet", disturbed, quiet, 1.5, at_most=True, clients=STREAMS)],
    }  # fmt: skip


def memory(setup: Setup, options: Namespace) -> Json:
    """Are weights, cache and adapters in memory once? One measurement: it hardly varies.

    The cache is sized so that one round fills it; `libraries` is the process before it loads the model.
    """
    rows, draw = max(options.batch), np.random.default_rng(4)
    tokens = max(rows * (options.prompt + options.new + 16), 1024)
    tight = replace(setup, settings={**setup.settings, "kv_memory": tokens * setup.token_bytes})
    progress("memory")
    side = OfflineSide(tight)
    try:
        side.run(_base(setup, rows, options, draw), options.new)
        base = side.memory()
        for start in range(0, len(setup.adapters), rows):
            some = list(range(start, min(start + rows, len(setup.adapters))))
            side.run(wave(tight, some, options, draw), options.new)
        adapted = side.memory()
    finally:
        side.close()
    weights = weight_bytes(setup.fixture.spec, setup.itemsizes)
    kv, adapters = side.started["kv_bytes"], sum(setup.adapter_bytes())
    libraries = side.started["libraries"]["rss"]
    return {
        "weights": weights, "kv": kv, "adapters": adapters, "libraries": libraries,
        "loaded": side.started["loaded"], "base": base, "adapted": adapted,
        "rss_over_parts": adapted["rss"] / (weights + kv + adapters),
        "rss_without_libraries_over_parts": (adapted["rss"] - libraries) / (weights + kv + adapters),
        "adapters_over_their_bytes": (adapted["rss"] - base["rss"]) / adapters,
        "bar": 1.25,
    }  # fmt: skip


def int8(setup: Setup, options: Namespace) -> Json:
    """How much faster does an int8 base decode, for each number of clients?"""
    draw = np.random.default_rng(5)
    kinds = ("int8", "none")
    sides: dict[str, OfflineSide] = {}
    speeds: dict[tuple[str, int], list[float]] = {(kind, n): [] for n in options.batch for kind in kinds}
    try:
        for kind in kinds:
            sides[kind] = OfflineSide(replace(setup, settings={**setup.settings, "quantize": kind}))
            for n in options.batch:
                sides[kind].run(_base(setup, n, options, draw), 2)
        for repeat in repeats(options, "int8"):
            for kind, n in list(speeds)[:: 1 if repeat % 2 else -1]:
                clients = _base(setup, n, options, draw)
                speeds[kind, n].append(sides[kind].run(clients, options.new)["decode_tokens_per_second"])
    finally:
        for side in sides.values():
            side.close()
    return {
        "decode_tokens_per_second": {f"{kind} x{n}": median(values) for (kind, n), values in speeds.items()},
        "ratios": [
            compare("int8 / bf16, decode", speeds["int8", n], speeds["none", n], 1.6 if n == 1 else None, clients=n)
            for n in options.batch
        ],
    }


def floor(setup: Setup, options: Namespace) -> Json:
    """How much longer is a decode step, every row on another adapter, than this machine needs for its work at least?

    Its bytes are read as often as a step reads them: a small base's from the third-level cache.
    """
    spec, draw, side = setup.fixture.spec, np.random.default_rng(6), OfflineSide(setup)
    steps: dict[int, list[float]] = {n: [] for n in options.batch}
    least: dict[int, list[float]] = {n: [] for n in options.batch}
    works = {
        n: decode_work(spec, setup.itemsizes, n, options.prompt + options.new // 2, *([n, n] if n > 1 else [0, 0]),
                       options.rank)
        for n in options.batch
    }  # fmt: skip
    meters = {n: Meter(spec, setup.dtype, [n], int(work.bytes)) for n, work in works.items()}
    try:
        for n in options.batch:
            side.run(_distinct(setup, n, options, draw), 2)
        for _ in repeats(options, "floor"):
            for n in options.batch:
                least[n].append(meters[n].measure().seconds(works[n], n))
                steps[n].append(side.run(_distinct(setup, n, options, draw), options.new)["itl_p50"])
    finally:
        side.close()
    return {
        "step_seconds": {n: median(values) for n, values in steps.items()},
        "least_seconds": {n: median(values) for n, values in least.items()},
        "bytes": {n: work.bytes for n, work in works.items()},
        "operations": {n: work.operations for n, work in works.items()},
        "ratios": [compare("step / least", steps[n], least[n], 1.6, at_most=True, clients=n) for n in options.batch],
    }


def _distinct(setup: Setup, clients: int, options: Namespace, draw: np.random.Generator) -> Clients:
    return _base(setup, 1, options, draw) if clients == 1 else wave(setup, range(clients), options, draw)


def _base(setup: Setup, clients: int, options: Namespace, draw: np.random.Generator) -> Clients:
    return make_clients("base", clients, 1, 1, options.prompt, setup.fixture.spec.vocab_size, draw)


QUESTIONS: dict[str, Callable[[Setup, Namespace], Json]] = {
    "distinct": distinct,
    "mixed-ranks": mixed_ranks,
    "interference": interference,
    "memory": memory,
    "int8": int8,
    "floor": floor,
}
