"""`/api/me`, `/api/keys`, `/api/users`, `/api/tenants`, `/api/audit`: who may use the server, and who changed what.

Admins manage their own tenant. An admin of the default tenant, which operates the server, may name another one with
`?tenant=`. A key confined to some repositories manages nobody, so that it cannot make one that is not.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field

from lorikeet.errors import ConflictError, ForbiddenError, InvalidRequestError, UnsupportedFieldError
from lorikeet.registry.catalog import Catalog
from lorikeet.registry.records import DEFAULT_TENANT, Actor, Key, KeyChange, Usage
from lorikeet.server.auth import needs, principal
from lorikeet.server.listing import Query, page_reply, plain
from lorikeet.server.platform import Platform
from lorikeet.server.replies import json_reply
from lorikeet.server.state import ServerState
from lorikeet.server.validation import Body, shown

Json = dict[str, Any]
RoleName = Literal["admin", "trainer", "user"]
NO_STORE = {"cache-control": "no-store"}  # of answers that hold a key


class KeyBody(Body):
    """`repositories` None: all of the tenant's. `expires` in seconds since the epoch, `expires_in` in seconds."""

    name: str
    role: RoleName = "user"
    user: str | None = None
    repositories: list[str] | None = None
    expires: float | None = None
    expires_in: Annotated[float, Field(gt=0)] | None = None
    requests_per_minute: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    tokens_per_day: Annotated[int, Field(ge=1, lt=2**53)] | None = None

    def expiry(self) -> float | None:
        if self.expires_in is None:
            return self.expires
        if self.expires is not None:
            raise InvalidRequestError("expires: expected one of expires and expires_in, found both", param="expires")
        return time.time() + self.expires_in


class KeyChangeBody(Body):
    """What is left out stays. None: all repositories, no limit."""

    role: RoleName = "user"
    repositories: list[str] | None = None
    requests_per_minute: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    tokens_per_day: Annotated[int, Field(ge=1, lt=2**53)] | None = None

    def change(self) -> KeyChange:
        """Raises `UnsupportedFieldError` for a body that asks for nothing."""
        if not self.model_fields_set:
            fields = ", ".join(type(self).model_fields)
            raise UnsupportedFieldError(f"nothing to change: expected some of {fields}", code="invalid_value")
        return KeyChange(**{name: getattr(self, name) for name in self.model_fields_set})


class UserBody(Body):
    name: str
    role: RoleName = "user"
    email: Annotated[str, Field(max_length=254, pattern=r"^[^\s@]+@[^\s@]+$")] | None = None


class UserChangeBody(Body):
    disabled: bool


class TenantBody(Body):
    name: str


def routes(state: ServerState, platform: Platform) -> APIRouter:
    router = APIRouter()
    router.include_router(_me(state, platform))
    router.include_router(_keys(state, platform))
    router.include_router(_people(state, platform))
    return router


def _me(state: ServerState, platform: Platform) -> APIRouter:
    router, catalog = APIRouter(), platform.catalog

    @router.get("/api/me")
    @needs("user")
    async def me(request: Request) -> Response:
        """The caller; what its key used today is of a second ago."""
        caller = principal(request)
        tenant = await platform.run(catalog.people.tenant, caller.tenant)
        key = None if caller.key is None else await platform.run(_described, catalog, caller.actor, caller.key)
        body = {
            "tenant": tenant.name, "role": caller.role, "name": caller.actor.name, "key": key,
            "operator": caller.role == "admin" and caller.tenant == DEFAULT_TENANT,
            "needs_key": await state.access.needs_key(),
        }  # fmt: skip
        return json_reply(body)

    return router


def _keys(state: ServerState, platform: Platform) -> APIRouter:
    router, catalog = APIRouter(), platform.catalog

    @router.get("/api/keys")
    @needs("admin")
    async def list_keys(request: Request) -> Response:
        who = await _manager(request, platform)
        return _page(await platform.run(_all_described, catalog, who))

    @router.post("/api/keys")
    @needs("admin")
    async def create_key(request: Request) -> Response:
        """The only answer that ever holds the key itself, as `secret`."""
        who = await _manager(request, platform)
        body = await state.body(request, KeyBody)
        await _check_first(state, body)
        key, secret = await platform.run(
            catalog.keys.create, who, body.name, body.role, user=body.user, repositories=body.repositories,
            expires=body.expiry(), requests_per_minute=body.requests_per_minute, tokens_per_day=body.tokens_per_day,
        )  # fmt: skip
        state.access.keys_changed()
        described = await platform.run(_described, catalog, who, key)
        return json_reply(described | {"secret": secret}, 201, NO_STORE)

    @router.patch("/api/keys/{key_id}")
    @needs("admin")
    async def change_key(request: Request, key_id: str) -> Response:
        who = await _manager(request, platform)
        body = await state.body(request, KeyChangeBody)
        key = await platform.run(catalog.keys.alter, who, key_id, body.change())
        state.access.keys_changed()
        return json_reply(await platform.run(_described, catalog, who, key))

    @router.delete("/api/keys/{key_id}")
    @needs("admin")
    async def revoke(request: Request, key_id: str) -> Response:
        who = await _manager(request, platform)
        key = await platform.run(catalog.keys.revoke, who, key_id)
        state.access.keys_changed()
        return json_reply(await platform.run(_described, catalog, who, key))

    return router


