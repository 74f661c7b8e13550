"""Downloads from a source that is scripted in memory: what resumes, what lands, what is refused, what is kept."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorikeet.adapters import download
from lorikeet.adapters.configs import CONFIG
from lorikeet.adapters.download import Manifest, RemoteFile, Store
from lorikeet.adapters.files import LOCK, WEIGHTS
from lorikeet.adapters.transport import Deadline, TransientError
from lorikeet.config import SourceConfig
from lorikeet.errors import AdapterError, DeadlineError, DiskFullError, SourceError

FAST = SourceConfig(backoff_seconds=0.001, longest_backoff=0.002, stall_seconds=1, attempt_seconds=5, total_seconds=10)


def weights(size: int = 4000, fill: bytes = b"\x07") -> bytes:
    """Bytes that begin as a safetensors file does."""
    return (16).to_bytes(8, "little") + b"{}".ljust(16) + fill * (size - 24)


class Scripted:
    """`cuts`: after how many bytes each read breaks off. `sent` counts the bytes that were handed out."""

    def __init__(self, files: dict[str, bytes], *, version: str | None = "1", digests: bool = False) -> None:
        self.files = files
        self.version = version
        self.digests = digests
        self.cuts: list[int] = []
        self.problems: list[Exception] = []
        self.starts: list[int] = []
        self.sent = 0
        self.step = 1000
        self.slow = 0.0
        self.resumes = True

    def manifest(self, deadline: Deadline | None = None) -> Manifest:
        made = []
        for name, data in self.files.items():
            said = (("sha256", hashlib.sha256(data).hexdigest()),) if self.digests else ()
            made.append(RemoteFile(name, len(data), f"scripted://{id(self)}/{name}", self.version, said))
        return Manifest("scripted://adapter", tuple(made))

    def read(self, file: RemoteFile, start: int, deadline: Deadline) -> tuple[int, Iterator[bytes]]:
        if self.problems:
            raise self.problems.pop(0)
        self.starts.append(start)
        start = start if self.resumes else 0
        return start, self.chunks(self.files[file.name], start)

    def chunks(self, data: bytes, start: int) -> Iterator[bytes]:
        left = self.cuts.pop(0) if self.cuts else len(data)
        for at in range(start, len(data), self.step):
            part = data[at : min(at + self.step, len(data))][:left]
            if self.slow:
                time.sleep(self.slow)
            self.sent += len(part)
            yield part
            left -= len(part)
            if left <= 0:
                raise TransientError("broken off as told")


def adapter(size: int = 4000) -> dict[str, bytes]:
    return {CONFIG: b'{"peft_type": "LORA"}', WEIGHTS: weights(size)}


def bring(store: Store, source: Scripted, seconds: float = 10.0) -> Path:
    return store.bring(source, source.manifest(), Deadline.after(seconds))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def left_behind(store: Store) -> list[str]:
    places = [store.folder / part for part in ("partial", "adapters")]
    return [path.name for place in places if place.exists() for path in place.iterdir() if path.name.startswith(".")
            or place.name == "partial"]  # fmt: skip


def test_what_was_there_is_here(tmp_path: Path) -> None:
    source, store = Scripted(adapter()), Store(tmp_path, FAST)
    assert store.held(source.manifest()) is None
    folder = bring(store, source)
    assert contents(folder) == source.files and left_behind(store) == []
    sent = source.sent
    assert bring(store, source) == folder == store.held(source.manifest()) and source.sent == sent
    assert Store(tmp_path, FAST).held(source.manifest()) == folder


@settings(max_examples=60, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 3000), max_size=8),
    step=st.integers(1, 1500),
    size=st.integers(25, 6000),
    resumes=st.booleans(),
)
def test_however_it_breaks_the_bytes_are_right(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], step: int, size: int, resumes: bool
) -> None:
    source = Scripted(adapter(size), digests=True)
    source.cuts, source.step, source.resumes = [max(cut, 1) for cut in cuts], step, resumes
    store = Store(tmp_path_factory.mktemp("store"), msgspec.structs.replace(FAST, attempts=10))
    folder = bring(store, source)
    assert contents(folder) == source.files and left_behind(store) == []
    if resumes:
        assert source.sent == sum(map(len, source.files.values()))


def test_it_goes_on_where_it_broke_off(tmp_path: Path) -> None:
    source, store = Scripted(adapter()), Store(tmp_path, FAST)
    source.cuts = [21, 1500, 1000]
    bring(store, source)
    assert source.starts == [0, 0, 1500, 2500] or source.starts == [0, 21, 0, 1500, 2500]
    assert source.sent == 4021


def test_another_process_goes_on_with_what_a_crash_left(tmp_path: Path) -> None:
    source, store = Scripted({WEIGHTS: weights(), CONFIG: b"{}"}), Store(tmp_path, FAST)

    class Crash(BaseException):
        pass

    def chunks(data: bytes, start: int) -> Iterator[bytes]:
        yield data[:3000]
        raise Crash

    usual, source.chunks = source.chunks, chunks  # type: ignore[method-assign]
    with pytest.raises(Crash):
        bring(store, source)
    assert store.held(source.manifest()) is None and list((tmp_path / "adapters").iterdir()) == []
    source.chunks = usual  # type: ignore[method-assign]
    folder = bring(Store(tmp_path, FAST), source)
    assert source.starts == [0, 3000, 0] and contents(folder) == source.files


@pytest.mark.parametrize("at", ["link", "rename"])
def test_a_crash_while_landing_leaves_no_half_adapter(at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, store = Scripted(adapter()), Store(tmp_path, FAST)
    calls: list[Any] = []

    def fail(*args: Any, **more: Any) -> None:
        calls.append(args)
        if at == "rename" or len(calls) == 2:
            raise KeyboardInterrupt

    usual = os.link
    monkeypatch.setattr(os, "link", fail if at == "link" else usual)
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(KeyboardInterrupt):
        bring(store, source)
    monkeypatch.undo()
    assert store.held(source.manifest()) is None and list((tmp_path / "adapters").iterdir()) == []
    assert contents(bring(store, source)) == source.files


def test_the_same_bytes_are_stored_once(tmp_path: Path) -> None:
    one, two, three = Scripted(adapter()), Scripted(adapter()), Scripted({**adapter(), CONFIG: b'{"r": 8}'})
    store = Store(tmp_path, FAST)
    assert bring(store, one) == bring(store, two) != bring(store, three)
    assert len(list((tmp_path / "blobs").iterdir())) == 3
    blob = tmp_path / "blobs" / hashlib.sha256(weights()).hexdigest()
    assert blob.stat().st_nlink == 3  # itself and two adapters


def test_knowing_a_hash_is_not_having_the_bytes(tmp_path: Path) -> None:
    """A source that claims the hash of somebody else's adapter is asked for the bytes all the same."""
    store, private = Store(tmp_path, FAST), Scripted(adapter(), digests=True)
    bring(store, private)
    liar = Scripted({CONFIG: b"{}", WEIGHTS: weights(fill=b"\x09")})
    claimed = [RemoteFile(f.name, f.size, f"liar://{f.name}", "1", f.digests) for f in private.manifest().files]
    liar.files = {**liar.files, CONFIG: private.files[CONFIG]}
    with pytest.raises(SourceError, match="its sha256 is"):
        store.bring(liar, Manifest("liar", tuple(claimed)), Deadline.after(5))


