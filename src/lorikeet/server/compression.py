"""JSON that the API is asked for goes over the wire gzipped, where the client takes that.

Starlette's GZipMiddleware compresses whatever it does not know, downloads of weights among it. This one knows what it
compresses: whole JSON bodies that answer a GET below `/api/`. Streams, WebSockets and files pass as they are.

A body whose length gives away a secret beside what an attacker had put into it (BREACH) is never among them: what
holds a secret answers a POST, and errors, which repeat what was sent, are left alone. See docs/security.md.
"""

from __future__ import annotations

import asyncio
import gzip

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SMALL = 600  # bytes below which gzip gains nothing
LARGE = 64 * 2**10  # bytes from which on it would keep the event loop waiting
LEVEL = 5


def accepts(header: str, wanted: str) -> bool:
    """Whether a header such as `gzip;q=0.5, br` names what is wanted, with a weight above 0."""
    for part in header.split(","):
        name, _, weight = part.replace(" ", "").partition(";q=")
        if name.lower() == wanted:
            return weight.strip("0.") != "" if weight else True
    return False


def zipped(content: bytes, level: int = 9) -> bytes:
    """The same bytes of the same content, whenever that is."""
    return gzip.compress(content, level, mtime=0)


class CompressJson:
    """Middleware: `app`, with its JSON gzipped."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "GET" and scope["path"].startswith("/api/"):
            taken = accepts(Headers(scope=scope).get("accept-encoding", ""), "gzip")
            send = _Sender(send, taken).send
        await self._app(scope, receive, send)


class _Sender:
    """Holds the start of a JSON reply back until its body says whether it is worth compressing."""

    def __init__(self, send: Send, taken: bool) -> None:
        self._send = send
        self._taken = taken
        self._start: Message | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start" and _is_json(message):
            self._start = message
            return
        if self._start is not None:
            start, self._start = self._start, None
            message = await self._compressed(start, message)
            await self._send(start)
        await self._send(message)

    async def _compressed(self, start: Message, message: Message) -> Message:
        """The body of a reply that begins with `start`, whose headers are changed."""
        body = message.get("body", b"")
        headers = MutableHeaders(raw=start["headers"])
        headers.add_vary_header("Accept-Encoding")
        if not self._taken or message.get("more_body") or len(body) < SMALL:
            return message
        body = zipped(body, LEVEL) if len(body) < LARGE else await asyncio.to_thread(zipped, body, LEVEL)
        headers["content-encoding"], headers["content-length"] = "gzip", str(len(body))
        return {**message, "body": body}


def _is_json(start: Message) -> bool:
    headers = Headers(raw=start["headers"])
    plain = headers.get("content-type", "").partition(";")[0] == "application/json"
    return start["status"] == 200 and plain and "content-encoding" not in headers
