"""Runs the jobs of the queue: claims them, starts a process for those that run together, and watches it.

A process holds its jobs by leases that it extends itself. Whatever becomes of it, each of its jobs ends, goes back to
the queue with its checkpoint, or is claimed again when its lease has run out. One that holds more memory than it may
is killed, see `job_memory`. A server that was killed took its job
processes along; the next one gives back what they held before it claims anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lorikeet.engine.lifeline import child_command
from lorikeet.errors import LeaseLostError, LorikeetError
from lorikeet.job.orders import Orders, log_path, orders_folder, read_orders
from lorikeet.registry.records import Actor, Job, Lease
from lorikeet.server import job_memory
from lorikeet.server.submission import follow_up
from lorikeet.types import ErrorInfo

if TYPE_CHECKING:
    from lorikeet.server.platform import Platform

log = logging.getLogger("lorikeet.supervisor")

LEASE_SECONDS = 30.0
LOOK_SECONDS = 1.0
STOP_SECONDS = 60.0  # after which a process that does not stop a job is killed
LEAVE_SECONDS = 20.0  # for the checkpoints of all jobs when the server stops
LAST_LINES = 20  # of what a process said before it broke down, for its jobs' logs
_KILLED = "where nobody killed it, the machine may have had no memory left: see the kernel's log, lower --job-memory"


@dataclass(slots=True)
class _Run:
    """A job process. `over` are the ids of its jobs whose end was seen.

    Bytes: `memory` is what it was estimated to need, `held` what it holds; `excess` is what it held and what it was
    allowed when that was too much.
    """

    process: asyncio.subprocess.Process
    orders: Path
    output: Path
    leases: list[Lease]
    memory: int
    held: int = 0
    excess: tuple[int, int] | None = None
    over: set[str] = field(default_factory=set)
    stopping: dict[str, float] = field(default_factory=dict)


class Supervisor:
    """`command` is that of a job process without the path of its orders."""

    def __init__(self, platform: Platform, command: Sequence[str] | None = None) -> None:
        self._platform = platform
        self._config = platform.config
        self._jobs = platform.catalog.jobs
        self._folder = platform.home.folder
        self._command = list(command or child_command("lorikeet.job"))
        self._owner = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._runs: list[_Run] = []
        self._wake = asyncio.Event()
        self._stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: list[asyncio.Task[None]] = []

    # --- life -------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        await self._platform.run_slow(self._take_back)
        self._tasks = [
            asyncio.create_task(self._supervise(), name="supervisor"),
            asyncio.create_task(self._watch_memory(), name="memory of jobs"),
        ]

    async def stop(self) -> None:
        """Have all jobs write their checkpoints and go back to the queue."""
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for run in self._runs:
            with contextlib.suppress(ProcessLookupError):
                run.process.terminate()
        for run in self._runs:
            try:
                await asyncio.wait_for(run.process.wait(), LEAVE_SECONDS)
            except TimeoutError:
                run.process.kill()
                await run.process.wait()
            await self._ended(run)

    def wake(self) -> None:
        """There may be something to do. May be called from any thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._wake.set)

    @property
    def pids(self) -> list[int]:
        return [run.process.pid for run in self._runs]

    def _take_back(self) -> None:
        """What processes of a server that was killed held: they are gone, and that is not their jobs' fault."""
        for path in sorted(orders_folder(self._folder).glob("*.json")):
            for lease in read_orders(path).leases:
                with contextlib.suppress(LeaseLostError):
                    self._jobs.release(lease, "the server was started again; goes on from the last checkpoint")
                    continue
                self._follow_up(lease.job)
            path.unlink()
            path.with_suffix(".txt").unlink(missing_ok=True)

    # --- the loop ---------------------------------------------------------------------------------------------------

    async def _supervise(self) -> None:
        while True:
            try:
                for run in [one for one in self._runs if one.process.returncode is not None]:
                    self._runs.remove(run)
                    await self._ended(run)
                await self._watch()
                await self._platform.run(self._jobs.expire)
                while len(self._runs) < self._config.job_concurrency and await self._start_next():
                    pass
            except Exception:
                log.exception("the supervisor failed; it tries again in %g s", LOOK_SECONDS)
            self._wake.clear()
            waits = [asyncio.ensure_future(run.process.wait()) for run in self._runs]
            waits.append(asyncio.ensure_future(self._wake.wait()))
            try:
                await asyncio.wait(waits, timeout=LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for one in waits:
                    one.cancel()

    async def _watch(self) -> None:
        """See which jobs have ended, and kill a process that does not stop one it was asked to."""
        if not self._runs:
            return
        running = {job.id: job for job in await self._platform.run(self._jobs.running)}
        for run in self._runs:
            for lease in run.leases:
                job = running.get(lease.job.id)
                if job is None and lease.job.id not in run.over:
                    run.over.add(lease.job.id)
                    await self._platform.run_slow(self._follow_up, lease.job)
                if job is not None and job.state == "stopping":
                    since = run.stopping.setdefault(job.id, time.monotonic())
                    if time.monotonic() - since > STOP_SECONDS:
                        log.error("job %s does not stop; its process is killed", job.id)
                        run.process.kill()

    async def _watch_memory(self) -> None:
        """Kill a process that holds more memory than it may, before the machine has none left for the others."""
        while True:
            await asyncio.sleep(job_memory.LOOK_SECONDS)
            for run in [one for one in self._runs if one.process.returncode is None and one.excess is None]:
                others = sum(one.memory for one in self._runs if one is not run)
                most = job_memory.allowed(run.memory, others, self._platform.job_memory)
                try:
                    run.held = await asyncio.to_thread(job_memory.held, run.process.pid, most)
                except Exception:
                    log.exception("the memory of job process %d could not be read", run.process.pid)
                    continue
                if run.held > most:
                    run.excess = (run.held, most)
                    log.error("job process %d holds %d bytes of at most %d; it is killed", run.process.pid, *run.excess)
                    with contextlib.suppress(ProcessLookupError):
                        run.process.kill()

    async def _start_next(self) -> bool:
        """Start the next jobs of the queue that there is memory for; False where there are none."""
        left = self._platform.job_memory - sum(max(run.memory, run.held) for run in self._runs)
        leases, memory = await self._platform.run(self._claim, left)
        if not leases:
            return False
        try:
            await self._start_process(leases, memory)
        except OSError as error:
            log.error("a job process could not be started: %s", error)
            for lease in leases:
                with contextlib.suppress(LeaseLostError):
                    await self._platform.run(self._jobs.release, lease, f"no process could be started: {error}")
            return False
        return True

    def _claim(self, left: int) -> tuple[list[Lease], int]:
        """The next job, and what is queued to run as one with it; with the memory that they need together.

        One that was tried before runs alone: if it is what breaks its process, it breaks no other job.
        """
        leases = self._jobs.claim(self._owner, LEASE_SECONDS, memory=left)
        if not leases:
            return [], 0
        first = leases[0].job
        memory, shared = first.memory, int(first.spec.get("shared_memory", 0))
        if first.join_key is None or first.attempts > 1:
            return leases, memory
        while len(leases) < self._config.join:
            more = self._jobs.claim(self._owner, LEASE_SECONDS, memory=left - memory + shared, join_key=first.join_key)
            if not more:
                break
            leases += more
            memory += more[0].job.memory - shared
        return leases, memory

    async def _start_process(self, leases: list[Lease], memory: int) -> None:
        orders = orders_folder(self._folder) / f"{leases[0].job.id}-{secrets.token_hex(4)}.json"
        output = orders.with_suffix(".txt")
        config = self._config
        Orders(
            home=str(self._folder), catalog=config.catalog, blobs=config.blobs, model=self._platform.model,
            lease_seconds=LEASE_SECONDS, threads=config.job_threads, leases=leases,
        ).write(orders)  # fmt: skip
        environment = dict(os.environ)
        if config.job_threads is not None:
            environment["OMP_NUM_THREADS"] = str(config.job_threads)
        with output.open("wb") as said:
            # A session of its own: Ctrl-C in the terminal reaches the server alone, which then has its jobs leave.
            process = await asyncio.create_subprocess_exec(
                *self._command, str(orders), stdin=asyncio.subprocess.PIPE, stdout=said, stderr=said, env=environment,
                start_new_session=True,
            )  # fmt: skip
        self._runs.append(_Run(process, orders, output, leases, memory))
        names = ", ".join(lease.job.id for lease in leases)
        log.info("job process %d runs %s", process.pid, names)

    async def _ended(self, run: _Run) -> None:
        await self._platform.run_slow(self._settle, run)

    def _settle(self, run: _Run) -> None:
        """A process is gone: what it did not bring to an end has broken down with it."""
        code = run.process.returncode
        lines, words = _tail(run.output), "the last its process said:"
        if len({lease.job.repository for lease in run.leases}) > 1:  # not all who may read one log may read the others
            if code:
                log.warning("job process %d said last: %s", run.process.pid, "\n".join(lines) or "nothing")
            lines, words = [], "what its process said last is in the server's log: it ran jobs of other repositories"
        error = ErrorInfo(
            code="job_process_died", message=f"its process ended ({_exit_text(code)}) before the job had",
            retryable=True, hint=_KILLED if code == -signal.SIGKILL else None,
        )  # fmt: skip
        together = len(run.leases) - len(run.over)
        for lease in run.leases:
            if run.excess is not None:
                error = job_memory.too_much(lease.job, together, *run.excess)
            try:
                if self._stopping:  # it was told to leave before it could listen, or took too long
                    self._jobs.release(lease, "the server stops; goes on from the last checkpoint")
                    continue
                self._jobs.fail(lease, error)
            except LeaseLostError:
                if lease.job.id not in run.over:
                    self._follow_up(lease.job)
                continue
            log.error("job %s: %s", lease.job.id, error.message)
            said = [f"{error.message}" + (f" ({error.hint})" if error.hint else ""), words]
            _append(log_path(self._folder, lease.job.id), [*said, *lines])
        run.orders.unlink(missing_ok=True)
        run.output.unlink(missing_ok=True)

    def _follow_up(self, leased: Job) -> None:
        try:
            job = self._jobs.get(Actor(tenant=leased.tenant_id), leased.id)
            follow_up(self._platform, job)
        except LorikeetError as error:
            log.warning("no evaluation follows job %s: %s", leased.id, error)
            _append(log_path(self._folder, leased.id), [f"no evaluation follows: {error.message}"])


def _tail(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 16384))
            return file.read().decode("utf-8", "replace").splitlines()[-LAST_LINES:]
    except OSError:
        return []


def _append(path: Path, lines: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)


def _exit_text(code: int | None) -> str:
    return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
