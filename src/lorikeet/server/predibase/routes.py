"""The protocol of the `predibase` SDK over this server's catalog, blobs, jobs and engine."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from lorikeet.errors import InvalidRequestError, LorikeetError
from lorikeet.server import lorax, openai
from lorikeet.server.auth import needs, principal
from lorikeet.server.platform import Platform
from lorikeet.server.predibase import adapters, datasets, deployments, finetuning, repositories, uploads
from lorikeet.server.replies import json_reply
from lorikeet.server.state import ServerState

Json = dict[str, Any]
_OWN = re.compile(r"/(v2/.*|v1/datasets/.*|users/current)")
# Calls of the SDK that mean nothing on one server with one base, and what to do instead.
REFUSED = {
    ("POST", "/v2/deployments"): ("deployments.create", "this server serves one base, chosen by `lorikeet up --model`"),
    ("PUT", "/v2/deployments/{name}"): ("deployments.update", "restart `lorikeet up` with other flags"),
    ("DELETE", "/v2/deployments/{name}"): ("deployments.delete", "stop `lorikeet up`"),
    ("GET", "/v2/deployments/{name}/request-logs"): ("deployments.download_request_logs", "requests are not logged"),
    ("PUT", "/v2/finetuning/jobs/{job}/config"): ("jobs.update", "cancel the job and start another"),
    ("GET", "/v2/finetuning/jobs/{job}/tensorboard_logs"): ("show_tensorboard", "see the page, or `jobs.watch`"),
    ("POST", "/v2/finetuning/jobs/estimate_cost"): ("adapters.estimate_finetuning_cost", "nothing is billed here"),
    ("POST", "/v2/datasets/{dataset}/augment"): ("datasets.augment", "make the rows first, then upload them"),
    ("GET", "/v2/datasets/{dataset}/download-link"): ("datasets.download", "use `lorikeet datasets export`"),
}
REFUSED_FAMILIES = {"secrets": "secrets", "gateways": "gateways", "batch-inference": "beta.batch_inference"}


def error_shape(path: str) -> Callable[[LorikeetError], Json] | None:
    """How an error is told on this path; None where the path is none of this protocol's."""
    within = deployments.below(path)
    if within is not None:
        return lorax.error_body if within in (*lorax.PATHS, "/classify", "/embed", "/metrics") else openai.error_body
    return partial(error_body, path=path) if _OWN.fullmatch(path) is not None else None


def error_body(error: LorikeetError, path: str) -> Json:
    """`error` is what the SDK shows: words, except for what it downloads, where it wants an object."""
    words = str(error)
    shown: Any = {"message": words} if path.endswith(("/download", "/request-logs")) else words
    return {"error": shown, "code": error.code, "param": error.param, "retryable": error.retryable}


def routes(state: ServerState, platform: Platform) -> APIRouter:
    router = APIRouter()

    @router.get("/users/current")
    @needs("user")
    async def current(request: Request) -> Response:
        who = principal(request).actor
        tenant = {"name": who.tenant, "shortCode": who.tenant, "subscription": None}
        return json_reply({"id": 0, "username": who.name, "uuid": who.user_id or who.key_id or who.tenant,
                           "tenant": tenant})  # fmt: skip

    for part in (repositories, adapters, uploads, datasets, finetuning, deployments):
        router.include_router(part.routes(state, platform))
    for (method, path), (call, instead) in REFUSED.items():
        _refuse(router, method, path, call, instead)
    for family, call in REFUSED_FAMILIES.items():
        for path in (f"/v2/{family}", f"/v2/{family}/{{rest:path}}"):
            for method in ("GET", "POST", "PUT", "DELETE"):
                _refuse(router, method, path, f"pb.{call}", "there is no such thing on this server")
    return router


def _refuse(router: APIRouter, method: str, path: str, call: str, instead: str) -> None:
    @needs("user")
    async def refuse(request: Request) -> Response:
        raise InvalidRequestError(f"{call} is not supported", hint=instead, code="unsupported_call")

    router.add_api_route(path, refuse, methods=[method])
