"""Downloads that resume, are checked, land whole, and are kept once per content. No torch.

A cache folder holds `blobs/<sha256>`, `adapters/<key>/` of links to blobs, `known/<file key>` (which blob a file of a
source was), and `partial/` with what is under way. Threads and processes may share it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import random
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn, Protocol

from lorikeet.adapters.files import WEIGHTS
from lorikeet.adapters.transport import Deadline, TransientError
from lorikeet.config import SourceConfig
from lorikeet.errors import AdapterError, DeadlineError, DiskFullError, SourceError, disk_error

log = logging.getLogger("lorikeet.download")

CHUNK = 2**20
MAX_SMALL = 32 * 2**20  # bytes of every file but the weights
MAX_HEADER = 16 * 2**20  # of a safetensors file
SPARE = 64 * 2**20  # bytes of the disk that a download leaves free
STALE_SECONDS = 86_400.0  # after which a download nobody went on with is removed
RECENT_SECONDS = 600.0  # an adapter used so lately is not trimmed: somebody may be about to read it
_LOCK_POLL = 0.05
Report = Callable[[int, int], None]


@dataclass(frozen=True)
class RemoteFile:
    """A file as its source announces it.

    `address` tells it from every other file there is; it never holds a secret. `version` (an ETag, a commit) changes
    with the content; None where the source has no such thing, and then nothing of it is reused. `digests` are
    (algorithm, hex): sha256, md5 or git (the hash of a git blob).
    """

    name: str
    size: int
    address: str
    version: str | None = None
    digests: tuple[tuple[str, str], ...] = ()

    @property
    def key(self) -> str:
        said = [1, self.address, self.size, self.version, sorted(self.digests)]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()


@dataclass(frozen=True)
class Manifest:
    """The files of one adapter as whoever asked may read them now. `title` names it in messages."""

    title: str
    files: tuple[RemoteFile, ...]

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(sorted((one.name, one.key) for one in self.files)).encode()).hexdigest()

    @property
    def size(self) -> int:
        return sum(one.size for one in self.files)


class Chunks(Protocol):
    """Bytes as they come. Whoever asked for them closes them."""

    def __iter__(self) -> Iterator[bytes]: ...

    def close(self) -> None: ...


class Source(Protocol):
    """Where adapters are. Both raise `TransientError`, or a `LorikeetError` that no further attempt mends."""

    def manifest(self, deadline: Deadline) -> Manifest:
        """What is there, for these credentials: `NotFoundError` where they may not read it."""

    def read(self, file: RemoteFile, start: int, deadline: Deadline) -> tuple[int, Chunks]:
        """The bytes from `start` on, or from 0 where the source cannot resume; which of both comes first."""


class Store:
    """Adapters from elsewhere, by content, below `folder`."""

    def __init__(self, folder: Path, config: SourceConfig | None = None) -> None:
        self.folder = folder
        self.config = config or SourceConfig()

    def held(self, manifest: Manifest) -> Path | None:
        """The folder of an adapter that is here already."""
        blobs = {one.name: self._known(one) for one in manifest.files}
        found = {name: sha for name, sha in blobs.items() if sha is not None}
        if len(found) != len(blobs):
            return None
        folder = self._adapter_folder(found)
        if not folder.is_dir():
            return None
        with suppress(OSError):
            os.utime(folder)  # when it was last of use
        return folder

    def bring(self, source: Source, manifest: Manifest, deadline: Deadline, report: Report | None = None) -> Path:
        """The adapter's folder, downloaded where it is not here yet. `report` hears of (bytes here, bytes in all).

        Raises `SourceError`, `AdapterError`, `DiskFullError`, and `DeadlineError` when the deadline passes.
        """
        check_sizes(manifest, self.config.max_bytes)
        held = self.held(manifest)
        if held is not None:
            return held
        try:
            for part in ("blobs", "adapters", "known", "partial", "locks"):
                (self.folder / part).mkdir(parents=True, exist_ok=True)
            blobs, before = {}, 0
            for one in manifest.files:
                blobs[one.name] = self._blob(source, one, deadline, _shifted(report, before, manifest.size))
                before += one.size
            folder = self._land(blobs)
        except OSError as error:
            raise disk_error(error, self.folder) from error
        self.trim()
        return folder

    # --- one file ---------------------------------------------------------------------------------------------------

    def _known(self, file: RemoteFile) -> str | None:
        """The sha256 under which a file is here, because it was downloaded from there before.

        What a source claims of a file's hash opens nothing: who knows the hash of an adapter need not have its bytes.
        """
        if file.version is None:
            return None
        try:
            sha = (self.folder / "known" / file.key).read_text("ascii")
        except OSError:
            return None
        return sha if (self.folder / "blobs" / sha).exists() else None

    def _blob(self, source: Source, file: RemoteFile, deadline: Deadline, report: Callable[[int], None]) -> str:
        with self._alone(file.key, deadline):
            sha = self._known(file)
            if sha is not None:
                return sha
            free = shutil.disk_usage(self.folder).free
            if file.size + SPARE > free:
                raise DiskFullError(
                    f"{file.name} has {file.size} bytes, {self.folder} has {free} free, of which {SPARE} stay so",
                    hint="free some space, or set LORIKEET_CACHE to another disk",
                )
            download = Download(source, file, self.folder / "partial" / file.key, self.config, report)
            sha = download.run(deadline)
            blob = self.folder / "blobs" / sha
            if blob.exists():  # from another place; adapters are linked to the one that is here
                download.path.unlink()
            else:
                download.path.chmod(0o444)
                download.path.replace(blob)
            if file.version is not None:
                _write_whole(self.folder / "known" / file.key, sha)
            return sha

    @contextmanager
    def _alone(self, key: str, deadline: Deadline) -> Iterator[None]:
        """Nobody else, in any thread or process, downloads the same file meanwhile."""
        with (self.folder / "locks" / key).open("w") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if deadline.passed:
                        raise _too_late("another download of it") from None
                    time.sleep(_LOCK_POLL)
            yield

    # --- an adapter -------------------------------------------------------------------------------------------------

    def _adapter_folder(self, blobs: Mapping[str, str]) -> Path:
        content = hashlib.sha256(json.dumps(sorted(blobs.items())).encode()).hexdigest()
        return self.folder / "adapters" / content

    def _land(self, blobs: Mapping[str, str]) -> Path:
        folder = self._adapter_folder(blobs)
        if folder.is_dir():
            return folder
        fresh = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
        fresh.mkdir()
        try:
            for name, sha in blobs.items():
                os.link(self.folder / "blobs" / sha, fresh / name)
            try:
                fresh.rename(folder)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # else: somebody landed the same content
                    raise
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        return folder

    # --- room -------------------------------------------------------------------------------------------------------

    def trim(self) -> None:
        """Remove what was not used for longest until all downloads fit their budget, and what a crash left behind."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "trimming").open("w") as file, suppress(FileNotFoundError):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return  # somebody does it at this moment
            self._remove_stale()
            self._remove_unused()

    def _remove_stale(self) -> None:
        for place in ("partial", "adapters", "locks"):
            for path in _listed(self.folder / place):
                stale = time.time() - path.lstat().st_mtime > STALE_SECONDS
                if stale and (place != "adapters" or path.name.startswith(".")):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _remove_unused(self) -> None:
        now = time.time()
        blobs = {path: path.stat() for path in _listed(self.folder / "blobs")}
        total = sum(one.st_size for one in blobs.values())
        whole = [path for path in _listed(self.folder / "adapters") if not path.name.startswith(".")]
        for folder in sorted(whole, key=lambda path: path.stat().st_mtime):
            if total <= self.config.cache_bytes or now - folder.stat().st_mtime < RECENT_SECONDS:
                break
            gone = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
            folder.rename(gone)  # whole or not at all
            shutil.rmtree(gone)
            for blob in [path for path in blobs if path.stat().st_nlink == 1]:
                if now - blobs[blob].st_ctime > RECENT_SECONDS:  # else it may be about to be linked
                    blob.unlink()
                    total -= blobs.pop(blob).st_size


