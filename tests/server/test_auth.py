"""Who gets in, as what, and from where: keys, roles, tenants, the pages of other sites."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import HTTPConnection
from tests.server.doors import caller
from tests.server.hosting import hosted

from lorikeet.config import ServeConfig
from lorikeet.errors import ConfigError, ForbiddenError
from lorikeet.registry.catalog import Catalog, open_catalog
from lorikeet.registry.records import DEFAULT_TENANT, Actor
from lorikeet.server.auth import (
    Access,
    Demand,
    ForeignPageError,
    Principal,
    WrongKeyError,
    demand_of,
    is_loopback,
    needs,
    principal,
    public,
)

ANYBODY = needs("user")(lambda: None)


class Clock:
    now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def catalog(tmp_path: Path, clock: Clock) -> Iterator[Catalog]:
    opened = open_catalog(tmp_path / "catalog.db", clock)
    yield opened
    opened.close()


def asks(
    access: Access, endpoint: Any = ANYBODY, *, method: str = "GET", kind: str = "http",
    host: str = "localhost:8000", **headers: str,
) -> Principal:  # fmt: skip
    """The principal of a request as `authorise` leaves it."""
    named = {"host": host, **{name.replace("_", "-"): value for name, value in headers.items()}}
    raw = [(name.encode(), value.encode("latin-1")) for name, value in named.items()]
    scope = {"type": kind, "path": "/x", "headers": raw, "endpoint": endpoint, "query_string": b"", "server": None}
    connection = HTTPConnection(scope | ({"method": method} if kind == "http" else {}))

    async def main() -> Principal:
        try:
            await access.authorise(connection)
            return principal(connection)
        finally:
            await access.close()

    return asyncio.run(main())


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


# --- keys ---------------------------------------------------------------------------------------------------------


def test_one_key_for_a_server_without_a_catalog() -> None:
    access = Access(ServeConfig(api_key="gehéim", host="0.0.0.0"))
    secret = "gehéim".encode().decode("latin-1")  # as a header carries it
    who = asks(access, **bearer(secret))
    assert who.role == "admin" and who.tenant == "" and who.meter is None
    for wrong in ({}, bearer("x"), bearer(""), {"authorization": f"Basic {secret}"}, {"authorization": secret}):
        with pytest.raises(WrongKeyError, match="needs an API key"):
            asks(access, **wrong)


def test_keys_of_the_catalog_and_what_ends_them(catalog: Catalog, clock: Clock) -> None:
    access = Access(ServeConfig(), catalog)
    assert asks(access).actor == Actor()  # no key yet: whoever is here is the admin
    trainer = caller(catalog, "t", "trainer", expires=clock.now + 60)
    access.keys_changed()
    who = asks(access, **bearer(trainer.secret))
    assert (who.role, who.tenant, who.actor.name) == ("trainer", DEFAULT_TENANT, "key:t")
    assert who.key is not None and who.key.id == trainer.key.id and who.meter is not None
    with pytest.raises(WrongKeyError, match="found none"):
        asks(access)
    with pytest.raises(WrongKeyError, match="one that opens nothing"):
        asks(access, **bearer(trainer.secret + "x"))
    clock.now += 61  # it expires
    for opened in (access, Access(ServeConfig(), catalog)):  # and leaves no open door behind, also after a restart
        with pytest.raises(WrongKeyError):
            asks(opened, **bearer(trainer.secret))
        with pytest.raises(WrongKeyError):
            asks(opened)


def test_revoked_keys_and_those_of_disabled_users_open_nothing(catalog: Catalog) -> None:
    access = Access(ServeConfig(), catalog)
    catalog.people.create_user(Actor(), "ann", "trainer")
    hers, other = caller(catalog, "hers", "trainer", user="ann"), caller(catalog, "other")
    assert asks(access, **bearer(hers.secret)).actor.name == "user:ann"
    catalog.people.disable_user(Actor(), "ann")
    catalog.keys.revoke(Actor(), other.key.id)
    for one in (hers, other):
        with pytest.raises(WrongKeyError):
            asks(access, **bearer(one.secret))
    catalog.people.disable_user(Actor(), "ann", False)
    assert asks(access, **bearer(hers.secret)).role == "trainer"


def test_a_key_beside_the_catalog_is_an_admins(catalog: Catalog) -> None:
    access = Access(ServeConfig(api_key="from-the-environment", host="0.0.0.0"), catalog)
    assert asks(access, host="example.com", **bearer("from-the-environment")).actor.role == "admin"
    with pytest.raises(WrongKeyError):
        asks(access)


def test_without_keys_only_loopback(catalog: Catalog) -> None:
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.com"):
        with pytest.raises(ConfigError, match=r"lorikeet keys create --role admin"):
            Access(ServeConfig(host=host), catalog)
    for host in ("127.0.0.1", "127.0.0.2", "::1", "localhost"):
        Access(ServeConfig(host=host), catalog)
    key = caller(catalog, "a", "admin")
    access = Access(ServeConfig(host="0.0.0.0"), catalog)
    assert asks(access, host="example.com", **bearer(key.secret)).role == "admin"
    with pytest.raises(WrongKeyError):
        asks(access, host="example.com")
    catalog.keys.revoke(Actor(), key.key.id)
    with pytest.raises(ConfigError, match="no key"):
        Access(ServeConfig(host="0.0.0.0"), catalog)


# --- roles --------------------------------------------------------------------------------------------------------


def test_roles_are_ordered_and_silence_takes_an_admin() -> None:
    def callers(tenant: str) -> dict[str, Principal]:
        return {role: Principal(Actor(tenant=tenant, role=role)) for role in ("user", "trainer", "admin")}  # type: ignore[arg-type]

    def passed(demand: Demand, tenant: str = DEFAULT_TENANT) -> set[str]:
        through = set()
        for role, who in callers(tenant).items():
            try:
                demand.check(who)
                through.add(role)
            except ForbiddenError as error:
                assert error.status == 403
        return through

    def silent() -> None: ...

    assert passed(demand_of(silent)) == passed(demand_of(None)) == {"admin"}
    assert passed(demand_of(needs("user")(silent))) == {"user", "trainer", "admin"}
    assert passed(demand_of(needs("trainer")(silent))) == {"trainer", "admin"}
    assert passed(Demand("user", operator=True)) == {"user", "trainer", "admin"}
    assert passed(Demand("user", operator=True), "another") == set()


def test_a_public_endpoint_knows_nobody() -> None:
    with pytest.raises(RuntimeError, match="public"):
        asks(Access(ServeConfig(api_key="k")), public(lambda: None))


# --- pages of other sites, where no key is needed -----------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["localhost:8000", "LOCALHOST", "127.0.0.1:8000", "127.9.9.9", "[::1]:8000", "a.localhost", "localhost.",
             "dev.example.com:8000"]
)  # fmt: skip
def test_own_names(host: str) -> None:
    access = Access(ServeConfig(allowed_hosts=("Dev.Example.com",)))
    assert asks(access, host=host).role == "admin"


@pytest.mark.parametrize(
    "host", ["evil.example", "", "localhost.evil.example", "127.0.0.1.evil.example", "0.0.0.0", "evil@localhost",
             "xlocalhost", "[::1].evil", "[", "192.168.1.5:8000", "2130706433.example", "localhost:8000/..evil"]
)  # fmt: skip
def test_names_that_were_made_to_lead_here(host: str, catalog: Catalog) -> None:
    for access in (Access(ServeConfig()), Access(ServeConfig(), catalog)):
        with pytest.raises(ForeignPageError, match="Host: found"):
            asks(access, host=host)
        with pytest.raises(ForeignPageError):
            asks(access, host=host, method="POST")


@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize(
    ("headers", "fine"),
    [
        ({}, True),
        ({"origin": "http://localhost:8000"}, True),
        ({"origin": "https://app.example.com"}, True),
        ({"origin": "http://localhost:3000"}, False),
        ({"origin": "http://app.example.com"}, False),
        ({"origin": "https://evil.example"}, False),
        ({"origin": "null"}, False),
        ({"origin": ""}, False),
        ({"origin": "http://localhost:8000.evil.example"}, False),
        ({"sec_fetch_site": "same-origin"}, True),
        ({"sec_fetch_site": "none"}, True),
        ({"sec_fetch_site": "cross-site"}, False),
        ({"sec_fetch_site": "same-site"}, False),
    ],
)
def test_origins(kind: str, headers: dict[str, str], fine: bool) -> None:
    access = Access(ServeConfig(cors_origins=("https://app.example.com",)))
    if fine:
        assert asks(access, method="POST", kind=kind, **headers).role == "admin"
    else:
        with pytest.raises(ForeignPageError, match="Origin: found"):
            asks(access, method="POST", kind=kind, **headers)
    if kind == "http":
        asks(access, method="GET", **headers)  # reading is the browser's to refuse: no CORS header allows it


def test_a_key_is_proof_enough() -> None:
    """No browser adds it by itself, so a server with keys may stand behind any name and any page."""
    access = Access(ServeConfig(api_key="k"))
    assert asks(access, method="POST", host="evil.example", origin="https://evil.example", **bearer("k"))


@given(st.text(max_size=40))
def test_no_host_breaks_the_check(host: str) -> None:
    try:
        text = host.encode("utf-8").decode("latin-1")
    except UnicodeEncodeError:
        return
    with suppress(ForeignPageError):
        asks(Access(ServeConfig()), host=text)


def test_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "::1", "[::1]", "localhost", "LocalHost", "127.255.0.3")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "", "10.0.0.1", "example.com", "localhost.example.com")))


@pytest.mark.parametrize("origin", ["*", "example.com", "https://a.example/", "https://a.example/x", "null", "file://"])
def test_origins_are_named_exactly(origin: str) -> None:
    with pytest.raises(ConfigError, match="--cors-origin"):
        Access(ServeConfig(cors_origins=(origin,)))


def test_cors_is_closed_but_for_named_sites(bare_model: Path) -> None:
    named, other = {"origin": "https://app.example.com"}, {"origin": "https://evil.example"}
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    body = {"prompt": [7], "max_tokens": 1}
    with hosted(bare_model, scripted=True) as server:
        for origin in (named, other):
            for reply in (
                server.http.options("/v1/completions", headers=origin | asked),
                server.http.get("/v1/models", headers=origin),
                server.http.post("/v1/completions", json=body, headers=origin),
            ):
                assert not any(name.startswith("access-control-") for name in reply.headers), reply.headers
            assert reply.status_code == 403 and reply.json()["error"]["code"] == "foreign_origin"
    with hosted(bare_model, scripted=True, serve_settings={"cors_origins": (named["origin"],)}) as server:
        preflight = server.http.options("/v1/completions", headers=named | asked)
        assert preflight.status_code == 200 and "authorization" in preflight.headers["access-control-allow-headers"]
        reply = server.http.post("/v1/completions", json=body, headers=named)
        assert reply.status_code == 200 and reply.headers["access-control-allow-origin"] == named["origin"]
        assert "access-control-allow-credentials" not in reply.headers
        assert server.http.options("/v1/completions", headers=other | asked).status_code == 400
        reply = server.http.post("/v1/completions", json=body, headers=other)
        assert reply.status_code == 403 and "access-control-allow-origin" not in reply.headers
