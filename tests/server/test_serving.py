from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, cast

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from tests.server.hosting import Hosted

from lorikeet.errors import NotFoundError
from lorikeet.registry.records import Actor
from lorikeet.server import serving
from lorikeet.server.auth import Principal
from lorikeet.server.catalogue import AdapterFolder


def picture(server: Hosted, who: Actor) -> Any:
    work = serving._picture(server.state, who, history=True)
    return asyncio.run_coroutine_threadsafe(work, server.loop).result(30)


@pytest.fixture
def asked(live: Hosted) -> Hosted:
    for model in ("adapter-01", "adapter-01", "adapter-02"):
        live.complete(model=model, prompt="one two three", max_tokens=4, ignore_eos=True)
    return live


def test_what_was_asked_is_shown_with_where_it_lives(asked: Hosted) -> None:
    found = picture(asked, Actor())
    now = found["now"]
    by_name = {one["name"]: one for one in now["adapters"]}
    assert now["adapters"][0]["name"] == "adapter-02"  # the latest first
    one = by_name["adapter-01"]
    assert one["tier"] == "device" and one["hits"] >= 2 and one["running"] == one["waiting"] == 0
    assert one["bytes"] > 0 and one["rank"] == 2 and one["last_used"] > asked.state.started
    assert 0 < now["itl"]["p50"] <= now["itl"]["p95"] and 0 < now["ttft"]["p50"] <= now["ttft"]["p95"]
    assert now["engine_ready"] and now["requests_running"] == now["requests_waiting"] == 0 and now["kv_used"] == 0
    assert all(one["tokens_per_second"] >= 0 for one in found["history"])


def test_other_tenants_see_no_names(asked: Hosted) -> None:
    assert picture(asked, Actor(tenant="another"))["now"]["adapters"] == []


def test_a_confined_key_sees_what_it_may_use(asked: Hosted, monkeypatch: pytest.MonkeyPatch) -> None:
    class OnlyOne:
        async def find(self, who: Actor, name: str) -> AdapterFolder:
            if name != "adapter-02":
                raise NotFoundError(name)
            return cast(AdapterFolder, None)

    monkeypatch.setattr(asked.state.models, "registry", OnlyOne())
    confined = Actor(repositories=frozenset({"some"}))
    assert [one["name"] for one in picture(asked, confined)["now"]["adapters"]] == ["adapter-02"]


def test_without_an_engine_there_is_still_a_picture(asked: Hosted, monkeypatch: pytest.MonkeyPatch) -> None:
    async def gone() -> None:
        raise NotFoundError("the engine is starting")

    monkeypatch.setattr(asked.state.engine, "stats", gone)
    now = picture(asked, Actor())["now"]
    assert not now["engine_ready"] and now["requests_running"] is None and now["adapters"][0]["tier"] == "source"


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    """The routes over an engine that lives for three pictures."""

    class Engine:
        looks = 0

        @property
        def alive(self) -> bool:
            self.looks += 1
            return self.looks <= 3

    class State:
        engine = Engine()

    async def fake(state: Any, who: Actor, *, history: bool) -> Any:
        return {"history": history}

    monkeypatch.setattr(serving, "_picture", fake)
    monkeypatch.setattr(serving, "PERIOD", 0.0)
    monkeypatch.setattr(serving, "principal", lambda request: Principal(Actor()))
    app = FastAPI(openapi_url=None)
    app.include_router(serving.routes(cast(Any, State())))
    with TestClient(app) as client:
        yield client


def test_the_stream_ends_with_the_engine_and_tells_the_past_once(client: TestClient) -> None:
    reply = client.get("/api/serving/stream")
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.text == 'data: {"history":true}\n\n' + 2 * 'data: {"history":false}\n\n'
    assert client.get("/api/serving").json() == {"history": True}
