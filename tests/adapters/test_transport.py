"""Which addresses are connected to, what a redirect carries along, and that every wait ends."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st
from tests.adapters.servers import FileServer, file_server

from lorikeet.adapters.transport import Deadline, Http, TransientError, private_kind, split_url
from lorikeet.errors import LorikeetError, NotFoundError, SourceError, SourceRefusedError


@pytest.fixture
def server() -> Iterator[FileServer]:
    with file_server() as server:
        yield server


def resolve_to(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> list[str]:
    """Every name has these addresses; what is connected to is in the list, and no connection is made."""
    connected: list[str] = []

    def getaddrinfo(host: str, port: int, **more: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, port)) for one in addresses]

    def create_connection(address: tuple[str, int], **more: Any) -> socket.socket:
        connected.append(address[0])
        raise ConnectionRefusedError(111, "refused as told")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(socket, "create_connection", create_connection)
    return connected


def get(http: Http, url: str, **headers: str) -> bytes:
    with http.open("GET", url, headers, Deadline.after(5)) as reply:
        assert reply.status == 200
        return reply.read_all(2**20)


PRIVATE = {
    "127.0.0.1": "loopback", "127.8.8.8": "loopback", "0.0.0.0": "unspecified", "10.1.2.3": "private",
    "172.16.0.1": "private", "192.168.1.1": "private", "169.254.169.254": "link-local", "100.64.0.1": "non-public",
    "224.0.0.1": "multicast", "::1": "loopback", "fe80::1%eth0": "link-local", "fd00:ec2::254": "private",
    "::ffff:127.0.0.1": "loopback", "::ffff:169.254.169.254": "link-local", "2002:7f00:1::": "loopback",
    "64:ff9b::a9fe:a9fe": "link-local", "64:ff9b::a00:1": "private",
}  # fmt: skip


@pytest.mark.parametrize(("address", "kind"), PRIVATE.items())
def test_private_addresses_are_told(address: str, kind: str) -> None:
    assert private_kind(address) == kind


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "64:ff9b::808:808"])
def test_public_addresses_are_told(address: str) -> None:
    assert private_kind(address) is None


@pytest.mark.parametrize("address", [*PRIVATE])
def test_a_name_with_a_private_address_is_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    connected = resolve_to(monkeypatch, "8.8.8.8", address)
    with pytest.raises(SourceRefusedError, match=f"{PRIVATE[address]} address") as error:
        get(Http(stall_seconds=1), "https://adapters.example/x")
    assert "--allow-private-sources" in str(error.value) and connected == []
    with pytest.raises(TransientError, match="refused as told"):
        get(Http(stall_seconds=1, allow_private=True), "https://adapters.example/x")
    assert connected == ["8.8.8.8", address]


def test_the_address_that_was_checked_is_the_one_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name server that answers with another address the second time gains nothing: there is no second time."""
    connected = resolve_to(monkeypatch, "8.8.8.8")
    first, asked = socket.getaddrinfo, []

    def rebinding(host: str, port: int, **more: Any) -> list[Any]:
        asked.append(host)
        if len(asked) > 1:
            resolve_to(monkeypatch, "127.0.0.1")
        return first(host, port, **more)

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    with pytest.raises(TransientError):
        get(Http(stall_seconds=1), "https://rebinding.example/x")
    assert connected == ["8.8.8.8"] and asked == ["rebinding.example"]


def test_numbers_in_disguise_are_resolved_before_they_are_checked() -> None:
    for host in ("2130706433", "0x7f.1", "127.1", "localhost", "[::1]", "[::ffff:7f00:1]"):
        with pytest.raises(SourceRefusedError, match="loopback"):
            get(Http(stall_seconds=1), f"https://{host}/x")


def test_http_is_refused(server: FileServer) -> None:
    with pytest.raises(SourceRefusedError, match="found http://, expected https://"):
        get(Http(stall_seconds=1), server.url + "/x")
    assert server.requests == []


