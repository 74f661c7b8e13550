"""The HTTP process's end of the engine: requests out, events back, and a new engine when the old one dies.

The engine runs in a process of its own behind a ZeroMQ socket in a private folder. Whatever happens to it, every
accepted request gets exactly one final event. No torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, cast

import zmq
import zmq.asyncio

from lorikeet.config import EngineConfig
from lorikeet.engine.lifeline import child_command, exit_text
from lorikeet.engine.wire import (
    AskStats,
    Cancel,
    EngineInfo,
    Events,
    Failed,
    Manage,
    Managed,
    Merge,
    Ready,
    Register,
    Resolve,
    Resolved,
    Start,
    Stats,
    Stop,
    Submit,
    ToEngine,
    decode_from_engine,
    encode,
)
from lorikeet.errors import AdapterLostError, LorikeetError, UnavailableError
from lorikeet.types import AdapterAction, AdapterInfo, EngineStats, ErrorInfo, Event, MergeSpec, Request

__all__ = ["EngineClient", "EngineInfo", "EventStream"]

log = logging.getLogger("lorikeet.link")
ResolveKey = tuple[str | MergeSpec, object]  # a folder and its version, or a merge of folders and their contents

RETRY_AFTER = 3.0  # seconds a client is told to wait for a restarted engine
FIRST_DELAY, LONGEST_DELAY = 0.1, 5.0  # seconds before a restart, doubled after each engine that did not live long
LONG_LIFE = 30.0  # seconds of service after which a death counts as the first one again
LAST_MESSAGES = 50  # milliseconds to wait for messages that a dead engine had sent before


class EventStream(AsyncIterator[Event]):
    """The events of one accepted request: any number, then exactly one with `finish`, then the end.

    Where the compiled file of its adapter is gone when the engine comes to it, the adapter in `folder` is compiled
    again and the request begins anew, once.
    """

    def __init__(self, client: EngineClient, request: Request, folder: Path | None = None) -> None:
        self.request = request
        self._client = client
        self._folder = folder
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        self._ended = False  # the final event was handed out
        self._closed = False  # nobody reads on

    def put(self, event: Event) -> None:
        if not self._closed:
            self._queue.put_nowait(event)

    async def __anext__(self) -> Event:
        if self._ended:
            raise StopAsyncIteration
        event = await self._queue.get()
        if event.error is not None and event.error.code == AdapterLostError.code and await self._begin_again():
            event = await self._queue.get()
        self._ended = event.finish is not None
        return event

    async def _begin_again(self) -> bool:
        if self._folder is None or (await self._client.resolve(self._folder)).digest != self.request.adapter:
            return False
        self._folder = None
        self._client.send(self)
        return True

    def close(self) -> None:
        """The reader goes away. Cancels the request in the engine unless it has ended already."""
        if not self._closed:
            self._closed = True
            if not self._ended:
                self._client.cancel(self.request.request_id)


class EngineClient:
    """Starts, watches and restarts the engine process, and speaks with it.

    `command` is the engine's command line without the socket's address; tests pass a scripted engine.
    """

    def __init__(self, config: EngineConfig, *, command: Sequence[str] | None = None) -> None:
        self.config = config
        self.info: EngineInfo | None = None
        self.restarts = 0
        self.last_error: ErrorInfo | None = None
        self._command = list(command or child_command("lorikeet.engine.process"))
        self._context = zmq.asyncio.Context()
        self._folder = Path(tempfile.mkdtemp(prefix="lorikeet-"))  # mode 700: nobody else can speak to the engine
        self._socket: zmq.asyncio.Socket | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._watch: asyncio.Task[None] | None = None
        self._first_answer: asyncio.Future[None] | None = None
        self._streams: dict[str, EventStream] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._held: dict[str, AdapterInfo] = {}  # by digest; told again to a restarted engine
        self._pinned: set[str] = set()
        self._resolving: dict[ResolveKey, asyncio.Future[AdapterInfo]] = {}
        self._jobs: dict[int, asyncio.Future[Any]] = {}
        self._next_job = 0
        self._ready = False
        self._draining = False
        self._stop_asked = asyncio.Event()

    # --- life ---------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Returns when the engine is ready. Raises its error when the first one cannot be built."""
        self._first_answer = asyncio.get_running_loop().create_future()
        self._watch = asyncio.create_task(self._keep_running(), name="engine watch")
        try:
            await asyncio.shield(self._first_answer)
        except BaseException:
            await self.stop()
            raise

    @property
    def ready(self) -> bool:
        """New requests are taken."""
        return self._ready and not self._draining

    @property
    def alive(self) -> bool:
        """The engine is being served or restarted."""
        return self._watch is not None and not self._watch.done()

    @property
    def in_flight(self) -> int:
        return len(self._streams)

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    async def drain(self, seconds: float) -> None:
        """Take no new requests, let the running ones end for up to `seconds`, then stop the engine."""
        self._draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), seconds)
        if self._streams:
            log.warning("%d requests did not end within %g s and are stopped", len(self._streams), seconds)
        await self.stop()

    async def stop(self) -> None:
        """Stop the engine now. Requests in flight end with an error."""
        self._draining = True
        self._stop_asked.set()
        process = self._process
        if process is not None and process.returncode is None:
            self._send(Stop())
            try:
                await asyncio.wait_for(process.wait(), 3.0 if self._ready else 0.1)
            except TimeoutError:
                self._kill()
        if self._watch is not None:
            await asyncio.wait([self._watch])
        self._context.destroy(linger=0)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # its own session: the loader process goes with it

    # --- requests -----------------------------------------------------------------------------------------------

    async def submit(self, request: Request, folder: Path | None = None) -> EventStream:
        """Hand a request to the engine; `folder` holds the files of its adapter. Raises `UnavailableError` while there
        is none or it is draining."""
        self._require_engine()
        if request.request_id in self._streams:
            raise LorikeetError(f"request id {request.request_id!r} is in flight already")
        stream = EventStream(self, request, folder)
        self.send(stream)
        return stream

    def send(self, stream: EventStream) -> None:
        """Hand a stream's request to the engine, at its begin or anew."""
        self._streams[stream.request.request_id] = stream
        self._idle.clear()
        self._send(Submit(stream.request))

    def cancel(self, request_id: str) -> None:
        """Stop a request; its final event says `cancelled`. One that has ended is left alone."""
        if request_id in self._streams:
            self._send(Cancel(request_id))

    async def resolve(self, folder: Path, version: object = None) -> AdapterInfo:
        """Validate and compile the adapter in `folder` and make it known to the engine.

        Concurrent calls for one version of a folder share one job: what is there now need not be what a job that runs
        already has read. Raises what the loader found wrong with the files.
        """
        return await self._resolve((str(folder), version), lambda job: Resolve(job, str(folder)))

    async def merge(self, spec: MergeSpec, digests: tuple[str, ...]) -> AdapterInfo:
        """The same for what becomes of several adapters: `spec.adapters` are their folders, `digests` their contents.

        Raises UnavailableError where a folder holds something else by now.
        """
        return await self._resolve((spec, digests), lambda job: Merge(job, spec, digests))

    async def _resolve(self, key: ResolveKey, message: Callable[[int], ToEngine]) -> AdapterInfo:
        future = self._resolving.get(key)
        if future is None:
            self._require_engine()
            job, future = self._new_job()
            self._resolving[key] = future
            future.add_done_callback(lambda done: self._resolved(key, done))
            self._send(message(job))
        return await asyncio.shield(future)

    def _resolved(self, key: ResolveKey, future: asyncio.Future[AdapterInfo]) -> None:
        del self._resolving[key]
        if not future.cancelled() and future.exception() is None:
            adapter = future.result()
            self._held[adapter.digest] = adapter

    async def manage(self, action: AdapterAction, digest: str) -> None:
        """As `Engine.manage`. What is pinned stays so when the engine is restarted."""
        self._require_engine()
        job, future = self._new_job()
        self._send(Manage(job, action, digest))
        try:
            await future
        except LorikeetError as error:
            if error.code == AdapterLostError.code:
                self._held.pop(digest, None)
            raise
        if action == "pin":
            self._pinned.add(digest)
        elif action == "unpin":
            self._pinned.discard(digest)

    async def stats(self) -> EngineStats:
        """The engine's counters and gauges of this moment."""
        answer = await self._ask_stats()
        return answer.stats

    async def loader_pid(self) -> int:
        return (await self._ask_stats()).loader_pid

    async def _ask_stats(self) -> Stats:
        if not self._ready:
            self._require_engine()
        job, future = self._new_job()
        self._send(AskStats(job))
        answer: Stats = await future
        return answer

    def holds(self, adapter: AdapterInfo) -> bool:
        """The adapter is known to the engine that runs now, and its compiled file is there to be read again."""
        return adapter.digest in self._held and Path(adapter.path).exists()

    def _new_job(self) -> tuple[int, asyncio.Future[Any]]:
        self._next_job += 1
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        # An error nobody waits for any more (the client left) is not worth a warning.
        future.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._jobs[self._next_job] = future
        return self._next_job, future

    def _require_engine(self) -> None:
        if self._draining:
            raise UnavailableError("the server is shutting down", retry_after=RETRY_AFTER)
        if not self._ready:
            again = "" if self.info is None else " again"
            raise UnavailableError(f"the engine is starting{again}", retry_after=RETRY_AFTER, hint="try again shortly")

    # --- the process --------------------------------------------------------------------------------------------

    async def _keep_running(self) -> None:
        delay = FIRST_DELAY
        while not self._stop_asked.is_set():
            started = time.monotonic()
            code = await self._run_one()
            reason = f"the engine process ended ({exit_text(code)})"
            self._fail_everything("the server is shutting down" if self._stop_asked.is_set() else reason)
            assert self._first_answer is not None
            if not self._first_answer.done():
                self.last_error = self.last_error or UnavailableError(f"{reason} before it was ready").info()
                self._first_answer.set_exception(LorikeetError.from_info(self.last_error))
                return
            if self._stop_asked.is_set():
                return
            delay = FIRST_DELAY if time.monotonic() - started > LONG_LIFE else min(2 * delay, LONGEST_DELAY)
            log.error("%s; starting another in %.1f s", reason, delay)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop_asked.wait(), delay)
            self.restarts += 1

    async def _run_one(self) -> int:
        """Start one engine process and speak with it until it ends; its exit code."""
        address = f"ipc://{self._folder}/engine-{self.restarts}"
        socket = self._socket = self._context.socket(zmq.PAIR)
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.SNDHWM, 0)
        socket.set(zmq.RCVHWM, 0)
        socket.bind(address)
        # A session of its own: Ctrl-C in the terminal reaches the server alone, which then drains.
        self._process = await asyncio.create_subprocess_exec(
            *self._command, address, stdin=asyncio.subprocess.PIPE, start_new_session=True
        )
        self._send(Start(self.config))
        reader = asyncio.create_task(self._read(socket), name="engine reader")
        try:
            code = await self._process.wait()
        finally:
            self._ready = False
            reader.cancel()
            await asyncio.wait([reader])
        while await socket.poll(LAST_MESSAGES):
            self._handle(await socket.recv())
        self._ready = False
        self._socket = None
        socket.close()
        return code

    async def _read(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            data = await socket.recv()
            try:
                self._handle(data)
            except Exception:  # whatever one message holds, it must not silence all the others
                log.exception("a message from the engine could not be handled")

    def _handle(self, data: bytes) -> None:
        message = decode_from_engine(data)
        match message:
            case Events():
                for event in message.events:
                    self._deliver(event)
            case Resolved():
                self._answer(message.job, message.adapter, message.error)
            case Managed():
                self._answer(message.job, None, message.error)
            case Stats():
                self._answer(message.job, message, None)
            case Ready():
                self._now_ready(message.info)
            case Failed():
                self.last_error = message.error
                log.error("the engine could not start: %s", message.error.message)

    def _answer(self, job: int, value: object, error: ErrorInfo | None) -> None:
        future = self._jobs.pop(job, None)
        if future is None or future.done():
            return
        if error is None:
            future.set_result(value)
        else:
            future.set_exception(LorikeetError.from_info(error))

    def _now_ready(self, info: EngineInfo) -> None:
        for adapter in list(self._held.values()):
            if Path(adapter.path).exists():
                self._send(Register(adapter))
            else:  # the compiled file was removed: the next request compiles the adapter again
                del self._held[adapter.digest]
        for digest in self._pinned & self._held.keys():
            self._send(Manage(self._new_job()[0], "pin", digest))
        self.info = info
        self.last_error = None
        self._ready = True
        assert self._first_answer is not None
        if not self._first_answer.done():
            self._first_answer.set_result(None)

    def _deliver(self, event: Event) -> None:
        stream = self._streams.get(event.request_id)
        if stream is None:
            log.warning("an event for %s, which has ended already", event.request_id)
            return
        if event.finish is not None:
            del self._streams[event.request_id]
            if not self._streams:
                self._idle.set()
        if event.error is not None and event.error.code == AdapterLostError.code:
            self._held.pop(str(stream.request.adapter), None)
        stream.put(event)

    def _fail_everything(self, reason: str) -> None:
        """What the dead engine owed: a final event to every request, an answer to every job."""
        error = UnavailableError(reason, retry_after=RETRY_AFTER, hint="try again shortly")
        for request_id in list(self._streams):
            self._deliver(Event(request_id=request_id, finish="error", error=error.info()))
        for future in list(self._jobs.values()):
            if not future.done():
                future.set_exception(error)
        self._jobs.clear()

    def _send(self, message: ToEngine) -> None:
        """Queue a message. Without a high-water mark it never blocks; an engine that is gone owes no answer."""
        if self._socket is not None:
            sent = cast("asyncio.Future[Any]", self._socket.send(encode(message)))
            sent.add_done_callback(lambda done: done.cancelled() or done.exception())
