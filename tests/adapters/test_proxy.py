"""Fetching through a proxy: only where it is asked for, to the address that was checked, and past it for NO_PROXY."""

from __future__ import annotations

import base64
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import trustme
from tests.adapters.relays import Relay, relay
from tests.adapters.servers import FileServer, file_server, publish

from lorikeet.adapters.configs import CONFIG
from lorikeet.adapters.files import WEIGHTS
from lorikeet.adapters.proxy import Proxy
from lorikeet.adapters.sources import fetch
from lorikeet.config import SourceConfig
from lorikeet.errors import ConfigError, LorikeetError, NotFoundError, SourceError, SourceRefusedError
from lorikeet.server.fetcher import Fetcher

FILES = {CONFIG: b"{}", WEIGHTS: (16).to_bytes(8, "little") + b"{}".ljust(16) + bytes(300_000)}
TIMES: dict[str, Any] = {
    "stall_seconds": 5, "total_seconds": 10, "attempts": 2, "backoff_seconds": 0.01, "longest_backoff": 0.01,
}  # fmt: skip
PROXIED = SourceConfig(use_proxy=True, **TIMES)
FREE = SourceConfig(use_proxy=True, allow_private=True, **TIMES)
NAMES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy")


@pytest.fixture(autouse=True)
def no_proxy_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
    with file_server(authority, "adapters.example", "localhost") as server:
        server.files |= {f"/one/{name}": data for name, data in FILES.items()}
        yield server


@pytest.fixture
def proxy(tls: FileServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Relay]:
    """Whatever it is asked for, it leads to `tls`."""
    with relay(("127.0.0.1", urlsplit(tls.url).port or 0), tunnels=True) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", "http://{}:{}".format(*proxy.address))
        yield proxy


