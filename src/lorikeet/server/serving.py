"""`/api/serving`: what the engine does at this moment, once or every second, for the page and for whoever looks on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request, Response

from lorikeet.errors import LorikeetError, NotFoundError
from lorikeet.registry.records import DEFAULT_TENANT, Actor
from lorikeet.server.auth import Principal, needs, principal
from lorikeet.server.recent import Use
from lorikeet.server.replies import EventStreamResponse, event, json_reply, last_word
from lorikeet.server.state import ServerState
from lorikeet.types import AdapterStats, EngineStats

Json = dict[str, Any]

PERIOD = 1.0  # seconds
LISTED = 200  # adapters, those used last


def routes(state: ServerState) -> APIRouter:
    router = APIRouter()

    @router.get("/api/serving")
    @needs("user")
    async def serving(request: Request) -> Response:
        """`history` is tokens per second of the last ten minutes."""
        return json_reply(await _picture(state, principal(request).actor, history=True))

    @router.get("/api/serving/stream")
    @needs("user")
    async def stream(request: Request) -> Response:
        """The same as server-sent events; the first alone has `history`."""
        return EventStreamResponse(_events(state, principal(request)))

    return router


async def _events(state: ServerState, caller: Principal) -> AsyncGenerator[bytes]:
    history, revoked = True, list[LorikeetError]()
    with caller.ending(revoked.append):
        while state.engine.alive and not revoked:
            yield event(await _picture(state, caller.actor, history=history))
            history = False
            await asyncio.sleep(PERIOD)
    for error in revoked:
        yield event(last_word(error))


async def _picture(state: ServerState, who: Actor, *, history: bool) -> Json:
    stats = await _stats(state)
    recent = state.metrics.recent
    first, between = recent.first_percentiles(0.5, 0.95), recent.between_percentiles(0.5, 0.95)
    now: Json = {
        "engine_ready": stats is not None,
        "requests_running": None if stats is None else stats.running,
        "requests_waiting": None if stats is None else stats.waiting,
        "tokens_per_second": recent.tokens_per_second(),
        "ttft": dict(zip(("p50", "p95"), first, strict=True)),
        "itl": dict(zip(("p50", "p95"), between, strict=True)),
        "kv_used": None if stats is None or not stats.blocks_total else 1 - stats.blocks_free / stats.blocks_total,
        "adapters": await _adapters(state, who, stats),
    }
    body: Json = {"t": time.time(), "now": now}
    if history:
        body["history"] = [{"t": second, "tokens_per_second": tokens} for second, tokens in recent.history()]
    return body


async def _stats(state: ServerState) -> EngineStats | None:
    """None while the engine starts anew."""
    try:
        return await state.engine.stats()
    except LorikeetError:
        return None


async def _adapters(state: ServerState, who: Actor, stats: EngineStats | None) -> list[Json]:
    """Adapters that the caller's tenant asked for; names that this caller may not use are left out."""
    known = {} if stats is None else {one.digest: one for one in stats.adapters}
    found: list[Json] = []
    for use in state.metrics.recent.uses:
        if len(found) == LISTED:
            break
        if use.digest is not None and _same_tenant(use.tenant, who.tenant) and await _may_use(state, who, use.name):
            found.append(_describe(use, known.get(use.digest)))
    return found


def _same_tenant(one: str, other: str) -> bool:
    return (one or DEFAULT_TENANT) == (other or DEFAULT_TENANT)


async def _may_use(state: ServerState, who: Actor, name: str) -> bool:
    """Asked for keys that are confined to some repositories; the tenant's others may use all of its names."""
    if who.repositories is None or state.models.registry is None:
        return True
    try:
        await state.models.registry.find(who, name)
    except NotFoundError:
        return False
    except LorikeetError:
        return True
    return True


def _describe(use: Use, stats: AdapterStats | None) -> Json:
    tier = "source" if stats is None else "device" if stats.resident else "loading" if stats.loading else "disk"
    return {
        "name": use.name,
        "tier": tier,
        "bytes": None if stats is None else stats.bytes,
        "rank": None if stats is None else stats.max_rank,
        "kind": None if stats is None else stats.kind,
        "hits": use.requests,
        "running": use.running,
        "waiting": use.waiting,
        "last_used": use.last_used,
    }
