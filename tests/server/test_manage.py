"""The adapters' own routes, over the real engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.server.hosting import Hosted, hosted, own_cache


@pytest.fixture(scope="module")
def server(
    checkpoint: Callable[..., Path], adapters: Callable[..., list[Path]], tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """Room for one of the larger adapters `adapter-00` to `adapter-03` and a little more."""
    served = tmp_path_factory.mktemp("served")
    for one in adapters("llama", 4):
        (served / one.name).symlink_to(one, target_is_directory=True)
    with (
        own_cache(tmp_path_factory.mktemp("cache")),
        hosted(checkpoint("llama"), served, max_context=128, adapter_memory=72 * 1024) as running,
    ):
        yield running


def get(server: Hosted, name: str) -> Any:
    reply = server.http.get(f"/v1/adapters/{name}")
    assert reply.status_code == 200, reply.text
    return reply.json()


def do(server: Hosted, name: str, action: str, status: int = 200) -> Any:
    reply = server.post(f"/v1/adapters/{name}/{action}", {})
    assert reply.status_code == status, reply.text
    return reply.json()


def arrives(server: Hosted, name: str) -> None:
    until = time.monotonic() + 10
    while get(server, name)["tier"] != "device":
        assert time.monotonic() < until, get(server, name)
        time.sleep(0.01)


def test_an_adapter_goes_through_its_tiers(server: Hosted) -> None:
    listed = server.http.get("/v1/adapters").json()
    assert [one["name"] for one in listed["data"]] == [f"adapter-0{i}" for i in range(4)]
    assert {one["tier"] for one in listed["data"]} == {"source"} and listed["refused"] == []
    described = get(server, "adapter-03")
    assert described["tier"] == "disk" and described["hits"] == 0 and described["last_used"] is None
    assert (described["kind"], described["max_rank"], described["sites"]) == ("lora", 5, 21)
    assert do(server, "adapter-03", "load")["tier"] in ("loading", "device")
    arrives(server, "adapter-03")
    server.complete(model="adapter-03", prompt="the quick", max_tokens=3)
    used = get(server, "adapter-03")
    assert used["hits"] == 1 and used["last_used"] <= time.time() and used["running"] == 0
    assert do(server, "adapter-03", "unload")["tier"] == "disk"
    assert server.complete(model="adapter-03", prompt="the quick", max_tokens=3)["choices"]
    assert get(server, "adapter-03")["tier"] == "device"


def test_a_pinned_adapter_stays_and_is_in_the_way_by_name(server: Hosted) -> None:
    assert do(server, "adapter-03", "pin")["pinned"] is True
    arrives(server, "adapter-03")
    said = do(server, "adapter-03", "unload", 409)["error"]
    assert said["code"] == "adapter_in_use" and "it is pinned" in said["message"] and "unpin" in said["hint"]
    for name in ("adapter-00", "adapter-01", "adapter-02"):
        server.complete(model=name, prompt="the quick", max_tokens=2)
    assert get(server, "adapter-03")["tier"] == "device"
    assert do(server, "adapter-03", "unpin")["pinned"] is False
    assert do(server, "adapter-03", "unload")["tier"] == "disk"


def test_what_is_not_there_is_named(server: Hosted) -> None:
    assert "nothing" in do(server, "nothing", "pin", 404)["error"]["message"]
    assert do(server, "adapter-00", "polish", 404)["error"]["code"] == "unknown_route"
    base = server.state.models.base.name
    assert "the base" in do(server, base, "unload", 400)["error"]["message"]


def test_a_request_has_a_deadline(server: Hosted) -> None:
    """It ends with what was made by then; the server goes on."""
    reply = server.post(
        "/v1/completions",
        {"model": "adapter-00", "prompt": "the quick", "max_tokens": 100, "n": 8, "ignore_eos": True,
         "deadline_seconds": 0.02},
    )  # fmt: skip
    assert reply.status_code == 504, reply.text
    error = reply.json()["error"]
    assert error["code"] == "deadline_exceeded" and "deadline" in error["message"]
    assert server.complete(model="adapter-00", prompt="the quick", max_tokens=2, priority=-5)["choices"]
    said = server.post("/v1/completions", {"prompt": "x", "deadline_seconds": 0}).json()["error"]
    assert "deadline_seconds" in said["message"]
    said = server.post("/v1/completions", {"prompt": "x", "priority": "high"}).json()["error"]
    assert "priority" in said["message"]
