"""Where adapters come from: the hub, object stores (through fsspec's file systems), https, folders. No torch.

    fetch(parse("hf://org/name@main"), cache_folder() / "downloads", Credentials(token)) -> Path

Of an adapter these files are taken and no others: `FILES`. Names that a source gives never become paths here.
"""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import importlib
import json
import logging
import os
import re
from collections.abc import Callable, Coroutine, Generator, Mapping
from email.message import Message
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lorikeet.adapters.configs import CONFIG
from lorikeet.adapters.download import (
    CHUNK,
    Chunks,
    Manifest,
    RemoteFile,
    Report,
    Source,
    Store,
    pause,
)
from lorikeet.adapters.files import LOCK, TOKENIZER_FILES, WEIGHTS
from lorikeet.adapters.proxy import Proxy
from lorikeet.adapters.references import Credentials, Kind, Reference, parse
from lorikeet.adapters.transport import Deadline, Http, Reply, TransientError
from lorikeet.config import SourceConfig
from lorikeet.errors import (
    AdapterError,
    ConfigError,
    DeadlineError,
    NotFoundError,
    SourceError,
    SourceRefusedError,
)

log = logging.getLogger("lorikeet.sources")

FILES = {CONFIG: True, WEIGHTS: True, LOCK: False, **dict.fromkeys(TOKENIZER_FILES, False)}  # name -> must be there
WINDOW = 8 * 2**20  # bytes of one request to an object store
_MAX_LISTING = 8 * 2**20  # bytes of what the hub says of a repository
# What stands in place of the weights where they were saved otherwise: why it is not loaded, and what to do.
_OTHERWISE = {
    "adapter_model.bin": ("pickled weights are not loaded, they can run code", "with safe_serialization=True"),
    f"{WEIGHTS}.index.json": ("weights in several files are not loaded", "with a larger max_shard_size, as one file"),
}
_FILE_SYSTEMS = {  # module, class, extra of ours that brings it
    "s3": ("s3fs", "S3FileSystem", "s3"),
    "gs": ("gcsfs.core", "GCSFileSystem", "gcs"),  # gcsfs's own choice asks every bucket over gRPC what it is
    "az": ("adlfs", "AzureBlobFileSystem", "azure"),
}


# --- fetching -----------------------------------------------------------------------------------------------------


def fetch(
    reference: Reference | str,
    folder: Path,
    credentials: Credentials | None = None,
    config: SourceConfig | None = None,
    *,
    local_root: Path | None = None,
    report: Report | None = None,
) -> Path:
    """A folder below `folder` with the adapter's files, downloaded where they are not there yet. `report` hears of
    (bytes here, bytes in all).

    Raises `NotFoundError` for what is not there or not for these credentials, `SourceRefusedError`, `SourceError`,
    `AdapterError`, `DiskFullError`, `DeadlineError`.
    """
    config = config or SourceConfig()
    if isinstance(reference, str):
        reference = parse(reference)
    source = open_source(reference, credentials or Credentials(), config, local_root=local_root)
    deadline = Deadline.after(config.total_seconds)
    return Store(folder, config).bring(source, look(source, reference, config, deadline), deadline, report)


def open_source(
    reference: Reference, credentials: Credentials, config: SourceConfig, *, local_root: Path | None = None
) -> Source:
    """Nothing is asked of it yet. `ConfigError` names the package that an object store needs and that is missing."""
    if reference.kind == "hf":
        return HubSource(reference, credentials, config)
    if reference.kind == "https":
        return HttpsSource(reference, credentials, config)
    if reference.kind == "local":
        return LocalSource(Path(reference.location), local_root)
    return ObjectSource(reference, credentials, config)


