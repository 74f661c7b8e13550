"""Google Cloud Storage and Azure through gcsfs and adlfs, against servers that speak as they do."""

from __future__ import annotations

import asyncio
import base64
import logging
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from tests.adapters.relays import Relay, relay
from tests.adapters.servers import FileServer, file_server
from tests.adapters.stores import ACCOUNT, BUCKET, KEY, azurite, azurite_is_there, google, put_google

from lorikeet.adapters import sources
from lorikeet.adapters.configs import CONFIG
from lorikeet.adapters.files import WEIGHTS
from lorikeet.adapters.references import Credentials, parse
from lorikeet.adapters.sources import fetch
from lorikeet.config import SourceConfig
from lorikeet.errors import ConfigError, DeadlineError, NotFoundError, SourceError, SourceRefusedError
from lorikeet.server.fetcher import Fetcher

WEIGHT = (16).to_bytes(8, "little") + b"{}".ljust(16) + bytes(range(256)) * 12_000
FILES = {CONFIG: b'{"r": 8}', WEIGHTS: WEIGHT}
OTHER = {CONFIG: b'{"r": 8}', WEIGHTS: WEIGHT[:24] + WEIGHT[24:][::-1]}
CONFIGURED = SourceConfig(stall_seconds=5, total_seconds=20, attempts=2, backoff_seconds=0.01)
IMPATIENT = SourceConfig(stall_seconds=0.7, total_seconds=20, attempts=2, backoff_seconds=0.01)
SIZE = 700_000  # of a window
TOKEN = "token-of-alice"
PROXIES = [name for one in ("http", "https", "all", "no") for name in (f"{one}_proxy", f"{one.upper()}_PROXY")]
needs_azurite = pytest.mark.skipif(not azurite_is_there(), reason="scripts/install_azurite.sh installs Azurite")


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    sources._file_system.cache_clear()  # endpoints are the environment's, which no server changes while it runs
    monkeypatch.setattr(sources, "WINDOW", SIZE)
    for name in ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_CONNECTION_STRING", *PROXIES):
        monkeypatch.delenv(name, raising=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def missing(reference: str, store: Path, credentials: Credentials | None) -> None:
    with pytest.raises(NotFoundError, match="or not for these credentials"):
        fetch(reference, store, credentials, CONFIGURED)


def broken_off(way: Relay, reference: str, store: Path, credentials: Credentials | None) -> None:
    """What had come is not asked for again, but for the window that broke off."""
    way.passed, way.drop_after = 0, [SIZE + 1]
    config = SourceConfig(stall_seconds=5, total_seconds=20, attempts=3, backoff_seconds=0.01)
    assert contents(fetch(reference, store, credentials, config)) == FILES
    assert way.drop_after == [] and way.passed < len(WEIGHT) + 1.5 * SIZE


def hangs(way: Relay, reference: str, store: Path, credentials: Credentials | None) -> None:
    way.hanging, began = True, time.monotonic()
    with pytest.raises(DeadlineError) as caught:
        fetch(reference, store, credentials, SourceConfig(stall_seconds=30, total_seconds=1.5))
    assert caught.value.status == 504 and time.monotonic() - began < 10


# --- Google -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def google_server() -> Iterator[tuple[str, int]]:
    with google() as address:
        for folder, files in (("one", FILES), ("two", FILES)):
            for name, data in files.items():
                put_google(address, f"{folder}/{name}", data)
        yield address


@pytest.fixture
def way_to_google(google_server: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> Iterator[Relay]:
    """In front of the server, which lets everybody in: it lets pass who has `TOKEN`."""
    with relay(google_server) as way:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://{}:{}".format(*way.address))
        way.tokens = {TOKEN}
        yield way


def test_google(way_to_google: Relay, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    alice = Credentials(TOKEN)
    assert contents(fetch("gs://box/one", tmp_path, alice, CONFIGURED)) == FILES
    for reference in ("gs://box/none", "gs://other/one"):
        missing(reference, tmp_path, alice)
    for credentials in (Credentials("token-of-bob"), Credentials("token-of-nobody")):
        missing("gs://box/one", tmp_path, credentials)
    assert "token-of" not in caplog.text


def test_google_is_resumed(way_to_google: Relay, tmp_path: Path) -> None:
    broken_off(way_to_google, "gs://box/one", tmp_path, Credentials(TOKEN))


def test_a_google_that_hangs_is_a_504(way_to_google: Relay, tmp_path: Path) -> None:
    hangs(way_to_google, "gs://box/one", tmp_path, Credentials(TOKEN))


def test_google_says_the_hash(
    way_to_google: Relay, google_server: tuple[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The object is another one after it was looked at."""
    usual = sources.ObjectSource._windows

    def replaced(source: Any, file: Any, start: int, deadline: Any) -> Iterator[bytes]:
        if file.name == WEIGHTS:
            put_google(google_server, f"two/{WEIGHTS}", OTHER[WEIGHTS])
        yield from usual(source, file, start, deadline)

    monkeypatch.setattr(sources.ObjectSource, "_windows", replaced)
    with pytest.raises(SourceError, match=f"{WEIGHTS}: its md5 is"):
        fetch("gs://box/two", tmp_path, Credentials(TOKEN), CONFIGURED)


def test_google_is_reached_through_the_proxy_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://storage.invalid")
    with file_server() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        missing("gs://box/one", tmp_path, Credentials(TOKEN))
        assert proxy.requests[0][1].startswith("http://storage.invalid/storage/v1/b/box/o")  # the file, or a listing


async def _tenants(fetcher: Fetcher, reference: str, alice: Credentials, bob: Credentials) -> None:
    """Whoever loaded it: another one's credentials are asked for."""
    folder = await fetcher.folder(parse(reference), alice)
    assert contents(folder) == FILES
    with pytest.raises(NotFoundError, match="or not for these credentials"):
        await fetcher.folder(parse(reference), bob)
    assert await fetcher.folder(parse(reference), alice) == folder


def test_what_one_loaded_from_google_another_does_not_see(way_to_google: Relay, tmp_path: Path) -> None:
    fetcher = Fetcher(("gs",), tmp_path, CONFIGURED)
    asyncio.run(_tenants(fetcher, "gs://box/one", Credentials(TOKEN), Credentials("token-of-bob")))


# --- Azure --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def azure_server() -> Iterator[tuple[str, int]]:
    from azure.storage.blob import BlobServiceClient

    with azurite() as address:
        with BlobServiceClient(f"http://{address[0]}:{address[1]}/{ACCOUNT}", credential=KEY) as client:
            for container in (BUCKET, "other"):
                client.create_container(container)
                for name, data in FILES.items():
                    client.get_blob_client(container, f"one/{name}").upload_blob(data)
        yield address


@pytest.fixture
def way_to_azure(azure_server: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> Iterator[Relay]:
    with relay(azure_server) as way:
        endpoint = "http://{}:{}/{}".format(*way.address, ACCOUNT)
        account = f"AccountName={ACCOUNT};AccountKey={KEY};BlobEndpoint={endpoint};"
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", f"DefaultEndpointsProtocol=http;{account}")
        yield way


def sas(container: str = BUCKET, hours: int = 1, key: str = KEY) -> str:
    from azure.storage.blob import generate_container_sas

    expiry = datetime.now(UTC) + timedelta(hours=hours)
    return str(generate_container_sas(ACCOUNT, container, account_key=key, permission="r", expiry=expiry))


@needs_azurite
def test_azure(way_to_azure: Relay, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With the server's own credentials, and with those of a request."""
    caplog.set_level(logging.DEBUG)
    folder = fetch("az://box/one", tmp_path, None, CONFIGURED)
    assert contents(folder) == FILES
    good = sas()
    assert fetch("abfs://box/one", tmp_path, Credentials(good), CONFIGURED) == folder
    stranger = base64.b64encode(b"x" * 64).decode()
    for token in (sas("other"), sas(hours=-1), sas(key=stranger)):
        missing("az://box/one", tmp_path, Credentials(token))
    for reference in ("az://box/none", "az://nowhere/one"):
        missing(reference, tmp_path, None)
    with pytest.raises(SourceRefusedError, match="expected a SAS token"):
        fetch("az://box/one", tmp_path, Credentials("key"), CONFIGURED)
    assert good.split("sig=")[1].split("&")[0] not in caplog.text


@needs_azurite
def test_azure_without_credentials_of_the_server(
    way_to_azure: Relay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING")
    with pytest.raises(ConfigError, match="AZURE_STORAGE_ACCOUNT_NAME"):
        fetch("az://box/one", tmp_path, Credentials(sas()), CONFIGURED)
    endpoint = "http://{}:{}/{}".format(*way_to_azure.address, ACCOUNT)
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", f"BlobEndpoint={endpoint};AccountName={ACCOUNT}")
    assert contents(fetch("az://box/one", tmp_path, Credentials(sas()), CONFIGURED)) == FILES


@needs_azurite
def test_azure_is_resumed(way_to_azure: Relay, tmp_path: Path) -> None:
    broken_off(way_to_azure, "az://box/one", tmp_path, Credentials(sas()))


@needs_azurite
def test_an_azure_that_hangs_is_a_504(way_to_azure: Relay, tmp_path: Path) -> None:
    hangs(way_to_azure, "az://box/one", tmp_path, Credentials(sas()))


@needs_azurite
def test_azure_is_reached_through_the_proxy_of_the_environment(
    way_to_azure: Relay, azure_server: tuple[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = "http://{}:{}/{}".format(*azure_server, ACCOUNT)
    account = f"AccountName={ACCOUNT};AccountKey={KEY};BlobEndpoint={endpoint};"
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", f"DefaultEndpointsProtocol=http;{account}")
    monkeypatch.setenv("HTTP_PROXY", "http://{}:{}".format(*way_to_azure.address))
    assert contents(fetch("az://box/one", tmp_path, Credentials(sas()), CONFIGURED)) == FILES
    assert way_to_azure.passed > len(WEIGHT)


@needs_azurite
@pytest.mark.parametrize("in_parts", [False, True])
def test_another_object_midway_is_noticed(
    in_parts: bool, way_to_azure: Relay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the hash that Azure announces, or, of what was uploaded in parts, by its ETag."""
    from azure.storage.blob import BlobServiceClient

    endpoint = "http://{}:{}/{}".format(*way_to_azure.address, ACCOUNT)
    smallest = 2**20 if in_parts else 64 * 2**20
    with BlobServiceClient(endpoint, credential=KEY, max_single_put_size=smallest, max_block_size=2**20) as client:

        def put(data: bytes) -> None:
            client.get_blob_client(BUCKET, f"two/{WEIGHTS}").upload_blob(data, overwrite=True)

        client.get_blob_client(BUCKET, f"two/{CONFIG}").upload_blob(FILES[CONFIG], overwrite=True)
        put(WEIGHT)
        assert contents(fetch("az://box/two", tmp_path / "before", None, CONFIGURED)) == FILES
        usual = sources.ObjectSource._windows

        def replaced(source: Any, file: Any, start: int, deadline: Any) -> Iterator[bytes]:
            if file.name == WEIGHTS:
                put(OTHER[WEIGHTS])
            yield from usual(source, file, start, deadline)

        monkeypatch.setattr(sources.ObjectSource, "_windows", replaced)
        put(WEIGHT)
        said = "it changed while it was read" if in_parts else "its md5 is"
        with pytest.raises(SourceError, match=f"{WEIGHTS}: {said}"):
            fetch("az://box/two", tmp_path / "after", None, CONFIGURED)


@needs_azurite
def test_what_one_loaded_from_azure_another_does_not_see(way_to_azure: Relay, tmp_path: Path) -> None:
    fetcher = Fetcher(("az",), tmp_path, CONFIGURED)
    asyncio.run(_tenants(fetcher, "az://box/one", Credentials(sas()), Credentials(sas("other"))))


# --- both ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """Answers as it is told."""
    with file_server() as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        account = f"AccountName={ACCOUNT};AccountKey={KEY};BlobEndpoint={server.url}/{ACCOUNT};"
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", f"DefaultEndpointsProtocol=http;{account}")
        yield server


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("kind", ["gs", "az"])
def test_a_store_that_says_no_is_a_404(kind: str, status: int, server: FileServer, tmp_path: Path) -> None:
    for name in FILES:
        server.statuses[f"/storage/v1/b/box/o/one%2F{name}"] = [status] * 50
        server.statuses[f"/{ACCOUNT}/box/one/{name}"] = [status] * 50
    missing(f"{kind}://box/one", tmp_path, Credentials("sv=2024-01-01&se=2099-01-01&sp=r&sig=abc"))


@pytest.mark.parametrize("kind", ["gs", "az"])
def test_a_store_with_troubles_is_tried_again(kind: str, server: FileServer, tmp_path: Path) -> None:
    for name in FILES:
        server.statuses[f"/storage/v1/b/box/o/one%2F{name}"] = [503] * 50
        server.statuses[f"/{ACCOUNT}/box/one/{name}"] = [503] * 50
    with pytest.raises(SourceError, match="2 times in a row"):
        fetch(f"{kind}://box/one", tmp_path, Credentials("sv=2024-01-01&se=2099-01-01&sp=r&sig=abc"), IMPATIENT)
