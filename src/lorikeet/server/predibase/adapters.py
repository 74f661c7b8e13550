"""`pb.adapters.upload`: a PEFT folder becomes the next version of a repository."""

from __future__ import annotations

import tempfile
from pathlib import Path

from fastapi import APIRouter, Request, Response

from lorikeet.errors import InvalidRequestError
from lorikeet.registry.records import Actor, Upload, Version
from lorikeet.server.auth import needs, principal
from lorikeet.server.platform import Platform
from lorikeet.server.predibase import records, uploads
from lorikeet.server.replies import json_reply
from lorikeet.server.state import ServerState
from lorikeet.server.validation import Body, Unsupported, parse, read_body

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
FILES = (CONFIG, PICKLE, WEIGHTS)  # the SDK wants an address for each


class BeginBody(Body):
    repo: str
    region: Unsupported = None


class CompleteBody(Body):
    uploadToken: str


def routes(state: ServerState, platform: Platform) -> APIRouter:
    router = APIRouter()
    base = state.models.base.name

    @router.post("/v2/adapters/upload")
    @needs("trainer")
    async def begin(request: Request) -> Response:
        who = principal(request).actor
        body = parse(BeginBody, await read_body(request, state.config.max_body))
        await platform.run(platform.catalog.repositories.get, who, body.repo)
        token, addresses = await uploads.begin(request, platform, who, "adapter", FILES, {"repo": body.repo})
        return json_reply({"presignedUrls": addresses, "uploadToken": token, "requiredHeaders": {}})

    @router.put("/v2/adapters/upload")
    @router.put("/v2/adapters/upload/")
    @needs("trainer")
    async def complete(request: Request) -> Response:
        who = principal(request).actor
        body = parse(CompleteBody, await read_body(request, state.config.max_body))
        upload = await uploads.find(platform, who, "adapter", body.uploadToken)
        if upload.result is None:
            version = await _add(state, platform, who, upload)
            await platform.run(platform.catalog.uploads.complete, who, upload.id, version.id)
        else:
            version = await platform.run(platform.catalog.versions.by_id, who, upload.result)
        return json_reply(records.adapter(version, None, base))

    return router


async def _add(state: ServerState, platform: Platform, who: Actor, upload: Upload) -> Version:
    """Checked by the engine before it is a version. Raises `AdapterError` and the like with what does not fit."""
    if WEIGHTS not in upload.files:
        found = f"only {PICKLE}, a pickle, which can run any code when it is read" if PICKLE in upload.files else "none"
        raise InvalidRequestError(
            f"expected {WEIGHTS}, found {found}", hint="save the adapter with safe_serialization=True", param=WEIGHTS
        )
    with tempfile.TemporaryDirectory(dir=platform.blobs.staging, prefix="adapter-") as place:
        folder = Path(place)
        for name in (CONFIG, WEIGHTS):
            await platform.run_slow(uploads.bring, platform.blobs, upload, name, folder)
        checked = await state.engine.resolve(folder)
        return await platform.run_slow(
            platform.home.add_adapter, who, upload.spec["repo"], folder, digest=checked.digest, source="upload",
            idempotency_key=upload.id,
        )  # fmt: skip