class Download:
    """One file on its way to `path`, which holds as much of it as has come."""

    def __init__(
        self,
        source: Source,
        file: RemoteFile,
        path: Path,
        config: SourceConfig,
        report: Callable[[int], None] = lambda here: None,
    ) -> None:
        self.path = path
        self._report = report
        self._source = source
        self._file = file
        self._config = config

    def run(self, deadline: Deadline) -> str:
        """Download, resuming and retrying; the sha256 of what then lies at `path`, checked and on the disk."""
        if self._file.version is None and not self._file.digests:
            self.path.unlink(missing_ok=True)  # nothing tells whether it is still the same file
        failures = mismatches = 0
        while True:
            before = self._here
            try:
                self._attempt(deadline.within(self._config.attempt_seconds))
                return self._checked()
            except _MismatchError as error:
                self.path.unlink(missing_ok=True)
                mismatches += 1
                if mismatches > 1:
                    raise SourceError(str(error), hint="the source is damaged, or something on the way is") from None
                problem = TransientError(str(error))
            except (TransientError, TimeoutError) as error:
                problem = error if isinstance(error, TransientError) else TransientError(str(error))
                failures = 1 if self._here > before else failures + 1
            if deadline.passed:
                raise _too_late(f"{self._file.name} ({problem})")
            if failures >= self._config.attempts:
                raise SourceError(f"{self._file.name}: {problem}, {failures} times in a row", hint="try again later")
            pause(self._config, max(failures, 1), problem, deadline, self._file.name)

    @property
    def _here(self) -> int:
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return 0

    def _attempt(self, deadline: Deadline) -> None:
        start = self._here
        if start > self._file.size:
            start = 0
        if start == self._file.size and start:
            return
        start, chunks = self._source.read(self._file, start, deadline)
        with closing(chunks), self.path.open("r+b" if start else "wb") as out:
            out.truncate(start)
            out.seek(start)
            self._write(out, start, chunks, deadline)

    def _write(self, out: IO[bytes], at: int, chunks: Iterable[bytes], deadline: Deadline) -> None:
        looked = self._file.name != WEIGHTS or at >= 8
        for chunk in chunks:
            if at + len(chunk) > self._file.size:
                raise SourceError(f"{self._file.name}: more came than the {self._file.size} bytes announced")
            try:
                out.write(chunk)
                out.flush()
            except OSError as error:
                self._give_up(error)
            at += len(chunk)
            self._report(at)
            if not looked and at >= 8:
                self._look_at_header()
                looked = True
            deadline.left()
        if at < self._file.size:
            raise TransientError(f"the connection broke after {at} of {self._file.size} bytes")
        try:
            os.fsync(out.fileno())
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> NoReturn:
        """The disk takes no more: leave it what was written."""
        self.path.unlink(missing_ok=True)
        raise disk_error(error, self.path.parent) from error

    def _look_at_header(self) -> None:
        """A safetensors file whose header cannot be is refused before the rest of it is fetched."""
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER or length + 8 > self._file.size:
            self.path.unlink()
            raise AdapterError(
                f"{self._file.name}: its header claims {length} bytes, expected at most "
                f"{min(MAX_HEADER, self._file.size - 8)}",
                hint="corrupt, or not a safetensors file",
                param=self._file.name,
            )

    def _checked(self) -> str:
        hashes = {"sha256": hashlib.sha256()}
        for algorithm, _ in self._file.digests:
            if algorithm == "git":
                hashes["git"] = hashlib.sha1(b"blob %d\0" % self._file.size, usedforsecurity=False)
            elif algorithm == "md5":
                hashes["md5"] = hashlib.md5(usedforsecurity=False)
        with self.path.open("rb") as file:
            while block := file.read(CHUNK):
                for one in hashes.values():
                    one.update(block)
        for algorithm, expected in self._file.digests:
            found = hashes[algorithm].hexdigest()
            if found != expected:
                raise _MismatchError(f"{self._file.name}: its {algorithm} is {found}, expected {expected}")
        return hashes["sha256"].hexdigest()


