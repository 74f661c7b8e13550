"""References, and fetching from each kind of source: a TLS server, a fake of the hub, a real S3 server, folders."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st
from tests.adapters.servers import FileServer, file_server, publish

from lorikeet.adapters import sources
from lorikeet.adapters.configs import CONFIG
from lorikeet.adapters.files import LOCK, WEIGHTS
from lorikeet.adapters.references import Credentials, Reference, parse
from lorikeet.adapters.sources import escaping_link, fetch
from lorikeet.config import SourceConfig
from lorikeet.errors import (
    AdapterError,
    ConfigError,
    DeadlineError,
    LorikeetError,
    NotFoundError,
    SourceError,
    SourceRefusedError,
)

TOKEN = "s3cret-of-one"
FAST = SourceConfig(
    allow_private=True, stall_seconds=2, attempt_seconds=5, total_seconds=10, backoff_seconds=0.01, longest_backoff=0.02
)


def some_adapter(size: int = 3_000_000, seed: int = 0) -> dict[str, bytes]:
    """Files of an adapter; its weights only begin as such do."""
    head = (16).to_bytes(8, "little") + b"{}".ljust(16)
    block = hashlib.sha256(str(seed).encode()).digest()
    body = (block * (size // 32 + 1))[: size - len(head)]
    return {CONFIG: b'{"peft_type": "LORA"}', WEIGHTS: head + body, LOCK: b'{"version": 1}'}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "downloads"


# --- references ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "source", "expected"),
    [
        ("hf://org/name", None, Reference("hf", "org/name")),
        ("hf://org/name@refs/pr/1", None, Reference("hf", "org/name", "refs/pr/1")),
        ("org/name@main", "hf", Reference("hf", "org/name", "main")),
        ("s3://bucket/a/b/", None, Reference("s3", "bucket/a/b")),
        ("bucket/a", "s3", Reference("s3", "bucket/a")),
        ("gcs://bucket/a", None, Reference("gs", "bucket/a")),
        ("abfs://box/a", None, Reference("az", "box/a")),
        ("https://host:8443/a/b/", None, Reference("https", "https://host:8443/a/b")),
        ("host/a", "https", Reference("https", "https://host/a")),
        ("/a/b", None, Reference("local", "/a/b")),
        ("hf://o/n#sha256=" + "a" * 64, None, Reference("hf", "o/n", None, "a" * 64)),
    ],
)
def test_references(text: str, source: str | None, expected: Reference) -> None:
    assert parse(text, source) == expected
    assert parse(str(expected)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "hf://name", "hf://org/name/more", "hf://../name", "hf://org/..", "hf://org/name@", "hf://org/name@../x",
        "hf://org/na me", "hf:///etc/passwd", "s3://bucket", "s3://bucket/../a", "s3://bucket//a", "s3://B_/a",
        "s3://bucket/a/./b", "az://box@account/a", "ftp://host/a", "https://host/a.zip", "https://host/a.tar.gz",
        "https://host/a/../b", "https://host/a?token=1", "https://user:secret@host/a", "hf://org/name#md5=1",
        "hf://org/name#sha256=xyz", "s3://bucket/a\x00b",
    ],
)  # fmt: skip
def test_references_that_are_refused(text: str) -> None:
    with pytest.raises(SourceRefusedError):
        parse(text)


def test_what_is_refused_says_why() -> None:
    with pytest.raises(SourceRefusedError, match=r"archives are not unpacked \(give the URL of a folder"):
        parse("https://host/adapter.zip")
    with pytest.raises(SourceRefusedError, match=r"found ftp://; expected one of hf://, s3://"):
        parse("ftp://host/a")
    with pytest.raises(SourceRefusedError, match="not a reference of the source 'hf'"):
        parse("s3://bucket/a", "hf")


@given(st.text(max_size=60), st.sampled_from(["", "hf://", "s3://", "az://", "https://", "file://"]))
def test_any_text_is_a_reference_or_refused(text: str, scheme: str) -> None:
    try:
        reference = parse(scheme + text)
    except LorikeetError:
        return
    if reference.kind != "local":
        assert ".." not in reference.location.split("/") and parse(str(reference)) == reference


def test_secrets_are_not_shown() -> None:
    assert TOKEN not in repr(Credentials(TOKEN)) + str(Credentials(TOKEN))
    with pytest.raises(SourceRefusedError) as error:
        Credentials(TOKEN + "\r\nhost: elsewhere")
    assert TOKEN not in str(error.value) and error.value.param == "api_token"


# --- https --------------------------------------------------------------------------------------------------------


@pytest.fixture
def tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
    with file_server(authority) as server:
        yield server


def put(server: FileServer, folder: str, files: dict[str, bytes]) -> str:
    server.files |= {f"{folder}/{name}": data for name, data in files.items()}
    return server.url + folder


def test_https(tls: FileServer, store: Path) -> None:
    files = some_adapter()
    url = put(tls, "/one", {**files, "README.md": b"not taken", "adapter_model.bin": b"never taken"})
    folder = fetch(url, store, None, FAST)
    assert contents(folder) == files and folder.is_relative_to(store)
    assert not any("README" in path or path.endswith(".bin") for _, path, _ in tls.requests)
    sent = tls.sent.total()
    assert fetch(url, store, None, FAST) == folder and tls.sent.total() == sent


def test_a_lock_need_not_be_there(tls: FileServer, store: Path) -> None:
    files = some_adapter(1000)
    del files[LOCK]
    assert contents(fetch(put(tls, "/one", files), store, None, FAST)) == files


def test_connections_that_drop_are_resumed(tls: FileServer, store: Path) -> None:
    """As many bytes are served as there are: what had come was not asked for again."""
    files = some_adapter()
    url = put(tls, "/one", files)
    tls.drop_after = [1_000_000, 1, 500_000, 12_345]
    assert contents(fetch(url, store, None, FAST)) == files
    weights = f"/one/{WEIGHTS}"
    assert tls.sent[weights] == len(files[WEIGHTS]) and tls.asked("GET", weights) == 5
    ranges = [headers.get("range") for method, path, headers in tls.requests if (method, path) == ("GET", weights)]
    assert ranges == [None, "bytes=1000000-", "bytes=1000001-", "bytes=1500001-", "bytes=1512346-"]


def test_without_ranges_it_begins_again(tls: FileServer, store: Path) -> None:
    files = some_adapter()
    url = put(tls, "/one", files)
    tls.ranges, tls.drop_after = False, [1_000_000]
    assert contents(fetch(url, store, None, FAST)) == files
    assert tls.sent[f"/one/{WEIGHTS}"] == 4_000_000


def test_a_server_without_head(tls: FileServer, store: Path) -> None:
    files = some_adapter(1000)
    tls.heads = False
    assert contents(fetch(put(tls, "/one", files), store, None, FAST)) == files


def test_passing_troubles(tls: FileServer, store: Path) -> None:
    files = some_adapter(1000)
    url = put(tls, "/one", files)
    tls.statuses |= {f"/one/{CONFIG}": [503, 429], f"/one/{WEIGHTS}": [500]}
    assert contents(fetch(url, store, None, FAST)) == files


def test_troubles_that_stay(tls: FileServer, store: Path) -> None:
    url = put(tls, "/one", some_adapter(1000))
    tls.statuses[f"/one/{CONFIG}"] = [503] * 100
    with pytest.raises(SourceError, match="status 503, 5 times in a row"):
        fetch(url, store, None, FAST)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_source_that_hangs_is_a_504(name: str, tls: FileServer, store: Path) -> None:
    url = put(tls, "/one", some_adapter(1000))
    tls.hanging.add(f"/one/{name}")
    began = time.monotonic()
    config = SourceConfig(allow_private=True, stall_seconds=30, attempt_seconds=30, total_seconds=0.4)
    with pytest.raises(DeadlineError) as error:
        fetch(url, store, None, config)
    assert error.value.status == 504 and time.monotonic() - began < 5


def test_ten_gigabytes_are_refused_before_they_come(tls: FileServer, store: Path) -> None:
    url = put(tls, "/one", some_adapter(1000))
    tls.claimed[f"/one/{WEIGHTS}"] = 10 * 10**9
    with pytest.raises(AdapterError, match=r"10000000035 bytes, more than the 4294967296"):
        fetch(url, store, None, FAST)
    assert tls.sent.total() == 0


def test_another_version_midway_is_noticed(tls: FileServer, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest of a replaced file must not be put behind the beginning of the old one."""
    files, other = some_adapter(), some_adapter(seed=1)
    url = put(tls, "/one", files)
    tls.drop_after = [1_000_000]

    def replaced(*args: Any) -> None:
        put(tls, "/one", other)

    monkeypatch.setattr("lorikeet.adapters.download.pause", replaced)
    with pytest.raises(SourceError, match="it changed: .* another version"):
        fetch(url, store, None, FAST)
    assert contents(fetch(url, store, None, FAST)) == other


