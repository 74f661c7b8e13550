"""Meters: never more than the limit, whatever comes when; and what was used is in the book in the end."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from lorikeet.errors import UnavailableError
from lorikeet.registry.records import Key, Usage
from lorikeet.server.limits import DAY, Limits, Meter, RateLimitError

KEY = Key(
    id="k", tenant_id="t", user_id=None, name="app", prefix="lk_1234567", role="user", every_repository=True,
    requests_per_minute=None, tokens_per_day=None, created=0.0, created_by="x", expires=None, last_used=None,
    revoked=None,
)  # fmt: skip


@dataclass
class Clock:
    now: float = 1000.5 * DAY

    def __call__(self) -> float:
        return self.now


@dataclass
class Book:
    """`Catalog.keys` in memory, with as many failures as told."""

    clock: Clock
    sums: dict[int, Usage] = field(default_factory=dict)
    failures: int = 0
    writes: int = 0

    def spend(self, key_id: str, *, requests: int = 0, tokens: int = 0) -> Usage:
        if self.failures:
            self.failures -= 1
            raise UnavailableError("as told")
        self.writes += 1
        day = int(self.clock() // DAY)
        old = self.sums.get(day, Usage(key_id=key_id, day=day, requests=0, tokens=0))
        self.sums[day] = replace(old, requests=old.requests + requests, tokens=old.tokens + tokens)
        return self.sums[day]

    def usage(self, key_id: str, days: int = 1) -> list[Usage]:
        found = self.sums.get(int(self.clock() // DAY))
        return [found] if found else []


def meter(clock: Clock, used: int = 0, **limits: int) -> Meter:
    usage = Usage(key_id="k", day=int(clock() // DAY), requests=0, tokens=used)
    return Meter(replace(KEY, **limits), usage, clock, lambda: None)


@settings(max_examples=60)
@given(limit=st.integers(1, 50), gaps=st.lists(st.floats(0, 30), min_size=1, max_size=80))
def test_requests_stay_below_the_rate_in_every_window(limit: int, gaps: list[float]) -> None:
    clock = Clock()
    door = meter(clock, requests_per_minute=limit)
    passed: list[float] = []
    for gap in gaps:
        clock.now += gap
        try:
            door.count_request()
            passed.append(clock.now)
        except RateLimitError as error:
            assert error.status == 429 and error.retry_after is not None
            clock.now += error.retry_after + 1e-6  # whoever waits as told gets in
            door.count_request()
            passed.append(clock.now)
    for i, start in enumerate(passed):
        for j in range(i, len(passed)):
            assert j - i + 1 <= limit + (passed[j] - start) * limit / 60 + 1e-6


@settings(max_examples=80)
@given(
    limit=st.integers(1, 1000), used=st.integers(0, 1200),
    asked=st.lists(st.tuples(st.integers(1, 400), st.floats(0, 1)), max_size=30), data=st.data(),
)  # fmt: skip
def test_generations_together_stay_within_the_quota(
    limit: int, used: int, asked: list[tuple[int, float]], data: st.DataObject
) -> None:
    door = meter(Clock(), used, tokens_per_day=limit)
    running: list[tuple[int, int]] = []
    spent = used
    for most, share in asked:
        try:
            door.reserve(most)
            running.append((most, int(most * share)))
            assert spent + sum(one for one, _ in running) <= limit
        except RateLimitError as error:
            assert error.code == "quota_exceeded" and str(limit) in error.message and error.retry_after == 0.5 * DAY
            assert spent + sum(one for one, _ in running) + most > limit  # nobody is refused for nothing
        if running and data.draw(st.booleans()):
            most, took = running.pop(0)
            door.settle(most, took)
            spent += took
    assert door.pending_tokens == spent - used


def test_a_new_day_starts_at_nothing_with_what_still_runs() -> None:
    clock = Clock()
    door = meter(clock, 90, tokens_per_day=100)
    with pytest.raises(RateLimitError, match="'app' may use 100, 10 are left today"):
        door.reserve(11)
    door.reserve(10)
    clock.now += 0.6 * DAY
    with pytest.raises(RateLimitError, match="90 are left"):
        door.reserve(91)
    door.settle(10, 10)
    door.reserve(90)


def test_sums_are_written_in_batches_and_survive_failures_and_the_end() -> None:
    clock = Clock()
    book = Book(clock, failures=1)

    async def main() -> None:
        limits = Limits(book, clock)
        door = await limits.meter(replace(KEY, tokens_per_day=1000))
        assert await limits.meter(KEY) is door
        for _ in range(50):
            door.count_request()
            door.reserve(7)
            door.settle(7, 5)
        assert book.writes == 0
        await limits.close()
        assert book.writes == 1

    asyncio.run(main())
    (kept,) = book.usage("k")
    assert (kept.requests, kept.tokens) == (50, 250)


def test_what_was_used_before_a_restart_and_elsewhere_counts() -> None:
    clock = Clock()
    book = Book(clock)
    book.spend("k", tokens=60)

    async def main() -> None:
        limits = Limits(book, clock)
        door = await limits.meter(replace(KEY, tokens_per_day=100))
        with pytest.raises(RateLimitError, match="40 are left"):
            door.reserve(41)
        book.spend("k", tokens=30)  # another server on the same catalog
        door.count_request()
        await limits.flush()
        with pytest.raises(RateLimitError, match="10 are left"):
            door.reserve(11)
        await limits.close()

    asyncio.run(main())


def test_a_limit_that_comes_later_begins_with_a_full_minute() -> None:
    clock = Clock()
    counted = meter(clock)
    counted.count_request()
    counted.change(replace(KEY, requests_per_minute=3))
    for _ in range(3):
        counted.count_request()
    with pytest.raises(RateLimitError):
        counted.count_request()
    counted.change(replace(KEY, requests_per_minute=5))  # a higher one fills no bucket
    with pytest.raises(RateLimitError):
        counted.count_request()
