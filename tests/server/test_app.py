"""What the whole server does with bad input, faults, many clients and clients that leave."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import shutil
import signal
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from safetensors.numpy import load_file, save_file
from tests.scripted_engine import DIE, RAISE_IN_STEP, SLOW, WAIT
from tests.server.hosting import Hosted, hosted

from lorikeet.adapters.files import Lock, LockedBase, write_lock

PROMPT = "the quick brown fox"


def error_of(reply: httpx.Response, status: int) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/json"
    error: dict[str, Any] = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code", "hint", "retryable"}
    return error


def unharmed(server: Hosted) -> None:
    body = server.complete(prompt=PROMPT, max_tokens=2, temperature=0)
    assert body["usage"]["completion_tokens"] == 2
    assert server.state.engine.restarts == 0


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_unknown_models(live: Hosted, path: str) -> None:
    body = {"model": "nobody", "prompt": "x"} if path == "/v1/completions" else {
        "model": "nobody", "messages": [{"role": "user", "content": "x"}]}  # fmt: skip
    error = error_of(live.post(path, body), 404)
    assert error["code"] == "model_not_found" and "'nobody'" in error["message"] and "adapter-00" in error["hint"]


@pytest.mark.parametrize(
    "data", [b"", b"{", b'{"prompt": "x",}', b"\xff\xfe", b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}']
)
def test_malformed_json(live: Hosted, data: bytes) -> None:
    error = error_of(live.http.post("/v1/completions", content=data), 400)
    assert error["code"] == "malformed_json"
    unharmed(live)


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"max_tokens": -1}, "max_tokens", "-1"),
        ({"max_tokens": "5"}, "max_tokens", "integer"),
        ({"max_tokens": True}, "max_tokens", "True"),
        ({"max_token": 5}, "max_token", "unknown field 'max_token'"),
        ({"unknown": None}, "unknown", "unknown field"),
        ({"temperature": -0.5}, "temperature", "-0.5"),
        ({"temperature": float("nan")}, "temperature", "finite"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"top_p": 1.5}, "top_p", "1.5"),
        ({"n": 0}, "n", "0"),
        ({"n": 1000}, "n", "1000"),
        ({"logprobs": 50}, "logprobs", "50"),
        ({"stop": [""]}, "stop", "non-empty"),
        ({"stop": 5}, "stop", "5"),
        ({"seed": 2**64}, "seed", ""),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "0.5"),
        ({"presence_penalty": -1}, "presence_penalty", "-1"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
        ({"best_of": 3}, "best_of", "3"),
        ({"suffix": "x"}, "suffix", "'x'"),
        ({"prompt": []}, "prompt", "must be"),
        ({"prompt": ["a", 1]}, "prompt", "must be"),
        ({"prompt": None}, "prompt", "missing"),
        ({"prompt": {"a": 1}}, "prompt", "must be"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
        ({"guided_choice": []}, "guided_choice", "non-empty"),
    ],
)
def test_values_that_make_no_sense(live: Hosted, fields: dict[str, Any], param: str, said: str) -> None:
    body = json.dumps({"prompt": "x", **fields})
    error = error_of(live.http.post("/v1/completions", content=body), 422)
    assert error["param"] == param and f"'{param}'" in error["message"] and said in error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "x", "mood": "glad"}]}, "messages.0.mood"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens"),
        ({"max_completion_tokens": -3}, "max_completion_tokens"),
    ],
)
def test_chats_that_make_no_sense(live: Hosted, fields: dict[str, Any], param: str) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], **fields}
    error = error_of(live.post("/v1/chat/completions", body), 422)
    assert str(error["param"]).startswith(param)


def test_null_is_absent(live: Hosted) -> None:
    names = """model max_tokens temperature top_p n stop seed stream echo suffix logprobs best_of logit_bias user
        frequency_penalty stream_options"""
    assert live.complete(**{**dict.fromkeys(names.split()), "prompt": "x", "max_tokens": 1})["model"] == "llama"
    zeros = {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "best_of": 1, "suffix": ""}
    assert live.complete(**zeros, user="me", prompt="x", max_tokens=1)


def test_prompts_that_do_not_fit(live: Hosted) -> None:
    error = error_of(live.post("/v1/completions", {"prompt": [7] * 500}), 400)
    assert "500" in error["message"] and "128" in error["message"] and error["code"] == "context_length_exceeded"
    error = error_of(live.post("/v1/completions", {"prompt": [7] * 100, "max_tokens": 100}), 400)
    assert error["param"] == "max_tokens" and "100" in error["message"] and "28" in error["hint"]
    messages = [{"role": "user", "content": "the " * 200}]
    assert "128" in error_of(live.post("/v1/chat/completions", {"messages": messages}), 400)["message"]
    assert live.complete(prompt=[7] * 120)["usage"]["completion_tokens"] <= 8
    error = error_of(live.post("/v1/completions", {"prompt": [7, 999]}), 400)
    assert "999" in error["message"]
    error_of(live.post("/v1/completions", {"prompt": ""}), 400)


def test_a_body_too_large_is_not_kept(live: Hosted) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(200):
            yield b" " * 2**20

    for content in (b" " * (200 * 2**20), chunks()):
        before = psutil.Process().memory_info().rss  # the server runs in this process
        reply = live.http.post("/v1/completions", content=content)
        assert error_of(reply, 413)["code"] == "body_too_large"
        assert psutil.Process().memory_info().rss - before < 100 * 2**20
    unharmed(live)


def test_a_client_that_asks_before_it_sends_is_told_at_once(live: Hosted) -> None:
    address = live.http.base_url
    with socket.create_connection((address.host, address.port or 80), timeout=30) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n"
            b"Content-Length: 209715200\r\n\r\n"
        )
        assert connection.recv(64).startswith(b"HTTP/1.1 413 ")


def test_routes_that_are_not_there(live: Hosted) -> None:
    assert error_of(live.http.get("/v2/nothing"), 404)["code"] == "unknown_route"
    assert error_of(live.http.get("/v1/completions"), 405)["code"] == "wrong_method"


# --- adapters that cannot be served -------------------------------------------------------------------------------


@pytest.fixture
def put(live: Hosted, adapters: Callable[..., list[Path]]) -> Any:
    """`put(name)`: a copy of a good adapter in the served folder, gone after the test."""
    root = live.state.models.catalogue.root
    assert root is not None
    made: list[Path] = []

    def copy(name: str, change: Callable[[Path], None]) -> Path:
        new = root / f".{name}"
        shutil.copytree(adapters("llama", 1)[0], new)
        change(new)
        made.append(new.rename(root / name))
        return made[-1]

    yield copy
    for folder in made:
        shutil.rmtree(folder)


def truncate(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def corrupt(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**60) + path.read_bytes()[8:])


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def misshape(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "q_proj.lora_A" in name)
    tensors[name] = tensors[name][:, :-1].copy()
    save_file(tensors, path)


def unknown_kind(folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_type": "LOHA"}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (truncate, ["adapter_model.safetensors"]),
        (corrupt, ["adapter_model.safetensors"]),
        (pickled, ["adapter_model.bin", "pickled"]),
        (misshape, ["q_proj", "lora_A", "63", "64"]),
        (unknown_kind, ["peft_type", "LOHA"]),
    ],
)
def test_broken_adapters_are_refused_by_name(live: Hosted, put: Any, change: Any, said: list[str]) -> None:
    put("broken", change)
    for _ in range(2):
        error = error_of(live.post("/v1/completions", {"model": "broken", "prompt": "x"}), 422)
        text = f"{error['message']} {error['hint']} {error['param']}"
        assert all(part in text for part in said), text
    unharmed(live)


def test_adapters_come_change_and_go_without_a_restart(live: Hosted, put: Any, adapters: Any) -> None:
    fields = {"model": "fresh", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    error_of(live.post("/v1/completions", fields), 404)
    folder = put("fresh", lambda _: None)
    assert live.complete(**fields)["choices"] == live.complete(**{**fields, "model": "adapter-00"})["choices"]
    for file in adapters("llama", 2)[1].iterdir():
        shutil.copy(file, folder / file.name)
    assert live.complete(**fields)["choices"] == live.complete(**{**fields, "model": "adapter-01"})["choices"]
    moved = folder.rename(folder.parent / ".away")
    error_of(live.post("/v1/completions", fields), 404)
    moved.rename(folder)


def test_a_lock_for_another_base_is_a_conflict(live: Hosted, put: Any) -> None:
    base = live.state.info.base
    lock = Lock(base=LockedBase("another", "f" * 64), tokenizer_sha256=base.tokenizer_sha256, stop_ids=base.stop_ids)
    put("stranger", lambda folder: write_lock(folder, lock))
    error = error_of(live.post("/v1/completions", {"model": "stranger", "prompt": "x"}), 409)
    assert error["code"] == "lock_mismatch" and "another" in error["hint"] and "--allow-lock-mismatch" in error["hint"]
    models = {model["id"]: model for model in live.http.get("/v1/models").json()["data"]}
    assert models["stranger"]["lock"] == "locked" and models["adapter-00"]["lock"] == "unlocked"


# --- many, and those that leave -----------------------------------------------------------------------------------


async def stream_events(http: httpx.AsyncClient, body: dict[str, Any]) -> AsyncIterator[Any]:
    async with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as reply:
        if reply.status_code != 200:
            yield json.loads(await reply.aread()) | {"status": reply.status_code, "headers": reply.headers}
            return
        async for line in reply.aiter_lines():
            if line.startswith("data: "):
                yield line[6:] if line == "data: [DONE]" else json.loads(line[6:])


def finals(events: list[Any]) -> int:
    return sum("error" in e or any(c["finish_reason"] for c in e["choices"]) for e in events if e != "[DONE]")


def test_64_streams_over_32_adapters(checkpoint: Any, adapters: Any, tmp_path: Path, own_cache_folder: None) -> None:
    for i in range(32):
        shutil.copytree(adapters("llama", 4)[i % 4], tmp_path / f"copy-{i:02d}")
    with hosted(checkpoint("llama"), tmp_path, max_context=128, max_seqs=16) as server:

        async def run() -> list[list[Any]]:
            async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=httpx.Limits()) as http:
                bodies = [
                    {"model": f"copy-{i % 32:02d}", "prompt": f"{PROMPT} {i}", "max_tokens": 1 + i % 7, "seed": i}
                    for i in range(64)
                ]

                async def one(body: dict[str, Any]) -> list[Any]:
                    return [event async for event in stream_events(http, body)]

                return await asyncio.gather(*map(one, bodies))

        for events in asyncio.run(run()):
            assert finals(events) == 1 and events[-1] == "[DONE]"
        assert server.state.engine.in_flight == 0


def test_a_client_that_leaves_frees_its_blocks(live: Hosted) -> None:
    async def run() -> None:
        async with httpx.AsyncClient(base_url=live.url, timeout=60) as http:
            body = {"prompt": PROMPT, "max_tokens": 100, "ignore_eos": True, "n": 3}
            events = stream_events(http, body)
            await anext(events)
            await events.aclose()
            whole = asyncio.create_task(http.post("/v1/completions", json=body))
            await asyncio.sleep(0.1)
            whole.cancel()

    asyncio.run(run())
    deadline = time.monotonic() + 10
    while live.state.engine.in_flight:
        assert time.monotonic() < deadline, "requests of clients that left go on"
        time.sleep(0.02)
    lines = live.http.get("/metrics").text.splitlines()
    gauges = dict(line.split() for line in lines if line.startswith("lorikeet_engine"))
    assert gauges["lorikeet_engine_running"] == "0.0"
    assert gauges["lorikeet_engine_blocks_free"] == gauges["lorikeet_engine_blocks_total"]


def test_a_client_that_leaves_before_its_body_has_come_is_no_fault(
    scripted: Hosted, caplog: pytest.LogCaptureFixture
) -> None:
    host, port = scripted.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 100\r\n\r\n{")
        scripted.complete(prompt=[1, 2], max_tokens=1)  # by now the other request is being read
    scripted.complete(prompt=[1, 2], max_tokens=1)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_connections_are_as_many_as_the_system_allows(bare_model: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
    try:
        with hosted(bare_model, scripted=True) as server, ExitStack() as clients:
            assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
            for _ in range(min(400, hard // 4)):
                clients.enter_context(socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))))
            server.complete(prompt=[1, 2], max_tokens=1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_queue_is_bounded(scripted: Hosted) -> None:
    async def run() -> None:
        async with httpx.AsyncClient(base_url=scripted.url, timeout=30) as http:
            body = {"prompt": [WAIT], "max_tokens": 4}
            waiting = [asyncio.create_task(http.post("/v1/completions", json=body)) for _ in range(8)]
            while scripted.state.engine.in_flight < 8:
                await asyncio.sleep(0.01)
            reply = await http.post("/v1/completions", json={"prompt": [7]})
            assert error_of(reply, 429)["type"] == "rate_limit_error" and reply.headers["retry-after"] == "2"
            lorax = await http.post("/generate", json={"inputs": "x"})
            assert lorax.status_code == 429 and lorax.json()["error_type"] == "overloaded"
            for task in waiting:
                task.cancel()

    asyncio.run(run())
    while scripted.state.engine.in_flight:
        time.sleep(0.01)
    assert scripted.complete(prompt=[7], max_tokens=2)


# --- faults -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [DIE, RAISE_IN_STEP])
def test_a_dead_engine(scripted: Hosted, order: int) -> None:
    """No byte sent: 503 with Retry-After. Mid-stream: one last event that says `retryable`. Then it works again."""

    async def run() -> tuple[list[httpx.Response], list[Any], list[Any]]:
        async with httpx.AsyncClient(base_url=scripted.url, timeout=30) as http:
            silent = [asyncio.create_task(http.post("/v1/completions", json={"prompt": [WAIT]})) for _ in range(3)]
            while scripted.state.engine.in_flight < 3:
                await asyncio.sleep(0.01)
            sent = [event async for event in stream_events(http, {"prompt": [order], "max_tokens": 9})]
            waiting = [event async for event in stream_events(http, {"prompt": [WAIT]})]
            return await asyncio.gather(*silent), sent, waiting

    silent, sent, refused = asyncio.run(run())
    started = time.monotonic()
    for reply in silent:
        assert error_of(reply, 503)["retryable"] is True and int(reply.headers["retry-after"]) >= 1
    assert [event["choices"][0]["finish_reason"] for event in sent[:-1]] == [None, None]
    assert sent[-1]["error"]["retryable"] is True and finals(sent) == 1
    assert refused[-1]["status"] == 503 and "retry-after" in refused[-1]["headers"]
    while scripted.post("/v1/completions", {"prompt": [7], "max_tokens": 2}).status_code != 200:
        assert time.monotonic() - started < 10, "the engine did not come back within 10 s"
        time.sleep(0.05)
    assert scripted.http.get("/health").json()["engine"]["restarts"] == 1


def test_a_lorax_stream_ends_with_its_own_error(scripted: Hosted) -> None:
    tokenizer = scripted.state.models.base.tokenizer
    order = (b"\xc3" + tokenizer.token_bytes(DIE)).decode()
    assert tokenizer.encode(order)[-1] == DIE
    events = scripted.stream("/generate_stream", {"inputs": order, "parameters": {"max_new_tokens": 9}})
    assert [set(event) for event in events[:-1]] == [{"token", "generated_text", "details"}] * 2
    assert events[-1]["error_type"] == "unavailable" and events[-1]["retryable"] is True


def test_kill_9_of_the_real_engine(checkpoint: Any, adapters: Any, own_cache_folder: None) -> None:
    folder = adapters("llama", 2)[0].parent
    with hosted(checkpoint("llama"), folder, max_context=128) as server:
        fields = {"model": "adapter-00", "prompt": PROMPT, "max_tokens": 6, "temperature": 0}
        before = server.complete(**fields)["choices"]
        pid = server.state.engine.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        started = time.monotonic()
        while (reply := server.post("/v1/completions", fields)).status_code != 200:
            assert reply.status_code == 503 and "retry-after" in reply.headers
            # The bar is 10 s on an idle machine; most of it is importing torch, which a busy one stretches at will.
            assert time.monotonic() - started < 60, "the engine did not come back"
            time.sleep(0.1)
        assert reply.json()["choices"] == before


def test_health_and_draining(bare_model: Path) -> None:
    with hosted(bare_model, scripted=True, serve_settings={"drain_seconds": 5.0}) as server:
        for path in ("/health", "/health/ready", "/health/live", "/ping"):
            assert server.http.get(path).status_code == 200
        slow = {"prompt": [SLOW], "max_tokens": 40, "stream": True}
        with server.http.stream("POST", "/v1/completions", json=slow) as reply:
            lines = reply.iter_lines()
            next(lines)
            server.drain()
            with httpx.Client(base_url=server.url) as other:
                while other.get("/health/ready").status_code == 200:
                    time.sleep(0.01)
                assert other.get("/health/live").status_code == 200
                refused = other.post("/v1/completions", json={"prompt": [7]})
                assert error_of(refused, 503)["retryable"] and "retry-after" in refused.headers
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and '"finish_reason":"length"' in rest[-2]


def test_the_key(bare_model: Path) -> None:
    with hosted(bare_model, scripted=True, serve_settings={"api_key": "secret"}) as server:
        assert server.http.get("/health/ready").status_code == 200
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
            reply = server.http.post("/v1/completions", json={"prompt": "x"}, headers=headers)
            assert error_of(reply, 401)["code"] == "invalid_api_key" and reply.headers["www-authenticate"] == "Bearer"
        right = {"authorization": "Bearer secret"}
        assert server.http.post("/v1/completions", json={"prompt": [7]}, headers=right).status_code == 200
        assert server.http.get("/metrics").status_code == 401


def test_metrics_count_by_adapter(scripted: Hosted) -> None:
    root = scripted.state.models.catalogue.root
    assert root is not None
    (root / "fine").mkdir()
    (root / "fine" / "adapter_config.json").write_text("{}")
    for model in ("fine", "fine", "scripted"):
        scripted.complete(model=model, prompt=[7, 8], max_tokens=3)
    text = scripted.http.get("/metrics").text
    assert 'lorikeet_requests_total{adapter="fine",outcome="length"} 2.0' in text
    assert 'lorikeet_prompt_tokens_total{adapter="fine"} 4.0' in text
    assert 'lorikeet_generated_tokens_total{adapter="fine"} 6.0' in text
    assert 'lorikeet_generated_tokens_total{adapter="scripted"} 3.0' in text
    assert "lorikeet_time_to_first_token_seconds_count 3.0" in text
    assert "lorikeet_inter_token_seconds_count 6.0" in text
    assert "lorikeet_engine_up 1.0" in text and "lorikeet_engine_running 0.0" in text
