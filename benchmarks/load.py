"""The load of a benchmark and what is read from its clocks. No torch: the process that plays the clients is light."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Json = dict[str, Any]
CASES = ("base", "one", "all", "zipf", "mixed")
ALL_CASES = (*CASES, "uniform")


@dataclass(slots=True)
class Trace:
    """One request: when it was sent, when its pieces came (seconds), how many tokens they were."""

    sent: float
    times: list[float] = field(default_factory=list)
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Ask:
    """A prompt and the number of the adapter that answers it; None is the base."""

    prompt: list[int]
    adapter: int | None


Clients = list[list[Ask]]  # what each client sends, one after the other


def possible(case: str, clients: int) -> bool:
    """Alone on the machine, a client that changes its adapter is a client with one adapter."""
    return clients > 1 or case in ("base", "one")


def choose_adapters(case: str, clients: int, rounds: int, adapters: int, draw: np.random.Generator) -> np.ndarray:
    """Numbers of adapters [rounds, clients]; -1 is the base."""
    if case == "base":
        return np.full((rounds, clients), -1)
    if case == "one":
        return np.zeros((rounds, clients), np.int64)
    if case == "zipf":  # the adapter of rank k is asked for in proportion to 1 / k
        weights = 1 / np.arange(1, adapters + 1)
        return draw.choice(adapters, (rounds, clients), p=weights / weights.sum())
    if case == "uniform":
        return draw.integers(adapters, size=(rounds, clients))
    turn = np.tile(np.arange(clients), (rounds, 1))
    return turn % adapters if case == "all" else np.where(turn % 2, turn // 2 % adapters, -1)


def make_clients(
    case: str, clients: int, rounds: int, adapters: int, prompt: int, vocabulary: int, draw: np.random.Generator
) -> Clients:
    """Prompts of random tokens, no two alike, so that no prefix is found in a cache."""
    chosen = choose_adapters(case, clients, rounds, adapters, draw)
    tokens = draw.integers(min(257, vocabulary // 2), vocabulary, (rounds, clients, prompt))
    return [
        [Ask(tokens[r, c].tolist(), None if chosen[r, c] < 0 else int(chosen[r, c])) for r in range(rounds)]
        for c in range(clients)
    ]


def summarise(traces: Sequence[Sequence[Trace]], prompt: int) -> Json:
    """Rates and latencies of the traces of each client, in tokens a second and seconds.

    `prefill` runs from the first request of a round to the last first token, `decode` from there to the first request
    that ends.
    """
    flat = [trace for client in traces for trace in client]
    begin, end = min(trace.sent for trace in flat), max(trace.times[-1] for trace in flat)
    first = [trace.times[0] - trace.sent for trace in flat]
    gaps = np.concatenate([np.diff(trace.times) for trace in flat]) if any(len(t.times) > 1 for t in flat) else [0.0]
    filling = decoding = decoded = 0.0
    for wave in zip(*traces, strict=True):
        start, stop = max(trace.times[0] for trace in wave), min(trace.times[-1] for trace in wave)
        filling += start - min(trace.sent for trace in wave)
        if stop > start:
            decoding += stop - start
            decoded += sum(trace.tokens * _share(np.array(trace.times), start, stop) for trace in wave)
    tokens = sum(trace.tokens for trace in flat)
    return {
        "tokens_per_second": tokens / (end - begin),
        "prefill_tokens_per_second": prompt * len(flat) / filling,
        "decode_tokens_per_second": decoded / decoding if decoding else None,
        **{f"ttft_p{p}": float(np.percentile(first, p)) for p in (50, 95)},
        **{f"itl_p{p}": float(np.percentile(gaps, p)) for p in (50, 95, 99)},
        "seconds": end - begin,
        "tokens": tokens,
    }


def _share(times: np.ndarray, start: float, stop: float) -> float:
    return float(np.mean((start < times) & (times <= stop)))


def median(values: Sequence[float | None]) -> float | None:
    """Of those that are known."""
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """95% bootstrap interval of the median."""
    draws = np.random.default_rng(0).choice(np.asarray(ratios), (10_000, len(ratios)))
    low, high = np.percentile(np.median(draws, 1), [2.5, 97.5])
    return float(low), float(high)


def compare(
    name: str, above: Sequence[float], below: Sequence[float], bar: float | None = None, *, at_most: bool = False,
    **labels: Any,
) -> Json:  # fmt: skip
    """Median ratio over pairs measured in the same repeat; the bar holds when all of the interval is beyond it."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    low, high = interval(ratios)
    holds = None if bar is None else (high <= bar if at_most else low >= bar)
    return {
        "ratio": name, **labels, "median": float(np.median(ratios)), "ci": [low, high], "pairs": len(ratios),
        "bar": bar, "at_most": at_most, "holds": holds,
    }  # fmt: skip
