"""What `lorikeet up` has beside serving: a home with its catalog and blobs, and whoever runs the jobs."""

from __future__ import annotations

import asyncio
import fcntl
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import ParamSpec, TypeVar

import psutil

from lorikeet.config import PlatformConfig
from lorikeet.errors import ConfigError
from lorikeet.model.families import load_spec
from lorikeet.model.sources import find_model, identify, weight_bytes
from lorikeet.registry.home import open_home
from lorikeet.registry.objects import disk_error
from lorikeet.server.job_memory import gib
from lorikeet.server.judging import judging_memory
from lorikeet.server.supervisor import Supervisor
from lorikeet.types import BaseIdentity

log = logging.getLogger("lorikeet.platform")

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

CATALOG_THREADS, SLOW_THREADS = 16, 4
HOUSEKEEPING_SECONDS = 600.0


class Platform:
    """Opened with its home, which no other server may use meanwhile; `start` and `stop` belong to the event loop.

    `model` is the base as the engine's config names it. Raises `ConfigError`, `UnavailableError`.
    """

    def __init__(self, config: PlatformConfig, model: str) -> None:
        self.config = config
        folder = Path(config.home).expanduser().absolute()
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = (folder / ".lock").open("w")
        except OSError as error:
            raise disk_error(error, folder) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise ConfigError(
                f"another `lorikeet up` uses {folder}", hint="stop it, or name another --home", param="home"
            ) from None
        self.model = model
        self.base: BaseIdentity = identify(find_model(model), None if Path(model).expanduser().is_dir() else model)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        try:
            self.home = open_home(folder, catalog=config.catalog, blobs=config.blobs)
        except BaseException:
            self._lock.close()
            raise
        self.catalog, self.blobs = self.home.catalog, self.home.blobs
        self.job_memory = config.job_memory or psutil.virtual_memory().total // 2
        checkpoint = find_model(model)
        self.judging_memory = judging_memory(load_spec(checkpoint), weight_bytes(checkpoint))
        if self.job_memory < self.judging_memory:
            said = "jobs may use %s of memory, and an evaluation on this base needs about %s; see --job-memory"
            log.warning(said, gib(self.job_memory), gib(self.judging_memory))
        self.supervisor = Supervisor(self)
        self._quick = ThreadPoolExecutor(CATALOG_THREADS, "catalog")
        self._slow = ThreadPoolExecutor(SLOW_THREADS, "platform")
        self._tasks: list[asyncio.Task[None]] = []

    async def run(self, work: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        """A call of the catalog, which is synchronous, off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._quick, partial(work, *args, **kwargs))

    async def run_slow(
        self, work: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        """The same for what takes long, such as hashing files: calls of the catalog do not wait behind it."""
        return await asyncio.get_running_loop().run_in_executor(self._slow, partial(work, *args, **kwargs))

    async def start(self) -> None:
        await self.supervisor.start()
        self._tasks.append(asyncio.create_task(self._keep_house(), name="housekeeping"))

    async def stop(self) -> None:
        """Jobs go back to the queue; the catalog answers on until `close`."""
        await self.supervisor.stop()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def close(self) -> None:
        self._quick.shutdown(wait=True)
        self._slow.shutdown(wait=False, cancel_futures=True)
        self.home.close()
        self._lock.close()

    async def _keep_house(self) -> None:
        while True:
            await self.run_slow(self._collect)
            await asyncio.sleep(HOUSEKEEPING_SECONDS)

    def _collect(self) -> None:
        """Remove what was deleted a while ago, and what nobody needs."""
        try:
            removed = self.home.collect()
            self.blobs.trim(self.config.folders)
        except Exception:
            log.exception("housekeeping failed; it is tried again in %g s", HOUSEKEEPING_SECONDS)
        else:
            if removed:
                log.info("%d blobs that nothing needs are removed", removed)