def look(source: Source, reference: Reference, config: SourceConfig, deadline: Deadline) -> Manifest:
    """What is there and may be read, asked again while the source has passing troubles. The pinned hash is added."""
    failures = 0
    while True:
        try:
            return _pinned(source.manifest(deadline.within(config.attempt_seconds)), reference)
        except (TransientError, TimeoutError) as error:
            failures += 1
            problem = error if isinstance(error, TransientError) else TransientError(str(error))
            if deadline.passed:
                raise DeadlineError(f"{reference} did not answer in time: {problem}", hint="try again") from None
            if failures >= config.attempts:
                raise SourceError(
                    f"{reference}: {problem}, {failures} times in a row", hint="try again later"
                ) from None
            pause(config, failures, problem, deadline, str(reference))


def _pinned(manifest: Manifest, reference: Reference) -> Manifest:
    if reference.sha256 is None:
        return manifest
    files = []
    for one in manifest.files:
        if one.name == WEIGHTS:
            said = dict(one.digests).get("sha256", reference.sha256)
            if said != reference.sha256:
                raise AdapterError(f"{WEIGHTS}: its sha256 is {said}, the reference says {reference.sha256}",
                                   param="model")  # fmt: skip
            digests = (*(d for d in one.digests if d[0] != "sha256"), ("sha256", said))
            one = RemoteFile(one.name, one.size, one.address, one.version or said, digests)
        files.append(one)
    return Manifest(manifest.title, tuple(files))


def _gathered(title: str, find: Callable[[str], RemoteFile | None]) -> Manifest:
    """The manifest of what `find` finds by name. `NotFoundError`, or `AdapterError` for pickled or parted weights."""
    files: list[RemoteFile] = []
    for name, needed in FILES.items():
        if name in TOKENIZER_FILES[1:] and files[-1].name not in TOKENIZER_FILES:
            break  # every question costs a round trip, and who saves a tokenizer saves its config
        found = find(name)
        if found is not None:
            files.append(found)
        elif needed:
            for other, (reason, how) in _OTHERWISE.items() if name == WEIGHTS else ():
                if find(other) is not None:
                    raise AdapterError(f"{title}: {other}: {reason}", hint=f"save the adapter {how}", param="model")
            raise not_there(title, name)
    return Manifest(title, tuple(files))


def not_there(title: str, name: str | None = None) -> NotFoundError:
    """The same words for what is not there and for what is not for these credentials."""
    what = f"{title}/{name}" if name else title
    return NotFoundError(
        f"{what} is not there, or not for these credentials",
        hint="check the name; what is private needs api_token, or the server's own credentials",
        param="model",
    )


# --- https --------------------------------------------------------------------------------------------------------


def http_of(config: SourceConfig, trusted: tuple[str, ...] = ()) -> Http:
    """Raises `ConfigError` where there is to be a proxy and the environment names none."""
    return Http(
        stall_seconds=config.stall_seconds,
        allow_private=config.allow_private,
        trusted=trusted,
        proxy=Proxy.of_environment() if config.use_proxy else None,
    )


class HttpsSource:
    """A folder behind a URL: its files lie beside each other below it."""

    def __init__(self, reference: Reference, credentials: Credentials, config: SourceConfig) -> None:
        self._url = reference.location
        self._http = http_of(config)
        self._headers = {} if credentials.token is None else {"authorization": f"Bearer {credentials.token}"}

    def manifest(self, deadline: Deadline) -> Manifest:
        return _gathered(self._url, lambda name: self._find(name, deadline))

    def _find(self, name: str, deadline: Deadline) -> RemoteFile | None:
        url = f"{self._url}/{name}"
        with self._http.open("HEAD", url, self._headers, deadline) as reply:
            status, size, version = reply.status, reply.length, _version(reply.headers)
        if status in (405, 501):  # a server without HEAD: the first byte says how many there are
            with self._http.open("GET", url, {**self._headers, "range": "bytes=0-0"}, deadline) as reply:
                status, version = reply.status, _version(reply.headers)
                size = _content_range(reply)[1] if status == 206 else reply.length
        if not _there(status, reply, name):
            return None
        if size is None:
            raise SourceError(f"{url}: the server does not say how long it is; expected Content-Length")
        return RemoteFile(name, size, url, version)

    def read(self, file: RemoteFile, start: int, deadline: Deadline) -> tuple[int, Chunks]:
        return read_url(self._http, file, self._headers, start, deadline)


