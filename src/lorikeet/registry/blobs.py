"""The blob store: files by content, verified when they are read, removed when nothing needs them.

    sha256 = blobs.put(path)                      # streams, fsynced, atomic
    manifest = blobs.put_folder(folder, names)    # a folder by content: a blob that lists its files
    folder = blobs.materialise(manifest.sha256)   # read-only copies (hard links where they can be), for the engine

An upload of a client is a file in `staging` that grows and is resumed by its id; it becomes a blob when it is whole.
Below `work` lie `staging`, `cache` (blobs brought from an object store) and `folders` (what was materialised).
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol

import msgspec

from lorikeet.errors import DataError, InvalidRequestError, LorikeetError, NotFoundError, UnavailableError
from lorikeet.registry.objects import CHUNK, LocalObjects, disk_error, open_objects, sync
from lorikeet.registry.records import Manifest, ManifestFile

GRACE_SECONDS = 3600.0  # for which a blob that was put waits to be needed
ANNOUNCE_SECONDS = 45.0  # how long a put waits for a blob that is just being removed
REMOVE_SECONDS = 10.0  # after which a collector gives up a batch: what it doomed may be taken back soon
RECENT_SECONDS = 600.0  # a folder used so lately is not trimmed: somebody may be about to read it
STALE_SECONDS = 86_400.0  # after which an upload nobody went on with is removed
MAX_MANIFEST = 4 * 2**20  # bytes of the list of files
_SHA256 = re.compile(r"[0-9a-f]{64}")
_UPLOAD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

Report = Callable[[int, int], None]  # (bytes done, bytes in all)


class DamagedBlobError(LorikeetError):
    """The bytes in the store are not those that were put."""

    code = "damaged_blob"
    status = 500


class Ledger(Protocol):
    """Who knows which blobs are needed: the catalog's `ledger`."""

    def announce(self, sha256: str, size: int) -> bool: ...

    def doom(self, before: float, limit: int = ...) -> list[str]: ...

    def forget(self, sha256: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Blob:
    sha256: str
    bytes: int


class BlobStore:
    """`place` is a folder or a URL; `work` a local folder. `options` are those of the URL's file system in fsspec."""

    def __init__(
        self,
        place: Path | str,
        work: Path,
        ledger: Ledger,
        *,
        options: dict[str, Any] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._ledger = ledger
        self._clock = clock
        self._objects = open_objects(place, work, options)
        self.staging = self._objects.staging
        self._folders = work / "folders"
        # what folders are linked from: the store itself, or a copy of what was brought from it
        self._local = self._objects if isinstance(self._objects, LocalObjects) else LocalObjects(work / "cache")
        self._folders.mkdir(parents=True, exist_ok=True)

    # --- putting ----------------------------------------------------------------------------------------------------

    def put(
        self, source: Path | bytes | IO[bytes], *, expected: str | None = None, report: Report | None = None
    ) -> Blob:
        """Store a file, bytes or a stream. With `expected` (a sha256) only if that is its hash: else `DataError`."""
        upload = self.begin(f"put-{secrets.token_hex(16)}")
        try:
            if isinstance(source, bytes):
                upload.write(source)
            elif isinstance(source, Path):
                with source.open("rb") as file:
                    _copy(file, upload.write, source.stat().st_size, report)
            else:
                _copy(source, upload.write, 0, report)
            return upload.finish(expected)
        except BaseException:
            upload.discard()
            raise

    def put_folder(self, folder: Path, names: Iterable[str], *, report: Report | None = None) -> Manifest:
        """Store these files of a folder (paths relative to it, with slashes) and the list of them."""
        return self.put_files({name: folder / name for name in names}, report=report)

    def put_files(self, paths: Mapping[str, Path], *, report: Report | None = None) -> Manifest:
        """Store files as those of a folder: name in it -> where the file is now."""
        total, done = sum(path.stat().st_size for path in paths.values()), 0
        files = []
        for name, path in paths.items():
            before = done

            def step(here: int, _: int, before: int = before) -> None:
                if report is not None:
                    report(before + here, total)

            blob = self.put(path, report=step)
            files.append(ManifestFile(path=name, sha256=blob.sha256, bytes=blob.bytes))
            done += blob.bytes
        return self.put_manifest(files)

    def put_manifest(self, files: Iterable[ManifestFile]) -> Manifest:
        """Store the list of files that are here already, such as those of an upload."""
        listed = sorted(files, key=lambda one: one.path)
        if not listed or len({checked_path(one.path) for one in listed}) != len(listed):
            raise DataError(f"expected files of different paths, found {[one.path for one in listed][:10]}")
        return Manifest(sha256=self.put(_encode(listed)).sha256, files=tuple(listed))

    def begin(self, upload_id: str) -> Upload:
        """An upload of this id, which goes on where an earlier one of the same id ended."""
        if not _UPLOAD.fullmatch(upload_id):
            raise InvalidRequestError(f"upload: found {upload_id[:80]!r}; expected letters and digits", param="upload")
        return Upload(self, self.staging / f"upload-{upload_id}")

    def _land(self, staged: Path, blob: Blob) -> None:
        """In this order: announced, so that it is not removed; then there."""
        deadline = time.monotonic() + ANNOUNCE_SECONDS
        while not self._ledger.announce(blob.sha256, blob.bytes):
            if time.monotonic() > deadline:
                raise UnavailableError(f"{blob.sha256} is being removed", hint="try again", retry_after=5.0)
            time.sleep(0.05)
        if self._objects.size(blob.sha256) == blob.bytes:
            staged.unlink()
        else:
            self._objects.land(staged, blob.sha256)

    # --- reading ----------------------------------------------------------------------------------------------------

    def size(self, sha256: str) -> int:
        """Raises `NotFoundError`."""
        size = self._objects.size(_checked_hash(sha256))
        if size is None:
            raise _missing(sha256)
        return size

    def read(self, sha256: str, start: int = 0) -> Iterator[bytes]:
        """Chunks; from the beginning on they are verified, and the last one comes only if the hash is right.

        Raises `NotFoundError`, `DamagedBlobError`. Chunks from a later `start` cannot be verified.
        """
        digest, held = hashlib.sha256(), b""
        try:
            for chunk in self._objects.read(_checked_hash(sha256), start):
                digest.update(chunk)
                if held:
                    yield held
                held = chunk
        except FileNotFoundError:
            raise _missing(sha256) from None
        if start == 0 and digest.hexdigest() != sha256:
            self._objects.set_aside(sha256)
            raise _damaged(sha256, digest.hexdigest())
        if held:
            yield held

    def read_all(self, sha256: str, limit: int = 64 * 2**20) -> bytes:
        size = self.size(sha256)
        if size > limit:
            raise DataError(f"{sha256} has {size} bytes, expected at most {limit}")
        return b"".join(self.read(sha256))

    def manifest(self, sha256: str) -> Manifest:
        """The list of files that was put under this hash. Raises `NotFoundError`, `DamagedBlobError`."""
        try:
            files = msgspec.json.decode(self.read_all(sha256, MAX_MANIFEST), type=_Listing).files
        except msgspec.DecodeError as error:
            raise DataError(f"{sha256} is not a manifest: {error}") from None
        for one in files:
            checked_path(one.path)
            _checked_hash(one.sha256)
        return Manifest(sha256=sha256, files=files)

    # --- folders ----------------------------------------------------------------------------------------------------

    def materialise(self, manifest: str, report: Report | None = None, *, only: tuple[str, ...] | None = None) -> Path:
        """A folder with the files of a manifest, read-only, verified when it was made. Do not write to it.

        With `only` those of these names, as far as there are such. Raises `NotFoundError`, `DamagedBlobError`,
        `SourceError`, `DiskFullError`.
        """
        part = "" if only is None else "-" + hashlib.sha256("/".join(only).encode()).hexdigest()[:16]
        folder = self._folders / (_checked_hash(manifest) + part)
        if self._touch(folder):
            return folder
        try:
            with _alone(self._folders / f".{folder.name}.lock"):
                if not self._touch(folder):
                    listed = self.manifest(manifest)
                    if only is not None:
                        chosen = tuple(one for one in listed.files if one.path in only)
                        listed = msgspec.structs.replace(listed, files=chosen)
                    self._make(folder, listed, report)
        except OSError as error:
            raise disk_error(error, self._folders) from error
        return folder

    def _touch(self, folder: Path) -> bool:
        """Note that it is of use, if it is there."""
        try:
            os.utime(folder)
        except FileNotFoundError:
            return False
        return True

    def _make(self, folder: Path, manifest: Manifest, report: Report | None) -> None:
        fresh = self._folders / f".{folder.name}.{secrets.token_hex(4)}"
        fresh.mkdir()
        done = 0
        try:
            for one in manifest.files:
                target = fresh / one.path
                target.parent.mkdir(parents=True, exist_ok=True)
                self._bring(one, report, done, manifest.bytes)
                _link(self._local.path(one.sha256), target)
                done += one.bytes
            fresh.rename(folder)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)

    def _bring(self, file: ManifestFile, report: Report | None, done: int, total: int) -> None:
        """The blob lies in `_local`, verified. What came from an object store before a break is used."""
        if self._local is self._objects:
            for chunk in self.read(file.sha256):
                done += len(chunk)
                if report is not None:
                    report(done, total)
            return
        if self._local.size(file.sha256) == file.bytes:
            return
        staged = self._local.staging / f"fetch-{file.sha256}"
        with _alone(self._local.staging / f".{file.sha256}.lock"), staged.open("ab+") as out:
            if self._local.size(file.sha256) == file.bytes:
                return
            digest = _digest_of(out)
            try:
                for chunk in self._objects.read(file.sha256, out.tell()):
                    out.write(chunk)
                    digest.update(chunk)
                    if report is not None:
                        report(done + out.tell(), total)
            except FileNotFoundError:
                raise _missing(file.sha256) from None
            out.flush()
            if digest.hexdigest() != file.sha256:
                staged.unlink()
                raise _damaged(file.sha256, digest.hexdigest())
            self._local.land(staged, file.sha256)

    def export(self, manifest: str, folder: Path, report: Report | None = None) -> Manifest:
        """Write the files of a manifest into a new folder of the user's. Raises `InvalidRequestError` where it is."""
        if folder.exists():
            raise InvalidRequestError(f"{folder} is there already", hint="name a new folder", param="output")
        listed = self.manifest(manifest)
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = folder.parent / f".{folder.name}.{secrets.token_hex(4)}"
        done = 0
        try:
            for one in listed.files:
                target = fresh / one.path
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("wb") as out:
                    for chunk in self.read(one.sha256):
                        out.write(chunk)
                        done += len(chunk)
                        if report is not None:
                            report(done, listed.bytes)
            fresh.rename(folder)
        except OSError as error:
            raise disk_error(error, folder.parent) from error
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        return listed

    # --- removing ---------------------------------------------------------------------------------------------------

    def collect(self, grace_seconds: float = GRACE_SECONDS) -> int:
        """Remove the blobs that nothing needs, and what crashed uploads left; how many blobs there were.

        Blobs that were put within the grace period stay: whoever put them is about to need them.
        """
        count = 0
        while doomed := self._ledger.doom(self._clock() - grace_seconds, 50):
            began = time.monotonic()
            for sha256 in doomed:
                if time.monotonic() - began > REMOVE_SECONDS:
                    return count  # the rest is taken up by the next collection
                self._objects.remove(sha256)
                self._ledger.forget(sha256)
                count += 1
        self._remove_stale()
        self._objects.abandon(self._clock() - STALE_SECONDS)
        return count

    def trim(self, budget: int) -> None:
        """Remove the folders that were not used for longest until the others hold no more than `budget` bytes."""
        folders = [path for path in self._folders.iterdir() if not path.name.startswith(".")]
        sizes = {one: sum(file.stat().st_size for file in one.rglob("*") if file.is_file()) for one in folders}
        total = sum(sizes.values())
        for folder in sorted(folders, key=lambda path: path.stat().st_mtime):
            if total <= budget or time.time() - folder.stat().st_mtime < RECENT_SECONDS:
                break
            gone = self._folders / f".{folder.name}.{secrets.token_hex(4)}"
            folder.rename(gone)  # whole or not at all
            shutil.rmtree(gone)
            total -= sizes[folder]
        if self._local is not self._objects:
            for blob in self._local.folder.glob("??/*"):
                stat = blob.stat()
                if stat.st_nlink == 1 and time.time() - stat.st_mtime > RECENT_SECONDS:
                    blob.unlink()

    def _remove_stale(self) -> None:
        for place in {self.staging, self._local.staging, self._folders}:
            for path in place.iterdir():
                with suppress(FileNotFoundError):
                    old = time.time() - path.stat().st_mtime > STALE_SECONDS
                    if old and (place != self._folders or path.name.startswith(".")):
                        shutil.rmtree(path) if path.is_dir() else path.unlink()


class Upload:
    """Bytes on their way to become a blob. `offset` says how many are here; write the ones after them."""

    def __init__(self, store: BlobStore, path: Path) -> None:
        self._store = store
        self._path = path

    @property
    def offset(self) -> int:
        try:
            return self._path.stat().st_size
        except FileNotFoundError:
            return 0

    def write(self, data: bytes) -> None:
        """Raises `DiskFullError`; what was written before stays."""
        try:
            with self._path.open("ab", buffering=0) as file:
                file.write(data)
        except OSError as error:
            raise disk_error(error, self._path.parent) from error

    def finish(self, expected: str | None = None) -> Blob:
        """The blob that the bytes are. Raises `DataError` when `expected` is another hash; they are dropped then."""
        try:
            self._path.touch()
            with self._path.open("rb+") as file:
                found = _digest_of(file).hexdigest()
                size = file.tell()
            if expected is not None and found != expected:
                self.discard()
                raise DataError(f"the sha256 of what came is {found}, expected {expected}", hint="upload it again")
            blob = Blob(found, size)
            self._store._land(self._path, blob)
        except OSError as error:
            raise disk_error(error, self._path.parent) from error
        return blob

    def discard(self) -> None:
        self._path.unlink(missing_ok=True)


class _Listing(msgspec.Struct, forbid_unknown_fields=True):
    """What a manifest's blob says."""

    version: int
    files: tuple[ManifestFile, ...]


def _encode(files: list[ManifestFile]) -> bytes:
    """The same files are the same bytes."""
    return json.dumps({"version": 1, "files": [msgspec.to_builtins(one) for one in files]}, sort_keys=True).encode()


def checked_path(path: str) -> str:
    """A path inside a folder, with slashes. Raises `InvalidRequestError` for one that leads out of it."""
    parts = path.split("/")
    fine = all(part not in ("", ".", "..") for part in parts) and len(path) <= 512 and path.isprintable()
    if not fine or "\\" in path or ":" in path or PurePosixPath(path).is_absolute():
        raise InvalidRequestError(f"file: found the path {path[:80]!r}; expected one inside the folder", param="file")
    return path


def _checked_hash(sha256: str) -> str:
    if not _SHA256.fullmatch(sha256):
        raise InvalidRequestError(f"sha256: found {sha256[:80]!r}; expected 64 hexadecimal digits", param="sha256")
    return sha256


def _missing(sha256: str) -> NotFoundError:
    return NotFoundError(f"the store holds no blob {sha256}", code="blob_not_found")


def _damaged(sha256: str, found: str) -> DamagedBlobError:
    return DamagedBlobError(
        f"the blob {sha256} is damaged: the sha256 of its bytes is {found}", hint="put the same files again"
    )


def _digest_of(file: IO[bytes]) -> Any:
    """The sha256 over the whole file, whose position is its end then."""
    digest = hashlib.sha256()
    file.seek(0)
    while block := file.read(CHUNK):
        digest.update(block)
    return digest


def _copy(source: IO[bytes], write: Callable[[bytes], None], total: int, report: Report | None) -> None:
    done = 0
    while block := source.read(CHUNK):
        write(block)
        done += len(block)
        if report is not None:
            report(done, total)


def _link(blob: Path, target: Path) -> None:
    """A hard link; a copy where the file system makes none."""
    try:
        os.link(blob, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
            raise
        shutil.copyfile(blob, target)
        target.chmod(0o444)
        sync(target)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Nobody else, in any thread or process, does the same meanwhile."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
