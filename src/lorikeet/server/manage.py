"""What is served and where it is: `/v1/adapters`, and loading, unloading and pinning by name."""

from __future__ import annotations

from typing import Any, get_args

from fastapi import APIRouter, Response

from lorikeet.errors import InvalidRequestError, NotFoundError
from lorikeet.server.models import ServedModel
from lorikeet.server.replies import json_reply
from lorikeet.server.state import ServerState
from lorikeet.types import AdapterAction, AdapterStats

Json = dict[str, Any]


def routes(state: ServerState) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/adapters")
    async def list_adapters() -> Response:
        adapters, refusals = await state.models.listing()
        stats = await _stats(state)
        refused = [{"name": one.name, "reason": one.reason} for one in refusals]
        body = {"object": "list", "data": [_describe(state, one, stats) for one in adapters], "refused": refused}
        return json_reply(body)

    @router.get("/v1/adapters/{name}")
    async def get_adapter(name: str) -> Response:
        return json_reply(_describe(state, await _adapter(state, name), await _stats(state)))

    @router.post("/v1/adapters/{name}/{action}")
    async def manage_adapter(name: str, action: str) -> Response:
        """The reply says where the adapter is then: one that is loaded arrives with the engine's next steps."""
        actions: dict[str, AdapterAction] = {one: one for one in get_args(AdapterAction)}
        if action not in actions:
            raise NotFoundError(
                f"there is no POST /v1/adapters/{name}/{action}", hint=f"known are {', '.join(actions)}",
                code="unknown_route",
            )  # fmt: skip
        model = await _adapter(state, name)
        assert model.digest is not None
        await state.engine.manage(actions[action], model.digest)
        return json_reply(_describe(state, model, await _stats(state)))

    return router


async def _adapter(state: ServerState, name: str) -> ServedModel:
    if name == state.models.base.name:
        raise InvalidRequestError(f"{name!r} is the base, which is always there", param="name")
    return await state.models.get(name)


async def _stats(state: ServerState) -> dict[str, AdapterStats]:
    return {one.digest: one for one in (await state.engine.stats()).adapters}


def _describe(state: ServerState, model: ServedModel, stats: dict[str, AdapterStats]) -> Json:
    """`tier` is where it is nearest: `device`, `loading` there, compiled on `disk`, or only at its `source`."""
    adapter = model.adapter or state.models.compiled(model.name)
    one = None if adapter is None else stats.get(adapter.digest)
    described: Json = {"object": "adapter", "name": model.name, "locked": model.lock is not None}
    if one is None:
        return described | {"tier": "source"}
    return described | {
        "tier": "device" if one.resident else "loading" if one.loading else "disk",
        "digest": one.digest, "kind": one.kind, "max_rank": one.max_rank, "sites": one.sites, "bytes": one.bytes,
        "hits": one.hits, "last_used": one.last_used or None, "running": one.running, "pinned": one.pinned,
    }  # fmt: skip
