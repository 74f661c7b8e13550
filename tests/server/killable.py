"""A `lorikeet up` in a process of its own that a test can kill, see `crashing.py` for what is scripted in it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

ROOT = Path(__file__).parent.parent.parent
CRASHING = Path(__file__).parent / "crashing.py"
SCRIPTED_JOB = ROOT / "tests" / "scripted_job.py"
HASTY_JOB = ROOT / "tests" / "hasty_job.py"


@contextmanager
def crashing(
    home: Path, port: int, job: Path = SCRIPTED_JOB, environment: Mapping[str, str] | None = None
) -> Iterator[tuple[subprocess.Popen[bytes], httpx.Client]]:
    """The server, once it is ready; `job` is what runs its jobs."""
    with (
        started([sys.executable, str(CRASHING), str(home), str(port), str(job)], home, environment) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as http,
    ):
        wait_until_ready(process, http, home)
        yield process, http


@contextmanager
def started(
    command: list[str], home: Path, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Killed at the end, if it is still there."""
    with log_of(home).open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, env={**os.environ, **(environment or {})})
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_until_ready(process: subprocess.Popen[bytes], http: httpx.Client, home: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while True:
        assert process.poll() is None and time.monotonic() < deadline, log_of(home).read_text()
        with suppress(httpx.TransportError):
            if http.get("/health/ready").status_code == 200:
                return
        time.sleep(0.02)


def log_of(home: Path) -> Path:
    return home.parent / "log.txt"


def unused_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
    return port
