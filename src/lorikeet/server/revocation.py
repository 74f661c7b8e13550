"""What is open ends within seconds after the key that opened it opens nothing any more."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

from lorikeet.errors import LorikeetError
from lorikeet.registry.records import RANKS, Actor
from lorikeet.server.limits import Run

log = logging.getLogger("lorikeet.revocation")

LOOK_SECONDS = 1.0

End = Callable[[LorikeetError], None]


class KeyRevokedError(LorikeetError):
    """The last word of what was open."""

    code = "key_revoked"
    status = 401


class KeyBook(Protocol):
    """`Catalog.keys`."""

    def holders(self, key_ids: Iterable[str]) -> dict[str, Actor]: ...


class Revocation:
    """Of one server: who has what open with a key. While anything is, the catalog is asked once in `LOOK_SECONDS`.

    A catalog that does not answer ends nothing.
    """

    def __init__(self, book: KeyBook, run: Run) -> None:
        self._book = book
        self._run = run
        self._open: dict[Actor, dict[object, End]] = {}
        self._changed = asyncio.Event()
        self._looking: asyncio.Task[None] | None = None

    @contextmanager
    def watch(self, who: Actor, end: End) -> Iterator[None]:
        """Meanwhile `end` is called, once, when the key of `who` is revoked, expires, or may less than it might."""
        mark, ends = object(), self._open.setdefault(who, {})
        ends[mark] = end
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look(), name="revocation")
        try:
            yield
        finally:
            ends.pop(mark, None)
            if not ends and self._open.get(who) is ends:
                del self._open[who]

    def changed(self) -> None:
        """A key was changed just now: look at once."""
        self._changed.set()

    async def close(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait([self._looking])

    async def _look(self) -> None:
        while self._open:
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._changed.wait()
            self._changed.clear()
            asked = list(self._open)
            try:
                held = await self._run(self._book.holders, {who.key_id for who in asked if who.key_id is not None})
            except Exception as error:
                log.warning("whether keys still open what they opened could not be asked: %s", error)
                continue
            for who in asked:
                if not _may_still(held.get(who.key_id or ""), who):
                    self._end(who)

    def _end(self, who: Actor) -> None:
        error = KeyRevokedError(
            "the key that opened this was revoked, has expired, or may do less by now",
            hint="open it again: what the key may do now, or with one that may",
        )
        for end in self._open.pop(who, {}).values():
            end(error)


def _may_still(now: Actor | None, before: Actor) -> bool:
    """Whether the holder of a key may all that it might when something was opened.

    One that may less ends everything, also what it may still do: it is opened again with what the key is now.
    """
    if now is None or RANKS[now.role] < RANKS[before.role]:
        return False
    return now.repositories is None or (before.repositories is not None and before.repositories <= now.repositories)
