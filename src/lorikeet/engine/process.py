"""The engine process: one loop that takes messages without blocking while there is work, and sleeps when there is none.

A step that raises leaves scheduler, blocks and caches in doubt. The process then answers every request in flight with
an error and exits, so that a clean one takes its place; it never goes on with a state nobody can vouch for.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NoReturn, Protocol

import zmq

from lorikeet.config import EngineConfig
from lorikeet.engine.lifeline import die_with_parent
from lorikeet.engine.loader import Loader
from lorikeet.engine.wire import (
    AskStats,
    Cancel,
    EngineInfo,
    Events,
    Failed,
    FromEngine,
    LoaderSettings,
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
    decode_to_engine,
    encode,
)
from lorikeet.errors import LorikeetError, UnavailableError
from lorikeet.types import AdapterAction, AdapterInfo, EngineStats, ErrorInfo, Event, Request

log = logging.getLogger("lorikeet.engine")

IDLE_POLL = 1000  # milliseconds; only signals and a silent death of the loader are noticed this late
CONNECT_POLL = 20  # while the loader process has not connected yet
STEP_FAILED, RANK_LOST = 70, 71  # exit codes
LAST_WORDS = 2000  # milliseconds to hand over the last events


class ServedEngine(Protocol):
    """What the loop needs of an engine; `hosted.HostedEngine` is one."""

    def info(self) -> EngineInfo: ...
    def loader_settings(self) -> LoaderSettings: ...
    def register(self, info: AdapterInfo) -> None: ...
    def manage(self, action: AdapterAction, digest: str) -> None: ...
    def add(self, request: Request) -> None: ...
    def cancel(self, request_id: str) -> None: ...
    def step(self) -> list[Event]: ...
    def has_work(self) -> bool: ...
    def stats(self) -> EngineStats: ...


BuildEngine = Callable[[EngineConfig], ServedEngine]


class EngineProcess:
    """The loop around one engine."""

    def __init__(self, address: str, build: BuildEngine, loader_command: list[str] | None = None) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.set(zmq.SNDHWM, 0)
        self._socket.set(zmq.RCVHWM, 0)
        self._socket.set(zmq.LINGER, LAST_WORDS)
        self._socket.connect(address)
        self._build = build
        self._folder = Path(address.removeprefix("ipc://")).parent
        self._loader_command = loader_command
        self._in_flight: set[str] = set()
        self._rejected: list[Event] = []
        self._leaving = False  # SIGTERM: end what runs, take nothing new
        self._stopped = False

    def run(self) -> int:
        """Serve until told to stop; the exit code."""
        start = decode_to_engine(self._socket.recv())
        assert isinstance(start, Start)
        self._loader = Loader(self._context, self._folder, self._loader_command)
        try:
            return self._serve(start.config)
        finally:
            self._loader.stop()
            self._socket.close()
            self._context.term()  # waits until the last events are handed over, LAST_WORDS at most

    def _serve(self, config: EngineConfig) -> int:
        try:
            self._engine = self._build(config)
            self._loader.configure(self._engine.loader_settings())
            self._send(Ready(self._engine.info()))
        except LorikeetError as error:
            self._send(Failed(error.info()))
            return 1
        except Exception as error:
            log.exception("the engine could not be built")
            message = f"the engine could not be built: {type(error).__name__}: {error}"
            self._send(Failed(ErrorInfo(code="internal_error", message=message)))
            return 1
        signal.signal(signal.SIGTERM, self._leave)
        while not self._stopped and not (self._leaving and not self._engine.has_work()):
            self._take_messages()
            try:
                events = self._engine.step() if self._engine.has_work() else []
            except Exception as error:
                self._end_all(error)
                return STEP_FAILED
            self._report(events)
        return 0

    def _leave(self, *_: object) -> None:
        self._leaving = True

    # --- messages -----------------------------------------------------------------------------------------------

    def _take_messages(self) -> None:
        """Handle what has arrived; wait for something to arrive when there is nothing to compute."""
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._loader.socket, zmq.POLLIN)
        poller.register(self._loader.lifeline, zmq.POLLIN)
        if self._engine.has_work() or self._rejected:
            timeout = 0
        else:
            timeout = CONNECT_POLL if self._loader.waits_for_connection else IDLE_POLL
        poller.poll(timeout)
        while self._socket.poll(0):
            self._handle(self._socket.recv())
        for resolved in self._loader.poll():
            self._finish_resolve(resolved)

    def _handle(self, data: bytes) -> None:
        message = decode_to_engine(data)
        match message:
            case Submit():
                self._add(message.request)
            case Cancel():
                self._engine.cancel(message.request_id)
            case Resolve():
                self._loader.submit(message.job, message.folder)
            case Merge():
                self._loader.submit_merge(message)
            case Register():
                self._engine.register(message.adapter)
            case Manage():
                try:
                    self._engine.manage(message.action, message.digest)
                    self._send(Managed(message.job))
                except LorikeetError as error:
                    self._send(Managed(message.job, error.info()))
            case AskStats():
                self._send(Stats(message.job, self._engine.stats(), self._loader.pid))
            case Stop():
                self._stopped = True

    def _add(self, request: Request) -> None:
        try:
            if self._leaving:
                raise UnavailableError("the engine is being replaced", retry_after=1.0, hint="try again shortly")
            self._engine.add(request)
            self._in_flight.add(request.request_id)
        except Exception as error:
            if not isinstance(error, LorikeetError):
                log.exception("request %s could not be taken", request.request_id)
            self._rejected.append(Event(request_id=request.request_id, finish="error", error=_info_of(error)))

    def _finish_resolve(self, resolved: Resolved) -> None:
        if resolved.adapter is not None:
            try:
                self._engine.register(resolved.adapter)
            except Exception as error:
                if not isinstance(error, LorikeetError):
                    log.exception("adapter %s could not be registered", resolved.adapter.path)
                resolved = Resolved(resolved.job, error=_info_of(error))
        self._send(resolved)

    def _report(self, events: list[Event]) -> None:
        """One message for all events of a step."""
        if self._rejected:
            events = [*self._rejected, *events]
            self._rejected = []
        if events:
            self._in_flight.difference_update(event.request_id for event in events if event.finish is not None)
            self._send(Events(events))

    def _end_all(self, error: Exception) -> None:
        log.exception("a step failed; %d requests end with it and the engine is restarted", len(self._in_flight))
        info = UnavailableError(
            f"a step of the engine failed: {type(error).__name__}: {error}",
            hint="try again; the engine is being restarted, its log has the details",
            retry_after=3.0,
        ).info()
        self._report([Event(request_id=one, finish="error", error=info) for one in sorted(self._in_flight)])

    def _send(self, message: FromEngine) -> None:
        self._socket.send(encode(message))


def _info_of(error: Exception) -> ErrorInfo:
    if isinstance(error, LorikeetError):
        return error.info()
    return ErrorInfo(code="internal_error", message=f"{type(error).__name__}: {error}")


def run(build: BuildEngine, loader_command: list[str] | None = None) -> NoReturn:
    """The whole life of an engine process started by `link.EngineClient`; the socket's address is the last argument."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's to handle
    logging.basicConfig(level=logging.INFO, format="%(levelname)s:     %(name)s: %(message)s")
    tempfile.tempdir = str(Path(sys.argv[-1].removeprefix("ipc://")).parent)  # whoever started it removes that
    code = EngineProcess(sys.argv[-1], build, loader_command).run()
    logging.shutdown()
    sys.stderr.flush()
    os._exit(code)  # taking down torch and LLVM piece by piece would hold up a restart for two seconds


def main() -> NoReturn:
    from lorikeet.engine.hosted import HostedEngine

    run(partial(HostedEngine.build, on_lost=partial(os._exit, RANK_LOST)))


if __name__ == "__main__":
    main()
