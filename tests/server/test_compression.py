"""JSON of the API is gzipped where that is taken; whatever else there is passes as it is, and at once."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
from fastapi import FastAPI, Response
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.responses import StreamingResponse
from tests.server.guarded import MARK, Guarded
from websockets.sync.client import connect

from lorikeet.server.compression import LARGE, SMALL, CompressJson, accepts
from lorikeet.server.replies import json_reply

ZIPPED = {"accept-encoding": "gzip, deflate"}


def make_app() -> FastAPI:
    app = FastAPI(openapi_url=None)
    app.add_middleware(CompressJson)

    @app.api_route("/{place}/rows/{count}", methods=["GET", "POST"])
    async def rows(place: str, count: int) -> Response:
        return json_reply({"rows": ["one like the other"] * count}, headers={"vary": "Origin"})

    @app.get("/api/wrong")
    async def wrong() -> Response:
        return json_reply({"error": "no" * SMALL}, 400)

    @app.get("/api/file")
    async def file() -> Response:
        return Response(bytes(2 * SMALL), media_type="application/octet-stream")

    @app.get("/api/parts")
    async def parts() -> Response:
        async def lines() -> AsyncIterator[bytes]:
            for _ in range(3):
                yield b" " * SMALL
                await asyncio.sleep(0)

        return StreamingResponse(lines(), media_type="application/json")

    return app


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(make_app()) as client:
        yield client


def raw(client: TestClient, path: str, method: str = "GET", accepted: str = "gzip") -> tuple[httpx.Response, bytes]:
    with client.stream(method, path, headers={"accept-encoding": accepted}) as reply:
        return reply, b"".join(reply.iter_raw())


@pytest.mark.parametrize("count", [100, LARGE // 10])  # in the event loop and beside it
def test_json_is_gzipped(client: TestClient, count: int) -> None:
    reply, body = raw(client, f"/api/rows/{count}")
    assert reply.headers["content-encoding"] == "gzip" and reply.headers["content-length"] == str(len(body))
    assert "Accept-Encoding" in reply.headers["vary"] and "Origin" in reply.headers["vary"]
    plain = raw(client, f"/api/rows/{count}", accepted="identity")
    assert gzip.decompress(body) == plain[1] and 10 * len(body) < len(plain[1])
    assert "Accept-Encoding" in plain[0].headers["vary"] and "content-encoding" not in plain[0].headers


@pytest.mark.parametrize(
    ("method", "path", "accepted"),
    [
        ("GET", "/api/rows/1", "gzip"),  # small
        ("POST", "/api/rows/1000", "gzip"),  # may hold a secret
        ("GET", "/api/wrong", "gzip"),  # repeats what was sent
        ("GET", "/v2/rows/1000", "gzip"),
        ("GET", "/api/file", "gzip"),
        ("GET", "/api/parts", "gzip"),
        ("GET", "/api/rows/1000", "gzip;q=0, br"),
    ],
)
def test_what_is_left_alone(client: TestClient, method: str, path: str, accepted: str) -> None:
    reply, body = raw(client, path, method, accepted)
    assert "content-encoding" not in reply.headers
    assert body == raw(client, path, method, "identity")[1]


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.text(max_size=20), st.text(max_size=300), max_size=12))
def test_the_body_is_the_same(body: dict[str, str]) -> None:
    app = FastAPI(openapi_url=None)
    app.add_middleware(CompressJson)
    app.add_api_route("/api/x", lambda: json_reply(body))
    assert TestClient(app).get("/api/x", headers=ZIPPED).json() == body


@pytest.mark.parametrize(
    ("header", "taken"),
    [("gzip", True), ("br, GZIP;q=0.1", True), ("", False), ("gzip;q=0.0", False), ("xgzip", False)],
)
def test_what_a_header_accepts(header: str, taken: bool) -> None:
    assert accepts(header, "gzip") is taken


def test_streams_of_a_server_come_at_once(guarded: Guarded) -> None:
    """Of a job that never runs, so that nothing comes after what there is now."""
    job, http = guarded.names["job"], guarded.server.http
    headers = guarded.admin.headers | ZIPPED
    for path in (f"/api/jobs/{job}/stream", "/api/serving/stream"):
        with http.stream("GET", path, headers=headers, timeout=httpx.Timeout(30, read=5)) as reply:
            assert reply.headers["content-type"].startswith("text/event-stream")
            assert "content-encoding" not in reply.headers
            assert b"data: " in next(reply.iter_raw())
    address = guarded.server.url.replace("http", "ws", 1) + f"/api/jobs/{job}/ws"
    with connect(address, additional_headers=guarded.admin.headers, open_timeout=10) as socket:
        assert json.loads(socket.recv(timeout=5))["type"]
    reply = http.get("/api/audit", headers=headers)
    assert reply.headers["content-encoding"] == "gzip" and MARK in reply.text


def test_a_new_key_is_never_compressed(guarded: Guarded) -> None:
    body = {"name": "x" * 100, "repositories": []}
    reply = guarded.server.http.post("/api/keys", json=body, headers=guarded.admin.headers | ZIPPED)
    assert reply.status_code == 201 and reply.json()["secret"] and "content-encoding" not in reply.headers
