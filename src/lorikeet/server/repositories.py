"""`/api/repos`: repositories of adapters, their versions and aliases; bytes in and out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import msgspec
from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import Field

from lorikeet.adapters.files import WEIGHTS, AdapterFile
from lorikeet.adapters.merge import merge_folders
from lorikeet.errors import NotFoundError, UnsupportedFieldError
from lorikeet.registry.difference import compare
from lorikeet.registry.home import TAKEN
from lorikeet.registry.records import Actor, Repository, Version, VersionContent
from lorikeet.server.auth import Caller, needs
from lorikeet.server.forms import copy_to, fields_of, files_of, is_form, read_form, staged
from lorikeet.server.listing import Query, page_reply, plain
from lorikeet.server.platform import Platform
from lorikeet.server.replies import json_reply
from lorikeet.server.state import ServerState
from lorikeet.server.validation import ApiToken, Body, IdempotencyKey, shown
from lorikeet.types import MergeMethod, MergeSpec, SignMethod

Json = dict[str, Any]
MAX_SMALL = 32 * 2**20  # bytes of every file but the weights
Text = Annotated[str, Field(max_length=4000)]
Number = Annotated[int, Field(ge=1, lt=2**31)]


class RepoBody(Body):
    name: str
    description: Text = ""
    exists_ok: bool = False


class DescriptionBody(Body):
    description: Text


class VersionChangeBody(Body):
    archived: bool


class AliasBody(Body):
    """`expected`: only if the alias is that version now; 0: only if there is none."""

    version: Number
    expected: Annotated[int, Field(ge=0, lt=2**31)] | None = None


class MergeBody(Body):
    """`adapters` are references. What the fields mean stands in `types.MergeSpec`."""

    adapters: Annotated[list[str], Field(min_length=2, max_length=32)]
    weights: list[float]
    method: MergeMethod = "linear"
    density: Annotated[float, Field(ge=0, le=1)] | None = None
    majority_sign_method: SignMethod | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    svd_rank: Annotated[int, Field(ge=1)] | None = None

    def spec(self) -> MergeSpec:
        fields = self.model_dump()
        return MergeSpec(**fields | {"adapters": tuple(self.adapters), "weights": tuple(self.weights)})


class VersionBody(Body):
    merge: MergeBody | None = None
    source: str | None = None
    api_token: ApiToken = None
    description: Text = ""


def routes(state: ServerState, platform: Platform) -> APIRouter:
    router = APIRouter()
    repositories = platform.catalog.repositories

    @router.get("/api/repos")
    @needs("user")
    async def list_repos(request: Request, who: Caller) -> Response:
        query = Query(request, "limit", "after", "contains")
        after, contains = query.text("after"), query.text("contains")
        page = await platform.run(repositories.page, who, after=after, limit=query.limit, contains=contains)
        return page_reply(page, [_repository(one) for one in page.items])

    @router.post("/api/repos")
    @needs("trainer")
    async def create_repo(request: Request, who: Caller, key: IdempotencyKey) -> Response:
        body = await state.body(request, RepoBody)
        made = await platform.run(
            repositories.create, who, body.name, body.description, exists_ok=body.exists_ok, idempotency_key=key
        )
        return json_reply(_repository(made), 201)

    @router.get("/api/repos/{repo}")
    @needs("user")
    async def get_repo(who: Caller, repo: str) -> Response:
        """With its versions, newest first, and where each is now."""
        found = await platform.run(repositories.get, who, repo)
        versions = await _all_versions(platform, who, repo)
        where = await _places(state)
        told = [_version(one) | {"where": _where(one, where)} for one in versions]
        return json_reply(_repository(found) | {"versions": told})

    @router.patch("/api/repos/{repo}")
    @needs("trainer")
    async def describe_repo(request: Request, who: Caller, repo: str) -> Response:
        body = await state.body(request, DescriptionBody)
        return json_reply(_repository(await platform.run(repositories.describe, who, repo, body.description)))

    @router.delete("/api/repos/{repo}")
    @needs("trainer")
    async def delete_repo(who: Caller, repo: str) -> Response:
        await platform.run(repositories.delete, who, repo)
        return Response(status_code=204)

    _add_versions(router, state, platform)
    _add_files(router, state, platform)
    _add_aliases(router, state, platform)
    return router


# --- versions -----------------------------------------------------------------------------------------------------

PAGE = 1000  # versions that the catalog is asked for at a time


async def _all_versions(platform: Platform, who: Actor, repo: str) -> list[Version]:
    """Newest first."""
    found: list[Version] = []
    before: int | None = None
    while True:
        page = await platform.run(platform.catalog.versions.page, who, repo, before=before, limit=PAGE)
        found += page.items
        if page.next is None:
            return found
        before = int(page.next)


def _add_versions(router: APIRouter, state: ServerState, platform: Platform) -> None:
    versions = platform.catalog.versions

    @router.get("/api/repos/{repo}/versions/{number}")
    @needs("user")
    async def get_version(who: Caller, repo: str, number: int) -> Response:
        told = await platform.run(_whole_version, platform, who, repo, number)
        found = await platform.run(versions.get, who, repo, number)
        return json_reply(told | {"where": _where(found, await _places(state))})

    @router.patch("/api/repos/{repo}/versions/{number}")
    @needs("trainer")
    async def change_version(request: Request, who: Caller, repo: str, number: int) -> Response:
        body = await state.body(request, VersionChangeBody)
        return json_reply(_version(await platform.run(versions.archive, who, repo, number, body.archived)))

    @router.delete("/api/repos/{repo}/versions/{number}")
    @needs("trainer")
    async def delete_version(who: Caller, repo: str, number: int) -> Response:
        await platform.run(versions.delete, who, repo, number)
        return Response(status_code=204)

    @router.get("/api/repos/{repo}/versions/{number}/diff/{other}")
    @needs("user")
    async def compare_versions(who: Caller, repo: str, number: int, other: int) -> Response:
        found = await platform.run_slow(compare, platform.home, who, f"{repo}/{number}", f"{repo}/{other}")
        return json_reply(plain(found))

    @router.post("/api/repos/{repo}/versions")
    @needs("trainer")
    async def create_version(request: Request, who: Caller, repo: str, key: IdempotencyKey) -> Response:
        """A PEFT folder's files as a form, or `{"merge": {...}}`, or `{"source": "hf://..."}`."""
        await platform.run(platform.catalog.repositories.get, who, repo)  # before anything is uploaded
        if is_form(request):
            async with read_form(request, platform.config.max_upload) as form:
                description = fields_of(form, "description").get("description", "")
                with staged(platform.blobs.staging, "adapter-") as folder:
                    await platform.run_slow(_take_files, files_of(form), folder)
                    content = await _checked(state, platform, folder, "upload")
        else:
            body = await state.body(request, VersionBody)
            description, content = body.description, await _made(state, platform, who, body)
        made = await platform.run(versions.add, who, repo, content, description=description, idempotency_key=key)
        return json_reply(_version(made), 201)


