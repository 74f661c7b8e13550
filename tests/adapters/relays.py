"""What stands between a client and a server: a relay of bytes that breaks off, hangs or refuses, and a proxy."""

from __future__ import annotations

import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

Address = tuple[str, int]


class Relay:
    """Connections to `address` are passed on to `target`. With `tunnels`, a proxy that is asked to CONNECT first."""

    def __init__(self, target: Address, *, tunnels: bool) -> None:
        self.target = target
        self.tunnels = tunnels
        self.address: Address = ("", 0)
        self.drop_after: list[int] = []  # bytes from the target after which the next connections break off
        self.passed = 0  # bytes from the target to clients
        self.hanging = False  # nothing more comes
        self.asked: list[list[str]] = []  # the lines of what a proxy was asked
        self.status = "200 Connection established"
        self.tokens: set[str] | None = None  # bearer tokens that may pass, None: whatever there is
        self.released = threading.Event()

    def carry(self, client: socket.socket) -> None:
        """One connection, until either side ends it."""
        with client, suppress(OSError):
            if self.tunnels and not self._answered(client):
                return
            with socket.create_connection(self.target, 10) as server:
                thread = threading.Thread(target=self._up, args=(client, server), daemon=True)
                thread.start()
                self._down(server, client)
                for side in (client, server):
                    with suppress(OSError):
                        side.shutdown(socket.SHUT_RDWR)
                thread.join(10)

    def _answered(self, client: socket.socket) -> bool:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            more = client.recv(1)
            if not more:
                return False
            head += more
        self.asked.append(head.decode().strip().split("\r\n"))
        client.sendall(f"HTTP/1.1 {self.status}\r\nVia: relay\r\n\r\n".encode())
        return self.status.startswith("2")

    def _up(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(2**16):
                if self.tokens is not None and not any(f"Bearer {one}".encode() in data for one in self.tokens):
                    refused = b'{"error": {"code": 403, "message": "Forbidden"}}'
                    head = f"HTTP/1.1 403 Forbidden\r\nconnection: close\r\ncontent-length: {len(refused)}\r\n"
                    client.sendall(f"{head}content-type: application/json\r\n\r\n".encode() + refused)
                    break
                server.sendall(data)
            server.shutdown(socket.SHUT_WR)

    def _down(self, server: socket.socket, client: socket.socket) -> None:
        sent = 0
        while data := server.recv(2**16):
            if self.hanging:
                self.released.wait(30)
                return
            if self.drop_after and sent + len(data) > self.drop_after[0]:
                cut = self.drop_after.pop(0) - sent
                client.sendall(data[:cut])
                self.passed += cut
                return
            client.sendall(data)
            sent += len(data)
            self.passed += len(data)


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64


@contextmanager
def relay(target: Address, *, tunnels: bool = False) -> Iterator[Relay]:
    """On a free port of 127.0.0.1."""
    one = Relay(target, tunnels=tunnels)

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            one.carry(self.request)

    with _Server(("127.0.0.1", 0), Handler) as server:
        one.address = ("127.0.0.1", int(server.server_address[1]))
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield one
        finally:
            one.released.set()
            server.shutdown()
            thread.join(10)
