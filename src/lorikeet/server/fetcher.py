"""Adapters from elsewhere on behalf of requests: downloaded once whoever waits, with access checked for each of them.

Downloads run in threads of this process, bounded for each place they come from, so that a place that hangs holds what
waits for it and nothing else: not the loader, not the step loop, not another place.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import hashlib
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit
from weakref import WeakValueDictionary

from lorikeet.adapters.download import Manifest, Source, Store, check_sizes
from lorikeet.adapters.references import Credentials, Kind, Reference
from lorikeet.adapters.sources import http_of, look, open_source, require
from lorikeet.adapters.transport import Deadline
from lorikeet.config import SourceConfig
from lorikeet.errors import DeadlineError, LorikeetError, NotFoundError, SourceRefusedError

log = logging.getLogger("lorikeet.fetcher")

LOOKS, DOWNLOADS = 8, 4  # at once from one place; so many times PLACES from all places of a kind
PLACES = 8
ALLOWED_SECONDS = 60.0  # for which what a source allowed these credentials holds
DENIED_SECONDS = 3.0
REMEMBERED = 10_000  # answers about access
Result = TypeVar("Result")


@dataclass
class _Seen:
    """What a source answered to one pair of credentials and reference, until it is asked again."""

    until: float
    source: Source | None = None
    manifest: Manifest | None = None
    error: NotFoundError | None = None
    folder: Path | None = None


class Fetcher:
    """`kinds` are the sources that may be used. `folder` is where downloads are kept.

    Raises `ConfigError` for a kind whose package is not installed, or a proxy that the environment does not name.
    """

    def __init__(
        self,
        kinds: tuple[Kind, ...],
        folder: Path,
        config: SourceConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        for kind in kinds:
            require(kind)  # what is missing is said at the start, and no request waits for an import
        http_of(config or SourceConfig())  # and a proxy that is not there
        self.kinds = kinds
        self.config = config or SourceConfig()
        self._store = Store(folder, self.config)
        self._clock = clock
        self._salt = os.urandom(16)
        self._seen: dict[tuple[Reference, bytes], _Seen] = {}
        self._running: dict[object, asyncio.Task[Any]] = {}
        self._looks, self._downloads = _Slots(LOOKS), _Slots(DOWNLOADS)

    async def folder(self, reference: Reference, credentials: Credentials) -> Path:
        """A folder with the adapter, for whoever has these credentials.

        Raises `SourceRefusedError` for a kind that is not switched on, `NotFoundError` for what is not there or not
        for them, `DeadlineError`, and what else can be wrong with a source or an adapter.
        """
        if reference.kind == "local":
            raise SourceRefusedError(
                f"{reference}: requests name no paths of this machine",
                hint="put it below the folder of --adapters and send its name",
                param="model",
            )
        if reference.kind not in self.kinds:
            raise SourceRefusedError(
                f"{reference}: this server fetches no adapters from {reference.kind}",
                hint=f"start it with --adapter-sources {','.join((*self.kinds, reference.kind))}",
                param="model",
            )
        deadline = Deadline.after(self.config.total_seconds)
        key = (reference, self._fingerprint(credentials))
        seen = self._seen.get(key)
        if seen is None or seen.until <= self._clock():
            seen = await self._once(key, lambda: self._look(key, credentials), deadline)
        if seen.error is not None:
            raise seen.error
        if seen.folder is None or not seen.folder.is_dir():
            assert seen.manifest is not None
            bring = seen  # for the closure: the one whose credentials were just checked
            seen.folder = await self._once(seen.manifest.key, lambda: self._bring(reference, bring), deadline)
        return seen.folder

    def _fingerprint(self, credentials: Credentials) -> bytes:
        """Tells credentials apart without keeping them."""
        token = credentials.token
        return b"" if token is None else hashlib.sha256(self._salt + token.encode()).digest()

    async def _once(self, key: object, start: Callable[[], Coroutine[Any, Any, Result]], deadline: Deadline) -> Result:
        """The result of the task of this key, started unless it runs already. It runs on when nobody waits any more."""
        task = self._running.get(key)
        if task is None:
            task = self._running[key] = asyncio.create_task(start())
            task.add_done_callback(lambda done: self._ended(key, done))
        try:
            result: Result = await asyncio.wait_for(asyncio.shield(task), max(0.0, deadline.ends - time.monotonic()))
        except TimeoutError:
            raise DeadlineError(
                f"the adapter was not here within {self.config.total_seconds:g} s", hint="try again; what came is kept"
            ) from None
        return result

    def _ended(self, key: object, task: asyncio.Task[Any]) -> None:
        del self._running[key]
        if not task.cancelled():
            task.exception()  # an error that nobody waits for any more is not worth a warning

    async def _look(self, key: tuple[Reference, bytes], credentials: Credentials) -> _Seen:
        reference, config = key[0], self.config
        deadline = Deadline.after(config.total_seconds)

        def work() -> tuple[Source, Manifest]:
            source = open_source(reference, credentials, config)
            manifest = look(source, reference, config, deadline)
            check_sizes(manifest, config.max_bytes)
            return source, manifest

        old = self._seen.pop(key, None)
        try:
            async with self._looks.take(reference, deadline):
                source, manifest = await _in_thread(work, f"look {reference.kind}")
        except NotFoundError as error:
            seen = _Seen(self._clock() + DENIED_SECONDS, error=error)
        else:
            same = old is not None and old.manifest is not None and old.manifest.key == manifest.key
            seen = _Seen(self._clock() + ALLOWED_SECONDS, source, manifest, folder=old.folder if same and old else None)
        self._remember(key, seen)
        return seen

    def _remember(self, key: tuple[Reference, bytes], seen: _Seen) -> None:
        if len(self._seen) >= REMEMBERED:
            now = self._clock()
            self._seen = {one: what for one, what in self._seen.items() if what.until > now}
            while len(self._seen) >= REMEMBERED:
                del self._seen[next(iter(self._seen))]
        self._seen[key] = seen

    async def _bring(self, reference: Reference, seen: _Seen) -> Path:
        source, manifest = seen.source, seen.manifest
        assert source is not None and manifest is not None
        deadline = Deadline.after(self.config.total_seconds)
        began = self._clock()
        async with self._downloads.take(reference, deadline):
            try:
                folder = await _in_thread(
                    lambda: self._store.bring(source, manifest, deadline), f"fetch {reference.kind}"
                )
            except LorikeetError as error:
                log.warning("%s could not be fetched: %s", reference, error)
                raise
        log.info("%s: %d bytes here after %.1f s", reference, manifest.size, self._clock() - began)
        return folder


class _Slots:
    """How many threads work at once: for one place, and for all places of one kind together."""

    def __init__(self, each: int) -> None:
        self._each = each
        self._semaphores: WeakValueDictionary[object, asyncio.Semaphore] = WeakValueDictionary()

    @asynccontextmanager
    async def take(self, reference: Reference, deadline: Deadline) -> AsyncIterator[None]:
        """Raises `DeadlineError` when the deadline passes before one is free."""
        place = self._of((reference.kind, place_of(reference)), self._each)
        kind = self._of(reference.kind, self._each * PLACES)
        async with _held(place, deadline, reference), _held(kind, deadline, reference):
            yield

    def _of(self, key: object, count: int) -> asyncio.Semaphore:
        found = self._semaphores.get(key)
        if found is None:
            found = self._semaphores[key] = asyncio.Semaphore(count)
        return found


@asynccontextmanager
async def _held(semaphore: asyncio.Semaphore, deadline: Deadline, reference: Reference) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(max(0.0, deadline.ends - time.monotonic())):
            await semaphore.acquire()
    except TimeoutError:
        raise DeadlineError(
            f"{reference.kind} {place_of(reference)} is busy with other downloads", hint="try again"
        ) from None
    try:
        yield
    finally:
        semaphore.release()


def place_of(reference: Reference) -> str:
    """What hangs together: the hub, a host, a bucket."""
    if reference.kind == "hf":
        return "the hub"
    if reference.kind == "https":
        return urlsplit(reference.location).netloc
    return reference.location.partition("/")[0]


def _in_thread(work: Callable[[], Result], name: str) -> Awaitable[Result]:
    """Run in a daemon thread: the end of the process does not wait for a source that hangs."""
    future: concurrent.futures.Future[Result] = concurrent.futures.Future()

    def run() -> None:
        try:
            result = work()
        except Exception as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    wrapped = asyncio.wrap_future(future)
    future.set_running_or_notify_cancel()  # from here on nobody can cancel it
    threading.Thread(target=run, name=name, daemon=True).start()
    return wrapped
