"""A server of files over http or https, as ill-behaved as a test wants it."""

from __future__ import annotations

import hashlib
import json
import socket
import ssl
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import trustme


class FileServer:
    """`files` maps paths to bytes. What was asked and sent is in `requests` and `sent` (bytes of bodies by path)."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.sent: Counter[str] = Counter()
        self.tokens: dict[str, set[str]] = {}  # path prefix -> bearer tokens that may read below it
        self.redirects: dict[str, str] = {}
        self.statuses: defaultdict[str, list[int]] = defaultdict(list)  # what a path answers first
        self.drop_after: list[int] = []  # bytes after which the next bodies break off
        self.hanging: set[str] = set()
        self.trickle: float | None = None  # seconds between two bytes of a body
        self.ranges = self.heads = self.etags = True
        self.headers: dict[str, str] = {}  # of every answer with a file
        self.claimed: dict[str, int] = {}  # a Content-Length that is not true
        self.released = threading.Event()

    def asked(self, method: str, path: str) -> int:
        return sum(one[0] == method and one[1].split("?")[0] == path for one in self.requests)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: FileServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        owner, path = self.owner, self.path.split("?")[0]
        owner.requests.append((self.command, self.path, {name.lower(): value for name, value in self.headers.items()}))
        if path in owner.hanging:
            owner.released.wait(30)
            self.close_connection = True
            return
        if owner.statuses[path]:
            self.say(owner.statuses[path].pop(0))
        elif not self.allowed(path):
            self.say(401)
        elif path in owner.redirects:
            self.say(302, {"location": owner.redirects[path]})
        elif not owner.heads and not body:
            self.say(405)
        elif path not in owner.files:
            self.say(404)
        else:
            self.send_file(path, owner.files[path], body)

    def allowed(self, path: str) -> bool:
        needed = [tokens for prefix, tokens in self.owner.tokens.items() if path.startswith(prefix)]
        given = self.headers.get("authorization", "").removeprefix("Bearer ")
        return all(given in tokens for tokens in needed)

    def say(self, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("content-length", "0")
        self.end_headers()

    def send_file(self, path: str, data: bytes, body: bool) -> None:
        owner, start, stop = self.owner, 0, len(data)
        asked = self.headers.get("range") or self.headers.get("x-ms-range")
        partial = asked is not None and owner.ranges
        if partial:
            first, _, last = str(asked).removeprefix("bytes=").partition("-")
            start, stop = int(first), int(last) + 1 if last else len(data)
        self.send_response(206 if partial else 200)
        if partial:
            self.send_header("content-range", f"bytes {start}-{stop - 1}/{len(data)}")
        self.send_header("content-length", str(owner.claimed.get(path, stop - start)))
        for name, value in owner.headers.items():
            self.send_header(name, value)
        if owner.etags:
            self.send_header("etag", f'"{hashlib.sha256(data).hexdigest()[:16]}"')
        self.end_headers()
        if body:
            self.send_body(path, data[start:stop])

    def send_body(self, path: str, data: bytes) -> None:
        owner = self.owner
        if owner.trickle is not None:
            with suppress(OSError):
                for byte in data:
                    self.wfile.write(bytes([byte]))
                    owner.sent[path] += 1
                    if owner.released.wait(owner.trickle):
                        break
            self.close_connection = True
        elif owner.drop_after and len(data) > owner.drop_after[0]:
            cut = owner.drop_after.pop(0)
            self.wfile.write(data[:cut])
            owner.sent[path] += cut
            self.close_connection = True
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
        else:
            owner.sent[path] += len(data)  # before the client can know that it has all
            self.wfile.write(data)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves in the middle is part of many tests."""


@contextmanager
def file_server(authority: trustme.CA | None = None, *names: str) -> Iterator[FileServer]:
    """On a free port of 127.0.0.1; https as `localhost`, or `names`, when there is an authority to sign for it."""
    handler = type("BoundHandler", (Handler,), {})
    server = _Server(("127.0.0.1", 0), handler)
    port = server.server_address[1]
    if authority is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(*names or ("localhost",)).configure_cert(context)
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    owner = FileServer(f"http://127.0.0.1:{port}" if authority is None else f"https://localhost:{port}")
    handler.owner = owner  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield owner
    finally:
        owner.released.set()
        server.shutdown()
        server.server_close()
        thread.join(10)


def publish(server: FileServer, repository: str, files: dict[str, bytes], *, private_to: set[str] | None = None) -> str:
    """Put a repository on a server that plays the hub; its commit. Large files are kept as the hub keeps LFS files."""
    commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
    siblings: list[dict[str, Any]] = []
    for name, data in files.items():
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        about: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": git}
        if name.endswith(".safetensors"):
            about["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            server.redirects[f"/{repository}/resolve/{commit}/{name}"] = f"/cdn/{commit}/{name}"
            server.files[f"/cdn/{commit}/{name}"] = data
        else:
            server.files[f"/{repository}/resolve/{commit}/{name}"] = data
        siblings.append(about)
    listing = json.dumps({"id": repository, "sha": commit, "siblings": siblings}).encode()
    for revision in ("main", commit):
        server.files[f"/api/models/{repository}/revision/{revision}"] = listing
    if private_to is not None:
        server.tokens[f"/api/models/{repository}/"] = server.tokens[f"/{repository}/"] = private_to
    return commit
