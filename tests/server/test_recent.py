from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lorikeet.server.metrics import Metrics
from lorikeet.server.recent import ADAPTERS, HISTORY, RATE, WINDOW, Recent


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.5

    def __call__(self) -> float:
        return self.now


@given(st.lists(st.floats(0, 100), min_size=1, max_size=200), st.floats(0.01, 1.0))
def test_percentiles_are_those_of_numpy(values: list[float], share: float) -> None:
    recent = Recent(Clock())
    for value in values:
        recent.first(value)
    assert recent.first_percentiles(share) == [np.percentile(values, 100 * share, method="inverted_cdf")]


def test_latencies_are_forgotten_after_the_window() -> None:
    clock = Clock()
    recent = Recent(clock)
    recent.between(9.0, 3)
    clock.now += WINDOW - 1
    recent.between(1.0, 1)
    assert recent.between_percentiles(0.5, 0.1) == [9.0, 1.0]
    clock.now += 2
    assert recent.between_percentiles(0.5, 0.95) == [1.0, 1.0]
    clock.now += WINDOW
    assert recent.between_percentiles(0.5) == [None]


def test_throughput_is_that_of_whole_seconds() -> None:
    clock = Clock()
    recent = Recent(clock)
    for _ in range(20):
        recent.tokens(10)
        clock.now += 1
    recent.tokens(1)  # of the second that has just begun
    assert recent.tokens_per_second() == 10
    assert recent.history()[-1] == (int(clock.now) - 1, 10)
    clock.now += RATE + 1
    assert recent.tokens_per_second() == 0


def test_history_is_bounded_and_without_gaps() -> None:
    clock = Clock()
    recent = Recent(clock)
    for _ in range(HISTORY // 50):
        recent.tokens(1)
        clock.now += 100
    seconds = [second for second, _ in recent.history()]
    assert seconds == list(range(seconds[0], int(clock.now)))
    assert len(recent._tokens) <= HISTORY // 100 + 1


def test_what_a_request_is_up_to() -> None:
    metrics = Metrics()
    first = metrics.start("intent/1", 5, digest="d", tenant="t")
    second = metrics.start("intent/1", 5, digest="d", tenant="t")
    (use,) = metrics.recent.uses
    assert (use.waiting, use.running, use.requests) == (2, 0, 2)
    first.tokens(1)
    assert (use.waiting, use.running) == (1, 1)
    second.end("cancelled")
    first.tokens(2)
    first.end("stop")
    assert (use.waiting, use.running, use.requests) == (0, 0, 2)


def test_tenants_have_uses_of_their_own_and_their_number_is_bounded() -> None:
    recent = Recent(Clock())
    recent.begin("intent/1", "a", "d")
    recent.begin("intent/1", "b", "e")
    assert {(use.tenant, use.digest) for use in recent.uses} == {("a", "d"), ("b", "e")}
    for i in range(ADAPTERS + 10):
        recent.begin(f"n{i}", "a", "d")
    assert len(recent.uses) == ADAPTERS
    assert recent.uses[0].name == f"n{ADAPTERS + 9}"
