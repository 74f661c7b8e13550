"""The web page: the files of `lorikeet/ui`, read once, served from memory.

`GET /` gives the page to browsers and leaves everybody else to the JSON root. The page names its files below
`ui/<hash of all of them>/`, so each may be cached for ever, and modules that import each other are of one version.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import Scope

from lorikeet.server.auth import public
from lorikeet.server.compression import SMALL, accepts, zipped

UI = Path(__file__).parent.parent / "ui"
PLACE = "ui/"  # in index.html; becomes ui/<version>/

MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}

# Nothing inline, nothing from elsewhere, no text that becomes markup: what is stored can be shown, never run.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}
FOR_EVER = "public, max-age=31536000, immutable"
ASK_AGAIN = "no-cache"  # kept, but compared by its ETag on each visit


@dataclass(frozen=True, slots=True)
class Asset:
    content: bytes
    zipped: bytes | None
    media_type: str
    etag: str

    @classmethod
    def of(cls, content: bytes, suffix: str) -> Asset:
        small = zipped(content) if len(content) >= SMALL else None
        return cls(content, small, MEDIA_TYPES[suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')


class Pages:
    """All files of the page, in memory: a path of a request is a key here and never reaches a file system."""

    def __init__(self, folder: Path = UI) -> None:
        found = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.suffix in MEDIA_TYPES
        }
        whole = hashlib.sha256()
        for name, content in found.items():
            whole.update(f"{name}\0{len(content)}\0".encode() + content)
        self.version = whole.hexdigest()[:16]
        index = found.pop("index.html").replace(f'="{PLACE}'.encode(), f'="{PLACE}{self.version}/'.encode())
        self.index = Asset.of(index, ".html")
        self.assets = {name: Asset.of(content, Path(name).suffix) for name, content in found.items()}

    @public
    async def page(self, request: Request) -> Response:
        return reply(request, self.index, ASK_AGAIN)

    @public
    async def asset(self, request: Request) -> Response:
        asset = self.assets.get(request.path_params["name"])
        if asset is None or request.path_params["version"] != self.version:
            raise HTTPException(404)
        return reply(request, asset, FOR_EVER)


def reply(request: Request, asset: Asset, caching: str) -> Response:
    """The asset, zipped where the client takes that; 304 where it has it."""
    headers = HEADERS | {"cache-control": caching, "etag": asset.etag, "vary": "Accept, Accept-Encoding"}
    known = request.headers.get("if-none-match", "")
    if known.strip() == "*" or asset.etag in (one.strip().removeprefix("W/") for one in known.split(",")):
        return Response(status_code=304, headers=headers)
    content = asset.content
    if asset.zipped is not None and accepts(request.headers.get("accept-encoding", ""), "gzip"):
        content = asset.zipped
        headers["content-encoding"] = "gzip"
    return Response(content, headers=headers | {"content-type": asset.media_type})


class BrowserRoute(Route):
    """Takes the requests of browsers; for all others it is not there."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        accept = next((value.decode("latin-1") for name, value in scope.get("headers", ()) if name == b"accept"), "")
        return super().matches(scope) if accepts(accept, "text/html") else (Match.NONE, {})


def add_pages(app: FastAPI, pages: Pages | None = None) -> None:
    """Let `app` serve the page. Its files carry no data, so they need no key; what they ask the API for does."""
    pages = pages or Pages()
    app.router.routes[:0] = [
        BrowserRoute("/", pages.page, methods=["GET"]),
        Route("/ui/{version}/{name:path}", pages.asset, methods=["GET"]),
    ]
