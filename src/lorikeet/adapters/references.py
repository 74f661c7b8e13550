"""How an adapter elsewhere is named, and what a request brings along to read it. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal, cast

from lorikeet.adapters.configs import CONFIG
from lorikeet.adapters.files import WEIGHTS
from lorikeet.adapters.transport import split_url
from lorikeet.errors import SourceRefusedError

Kind = Literal["hf", "s3", "gs", "az", "https", "local"]
KINDS: tuple[Kind, ...] = ("hf", "s3", "gs", "az", "https", "local")
_SCHEMES: dict[str, Kind] = {
    "hf": "hf", "s3": "s3", "gs": "gs", "gcs": "gs", "az": "az", "abfs": "az", "https": "https", "http": "https",
    "file": "local",
}  # fmt: skip
_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}"
_REPOSITORY = re.compile(rf"{_PART}/{_PART}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
_BUCKET = re.compile(r"[a-z0-9$][a-z0-9._-]{1,221}[a-z0-9]")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".7z", ".rar")


@dataclass(frozen=True, slots=True)
class Reference:
    """A place of an adapter. `location`: org/name, bucket/prefix, a URL or a path; `sha256` is that of the weights."""

    kind: Kind
    location: str
    revision: str | None = None
    sha256: str | None = None

    def __str__(self) -> str:
        start = "" if self.kind in ("https", "local") else f"{self.kind}://"
        pinned = f"#sha256={self.sha256}" if self.sha256 else ""
        return f"{start}{self.location}{f'@{self.revision}' if self.revision else ''}{pinned}"


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a request brings along, or nothing: then those of the server's environment hold where its source has any.

    `token`: of the hub; a bearer token for https; `KEY_ID:SECRET[:SESSION]` for s3; an OAuth access token for gs; a
    SAS token for az.
    """

    token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.token is not None and not re.fullmatch(r"[\x21-\x7e]{1,4096}", self.token):
            raise SourceRefusedError("api_token: expected printable ASCII without spaces", param="api_token")


def parse(text: str, source: str | None = None) -> Reference:
    """`hf://org/name@rev`, `s3://bucket/path`, `gs://`, `az://`, `abfs://`, `https://host/folder`, or a path.

    `#sha256=` at the end pins the weights. `source` is the kind of a reference without a scheme. Raises
    `SourceRefusedError`.
    """
    body, _, pin = text.partition("#")
    sha = None
    if pin:
        name, _, sha = pin.partition("=")
        if name != "sha256" or not _SHA256.fullmatch(sha):
            raise SourceRefusedError(f"found #{pin[:80]}; expected #sha256= and 64 hexadecimal digits", param="model")
    scheme, mark, rest = body.partition("://")
    if mark:
        kind = _SCHEMES.get(scheme.lower())
        if kind is None:
            known = ", ".join(f"{one}://" for one in _SCHEMES if one != "http")
            raise SourceRefusedError(f"found {scheme[:40]}://; expected one of {known}", param="model")
        if source is not None and source != kind:
            raise SourceRefusedError(f"{scheme}:// is not a reference of the source {source!r}", param="model")
    else:
        kind, rest = cast("Kind", source or "local"), body
    if kind == "https":
        return Reference(kind, _checked_url(f"{scheme.lower()}://{rest}" if mark else f"https://{rest}"), None, sha)
    if kind == "local":
        return Reference(kind, rest, None, sha)
    if kind == "hf":
        return _hub_reference(rest, sha)
    return Reference(kind, _checked_key(kind, rest), None, sha)


def _hub_reference(rest: str, sha: str | None) -> Reference:
    repository, _, revision = rest.partition("@")
    if not _REPOSITORY.fullmatch(repository) or ".." in repository:
        raise SourceRefusedError(f"found hf://{rest[:200]}; expected hf://org/name or hf://org/name@rev", param="model")
    if "@" in rest and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise SourceRefusedError(f"hf://{repository}: {revision[:80]!r} is not a revision", param="model")
    return Reference("hf", repository, revision or None, sha)


def _checked_url(url: str) -> str:
    parts = split_url(url)
    if parts.query:
        raise SourceRefusedError(
            f"{url.split('?')[0]}: a query is not supported: each file of the folder has a URL of its own",
            param="model",
        )
    path = parts.path.rstrip("/")
    if path.lower().endswith(_ARCHIVES):
        hint = f"give the URL of a folder with {CONFIG} and {WEIGHTS}"
        raise SourceRefusedError(f"{url}: archives are not unpacked", hint=hint, param="model")
    if ".." in path.split("/"):
        raise SourceRefusedError(f"{url}: '..' in a path", param="model")
    return f"{parts.scheme}://{parts.netloc}{path}"


def _checked_key(kind: Kind, rest: str) -> str:
    bucket, _, key = rest.partition("/")
    key = key.rstrip("/")
    if "@" in bucket:
        raise SourceRefusedError(
            f"{kind}://{bucket.partition('@')[0]}@...: the account is the server's",
            hint="set AZURE_STORAGE_ACCOUNT_NAME for the server, and write az://container/path",
            param="model",
        )
    if not _BUCKET.fullmatch(bucket):
        raise SourceRefusedError(f"{kind}://{bucket[:80]}: not the name of a bucket or container", param="model")
    parts = key.split("/")
    if not key or any(part in ("", ".", "..") for part in parts) or not key.isprintable() or len(key) > 900:
        shown = f"{kind}://{bucket}/{key[:200]}"
        raise SourceRefusedError(f"{shown}: expected {kind}://bucket/path without empty, '.' or '..' parts",
                                 param="model")  # fmt: skip
    return f"{bucket}/{key}"
