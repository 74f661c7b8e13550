"""Every way in, tried by everybody who must not come in. The application lists its ways, so a new one is tried, too."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from tests.server.doors import Caller, Door
from tests.server.guarded import MARK, NAME, Guarded
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from lorikeet.registry.records import Actor
from lorikeet.server.auth import RANKS, demand_of

PUBLIC = {
    "GET /health", "GET /health/live", "GET /health/ready", "GET /ping",  # say no more than whether the server works
    "GET /", "GET /ui/{version}/{name:path}",  # the page's own files
    "PUT /v2/uploads/{token}/{name}",  # the token is the key, for these files alone
}  # fmt: skip
OPERATOR = {
    "GET /metrics", "GET /api/tenants", "POST /api/tenants", "GET /{tenant}/deployments/v2/llms/{deployment}/metrics",
}  # fmt: skip
REFERENCES = [NAME, f"{NAME}/1", f"{NAME}@production"]


def private(guarded: Guarded) -> list[Door]:
    return [door for door in guarded.doors if not demand_of(door.endpoint).public]


def knock(guarded: Guarded, door: Door, who: Caller | None, body: Any = None, **values: str) -> tuple[int, str]:
    """Status and text of the reply; of a WebSocket that opens 101 and its first messages."""
    path = door.filled(**values)
    if door.method != "WS":
        more = {} if body is None or door.method == "DELETE" else {"json": body}
        reply = guarded.send(door.method, path, who, **more)
        return reply.status_code, reply.text
    try:
        address = guarded.server.url.replace("http", "ws", 1) + path
        with connect(address, additional_headers={} if who is None else who.headers, open_timeout=10) as socket:
            return 101, str(socket.recv(timeout=5))
    except InvalidStatus as refused:
        return refused.response.status_code, refused.response.body.decode()


def test_every_endpoint_says_what_it_takes(guarded: Guarded) -> None:
    assert len(guarded.doors) > 100
    silent = [door.name for door in guarded.doors if not hasattr(door.endpoint, "demand")]
    assert not silent, "mark these with needs() or public, see server/auth.py"
    assert {door.name for door in guarded.doors if demand_of(door.endpoint).public} == PUBLIC
    assert {door.name for door in guarded.doors if demand_of(door.endpoint).operator} == OPERATOR
    changes = [door for door in private(guarded) if door.method in ("DELETE", "PATCH")]
    loose = [door.name for door in changes if demand_of(door.endpoint).role == "user"]
    assert all("/v2/" in name for name in loose), "what changes the catalog takes a trainer"


@pytest.mark.parametrize("kind", ["none", "expired", "revoked", "wrong"])
def test_every_route_without_a_key_that_opens(guarded: Guarded, kind: str) -> None:
    secret = guarded.admin.secret
    callers: dict[str, Caller | None] = {
        "none": None, "expired": guarded.expired, "revoked": guarded.revoked,
        "wrong": Caller(guarded.admin.key, secret[:-1] + ("A" if secret[-1] != "A" else "B")),
    }  # fmt: skip
    before = guarded.snapshot()
    for door in private(guarded):
        status, text = knock(guarded, door, callers[kind], {}, **guarded.names)
        assert status == 401, (door.name, status, text)
        assert MARK not in text and "key" in text, (door.name, text)
    assert guarded.snapshot() == before


def test_every_route_with_too_low_a_role(guarded: Guarded) -> None:
    callers = {"user": guarded.user, "trainer": guarded.trainer, "admin": guarded.admin}
    before = guarded.snapshot()
    for door in private(guarded):
        demand = demand_of(door.endpoint)
        for role, who in callers.items():
            if RANKS[role] >= RANKS[demand.role] and not demand.operator:  # type: ignore[index]
                continue
            status, text = knock(guarded, door, who, {}, **guarded.names)
            assert status == 403, (door.name, role, status, text)
            assert MARK not in text
    assert guarded.snapshot() == before


def test_every_role_may_what_it_is_for(guarded: Guarded) -> None:
    """With names of nothing, so that nothing happens."""
    callers = {"user": guarded.user, "trainer": guarded.trainer, "admin": guarded.admin}
    for door in private(guarded):
        demand = demand_of(door.endpoint)
        who = guarded.root if demand.operator else callers[demand.role]
        status, text = knock(guarded, door, who, {}, deployment="llama")
        assert status not in (401, 403), (door.name, status, text)
        assert status < 500 or status == 501, (door.name, status, text)


def bodies(door: Door) -> Iterator[Any]:
    """What one would send there to get at what is the victim's."""
    yield {}
    for reference in REFERENCES if door.path == "/v1/completions" else REFERENCES[-1:]:
        yield {"model": reference, "prompt": [7], "max_tokens": 1}
        yield {"model": reference, "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
        yield {"model": reference, "prompt": "x"}
        yield {"model": reference, "tokens": [7]}
        yield {"model": reference, "input": "x"}
        yield {"inputs": "x", "parameters": {"adapter_id": reference, "max_new_tokens": 1}}
        merged = {"ids": [reference, reference], "weights": [0.5, 0.5]}
        yield {"inputs": "x", "parameters": {"merged_adapters": merged, "max_new_tokens": 1}}
        yield {"merge": {"adapters": [reference, reference], "weights": [1.0, 1.0]}}
        recipe = {"prompt": "{text}", "completion": "{label}", "epochs": 1}
        yield {"kind": "train", "repo": "own", "dataset": NAME, "recipe": recipe}
        yield {"kind": "train", "repo": "own", "dataset": NAME, "parent": reference, "recipe": recipe}
        yield {"kind": "eval", "adapter": reference, "dataset": NAME, "recipe": {"metric": "accuracy"}}
    yield {"prompt": "{text}", "completion": "{label}"}
    yield {"version": 2}
    yield {"description": "mine now"}
    yield {"archived": True}
    yield {"disabled": True}
    yield {"repositories": None}
    yield {"repo": NAME, "dataset": NAME, "params": {"baseModel": "llama"}, "description": "x"}


def test_every_route_with_the_key_of_another_tenant(guarded: Guarded) -> None:
    """Nothing of the victim's is read, used or changed, by its names or from listings."""
    before = guarded.snapshot()
    theirs = {"repo", "job_id", "job", "key_id", "alias"}  # no object of the stranger's answers to these names
    for door in private(guarded):
        for body in bodies(door) if door.method in ("POST", "PUT", "PATCH") else [{}]:
            for repo in ("own", NAME) if "merge" in body and "repo" in door.parameters else (NAME,):
                status, text = knock(guarded, door, guarded.stranger, body, **guarded.names | {"repo": repo})
                assert MARK not in text, (door.name, body, text)
                assert status < 500 or status == 501, (door.name, body, status, text)
                if theirs & set(door.parameters) and repo == NAME:
                    assert 400 <= status < 500, (door.name, body, status, text)
                used = any(reference in json.dumps(body) for reference in REFERENCES)
                assert not used or status >= 400, (door.name, body, status, text)
    assert guarded.snapshot() == before


def test_every_route_with_a_key_for_another_repository(guarded: Guarded) -> None:
    before = guarded.snapshot()
    for door in private(guarded):
        if "repo" not in door.parameters and "/v1/adapters/" not in door.path and "/v1/models/" not in door.path:
            continue
        for body in bodies(door) if door.method in ("POST", "PUT", "PATCH") else [{}]:
            status, text = knock(guarded, door, guarded.confined, body, **guarded.names)
            assert 400 <= status < 500 and MARK not in text, (door.name, status, text)
    for path, body in (
        ("/v1/completions", {"model": NAME, "prompt": [7]}),
        ("/generate", {"inputs": "x", "parameters": {"adapter_id": NAME}}),
        ("/api/repos/spare/versions", {"merge": {"adapters": [NAME, f"{NAME}/1"], "weights": [1.0, 1.0]}}),
    ):  # fmt: skip
        reply = guarded.send("POST", path, guarded.confined, json=body)
        assert reply.status_code == 404 and MARK not in reply.text, (path, reply.text)
    listed = guarded.send("GET", "/api/repos", guarded.confined).json()["items"]
    assert [one["name"] for one in listed] == ["spare"]
    assert guarded.snapshot() == before


@pytest.mark.parametrize("kind", ["job", "evaluation"])
def test_what_jobs_say_to_a_key_for_another_repository(guarded: Guarded, kind: str) -> None:
    """Nothing: not their states, logs, metrics and streams, nor the scores that they found."""
    job = guarded.names[kind]
    before = guarded.snapshot()
    of_jobs = [door for door in private(guarded) if {"job", "job_id"} & set(door.parameters)]
    assert len(of_jobs) > 10
    for door in of_jobs:
        status, text = knock(guarded, door, guarded.confined, {}, **guarded.names | {"job": job, "job_id": job})
        unsupported = status == 400 and "unsupported_call" in text
        assert (status == 404 or unsupported) and MARK not in text, (door.name, status, text)
    for place in ("/api/jobs", "/api/leaderboard", "/v2/finetuning/jobs"):
        reply = guarded.send("GET", place, guarded.confined)
        assert reply.status_code == 200 and MARK not in reply.text and job not in reply.text, (place, reply.text)
        assert MARK in guarded.send("GET", place, guarded.user).text or "/v2/" in place
    assert guarded.send("GET", "/api/jobs?repo=victim", guarded.confined).status_code == 404
    assert guarded.snapshot() == before
    for route in ("", "/logs"):
        assert MARK in guarded.send("GET", f"/api/jobs/{job}{route}", guarded.user).text, route


def test_the_victims_own_keys_do_see_what_the_others_do_not(guarded: Guarded) -> None:
    """The test of the tests: each of these places holds the mark."""
    places = [
        f"/api/repos/{NAME}", f"/api/repos/{NAME}/versions/1", f"/api/repos/{NAME}/versions/1/files/README.md",
        f"/api/datasets/{NAME}", f"/api/jobs/{guarded.names['job_id']}", "/api/jobs", "/api/leaderboard", "/api/users",
        "/api/audit", f"/api/jobs/{guarded.names['job_id']}/stream", f"/v2/repos/{NAME}", "/api/keys",
    ]  # fmt: skip
    for place in places:
        reply = guarded.send("GET", place, guarded.admin)
        assert reply.status_code == 200, (place, reply.text)
    marked = [place for place in places if MARK in guarded.send("GET", place, guarded.admin).text]
    assert len(marked) >= 8, marked


def test_tenants_reach_the_engine_apart(guarded: Guarded) -> None:
    """Queue and cache are told apart by the tenant of the key, on each protocol."""
    seen: list[str] = []
    engine = guarded.server.state.engine
    submit = engine.submit

    async def watched(request: Any, *more: Any) -> Any:
        seen.append(request.tenant)
        return await submit(request, *more)

    engine.submit = watched  # type: ignore[method-assign]
    try:
        for who in (guarded.user, guarded.stranger, guarded.root):
            for path, body in (
                ("/v1/completions", {"prompt": [7], "max_tokens": 1}),
                ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}),
                ("/generate", {"inputs": "x", "parameters": {"max_new_tokens": 1}}),
            ):
                reply = guarded.send("POST", path, who, json=body)
                assert reply.status_code == 200, reply.text
    finally:
        engine.submit = submit  # type: ignore[method-assign]
    expected = [guarded.victim.tenant, guarded.stranger.key.tenant_id, Actor().tenant]
    assert seen == [tenant for tenant in expected for _ in range(3)]
