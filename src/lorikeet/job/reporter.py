"""What a job says while it runs: to the catalog, a batch a second from a thread of its own, and to its log."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lorikeet.errors import LeaseLostError, LorikeetError, UnavailableError
from lorikeet.job.orders import log_path
from lorikeet.registry.catalog import Catalog
from lorikeet.registry.records import Lease, VersionContent
from lorikeet.types import ErrorInfo

log = logging.getLogger("lorikeet.job")

FLUSH_SECONDS = 0.5
PATIENCE_SECONDS = 60.0  # for a catalog that does not answer, at the words that matter
MAX_LOG = 16 * 2**20  # bytes


class Reporter:
    """One job and the lease on it. `stopping`: somebody wants it canceled; `over`: no more is said of it.

    A lease that was lost ends the job here: somebody else has it. All methods may be called from any thread.
    """

    def __init__(self, catalog: Catalog, lease: Lease, home: Path, seconds: float) -> None:
        self.job = lease.job
        self.stopping = False
        self.over = False
        self._catalog = catalog
        self._lease = lease
        self._seconds = seconds
        self._log = log_path(home, lease.job.id)
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.RLock()
        self._lines: list[dict[str, Any]] = []
        self._progress: dict[str, Any] | None = None
        self._beat = time.monotonic()

    # --- while it runs ----------------------------------------------------------------------------------------------

    def stage(self, name: str, message: str = "", **data: Any) -> None:
        """A new stage: an event of the timeline."""
        self.log(f"{name}: {message}" if message else name)
        self._say(lambda: self._catalog.jobs.report(self._lease, stage=name, message=message, data=data or None))

    def note(self, lines: Sequence[dict[str, Any]], progress: dict[str, Any]) -> None:
        """Metrics lines and the progress, which go with the next batch."""
        with self._lock:
            self._lines.extend(lines)
            self._progress = progress

    def log(self, text: str) -> None:
        """A line of the job's log; a log that is full stays as it is."""
        line = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {_one_line(text)}\n"
        with self._lock, self._log.open("a", encoding="utf-8") as file:
            if file.tell() < MAX_LOG:
                file.write(line)

    def flush(self) -> None:
        """What was noted since the last time, and a heartbeat when one is due."""
        with self._lock:
            if self.over:
                return
            lines, progress = self._lines, self._progress
            due = time.monotonic() - self._beat > self._seconds / 5
            try:
                if lines or progress is not None:
                    state = self._catalog.jobs.report(self._lease, metrics=lines, progress=progress)
                    self._lines, self._progress = [], None
                    self.stopping |= state == "stopping"
                if due:
                    self.stopping |= self._catalog.jobs.heartbeat(self._lease, self._seconds) == "stopping"
                    self._beat = time.monotonic()
            except LeaseLostError:
                self.over = True
                log.warning("job %s is no longer ours", self.job.id)
            except UnavailableError as error:
                log.warning("job %s: %s", self.job.id, error)

    # --- the end ----------------------------------------------------------------------------------------------------

    def finish(self, content: VersionContent | None, result: dict[str, Any]) -> bool:
        """False where the job was somebody else's already."""
        done = self._end(lambda: self._catalog.jobs.finish(self._lease, content=content, result=result))
        if done:
            self.log("completed")
        return done

    def fail(self, error: ErrorInfo) -> None:
        self.log(f"failed ({error.code}): {error.message}" + (f" ({error.hint})" if error.hint else ""))
        self._end(lambda: self._catalog.jobs.fail(self._lease, error))

    def stopped(self, message: str) -> None:
        self.log(f"canceled: {message}")
        self._end(lambda: self._catalog.jobs.stopped(self._lease, message))

    def release(self, message: str) -> None:
        self.log(message)
        self._end(lambda: self._catalog.jobs.release(self._lease, message))

    def _end(self, say: Callable[[], object]) -> bool:
        """The last word. Raises `UnavailableError` where the catalog does not answer for long."""
        with self._lock:
            self.flush()
            said = self._say(say)
            self.over = True
            return said

    def _say(self, say: Callable[[], object]) -> bool:
        deadline = time.monotonic() + PATIENCE_SECONDS
        with self._lock:
            while not self.over:
                try:
                    say()
                except LeaseLostError:
                    self.over = True
                    log.warning("job %s is no longer ours", self.job.id)
                except UnavailableError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.5)
                else:
                    return True
            return False


class Pulse:
    """Flushes reporters once a second, whatever the main thread is busy with."""

    def __init__(self, reporters: Sequence[Reporter]) -> None:
        self._reporters = reporters
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)

    def __enter__(self) -> Pulse:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(FLUSH_SECONDS):
            for reporter in self._reporters:
                try:
                    reporter.flush()
                except Exception:  # what one batch holds must not silence the heartbeats
                    log.exception("job %s: a report failed", reporter.job.id)


def told(error: Exception, folders: Sequence[Path] = ()) -> ErrorInfo:
    """An error as whoever asked for the job sees it: without the paths of this machine."""
    if not isinstance(error, LorikeetError):
        what = f"the job failed: {type(error).__name__}: {error}"
        return ErrorInfo(code="job_failed", message=what, hint="its log has the details")
    for folder in folders:
        error = error.without(folder)
    return error.info()


def _one_line(text: str) -> str:
    """Nothing in a log line can be taken for another line."""
    return "".join(c if c.isprintable() else " " for c in text)
