"""`pb.deployments`: the one base that is served, and what its client does: generate, stream, classify.

Below `/{tenant}/deployments/v2/llms/{base}` stand the routes of the LoRAX and OpenAI protocols as they are elsewhere.
"""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.routing import APIRoute
from pydantic import Field

from lorikeet.errors import InvalidRequestError, NotFoundError
from lorikeet.server import lorax, openai
from lorikeet.server.auth import needs, principal
from lorikeet.server.listing import Query
from lorikeet.server.metrics import MEDIA_TYPE
from lorikeet.server.platform import Platform
from lorikeet.server.predibase.classify import classify
from lorikeet.server.replies import json_reply, unless_gone
from lorikeet.server.state import ServerState
from lorikeet.server.validation import Body, EmptyTextOnly, parse, read_body

SERVING = "/{tenant}/deployments/v2/llms/{deployment}"
TYPES = {"private", "dedicated"}  # of which there is one; there are no shared or serverless ones
MAX_TEXTS = 256


class ClassifyBody(Body):
    model: str | None = None
    input: str | Annotated[list[str], Field(min_length=1, max_length=MAX_TEXTS)]
    api_token: EmptyTextOnly = None  # the SDK sends a token for this as its key


def below(path: str) -> str | None:
    """The route of a deployment that a path names: `/v1/completions`, or `/` for the deployment itself; else None."""
    parts = path.split("/", 6)
    if parts[2:5] != ["deployments", "v2", "llms"] or len(parts) < 6:
        return None
    return "/" + (parts[6] if len(parts) > 6 else "")


def routes(state: ServerState, platform: Platform) -> APIRouter:
    router = APIRouter()

    @router.get("/v2/deployments")
    @needs("user")
    async def listing(request: Request) -> Response:
        kind = Query(request, "type").text("type")
        return json_reply({"data": [_described(state)] if kind is None or kind in TYPES else []})

    @router.get("/v2/deployments/recommended-config")
    @needs("user")
    async def recommended() -> Response:
        raise InvalidRequestError(
            "deployments.get_recommended_config is not supported", hint="this server chooses its sizes at the start",
            code="unsupported_call",
        )  # fmt: skip

    @router.get("/v2/deployments/{name}")
    @needs("user")
    async def get(name: str) -> Response:
        _check_name(state, name)
        return json_reply({"data": _described(state)})

    router.include_router(_serving(state, platform))
    return router


def _serving(state: ServerState, platform: Platform) -> APIRouter:
    async def theirs(request: Request, tenant: str, deployment: str) -> None:
        if tenant != principal(request).tenant:
            raise NotFoundError("there is no such tenant", code="tenant_not_found", param="tenant",
                                hint="GET /users/current tells the key's own")  # fmt: skip
        _check_name(state, deployment)

    router = APIRouter(dependencies=[Depends(theirs)])

    @router.post(SERVING + "/classify")
    @needs("user")
    async def classify_texts(request: Request) -> Response:
        body = parse(ClassifyBody, await read_body(request, state.config.max_body))
        texts = [body.input] if isinstance(body.input, str) else body.input
        found = await unless_gone(request, classify(state, platform, principal(request), body.model, texts))
        return json_reply(
            {
                "id": f"classify-{uuid.uuid4().hex}",
                "object": "list",
                "created": int(time.time()),
                "model": body.model,
                "data": [one.described(i) for i, one in enumerate(found)],
            }
        )

    @router.post(SERVING + "/embed")
    @needs("user")
    async def embed() -> Response:
        raise InvalidRequestError(
            "client.embed is not supported: the models here generate text",
            hint="use a server of an embedding model",
            code="unsupported_call",
        )

    @router.get(SERVING + "/metrics")
    @needs("user", operator=True)
    async def metrics(request: Request) -> Response:
        if "application/json" in request.headers.get("accept", ""):
            raise InvalidRequestError(
                "format: found 'json'; expected 'prometheus'",
                hint="client.metrics(format='prometheus')",
                param="format",
            )
        return Response(await state.metrics.page(state.engine), media_type=MEDIA_TYPE)

    for protocol in (lorax.routes(state), openai.routes(state)):
        for route in protocol.routes:
            assert isinstance(route, APIRoute)
            path = SERVING + ("" if route.path == "/" else route.path)  # the SDK posts to the deployment itself
            router.add_api_route(path, route.endpoint, methods=sorted(route.methods or ()))
    return router


def _check_name(state: ServerState, name: str) -> None:
    base = state.models.base.name
    if name not in (base, base.rpartition("/")[2]):  # the SDK takes no name with a slash
        raise NotFoundError(
            f"there is no deployment {name[:80]!r}", hint=f"this server serves {base.rpartition('/')[2]}",
            param="deployment", code="deployment_not_found",
        )  # fmt: skip


def _described(state: ServerState) -> dict[str, Any]:
    info, base = state.engine.info, state.models.base.name
    return {
        "name": base.rpartition("/")[2],
        "uuid": str(uuid.uuid5(uuid.NAMESPACE_URL, f"lorikeet:{base}")),
        "description": "",
        "type": "private",
        "status": "ready" if state.engine.ready else "initializing",
        "model": {"name": base, "maxInputLength": 0 if info is None else info.max_context - 1},
        "accelerator": {"id": "" if info is None else info.device},
        "quantization": None if state.config.engine.quantize == "none" else state.config.engine.quantize,
        "currentReplicas": int(state.engine.ready),
        "config": {"baseModel": base},
        "usesGuaranteedCapacity": False,
    }
