"""What a key may do in a minute and in a day: counted in memory, the day's sums kept in the catalog."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Protocol

from lorikeet.errors import LorikeetError
from lorikeet.registry.records import Key, Usage

log = logging.getLogger("lorikeet.limits")

DAY = 86_400.0
FLUSH_SECONDS = 1.0  # what a crash can lose of the day's sums

Run = Callable[..., Awaitable[Any]]  # of a call that blocks and its arguments: in a thread


class RateLimitError(LorikeetError):
    """A key's requests of this minute, or its tokens of this day, are used up."""

    code = "rate_limit_exceeded"
    status = 429
    retryable = True


class UsageBook(Protocol):
    """Where the sums are kept: `Catalog.keys`."""

    def spend(self, key_id: str, *, requests: int = 0, tokens: int = 0) -> Usage: ...
    def usage(self, key_id: str, days: int = 1) -> list[Usage]: ...


class Meter:
    """The count of one key. Times are seconds since the epoch."""

    def __init__(self, key: Key, used: Usage | None, clock: Callable[[], float], touched: Callable[[], None]) -> None:
        self.key = key
        self._clock = clock
        self._touched = touched
        self._requests = float(key.requests_per_minute or 0)  # that may come at once
        self._filled = clock()
        self._day = int(clock() // DAY)
        self._used = 0 if used is None or used.day != self._day else used.tokens
        self._reserved = 0
        self.pending_requests = 0
        self.pending_tokens = 0

    def change(self, key: Key) -> None:
        """The key as it is now. One that had no limit of requests begins with a full minute of them."""
        if self.key.requests_per_minute is None and key.requests_per_minute is not None:
            self._requests, self._filled = float(key.requests_per_minute), self._clock()
        self.key = key

    def count_request(self) -> None:
        """Take one from a bucket that holds a minute's requests and fills evenly. Raises `RateLimitError`."""
        limit = self.key.requests_per_minute
        if limit is not None:
            now = self._clock()
            self._requests = min(limit, self._requests + max(0.0, now - self._filled) * limit / 60)
            self._filled = now
            if self._requests < 1:
                raise RateLimitError(
                    f"requests_per_minute: the key {self.key.name!r} may send {limit}",
                    hint="send fewer, or ask an admin for a key with a higher limit",
                    param="requests_per_minute",
                    retry_after=(1 - self._requests) * 60 / limit,
                )
            self._requests -= 1
        self.pending_requests += 1
        self._touched()

    def reserve(self, tokens: int) -> None:
        """Set aside what a generation may take at most, so that all that run together stay within the day's quota.

        Raises `RateLimitError`. What was reserved is to be settled.
        """
        self._turn_the_day()
        limit = self.key.tokens_per_day
        left = 0 if limit is None else max(0, limit - self._used - self._reserved)
        if limit is not None and tokens > left:
            raise RateLimitError(
                f"tokens_per_day: the key {self.key.name!r} may use {limit}, {left} are left today and not in use, and "
                f"this request may take {tokens}",
                hint="ask for fewer tokens, or ask an admin for a key with a higher limit",
                param="tokens_per_day",
                code="quota_exceeded",
                retry_after=(self._day + 1) * DAY - self._clock(),
            )
        self._reserved += tokens

    def settle(self, reserved: int, used: int) -> None:
        """A generation is over: give back what was reserved, count what it took."""
        self._turn_the_day()
        self._reserved -= reserved
        self._used += used
        self.pending_tokens += used
        self._touched()

    def kept(self, usage: Usage) -> None:
        """The sums as the book has them, in which other servers write too."""
        self._turn_the_day()
        if usage.day == self._day:
            self._used = usage.tokens + self.pending_tokens

    def _turn_the_day(self) -> None:
        today = int(self._clock() // DAY)
        if today != self._day:
            self._day, self._used = today, 0


class Limits:
    """The meters of all keys. Sums go to the book at most once in `FLUSH_SECONDS`, by `run`."""

    def __init__(self, book: UsageBook, clock: Callable[[], float] = time.time, run: Run = asyncio.to_thread) -> None:
        self._book = book
        self._clock = clock
        self._run = run
        self._meters: dict[str, Meter] = {}
        self._closing = asyncio.Event()
        self._flushing: asyncio.Task[None] | None = None

    async def meter(self, key: Key) -> Meter:
        found = self._meters.get(key.id)
        if found is None:
            used = await self._run(self._book.usage, key.id)
            fresh = Meter(key, used[0] if used else None, self._clock, self._touched)
            found = self._meters.setdefault(key.id, fresh)  # another request may have come first
        found.change(key)
        return found

    async def flush(self) -> None:
        """Write what was counted since the last time. What cannot be written is kept for the next."""
        for meter in [one for one in self._meters.values() if one.pending_requests or one.pending_tokens]:
            requests, tokens = meter.pending_requests, meter.pending_tokens
            meter.pending_requests = meter.pending_tokens = 0
            try:
                usage = await self._run(self._book.spend, meter.key.id, requests=requests, tokens=tokens)
            except Exception as error:
                meter.pending_requests += requests
                meter.pending_tokens += tokens
                log.warning("the use of key %s could not be noted: %s", meter.key.prefix, error)
                return
            meter.kept(usage)

    async def close(self) -> None:
        self._closing.set()
        if self._flushing is not None:
            await self._flushing
        await self.flush()

    def _touched(self) -> None:
        if self._flushing is None or self._flushing.done():
            self._flushing = asyncio.create_task(self._flush_soon(), name="usage of keys")

    async def _flush_soon(self) -> None:
        while any(one.pending_requests or one.pending_tokens for one in self._meters.values()):
            with suppress(TimeoutError):
                async with asyncio.timeout(FLUSH_SECONDS):
                    await self._closing.wait()
            await self.flush()
            if self._closing.is_set():
                return