def test_compressed_answers_are_refused(tls: FileServer, store: Path) -> None:
    """A few bytes that unpack to many never get to: nothing is unpacked."""
    tls.headers["content-encoding"] = "gzip"
    with pytest.raises(SourceError, match="sent in the encoding 'gzip', expected none"):
        fetch(put(tls, "/one", some_adapter(1000)), store, None, FAST)


def test_a_pinned_hash(tls: FileServer, store: Path) -> None:
    files = some_adapter(1000)
    url = put(tls, "/one", files)
    sha = hashlib.sha256(files[WEIGHTS]).hexdigest()
    tls.etags = False
    assert contents(fetch(f"{url}#sha256={sha}", store, None, FAST)) == files
    put(tls, "/one", some_adapter(1000, seed=1))
    with pytest.raises(SourceError, match=f"expected {sha}"):
        fetch(put(tls, "/two", some_adapter(1000, seed=1)) + f"#sha256={sha}", store, None, FAST)


def test_private_addresses_need_the_flag(tls: FileServer, store: Path) -> None:
    with pytest.raises(SourceRefusedError, match="loopback address"):
        fetch(put(tls, "/one", some_adapter(1000)), store)
    assert tls.requests == []


def test_a_token_reads_what_is_private_and_nobody_else_does(
    tls: FileServer, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    files = some_adapter(1000)
    url = put(tls, "/one", files)
    tls.tokens["/one"] = {TOKEN}
    for credentials in (None, Credentials("another")):
        with pytest.raises(NotFoundError, match="is not there, or not for these credentials"):
            fetch(url, store, credentials, FAST)
    tls.statuses[f"/one/{CONFIG}"] = [503]
    assert contents(fetch(url, store, Credentials(TOKEN), FAST)) == files
    with pytest.raises(NotFoundError):
        fetch(url, store, Credentials("another"), FAST)
    with pytest.raises(NotFoundError) as missing:
        fetch(tls.url + "/none", store, None, FAST)
    assert missing.value.status == 404 and TOKEN not in caplog.text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adapter_model.bin", r"adapter_model\.bin: pickled weights are not loaded"),
        (f"{WEIGHTS}.index.json", r"index\.json: weights in several files are not loaded"),
    ],
)
def test_weights_that_were_saved_otherwise_are_refused_by_name(
    name: str, message: str, tls: FileServer, store: Path
) -> None:
    url = put(tls, "/one", {CONFIG: b"{}", name: b"something"})
    with pytest.raises(AdapterError, match=message):
        fetch(url, store, None, FAST)
    assert tls.sent.total() == 0


