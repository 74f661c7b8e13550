"""Google Cloud Storage and Azure through gcsfs and adlfs, where these are installed, against fakes of both."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.adapters.servers import FileServer, file_server

from lorikeet.adapters import sources
from lorikeet.adapters.configs import CONFIG
from lorikeet.adapters.files import WEIGHTS
from lorikeet.adapters.references import Credentials
from lorikeet.adapters.sources import fetch
from lorikeet.config import SourceConfig
from lorikeet.errors import NotFoundError, SourceRefusedError

FILES = {CONFIG: b'{"r": 8}', WEIGHTS: (16).to_bytes(8, "little") + b"{}".ljust(16) + b"\x07" * 3_000_000}
CONFIGURED = SourceConfig(stall_seconds=5, total_seconds=20, attempts=2, backoff_seconds=0.01)
SAS = "sv=2024-01-01&se=2099-01-01&sp=r&sig=abc"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    sources._file_system.cache_clear()  # the endpoint is the environment's, which no server changes while it runs
    with file_server() as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        key = base64.b64encode(b"k" * 32).decode()
        account = f"AccountName=acct;AccountKey={key};BlobEndpoint={server.url}/acct;"
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", f"DefaultEndpointsProtocol=http;{account}")
        monkeypatch.setattr(sources, "WINDOW", 700_000)
        yield server


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_google(server: FileServer, tmp_path: Path) -> None:
    pytest.importorskip("gcsfs")
    for name, data in FILES.items():
        md5 = base64.b64encode(hashlib.md5(data).digest()).decode()
        about = {"name": f"one/{name}", "bucket": "box", "size": str(len(data)), "etag": "CJ=", "md5Hash": md5}
        server.files[f"/storage/v1/b/box/o/one%2F{name}"] = json.dumps(about).encode()
        server.files[f"/download/storage/v1/b/box/o/one%2F{name}"] = data
    server.headers["content-type"] = "application/json"
    assert contents(fetch("gs://box/one", tmp_path, Credentials("token"), CONFIGURED)) == FILES
    assert all(headers["authorization"] == "Bearer token" for _, _, headers in server.requests)
    for missing in ("gs://box/none", "gs://other/one"):
        with pytest.raises(NotFoundError):
            fetch(missing, tmp_path, Credentials("token"), CONFIGURED)


def test_azure(server: FileServer, tmp_path: Path) -> None:
    pytest.importorskip("adlfs")
    server.files |= {f"/acct/box/one/{name}": data for name, data in FILES.items()}
    then = "Wed, 21 Oct 2015 07:28:00 GMT"
    server.headers |= {"x-ms-blob-type": "BlockBlob", "last-modified": then, "x-ms-creation-time": then}
    assert contents(fetch("az://box/one", tmp_path / "a", None, CONFIGURED)) == FILES
    assert all(headers["authorization"].startswith("SharedKey acct:") for _, _, headers in server.requests)
    server.requests.clear()
    assert contents(fetch("abfs://box/one", tmp_path / "b", Credentials(SAS), CONFIGURED)) == FILES
    assert all("authorization" not in headers and "sig=abc" in path for _, path, headers in server.requests)
    with pytest.raises(NotFoundError):
        fetch("az://box/none", tmp_path, None, CONFIGURED)
    with pytest.raises(SourceRefusedError, match="expected a SAS token"):
        fetch("az://box/one", tmp_path, Credentials("key"), CONFIGURED)


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("kind", ["gs", "az"])
def test_a_store_that_says_no_is_a_404(kind: str, status: int, server: FileServer, tmp_path: Path) -> None:
    pytest.importorskip({"gs": "gcsfs", "az": "adlfs"}[kind])
    for name in FILES:
        server.statuses[f"/storage/v1/b/box/o/one%2F{name}"] = [status] * 50
        server.statuses[f"/acct/box/one/{name}"] = [status] * 50
    with pytest.raises(NotFoundError, match="or not for these credentials"):
        fetch(f"{kind}://box/one", tmp_path, Credentials(SAS), CONFIGURED)
