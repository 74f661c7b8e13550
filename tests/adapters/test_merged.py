"""Merged adapters as they are served: made once, remembered by what went into them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from tests.fixtures import AdapterShape, make_adapter

from lorikeet.adapters import merged as module
from lorikeet.adapters.compiled import SUFFIX as COMPILED
from lorikeet.adapters.compiled import open_compiled
from lorikeet.adapters.files import Lock, LockedBase, write_lock
from lorikeet.adapters.merge import merge, read_source
from lorikeet.engine.loader import compile_one
from lorikeet.engine.wire import LoaderSettings, Merge
from lorikeet.model.families import load_spec
from lorikeet.types import AdapterInfo, BaseIdentity, MergeSpec

BASE = BaseIdentity(name="tiny", sha256="b" * 64, tokenizer_sha256="c" * 64, stop_ids=(1,))


@pytest.fixture
def settings(checkpoint: Callable[..., Path], cache: Path) -> LoaderSettings:
    return LoaderSettings(
        spec=load_spec(checkpoint("llama")),
        base=BASE,
        dtype="float32",
        cache=str(cache),
        allow_lock_mismatch=False,
    )


@pytest.fixture
def spec(checkpoint: Callable[..., Path], tmp_path: Path) -> MergeSpec:
    shape = AdapterShape(rank=2, targets=("q_proj", "v_proj"))
    folders = [str(make_adapter(checkpoint("llama"), tmp_path / name, shape, seed=ord(name))) for name in "ab"]
    return MergeSpec(adapters=tuple(folders), weights=(0.5, 1.5), method="dare_ties", density=0.5)


def digests(spec: MergeSpec) -> tuple[str, ...]:
    return tuple(read_source(Path(folder)).digest for folder in spec.adapters)


def done(spec: MergeSpec, settings: LoaderSettings) -> AdapterInfo:
    resolved = compile_one(Merge(1, spec, digests(spec)), settings)
    assert resolved.adapter is not None, resolved.error
    return resolved.adapter


def test_a_merge_is_compiled_and_remembered(
    spec: MergeSpec, settings: LoaderSettings, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = done(spec, settings)
    assert (info.kind, info.max_rank, info.sites) == ("lora", 2, 6)
    pairs = merge(spec, [read_source(Path(folder)) for folder in spec.adapters]).pairs
    compiled = open_compiled(Path(info.path))
    entry = compiled.header.entries[0]
    found = compiled.data[entry.a : entry.a + 2 * entry.stride_a].reshape(2, -1)[:, :64]
    np.testing.assert_array_equal(found, pairs["model.layers.0.self_attn.q_proj"][0])
    assert entry.scale == 1
    assert not [name for name in os.listdir(cache) if name.startswith("merging-")]

    merges = 0

    def counted(*arguments: object) -> object:
        nonlocal merges
        merges += 1
        return merge(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "merge", counted)
    moved = [shutil.copytree(folder, f"{folder}-moved") for folder in spec.adapters]
    assert done(msgspec.structs.replace(spec, adapters=tuple(moved)), settings) == info
    assert merges == 0
    other = done(msgspec.structs.replace(spec, seed=1), settings)
    assert merges == 1 and other.digest != info.digest
    Path(info.path).unlink()  # as `trim` does
    assert done(spec, settings) == info and merges == 2
    Path(info.path).write_bytes(b"damaged")
    assert done(spec, settings) == info and merges == 3


def test_what_is_left_over_is_swept(spec: MergeSpec, settings: LoaderSettings, cache: Path) -> None:
    Path(done(spec, settings).path).unlink()
    (cache / "merging-killed").mkdir()
    os.utime(cache / "merging-killed", (0, 0))
    (cache / "merging-now").mkdir()
    done(msgspec.structs.replace(spec, seed=1), settings)
    left = sorted(os.listdir(cache))
    assert [name for name in left if name.startswith("merging-")] == ["merging-now"]
    assert sum(name.endswith(module.SUFFIX) for name in left) == sum(name.endswith(COMPILED) for name in left) == 1


def test_what_is_wrong_is_the_answer(spec: MergeSpec, settings: LoaderSettings, cache: Path) -> None:
    contents = digests(spec)
    resolved = compile_one(Merge(7, msgspec.structs.replace(spec, density=None), contents), settings)
    assert resolved.job == 7 and resolved.error is not None
    assert resolved.error.status == 400 and resolved.error.param == "density"
    lock = Lock(base=LockedBase("other", "0" * 64), tokenizer_sha256="c" * 64, stop_ids=(1,))
    write_lock(Path(spec.adapters[1]), lock)
    resolved = compile_one(Merge(8, spec, contents), settings)
    assert resolved.error is not None and resolved.error.status == 409
    lax = msgspec.structs.replace(settings, allow_lock_mismatch=True)
    done(spec, lax)
    resolved = compile_one(Merge(9, spec, contents[::-1]), lax)
    assert resolved.error is not None and resolved.error.retryable
    assert "a was replaced while it was to be merged" in resolved.error.message
    shutil.rmtree(spec.adapters[0])
    resolved = compile_one(Merge(9, spec, contents), lax)
    assert resolved.error is not None and resolved.error.status == 422
    assert not [name for name in os.listdir(cache) if name.startswith("merging-")]
