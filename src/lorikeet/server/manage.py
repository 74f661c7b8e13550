"""What is served and where it is: `/v1/adapters`, and loading, unloading and pinning by name."""

from __future__ import annotations

from typing import Any, get_args

from fastapi import APIRouter, Request, Response

from lorikeet.errors import InvalidRequestError, NotFoundError
from lorikeet.registry.records import Actor
from lorikeet.server.auth import needs, principal
from lorikeet.server.models import ServedModel
from lorikeet.server.replies import json_reply
from lorikeet.server.state import ServerState
from lorikeet.types import AdapterAction, AdapterStats

Json = dict[str, Any]


def routes(state: ServerState) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/adapters")
    @needs("user")
    async def list_adapters(request: Request) -> Response:
        adapters, refusals = await state.models.listing(principal(request).actor)
        stats = await _stats(state)
        refused = [{"name": one.name, "reason": one.reason} for one in refusals]
        body = {"object": "list", "data": [_describe(state, one, stats) for one in adapters], "refused": refused}
        return json_reply(body)

    @router.get("/v1/adapters/{name}")
    @needs("user")
    async def get_adapter(request: Request, name: str) -> Response:
        model = await _adapter(state, principal(request).actor, name)
        return json_reply(_describe(state, model, await _stats(state)))

    @router.post("/v1/adapters/{name}/{action}")
    @needs("trainer")
    async def manage_adapter(request: Request, name: str, action: str) -> Response:
        """The reply says where the adapter is then: one that is loaded arrives with the engine's next steps."""
        actions: dict[str, AdapterAction] = {one: one for one in get_args(AdapterAction)}
        if action not in actions:
            raise NotFoundError(
                f"there is no POST /v1/adapters/{name}/{action}", hint=f"known are {', '.join(actions)}",
                code="unknown_route",
            )  # fmt: skip
        model = await _adapter(state, principal(request).actor, name)
        assert model.digest is not None
        await state.engine.manage(actions[action], model.digest)
        return json_reply(_describe(state, model, await _stats(state)))

    return router


async def _adapter(state: ServerState, who: Actor, name: str) -> ServedModel:
    if name == state.models.base.name:
        raise InvalidRequestError(f"{name!r} is the base, which is always there", param="name")
    return await state.models.get(name, who)


async def _stats(state: ServerState) -> dict[str, AdapterStats]:
    return {one.digest: one for one in (await state.engine.stats()).adapters}


def _describe(state: ServerState, model: ServedModel, stats: dict[str, AdapterStats]) -> Json:
    """`tier` is where it is nearest: `device`, `loading` there, compiled on `disk`, or only at its `source`."""
    one = None if model.adapter is None else stats.get(model.adapter.digest)
    described: Json = {"object": "adapter", "name": model.name, "locked": model.lock is not None}
    if one is None:
        return described | {"tier": "source"}
    return described | {
        "tier": "device" if one.resident else "loading" if one.loading else "disk",
        "digest": one.digest, "kind": one.kind, "max_rank": one.max_rank, "sites": one.sites, "bytes": one.bytes,
        "hits": one.hits, "last_used": one.last_used or None, "running": one.running, "pinned": one.pinned,
    }  # fmt: skip
