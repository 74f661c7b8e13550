"""Compiled adapter files: layout, rounding, reuse, damage."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests.fixtures import make_slab

from lorikeet.adapters.checkpoint import BaseTensors
from lorikeet.adapters.compiled import (
    ALIGNMENT,
    SUFFIX,
    CompiledFile,
    CompiledHeader,
    _write,
    bfloat16_bits,
    compile_adapter,
    compiled_name,
    lay_out,
    open_compiled,
    remove_leftovers,
    trim,
)
from lorikeet.adapters.configs import CONFIG
from lorikeet.adapters.files import WEIGHTS, AdapterFile, Lock, LockedBase, write_lock
from lorikeet.adapters.normal import compile_entries
from lorikeet.errors import AdapterError, DiskFullError, LockMismatchError, UnavailableError
from lorikeet.model.families import load_spec
from lorikeet.types import BaseIdentity

BASE = BaseIdentity(name="tiny", sha256="b" * 64, tokenizer_sha256="c" * 64, stop_ids=(1,))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_file_holds_the_entries(
    dtype: str, checkpoint: Callable[..., Path], adapters: Callable[..., list[Path]], cache: Path
) -> None:
    spec, folder = load_spec(checkpoint("llama")), adapters("llama", 4)[3]
    with AdapterFile(folder) as file:
        entries = compile_entries(file.config, file.load()[0], spec, BaseTensors(()))
    info = compile_adapter(folder, spec, BASE, dtype, cache)  # type: ignore[arg-type]
    assert (info.kind, info.max_rank, info.sites) == ("lora", 5, 21)
    compiled = open_compiled(Path(info.path))
    assert compiled.header.digest == info.digest and compiled.data.nbytes == info.nbytes
    assert compiled.parts[0][0] % ALIGNMENT == 0
    step = ALIGNMENT // compiled.data.itemsize
    for place in compiled.header.entries:
        assert all(n % step == 0 for n in (place.a, place.b, place.stride_a, place.stride_b))
    torch_dtype = torch.float32 if dtype == "float32" else torch.bfloat16
    slab = make_slab([Path(info.path)], spec)
    assert slab.data.dtype == torch_dtype
    for entry in entries:
        pair = slab.pair(0, entry.site.index, entry.site.d_in, entry.site.d_out)
        assert pair is not None
        assert torch.equal(pair[0], torch.from_numpy(entry.a.copy()).to(torch_dtype))
        assert torch.equal(pair[1], torch.from_numpy(entry.b.copy()).to(torch_dtype))
        assert pair[2] == pytest.approx(entry.scale, rel=1e-7)
    values = sum(entry.a.size + entry.b.size for entry in entries)
    assert info.nbytes <= values * compiled.data.itemsize * 1.1  # true rank: nothing but the alignment is added


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=50))
def test_rounding_is_torchs(values: list[float]) -> None:
    array = np.array(values, np.float32)
    expected = torch.from_numpy(array).bfloat16()
    if not expected.isfinite().all():
        with pytest.raises(AdapterError, match="too large for bfloat16"):
            bfloat16_bits(array)
        return
    found = torch.from_numpy(bfloat16_bits(array)).view(torch.bfloat16)
    assert torch.equal(found.view(torch.int16), expected.view(torch.int16))


def test_a_compiled_file_is_used_again_and_made_again_when_damaged(
    checkpoint: Callable[..., Path], adapters: Callable[..., list[Path]], cache: Path
) -> None:
    spec, folder = load_spec(checkpoint("llama")), adapters("llama", 1)[0]
    info = compile_adapter(folder, spec, BASE, "float32", cache)
    path = Path(info.path)
    first, content = path.stat().st_ino, path.read_bytes()
    assert compile_adapter(folder, spec, BASE, "float32", cache) == info
    assert path.stat().st_ino == first
    for damaged in (b"", content[:100], content[:-64], b"X" + content[1:], content[:16] + b"\xff" * 64 + content[80:]):
        path.write_bytes(damaged)
        with pytest.raises(AdapterError):
            open_compiled(path)
        assert compile_adapter(folder, spec, BASE, "float32", cache) == info
        assert path.read_bytes() == content
    assert [p.name for p in cache.iterdir()] == [path.name]


def test_the_name_says_for_which_base_and_dtype(adapters: Callable[..., list[Path]]) -> None:
    other = msgspec.structs.replace(BASE, sha256="d" * 64)
    names = {compiled_name("a" * 64, base, dtype) for base in (BASE, other) for dtype in ("float32", "bfloat16")}  # type: ignore[arg-type]
    assert len(names) == 4


@pytest.fixture
def folder(adapters: Callable[..., list[Path]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapters("llama", 2)[1], tmp_path / "adapter"))


def test_a_lock_that_does_not_match(checkpoint: Callable[..., Path], folder: Path, cache: Path) -> None:
    spec = load_spec(checkpoint("llama"))
    lock = Lock(base=LockedBase("other", "0" * 64), tokenizer_sha256="c" * 64, stop_ids=(1,))
    write_lock(folder, lock)
    with pytest.raises(LockMismatchError, match="another base"):
        compile_adapter(folder, spec, BASE, "float32", cache)
    unlocked = compile_adapter(folder, spec, BASE, "float32", cache, allow_lock_mismatch=True)
    write_lock(folder, msgspec.structs.replace(lock, base=LockedBase("tiny", BASE.sha256)))
    assert compile_adapter(folder, spec, BASE, "float32", cache) == unlocked


def test_nothing_is_left_behind_by_what_is_refused(checkpoint: Callable[..., Path], folder: Path, cache: Path) -> None:
    spec = load_spec(checkpoint("llama"))
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:-10])
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors: truncated: tensor '.*v_proj.*' ends at byte"):
        compile_adapter(folder, spec, BASE, "float32", cache)
    (folder / WEIGHTS).write_bytes(whole)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"r": 3}))
    with pytest.raises(AdapterError, match=r"lora_A\.weight: expected \[3, 64\], found \[2, 64\]"):
        compile_adapter(folder, spec, BASE, "float32", cache)
    (folder / CONFIG).write_text(json.dumps(config))
    huge = {k: v.double() * 1e300 for k, v in load_file(folder / WEIGHTS).items()}
    save_file(huge, folder / WEIGHTS)
    with pytest.raises(AdapterError, match="NaN or infinite"):
        compile_adapter(folder, spec, BASE, "float32", cache)
    assert not cache.exists() or not list(cache.iterdir())


def test_an_adapter_for_another_base_says_what_was_expected(
    checkpoint: Callable[..., Path], folder: Path, cache: Path
) -> None:
    spec = load_spec(checkpoint("qwen3"))
    with pytest.raises(AdapterError, match=r"q_proj\.lora_B\.weight: expected \[128, 2\], found \[64, 2\]"):
        compile_adapter(folder, spec, BASE, "float32", cache)


def test_the_disk_budget_deletes_what_was_used_least_recently(
    checkpoint: Callable[..., Path], adapters: Callable[..., list[Path]], cache: Path
) -> None:
    spec, folders = load_spec(checkpoint("llama")), adapters("llama", 4)
    paths = []
    for age, folder in enumerate(folders):
        path = Path(compile_adapter(folder, spec, BASE, "float32", cache).path)
        os.utime(path, (age, age))
        paths.append(path)
    assert Path(compile_adapter(folders[0], spec, BASE, "float32", cache).path) == paths[0]  # used again, now
    sizes = [path.stat().st_size for path in paths]
    trim(cache, sizes[0] + sizes[2] + sizes[3], keep=paths[2])
    assert [path.exists() for path in paths] == [True, False, True, True]
    trim(cache, 0, keep=paths[2])
    assert [path.exists() for path in paths] == [False, False, True, False]


def test_what_a_killed_process_left_is_removed_and_what_is_being_written_stays(cache: Path) -> None:
    cache.mkdir()
    old, fresh, whole = (cache / name for name in (f".a{SUFFIX}.7", f".b{SUFFIX}.8", f"c{SUFFIX}"))
    for path in (old, fresh, whole):
        path.write_bytes(b"x")
    for path in (old, whole):
        os.utime(path, (0, 0))
    remove_leftovers(cache)
    assert sorted(cache.iterdir()) == [fresh, whole]
    remove_leftovers(cache / "nowhere")


def test_a_cache_file_that_is_another_adapters_is_made_again(
    checkpoint: Callable[..., Path], adapters: Callable[..., list[Path]], cache: Path
) -> None:
    spec, (one, two) = load_spec(checkpoint("llama")), adapters("llama", 2)
    first, second = (compile_adapter(folder, spec, BASE, "float32", cache) for folder in (one, two))
    content = Path(first.path).read_bytes()
    Path(first.path).write_bytes(Path(second.path).read_bytes())
    assert compile_adapter(one, spec, BASE, "float32", cache) == first
    assert Path(first.path).read_bytes() == content


def test_a_full_disk_is_said_and_leaves_nothing(
    checkpoint: Callable[..., Path], folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = load_spec(checkpoint("llama"))
    for code, error in ((errno.ENOSPC, DiskFullError), (errno.EROFS, UnavailableError)):
        monkeypatch.setattr("os.fsync", _raises(OSError(code, os.strerror(code))))
        with pytest.raises(error, match=r"the disk of .* is full|cannot be written: Read-only"):
            compile_adapter(folder, spec, BASE, "float32", cache)
        assert list(cache.iterdir()) == []


def _raises(error: OSError) -> Callable[[int], None]:
    def fsync(_: int) -> None:
        raise error

    return fsync


HEADER = CompiledHeader(digest="d", base_sha256="b", dtype="float32", kind="lora", nbytes=2**21 + 32, entries=[])


def test_parts_of_a_file_are_read_as_one(tmp_path: Path) -> None:
    path, random = tmp_path / "file", np.random.default_rng(0)
    stored = random.integers(0, 256, 1000, np.uint8)
    path.write_bytes(stored.tobytes())
    file = CompiledFile(HEADER, path, ((100, 64), (700, 32)))
    whole = np.concatenate((stored[100:164], stored[700:732]))
    for start, count in ((0, 96), (0, 64), (10, 54), (10, 60), (63, 2), (64, 32), (70, 26), (95, 1), (96, 0)):
        for wait in (True, False):
            target = np.zeros(count, np.uint8)
            until_there(lambda start=start, target=target, wait=wait: file.read(start, target, wait))  # type: ignore[misc]
            assert (target == whole[start : start + count]).all()
    path.write_bytes(stored[:710].tobytes())
    with pytest.raises(AdapterError, match="the file ends at byte 710; 22 more were expected"):
        file.read(0, np.zeros(96, np.uint8))
    path.unlink()
    with pytest.raises(FileNotFoundError):
        file.read(0, np.zeros(96, np.uint8))


def until_there(read: Callable[[], None]) -> None:
    until = time.monotonic() + 30
    while time.monotonic() < until:
        with suppress(BlockingIOError):
            return read()
        time.sleep(0.005)
    raise AssertionError("the disk never brings it")


def test_what_is_not_in_memory_is_asked_for(tmp_path: Path) -> None:
    path, data = tmp_path / "file", np.random.default_rng(0).integers(0, 256, HEADER.nbytes, np.uint8)
    path.write_bytes(data.tobytes())
    file, target = CompiledFile(HEADER, path, ((0, 2**21), (2**21, 32))), np.zeros(HEADER.nbytes, np.uint8)
    file.read(0, target, wait=False)
    assert (target == data).all()
    with path.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    target[:] = 0
    try:
        file.read(0, target, wait=False)
    except BlockingIOError:
        until_there(lambda: file.read(0, target, wait=False))
    else:
        pytest.skip("this file system keeps what it is told to forget, or cannot say")
    assert (target == data).all()


def test_a_file_system_that_does_not_tell_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path := tmp_path / "file").write_bytes(bytes(range(96)))
    preadv = os.preadv

    def plain(file: int, buffers: list[memoryview], at: int, flags: int = 0) -> int:
        if flags:
            raise OSError(errno.EOPNOTSUPP, "not supported")
        return preadv(file, [buffers[0][:40]], at)  # and never all at once

    monkeypatch.setattr(os, "preadv", plain)
    target = np.zeros(96, np.uint8)
    CompiledFile(HEADER, path, ((0, 96),)).read(0, target, wait=False)
    assert target.tolist() == list(range(96))


def test_a_header_that_is_not_in_memory_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header, data = lay_out([], "d", BASE, "float32")
    _write(path := tmp_path / "file", header, data)
    preadv, asked = os.preadv, []

    def cold(file: int, buffers: list[memoryview], at: int, flags: int = 0) -> int:
        if flags & os.RWF_NOWAIT:
            raise BlockingIOError(errno.EAGAIN, "not in memory")
        return preadv(file, buffers, at, flags)

    monkeypatch.setattr(os, "preadv", cold)
    monkeypatch.setattr(os, "posix_fadvise", lambda *advice: asked.append(advice[3]))
    with pytest.raises(BlockingIOError):
        open_compiled(path, wait=False)
    assert asked == [os.POSIX_FADV_WILLNEED]
    assert open_compiled(path).header == header