def test_a_new_version_is_downloaded(tmp_path: Path) -> None:
    source, store = Scripted(adapter()), Store(tmp_path, FAST)
    first = bring(store, source)
    source.files, source.version = {CONFIG: b"{}", WEIGHTS: weights(fill=b"\x08")}, "2"
    assert bring(store, source) != first and contents(first) == adapter()


def test_without_a_version_nothing_is_reused(tmp_path: Path) -> None:
    source, store = Scripted(adapter(), version=None), Store(tmp_path, FAST)
    bring(store, source)
    source.files = {CONFIG: b"{}".ljust(21), WEIGHTS: weights(fill=b"\x08")}
    assert contents(bring(store, source)) == source.files


def test_corrupt_bytes_are_fetched_once_more_and_then_refused(tmp_path: Path) -> None:
    source, store = Scripted(adapter(), digests=True), Store(tmp_path, FAST)
    manifest = source.manifest()
    good, source.files = source.files, {**source.files, WEIGHTS: weights(fill=b"\x08")}
    with pytest.raises(SourceError, match=r"adapter_model.safetensors: its sha256 is .*, expected") as error:
        store.bring(source, manifest, Deadline.after(5))
    assert error.value.retryable and source.starts == [0, 0, 0] and left_behind(store) == []
    source.files = good
    assert contents(store.bring(source, manifest, Deadline.after(5))) == good


