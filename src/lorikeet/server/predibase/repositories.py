"""`pb.repos`, and what `pb.adapters` does with one version: get, archive, delete, download."""

from __future__ import annotations

import time
import zipfile
from collections.abc import Iterator
from typing import Any, cast

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from lorikeet.errors import ConflictError, InvalidRequestError, NotFoundError
from lorikeet.registry.blobs import BlobStore
from lorikeet.registry.catalog import Catalog
from lorikeet.registry.records import Actor, Checkpoint, Job, Manifest, Repository, Version
from lorikeet.registry.references import RegistryReference, parse_reference
from lorikeet.server.auth import needs, principal
from lorikeet.server.listing import Query
from lorikeet.server.platform import Platform
from lorikeet.server.predibase import records
from lorikeet.server.predibase.repeats import REPEAT_SECONDS
from lorikeet.server.replies import json_reply
from lorikeet.server.state import ServerState
from lorikeet.server.validation import Body, parse, read_body

VERSION = "/v2/repos/{repo}/version/{tag}"


class RepositoryBody(Body):
    name: str
    description: str | None = None
    existsOk: bool | None = None


class VersionBody(Body):
    archived: bool


def routes(state: ServerState, platform: Platform) -> APIRouter:
    router = APIRouter()
    catalog = platform.catalog
    base = state.models.base.name

    @router.post("/v2/repos")
    @needs("trainer")
    async def create(request: Request) -> Response:
        body = parse(RepositoryBody, await read_body(request, state.config.max_body))
        made = await platform.run(_create, catalog, principal(request).actor, body)
        return json_reply(records.repository(made, base))

    @router.get("/v2/repos")
    @needs("user")
    async def listing(request: Request) -> Response:
        limit = Query(request, "limit").limit
        page = await platform.run(catalog.repositories.page, principal(request).actor, limit=limit)
        return json_reply({"data": {"repos": [records.repository(one, base) for one in page.items]}})

    @router.get("/v2/repos/{repo}")
    @needs("user")
    async def get(request: Request, repo: str) -> Response:
        found = await platform.run(catalog.repositories.get, principal(request).actor, repo)
        return json_reply(records.repository(found, base))

    @router.delete("/v2/repos/{repo}")
    @needs("trainer")
    async def delete(request: Request, repo: str) -> Response:
        await platform.run(catalog.repositories.delete, principal(request).actor, repo)
        return Response(status_code=204)

    @router.get(VERSION)
    @needs("user")
    async def version(request: Request, repo: str, tag: str) -> Response:
        found, checkpoint, job = await platform.run(find, catalog, principal(request).actor, repo, tag)
        return json_reply(records.adapter(found, job, base, None if checkpoint is None else checkpoint.step))

    @router.put(VERSION)
    @needs("trainer")
    async def archive(request: Request, repo: str, tag: str) -> Response:
        body = parse(VersionBody, await read_body(request, state.config.max_body))
        number = _whole(repo, tag)
        await platform.run(catalog.versions.archive, principal(request).actor, repo, number, body.archived)
        found, _, job = await platform.run(find, catalog, principal(request).actor, repo, tag)
        return json_reply(records.adapter(found, job, base))

    @router.delete(VERSION)
    @needs("trainer")
    async def delete_version(request: Request, repo: str, tag: str) -> Response:
        await platform.run(_delete_version, catalog, principal(request).actor, repo, tag)
        return Response(status_code=204)

    @router.get(VERSION + "/download")
    @needs("user")
    async def download(request: Request, repo: str, tag: str) -> Response:
        manifest = await platform.run_slow(_manifest, platform.blobs, catalog, principal(request).actor, repo, tag)
        name = f"{repo}-{tag}.zip".replace("@", "-step-")
        return StreamingResponse(
            zipped(platform.blobs, manifest), media_type="application/zip",
            headers={"content-disposition": f'attachment; filename="{name}"'},
        )  # fmt: skip

    return router


def _create(catalog: Catalog, who: Actor, body: RepositoryBody) -> Repository:
    """A client that tries again, since it saw no answer, gets what the first try made."""
    description = body.description or ""
    try:
        return catalog.repositories.create(who, body.name, description, exists_ok=bool(body.existsOk))
    except ConflictError as error:
        if error.code != "repository_exists":
            raise
        try:
            there = catalog.repositories.get(who, body.name)
        except NotFoundError:
            raise error from None  # somebody else's, and not for this key
        same = (there.created_by, there.description, there.versions) == (who.name, description, [])
        if not same or time.time() - there.created > REPEAT_SECONDS:
            raise
        return there


def reference_of(repo: str, tag: str) -> RegistryReference:
    """`repo` and `3` or `3@200`. Raises `InvalidRequestError`."""
    return parse_reference(f"{repo}/{tag}", "adapter")


def find(catalog: Catalog, who: Actor, repo: str, tag: str) -> tuple[Version, Checkpoint | None, Job | None]:
    """A version, the checkpoint of it that is meant, and the job that makes or made it. Raises `NotFoundError`."""
    reference = reference_of(repo, tag)
    version = catalog.versions.get(who, repo, cast(int, reference.number))
    checkpoint = None
    if reference.step is not None:
        there = catalog.versions.checkpoints(who, repo, version.number)
        checkpoint = next((one for one in there if one.step == reference.step), None)
        if checkpoint is None:
            steps = ", ".join(str(one.step) for one in there) or "none"
            raise NotFoundError(
                f"there is no checkpoint {reference}",
                hint=f"its checkpoints: {steps}",
                param="adapter",
                code="checkpoint_not_found",
            )
    job = None if version.job_id is None else catalog.jobs.get(who, version.job_id)
    return version, checkpoint, job


def _whole(repo: str, tag: str) -> int:
    """The number of a version that is not one of its checkpoints."""
    reference = reference_of(repo, tag)
    if reference.step is not None:
        raise InvalidRequestError(f"{reference} is a checkpoint; expected a version such as {repo}/3", param="adapter")
    return cast(int, reference.number)


def _delete_version(catalog: Catalog, who: Actor, repo: str, tag: str) -> None:
    reference = reference_of(repo, tag)
    number = cast(int, reference.number)
    if reference.step is None:
        catalog.versions.delete(who, repo, number)
    else:
        catalog.versions.delete_checkpoint(who, repo, number, reference.step)


def _manifest(blobs: BlobStore, catalog: Catalog, who: Actor, repo: str, tag: str) -> Manifest:
    return blobs.manifest(catalog.versions.resolve(who, str(reference_of(repo, tag))).manifest)


# --- a folder as a zip --------------------------------------------------------------------------------------------


class _Outbox:
    """What a zip writer wrote and nobody took yet. It cannot seek, so sizes follow their file."""

    def __init__(self) -> None:
        self._written: list[bytes] = []

    def write(self, data: Any) -> int:
        self._written.append(bytes(data))
        return len(data)

    def flush(self) -> None:
        pass

    def take(self) -> bytes:
        taken = b"".join(self._written)
        self._written.clear()
        return taken


def zipped(blobs: BlobStore, manifest: Manifest) -> Iterator[bytes]:
    """The files of a manifest as a zip, chunk by chunk. They are stored: weights do not get smaller."""
    out = _Outbox()
    with zipfile.ZipFile(cast(Any, out), "w", zipfile.ZIP_STORED) as archive:
        for file in manifest.files:
            with archive.open(zipfile.ZipInfo(file.path), "w", force_zip64=file.bytes >= 2**31) as entry:
                for chunk in blobs.read(file.sha256):
                    entry.write(chunk)
                    yield out.take()
    yield out.take()