def test_the_same_bytes_from_two_places_are_stored_once(tls: FileServer, store: Path) -> None:
    files = some_adapter(100_000)
    one, two = (fetch(put(tls, f"/{name}", files), store, None, FAST) for name in ("one", "two"))
    assert one == two and len(list((store / "blobs").iterdir())) == 3


# --- the hub ------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FileServer]:
    with file_server() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr("huggingface_hub.get_token", lambda: os.environ.get("HF_TOKEN"))
        yield server


def test_hub(hub: FileServer, store: Path) -> None:
    """The operator chose the endpoint: it may be private and http."""
    files = some_adapter()
    commit = publish(hub, "org/name", {**files, "README.md": b"#", "optimizer.pt": b"no"})
    config = SourceConfig(stall_seconds=2, backoff_seconds=0.01)
    hub.drop_after = [1_000_000]
    heard: list[tuple[int, int]] = []
    folder = fetch("hf://org/name", store, None, config, report=lambda here, total: heard.append((here, total)))
    total = sum(map(len, files.values()))
    assert heard == sorted(heard) and heard[-1] == (total, total)
    assert contents(folder) == files and hub.sent[f"/cdn/{commit}/{WEIGHTS}"] == len(files[WEIGHTS])
    assert fetch(f"hf://org/name@{commit}", store, None, config) == folder
    assert hub.asked("GET", f"/cdn/{commit}/{WEIGHTS}") == 2
    with pytest.raises(NotFoundError):
        fetch("hf://org/name@other", store, None, config)