def read_url(
    http: Http, file: RemoteFile, headers: Mapping[str, str], start: int, deadline: Deadline, *, check: bool = True
) -> tuple[int, Chunks]:
    """GET `file.address` from `start` on. `check`: the answer must be of the version that was announced."""
    asked = {**headers, "range": f"bytes={start}-"} if start else headers
    reply = http.open("GET", file.address, asked, deadline)
    try:
        if not _there(reply.status, reply, file.name):
            raise not_there(file.name)
        changed = check and file.version is not None and _version(reply.headers) != file.version and not file.digests
        if reply.headers.get("content-encoding", "identity") != "identity":
            raise SourceError(f"{file.name}: sent in the encoding {reply.headers['content-encoding']!r}, expected none")
        begin, total = _content_range(reply) if reply.status == 206 else (0, reply.length)
        if changed or begin not in (0, start) or (total is not None and total != file.size):
            found = f"{total} bytes from {begin}" + (", another version" if changed else "")
            raise SourceError(f"{file.name}: it changed: expected {file.size} bytes from {start}, found {found}",
                              hint="try again")  # fmt: skip
    except BaseException:
        reply.close()
        raise
    return begin, reply


def _there(status: int, reply: Reply, name: str) -> bool:
    """False for what is missing or forbidden. Raises for what went wrong."""
    if status in (200, 206):
        return True
    if status in (401, 403, 404, 410, 451):
        return False
    if status in (408, 425, 429) or status >= 500:
        after = reply.headers.get("retry-after", "")
        raise TransientError(f"{name}: status {status}", float(after) if after.isdecimal() else None)
    raise SourceError(f"{name}: status {status}, expected 200")


def _version(headers: Message) -> str | None:
    return headers.get("etag") or headers.get("last-modified")


def _content_range(reply: Reply) -> tuple[int, int | None]:
    """(first byte, total) of a partial answer."""
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", reply.headers.get("content-range", ""))
    if match is None:
        raise SourceError(f"status 206 with Content-Range {reply.headers.get('content-range')!r}")
    return int(match[1]), None if match[2] == "*" else int(match[2])


# --- the hub ------------------------------------------------------------------------------------------------------


class HubSource:
    """A repository of the Hugging Face hub at one commit, which `$HF_ENDPOINT` may put elsewhere."""

    def __init__(self, reference: Reference, credentials: Credentials, config: SourceConfig) -> None:
        from huggingface_hub import get_token  # 0.3 s, and only where the hub is used

        self._reference = reference
        self._endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
        token = credentials.token or get_token()
        self._headers = {} if token is None else {"authorization": f"Bearer {token}"}
        self._http = http_of(config, trusted=(self._endpoint,))

    def manifest(self, deadline: Deadline) -> Manifest:
        title = str(self._reference)
        repository, revision = self._reference.location, quote(self._reference.revision or "main", safe="")
        url = f"{self._endpoint}/api/models/{repository}/revision/{revision}?blobs=true"
        with self._http.open("GET", url, self._headers, deadline) as reply:
            if not _there(reply.status, reply, title):
                raise not_there(title)
            about = self._parsed(reply.read_all(_MAX_LISTING))
        commit, listed = about
        folder = f"{self._endpoint}/{repository}/resolve/{commit}"
        manifest = _gathered(title, lambda name: self._file(name, folder, commit, listed))
        self._check_access(f"{folder}/{WEIGHTS}", deadline, title)
        return manifest

    def _parsed(self, data: bytes) -> tuple[str, dict[str, dict[str, Any]]]:
        """The commit, and what is said of each file."""
        try:
            about = json.loads(data)
            commit, siblings = about["sha"], {one["rfilename"]: one for one in about["siblings"]}
            fine = isinstance(commit, str) and re.fullmatch(r"[0-9a-f]{40,64}", commit)
        except (ValueError, KeyError, TypeError):
            fine = None
        if not fine:
            raise SourceError(f"{self._reference}: the hub's answer is not as known: no commit or no list of files")
        return commit, siblings

    def _file(self, name: str, folder: str, commit: str, listed: dict[str, dict[str, Any]]) -> RemoteFile | None:
        about = listed.get(name)
        if about is None:
            return None
        lfs = about.get("lfs") or {}
        sha, size = lfs.get("sha256") or lfs.get("oid"), lfs.get("size", about.get("size"))
        algorithm, digest = ("sha256", sha) if sha else ("git", about.get("blobId"))
        if type(size) is not int or size < 0 or not isinstance(digest, str):
            raise SourceError(f"{self._reference}/{name}: the hub says neither size nor hash")
        return RemoteFile(name, size, f"{folder}/{name}", commit, ((algorithm, digest),))

    def _check_access(self, url: str, deadline: Deadline, title: str) -> None:
        """Of a gated repository everybody may see the list of files; who may have the files, only the files tell."""
        with self._http.open("HEAD", url, self._headers, deadline, follow=False) as reply:
            if reply.status not in (301, 302, 303, 307, 308) and not _there(reply.status, reply, title):
                raise not_there(title)

    def read(self, file: RemoteFile, start: int, deadline: Deadline) -> tuple[int, Chunks]:
        return read_url(self._http, file, self._headers, start, deadline, check=False)  # a commit does not change


