"""Every way into an application, and callers of all kinds to try them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from fastapi import FastAPI
from starlette.routing import Mount

from lorikeet.registry.catalog import Catalog
from lorikeet.registry.records import Actor, Key
from lorikeet.server.app import create_app
from lorikeet.server.state import ServerState

PARAMETER = re.compile(r"\{(\w+)(?::\w+)?\}")


@dataclass(frozen=True)
class Door:
    """One method of one route; `WS` is a WebSocket."""

    method: str
    path: str
    endpoint: Any

    @property
    def name(self) -> str:
        return f"{self.method} {self.path}"

    @property
    def parameters(self) -> list[str]:
        return PARAMETER.findall(self.path)

    def filled(self, **values: str) -> str:
        """Its path, with `x` for what `values` does not name."""
        return PARAMETER.sub(lambda found: values.get(found[1], "x"), self.path)


def doors(state: ServerState) -> list[Door]:
    """Of an application as this server's own: those of routers in routers, too."""
    app = create_app(replace(state))
    return sorted(_walk(app), key=lambda door: door.name)


def _walk(app: FastAPI) -> Iterator[Door]:
    waiting: list[tuple[str, Any]] = [("", route) for route in app.router.routes]
    while waiting:
        prefix, route = waiting.pop()
        inner = getattr(route, "original_router", None)  # routers are kept as one route by newer versions of FastAPI
        if inner is not None:
            deeper = prefix + route.include_context.prefix
            waiting += [(deeper, one) for one in inner.routes]
            continue
        assert not isinstance(route, Mount), f"{route.path} is mounted, so nothing stands before it"
        path, endpoint = prefix + route.path, route.endpoint
        methods = getattr(route, "methods", None) or {"WS"}
        yield from (Door(method, path, endpoint) for method in methods - {"HEAD"})


@dataclass(frozen=True)
class Caller:
    """A key that opens something, or did."""

    key: Key
    secret: str

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.secret}"}


def caller(catalog: Catalog, name: str, role: Any = "user", tenant: str | None = None, **more: Any) -> Caller:
    """A fresh key; `tenant` is an id."""
    who = Actor(name="test") if tenant is None else Actor(tenant=tenant, name="test")
    return Caller(*catalog.keys.create(who, name, role, **more))