class _MismatchError(Exception):
    """What came is not what was announced."""


def pause(config: SourceConfig, failures: int, problem: TransientError, deadline: Deadline, what: str) -> None:
    """Wait before the next attempt: exponentially longer, with jitter, or as long as the source asked for.

    Raises `DeadlineError` at once when that would be too late.
    """
    seconds = min(config.longest_backoff, config.backoff_seconds * 2 ** (failures - 1)) * random.uniform(0.5, 1.0)
    seconds = max(seconds, problem.retry_after or 0.0)
    log.info("%s: %s; trying again in %.1f s", what, problem, seconds)
    if time.monotonic() + seconds >= deadline.ends:
        raise _too_late(f"{what} ({problem})")
    time.sleep(seconds)


def check_sizes(manifest: Manifest, limit: int) -> None:
    """Raise `AdapterError` for an adapter that announces more bytes than are taken."""
    for one in manifest.files:
        if one.name != WEIGHTS and one.size > MAX_SMALL:
            raise AdapterError(f"{one.name}: {one.size} bytes, expected at most {MAX_SMALL}", param=one.name)
    if manifest.size > limit:
        raise AdapterError(
            f"{manifest.title} has {manifest.size} bytes, more than the {limit} taken for one adapter",
            hint="start the server with a larger --max-adapter-bytes",
        )


def _shifted(report: Report | None, before: int, total: int) -> Callable[[int], None]:
    """For a file after `before` bytes of others: what it hears of the file, `report` hears of all."""
    return lambda here: None if report is None else report(before + here, total)


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []


def _write_whole(path: Path, text: str) -> None:
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        fresh.write_text(text, "ascii")
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def _too_late(what: str) -> DeadlineError:
    return DeadlineError(f"the adapter was not here in time: {what}", hint="try again; what has come is kept")
