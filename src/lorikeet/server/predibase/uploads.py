"""Files on their way in: to addresses that the SDK is told, where it puts them without its key."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

from fastapi import APIRouter, Request, Response

from lorikeet.errors import ConflictError, InvalidRequestError, NotFoundError
from lorikeet.registry.blobs import BlobStore
from lorikeet.registry.blobs import Upload as Staged
from lorikeet.registry.objects import CHUNK
from lorikeet.registry.records import Actor, Upload, UploadKind
from lorikeet.server.auth import public
from lorikeet.server.datasets import MAX_DATASET
from lorikeet.server.platform import Platform
from lorikeet.server.state import ServerState
from lorikeet.server.validation import BodyTooLargeError

PATH = "/v2/uploads/{token}/{name}"
SECONDS = 3600.0  # for which an upload may be filled and completed


async def begin(
    request: Request, platform: Platform, who: Actor, kind: UploadKind, names: Sequence[str], spec: Mapping[str, object]
) -> tuple[str, dict[str, str]]:
    """A new upload of files of these names: its token, and the address of each. No other name is taken."""
    told = {**spec, "files": list(names)}
    _, token = await platform.run(platform.catalog.uploads.begin, who, kind, told, seconds=SECONDS)
    return token, {name: f"{request.base_url}v2/uploads/{token}/{name}" for name in names}


async def find(platform: Platform, who: Actor, kind: UploadKind, token: str) -> Upload:
    """The caller's upload of this token. Raises `NotFoundError`."""
    upload = await platform.run(platform.catalog.uploads.find, token)
    if upload.tenant_id != who.tenant or upload.kind != kind:
        raise NotFoundError(
            f"there is no upload of a {kind} with this token",
            hint="begin another",
            param="uploadToken",
            code="upload_not_found",
        )
    return upload


def bring(blobs: BlobStore, upload: Upload, name: str, folder: Path) -> Path:
    """A file that was put, in a folder. Raises `InvalidRequestError` when it was not."""
    if name not in upload.files:
        raise InvalidRequestError(f"{name} was not uploaded", hint="put it to its presigned URL first", param=name)
    path = folder / name
    with path.open("wb") as out:
        for chunk in blobs.read(upload.files[name]["sha256"]):
            out.write(chunk)
    return path


def routes(state: ServerState, platform: Platform) -> APIRouter:
    router = APIRouter()

    @router.put(PATH)
    @public
    async def put(request: Request, token: str, name: str) -> Response:
        """The token is all it takes. A file is put once; the same bytes again change nothing."""
        upload = await platform.run(platform.catalog.uploads.find, token)
        if name not in upload.spec["files"]:
            raise NotFoundError(f"the upload takes no file {name[:80]!r}", param="file", code="file_not_found")
        most = min(platform.config.max_upload, MAX_DATASET) if upload.kind == "dataset" else platform.config.max_upload
        room = most - sum(one["bytes"] for other, one in upload.files.items() if other != name)
        staged = platform.blobs.begin(f"{upload.id}-{secrets.token_hex(8)}")
        try:
            digest = await _receive(request, platform, staged, room, most)
            before = upload.files.get(name, {}).get("sha256")
            if before not in (None, digest):
                raise ConflictError(f"{name} was uploaded before, with other content", hint="begin another upload")
            blob = await platform.run_slow(staged.finish, digest)
        except BaseException:
            staged.discard()
            raise
        await platform.run(platform.catalog.uploads.add_file, upload.id, name, blob.sha256, blob.bytes)
        return Response(status_code=200)

    return router


async def _receive(request: Request, platform: Platform, staged: Staged, room: int, most: int) -> str:
    """Write the body to the staged file; its sha256. Raises `BodyTooLargeError` for more than `room` bytes."""
    too_large = BodyTooLargeError(f"the upload is larger than {most} bytes", hint="upload less at once")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > room:
        raise too_large
    digest = hashlib.sha256()
    async for chunk in _in_blocks(request.stream()):
        room -= len(chunk)
        if room < 0:
            raise too_large
        digest.update(chunk)
        await platform.run_slow(staged.write, chunk)
    return digest.hexdigest()


async def _in_blocks(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same bytes in fewer pieces: each costs a trip to another thread."""
    held = bytearray()
    async for chunk in chunks:
        held += chunk
        if len(held) >= CHUNK:
            yield bytes(held)
            held.clear()
    if held:
        yield bytes(held)
