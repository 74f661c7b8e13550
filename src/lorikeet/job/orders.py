"""What a job process is told when it is started, and where the files of jobs lie below a home."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from lorikeet.registry.records import Lease

NICENESS = 10  # the engine that serves requests goes first


class Orders(msgspec.Struct, frozen=True, kw_only=True):
    """The jobs of one process with its leases on them. A file: URLs may hold passwords, which a command line shows."""

    home: str
    catalog: str | None
    blobs: str | None
    model: str
    lease_seconds: float
    threads: int | None
    leases: list[Lease]

    def write(self, path: Path) -> None:
        """Whole or not at all, for this user alone."""
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f".{path.name}")
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(msgspec.json.encode(self))
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)


def read_orders(path: Path) -> Orders:
    return msgspec.json.decode(path.read_bytes(), type=Orders)


def orders_folder(home: Path) -> Path:
    return home / "jobs" / "running"


def job_folder(home: Path, job_id: str) -> Path:
    """Its log, its checkpoint, and what it writes before that becomes a version."""
    return home / "jobs" / job_id


def log_path(home: Path, job_id: str) -> Path:
    return job_folder(home, job_id) / "log.txt"