def test_every_redirect_is_checked(server: FileServer) -> None:
    """From a host that is trusted to one that is not."""
    with file_server() as inner:
        inner.files["/secret"] = b"metadata"
        server.redirects["/x"] = inner.url + "/secret"
        with pytest.raises(SourceRefusedError, match="found http://"):
            get(Http(stall_seconds=1, trusted=[server.url]), server.url + "/x")
        server.redirects["/x"] = inner.url.replace("http://", "https://") + "/secret"
        with pytest.raises(SourceRefusedError, match="loopback address"):
            get(Http(stall_seconds=1, trusted=[server.url]), server.url + "/x")
        assert inner.requests == []


def test_secrets_stay_at_the_origin(server: FileServer) -> None:
    with file_server() as other:
        server.redirects |= {"/a": "/b", "/b": other.url + "/c"}
        other.files["/c"] = b"content"
        http = Http(stall_seconds=1, allow_private=True)
        assert get(http, server.url + "/a", authorization="Bearer s3cret", accept="*/*") == b"content"
        assert [one[2].get("authorization") for one in server.requests] == ["Bearer s3cret"] * 2
        assert "authorization" not in other.requests[0][2] and other.requests[0][2]["accept"] == "*/*"


def test_redirects_end(server: FileServer) -> None:
    server.redirects["/a"] = "/a"
    with pytest.raises(SourceError, match="more than 5 redirects"):
        get(Http(stall_seconds=1, allow_private=True), server.url + "/a")


def test_certificates_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = trustme.CA()
    with file_server(authority) as server:
        server.files["/x"] = b"content"
        with pytest.raises(SourceError, match="certificate is not trusted"):
            get(Http(stall_seconds=1, allow_private=True), server.url + "/x")
        authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        assert get(Http(stall_seconds=1, allow_private=True), server.url + "/x") == b"content"
        wrong = server.url.replace("localhost", "127.0.0.1")
        with pytest.raises(SourceError, match="certificate is not trusted"):
            get(Http(stall_seconds=1, allow_private=True), wrong + "/x")


def test_a_server_that_never_answers(server: FileServer) -> None:
    server.hanging.add("/x")
    began = time.monotonic()
    with pytest.raises(TransientError, match="took too long"):
        get(Http(stall_seconds=0.2, allow_private=True), server.url + "/x")
    assert time.monotonic() - began < 5


def test_a_server_that_trickles_ends_with_the_deadline(server: FileServer) -> None:
    """No single wait is long, all together are."""
    server.files["/x"] = bytes(10_000)
    server.trickle = 0.02
    http = Http(stall_seconds=5, allow_private=True)
    with (
        http.open("GET", server.url + "/x", {}, Deadline.after(0.3)) as reply,
        pytest.raises(TransientError, match="took too long"),
    ):
        reply.read_all(2**20)
    assert 0 < server.sent["/x"] < 1000


def test_an_answer_without_end_is_cut(server: FileServer) -> None:
    server.files["/x"] = bytes(2**21)
    with pytest.raises(SourceError, match=f"longer than {2**20} bytes"):
        get(Http(stall_seconds=5, allow_private=True), server.url + "/x")


def test_hosts_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def getaddrinfo(*args: Any, **more: Any) -> Any:
        raise socket.gaierror(number, "as told")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    number = socket.EAI_NONAME
    with pytest.raises(NotFoundError, match="no such host"):
        get(Http(stall_seconds=1), "https://nowhere.example/x")
    number = socket.EAI_AGAIN
    with pytest.raises(TransientError, match="could not be resolved"):
        get(Http(stall_seconds=1), "https://nowhere.example/x")


@pytest.mark.parametrize(
    "url", ["ftp://x/y", "https://", "https:///y", "https://u:s3cret@x/y", "https://x:99999/y", "https://x/a b",
            "https://x/a\r\nhost: y", "https://x\\@y/", "https://[::1/y", "https://x:0/"],
)  # fmt: skip
def test_urls_that_are_refused(url: str) -> None:
    with pytest.raises(SourceRefusedError) as error:
        split_url(url)
    assert "s3cret" not in str(error.value)


@given(st.text(max_size=40))
def test_any_text_is_a_url_or_refused(text: str) -> None:
    for start in ("", "https://"):
        try:
            parts = split_url(start + text)
        except LorikeetError:
            continue
        assert parts.hostname and parts.username is None and (start + text).isascii()
