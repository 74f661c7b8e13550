"""`lorikeet demo`: the main job, end to end, on the embedded base and data that ships with the project."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from lorikeet.client import Client
from lorikeet.errors import UnavailableError
from lorikeet.judge import run_eval
from lorikeet.train.trainer import run_train

DATA = Path(__file__).parent / "data" / "demo"
ADAPTERS = Path("runs/demo")
RESULTS = Path("demo-results/results.json")


def run_demo(*, once: bool = False, port: int = 8000) -> None:
    """Train the adapters jointly, serve them, judge base and adapters in one mixed load, print the table.

    Stays up at `port` with requests to try; `once` stops instead. Writes `demo-results/results.json`.
    """
    console = Console()
    started = time.perf_counter()
    console.rule("1. Train seven adapters together on one base")
    run_train(DATA / "recipe.yaml", root=DATA, output=ADAPTERS)
    console.rule("2. Serve the base and all of them from one process")
    with serving(port) as url:
        console.rule("3. Judge base and adapters through the server, mixed in one load")
        run_eval(DATA / "recipe.yaml", url=url, adapters=ADAPTERS, root=DATA, output=RESULTS, console=console)
        console.print(f"{time.perf_counter() - started:.0f} s in all")
        if not once:
            _invite(console, url)
            signal.sigwait({signal.SIGINT, signal.SIGTERM})


@contextmanager
def serving(port: int) -> Iterator[str]:
    """A server over the demo's adapters in a process of its own; drained at the end."""
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "lorikeet", "serve", "--adapters", str(ADAPTERS), "--port", str(port)]
    server = subprocess.Popen(command)
    try:
        with Client(url) as client:
            while not client.ready():
                if server.poll() is not None:
                    raise UnavailableError(
                        f"the server ended with exit code {server.returncode} before it was ready",
                        hint="its message stands above; if the port is taken, try `lorikeet demo --port 8001`",
                    )
                time.sleep(0.2)
        yield url
    finally:
        server.terminate()
        try:
            server.wait(timeout=40)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _invite(console: Console, url: str) -> None:
    console.rule(f"Serving at {url}, Ctrl-C ends it")
    for line in (DATA / "try.txt").read_text(encoding="utf-8").replace("{url}", url).splitlines():
        console.print(line, markup=False, highlight=False, soft_wrap=True)