async def _made(state: ServerState, platform: Platform, who: Actor, body: VersionBody) -> VersionContent:
    """What is not uploaded: a merge of adapters that are here, or an adapter from elsewhere."""
    if (body.merge is None) == (body.source is None):
        found = "both" if body.merge is not None else "neither"
        raise UnsupportedFieldError(
            f"expected a form with files, or one of 'merge' and 'source', found {found}", param="source",
            code="invalid_value",
        )  # fmt: skip
    if body.source is not None:
        if "://" not in body.source:
            raise UnsupportedFieldError(
                f"'source': expected a place such as hf://org/name, found {shown(body.source)}", param="source",
                code="invalid_value",
            )  # fmt: skip
        model = await state.models.get(body.source, who, token=body.api_token)
        assert model.folder is not None
        return await platform.run_slow(
            platform.home.read_adapter, model.folder, digest=model.digest, source=body.source
        )
    assert body.merge is not None
    if body.api_token is not None:
        raise UnsupportedFieldError("'api_token': only with 'source'", param="api_token", code="invalid_value")
    spec = body.merge.spec()
    with staged(platform.blobs.staging, "merge-") as place:
        exact = await platform.run_slow(_merge, platform, who, spec, place / "merged")
        content = await _checked(state, platform, place / "merged", "merge")
    recipe = {"merge": body.merge.model_dump(exclude_none=True) | {"adapters": exact}}
    return msgspec.structs.replace(content, recipe=recipe)


def _merge(platform: Platform, who: Actor, spec: MergeSpec, output: Path) -> list[str]:
    """The exact references of what was merged."""
    parts = [platform.home.adapter_folder(who, reference) for reference in spec.adapters]
    merge_folders(spec, [folder for _, folder in parts], output)
    return [resolved.reference for resolved, _ in parts]


async def _checked(state: ServerState, platform: Platform, folder: Path, source: str) -> VersionContent:
    """The loader process reads every tensor, for this base; then the files are put. Raises `AdapterError`."""
    adapter = await state.engine.resolve(folder)
    return await platform.run_slow(platform.home.read_adapter, folder, digest=adapter.digest, source=source)


def _take_files(uploads: list[tuple[str, Any]], folder: Path) -> None:
    """The files of an adapter by their names, the header of its weights checked against their bytes."""
    for field, upload in uploads:
        name = upload.filename or ""
        if name not in TAKEN:
            raise UnsupportedFieldError(
                f"'{field[:80]}': found the file {shown(name)}; an adapter has {', '.join(TAKEN)}", param=field[:80],
                hint="send each file under its own name; archives are not unpacked", code="invalid_value",
            )  # fmt: skip
        if name != WEIGHTS and (upload.size or 0) > MAX_SMALL:
            raise UnsupportedFieldError(
                f"{name}: {upload.size} bytes, expected at most {MAX_SMALL}", param=name, code="invalid_value"
            )
        if (folder / name).exists():
            raise UnsupportedFieldError(f"{name} stands twice", param=name, code="invalid_value")
        copy_to(upload, folder / name)
    AdapterFile(folder).__exit__(None, None, None)


# --- bytes --------------------------------------------------------------------------------------------------------