def test_a_damaged_partial_download_mends(tmp_path: Path) -> None:
    source, store = Scripted(adapter(), digests=True), Store(tmp_path, FAST)
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial" / source.manifest().files[1].key).write_bytes(b"rubbish" * 100)
    assert contents(bring(store, source)) == source.files


def test_troubles_that_pass_are_waited_for(tmp_path: Path) -> None:
    source, store = Scripted(adapter()), Store(tmp_path, FAST)
    source.problems = [TransientError("busy"), TimeoutError("slow"), TransientError("busy", retry_after=0.01)]
    assert contents(bring(store, source)) == source.files


def test_troubles_that_stay_are_told_with_their_number(tmp_path: Path) -> None:
    source, store = Scripted(adapter()), Store(tmp_path, FAST)
    source.problems = [TransientError("busy") for _ in range(50)]
    with pytest.raises(SourceError, match=r"adapter_config.json: busy, 5 times in a row"):
        bring(store, source)
    assert len(source.problems) == 45


def test_what_no_attempt_mends_is_not_tried_again(tmp_path: Path) -> None:
    source, store = Scripted(adapter()), Store(tmp_path, FAST)
    source.problems = [AdapterError("as told"), TransientError("never asked")]
    with pytest.raises(AdapterError, match="as told"):
        bring(store, source)
    assert len(source.problems) == 1


def test_the_deadline_ends_it_and_what_came_is_kept(tmp_path: Path) -> None:
    source, store = Scripted(adapter()), Store(tmp_path, FAST)
    source.slow = 0.1
    with pytest.raises(DeadlineError) as error:
        bring(store, source, seconds=0.25)
    assert (error.value.status, error.value.retryable) == (504, True)
    source.slow, sent = 0.0, source.sent
    assert contents(bring(store, source)) == source.files and source.sent == 4021 and sent > 0


def test_a_long_pause_that_the_source_asks_for_is_not_slept_through(tmp_path: Path) -> None:
    source, store = Scripted(adapter()), Store(tmp_path, FAST)
    source.problems = [TransientError("status 429", retry_after=3600.0)]
    began = time.monotonic()
    with pytest.raises(DeadlineError, match="status 429"):
        bring(store, source)
    assert time.monotonic() - began < 5


def test_more_than_announced_is_refused(tmp_path: Path) -> None:
    source, store = Scripted(adapter()), Store(tmp_path, FAST)
    manifest = source.manifest()
    source.files = {**source.files, WEIGHTS: weights(5000)}
    with pytest.raises(SourceError, match="more came than the 4000 bytes announced"):
        store.bring(source, manifest, Deadline.after(5))


def test_sizes_are_refused_before_a_byte_is_asked_for(tmp_path: Path) -> None:
    source, store = Scripted(adapter()), Store(tmp_path, SourceConfig(max_bytes=4020))
    with pytest.raises(AdapterError, match=r"has 4021 bytes, more than the 4020") as error:
        bring(store, source)
    assert "--max-adapter-bytes" in str(error.value)
    huge = Manifest("x", (RemoteFile(LOCK, 10**10, "x://lock", "1"),))
    with pytest.raises(AdapterError, match=r"lorikeet.json: 10000000000 bytes, expected at most 33554432"):
        store.bring(source, huge, Deadline.after(5))
    assert source.starts == []


