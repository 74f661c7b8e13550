"""`lorikeet serve` as users start and stop it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from lorikeet.config import EngineConfig, ServeConfig
from lorikeet.errors import ConfigError
from lorikeet.model.sources import cache_folder
from lorikeet.server.serve import base_name, keep_caches_in, listen

SERVE = [sys.executable, "-m", "lorikeet", "serve"]


def test_sigterm_drains_and_the_exit_code_is_zero(
    checkpoint: Callable[..., Path], adapters: Callable[..., list[Path]], own_cache_folder: None
) -> None:
    folder = adapters("llama", 2)[0].parent
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"--port {port} --dtype float32 --kv-memory 8MiB --adapter-memory 8MiB --threads 1 --max-context 200"
    command = [*SERVE, "--model", str(checkpoint("llama")), "--adapters", str(folder), *options.split()]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            until = time.monotonic() + 200  # kernels may have to be compiled first
            while True:
                try:
                    if http.get("/health/ready").is_success:
                        break
                    assert http.get("/health/live").status_code == 200  # it listens before the engine is ready
                except httpx.ConnectError:
                    pass
                assert time.monotonic() < until and process.poll() is None
                time.sleep(0.05)
            body = {"model": "adapter-00", "prompt": "the fox", "max_tokens": 150, "ignore_eos": True, "stream": True}
            with http.stream("POST", "/v1/completions", json=body) as reply:
                lines = reply.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                assert [line for line in lines if line][-1] == "data: [DONE]"
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        said = process.stderr.read()
        process.stderr.close()
    assert "adapter-00" in said and f"curl http://127.0.0.1:{port}/v1/completions" in said and "draining" in said


def test_a_model_that_cannot_be_loaded_is_an_error(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((checkpoint("llama") / name).read_bytes())
    command = [*SERVE, "--model", str(tmp_path), "--port", "0"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2 and "model.safetensors" in ended.stderr and "Traceback" not in ended.stderr


def test_a_port_in_use_is_said_at_once() -> None:
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(ConfigError, match="cannot listen on 127.0.0.1") as error:
            listen("127.0.0.1", taken.getsockname()[1])
    assert error.value.param == "port"


def test_replies_do_not_wait_for_the_clients_ack() -> None:
    async def accepted_option() -> int:
        found = asyncio.get_running_loop().create_future()

        def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            accepted = writer.get_extra_info("socket")
            found.set_result(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listener = listen("127.0.0.1", 0)
        async with await asyncio.start_server(accept, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            option = await found
            writer.close()
            await writer.wait_closed()
        return int(option)

    assert asyncio.run(accepted_option())


def test_names_of_bases(tmp_path: Path) -> None:
    def name(model: str, served: str | None = None) -> str:
        return base_name(ServeConfig(engine=EngineConfig(model=model), served_name=served), tmp_path / "snapshots/abc")

    assert name("Qwen/Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B"
    assert name("Qwen/Qwen2.5-0.5B", "mine") == "mine"
    assert name(str(tmp_path)) == "abc"


def test_caches_of_a_platform_lie_in_its_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORIKEET_CACHE", "")  # so that it is put back
    monkeypatch.delenv("LORIKEET_CACHE")
    monkeypatch.setenv("NUMBA_CACHE_DIR", "elsewhere")
    keep_caches_in(tmp_path / "home")
    assert cache_folder() == tmp_path / "home" / "derived"
    assert os.environ["NUMBA_CACHE_DIR"] == "elsewhere"


def test_caches_lie_where_somebody_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORIKEET_CACHE", str(tmp_path / "mine"))
    monkeypatch.setenv("NUMBA_CACHE_DIR", "")  # so that it is put back
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    keep_caches_in(tmp_path / "home")
    assert cache_folder() == tmp_path / "mine"
    assert os.environ["NUMBA_CACHE_DIR"] == str(tmp_path / "mine" / "numba")
