"""Where blobs lie: a local folder, or a prefix of an object store through fsspec. Each appears whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from lorikeet.errors import ConfigError, DiskFullError, LorikeetError, SourceError
from lorikeet.registry import multipart

CHUNK = 2**20
WINDOW = 8 * 2**20  # bytes of one request to an object store
_EXTRAS = {"s3": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure"}


class Objects(Protocol):
    """Bytes by sha256. `staging` is a local folder from which `land` takes files."""

    staging: Path

    def size(self, sha256: str) -> int | None:
        """None where it is not there."""

    def land(self, staged: Path, sha256: str) -> None:
        """Put a staged file whose content has this hash, and let go of the staged one."""

    def read(self, sha256: str, start: int = 0) -> Iterator[bytes]:
        """Its bytes from `start` on, as they lie there. Raises `FileNotFoundError`."""

    def remove(self, sha256: str) -> None:
        """Also when it is not there."""

    def set_aside(self, sha256: str) -> None:
        """It is damaged: let another one take its place."""

    def abandon(self, before: float) -> None:
        """Let go of what is on its way since before this time (seconds since the epoch)."""


class LocalObjects:
    """`folder/ab/<sha256>`, read-only files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.staging = folder / ".staging"
        self.staging.mkdir(parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path:
        return self.folder / sha256[:2] / sha256

    def size(self, sha256: str) -> int | None:
        try:
            return self.path(sha256).stat().st_size
        except FileNotFoundError:
            return None

    def land(self, staged: Path, sha256: str) -> None:
        path = self.path(sha256)
        path.parent.mkdir(exist_ok=True)
        staged.chmod(0o444)
        sync(staged)
        staged.replace(path)
        sync(path.parent)

    def read(self, sha256: str, start: int = 0) -> Iterator[bytes]:
        with self.path(sha256).open("rb") as file:
            file.seek(start)
            while block := file.read(CHUNK):
                yield block

    def remove(self, sha256: str) -> None:
        self.path(sha256).unlink(missing_ok=True)

    def set_aside(self, sha256: str) -> None:
        with suppress(FileNotFoundError):
            self.path(sha256).rename(self.staging / f"damaged-{sha256}.{secrets.token_hex(4)}")

    def abandon(self, before: float) -> None:
        """Nothing is: files are renamed into place."""


class RemoteObjects:
    """`url/ab/<sha256>` in an object store. An object there appears when its upload is complete.

    To S3 an upload that broke off goes on with its next part; to others it begins again.
    """

    def __init__(self, url: str, staging: Path, options: dict[str, Any] | None = None) -> None:
        self.staging = staging
        self.staging.mkdir(parents=True, exist_ok=True)
        self._url = url.rstrip("/")
        self._fs, self._root = _file_system(self._url, options or {})

    def _path(self, sha256: str) -> str:
        return f"{self._root}/{sha256[:2]}/{sha256}"

    def size(self, sha256: str) -> int | None:
        try:
            return int(self._call(lambda: self._fs.info(self._path(sha256), refresh=True))["size"])
        except FileNotFoundError:
            return None

    def land(self, staged: Path, sha256: str) -> None:
        size = staged.stat().st_size
        try:
            self._upload(staged, sha256)
        except (FileNotFoundError, SourceError) as error:
            if self.size(sha256) != size:  # else somebody else has put the same meanwhile
                raise SourceError(f"{self._url}: {error}", hint="make the bucket first, or try again") from error
        found = self.size(sha256)
        if found != size:
            raise SourceError(f"{self._url}: {sha256} has {found} bytes after its upload, expected {size}")
        staged.unlink()

    def _upload(self, staged: Path, sha256: str) -> None:
        path = self._path(sha256)
        if multipart.is_s3(self._fs):
            self._call(lambda: multipart.upload(self._fs, path, staged))
        else:
            self._call(lambda: self._fs.put_file(str(staged), path))

    def read(self, sha256: str, start: int = 0) -> Iterator[bytes]:
        size = self.size(sha256)
        if size is None:
            raise FileNotFoundError(self._path(sha256))
        while start < size:
            stop = min(size, start + WINDOW)
            block = self._window(sha256, start, stop)
            yield block
            start += len(block)

    def _window(self, sha256: str, start: int, stop: int) -> bytes:
        block: bytes = self._call(lambda: self._fs.cat_file(self._path(sha256), start=start, end=stop))
        if len(block) != stop - start:
            raise SourceError(f"{self._url}: {sha256}: {len(block)} bytes came, expected {stop - start}")
        return block

    def remove(self, sha256: str) -> None:
        with suppress(FileNotFoundError):
            self._call(lambda: self._fs.rm_file(self._path(sha256)))

    def set_aside(self, sha256: str) -> None:
        self.remove(sha256)

    def abandon(self, before: float) -> None:
        if multipart.is_s3(self._fs):
            self._call(lambda: multipart.abandon(self._fs, self._root, before))

    def _call(self, work: Callable[[], Any]) -> Any:
        """What the store says, in our words; its file system has tried again itself."""
        try:
            return work()
        except (FileNotFoundError, LorikeetError):
            raise
        except Exception as error:
            raise SourceError(
                f"{self._url}: {type(error).__name__}: {error}", hint="check the address and the credentials"
            ) from error


def open_objects(place: Path | str, work: Path, options: dict[str, Any] | None = None) -> LocalObjects | RemoteObjects:
    """A folder, or a URL such as s3://bucket/prefix. `work` is a local folder for what is under way to there.

    `options` are those of the store's file system in fsspec, such as `endpoint_url`. Raises `ConfigError`.
    """
    try:
        if isinstance(place, Path):
            return LocalObjects(place)
        if "://" not in place or place.startswith("file://"):
            return LocalObjects(Path(place.removeprefix("file://")).expanduser().absolute())
        return RemoteObjects(place, work / "staging", options)
    except OSError as error:
        raise disk_error(error, Path(str(place))) from error


def _file_system(url: str, options: dict[str, Any]) -> tuple[Any, str]:
    import fsspec

    parts = urlsplit(url)
    if not parts.netloc or parts.scheme not in _EXTRAS:
        raise ConfigError(
            f"blobs: found {url!r}; expected a folder, or such as s3://bucket/prefix",
            hint=f"stores are {', '.join(f'{one}://' for one in _EXTRAS)}", param="blobs",
        )  # fmt: skip
    if parts.scheme == "s3" and "endpoint_url" not in options and os.environ.get("AWS_ENDPOINT_URL"):
        options = {**options, "endpoint_url": os.environ["AWS_ENDPOINT_URL"]}
    try:
        fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False, **options)
    except ImportError:
        extra = _EXTRAS.get(parts.scheme, parts.scheme)
        raise ConfigError(
            f"blobs: {parts.scheme}:// needs a package that is not installed",
            hint=f"pip install 'lorikeet-llm[{extra}]'",
            param="blobs",
        ) from None
    except ValueError as error:
        hint = "expected a folder, s3://, gs:// or az://"
        raise ConfigError(f"blobs: {url!r}: {error}", hint=hint, param="blobs") from error
    return fs, str(root).rstrip("/")


def sync(path: Path) -> None:
    """On the disk, not only on its way there."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def disk_error(error: OSError, place: Path) -> LorikeetError:
    import errno

    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(place if place.exists() else place.anchor or ".").free
        return DiskFullError(f"the disk of {place} is full, {free} bytes are free", hint="free some space")
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        return ConfigError(f"{place} is no folder, or lies in none", hint="name another place")
    return ConfigError(f"{place} cannot be written: {error.strerror or error}", hint="check its owner and mode")
