"""Draws the requests of a scenario ahead, as arrays, from its seed alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lorikeet.simulate.scenario import (
    AdapterDraw,
    Arrivals,
    FixedLength,
    Gamma,
    Length,
    OnOff,
    Poisson,
    Scenario,
    Steady,
    Stream,
    UniformLength,
    ZipfDraw,
)

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

BASE = -1


@dataclass(frozen=True, slots=True)
class Traffic:
    """Requests by arrival, arrays [requests]: seconds, index of the stream, number of the adapter (-1 is the base),
    tokens of prompt and output."""

    time: Floats
    stream: Ints
    adapter: Ints
    prompt: Ints
    output: Ints

    def __len__(self) -> int:
        return len(self.time)


def draw_traffic(scenario: Scenario) -> Traffic:
    """The first `scenario.requests` requests of all streams. Each stream has its own random numbers, so that one can
    be changed without the others."""
    count = scenario.requests
    parts = []
    for i, stream in enumerate(scenario.traffic):
        arrivals, bodies = (np.random.default_rng([scenario.seed, i, part]) for part in range(2))
        parts.append(_draw_stream(stream, i, count, scenario.adapters.count, arrivals, bodies))
    order = np.argsort(np.concatenate([part.time for part in parts]), kind="stable")[:count]
    return Traffic(
        time=np.concatenate([part.time for part in parts])[order],
        stream=np.concatenate([part.stream for part in parts])[order],
        adapter=np.concatenate([part.adapter for part in parts])[order],
        prompt=np.concatenate([part.prompt for part in parts])[order],
        output=np.concatenate([part.output for part in parts])[order],
    )


def _draw_stream(
    stream: Stream, index: int, count: int, adapters: int, arrivals: np.random.Generator, bodies: np.random.Generator
) -> Traffic:
    return Traffic(
        time=draw_arrivals(stream.arrivals, count, arrivals),
        stream=np.full(count, index),
        adapter=draw_adapters(stream.adapters, count, adapters, bodies),
        prompt=draw_lengths(stream.prompt, count, bodies),
        output=draw_lengths(stream.output, count, bodies),
    )


def draw_arrivals(kind: Arrivals, count: int, draw: np.random.Generator) -> Floats:
    """Times of `count` arrivals in seconds, ascending."""
    if isinstance(kind, Steady):
        return np.arange(1, count + 1) / kind.rate
    if isinstance(kind, Poisson):
        return np.cumsum(draw.exponential(1 / kind.rate, count))
    if isinstance(kind, Gamma):
        shape = kind.variation**-2
        return np.cumsum(draw.gamma(shape, 1 / (kind.rate * shape), count))
    return _on_off(kind, count, draw)


def _on_off(kind: OnOff, count: int, draw: np.random.Generator) -> Floats:
    """A Poisson process on a clock that runs in the on-times only; then the off-times before each are put in."""
    busy = np.cumsum(draw.exponential(1 / kind.rate, count))
    ends = np.cumsum(draw.exponential(kind.on_seconds, max(int(busy[-1] / kind.on_seconds * 2), 16)))
    while ends[-1] < busy[-1]:
        ends = np.concatenate([ends, ends[-1] + np.cumsum(draw.exponential(kind.on_seconds, len(ends)))])
    pauses = np.concatenate([[0.0], np.cumsum(draw.exponential(kind.off_seconds, len(ends)))])
    times: Floats = busy + pauses[np.searchsorted(ends, busy)]
    return times


def draw_adapters(kind: AdapterDraw | None, count: int, adapters: int, draw: np.random.Generator) -> Ints:
    """Numbers of adapters [count]; BASE where the base is asked."""
    if kind is None:
        return np.full(count, BASE)
    several = kind.count or adapters - kind.first
    ranks = np.arange(1, several + 1, dtype=np.float64)
    weights = ranks**-kind.exponent if isinstance(kind, ZipfDraw) else np.ones(several)
    chosen = kind.first + draw.choice(several, count, p=weights / weights.sum())
    return np.where(draw.random(count) < kind.base_share, BASE, chosen)


def draw_lengths(kind: Length, count: int, draw: np.random.Generator) -> Ints:
    """Numbers of tokens [count]."""
    if isinstance(kind, FixedLength):
        return np.full(count, kind.tokens)
    if isinstance(kind, UniformLength):
        return draw.integers(kind.min, kind.max, count, endpoint=True)
    drawn = np.rint(np.exp(draw.normal(np.log(kind.median), kind.sigma, count)))
    return np.clip(drawn, kind.min, kind.max).astype(np.int64)