# --- object stores ------------------------------------------------------------------------------------------------


class ObjectSource:
    """A prefix of a bucket (S3 and what speaks like it, Google Cloud Storage) or of a container (Azure)."""

    def __init__(self, reference: Reference, credentials: Credentials, config: SourceConfig) -> None:
        self._kind = reference.kind
        self._prefix = reference.location
        self._title = f"{reference.kind}://{reference.location}"
        self._endpoint = config.s3_endpoint or os.environ.get("AWS_ENDPOINT_URL") or "aws" if self._kind == "s3" else ""
        self._stall = config.stall_seconds
        self._fs = _file_system(self._kind, credentials, config)

    def manifest(self, deadline: Deadline) -> Manifest:
        return _gathered(self._title, lambda name: self._find(name, deadline))

    def _find(self, name: str, deadline: Deadline) -> RemoteFile | None:
        path = f"{self._prefix}/{name}"
        try:
            if self._kind == "s3":
                bucket, _, key = path.partition("/")
                call = self._fs._call_s3("head_object", Bucket=bucket, Key=key, ChecksumMode="ENABLED")
                about = self._wait(call, deadline)
                size, version, digests = about["ContentLength"], about.get("ETag"), _s3_digests(bucket, about)
            else:
                about = self._wait(self._fs._info(path), deadline)
                if about.get("type") != "file":
                    return None
                size, version, digests = about["size"], about.get("etag"), _md5_digest(about)
        except (FileNotFoundError, PermissionError):
            return None
        address = f"{self._kind}+{self._endpoint}://{path}"
        return RemoteFile(name, int(size), address, None if version is None else str(version), digests)

    def read(self, file: RemoteFile, start: int, deadline: Deadline) -> tuple[int, Chunks]:
        return start, self._windows(file, start, deadline)

    def _windows(self, file: RemoteFile, start: int, deadline: Deadline) -> Generator[bytes]:
        path = f"{self._prefix}/{file.name}"
        for at in range(start, file.size, WINDOW):
            end = min(at + WINDOW, file.size)
            try:
                data = self._wait(self._fs._cat_file(path, start=at, end=end), deadline)
            except (FileNotFoundError, PermissionError):
                raise not_there(self._title, file.name) from None
            if len(data) != end - at:
                raise TransientError(f"{file.name}: {len(data)} bytes came, expected {end - at}")
            yield data
        if not file.digests:  # nothing else would tell that it was replaced between two windows
            now = self._find(file.name, deadline)
            if now is None or now.version != file.version:
                raise SourceError(f"{file.name}: it changed while it was read", hint="try again")

    def _wait(self, call: Coroutine[Any, Any, Any], deadline: Deadline) -> Any:
        """What a call of the file system comes to, which is cancelled at the deadline, or when it stalls."""
        try:
            seconds = min(deadline.left(), self._stall)
        except TimeoutError:
            call.close()
            raise
        future = asyncio.run_coroutine_threadsafe(call, self._fs.loop)
        try:
            return future.result(seconds)
        except concurrent.futures.TimeoutError:
            future.cancel()
            raise TransientError(f"{self._title}: no answer in {seconds:.1f} s") from None
        except (FileNotFoundError, PermissionError):
            raise
        except Exception as error:
            if _denied(error):
                raise PermissionError(self._title) from None
            # The libraries' own errors have no common base; their words may repeat what was sent.
            raise TransientError(f"{self._title}: {type(error).__name__}") from error


