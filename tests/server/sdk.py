"""The published `predibase` package, as a user has it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORKER = Path(__file__).parent / "sdk_worker.py"


@dataclass
class Answer:
    result: Any
    error: str | None
    printed: str


class Sdk:
    """The package in a process of its own, as a user has it: an address, a key, and nothing else."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, gateway: str, code: str, token: str = "pb_any", **names: Any) -> Answer:
        """Run `code` with `pb` and these names; what it leaves in `result`, or the error it raised."""
        assert self._process.stdin is not None and self._process.stdout is not None
        asked = {"gateway": gateway, "token": token, "code": code, "names": names}
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        assert line, "the SDK's process died"
        answer = json.loads(line)
        return Answer(answer["result"], answer["error"], answer["printed"])

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(10)