def _people(state: ServerState, platform: Platform) -> APIRouter:
    router, catalog = APIRouter(), platform.catalog

    @router.get("/api/users")
    @needs("admin")
    async def list_users(request: Request) -> Response:
        return _page(await platform.run(catalog.people.users, await _manager(request, platform)))

    @router.post("/api/users")
    @needs("admin")
    async def create_user(request: Request) -> Response:
        who = await _manager(request, platform)
        body = await state.body(request, UserBody)
        user = await platform.run(catalog.people.create_user, who, body.name, body.role, body.email)
        return json_reply(user, 201)

    @router.patch("/api/users/{name}")
    @needs("admin")
    async def change_user(request: Request, name: str) -> Response:
        """The keys of a disabled user open nothing."""
        who = await _manager(request, platform)
        body = await state.body(request, UserChangeBody)
        user = await platform.run(catalog.people.disable_user, who, name, body.disabled)
        state.access.keys_changed()
        return json_reply(user)

    @router.get("/api/tenants")
    @needs("admin", operator=True)
    async def list_tenants(request: Request) -> Response:
        await _manager(request, platform)
        return _page(await platform.run(catalog.people.tenants))

    @router.post("/api/tenants")
    @needs("admin", operator=True)
    async def create_tenant(request: Request) -> Response:
        who = await _manager(request, platform)
        body = await state.body(request, TenantBody)
        return json_reply(await platform.run(catalog.people.create_tenant, who, body.name), 201)

    @router.get("/api/audit")
    @needs("admin")
    async def audit(request: Request) -> Response:
        """Changes, newest first: `?subject_id=`, `?action=` such as `key.create`, `?after=` a page's `next`."""
        known = ("subject_id", "action", "after", "limit")
        who = await _manager(request, platform, *known)
        asked = Query(request, "tenant", *known)
        page = await platform.run(
            catalog.audit.page, who, subject_id=asked.text("subject_id"), action=asked.text("action"),
            before=asked.number("after", 0) or None, limit=asked.limit,
        )  # fmt: skip
        return page_reply(page)

    return router


async def _manager(request: Request, platform: Platform, *known: str) -> Actor:
    """On whose behalf people and keys are managed. Raises `ForbiddenError`, or `NotFoundError` for a tenant."""
    who = principal(request).actor
    if who.repositories is not None:
        raise ForbiddenError(
            "this key is confined to some repositories", hint="use an admin key without grants", code="confined_key"
        )
    named = Query(request, "tenant", *known).text("tenant")
    if named is None:
        return who
    if who.tenant != DEFAULT_TENANT:
        raise ForbiddenError(
            f"tenant: found {shown(named)}; this key manages its own tenant", hint="leave it out", param="tenant"
        )
    tenant = await platform.run(platform.catalog.people.tenant, named)
    return who if tenant.id == who.tenant else replace(who, tenant=tenant.id, name=f"{who.name}@default")


async def _check_first(state: ServerState, body: KeyBody) -> None:
    """Raise for a key that would lock everybody out."""
    if body.role != "admin" and not await state.access.needs_key():
        raise ConflictError(
            f"role: found {body.role!r}; the first key must be an admin's, since every request needs one from then on",
            hint="make an admin key first",
            param="role",
        )


def _described(catalog: Catalog, who: Actor, key: Key) -> Json:
    """A key with what it may use (`repositories`, None: all) and what it used today."""
    used: list[Usage] = catalog.keys.usage(key.id)
    today = used[0] if used else None
    return plain(key) | {
        "repositories": catalog.keys.grants(who, key.id),
        "today": {"requests": today.requests if today else 0, "tokens": today.tokens if today else 0},
    }


def _all_described(catalog: Catalog, who: Actor) -> list[Json]:
    return [_described(catalog, who, key) for key in catalog.keys.all(who)]


def _page(items: Sequence[Any]) -> Response:
    return json_reply({"items": items, "next": None})
