"""What was opened with a key ends soon after that key opens nothing any more, with a word of why; the rest goes on."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.scripted_engine import SLOW, WAIT
from tests.server.doors import Caller, caller
from tests.server.hosting import Hosted, hosted, own_cache
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from lorikeet.client import Client
from lorikeet.config import PlatformConfig
from lorikeet.errors import LorikeetError, UnavailableError
from lorikeet.registry.catalog import Catalog
from lorikeet.registry.records import Actor, JobRequest, KeyChange
from lorikeet.server import revocation
from lorikeet.server.revocation import Revocation

LONG = {"model": "llama", "prompt": [SLOW], "max_tokens": 250, "stream": True}  # five seconds
REVOKED = "key_revoked"


@pytest.fixture(scope="module")
def server(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosted]:
    place = tmp_path_factory.mktemp("revoking")
    settings = {"platform": PlatformConfig(home=str(place / "home"))}
    with own_cache(place / "cache"), hosted(checkpoint("llama"), scripted=True, serve_settings=settings) as server:
        caller(catalog_of(server), "root", "admin")
        server.state.access.keys_changed()
        yield server


@pytest.fixture(scope="module")
def job(server: Hosted) -> str:
    """One that waits for ever."""
    assert server.state.platform is not None
    catalog = catalog_of(server)
    catalog.repositories.create(Actor(), "r")
    request = JobRequest(kind="train", spec={}, base="llama", repository="r", memory=2**60)
    return catalog.jobs.submit(Actor(), request).id


def catalog_of(server: Hosted) -> Catalog:
    assert server.state.platform is not None
    return server.state.platform.catalog


@contextmanager
def events(server: Hosted, path: str, who: Caller, body: Any = None) -> Iterator[Iterator[Any]]:
    method = "GET" if body is None else "POST"
    more = {} if body is None else {"json": body}
    with server.http.stream(method, path, headers=who.headers, **more) as reply:
        assert reply.status_code == 200, reply.read()
        yield (json.loads(line[5:]) for line in reply.iter_lines() if line.startswith("data:") and "[DONE]" not in line)


@pytest.mark.parametrize("how", ["revoked", "elsewhere", "expired", "disabled", "confined", "lowered"])
def test_a_generation_ends_with_its_key(server: Hosted, how: str) -> None:
    catalog = catalog_of(server)
    more: dict[str, Any] = {"expires": time.time() + 1.5} if how == "expired" else {}
    if how == "disabled":
        catalog.people.create_user(Actor(), "somebody", "user")
        more = {"user": "somebody"}
    role = "trainer" if how == "lowered" else "user"
    who, root = caller(catalog, how, role, **more), caller(catalog, f"root-{how}", "admin")
    beside = LONG | {"max_tokens": 80}
    with (
        events(server, "/v1/completions", who, LONG) as said,
        events(server, "/v1/completions", root, beside) as others,
    ):
        next(said)
        if how == "revoked":
            server.http.delete(f"/api/keys/{who.key.id}", headers=root.headers).raise_for_status()
        elif how == "elsewhere":  # by a command, or another server on the same catalog
            catalog.keys.revoke(Actor(), who.key.id)
        elif how == "disabled":
            catalog.people.disable_user(Actor(), "somebody")
        elif how == "confined":
            catalog.keys.alter(Actor(), who.key.id, KeyChange(repositories=[]))
        elif how == "lowered":
            body = {"role": "user"}
            server.http.patch(f"/api/keys/{who.key.id}", json=body, headers=root.headers).raise_for_status()
        *_, last = said
        assert last["error"]["code"] == REVOKED and "was revoked" in last["error"]["message"]
        *_, end = others
        assert end["choices"][0]["finish_reason"] == "length"


def test_a_key_that_may_more_keeps_what_it_opened(server: Hosted) -> None:
    catalog = catalog_of(server)
    who, root = caller(catalog, "risen", repositories=[]), caller(catalog, "root-risen", "admin")
    path, body = f"/api/keys/{who.key.id}", {"role": "trainer", "repositories": None, "tokens_per_day": 10**6}
    with events(server, "/v1/completions", who, LONG | {"max_tokens": 150}) as said:
        next(said)
        server.http.patch(path, json=body, headers=root.headers).raise_for_status()
        *_, last = said
    assert last["choices"][0]["finish_reason"] == "length"
    assert server.http.get("/api/me", headers=who.headers).json()["role"] == "trainer"


def test_the_engine_stops_for_it_and_its_quota_is_settled(server: Hosted) -> None:
    catalog = catalog_of(server)
    who = caller(catalog, "counted", tokens_per_day=1000)
    body = {"inputs": "x", "parameters": {"max_new_tokens": 200}}
    before = server.state.engine.in_flight
    errors: list[httpx.Response] = []
    waiting = {"model": "llama", "prompt": [WAIT], "max_tokens": 5}

    def wait() -> None:
        errors.append(server.post("/v1/completions", waiting, headers=who.headers))

    thread = threading.Thread(target=wait)
    thread.start()
    with events(server, "/generate_stream", who, body) as said:
        next(said)
        until(lambda: server.state.engine.in_flight > before)
        catalog.keys.revoke(Actor(), who.key.id)
        list(said)
    thread.join(10)
    assert errors[0].status_code == 401 and errors[0].json()["error"]["code"] == REVOKED
    until(lambda: server.state.engine.in_flight <= before)
    until(lambda: 0 < sum(one.tokens for one in catalog.keys.usage(who.key.id)) < 400)


def test_what_a_job_says(server: Hosted, job: str) -> None:
    catalog = catalog_of(server)
    for path in (f"/api/jobs/{job}/stream", "/api/serving/stream"):
        who = caller(catalog, path.rsplit("/", 2)[1].replace("-", "")[:20])
        with events(server, path, who) as said:
            next(said)
            catalog.keys.revoke(Actor(), who.key.id)
            *_, last = said
        assert last["type"] == "error" and last["error"]["code"] == REVOKED
    who = caller(catalog, "follower")
    with Client(server.url, api_key=who.secret) as client, pytest.raises(LorikeetError, match="was revoked") as raised:
        for _ in client.events(f"/api/jobs/{job}/stream"):
            catalog.keys.revoke(Actor(), who.key.id)
    assert raised.value.code == REVOKED


@pytest.mark.parametrize("path", ["/api/jobs/{job}/ws", "/v2/finetuning/jobs/{job}/metrics/stream"])
def test_sockets(server: Hosted, job: str, path: str) -> None:
    who = caller(catalog_of(server), "s" + path.rsplit("/", 1)[1])
    address = server.url.replace("http", "ws", 1) + path.format(job=job)
    with connect(address, additional_headers=who.headers) as socket:
        said: list[Any] = [json.loads(socket.recv(10))] if "api" in path else []
        catalog_of(server).keys.revoke(Actor(), who.key.id)
        with pytest.raises(ConnectionClosed) as closed:
            while True:
                said.append(json.loads(socket.recv(10)))
    assert closed.value.rcvd is not None
    assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1008, REVOKED)
    assert "api" not in path or said[-1]["error"]["code"] == REVOKED


@pytest.mark.parametrize("path", ["/api/jobs/{job}/ws", "/v2/finetuning/jobs/{job}/metrics/stream"])
def test_nobody_looks_for_a_client_that_has_left(
    server: Hosted, job: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a close, or by a connection that is cut."""
    who = caller(catalog_of(server), "l" + path.rsplit("/", 1)[1])
    looks, catalog = [], catalog_of(server)
    news = catalog.jobs.news
    monkeypatch.setattr(catalog.jobs, "news", lambda *args, **more: [looks.append(1), news(*args, **more)][1])
    address = server.url.replace("http", "ws", 1) + path.format(job=job)
    for cut in (False, True):
        with connect(address, additional_headers=who.headers, close_timeout=0.1) as socket:
            count = len(looks)
            until(lambda count=count: len(looks) > count + 1)  # type: ignore[misc]
            socket.send(b"\x00 what a client may say is not listened to")
            if cut:
                socket.socket.close()
        count = len(looks)
        time.sleep(0.8)
        assert len(looks) <= count + 1


def until(true: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_catalog_that_does_not_answer_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    monkeypatch.setattr(revocation, "LOOK_SECONDS", 0.01)
    who, other = Actor(key_id="one"), Actor(key_id="two")
    asked: list[set[str]] = []
    ended: list[LorikeetError] = []

    class Book:
        def holders(self, key_ids: Any) -> dict[str, Actor]:
            asked.append(set(key_ids))
            if len(asked) < 3:
                raise UnavailableError("busy")
            return {"one": who, "two": Actor(key_id="two", role="user")}

    async def run(call: Any, *args: Any) -> Any:
        return call(*args)

    async def main() -> None:
        open_ = Revocation(Book(), run)
        with open_.watch(who, ended.append), open_.watch(who, ended.append):
            await asyncio.sleep(0.2)
            assert len(asked) > 3 and not ended
            with open_.watch(other, ended.append):
                await asyncio.sleep(0.1)
        assert [one.code for one in ended] == [REVOKED] and not open_._open
        await asyncio.sleep(0.05)
        count = len(asked)
        await asyncio.sleep(0.05)
        assert len(asked) == count, "nothing is open, so nobody is asked about"
        await open_.close()

    asyncio.run(main())
