"""A child process that answers questions: one JSON object a line in, one out. Its own prints go to stderr."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

Json = dict[str, Any]


class Worker:
    """The parent's end of `python SCRIPT ARGUMENTS`, a script that calls `answer`."""

    def __init__(self, script: Path, *arguments: str, environment: dict[str, str] | None = None) -> None:
        self._name = script.name
        self._process = subprocess.Popen(
            [sys.executable, str(script), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | (environment or {}),
        )  # fmt: skip

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, operation: str, **fields: Any) -> Json:
        """What the child's `operation` returns. Ends the program where it failed."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"operation": operation, **fields}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise SystemExit(f"{self._name} died in {operation!r} (exit code {self._process.wait()})")
        answer: Json = json.loads(line)
        if "failed" in answer:
            raise SystemExit(f"{self._name} failed in {operation!r}:\n{answer['failed']}")
        return answer

    def close(self) -> None:
        """End of input is the child's sign to go."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def answer(**operations: Callable[..., Json]) -> None:
    """The child's loop, until the parent closes its end. Nothing but answers goes to the real standard output."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        message = json.loads(line)
        try:
            reply = operations[message.pop("operation")](**message)
        except Exception:
            reply = {"failed": traceback.format_exc()}
        answers.write(json.dumps(reply) + "\n")


def resident(pid: int) -> Json:
    """Bytes of a process in memory: all of it, and that part which no file backs."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():  # no Linux
        return {"rss": psutil.Process(pid).memory_info().rss, "anonymous": None}
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    return {"rss": 1024 * int(lines["VmRSS"].split()[0]), "anonymous": 1024 * int(lines["RssAnon"].split()[0])}


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
