"""A whole server in a thread of the test process: real HTTP on loopback, the engine in its own process as ever."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from lorikeet.config import EngineConfig, ServeConfig
from lorikeet.engine.link import EngineClient
from lorikeet.server.serve import listen, serve
from lorikeet.server.state import ServerState

SCRIPTED = Path(__file__).parent.parent / "scripted_engine.py"
SMALL = {"dtype": "float32", "kv_memory": 8 * 2**20, "adapter_memory": 8 * 2**20, "threads": 1}


@contextmanager
def own_cache(folder: Path) -> Iterator[None]:
    """Compiled adapters go to `folder`; compiled kernels stay where every test finds them."""
    usual = Path(os.environ.get("LORIKEET_CACHE", "~/.cache/lorikeet")).expanduser()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORIKEET_CACHE", str(folder))
        patch.setenv("NUMBA_CACHE_DIR", os.environ.get("NUMBA_CACHE_DIR", str(usual / "numba")))
        yield


@dataclass
class Hosted:
    url: str
    state: ServerState
    http: httpx.Client
    loop: asyncio.AbstractEventLoop
    stop: asyncio.Event

    def post(self, path: str, body: Any, **more: Any) -> httpx.Response:
        return self.http.post(path, json=body, **more)

    def complete(self, **fields: Any) -> Any:
        reply = self.post("/v1/completions", fields)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def stream(self, path: str, body: Any) -> list[Any]:
        """The JSON of every server-sent event, `[DONE]` as a string."""
        with self.http.stream("POST", path, json=body) as reply:
            assert reply.status_code == 200, reply.read()
            assert reply.headers["content-type"].startswith("text/event-stream")
            lines = [line[5:].strip() for line in reply.iter_lines() if line.startswith("data:")]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]

    def drain(self) -> None:
        self.loop.call_soon_threadsafe(self.stop.set)


@contextmanager
def hosted(
    model: Path, adapters: Path | None = None, *, scripted: bool = False, serve_settings: dict[str, Any] | None = None,
    **engine_settings: Any,
) -> Iterator[Hosted]:  # fmt: skip
    listener = listen("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    engine = EngineConfig(model=str(model), **{**SMALL, **engine_settings})
    config = ServeConfig(engine=engine, adapters=None if adapters is None else str(adapters), **(serve_settings or {}))
    ready = threading.Event()
    found: dict[str, Any] = {}

    async def main() -> None:
        found["loop"], found["stop"] = asyncio.get_running_loop(), asyncio.Event()
        client = EngineClient(engine, command=[sys.executable, str(SCRIPTED)] if scripted else None)

        def on_ready(state: ServerState) -> None:
            found["state"] = state
            ready.set()

        await serve(config, listener, engine=client, on_ready=on_ready, stop=found["stop"])

    def target() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            found["error"] = error
        finally:
            ready.set()

    patch = pytest.MonkeyPatch()
    patch.setattr("lorikeet.server.catalogue.RESCAN_SECONDS", 0.0)  # tests do not wait for a second to pass
    thread = threading.Thread(target=target)
    thread.start()
    ready.wait(120)
    if "state" not in found:
        thread.join(5)
        raise found.get("error", RuntimeError("the server did not start"))
    with httpx.Client(base_url=url, timeout=60) as http:
        server = Hosted(url, found["state"], http, found["loop"], found["stop"])
        try:
            yield server
        finally:
            server.drain()
            thread.join(30)
            patch.undo()
            assert not thread.is_alive()
            if "error" in found:
                raise found["error"]
