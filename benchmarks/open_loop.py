"""What benchmarks with an open loop share: flags, prompts that nobody has sent before, percentiles, the last line."""

from __future__ import annotations

import argparse
import json
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from load import Json
from ours import Setup
from shapes import NAMES, Fixture, default_cache

Arrivals = list[tuple[float, list[int], Json]]  # seconds from the start, prompt, further fields of the body
Seconds = npt.NDArray[np.float64]


class Prompts:
    """Random tokens; no two prompts are alike. Whoever draws more does so from `draw`."""

    def __init__(self, options: Namespace, vocabulary: int) -> None:
        self.draw = np.random.default_rng(options.seed)
        self._length, self._vocabulary = options.prompt, vocabulary

    def prompt(self) -> list[int]:
        return self.draw.integers(min(257, self._vocabulary // 2), self._vocabulary, self._length).tolist()


def flags(description: str | None, examples: str, **defaults: Any) -> ArgumentParser:
    """A parser with the flags that all have: shape, clients, prompt, new, cache, seed."""
    parser = ArgumentParser(
        description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", choices=NAMES, help="of the base")
    add("--clients", type=int, help="of the closed loop that finds the capacity")
    add("--prompt", type=int, help="tokens")
    add("--new", type=int, help="tokens")
    add("--cache", type=Path, default=default_cache(), help="where the files are kept [%(default)s]")
    add("--seed", type=int, default=0)
    parser.set_defaults(**defaults)
    return parser


@contextmanager
def prepared(options: Namespace, fixture: Fixture, ranks: list[int], clients: int, **settings: Any) -> Iterator[Setup]:
    """A server's files, with an adapter of each rank, and a folder for what is made meanwhile."""
    adapters = fixture.adapters(ranks)
    with tempfile.TemporaryDirectory(prefix="run-", dir=options.cache) as folder:
        (spare := Path(folder) / "served").mkdir()
        yield Setup(
            fixture=fixture, adapters=adapters, spare=spare, folder=Path(folder), clients=clients, settings=settings
        )


def measured(seconds: Sequence[float | None]) -> Seconds:
    """What a client measured of each request; NaN: it failed."""
    return np.array([np.nan if one is None else one for one in seconds])


def percentiles(name: str, seconds: Seconds, points: Sequence[int] = (50, 95, 99)) -> dict[str, float]:
    """Of the requests that did not fail, as `name`p50 and so on."""
    return {f"{name}p{point}": float(np.nanpercentile(seconds, point)) for point in points}


def last_line(benchmark: str, options: Namespace, result: Json) -> None:
    chosen = {key: value for key, value in vars(options).items() if key != "cache"}
    print(json.dumps({"benchmark": benchmark, "options": chosen, **result}))