def test_a_header_of_ten_gigabytes_ends_the_download_early(tmp_path: Path) -> None:
    source, store = Scripted({WEIGHTS: (10 * 10**9).to_bytes(8, "little") + bytes(2**20)}), Store(tmp_path, FAST)
    with pytest.raises(AdapterError, match="its header claims 10000000000 bytes"):
        bring(store, source)
    assert source.sent == 1000 and left_behind(store) == []


def test_a_full_disk_is_said_clearly_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, store = Scripted(adapter()), Store(tmp_path, FAST)
    room = 2500

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            nonlocal room
            room -= len(data)
            if room < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    usual = Path.open

    def opened(path: Path, mode: str = "r", *args: Any, **more: Any) -> Any:
        return Full(path, mode.replace("b", "")) if path.parent.name == "partial" and "b" in mode and mode != "rb" \
            else usual(path, mode, *args, **more)  # fmt: skip

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(DiskFullError, match="the disk of .* is full") as error:
        bring(store, source)
    assert (error.value.status, error.value.retryable) == (507, True) and left_behind(store) == []
    room = 10**6
    assert contents(bring(store, source)) == source.files


def test_a_disk_that_is_full_after_the_last_byte_leaves_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, store = Scripted(adapter()), Store(tmp_path, FAST)
    for method in ("write_text", "replace"):
        with monkeypatch.context() as patch:

            def full(path: Path, *args: Any) -> None:
                path.touch()
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            patch.setattr(Path, method, full)
            with pytest.raises(DiskFullError):
                bring(store, source)
        assert not list(tmp_path.rglob(".*"))
    assert contents(bring(store, source)) == source.files


def test_too_little_room_is_said_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, store = Scripted(adapter()), Store(tmp_path, FAST)
    monkeypatch.setattr(download, "SPARE", 2**60)
    with pytest.raises(DiskFullError, match="has 21 bytes, .* free"):
        bring(store, source)
    assert source.starts == []


def test_many_threads_download_once(tmp_path: Path) -> None:
    source, store = Scripted(adapter(100_000)), Store(tmp_path, FAST)
    source.slow = 0.001
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(bring(store, source))) for _ in range(20)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(20)
    assert len(found) == 20 and len(set(found)) == 1
    assert source.sent == sum(map(len, source.files.values()))


def test_the_longest_unused_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "RECENT_SECONDS", -1.0)
    store = Store(tmp_path, SourceConfig(cache_bytes=9000))
    shared = {CONFIG: b"{}"}
    sources = [Scripted({**shared, WEIGHTS: weights(fill=bytes([i]))}) for i in range(3)]
    folders = []
    for i, source in enumerate(sources[:2]):
        folders.append(bring(store, source))
        os.utime(folders[i], (i, i))
    os.utime(folders[0], (5, 5))  # the first was used again
    folders.append(bring(store, sources[2]))
    assert [folder.exists() for folder in folders] == [True, False, True]
    assert len(list((tmp_path / "blobs").iterdir())) == 3
    assert contents(bring(store, sources[1])) == sources[1].files


def test_what_is_in_use_or_fresh_is_not_trimmed(tmp_path: Path) -> None:
    store = Store(tmp_path, SourceConfig(cache_bytes=1))
    folder = bring(store, Scripted(adapter()))
    assert folder.exists()


def test_what_a_crash_left_is_removed_after_a_day(tmp_path: Path) -> None:
    store = Store(tmp_path, FAST)
    for part in ("partial", "adapters/.half"):
        (tmp_path / part).mkdir(parents=True)
    (tmp_path / "partial" / "old").write_text("x")
    (tmp_path / "partial" / "new").write_text("x")
    (tmp_path / "adapters/.half" / CONFIG).write_text("x")
    os.utime(tmp_path / "partial" / "old", (0, 0))
    os.utime(tmp_path / "adapters/.half", (0, 0))
    store.trim()
    assert left_behind(store) == ["new"]
