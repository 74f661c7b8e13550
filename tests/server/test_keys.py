"""Keys, users, tenants and the audit log over HTTP, and the command that makes the first key."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from tests.server.doors import Caller, caller
from tests.server.hosting import Hosted, hosted, own_cache

from lorikeet.config import EngineConfig, PlatformConfig, ServeConfig
from lorikeet.engine.link import EngineClient
from lorikeet.registry.catalog import Catalog, open_catalog
from lorikeet.registry.records import DEFAULT_TENANT, Actor
from lorikeet.server.serve import make_state

PROMPT = [7, 8, 9]


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with own_cache(tmp_path_factory.mktemp("cache")):
        yield


@contextmanager
def platform(model: Path, home: Path) -> Iterator[Hosted]:
    """A platform without keys, over a scripted engine."""
    settings = {"platform": PlatformConfig(home=str(home))}
    with hosted(model, scripted=True, serve_settings=settings) as running:
        yield running


@pytest.fixture
def fresh(checkpoint: Callable[..., Path], tmp_path: Path, cache_folder: None) -> Iterator[Hosted]:
    with platform(checkpoint("llama"), tmp_path / "home") as running:
        yield running


@pytest.fixture(scope="module")
def server(
    checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory, cache_folder: None
) -> Iterator[Hosted]:
    with platform(checkpoint("llama"), tmp_path_factory.mktemp("home")) as running:
        yield running


def catalog_of(server: Hosted) -> Catalog:
    assert server.state.platform is not None
    return server.state.platform.catalog


@pytest.fixture(scope="module")
def root(server: Hosted) -> Caller:
    """An admin of the default tenant."""
    made = caller(catalog_of(server), "root", "admin")
    server.state.access.keys_changed()
    return made


@pytest.fixture
def admin(server: Hosted, root: Caller) -> Caller:
    """An admin of a tenant with nothing in it."""
    tenant = catalog_of(server).people.create_tenant(Actor(), f"t-{uuid.uuid4().hex}")
    return caller(catalog_of(server), "root", "admin", tenant.id)


def actor(who: Caller) -> Actor:
    return Actor(tenant=who.key.tenant_id)


def error_of(reply: httpx.Response, status: int) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    error: dict[str, Any] = reply.json()["error"]
    return error


def ask(server: Hosted, who: Caller | None, method: str, path: str, body: Any = None, status: int = 200) -> Any:
    reply = server.http.request(method, path, json=body, headers={} if who is None else who.headers)
    assert reply.status_code == status, reply.text
    return reply.json()


def test_the_first_key_closes_the_door(fresh: Hosted) -> None:
    me = ask(fresh, None, "GET", "/api/me")
    assert me == {
        "tenant": "default", "role": "admin", "name": "local", "key": None, "operator": True, "needs_key": False
    }  # fmt: skip
    said = error_of(fresh.post("/api/keys", {"name": "app"}), 409)
    assert said["param"] == "role" and "admin" in said["hint"]
    made = fresh.post("/api/keys", {"name": "root", "role": "admin"})
    assert made.status_code == 201 and made.headers["cache-control"] == "no-store"
    root = Caller(None, made.json()["secret"])  # type: ignore[arg-type]
    assert root.secret.startswith("lk_") and len(root.secret) == 46
    assert error_of(fresh.http.get("/api/me"), 401)["code"] == "invalid_api_key"
    assert fresh.http.get("/api/me").headers["www-authenticate"] == "Bearer"
    me = ask(fresh, root, "GET", "/api/me")
    assert me["needs_key"] and me["name"] == "key:root" and me["key"]["prefix"] == root.secret[:10]
    assert root.secret not in json.dumps(ask(fresh, root, "GET", "/api/keys"))
    assert "hash" not in json.dumps(ask(fresh, root, "GET", "/api/keys"))
    revoked = ask(fresh, root, "DELETE", f"/api/keys/{made.json()['id']}")
    assert revoked["revoked"] is not None
    error_of(fresh.http.get("/api/me", headers=root.headers), 401)


def test_a_key_from_the_command_line(fresh: Hosted, tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lorikeet", "keys", *arguments, "--home", str(tmp_path / "home")]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    ask(fresh, None, "GET", "/api/me")
    made = run("create", "me", "--role", "admin", "--expires-in", "2h", "--tokens-per-day", "500")
    assert made.returncode == 0, made.stderr
    me = Caller(None, made.stdout.strip())  # type: ignore[arg-type]
    assert "not shown again" in made.stderr and me.secret not in made.stderr and "no key here" not in made.stderr
    until = time.monotonic() + 10
    while fresh.http.get("/api/me").status_code != 401:  # the server that runs takes notice by itself
        assert time.monotonic() < until
        time.sleep(0.05)
    key = ask(fresh, me, "GET", "/api/me")["key"]
    assert key["tokens_per_day"] == 500 and key["created_by"].startswith("cli:")
    assert 7000 < key["expires"] - time.time() < 7201
    assert run("grant", "me", "nothing").returncode == 2
    assert run("change", "me").returncode == 2
    for flags in (["--role", "root"], ["--tokens-per-day", "0"], ["--requests-per-minute", "many"]):
        wrong = run("change", "me", *flags)
        assert wrong.returncode == 2 and flags[0] in wrong.stderr and "expected" in wrong.stderr
    lowered = run("change", "me", "--role", "user")
    assert lowered.returncode != 0 and "the last key that manages" in lowered.stderr
    changed = run("change", "me", "--tokens-per-day", "700", "--requests-per-minute", "none")
    assert changed.returncode == 0 and "tokens per day 700" in changed.stdout, changed.stderr
    assert ask(fresh, me, "GET", "/api/me")["key"]["tokens_per_day"] == 700
    listed = json.loads(run("ls", "--json").stdout)
    assert [one["name"] for one in listed] == ["me"] and me.secret not in json.dumps(listed)
    assert run("revoke", "me").returncode == 0
    assert fresh.http.get("/api/me", headers=me.headers).status_code == 401


def test_the_start_says_who_comes_in(
    checkpoint: Callable[..., Path], tmp_path: Path, cache_folder: None, capfd: pytest.CaptureFixture[str]
) -> None:
    with platform(checkpoint("llama"), tmp_path / "home") as running:
        said = capfd.readouterr().err
        assert f"ready at {running.url}, the page too" in said and "authorization" not in said
        assert f"`lorikeet keys create --role admin --home {tmp_path / 'home'} NAME`" in " ".join(said.split())
        caller(catalog_of(running), "root", "admin")
    with platform(checkpoint("llama"), tmp_path / "home"):
        said = capfd.readouterr().err
        assert "no key is asked for" not in said and '-H "authorization: Bearer $LORIKEET_API_KEY"' in said


def test_a_first_key_that_opens_too_little_is_pointed_out(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lorikeet", "keys", "create", "app", "--home", str(tmp_path / "home")]
    made = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert made.returncode == 0 and made.stdout.startswith("lk_")
    assert "every request needs a key from now on, and no key here is an admin's" in made.stderr


def test_keys_are_confined_and_widened(server: Hosted, admin: Caller) -> None:
    catalog = catalog_of(server)
    for name in ("intent", "slots"):
        catalog.repositories.create(actor(admin), name)
    made = ask(server, admin, "POST", "/api/keys", {"name": "ci", "repositories": ["intent"]}, 201)
    assert made["repositories"] == ["intent"] and made["role"] == "user" and not made["every_repository"]
    who = catalog.keys.authenticate(made["secret"])
    assert who is not None and who[0].repositories == {catalog.repositories.get(actor(admin), "intent").id}
    path = f"/api/keys/{made['id']}"
    assert ask(server, admin, "PATCH", path, {"repositories": ["slots"]})["repositories"] == ["slots"]
    assert ask(server, admin, "PATCH", path, {"repositories": None})["repositories"] is None
    assert "nothing to change" in error_of(server.http.patch(path, json={}, headers=admin.headers), 422)["message"]
    assert error_of(server.http.patch(path, json={"repositories": ["x"]}, headers=admin.headers), 404)


def test_a_key_is_changed(server: Hosted, admin: Caller) -> None:
    """What it may do is another thing from the next request on, and the log says from what to what."""
    made = ask(server, admin, "POST", "/api/keys", {"name": "ci", "requests_per_minute": 2}, 201)
    ci, path = Caller(None, made["secret"]), f"/api/keys/{made['id']}"  # type: ignore[arg-type]
    error_of(server.http.post("/api/repos", json={"name": "intent"}, headers=ci.headers), 403)
    told = ask(server, admin, "PATCH", path, {"role": "trainer", "requests_per_minute": None})
    assert (told["role"], told["requests_per_minute"], told["repositories"]) == ("trainer", None, None)
    ask(server, ci, "POST", "/api/repos", {"name": "intent"}, 201)
    for _ in range(3):  # the limit of two is gone
        assert ask(server, ci, "GET", "/api/me")["role"] == "trainer"
    ask(server, admin, "PATCH", path, {"role": "user", "requests_per_minute": 1, "tokens_per_day": 5})
    ask(server, ci, "GET", "/api/me")  # the new limit begins with a full minute
    error_of(server.http.get("/api/me", headers=ci.headers), 429)
    entries = ask(server, admin, "GET", f"/api/audit?action=key.change&subject_id={made['id']}")["items"]
    assert [one["details"]["role"] for one in entries] == [
        {"from": "trainer", "to": "user"}, {"from": "user", "to": "trainer"},
    ]  # fmt: skip
    assert entries[0]["details"]["requests_per_minute"] == {"from": None, "to": 1}
    assert entries[0]["actor"] == "key:root"


def test_changes_that_are_refused(server: Hosted, admin: Caller) -> None:
    own = f"/api/keys/{admin.key.id}"

    def change(path: str, body: Any, who: Caller = admin) -> httpx.Response:
        return server.http.patch(path, json=body, headers=who.headers)

    assert error_of(change(own, {"role": "user"}), 409)["code"] == "last_admin"
    assert error_of(change(own, {"repositories": []}), 409)["code"] == "last_admin"
    assert change(own, {"tokens_per_day": 1000}).status_code == 200
    said = error_of(change(own, {"tokens_per_day": None}), 403)
    assert (said["code"], said["param"]) == ("own_key", "tokens_per_day") and "another admin" in said["hint"]
    for body, param in (
        ({"role": None}, "role"), ({"role": "root"}, "role"), ({"requests_per_minute": 0}, "requests_per_minute"),
        ({"name": "other"}, "name"), ({"expires": 5.0}, "expires"), ({"repositories": "a"}, "repositories"),
    ):  # fmt: skip
        assert error_of(change(own, body), 422)["param"] == param
    second = caller(catalog_of(server), "second", "admin", admin.key.tenant_id)
    trainer = caller(catalog_of(server), "trainer", "trainer", admin.key.tenant_id)
    error_of(change(f"/api/keys/{trainer.key.id}", {"role": "admin"}, trainer), 403)
    assert change(own, {"role": "user"}).status_code == 200  # there is another admin now
    error_of(change(own, {"role": "admin"}), 403)  # no way back by itself
    assert change(own, {"role": "admin"}, second).status_code == 200
    ask(server, second, "DELETE", own)
    assert "is revoked" in error_of(change(own, {"role": "user"}, second), 409)["message"]


def test_an_admin_confined_to_repositories_manages_nobody(server: Hosted, admin: Caller) -> None:
    catalog_of(server).repositories.create(actor(admin), "intent")
    confined = caller(catalog_of(server), "confined", "admin", admin.key.tenant_id, repositories=["intent"])
    for method, path, body in (
        ("POST", "/api/keys", {"name": "free", "role": "admin"}), ("GET", "/api/keys", None),
        ("GET", "/api/users", None), ("PATCH", f"/api/keys/{confined.key.id}", {"repositories": None}),
        ("DELETE", f"/api/keys/{admin.key.id}", None), ("POST", "/api/users", {"name": "u"}),
        ("GET", "/api/audit", None),
    ):  # fmt: skip
        reply = server.http.request(method, path, json=body, headers=confined.headers)
        assert error_of(reply, 403)["code"] == "confined_key"
    assert ask(server, admin, "GET", "/api/me")["role"] == "admin"


def test_users_and_the_roles_of_their_keys(server: Hosted, admin: Caller) -> None:
    ask(server, admin, "POST", "/api/users", {"name": "ann", "role": "trainer", "email": "ann@example.com"}, 201)
    said = error_of(server.http.post("/api/keys", json={"name": "k", "role": "admin", "user": "ann"},
                                     headers=admin.headers), 400)  # fmt: skip
    assert said["param"] == "role" and "trainer" in said["message"]
    made = ask(server, admin, "POST", "/api/keys", {"name": "k", "role": "trainer", "user": "ann"}, 201)
    hers = Caller(None, made["secret"])  # type: ignore[arg-type]
    assert ask(server, hers, "GET", "/api/me")["name"] == "user:ann"
    assert ask(server, admin, "PATCH", "/api/users/ann", {"disabled": True})["disabled"] is not None
    error_of(server.http.get("/api/me", headers=hers.headers), 401)
    ask(server, admin, "PATCH", "/api/users/ann", {"disabled": False})
    ask(server, hers, "GET", "/api/me")
    assert [one["name"] for one in ask(server, admin, "GET", "/api/users")["items"]] == ["ann"]


def test_tenants_manage_themselves_and_nobody_else(server: Hosted, root: Caller) -> None:
    tenant = ask(server, root, "POST", "/api/tenants", {"name": "acme"}, 201)
    made = ask(server, root, "POST", "/api/keys?tenant=acme", {"name": "boss", "role": "admin"}, 201)
    assert made["tenant_id"] == tenant["id"]
    boss = Caller(None, made["secret"])  # type: ignore[arg-type]
    assert ask(server, boss, "GET", "/api/me")["tenant"] == "acme"
    assert not ask(server, boss, "GET", "/api/me")["operator"]
    assert [one["name"] for one in ask(server, boss, "GET", "/api/keys")["items"]] == ["boss"]
    (entry,) = ask(server, boss, "GET", "/api/audit")["items"]
    assert (entry["action"], entry["actor"]) == ("key.create", "key:root@default")
    for method, path, body in (
        ("GET", "/api/tenants", None), ("POST", "/api/tenants", {"name": "more"}), ("GET", "/metrics", None),
        ("GET", "/api/keys?tenant=default", None), ("POST", "/api/keys?tenant=default", {"name": "x"}),
        ("GET", "/api/audit?tenant=default", None), ("POST", "/api/users?tenant=default", {"name": "x"}),
    ):  # fmt: skip
        error_of(server.http.request(method, path, json=body, headers=boss.headers), 403)
    error_of(server.http.delete(f"/api/keys/{root.key.id}", headers=boss.headers), 404)
    error_of(server.http.patch(f"/api/keys/{root.key.id}", json={"repositories": []}, headers=boss.headers), 404)
    ask(server, root, "GET", "/api/me")


def test_the_audit_log_by_pages(server: Hosted, admin: Caller) -> None:
    for i in range(5):
        ask(server, admin, "POST", "/api/keys", {"name": f"k{i}"}, 201)
    first = ask(server, admin, "GET", "/api/audit?limit=4")
    second = ask(server, admin, "GET", f"/api/audit?limit=4&after={first['next']}")
    names = [one["subject"] for one in first["items"] + second["items"]]
    assert names == ["k4", "k3", "k2", "k1", "k0", "root"] and second["next"] is None
    assert ask(server, admin, "GET", "/api/audit?action=key.revoke")["items"] == []
    for wrong in ("limit=0x", "limit=-1", "after=99999999999999999999", "limit=1001", "after=%0a", "x=1"):
        error_of(server.http.get(f"/api/audit?{wrong}", headers=admin.headers), 422)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"name": "a b"}, "name"), ({"name": "../x"}, "name"), ({"name": "x\r\ny"}, "name"), ({}, "name"),
        ({"name": "x", "role": "root"}, "role"), ({"name": "x", "expires": 1.0}, "expires"),
        ({"name": "x", "expires": 9e9, "expires_in": 5.0}, "expires"),
        ({"name": "x", "expires_in": -1.0}, "expires_in"),
        ({"name": "x", "requests_per_minute": 0}, "requests_per_minute"),
        ({"name": "x", "tokens_per_day": 2**60}, "tokens_per_day"),
        ({"name": "x", "secret": "mine"}, "secret"), ({"name": "x", "user": "nobody"}, "user"),
        ({"name": "x", "repositories": "intent"}, "repositories"),
    ],
)  # fmt: skip
def test_keys_that_make_no_sense(server: Hosted, admin: Caller, body: Any, param: str) -> None:
    reply = server.http.post("/api/keys", json=body, headers=admin.headers)
    assert reply.status_code in (400, 404, 422), reply.text
    assert reply.json()["error"]["param"] == param
    assert len(ask(server, admin, "GET", "/api/keys")["items"]) == 1


# --- limits -------------------------------------------------------------------------------------------------------


def test_requests_a_minute(server: Hosted, admin: Caller) -> None:
    slow = caller(catalog_of(server), "slow", tenant=admin.key.tenant_id, requests_per_minute=3)
    replies = [server.http.get("/api/me", headers=slow.headers) for _ in range(4)]
    assert [one.status_code for one in replies] == [200, 200, 200, 429]
    error = replies[-1].json()["error"]
    assert (error["code"], error["param"]) == ("rate_limit_exceeded", "requests_per_minute") and "3" in error["message"]
    assert 1 <= int(replies[-1].headers["retry-after"]) <= 20
    ask(server, admin, "GET", "/api/me")


def test_tokens_a_day(server: Hosted, admin: Caller) -> None:
    made = ask(server, admin, "POST", "/api/keys", {"name": "app", "tokens_per_day": 40}, 201)
    app = Caller(None, made["secret"])  # type: ignore[arg-type]
    body = {"prompt": PROMPT, "max_tokens": 4, "ignore_eos": True}
    for _ in range(3):
        ask(server, app, "POST", "/v1/completions", body)  # 7 tokens each
    ask(server, app, "POST", "/v1/completions", body | {"n": 2})  # 11: the prompt counts once
    refused = server.http.post("/v1/completions", json=body | {"max_tokens": 6}, headers=app.headers)
    error = error_of(refused, 429)
    assert (error["code"], error["param"]) == ("quota_exceeded", "tokens_per_day")
    assert "40" in error["message"] and "8 are left" in error["message"] and int(refused.headers["retry-after"]) > 0
    streamed = server.http.post("/v1/completions", json=body | {"stream": True, "max_tokens": 6}, headers=app.headers)
    assert streamed.status_code == 429
    told = server.http.post(
        "/generate", json={"inputs": "a", "parameters": {"max_new_tokens": 20}}, headers=app.headers
    )
    assert told.status_code == 429 and told.json()["error_type"] == "overloaded"
    ask(server, app, "POST", "/v1/completions", body | {"max_tokens": 5})
    until = time.monotonic() + 10
    while ask(server, app, "GET", "/api/me")["key"]["today"]["tokens"] != 40:
        assert time.monotonic() < until
        time.sleep(0.05)
    shown = {one["name"]: one["today"]["tokens"] for one in ask(server, admin, "GET", "/api/keys")["items"]}
    assert shown["app"] == 40


def test_a_stream_that_is_left_early_counts_what_came(server: Hosted, admin: Caller) -> None:
    app = caller(catalog_of(server), "app", tenant=admin.key.tenant_id, tokens_per_day=200)
    body = {"prompt": [7, 251], "max_tokens": 100, "ignore_eos": True, "stream": True}  # 20 ms a token
    with server.http.stream("POST", "/v1/completions", json=body, headers=app.headers) as reply:
        for i, _ in enumerate(reply.iter_lines()):
            if i > 6:
                break
    until = time.monotonic() + 10
    while not (used := ask(server, app, "GET", "/api/me")["key"]["today"]["tokens"]):
        assert time.monotonic() < until
        time.sleep(0.05)
    assert 5 <= used < 102
    ask(server, app, "POST", "/v1/completions", {"prompt": [7], "max_tokens": 150})  # nothing stays reserved


def test_weights_of_tenants_by_name(checkpoint: Callable[..., Path], tmp_path: Path, cache_folder: None) -> None:
    home = tmp_path / "home"
    catalog = open_catalog(home / "catalog.db")
    acme = catalog.people.create_tenant(Actor(), "acme")
    catalog.close()

    def weights(**named: float) -> dict[str, float]:
        engine = EngineConfig(model=str(checkpoint("llama")), tenant_weights=named)
        config = ServeConfig(engine=engine, platform=PlatformConfig(home=str(home)))
        state = make_state(config, cast("EngineClient", object()))
        assert state.platform is not None
        state.platform.close()
        return state.config.engine.tenant_weights

    assert weights(acme=2.0, default=0.5) == {acme.id: 2.0, DEFAULT_TENANT: 0.5}
