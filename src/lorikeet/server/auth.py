"""Who asks, and what they may. One dependency stands before every route, HTTP and WebSocket alike.

An endpoint says what it takes, and one that says nothing takes an admin:

    @router.post("/api/jobs")
    @needs("trainer")
    async def create_job(request: Request, who: Caller) -> Response: ...

`Caller` is who asks, as the catalog knows them; `principal` also knows by which key.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeVar
from urllib.parse import urlsplit

from fastapi import Depends
from starlette.requests import HTTPConnection

from lorikeet.config import ServeConfig
from lorikeet.errors import ConfigError, ForbiddenError, LorikeetError
from lorikeet.registry.records import DEFAULT_TENANT, RANKS, Actor, Key, Role
from lorikeet.server.limits import Limits, Meter, Run
from lorikeet.server.revocation import End, Revocation

if TYPE_CHECKING:
    from lorikeet.registry.catalog import Catalog

LOOK_SECONDS = 1.0  # how soon a server without keys notices the first one, made by another process
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::\d{1,5})?")
_SAFE = ("GET", "HEAD", "OPTIONS")

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])


class WrongKeyError(LorikeetError):
    code = "invalid_api_key"
    status = 401


class ForeignPageError(ForbiddenError):
    """A browser asks on behalf of a page that is not the server's own."""

    code = "foreign_origin"


@dataclass(frozen=True, slots=True)
class Principal:
    """The caller of a request. `key`, `meter` and `revocation` are those of the catalog's key, if it came with one."""

    actor: Actor
    key: Key | None = None
    meter: Meter | None = None
    revocation: Revocation | None = None

    @property
    def tenant(self) -> str:
        """What the engine tells tenants apart by: their place in its queue, and their cache."""
        return self.actor.tenant

    @property
    def role(self) -> Role:
        return self.actor.role

    def ending(self, end: End) -> AbstractContextManager[None]:
        """While this is open, `end` is called with the reason once the caller's key opens nothing any more."""
        return nullcontext() if self.revocation is None else self.revocation.watch(self.actor, end)


def principal(connection: HTTPConnection) -> Principal:
    """The caller of a request or WebSocket that has passed `Access.authorise`; a public endpoint has none."""
    found = connection.scope.get("state", {}).get("principal")
    if not isinstance(found, Principal):
        raise RuntimeError(f"{connection.url.path} is public: it has no principal")
    return found


async def _caller(connection: HTTPConnection) -> Actor:  # async: FastAPI calls others in threads
    return principal(connection).actor


Caller = Annotated[Actor, Depends(_caller)]


# --- what an endpoint takes ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Demand:
    """`operator`: it tells of, or acts on, the whole server, so only keys of the default tenant may."""

    role: Role = "admin"
    operator: bool = False
    public: bool = False

    def check(self, who: Principal) -> None:
        """Raise `ForbiddenError` (403) when that is more than the caller is."""
        if RANKS[who.role] < RANKS[self.role]:
            raise ForbiddenError(
                f"this takes the role {self.role}, found {who.role}", hint=f"use a key with the role {self.role}"
            )
        if self.operator and who.tenant not in ("", DEFAULT_TENANT):
            raise ForbiddenError(
                "this concerns all tenants of the server", hint="use a key of the default tenant", code="operator_only"
            )


def needs(role: Role, *, operator: bool = False) -> Callable[[Endpoint], Endpoint]:
    """Mark an endpoint, below its router's decorator, with the least role that may use it."""
    return lambda endpoint: _mark(endpoint, Demand(role, operator))


def public(endpoint: Endpoint) -> Endpoint:
    """Mark an endpoint that takes no key: probes, the page's own files, and what checks a token of its own."""
    return _mark(endpoint, Demand(public=True))


def _mark(endpoint: Endpoint, demand: Demand) -> Endpoint:
    endpoint.demand = demand  # type: ignore[attr-defined]
    return endpoint


def demand_of(endpoint: object) -> Demand:
    found = getattr(endpoint, "demand", None)
    return found if isinstance(found, Demand) else Demand()


# --- who comes in -------------------------------------------------------------------------------------------------