def _add_files(router: APIRouter, state: ServerState, platform: Platform) -> None:
    @router.get("/api/repos/{repo}/versions/{number}/files/{path:path}")
    @needs("user")
    async def get_file(request: Request, who: Caller, repo: str, number: int, path: str) -> Response:
        """A file of a version, verified on its way; `Range: bytes=N-` goes on with an earlier download."""
        sha256, size = await platform.run_slow(_find_file, platform, who, f"{repo}/{number}", path)
        start = _start_of(request.headers.get("range"), size)
        headers = {
            "content-length": str(size - start), "etag": f'"{sha256}"', "accept-ranges": "bytes",
            "content-disposition": f"attachment; filename*=UTF-8''{quote(path.rsplit('/', 1)[-1])}",
            "x-content-type-options": "nosniff", "cache-control": "private, max-age=31536000, immutable",
        }  # fmt: skip
        if start:
            headers["content-range"] = f"bytes {start}-{size - 1}/{size}"
        chunks: Iterator[bytes] = platform.blobs.read(sha256, start)
        return StreamingResponse(chunks, 206 if start else 200, headers, media_type="application/octet-stream")


def _find_file(platform: Platform, who: Actor, reference: str, path: str) -> tuple[str, int]:
    resolved = platform.catalog.versions.resolve(who, reference)
    manifest = platform.blobs.manifest(resolved.manifest)
    for one in manifest.files:
        if one.path == path:
            return one.sha256, one.bytes
    raise NotFoundError(
        f"{reference} has no file {shown(path)}", hint=f"it has {', '.join(one.path for one in manifest.files)}",
        code="file_not_found", param="path",
    )  # fmt: skip


def _start_of(header: str | None, size: int) -> int:
    """Of `bytes=N-`; a range of another form is left aside, as HTTP allows."""
    if header is None or not header.startswith("bytes=") or not header.endswith("-"):
        return 0
    start = header.removeprefix("bytes=").removesuffix("-")
    return int(start) if start.isascii() and start.isdecimal() and len(start) < 18 and int(start) < size else 0


# --- aliases ------------------------------------------------------------------------------------------------------


def _add_aliases(router: APIRouter, state: ServerState, platform: Platform) -> None:
    aliases = platform.catalog.aliases

    @router.put("/api/repos/{repo}/aliases/{alias}")
    @needs("trainer")
    async def move_alias(request: Request, who: Caller, repo: str, alias: str) -> Response:
        """It takes effect with the next request."""
        body = await state.body(request, AliasBody)
        moved = await platform.run(aliases.move, who, repo, alias, body.version, expected=body.expected)
        return json_reply(plain(moved))

    @router.delete("/api/repos/{repo}/aliases/{alias}")
    @needs("trainer")
    async def remove_alias(who: Caller, repo: str, alias: str) -> Response:
        await platform.run(aliases.remove, who, repo, alias)
        return Response(status_code=204)

    @router.get("/api/repos/{repo}/aliases/{alias}/history")
    @needs("user")
    async def alias_history(who: Caller, repo: str, alias: str) -> Response:
        found = await platform.run(aliases.history, who, repo, alias)
        return json_reply({"items": [plain(one) for one in found], "next": None})


# --- as the API shows them ----------------------------------------------------------------------------------------


def _repository(found: Repository) -> Json:
    """Versions newest first."""
    return plain(found) | {"versions": [plain(one) for one in reversed(found.versions)]}


def _version(found: Version) -> Json:
    metrics, recipe = found.metrics or {}, found.recipe or {}
    rank = metrics.get("rank") or recipe.get("rank")
    return plain(found) | {"reference": found.reference, "rank": rank, "kind": recipe.get("kind")}


def _whole_version(platform: Platform, who: Actor, repo: str, number: int) -> Json:
    """A version with its files, lineage, checkpoints and evaluations."""
    catalog = platform.catalog
    found = catalog.versions.get(who, repo, number)
    files = [] if found.manifest is None or found.collected else platform.blobs.manifest(found.manifest).files
    lineage = catalog.versions.lineage(who, found.id)
    home = catalog.repositories.get(who, repo)
    return _version(found) | {
        "files": [plain(one) for one in files],
        "lineage": [{"id": one.id, "reference": one.reference, "state": one.state} for one in lineage[1:]],
        "children": [{"id": one.id, "reference": one.reference} for one in catalog.versions.children(who, found.id)],
        "checkpoints": [plain(one) for one in catalog.versions.checkpoints(who, repo, number)],
        "evaluations": [plain(one) for one in catalog.evaluations.find(who, version_id=found.id)],
        "aliases": [one.name for one in home.aliases if one.version_id == found.id],
    }


async def _places(state: ServerState) -> dict[str, str]:
    """Digest -> where the engine has it: on the `device`, on its way there, or compiled on `disk`."""
    if not state.engine.ready:
        return {}
    stats = await state.engine.stats()
    return {one.digest: "device" if one.resident else "loading" if one.loading else "disk" for one in stats.adapters}


def _where(version: Version, places: dict[str, str]) -> str | None:
    return None if version.digest is None else places.get(version.digest, "source")
