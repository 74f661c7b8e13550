"""Adapters are validated and compiled in a process of their own, niced and single-threaded, so that no step waits.

`Loader` is the engine's handle on it: jobs go one at a time, so a crash, or a job that does not end, fails exactly the
job that was running, and the process is started again for the next one.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections import deque
from functools import lru_cache
from pathlib import Path
from typing import IO

import zmq

from lorikeet.adapters.compiled import remove_leftovers, trim
from lorikeet.adapters.merged import compile_merged
from lorikeet.engine.compiler import AdapterCompiler
from lorikeet.engine.lifeline import child_command, die_with_parent
from lorikeet.engine.wire import (
    Compile,
    LoaderSettings,
    Merge,
    Resolved,
    StartLoader,
    decode_from_loader,
    decode_to_loader,
    encode,
)
from lorikeet.errors import LorikeetError, UnavailableError
from lorikeet.model.tokenizer import Tokenizer, Tokenizers
from lorikeet.types import ErrorInfo

log = logging.getLogger("lorikeet.loader")

NICENESS = 10
JOB_SECONDS = 120.0  # a large adapter from a slow disk takes a few; a file that makes its reader hang must not stop all


class Loader:
    """The engine process's end. `files` are to be polled for reading; then `poll()` yields what was finished."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        folder: Path,
        command: list[str] | None = None,
        job_seconds: float = JOB_SECONDS,
    ) -> None:
        self._context = context
        self._job_seconds = job_seconds
        self._began = 0.0  # of the running job
        self._folder = folder
        self._command = command or child_command("lorikeet.engine.loader")
        self._settings: LoaderSettings | None = None
        self._waiting: deque[Compile | Merge] = deque()
        self._running: Compile | Merge | None = None
        self._starts = 0
        self._start()

    def _start(self) -> None:
        """Start a process. Its standard output is a pipe that it never writes to: end of file means it is gone."""
        address = f"ipc://{self._folder}/loader-{os.getpid()}-{self._starts}"
        self._starts += 1
        self.socket = self._context.socket(zmq.PAIR)
        self.socket.set(zmq.LINGER, 0)
        self.socket.set(zmq.SNDHWM, 0)
        self.socket.bind(address)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [*self._command, address], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        self._told = False

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def lifeline(self) -> IO[bytes]:
        assert self._process.stdout is not None
        return self._process.stdout

    def configure(self, settings: LoaderSettings) -> None:
        """What every adapter is compiled for; jobs wait until it is known."""
        self._settings = settings
        self._send_next()

    def submit(self, job: int, folder: str) -> None:
        self._waiting.append(Compile(job, folder))
        self._send_next()

    def submit_merge(self, job: Merge) -> None:
        self._waiting.append(job)
        self._send_next()

    def poll(self) -> list[Resolved]:
        """Jobs that ended since the last call: compiled, refused, or lost with their process."""
        done = []
        while self.socket.poll(0):
            done.append(decode_from_loader(self.socket.recv()))
            self._running = None
        if self._process.poll() is not None:
            done += self._restart("died")
        elif self._running is not None and time.monotonic() > self._began + self._job_seconds:
            self._process.kill()
            self._process.wait()
            done += self._restart(f"was stopped after {self._job_seconds:g} s")
        self._send_next()
        return done

    def _restart(self, what: str) -> list[Resolved]:
        log.error("the loader process %s, exit code %s; starting another", what, self._process.returncode)
        lost = []
        if self._running is not None:
            error = UnavailableError(
                f"the loader process {what} while it read {_folders_of(self._running)}",
                hint="try again; if it happens again, look at the server's log and at what it read",
                retry_after=1.0,
            )
            lost.append(Resolved(self._running.job, error=error.info()))
            self._running = None
        self._close()
        self._start()
        return lost

    def _send_next(self) -> None:
        if self._settings is None:
            return
        if not self._told:
            self._told = self._try_send(encode(StartLoader(self._settings)))
        if self._told and self._running is None and self._waiting and self._try_send(encode(self._waiting[0])):
            self._running, self._began = self._waiting.popleft(), time.monotonic()

    def _try_send(self, data: bytes) -> bool:
        """False while the process has not connected yet; the next `poll` tries again."""
        try:
            self.socket.send(data, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    @property
    def waits_for_connection(self) -> bool:
        """There is something to send that could not be sent yet."""
        return not self._told or (self._running is None and bool(self._waiting))

    def _close(self) -> None:
        self.socket.close()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._close()


def run_jobs(address: str) -> None:
    """The loader process: one job after another, until the engine closes its end."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.set(zmq.LINGER, 0)
    socket.connect(address)
    settings: LoaderSettings | None = None
    while True:
        message = decode_to_loader(socket.recv())
        if isinstance(message, StartLoader):
            settings = message.settings
            remove_leftovers(Path(settings.cache))
            continue
        assert settings is not None
        socket.send(encode(compile_one(message, settings)))


@lru_cache(maxsize=1)
def _tokenizers(model: str) -> Tokenizers:
    return Tokenizers(lambda: Tokenizer(Path(model)))


def compile_one(job: Compile | Merge, settings: LoaderSettings) -> Resolved:
    compiler = AdapterCompiler(settings, _tokenizers(settings.model))
    try:
        if isinstance(job, Compile):
            adapter = compiler.compile(Path(job.folder))
        else:
            adapter = compile_merged(
                job.spec,
                job.digests,
                settings.base,
                settings.dtype,
                Path(settings.cache),
                compiler.compile,
                settings.allow_lock_mismatch,
                settings.ranks,
            )
        if settings.disk is not None:
            trim(Path(settings.cache), settings.disk, keep=Path(adapter.path))
    except LorikeetError as error:
        return Resolved(job.job, error=error.info())
    except Exception as error:
        log.exception("%s could not be compiled", _folders_of(job))
        message = f"{_folders_of(job)} could not be compiled: {type(error).__name__}: {error}"
        return Resolved(job.job, error=ErrorInfo(code="internal_error", message=message, status=500))
    return Resolved(job.job, adapter=adapter)


def _folders_of(job: Compile | Merge) -> str:
    return job.folder if isinstance(job, Compile) else " and ".join(job.spec.adapters)


def main() -> None:
    die_with_parent()
    os.nice(NICENESS)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s:     %(name)s: %(message)s")
    run_jobs(sys.argv[1])


if __name__ == "__main__":
    main()