class Access:
    """The door of one server.

    With a catalog that has keys, or with `--api-key`, a request carries one. Without, whoever reaches the server is
    an admin of the default tenant: with a catalog that takes a loopback address, else `ConfigError`; and a browser
    there must come from the server's own page. `run` is how the catalog is asked: a slow caller of other threads
    must not keep everybody at the door.
    """

    def __init__(self, config: ServeConfig, catalog: Catalog | None = None, run: Run = asyncio.to_thread) -> None:
        self._config = config
        self._catalog = catalog
        self._loopback = is_loopback(config.host)
        self._origins = frozenset(map(_checked_origin, config.cors_origins))
        self._limits = None if catalog is None else Limits(catalog.keys, run=run)
        self._revocation = None if catalog is None else Revocation(catalog.keys, run)
        self._run = run
        self._needs_key = config.api_key is not None
        self._look_at = float("-inf")
        if catalog is not None and not self._loopback and not self._needs_key and not catalog.keys.exist():
            home = "" if config.platform is None else f" --home {config.platform.home}"
            raise ConfigError(
                f"--host {config.host} can be reached from elsewhere, and there is no key yet",
                hint=f"make one with `lorikeet keys create{home} --role admin NAME`, or stay on 127.0.0.1",
                param="host",
            )

    async def authorise(self, connection: HTTPConnection) -> None:
        """Let the caller in as `principal`, or raise 401, 403 or 429. This stands before every route."""
        demand = demand_of(connection.scope.get("endpoint"))
        if demand.public:
            return
        who = await self.authenticate(connection)
        if who.meter is not None:
            who.meter.count_request()
        demand.check(who)
        connection.scope.setdefault("state", {})["principal"] = who

    async def authenticate(self, connection: HTTPConnection) -> Principal:
        """Who asks. Raises `WrongKeyError`; `ForeignPageError` where no key is needed and a foreign page asks."""
        given = _bearer(connection)
        if not await self.needs_key():
            if self._loopback:
                self._check_page(connection)
            return Principal(self._local("local"))
        if given is not None and self._is_api_key(given):
            return Principal(self._local("api-key"))
        if given is not None and self._catalog is not None and self._limits is not None:
            found = await self._run(self._catalog.keys.authenticate, given)
            if found is not None:
                actor, key = found
                return Principal(actor, key, await self._limits.meter(key), self._revocation)
        raise WrongKeyError(
            f"this server needs an API key, found {'none' if given is None else 'one that opens nothing'}",
            hint="send Authorization: Bearer <key>",
        )

    async def needs_key(self) -> bool:
        """Once there was a key there is no way back: one that expires must not open the server to everybody."""
        catalog = self._catalog
        if not self._needs_key and catalog is not None and (not self._loopback or time.monotonic() >= self._look_at):
            self._needs_key = not self._loopback or await self._run(_any_key, catalog)
            self._look_at = time.monotonic() + LOOK_SECONDS
        return self._needs_key

    def keys_changed(self) -> None:
        """There may be a first key now, and one that was there may open other things or none."""
        self._look_at = float("-inf")
        if self._revocation is not None:
            self._revocation.changed()

    async def flush(self) -> None:
        """Write what keys used to the catalog now."""
        if self._limits is not None:
            await self._limits.flush()

    async def close(self) -> None:
        if self._revocation is not None:
            await self._revocation.close()
        if self._limits is not None:
            await self._limits.close()

    def _local(self, name: str) -> Actor:
        return Actor(tenant="" if self._catalog is None else DEFAULT_TENANT, name=name)

    def _is_api_key(self, given: str) -> bool:
        key = self._config.api_key
        return key is not None and hmac.compare_digest(given.encode("latin-1"), key.encode())

    def _check_page(self, connection: HTTPConnection) -> None:
        """Against sites that drive a browser at this server: by a name that resolves to it, or by a form or script."""
        host = connection.headers.get("host", "")
        found = _HOST.fullmatch(host.lower())
        name = "" if found is None else found[1].rstrip(".")
        known = (self._config.host.lower(), *map(str.lower, self._config.allowed_hosts))
        if not (is_loopback(name) or name.endswith(".localhost") or name in known):
            raise ForeignPageError(
                f"Host: found {host[:80]!r}; expected localhost, or a name given with --allowed-host",
                hint="use the address the server listens on, start it with --allowed-host, or make a key",
            )
        if connection.scope["type"] == "http" and connection.scope["method"] in _SAFE:
            return
        origin = connection.headers.get("origin")
        if origin is None:
            foreign = connection.headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
        else:
            foreign = origin not in self._origins and origin.partition("://")[2].lower() != host.lower()
        if foreign:
            raise ForeignPageError(
                f"Origin: found {(origin or 'another site')[:80]!r}; expected the server's own, or one given with "
                "--cors-origin",
                hint="start the server with --cors-origin, or make a key",
            )


def is_loopback(host: str) -> bool:
    """Whether a name or address can be reached from this machine alone."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _any_key(catalog: Catalog) -> bool:
    """Whether a key was ever made, whatever became of it."""
    return any(catalog.keys.all(Actor(tenant=one.id)) for one in catalog.people.tenants())


def _bearer(connection: HTTPConnection) -> str | None:
    kind, _, given = connection.headers.get("authorization", "").partition(" ")
    return given.strip() or None if kind.lower() == "bearer" else None


def _checked_origin(origin: str) -> str:
    """Raise `ConfigError` for what no browser sends as an origin, and for `*`."""
    parts = urlsplit(origin)
    if parts.scheme not in ("http", "https") or not parts.netloc or f"{parts.scheme}://{parts.netloc}" != origin:
        raise ConfigError(
            f"--cors-origin: found {origin!r}; expected one such as https://app.example.com, without a path",
            hint="name each origin: * would let every site use this server" if origin == "*" else None,
            param="cors_origin",
        )
    return origin