def _denied(error: Exception) -> bool:
    """The store does not let these credentials in, in the words of its library."""
    status = getattr(error, "status_code", None) or getattr(error, "code", None)  # Azure's, and gcsfs's
    named = ("NoCredentialsError", "PartialCredentialsError", "RefreshError", "DefaultCredentialsError")
    return str(status) in ("401", "403", "404") or type(error).__name__ in named or str(error).startswith("Forbidden")


def require(kind: Kind) -> None:
    """Import what a kind of source needs. `ConfigError` names a package that is missing."""
    if kind == "hf":
        importlib.import_module("huggingface_hub")
    elif kind in _FILE_SYSTEMS:
        _file_system_class(kind)


def _file_system_class(kind: Kind) -> Any:
    module, name, extra = _FILE_SYSTEMS[kind]
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ConfigError(
            f"{kind}:// needs the package {package}: {error}",
            hint=f"pip install 'lorikeet-llm[{extra}]'",
            param="model",
        ) from error


@lru_cache(maxsize=64)  # a new session costs 0.1 s of computing
def _file_system(kind: Kind, credentials: Credentials, config: SourceConfig) -> Any:
    """An fsspec file system for these credentials alone, which remembers no listings."""
    options = {"s3": _s3_options, "gs": _gs_options, "az": _az_options}[kind]
    system = _file_system_class(kind)(
        skip_instance_cache=True, use_listings_cache=False, **options(credentials.token, config)
    )
    system.retries = 1  # attempts are counted here
    logging.getLogger("azure").setLevel(logging.WARNING)  # below, it tells of every request with its headers
    return system


def _s3_options(token: str | None, config: SourceConfig) -> dict[str, Any]:
    options: dict[str, Any] = {
        "config_kwargs": {
            "connect_timeout": config.stall_seconds, "read_timeout": config.stall_seconds,
            "retries": {"max_attempts": 1},
        }
    }  # fmt: skip
    if config.s3_endpoint is not None:
        options["endpoint_url"] = config.s3_endpoint
    if token is not None:
        parts = token.split(":", 2)
        if len(parts) < 2:
            raise SourceRefusedError("api_token: expected KEY_ID:SECRET or KEY_ID:SECRET:SESSION", param="api_token")
        options |= dict(zip(("key", "secret", "token"), parts, strict=False))
    return options


def _gs_options(token: str | None, config: SourceConfig) -> dict[str, Any]:
    options: dict[str, Any] = {"session_kwargs": {"trust_env": True}}  # proxies, as the other libraries do
    if token is None:
        return options
    from google.oauth2.credentials import Credentials as GoogleCredentials  # a string would be taken for a file's name

    return {**options, "token": GoogleCredentials(token)}