def resolve(monkeypatch: pytest.MonkeyPatch, **addresses: list[str]) -> None:
    """Names under `.example` have these addresses, by their first part, or none."""
    usual = socket.getaddrinfo

    def getaddrinfo(host: str, port: int, *rest: Any, **more: Any) -> list[Any]:
        if not str(host).endswith(".example"):
            return usual(host, port, *rest, **more)
        found = addresses.get(host.partition(".")[0])
        if found is None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, port)) for one in found]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_proxy_is_told_the_address_that_was_checked(
    proxy: Relay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The certificate is that of the name all the same; a connection that breaks off is resumed."""
    resolve(monkeypatch, adapters=["8.8.8.8"])
    proxy.drop_after = [100_000]
    assert contents(fetch("https://adapters.example/one", tmp_path, None, PROXIED)) == FILES
    assert {lines[0] for lines in proxy.asked} == {"CONNECT 8.8.8.8:443 HTTP/1.1"}
    assert not any("authorization" in line.lower() for lines in proxy.asked for line in lines)


def test_private_addresses_are_refused_before_the_proxy_hears_of_them(
    proxy: Relay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve(monkeypatch, adapters=["8.8.8.8", "169.254.169.254"])
    for url in ("https://adapters.example/one", "https://10.0.0.7/one", "https://[::1]/one"):
        with pytest.raises(SourceRefusedError, match="address; adapters come from public addresses alone"):
            fetch(url, tmp_path, None, PROXIED)
    with pytest.raises(SourceRefusedError, match="found http://, expected https://"):
        fetch("http://adapters.example/one", tmp_path, None, PROXIED)
    assert proxy.asked == []


def test_a_name_that_only_the_proxy_resolves_needs_the_check_to_be_off(
    proxy: Relay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve(monkeypatch)
    with pytest.raises(NotFoundError, match="there is no such host"):
        fetch("https://adapters.example/one", tmp_path, None, PROXIED)
    assert contents(fetch("https://adapters.example/one", tmp_path, None, FREE)) == FILES
    assert {lines[0] for lines in proxy.asked} == {"CONNECT adapters.example:443 HTTP/1.1"}


def test_hosts_of_no_proxy_are_reached_without_it(
    proxy: Relay, tls: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "example.com, localhost")
    assert contents(fetch(f"{tls.url}/one", tmp_path, None, FREE)) == FILES
    assert proxy.asked == []
    monkeypatch.setenv("NO_PROXY", "example.com")
    tls.files |= {f"/two/{name}": data for name, data in FILES.items()}
    fetch(f"{tls.url}/two", tmp_path, None, FREE)
    assert proxy.asked[0][0] == f"CONNECT localhost:{urlsplit(tls.url).port} HTTP/1.1"


def test_user_and_password_go_to_the_proxy_alone(
    proxy: Relay, tls: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://ann:p%40ss@{}:{}".format(*proxy.address))
    resolve(monkeypatch, adapters=["8.8.8.8"])
    fetch("https://adapters.example/one", tmp_path, None, PROXIED)
    sent = base64.b64encode(b"ann:p@ss").decode()
    assert all(f"Proxy-Authorization: Basic {sent}" in lines for lines in proxy.asked)
    assert not any("proxy-authorization" in headers for _, _, headers in tls.requests)
    assert "p@ss" not in repr(Proxy.of_environment()) and sent not in repr(Proxy.of_environment())


@pytest.mark.parametrize(
    ("status", "message"),
    [
        ("407 Authentication Required", "answered 407 to CONNECT 8.8.8.8:443.*user and password into HTTPS_PROXY"),
        ("403 Forbidden", "answered 403 to CONNECT 8.8.8.8:443.*what it lets pass is its owner's choice"),
        ("502 Bad Gateway", r"through the proxy .*answered 502.*, 2 times in a row"),
        ("nothing", "the proxy does not speak HTTP, 2 times in a row"),
    ],
)
def test_what_a_proxy_refuses_is_said(
    status: str, message: str, proxy: Relay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://ann:secret@{}:{}".format(*proxy.address))
    resolve(monkeypatch, adapters=["8.8.8.8"])
    proxy.status = status
    with pytest.raises(SourceError, match=message) as caught:
        fetch("https://adapters.example/one", tmp_path, None, PROXIED)
    assert "secret" not in f"{caught.value.message} {caught.value.hint}"


def test_the_hub_goes_through_the_proxy_by_its_name(
    proxy: Relay, tls: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operator chose its address; a place that it redirects to is checked like any other."""
    resolve(monkeypatch)
    monkeypatch.setenv("HF_ENDPOINT", "https://adapters.example")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    commit = publish(tls, "org/name", FILES)
    assert contents(fetch("hf://org/name", tmp_path, None, PROXIED)) == FILES
    assert {lines[0] for lines in proxy.asked} == {"CONNECT adapters.example:443 HTTP/1.1"}
    tls.redirects[f"/org/other/resolve/{commit}/{WEIGHTS}"] = "https://10.0.0.7/stolen"
    tls.files["/api/models/org/other/revision/main"] = tls.files["/api/models/org/name/revision/main"]
    tls.files[f"/org/other/resolve/{commit}/{CONFIG}"] = FILES[CONFIG]
    monkeypatch.setattr("lorikeet.adapters.download.Store._known", lambda store, file: None)
    with pytest.raises(SourceRefusedError, match="private address"):
        fetch("hf://org/other", tmp_path, None, PROXIED)


def test_without_the_flag_no_proxy_is_used_and_a_failure_says_so(
    proxy: Relay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve(monkeypatch, refused=["127.0.0.1"])
    plain = SourceConfig(allow_private=True, **TIMES)
    said = r"HTTPS_PROXY is set, but used with --source-proxy alone"
    with pytest.raises(NotFoundError, match=said):
        fetch("https://unknown.example/one", tmp_path, None, plain)
    with pytest.raises(SourceError, match=said):
        fetch("https://refused.example:1/one", tmp_path, None, plain)
    monkeypatch.setenv("NO_PROXY", ".example")
    with pytest.raises(LorikeetError) as caught:
        fetch("https://unknown.example/one", tmp_path, None, plain)
    assert "HTTPS_PROXY" not in caught.value.message and proxy.asked == []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "--source-proxy: HTTPS_PROXY is not set"),
        ("https://ann:secret@proxy.example:3128", "HTTPS_PROXY: expected http://host:port.*found https://"),
        ("socks5://proxy.example:1080", "found socks5://"),
        ("http://proxy.example:port", "expected http://host:port"),
        ("http://", "expected http://host:port"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_said_at_the_start(
    value: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is not None:
        monkeypatch.setenv("HTTPS_PROXY", value)
    with pytest.raises(ConfigError, match=message) as caught:
        Fetcher(("https",), tmp_path, PROXIED)
    assert "secret" not in f"{caught.value.message} {caught.value.hint}"
    Fetcher(("https",), tmp_path, SourceConfig(**TIMES))  # not asked for


def test_forms_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "proxy.example:3128")
    assert Proxy.of_environment() == Proxy("proxy.example", 3128)
    monkeypatch.delenv("https_proxy")
    monkeypatch.setenv("ALL_PROXY", "http://[2001:db8::1]:8080/")
    assert Proxy.of_environment() == Proxy("2001:db8::1", 8080)