def test_the_hub_checks_every_file(hub: FileServer, store: Path) -> None:
    commit = publish(hub, "org/name", some_adapter(1000))
    hub.files[f"/org/name/resolve/{commit}/{CONFIG}"] = b'{"peft_type": "LoRA"}'
    with pytest.raises(SourceError, match=f"{CONFIG}: its git is"):
        fetch("hf://org/name", store, None, FAST)
    publish(hub, "org/name", some_adapter(1000))
    hub.files[f"/cdn/{commit}/{WEIGHTS}"] = some_adapter(1000, seed=1)[WEIGHTS]
    with pytest.raises(SourceError, match=f"{WEIGHTS}: its sha256 is"):
        fetch("hf://org/name", store, None, FAST)


def test_private_and_gated_repositories(hub: FileServer, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = some_adapter(1000)
    publish(hub, "org/private", files, private_to={TOKEN})
    publish(hub, "org/gated", files)
    hub.tokens["/org/gated/"] = {TOKEN}  # everybody sees the listing
    for name in ("private", "gated"):
        assert contents(fetch(f"hf://org/{name}", store, Credentials(TOKEN), FAST)) == files
        for credentials in (None, Credentials("another")):
            with pytest.raises(NotFoundError, match="or not for these credentials"):
                fetch(f"hf://org/{name}", store, credentials, FAST)
    monkeypatch.setenv("HF_TOKEN", TOKEN)  # the server's own
    assert contents(fetch("hf://org/private", store, None, FAST)) == files
    assert all("authorization" not in headers for _, path, headers in hub.requests if TOKEN in path)


def test_a_hub_that_answers_something_else(hub: FileServer, store: Path) -> None:
    path = "/api/models/org/name/revision/main"
    for answer in (b"<html>", b"[]", b'{"sha": "../../x", "siblings": []}', b'{"sha": 1}', b'{"siblings": [{}]}'):
        hub.files[path] = answer
        with pytest.raises(SourceError, match="not as known"):
            fetch("hf://org/name", store, None, FAST)
    hub.files[path] = bytes(9 * 2**20)
    with pytest.raises(SourceError, match="longer than 8388608 bytes"):
        fetch("hf://org/name", store, None, FAST)


def test_names_in_a_listing_are_never_paths(hub: FileServer, store: Path, tmp_path: Path) -> None:
    files = {**some_adapter(1000), "../../escaped.safetensors": b"x", "/etc/escaped": b"x"}
    publish(hub, "org/name", files)
    assert set(contents(fetch("hf://org/name", store, None, FAST))) == {CONFIG, WEIGHTS, LOCK}
    assert not list(tmp_path.rglob("escaped*"))


# --- S3 -----------------------------------------------------------------------------------------------------------


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
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    import boto3

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "server")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "server-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    client = boto3.client("s3", endpoint_url=s3_server)
    client.create_bucket(Bucket="adapters")
    yield client
    for one in client.list_objects_v2(Bucket="adapters").get("Contents", []):
        client.delete_object(Bucket="adapters", Key=one["Key"])
    client.delete_bucket(Bucket="adapters")
    client.close()


