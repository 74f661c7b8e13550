"""A proxy that passes requests on and then, as often as it is told, answers for the server as if that had failed."""

from __future__ import annotations

import http.client
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


@dataclass
class FlakyProxy:
    url: str
    rules: list[tuple[str, str, str]] = field(default_factory=list)  # each once: method, pattern of paths, what happens
    seen: list[tuple[str, str]] = field(default_factory=list)

    def fail(self, method: str, pattern: str, how: str = "503") -> None:
        """The next such request takes effect; then comes a `503`, or the connection is dropped without a word."""
        self.rules.append((method, pattern, how))

    def rule_for(self, method: str, path: str) -> str | None:
        self.seen.append((method, path))
        for rule in self.rules:
            if rule[0] == method and re.fullmatch(rule[1], path):
                self.rules.remove(rule)
                return rule[2]
        return None


@contextmanager
def flaky_proxy(upstream: str) -> Iterator[FlakyProxy]:
    address = urlsplit(upstream).netloc

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            connection = http.client.HTTPConnection(address, timeout=60)
            try:
                connection.request(self.command, self.path, body, dict(self.headers))
                reply = connection.getresponse()
                data, status = reply.read(), reply.status
            finally:
                connection.close()
            how = proxy.rule_for(self.command, self.path.partition("?")[0])
            if how == "drop":
                self.close_connection = True
                return
            if how is not None:
                data, status = b'{"error": "somewhere on the way"}', int(how)
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_DELETE = handle_any

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    proxy = FlakyProxy(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
