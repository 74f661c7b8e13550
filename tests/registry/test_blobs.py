"""The blob store in a folder and in S3 (a real server): by content, verified, resumed, collected while others put."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.registry.conftest import Clock

from lorikeet.errors import (
    ConfigError,
    ConflictError,
    DataError,
    DiskFullError,
    InvalidRequestError,
    NotFoundError,
    SourceError,
)
from lorikeet.registry import blobs as blobs_module
from lorikeet.registry import multipart, objects
from lorikeet.registry.blobs import BlobStore, DamagedBlobError, checked_path
from lorikeet.registry.catalog import Catalog
from lorikeet.registry.ledger import DOOMED_SECONDS
from lorikeet.registry.records import Actor, ManifestFile, VersionContent

DATA = bytes(range(256)) * 9000  # more than two chunks
SHA = hashlib.sha256(DATA).hexdigest()
FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": DATA, "deep/er/file": b"x"}


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of the server, with an empty bucket `blobs`."""
    import boto3
    import fsspec

    for name, value in (("ACCESS_KEY_ID", "k"), ("SECRET_ACCESS_KEY", "s"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    client = boto3.client("s3", endpoint_url=s3_server)
    client.create_bucket(Bucket="blobs")
    yield client
    for one in client.list_objects_v2(Bucket="blobs").get("Contents", []):
        client.delete_object(Bucket="blobs", Key=one["Key"])
    client.delete_bucket(Bucket="blobs")
    client.close()


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, sqlite: Catalog, tmp_path: Path, clock: Clock) -> BlobStore:
    if request.param == "folder":
        return BlobStore(tmp_path / "blobs", tmp_path, sqlite.ledger, clock=clock)
    request.getfixturevalue("bucket")
    return BlobStore("s3://blobs/some/prefix", tmp_path, sqlite.ledger, clock=clock)


@pytest.fixture
def local(sqlite: Catalog, tmp_path: Path, clock: Clock) -> BlobStore:
    return BlobStore(tmp_path / "blobs", tmp_path, sqlite.ledger, clock=clock)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, data in FILES.items():
        path = tmp_path / "mine" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "mine"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def staged(store: BlobStore) -> list[str]:
    return [path.name for path in store.staging.iterdir()]


# --- putting and reading ------------------------------------------------------------------------------------------


def test_what_was_put_is_read(store: BlobStore, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(DATA)
    seen: list[tuple[int, int]] = []
    blob = store.put(tmp_path / "data", report=lambda done, total: seen.append((done, total)))
    assert (blob.sha256, blob.bytes) == (SHA, len(DATA))
    assert seen[-1] == (len(DATA), len(DATA)) and len(seen) == 3
    assert store.put(DATA) == store.put(io.BytesIO(DATA)) == blob
    assert b"".join(store.read(SHA)) == DATA
    assert b"".join(store.read(SHA, start=1_500_000)) == DATA[1_500_000:]
    assert store.size(SHA) == len(DATA)
    assert store.read_all(store.put(b"").sha256) == b""
    assert staged(store) == []
    with pytest.raises(NotFoundError, match="holds no blob"):
        store.read_all("0" * 64)
    with pytest.raises(InvalidRequestError, match="expected 64 hexadecimal digits"):
        store.size("../../etc/passwd")


def test_a_hash_that_is_not_as_expected(store: BlobStore) -> None:
    with pytest.raises(DataError, match=f"is {SHA}, expected {'0' * 64}"):
        store.put(DATA, expected="0" * 64)
    assert staged(store) == []
    with pytest.raises(NotFoundError):
        store.size(SHA)


def test_an_upload_goes_on_where_it_ended(store: BlobStore) -> None:
    upload = store.begin("one")
    upload.write(DATA[:1000])
    upload.write(DATA[1000:1_000_000])
    again = store.begin("one")  # as after a restart
    assert again.offset == 1_000_000
    again.write(DATA[again.offset :])
    assert again.finish(SHA).sha256 == SHA
    assert store.begin("one").offset == 0
    with pytest.raises(InvalidRequestError, match="upload: found '../x'"):
        store.begin("../x")


def test_folders(store: BlobStore, folder: Path, tmp_path: Path) -> None:
    manifest = store.put_folder(folder, FILES)
    assert manifest.bytes == sum(map(len, FILES.values()))
    assert store.put_folder(folder, reversed(FILES)).sha256 == manifest.sha256  # the same files are the same folder
    assert store.manifest(manifest.sha256) == manifest
    made = store.materialise(manifest.sha256)
    assert contents(made) == FILES
    assert store.materialise(manifest.sha256) == made
    assert all(not stat.S_IMODE(path.stat().st_mode) & 0o222 for path in made.rglob("*") if path.is_file())
    part = store.materialise(manifest.sha256, only=("adapter_config.json", "absent"))
    assert contents(part) == {"adapter_config.json": b"{}"}
    exported = store.export(manifest.sha256, tmp_path / "out")
    assert contents(tmp_path / "out") == FILES and exported == manifest
    (tmp_path / "out" / "adapter_config.json").write_text("mine now")
    with pytest.raises(InvalidRequestError, match="is there already"):
        store.export(manifest.sha256, tmp_path / "out")


def test_in_a_folder_files_are_linked(local: BlobStore, folder: Path) -> None:
    made = local.materialise(local.put_folder(folder, FILES).sha256)
    blob = next((local.staging.parent / SHA[:2]).iterdir())
    assert os.path.samefile(blob, made / "adapter_model.safetensors")


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../x", "a/../b", "a//b", "a\\b", "C:x", ".", "a\n", "x" * 600])
def test_paths_that_lead_out(path: str, local: BlobStore) -> None:
    with pytest.raises(InvalidRequestError, match="file: found the path"):
        checked_path(path)
    listing = local.put(b'{"version":1,"files":[{"path":"%s","sha256":"%s","bytes":1}]}'
                        % (path.replace("\\", "\\\\").replace("\n", "\\n").encode(), SHA.encode()))  # fmt: skip
    with pytest.raises(InvalidRequestError):
        local.materialise(listing.sha256)


def test_what_is_no_manifest(local: BlobStore) -> None:
    for data in (b"no json", b"[]", b'{"version": 1}', b'{"version":1,"files":[],"more":1}'):
        with pytest.raises(DataError, match="is not a manifest"):
            local.manifest(local.put(data).sha256)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    files=st.dictionaries(
        st.from_regex(r"\A[a-z0-9_.]{1,5}(/[a-z0-9_]{1,3}){0,2}\Z"), st.binary(max_size=300), min_size=1, max_size=6
    )
)
def test_any_folder(files: dict[str, bytes], local: BlobStore, tmp_path_factory: pytest.TempPathFactory) -> None:
    names = list(files)
    if any(other != name and other.startswith(name + "/") for name in names for other in names) or any(
        part in (".", "..") for name in names for part in name.split("/")
    ):
        return
    folder = tmp_path_factory.mktemp("any")
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    assert contents(local.materialise(local.put_folder(folder, files).sha256)) == files


# --- damage -------------------------------------------------------------------------------------------------------


def damage(store: BlobStore, sha256: str, bucket: Callable[[], Any]) -> None:
    """Change a byte of a blob where it lies."""
    path = store.staging.parent / sha256[:2] / sha256
    if path.exists():
        path.chmod(0o644)
        path.write_bytes(b"\x01" + path.read_bytes()[1:])
    else:
        key = f"some/prefix/{sha256[:2]}/{sha256}"
        body = bucket().get_object(Bucket="blobs", Key=key)["Body"].read()
        bucket().put_object(Bucket="blobs", Key=key, Body=b"\x01" + body[1:])


def test_damage_is_noticed_and_mended(store: BlobStore, folder: Path, request: pytest.FixtureRequest) -> None:
    manifest = store.put_folder(folder, FILES)
    damage(store, SHA, lambda: request.getfixturevalue("bucket"))
    with pytest.raises(DamagedBlobError, match=f"the blob {SHA} is damaged"):
        store.materialise(manifest.sha256)
    assert list(store._folders.glob("[!.]*")) == []
    if store._local is not store._objects:
        with pytest.raises(DamagedBlobError):
            store.read_all(SHA)
    store.put_folder(folder, FILES)
    assert contents(store.materialise(manifest.sha256)) == FILES


def test_a_fetch_goes_on_where_it_ended(
    bucket: Any, sqlite: Catalog, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = BlobStore("s3://blobs/some/prefix", tmp_path, sqlite.ledger)
    manifest = store.put_folder(folder, FILES)
    monkeypatch.setattr(objects, "WINDOW", 1_000_000)
    whole = objects.RemoteObjects._window
    starts: list[int] = []

    def breaking(self: objects.RemoteObjects, sha256: str, start: int, stop: int) -> bytes:
        if sha256 == SHA:
            starts.append(start)
            if start == 2_000_000 and starts.count(start) == 1:
                raise SourceError("the connection broke")
        return whole(self, sha256, start, stop)

    monkeypatch.setattr(objects.RemoteObjects, "_window", breaking)
    with pytest.raises(SourceError, match="the connection broke"):
        store.materialise(manifest.sha256)
    assert contents(store.materialise(manifest.sha256)) == FILES
    assert starts == [0, 1_000_000, 2_000_000, 2_000_000]


# --- to S3 in parts -----------------------------------------------------------------------------------------------

MIB = 2**20
LARGE = hashlib.sha256(b"large").digest() * (16 * MIB // 32 + 1)  # four parts of 5 MiB, the least that S3 takes
LARGE_SHA = hashlib.sha256(LARGE).hexdigest()
KEY = f"some/prefix/{LARGE_SHA[:2]}/{LARGE_SHA}"


@pytest.fixture
def requests(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Of parts of 5 MiB, one at a time: each request for S3 by its name, and the number of its part."""
    import fsspec

    monkeypatch.setattr(multipart, "PART", 5 * MIB)
    monkeypatch.setattr(multipart, "AT_ONCE", 1)
    kind, seen = fsspec.get_filesystem_class("s3"), list[tuple[str, int]]()
    call = kind.call_s3

    def noted(self: Any, method: str, **kwargs: Any) -> Any:
        seen.append((method, kwargs.get("PartNumber", 0)))
        return call(self, method, **kwargs)

    monkeypatch.setattr(kind, "call_s3", noted)
    return seen


def under_way(bucket: Any) -> list[str]:
    return [one["Key"] for one in bucket.list_multipart_uploads(Bucket="blobs").get("Uploads", [])]


def stored(bucket: Any) -> bytes:
    body: bytes = bucket.get_object(Bucket="blobs", Key=KEY)["Body"].read()
    return body


def test_an_upload_goes_on_with_its_next_part(
    bucket: Any, requests: list[tuple[str, int]], sqlite: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    kind = fsspec.get_filesystem_class("s3")
    noted = kind.call_s3

    def breaking(self: Any, method: str, **kwargs: Any) -> Any:
        found = noted(self, method, **kwargs)
        if kwargs.get("PartNumber") == 3 and requests.count(("upload_part", 3)) == 1:
            raise ConnectionResetError("the connection broke")  # the part has arrived, and nobody was told
        return found

    monkeypatch.setattr(kind, "call_s3", breaking)
    upload = BlobStore("s3://blobs/some/prefix", tmp_path, sqlite.ledger).begin("one")
    upload.write(LARGE)
    with pytest.raises(SourceError, match="the connection broke"):
        upload.finish()
    assert under_way(bucket) == [KEY]
    again = BlobStore("s3://blobs/some/prefix", tmp_path, sqlite.ledger).begin("one")
    assert again.finish(LARGE_SHA).bytes == len(LARGE)
    assert [number for method, number in requests if method == "upload_part"] == [1, 2, 3, 4]
    assert stored(bucket) == LARGE and under_way(bucket) == []


DYING = """
import os, signal, sys
from pathlib import Path
import fsspec
from lorikeet.registry import multipart
from lorikeet.registry.blobs import BlobStore

class Ledger:
    def announce(self, sha256, size):
        return True

kind = fsspec.get_filesystem_class("s3")
call = kind.call_s3
def dying(self, method, **kwargs):
    if kwargs.get("PartNumber") == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return call(self, method, **kwargs)
kind.call_s3, multipart.PART, multipart.AT_ONCE = dying, 5 * 2**20, 1
BlobStore("s3://blobs/some/prefix", Path(sys.argv[1]), Ledger()).put(Path(sys.argv[2]))
"""


def test_an_upload_goes_on_after_kill_9(
    bucket: Any, requests: list[tuple[str, int]], sqlite: Catalog, tmp_path: Path
) -> None:
    (tmp_path / "large").write_bytes(LARGE)
    command = [sys.executable, "-c", DYING, str(tmp_path), str(tmp_path / "large")]
    assert subprocess.run(command, timeout=60).returncode == -signal.SIGKILL
    assert under_way(bucket) == [KEY]
    BlobStore("s3://blobs/some/prefix", tmp_path, sqlite.ledger).put(tmp_path / "large")
    assert [number for method, number in requests if method == "upload_part"] == [3, 4]
    assert stored(bucket) == LARGE and under_way(bucket) == []


def test_two_put_the_same_at_once(
    bucket: Any, requests: list[tuple[str, int]], sqlite: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multipart, "AT_ONCE", 2)
    store = BlobStore("s3://blobs/some/prefix", tmp_path, sqlite.ledger)
    failures: list[BaseException] = []

    def put() -> None:
        try:
            assert store.put(LARGE).sha256 == LARGE_SHA
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=put) for _ in range(3)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(60)
    assert failures == [] and stored(bucket) == LARGE
    assert b"".join(store.read(LARGE_SHA)) == LARGE


def test_parts_that_nobody_goes_on_with(
    bucket: Any, requests: list[tuple[str, int]], sqlite: Catalog, tmp_path: Path
) -> None:
    """Of another size they are sent again; after a day they go, with whatever nobody came back to."""
    begun = bucket.create_multipart_upload(Bucket="blobs", Key=KEY)["UploadId"]
    bucket.upload_part(Bucket="blobs", Key=KEY, UploadId=begun, PartNumber=1, Body=b"x" * 100)
    store = BlobStore("s3://blobs/some/prefix", tmp_path, sqlite.ledger)
    store.put(LARGE)
    assert stored(bucket) == LARGE and ("upload_part", 1) in requests
    bucket.create_multipart_upload(Bucket="blobs", Key=f"{KEY}0")
    bucket.create_multipart_upload(Bucket="blobs", Key="another/prefix")
    store._objects.abandon(0.0)
    assert len(under_way(bucket)) == 2
    store._objects.abandon(time.time() + 60)
    assert under_way(bucket) == ["another/prefix"]


def test_a_store_that_does_not_tell_what_is_under_way(
    bucket: Any, requests: list[tuple[str, int]], sqlite: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    kind = fsspec.get_filesystem_class("s3")
    noted = kind.call_s3

    def closed(self: Any, method: str, **kwargs: Any) -> Any:
        if method.startswith("list_multipart"):
            raise PermissionError("Access Denied")
        return noted(self, method, **kwargs)

    monkeypatch.setattr(kind, "call_s3", closed)
    BlobStore("s3://blobs/some/prefix", tmp_path, sqlite.ledger).put(LARGE)
    assert stored(bucket) == LARGE


def test_stores_that_cannot_be(sqlite: Catalog, tmp_path: Path, bucket: Any) -> None:
    with pytest.raises(SourceError, match="s3://nowhere/x: "):
        BlobStore("s3://nowhere/x", tmp_path, sqlite.ledger).put(DATA)
    for url in ("s3://", "gopher://x/y"):
        with pytest.raises(ConfigError, match="blobs: "):
            BlobStore(url, tmp_path, sqlite.ledger)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file is no folder, or lies in none"):
        BlobStore(tmp_path / "file", tmp_path, sqlite.ledger)


def test_a_full_disk(local: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(objects, "sync", full)
    with pytest.raises(DiskFullError, match="is full"):
        local.put(DATA)
    monkeypatch.undo()
    assert staged(local) == []
    assert local.put(DATA).sha256 == SHA


# --- collecting ---------------------------------------------------------------------------------------------------


def test_what_nothing_needs_is_removed_after_its_grace(
    store: BlobStore, sqlite: Catalog, folder: Path, clock: Clock, who: Actor
) -> None:
    sqlite.repositories.create(who, "intent")
    manifest = store.put_folder(folder, FILES)
    version = sqlite.versions.add(who, "intent", VersionContent(manifest=manifest))
    loose = store.put(b"nobody needs this").sha256
    assert store.collect() == 0
    clock.now += 3601
    assert store.collect() == 1
    with pytest.raises(NotFoundError):
        store.size(loose)
    sqlite.versions.delete(who, "intent", 1)
    assert sqlite.versions.collect(clock.now) == 0  # deleted not before now
    clock.now += 1
    assert sqlite.versions.collect(clock.now) == 1
    clock.now += 3601
    assert store.collect() == len(FILES) + 1
    assert sqlite.ledger.totals() == (0, 0)
    assert sqlite.versions.by_id(who, version.id).collected == clock.now - 3601


def test_what_two_versions_share_stays(
    local: BlobStore, sqlite: Catalog, folder: Path, clock: Clock, who: Actor
) -> None:
    sqlite.repositories.create(who, "intent")
    first = local.put_folder(folder, FILES)
    second = local.put_folder(folder, ["adapter_model.safetensors"])
    for manifest in (first, second):
        sqlite.versions.add(who, "intent", VersionContent(manifest=manifest))
    sqlite.versions.delete(who, "intent", 1)
    clock.now += 10_000
    sqlite.versions.collect(clock.now)
    assert local.collect() == 3  # two files and the first list of them
    assert contents(local.materialise(second.sha256)) == {"adapter_model.safetensors": DATA}


def test_a_put_waits_while_its_blob_is_removed(local: BlobStore, sqlite: Catalog, clock: Clock) -> None:
    local.put(DATA)
    clock.now += 10_000
    assert sqlite.ledger.doom(clock.now) == [SHA]
    done: list[str] = []
    thread = threading.Thread(target=lambda: done.append(local.put(DATA).sha256))
    thread.start()
    time.sleep(0.2)
    assert done == []
    local._objects.remove(SHA)
    sqlite.ledger.forget(SHA)
    thread.join(20)
    assert done == [SHA] and local.read_all(SHA) == DATA


def test_a_collector_that_died_holds_nobody_up_for_long(local: BlobStore, sqlite: Catalog, clock: Clock) -> None:
    local.put(DATA)
    clock.now += 10_000
    sqlite.ledger.doom(clock.now)
    clock.now += DOOMED_SECONDS + 1
    assert local.put(DATA).sha256 == SHA
    assert local.collect() == 0


def test_collecting_beside_uploads(sqlite: Catalog, tmp_path: Path, who: Actor) -> None:
    """With no grace at all: what became a version is whole, and what did not says so."""
    sqlite.database.clock = time.time
    store = BlobStore(tmp_path / "blobs", tmp_path, sqlite.ledger)
    sqlite.repositories.create(who, "r")
    stop = threading.Event()
    failures: list[BaseException] = []
    added: list[tuple[int, int]] = []

    def upload(seed: int) -> None:
        for turn in range(12):
            data = b"%d" % ((seed + turn) % 4)  # contents that come again and again
            try:
                manifest = store.put_manifest([_file(store, data)])
                version = sqlite.versions.add(who, "r", VersionContent(manifest=manifest))
                folder = store.materialise(manifest.sha256)
                assert (folder / "weights").read_bytes() == data
                added.append((version.number, turn))
                sqlite.versions.delete(who, "r", version.number)
            except ConflictError as error:
                assert "does not hold the blob" in error.message
            except BaseException as error:
                failures.append(error)
                return

    def collect() -> None:
        while not stop.is_set():
            try:
                sqlite.versions.collect(time.time() + 1)
                store.collect(grace_seconds=-1)
            except BaseException as error:
                failures.append(error)
                return

    collector = threading.Thread(target=collect)
    uploaders = [threading.Thread(target=upload, args=(seed,)) for seed in range(6)]
    for thread in (collector, *uploaders):
        thread.start()
    for thread in uploaders:
        thread.join(60)
    stop.set()
    collector.join(60)
    assert failures == []
    assert added
    kept = store.put_manifest([_file(store, b"kept")])
    sqlite.versions.add(who, "r", VersionContent(manifest=kept))
    sqlite.versions.collect(time.time() + 1)
    store.collect(grace_seconds=-1)
    assert sqlite.ledger.totals()[0] == 2 and contents(store.materialise(kept.sha256)) == {"weights": b"kept"}


def _file(store: BlobStore, data: bytes) -> ManifestFile:
    blob = store.put(data)
    return ManifestFile(path="weights", sha256=blob.sha256, bytes=blob.bytes)


def test_folders_are_trimmed_but_those_in_use(
    store: BlobStore, folder: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    first = store.materialise(store.put_folder(folder, FILES).sha256)
    second = store.materialise(store.put_folder(folder, ["adapter_config.json"]).sha256)
    os.utime(first, (1, 1))
    store.trim(len(DATA) * 2)
    assert first.is_dir()
    store.trim(100)
    assert not first.is_dir() and second.is_dir()
    monkeypatch.setattr(blobs_module, "RECENT_SECONDS", -1.0)
    store.trim(0)
    assert list(store._folders.glob("[!.]*")) == []
    if store._local is not store._objects:
        assert list(store._local.folder.glob("??/*")) == []
    assert store.read_all(SHA) == DATA  # the store itself is not trimmed


def test_what_crashed_uploads_left_goes(local: BlobStore) -> None:
    old, fresh = local.begin("old"), local.begin("fresh")
    old.write(b"1")
    fresh.write(b"2")
    os.utime(local.staging / "upload-old", (1, 1))
    local.collect()
    assert staged(local) == ["upload-fresh"]