def s3_config(url: str, **more: Any) -> SourceConfig:
    return SourceConfig(s3_endpoint=url, stall_seconds=5, attempts=2, backoff_seconds=0.01, **more)


def test_s3(s3: Any, s3_server: str, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "WINDOW", 700_000)
    files = some_adapter()
    for name, data in {**files, "more.txt": b"not taken"}.items():
        s3.put_object(Bucket="adapters", Key=f"team/one/{name}", Body=data)
    folder = fetch("s3://adapters/team/one", store, None, s3_config(s3_server))
    assert contents(folder) == files
    assert fetch("s3://adapters/team/one/", store, Credentials("key:secret"), s3_config(s3_server)) == folder
    for missing in ("s3://adapters/team/none", "s3://nowhere/team/one"):
        with pytest.raises(NotFoundError):
            fetch(missing, store, None, s3_config(s3_server))
    with pytest.raises(SourceRefusedError, match="KEY_ID:SECRET"):
        fetch("s3://adapters/team/one", store, Credentials("key"), s3_config(s3_server))
    with pytest.raises(AdapterError, match="more than the 1000"):
        fetch("s3://adapters/team/one", store, None, s3_config(s3_server, max_bytes=1000))


def test_an_object_in_parts_and_one_that_is_replaced(
    s3: Any, s3_server: str, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An ETag of parts is no MD5: what tells of a replacement is that it is another one afterwards."""
    files = some_adapter(5 * 2**20 + 1000)
    key = f"one/{WEIGHTS}"
    s3.put_object(Bucket="adapters", Key=f"one/{CONFIG}", Body=files[CONFIG])
    upload = s3.create_multipart_upload(Bucket="adapters", Key=key)["UploadId"]
    parts = [files[WEIGHTS][: 5 * 2**20], files[WEIGHTS][5 * 2**20 :]]
    tags = [
        s3.upload_part(Bucket="adapters", Key=key, PartNumber=i, UploadId=upload, Body=part)["ETag"]
        for i, part in enumerate(parts, 1)
    ]
    listed = [{"PartNumber": i, "ETag": tag} for i, tag in enumerate(tags, 1)]
    s3.complete_multipart_upload(Bucket="adapters", Key=key, UploadId=upload, MultipartUpload={"Parts": listed})
    assert contents(fetch("s3://adapters/one", store, None, s3_config(s3_server)))[WEIGHTS] == files[WEIGHTS]

    other = some_adapter(5 * 2**20 + 1000, seed=1)[WEIGHTS]
    s3.copy_object(Bucket="adapters", Key=f"two/{CONFIG}", CopySource=f"adapters/one/{CONFIG}")
    upload = s3.create_multipart_upload(Bucket="adapters", Key=f"two/{WEIGHTS}")["UploadId"]
    tag = s3.upload_part(Bucket="adapters", Key=f"two/{WEIGHTS}", PartNumber=1, UploadId=upload, Body=other)["ETag"]
    s3.complete_multipart_upload(
        Bucket="adapters", Key=f"two/{WEIGHTS}", UploadId=upload,
        MultipartUpload={"Parts": [{"PartNumber": 1, "ETag": tag}]},
    )  # fmt: skip
    usual = sources.ObjectSource._windows

    def replaced(source: Any, file: Any, start: int, deadline: Any) -> Iterator[bytes]:
        if file.name == WEIGHTS:
            s3.put_object(Bucket="adapters", Key=f"two/{WEIGHTS}", Body=files[WEIGHTS])
        yield from usual(source, file, start, deadline)

    monkeypatch.setattr(sources.ObjectSource, "_windows", replaced)
    with pytest.raises(SourceError, match="it changed while it was read"):
        fetch("s3://adapters/two", store, None, s3_config(s3_server))


def test_an_s3_server_that_hangs_is_a_504(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with file_server() as server:
        server.hanging |= {f"/adapters/one/{CONFIG}"}
        config = SourceConfig(s3_endpoint=server.url, stall_seconds=30, total_seconds=1.5)
        began = time.monotonic()
        with pytest.raises(DeadlineError):
            fetch("s3://adapters/one", store, Credentials("key:secret"), config)
        assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("kind", "package", "extra"), [("s3", "s3fs", "s3"), ("gs", "gcsfs", "gcs"), ("az", "adlfs", "azure")]
)
def test_a_missing_package_is_named(
    kind: str, package: str, extra: str, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in {package, *(name for name in sys.modules if name.startswith(f"{package}."))}:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf"needs the package {package}.*pip install 'lorikeet-llm\[{extra}\]'"):
        fetch(f"{kind}://bucket/path", store)


def test_what_object_stores_say_of_their_content() -> None:
    tag = hashlib.md5(b"x").hexdigest()
    assert sources._s3_digests("b", {"ETag": f'"{tag}"'}) == (("md5", tag),)
    for about in ({"ETag": f'"{tag}-2"'}, {"ETag": f'"{tag}"', "ServerSideEncryption": "aws:kms"}):
        assert sources._s3_digests("b", about) == ()
    assert sources._s3_digests("b--use1-az4--x-s3", {"ETag": f'"{tag}"'}) == ()
    sha = "LXEWQrcmsEQBYnyp++6+7+PFRDn2L9gNvXhbWAVDf4g="
    assert sources._s3_digests("b", {"ChecksumSHA256": sha})[0][0] == "sha256"
    assert sources._s3_digests("b", {"ChecksumSHA256": sha, "ChecksumType": "COMPOSITE"}) == ()
    assert sources._md5_digest({"md5Hash": "nd1jbxYpwzkPfHwiJGdEXg=="})[0][0] == "md5"
    assert sources._md5_digest({"content_settings": {"content_md5": bytearray(16)}}) == (("md5", "0" * 32),)
    assert sources._md5_digest({"content_settings": {"content_md5": None}}) == ()


# --- folders ------------------------------------------------------------------------------------------------------


def folder_of(path: Path, files: dict[str, bytes]) -> Path:
    path.mkdir(parents=True)
    for name, data in files.items():
        (path / name).write_bytes(data)
    return path


def test_a_folder(tmp_path: Path, store: Path) -> None:
    files = some_adapter(1000)
    one, two = folder_of(tmp_path / "one", files), folder_of(tmp_path / "two", files)
    landed = fetch(str(one), store)
    assert contents(landed) == files and landed != one and fetch(str(two), store) == landed
    with pytest.raises(NotFoundError):
        fetch(str(tmp_path / "none"), store)


def test_links_out_of_a_folder_are_refused(tmp_path: Path, store: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    one = folder_of(tmp_path / "one", some_adapter(1000))
    (one / CONFIG).unlink()
    (one / CONFIG).symlink_to(tmp_path / "secret")
    assert escaping_link(one) == one / CONFIG
    with pytest.raises(AdapterError, match=r"adapter_config.json: a link that leads out of its folder"):
        fetch(str(one), store)
    assert escaping_link(one, tmp_path) is None  # an operator's folder may link within itself


def test_a_file_deleted_between_check_and_read(tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = folder_of(tmp_path / "one", some_adapter(1000))
    usual = sources.LocalSource.read

    def gone(source: Any, file: Any, start: int, deadline: Any) -> Any:
        (one / WEIGHTS).unlink(missing_ok=True)
        return usual(source, file, start, deadline)

    monkeypatch.setattr(sources.LocalSource, "read", gone)
    with pytest.raises(SourceError, match=f"{WEIGHTS}: No such file"):
        fetch(str(one), store)
    assert list((store / "adapters").iterdir()) == []
