"""How answers leave: JSON, server-sent events, and what happens when the client does not wait for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from lorikeet.errors import LorikeetError

T = TypeVar("T")

CLIENT_CLOSED_REQUEST = 499  # nobody reads it; it is for the access log
# Line ends of Unicode that JSON allows inside strings, but that clients which split text into lines would stop at.
_LINE_ENDS = ((b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"), (b"\xc2\x85", b"\\u0085"))
DONE = b"data: [DONE]\n\n"


class ClientGoneError(Exception):
    """The client closed the connection before its answer was complete."""


class EventStreamResponse(StreamingResponse):
    """Server-sent events; closing the generator when the client leaves cancels its requests."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes]) -> None:
        super().__init__(events, headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            await super().__call__(scope, receive, send)


def json_reply(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")


def event(body: Any, *, space: bool = True) -> bytes:
    """One server-sent event holding JSON on one line."""
    data = msgspec.json.encode(body)
    for raw, escaped in _LINE_ENDS:
        if raw in data:
            data = data.replace(raw, escaped)
    return b"data:" + (b" " if space else b"") + data + b"\n\n"


def last_word(error: LorikeetError) -> dict[str, Any]:
    """The message with which a stream of our own ends before what it tells of has."""
    told = {"code": error.code, "message": error.message, "hint": error.hint, "retryable": error.retryable}
    return {"type": "error", "error": told}


def error_headers(error: LorikeetError) -> dict[str, str]:
    headers = {}
    if error.retry_after is not None or error.status in (429, 503):
        headers["retry-after"] = str(max(1, round(error.retry_after or 1)))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if error.status == 413:
        headers["connection"] = "close"  # the rest of the body is not read
    return headers


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, cancelled with a `ClientGoneError` when the client leaves first. The body must be read."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_until_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.wait({task, gone})


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def started(request: Request, items: AsyncGenerator[T]) -> AsyncIterator[T]:
    """`items` once the first one is there: until then an error still becomes a status, and no byte was sent."""

    async def first() -> T | None:
        return await anext(items, None)

    try:
        head = await unless_gone(request, first())
    except BaseException:
        await items.aclose()
        raise
    return _chain(head, items)


async def _chain(head: T | None, items: AsyncGenerator[T]) -> AsyncGenerator[T]:
    async with aclosing(items):
        if head is not None:
            yield head
        async for item in items:
            yield item
