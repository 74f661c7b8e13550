"""Servers that speak as Google Cloud Storage and as Azure's blob storage do, as processes of their own."""

from __future__ import annotations

import base64
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from urllib.parse import quote

ACCOUNT = "lorikeets"
KEY = base64.b64encode(b"k" * 64).decode()
AZURITE = Path(sys.prefix) / "azurite" / "node_modules" / "azurite" / "dist" / "src" / "blob" / "main.js"
BUCKET = "box"
_PATIENCE = 60.0  # seconds for a server to start on a machine that has much else to do


def azurite_is_there() -> bool:
    """`scripts/install_azurite.sh` puts it there."""
    return AZURITE.exists() and shutil.which("node") is not None


@contextmanager
def azurite() -> Iterator[tuple[str, int]]:
    """Azurite with one account, `ACCOUNT` with `KEY`; where it listens."""
    command = [
        "node", str(AZURITE), "--blobHost", "127.0.0.1", "--blobPort", "0", "--inMemoryPersistence",
        "--skipApiVersionCheck", "--silent",
    ]  # fmt: skip
    with _started(command, {"AZURITE_ACCOUNTS": f"{ACCOUNT}:{KEY}"}, r"http://127\.0\.0\.1:(\d+)") as port:
        yield "127.0.0.1", port


@contextmanager
def google() -> Iterator[tuple[str, int]]:
    """Google's JSON API with one bucket, `BUCKET`, open to everybody; where it listens."""
    port = _free_port()
    command = [
        sys.executable, "-W", "ignore", "-m", "gcp_storage_emulator", "start", "--host", "127.0.0.1", "--port",
        str(port), "--in-memory", "--default-bucket", BUCKET,
    ]  # fmt: skip
    with _started(command, {}, r":(\d+)"):
        yield "127.0.0.1", port


def put_google(address: tuple[str, int], name: str, data: bytes) -> None:
    """Store an object in `BUCKET`."""
    host, port = address
    url = f"http://{host}:{port}/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name={quote(name, safe='')}"
    headers = {"content-type": "application/octet-stream"}
    with urllib.request.urlopen(urllib.request.Request(url, data, headers, method="POST"), timeout=20) as reply:
        assert reply.status == 200


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def _started(command: list[str], environment: dict[str, str], said: str) -> Iterator[int]:
    """A process, once a line of its output matches `said`, whose group is a port."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=output, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + _PATIENCE
            while (match := re.search(said, text := _text(output))) is None:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{command[:3]} did not start: {text[-2000:]}")
                time.sleep(0.05)
            port = int(match[1])
            while not _listens(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{command[:3]} does not listen: {_text(output)[-2000:]}")
                time.sleep(0.05)
            yield port
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)


def _listens(port: int) -> bool:
    with socket.socket() as one:
        one.settimeout(5)
        return one.connect_ex(("127.0.0.1", port)) == 0


def _text(output: IO[bytes]) -> str:
    size = os.fstat(output.fileno()).st_size  # the process writes at the same place that a read would move
    return os.pread(output.fileno(), size, 0).decode(errors="replace")
