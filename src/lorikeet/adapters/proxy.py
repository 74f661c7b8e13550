"""The proxy through which a company's machines reach the internet. No torch.

`$HTTPS_PROXY` names it, `$NO_PROXY` the hosts that are reached without it, as for other programs. It is used only where
the operator says so. It is asked to connect to the very address that was checked here, so a name that it would resolve
to an address within its own network gains nothing.
"""

from __future__ import annotations

import base64
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies_environment, proxy_bypass_environment  # type: ignore[attr-defined]

from lorikeet.errors import ConfigError, SourceError

FLAG = "--source-proxy"
_MAX_HEAD = 16 * 2**10  # bytes of an answer to CONNECT


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy that tunnels: `authorization` is the header's value, a secret."""

    host: str
    port: int
    authorization: str | None = field(default=None, repr=False)

    @classmethod
    def of_environment(cls) -> Proxy:
        """That of `$HTTPS_PROXY`. Raises `ConfigError` where it is missing, or not of the form that is supported."""
        value = _named()
        if not value:
            raise ConfigError(
                f"{FLAG}: HTTPS_PROXY is not set",
                hint="set it to such as http://proxy.example:3128",
                param="HTTPS_PROXY",
            )
        try:
            parts = urlsplit(value if "://" in value else f"http://{value}")
            host, port = parts.hostname, parts.port
        except ValueError:
            parts, host, port = urlsplit(""), None, None
        if parts.scheme != "http" or not host or parts.path.strip("/"):
            found = f"{parts.scheme}://..." if parts.scheme else "something else"  # the rest may hold a password
            raise ConfigError(
                f"HTTPS_PROXY: expected http://host:port or http://user:password@host:port, found {found}",
                hint="what goes through it is encrypted all the same",
                param="HTTPS_PROXY",
            )
        authorization = None
        if parts.username is not None:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            authorization = f"Basic {base64.b64encode(pair.encode()).decode()}"
        return cls(host, port or 80, authorization)

    def connect(self, target: str, port: int, left: Callable[[], float]) -> socket.socket:
        """A connection to `target`, a name or an address. `left` says how many seconds the next wait may take.

        Raises `SourceError` where the proxy refuses, `OSError` where trying again may help.
        """
        connection = socket.create_connection((self.host, self.port), timeout=left())
        try:
            place = f"[{target}]:{port}" if ":" in target else f"{target}:{port}"
            lines = [f"CONNECT {place} HTTP/1.1", f"Host: {place}"]
            if self.authorization is not None:
                lines.append(f"Proxy-Authorization: {self.authorization}")
            connection.settimeout(left())
            connection.sendall("\r\n".join((*lines, "", "")).encode("ascii"))
            self._check(_status_of(_head(connection, left)), place)
        except BaseException:
            connection.close()
            raise
        return connection

    def _check(self, status: int, place: str) -> None:
        if 200 <= status < 300:
            return
        said = f"the proxy {self.host}:{self.port} answered {status} to CONNECT {place}"
        if status >= 500:
            raise OSError(said)
        hint = "the proxy refuses this address; what it lets pass is its owner's choice"
        if status == 407:
            hint = "put the proxy's user and password into HTTPS_PROXY: http://user:password@host:port"
        raise SourceError(said, hint=hint)


def in_environment() -> bool:
    """Whether the environment names a proxy."""
    return bool(_named())


def is_meant(host: str, port: int) -> bool:
    """Whether the environment names a proxy for this host."""
    return in_environment() and not proxy_bypass_environment(f"{host}:{port}")


def _named() -> str | None:
    proxies = getproxies_environment()
    return proxies.get("https") or proxies.get("all")


def _head(connection: socket.socket, left: Callable[[], float]) -> bytes:
    """The answer up to its empty line, and no byte of what follows."""
    head = bytearray()
    while not head.endswith(b"\r\n\r\n"):
        connection.settimeout(left())
        byte = connection.recv(1)
        if not byte or len(head) >= _MAX_HEAD:
            raise OSError("the proxy did not answer CONNECT")
        head += byte
    return bytes(head)


def _status_of(head: bytes) -> int:
    version, _, rest = head.partition(b" ")
    if not version.startswith(b"HTTP/") or not rest[:3].isdigit():
        raise OSError("the proxy does not speak HTTP")
    return int(rest[:3])
