"""HTTP for downloads: only to addresses that were checked, with a deadline on every byte. No torch.

A name is resolved once, every address it has is checked, and the connection goes to one of exactly these: a name that
resolves differently a moment later changes nothing. Each redirect is checked in the same way. Through a proxy the
same holds: it is told the address, unless addresses are not checked at all.
"""

from __future__ import annotations

import http.client
import io
import ipaddress
import os
import socket
import ssl
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import TracebackType
from urllib.parse import SplitResult, urljoin, urlsplit

from lorikeet.adapters import proxy as proxies
from lorikeet.adapters.proxy import Proxy
from lorikeet.errors import NotFoundError, SourceError, SourceRefusedError

MAX_REDIRECTS = 5
_CHUNK = 2**20  # bytes of one read
_REDIRECTS = (301, 302, 303, 307, 308)
_SECRET_HEADERS = ("authorization",)
_PORTS = {"https": 443, "http": 80}
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class TransientError(Exception):
    """Trying again may help. `retry_after` is what the source asked for, in seconds."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True)
class Deadline:
    """A moment on the monotonic clock."""

    ends: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        return cls(time.monotonic() + seconds)

    def within(self, seconds: float) -> Deadline:
        """This deadline, or one in `seconds` when that is sooner."""
        return Deadline(min(self.ends, time.monotonic() + seconds))

    @property
    def passed(self) -> bool:
        return time.monotonic() >= self.ends

    def left(self) -> float:
        """Seconds to go. Raises `TimeoutError` when there are none."""
        seconds = self.ends - time.monotonic()
        if seconds <= 0:
            raise TimeoutError("it took too long")
        return seconds


class Reply:
    """An answer whose body is yet to be read; close it."""

    def __init__(self, response: http.client.HTTPResponse, connection: socket.socket, url: str) -> None:
        self.status = response.status
        self.headers = response.headers
        self.url = url
        self._response = response
        self._connection = connection

    def __enter__(self) -> Reply:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._response.close()
        self._connection.close()

    def read(self, size: int) -> bytes:
        """Up to `size` bytes as they come; empty at the end, or where the connection broke. Raises `TransientError`."""
        try:
            return self._response.read1(size)
        except (OSError, http.client.HTTPException) as error:
            raise TransientError(f"the connection broke: {_reason(error)}") from error

    def __iter__(self) -> Iterator[bytes]:
        while chunk := self.read(_CHUNK):
            yield chunk

    def read_all(self, limit: int) -> bytes:
        """The whole body. Raises `SourceError` when it is longer than `limit` bytes, `TransientError` when cut off."""
        parts, size = [], 0
        while part := self.read(2**16):
            parts.append(part)
            size += len(part)
            if size > limit:
                raise SourceError(f"the answer is longer than {limit} bytes", hint="the source does not speak as known")
        length = self.length
        if length is not None and size != length:
            raise TransientError(f"the connection broke after {size} of {length} bytes")
        return b"".join(parts)

    @property
    def length(self) -> int | None:
        """What `Content-Length` says."""
        text = self.headers.get("content-length", "")
        return int(text) if text.isdecimal() else None


class Http:
    """GET and HEAD over https. `trusted` origins (`https://host:port`) are the operator's: any address, http too.

    `allow_private` drops the check of addresses and lets http pass, for every host. `proxy` is for all https but that
    to the hosts of `$NO_PROXY`; it resolves the names of hosts whose addresses are not checked.
    """

    def __init__(
        self,
        *,
        stall_seconds: float,
        allow_private: bool = False,
        trusted: Collection[str] = (),
        proxy: Proxy | None = None,
    ) -> None:
        self._stall = stall_seconds
        self._allow_private = allow_private
        self._proxy = proxy
        self._trusted = {origin(url) for url in trusted}

    def open(
        self, method: str, url: str, headers: Mapping[str, str], deadline: Deadline, *, follow: bool = True
    ) -> Reply:
        """The answer after redirects. Raises `TransientError`, `NotFoundError`, `SourceError`, `SourceRefusedError`.

        What is secret among the headers goes to the origin of `url` alone.
        """
        sent = {"accept-encoding": "identity", "user-agent": "lorikeet", **headers}
        for _ in range(MAX_REDIRECTS + 1):
            reply = self._once(method, url, sent, deadline)
            location = reply.headers.get("location")
            if not follow or reply.status not in _REDIRECTS or not location:
                return reply
            reply.close()
            target = urljoin(url, location)
            if origin(target) != origin(url):
                sent = {name: value for name, value in sent.items() if name.lower() not in _SECRET_HEADERS}
            url = target
        raise SourceError(f"{urlsplit(url).hostname}: more than {MAX_REDIRECTS} redirects")

    def _once(self, method: str, url: str, headers: Mapping[str, str], deadline: Deadline) -> Reply:
        parts = self._checked(url)
        host, port = str(parts.hostname), parts.port or _PORTS[parts.scheme]
        proxy = self._proxy if parts.scheme == "https" and proxies.is_meant(host, port) else None
        addresses = [host] if proxy is not None and self._is_free(url) else self._addresses(parts, host, port)
        connection = self._connect(host, port, addresses, deadline, proxy)
        try:
            connection = self._secured(connection, parts.scheme, host, deadline)
            timed = _TimedSocket(connection, deadline, self._stall)
            talk = http.client.HTTPConnection(host, port)
            talk.sock = timed  # what HTTPConnection uses of a socket, it has
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            talk.request(method, path, headers={"host": parts.netloc, **headers})
            return Reply(talk.getresponse(), connection, url)
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            if isinstance(error, ssl.SSLCertVerificationError):
                said = f"{host}: its certificate is not trusted: {error.verify_message}"
                raise SourceError(said, hint="$SSL_CERT_FILE names further authorities") from error
            raise TransientError(f"{host}: {_reason(error)}") from error
        except BaseException:
            connection.close()
            raise

    def _checked(self, url: str) -> SplitResult:
        parts = split_url(url)
        if parts.scheme == "http" and not self._is_free(url):
            raise SourceRefusedError(
                f"{parts.hostname}: found http://, expected https://",
                hint="start the server with --allow-private-sources to allow it",
            )
        return parts

    def _is_free(self, url: str) -> bool:
        """Whether any address will do."""
        return self._allow_private or origin(url) in self._trusted

    def _addresses(self, parts: SplitResult, host: str, port: int) -> list[str]:
        """The addresses of a host, all of them public unless the host is trusted."""
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            if error.errno == socket.EAI_AGAIN:
                raise TransientError(f"{host}: its name could not be resolved{self._unused(host, port)}") from error
            raise NotFoundError(f"{host}: there is no such host{self._unused(host, port)}", param="model") from error
        except UnicodeError as error:
            raise NotFoundError(f"{host[:80]!r} is not the name of a host", param="model") from error
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        if not self._is_free(parts.geturl()):
            for address in addresses:
                kind = private_kind(address)
                if kind is not None:
                    raise SourceRefusedError(
                        f"{host} has a {kind} address; adapters come from public addresses alone",
                        hint="start the server with --allow-private-sources to allow it",
                    )
        return addresses

    def _connect(
        self, host: str, port: int, addresses: list[str], deadline: Deadline, proxy: Proxy | None
    ) -> socket.socket:
        def left() -> float:
            return min(self._stall, deadline.left())

        problem: Exception | None = None
        for address in addresses:
            try:
                if proxy is not None:
                    return proxy.connect(address, port, left)
                return socket.create_connection((address, port), timeout=left())
            except OSError as error:
                problem = error
        if proxy is not None:
            raise TransientError(f"{host} through the proxy {proxy.host}:{proxy.port}: {_reason(problem)}") from problem
        raise TransientError(f"{host}: {_reason(problem)}{self._unused(host, port)}") from problem

    def _unused(self, host: str, port: int) -> str:
        """What to add to a failure that a proxy of the environment might have spared."""
        if self._proxy is not None or not proxies.is_meant(host, port):
            return ""
        return f" (HTTPS_PROXY is set, but used with {proxies.FLAG} alone)"

    def _secured(self, connection: socket.socket, scheme: str, host: str, deadline: Deadline) -> socket.socket:
        if scheme == "http":
            return connection
        context = _tls_context(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))
        connection.settimeout(min(self._stall, deadline.left()))
        return context.wrap_socket(connection, server_hostname=host)


@lru_cache(maxsize=4)  # reading all authorities takes 50 ms
def _tls_context(file: str | None, folder: str | None) -> ssl.SSLContext:
    return ssl.create_default_context()  # which reads the two from the environment


class _TimedSocket:
    """What `http.client` uses of a socket; every wait ends with the deadline, or when nothing came for `stall`."""

    def __init__(self, connection: socket.socket, deadline: Deadline, stall: float) -> None:
        self.connection = connection
        self._deadline = deadline
        self._stall = stall

    def wait(self) -> socket.socket:
        self.connection.settimeout(min(self._stall, self._deadline.left()))
        return self.connection

    def sendall(self, data: bytes) -> None:
        self.wait().sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_TimedReader(self), 2**16)

    def close(self) -> None:
        """`Reply` closes the connection: `http.client` would while the body is yet to be read."""


class _TimedReader(io.RawIOBase):
    def __init__(self, timed: _TimedSocket) -> None:
        self._timed = timed

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        return self._timed.wait().recv_into(buffer)


def split_url(url: str) -> SplitResult:
    """A URL in its parts. Raises `SourceRefusedError` for what is not a plain https (or http) one."""
    shown = repr(url.split("?")[0][:200])
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise SourceRefusedError(f"{shown} is not a URL: {error}") from error
    if parts.scheme not in _PORTS or not parts.hostname or port == 0:
        raise SourceRefusedError(f"{shown}: expected https://host/path")
    if parts.username is not None or parts.password is not None:
        raise SourceRefusedError("a URL must not carry credentials", hint="send them as api_token")
    if any(not 32 < ord(char) < 127 or char == "\\" for char in url):
        raise SourceRefusedError(f"{shown}: a URL is printable ASCII without spaces and backslashes; quote the rest")
    return parts


def origin(url: str) -> str:
    """`https://host:port` of a URL."""
    parts = split_url(url)
    return f"{parts.scheme}://{parts.hostname}:{parts.port or _PORTS[parts.scheme]}"


def private_kind(address: str) -> str | None:
    """What kind of an address that is not public this is; None for a public one."""
    ip: ipaddress.IPv4Address | ipaddress.IPv6Address = ipaddress.ip_address(address.split("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return private_kind(str(inner))
    for name in ("loopback", "unspecified", "link_local", "multicast", "private", "reserved"):
        if getattr(ip, f"is_{name}"):
            return name.replace("_", "-")
    return None if ip.is_global else "non-public"


def _reason(error: Exception | None) -> str:
    if isinstance(error, TimeoutError):
        return "it took too long"
    text = getattr(error, "strerror", None) or str(error)
    return text or type(error).__name__
