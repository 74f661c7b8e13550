"""`pb.datasets`: files of rows, by the SDK's conventions for splits and conversations.

The column `split` (`train`, `evaluation` or `validation`, `test`) says which split a row is of, and goes. A column
`messages` of an optional system message, one of the user and one of the assistant becomes the columns `system`, `user`
and `assistant`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response

from lorikeet.data.formats import READERS, read_rows
from lorikeet.errors import DataError, LorikeetError, NotFoundError, UnsupportedFieldError
from lorikeet.registry.home import Home
from lorikeet.registry.records import Actor, Dataset, Upload
from lorikeet.server.auth import needs, principal
from lorikeet.server.datasets import refuse_bomb
from lorikeet.server.listing import Query
from lorikeet.server.platform import Platform
from lorikeet.server.predibase import records, uploads
from lorikeet.server.predibase.config import ROLES
from lorikeet.server.replies import json_reply
from lorikeet.server.state import ServerState
from lorikeet.server.validation import Body, Unsupported, parse, read_body, shown

Row = dict[str, Any]
CONVERSATIONS = (ROLES[1:], ROLES)  # with and without a system message


class BeginBody(Body):
    fileName: str
    mimeType: str | None = None  # the name says what it is
    region: Unsupported = None


class CompleteBody(Body):
    name: str
    uploadToken: str


def routes(state: ServerState, platform: Platform) -> APIRouter:
    router = APIRouter()
    catalog = platform.catalog

    @router.post("/v2/datasets/upload")
    @needs("trainer")
    async def begin(request: Request) -> Response:
        body = parse(BeginBody, await read_body(request, state.config.max_body))
        name = "rows" + _suffix(body.fileName)
        token, addresses = await uploads.begin(request, platform, principal(request).actor, "dataset", [name], {})
        return json_reply({"presignedUrl": addresses[name], "uploadToken": token, "requiredHeaders": {}})

    @router.put("/v2/datasets/upload")
    @needs("trainer")
    async def complete(request: Request) -> Response:
        who = principal(request).actor
        body = parse(CompleteBody, await read_body(request, state.config.max_body))
        upload = await uploads.find(platform, who, "dataset", body.uploadToken)
        if upload.result is None:
            made = await platform.run_slow(add, platform.home, who, body.name, upload)
            await platform.run(catalog.uploads.complete, who, upload.id, made.id)
        else:
            made = await platform.run(catalog.datasets.by_id, who, upload.result)
        return json_reply(records.dataset(made))

    @router.get("/v1/datasets/name/{name}")
    @needs("user")
    async def get(request: Request, name: str) -> Response:
        connection = Query(request, "connectionName").text("connectionName")
        if connection not in (None, records.CONNECTION):
            raise NotFoundError(
                f"there is no connection {shown(connection)}", hint=f"the one there is: {records.CONNECTION}",
                param="connectionName", code="connection_not_found",
            )  # fmt: skip
        return json_reply(records.dataset(await platform.run(catalog.datasets.get, principal(request).actor, name)))

    return router


def _suffix(file_name: str) -> str:
    suffix = Path(file_name).suffix.lower()
    if suffix not in READERS:
        raise UnsupportedFieldError(
            f"'fileName': expected a file of {', '.join(READERS)}, found {shown(file_name)}",
            hint="convert it to JSON lines or CSV", param="fileName", code="invalid_value",
        )  # fmt: skip
    return suffix


def add(home: Home, who: Actor, name: str, upload: Upload) -> Dataset:
    """The uploaded rows as a dataset. Raises `DataError` that names rows, `ConflictError` for a name that is taken."""
    (file_name,) = upload.spec["files"]
    with tempfile.TemporaryDirectory(dir=home.blobs.staging, prefix="rows-") as place:
        folder = Path(place)
        path = uploads.bring(home.blobs, upload, file_name, folder)
        try:
            refuse_bomb(path, "file")
            parts = shaped(read_rows(path))
            files = {"train": path} if parts is None else {s: _write(folder, s, rows) for s, rows in parts.items()}
            return home.add_dataset(who, name, files, read_rows)
        except LorikeetError as error:
            error.message = error.message.replace(f"{folder}/", "")  # the uploader's files, not this machine's
            error.param = None if error.param is None else error.param.replace(f"{folder}/", "")
            raise


def shaped(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Row]] | None:
    """The rows by split with their conversations taken apart; None where they can stay in the file they are in.

    Raises `DataError` that names the row, counted from 1.
    """
    split = any("split" in row for row in rows)
    talk = any("messages" in row for row in rows)
    if not (split or talk):
        return None
    parts: dict[str, list[Row]] = {}
    for number, row in enumerate(rows, 1):
        values = dict(row)
        named = values.pop("split", None) if split else "train"
        where = records.SPLITS.get(named) if isinstance(named, str) else None
        if where is None:
            raise DataError(
                f"row {number}: split: expected {', '.join(records.SPLITS)}, found {shown(named)}", param="split"
            )
        if talk:
            values |= _turns(number, values.pop("messages", None))
        parts.setdefault(where, []).append(values)
    if "train" not in parts:
        raise DataError(f"split: no row of {len(rows)} is 'train'", param="split")
    return {one: parts[one] for one in ("train", "validation", "test") if one in parts}


def _turns(number: int, messages: Any) -> Row:
    """One conversation as columns. What a message holds beside role and content is not supported."""
    listed = messages if isinstance(messages, list) else []
    fine = all(isinstance(one, dict) and set(one) == {"role", "content"} for one in listed)
    roles = tuple(one["role"] for one in listed) if fine else ()
    if roles not in CONVERSATIONS or not all(isinstance(one["content"], str) for one in listed):
        found = ", ".join(map(str, roles))[:80] if roles else shown(messages)
        raise DataError(
            f"row {number}: messages: expected user, assistant, or system, user, assistant, each {{role, content}}; "
            f"found {found}",
            hint="conversations of several turns are not supported; write each turn as a row of its own",
            param="messages",
        )
    return dict(zip(roles, (one["content"] for one in listed), strict=True))


def _write(folder: Path, split: str, rows: Sequence[Row]) -> Path:
    path = folder / f"{split}.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path
