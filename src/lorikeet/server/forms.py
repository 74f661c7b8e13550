"""Files in a body: multipart forms, spooled to disk as they come, within a limit over all of them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from fastapi import Request
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from lorikeet.errors import InvalidRequestError, LorikeetError, UnsupportedFieldError
from lorikeet.server.validation import BodyTooLargeError, shown

MAX_FILES = 32
MAX_FIELDS = 32
MAX_FIELD = 2**20  # bytes of a field that is no file


def is_form(request: Request) -> bool:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower() == "multipart/form-data"


@asynccontextmanager
async def read_form(request: Request, limit: int) -> AsyncIterator[FormData]:
    """The form; its files are gone afterwards. Raises `BodyTooLargeError` beyond `limit` bytes, `InvalidRequestError`.

    Of a file no more than a megabyte is in memory; the rest is in a nameless file, which no crash leaves behind.
    """
    too_large = BodyTooLargeError(
        f"the upload is larger than {limit} bytes", hint="send less, or start the server with a larger --max-upload"
    )
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise too_large

    async def limited() -> AsyncGenerator[bytes]:
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                raise too_large
            yield chunk

    parser = MultiPartParser(
        request.headers, limited(), max_files=MAX_FILES, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD
    )
    try:
        form = await parser.parse()
    except (MultiPartException, ValueError, KeyError) as error:
        said = getattr(error, "message", None) or str(error)
        raise InvalidRequestError(f"the form cannot be read: {said}", code="malformed_form") from None
    try:
        yield form
    finally:
        await form.close()


def fields_of(form: FormData, *known: str) -> dict[str, str]:
    """The fields that are no files. Raises `UnsupportedFieldError` for others, and for one that stands twice."""
    found: dict[str, str] = {}
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            continue
        if name not in known:
            raise UnsupportedFieldError(
                f"unknown field {shown(name)}", param=name, code="unknown_field",
                hint="known fields: " + ", ".join(known),
            )  # fmt: skip
        if name in found:
            raise UnsupportedFieldError(f"field '{name}' stands twice", param=name, code="invalid_value")
        found[name] = value
    return found


def files_of(form: FormData) -> list[tuple[str, UploadFile]]:
    """(field, file) in the order they came."""
    return [(name, value) for name, value in form.multi_items() if isinstance(value, UploadFile)]


@contextmanager
def staged(staging: Path, prefix: str) -> Iterator[Path]:
    """A folder for what a request sent; gone afterwards, and not named in errors."""
    with tempfile.TemporaryDirectory(dir=staging, prefix=prefix) as place:
        try:
            yield Path(place)
        except LorikeetError as error:
            raise error.without(Path(place)) from error.__cause__


def copy_to(upload: UploadFile, path: Path) -> Path:
    """Write an uploaded file to `path`, synchronously."""
    with path.open("xb") as out:
        upload.file.seek(0)
        shutil.copyfileobj(upload.file, out, 2**20)
    return path