def _az_options(token: str | None, config: SourceConfig) -> dict[str, Any]:
    """With a token nothing of the environment's credentials: the library would prefer them to what it is given."""
    if token is None:
        return {}
    account, said = os.environ.get("AZURE_STORAGE_ACCOUNT_NAME"), os.environ.get("AZURE_STORAGE_CONNECTION_STRING", "")
    settings = dict(part.split("=", 1) for part in said.split(";") if "=" in part)
    account = account or settings.get("AccountName")
    endpoint = settings.get("BlobEndpoint") or (f"https://{account}.blob.core.windows.net/" if account else None)
    if endpoint is None:
        raise ConfigError("az:// needs AZURE_STORAGE_ACCOUNT_NAME in the server's environment", param="model")
    if "sig=" not in token or ";" in token:
        raise SourceRefusedError("api_token: expected a SAS token: sv=...&sig=...", param="api_token")
    return {
        "account_name": account,
        "connection_string": f"BlobEndpoint={endpoint};SharedAccessSignature={token.removeprefix('?')}",
    }


def _s3_digests(bucket: str, about: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """What S3 says of an object's content: its own checksum, and its ETag where that is an MD5.

    An ETag is the MD5 unless the object came in parts, is encrypted with a key of its own, or lies in a directory
    bucket (https://docs.aws.amazon.com/AmazonS3/latest/API/API_Object.html).
    """
    digests = []
    sha = about.get("ChecksumSHA256", "")
    if sha and about.get("ChecksumType", "FULL_OBJECT") == "FULL_OBJECT" and "-" not in sha:
        digests.append(("sha256", base64.b64decode(sha).hex()))
    tag = str(about.get("ETag", "")).strip('"')
    encrypted = about.get("ServerSideEncryption", "AES256") != "AES256" or about.get("SSECustomerAlgorithm")
    if re.fullmatch(r"[0-9a-f]{32}", tag) and not encrypted and not bucket.endswith("--x-s3"):
        digests.append(("md5", tag))
    return tuple(digests)


def _md5_digest(about: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """`md5Hash` of Google Cloud Storage (base64), `content_md5` of Azure (bytes); objects in parts have none."""
    text = about.get("md5Hash")
    raw = base64.b64decode(text) if text else (about.get("content_settings") or {}).get("content_md5")
    return (("md5", bytes(raw).hex()),) if raw else ()


# --- folders ------------------------------------------------------------------------------------------------------


class LocalSource:
    """A folder of this machine, whose files may be links only to what lies in it, or below `root`."""

    def __init__(self, folder: Path, root: Path | None = None) -> None:
        self._folder = folder.expanduser()
        self._root = root

    def manifest(self, deadline: Deadline) -> Manifest:
        escaping = escaping_link(self._folder, self._root)
        if escaping is not None:
            raise AdapterError(
                f"{escaping.name}: a link that leads out of its folder", hint="put the file itself there", param="model"
            )
        return _gathered(str(self._folder), self._find)

    def _find(self, name: str) -> RemoteFile | None:
        path = self._folder / name
        try:
            stat = path.stat()
        except OSError:
            return None
        version = f"{stat.st_dev}-{stat.st_ino}-{stat.st_mtime_ns}"
        return RemoteFile(name, stat.st_size, f"file://{path.resolve()}", version) if path.is_file() else None

    def read(self, file: RemoteFile, start: int, deadline: Deadline) -> tuple[int, Chunks]:
        return start, self._blocks(file, start)

    def _blocks(self, file: RemoteFile, start: int) -> Generator[bytes]:
        try:
            with (self._folder / file.name).open("rb") as opened:
                opened.seek(start)
                while block := opened.read(CHUNK):
                    yield block
        except OSError as error:
            raise SourceError(f"{file.name}: {error.strerror}", hint="it was there a moment ago") from error
        if self._find(file.name) != file:
            raise SourceError(f"{file.name}: it changed while it was read", hint="try again")


def escaping_link(folder: Path, root: Path | None = None) -> Path | None:
    """The first of an adapter's files that is a link to somewhere outside of its folder and of `root`."""
    allowed = [folder.resolve(), *([root.resolve()] if root is not None else [])]
    for name in FILES:
        path = folder / name
        if path.is_symlink() and not any(path.resolve().is_relative_to(one) for one in allowed):
            return path
    return None
