"""Adapters in the slab through loads, evictions and moves: what requests get stays what the dense model gives."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lorikeet.adapters.compiled import CompiledAdapter
from lorikeet.engine.residency import AdapterDrop, AdapterMove, Place
from lorikeet.engine.slab import AdapterSlab
from lorikeet.types import AdapterCopy


def test_answers_survive_evictions_and_moves(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    infos = [world.adapter(50 + i, rank) for i, rank in enumerate((1, 2, 5, 1, 4, 3, 6))]
    engine = world.engine(infos, slab_bytes=sum(info.nbytes for info in infos) * 6 // 10)
    engine._residency._copy_bytes = engine._residency._move_bytes = 2048
    done: list[Any] = []
    carry_out = AdapterSlab.carry_out

    def watched(slab: AdapterSlab, instructions: Any, late: Any = None) -> Any:
        done.extend(instructions)
        return carry_out(slab, instructions, late)

    monkeypatch.setattr(AdapterSlab, "carry_out", watched)
    chance = random.Random(0)
    expected = {info.digest: world.greedy([7, 8, 9], 3, info.digest) for info in infos}
    residency = engine._residency
    for turn in range(24):
        there = [info.digest for info in infos if residency.place(info.digest) is Place.RESIDENT]
        pinned = chance.choice(there) if there else None
        if pinned is not None:  # it must stay, and is moved out of the way of others
            residency.pin(pinned)
        picked = chance.sample(infos, 3)
        requests = [world.request(f"{turn}-{i}", [7, 8, 9], x.digest, max_tokens=3) for i, x in enumerate(picked)]
        answers = world.run(engine, requests)
        for request, info in zip(requests, picked, strict=True):
            assert answers[request.request_id].tokens == expected[info.digest]
        if pinned is not None:
            residency.pin(pinned, False)
    assert sum(isinstance(do, AdapterMove) for do in done) >= 3
    parts = [do for do in done if isinstance(do, AdapterCopy)]
    assert any(part.start > 0 for part in parts), "nothing was copied in parts"
    assert len({tuple(tokens) for tokens in expected.values()}) > 4


def test_the_table_grows_with_the_adapters(world: Any) -> None:
    infos = [world.adapter(100 + i, 1) for i in range(40)]
    engine = world.engine(infos, max_seqs=8)
    answers = world.run(engine, [world.request(f"{i}", [3, 4], x.digest, max_tokens=2) for i, x in enumerate(infos)])
    for i in (0, 15, 16, 17, 39):
        assert answers[f"{i}"].tokens == world.greedy([3, 4], 2, infos[i].digest)
    assert all(adapter.resident for adapter in engine.stats().adapters)


def test_another_dtype_is_refused(world: Any) -> None:
    import torch

    info = world.adapter(1)
    slab = AdapterSlab(2**16, world.spec, torch.bfloat16, world._open)
    copy = AdapterCopy(info.digest, info.path, 0, 0, info.nbytes, 0, info.nbytes)
    failed = slab.carry_out([copy])
    assert "bfloat16" in failed[info.digest].message and "float32" in failed[info.digest].message


def test_an_adapter_may_go_before_its_last_byte_was_there(world: Any) -> None:
    """Its handle may lie beyond the table, which grows with adapters that are whole."""
    info = world.adapter(1)
    slab = AdapterSlab(2**16, world.spec, world.weights.norm.dtype, world._open)
    handle = len(slab.slab.table)
    part = AdapterCopy(info.digest, info.path, handle, 0, info.nbytes, 0, info.nbytes // 2)
    assert slab.carry_out([part, AdapterMove(handle, 0, 64, 64), AdapterDrop(handle)]) == {}


def test_a_damaged_header_is_told_and_harms_nobody(world: Any) -> None:
    import msgspec

    good, bad = world.adapter(1), world.adapter(2)
    engine = world.engine([good, bad])
    entries = world.adapters[bad.digest].header.entries
    entries[0] = msgspec.structs.replace(entries[0], site=10**6)
    answers = world.run(engine, [world.request("g", [5, 6], good.digest), world.request("b", [5, 6], bad.digest)])
    assert answers["g"].tokens == world.greedy([5, 6], 12, good.digest)
    error = answers["b"].events[-1].error
    assert (error.code, error.status, error.retryable) == ("adapter_lost", 503, True)


def read_only_if(monkeypatch: pytest.MonkeyPatch, there: Callable[[], bool]) -> None:
    """Adapters that are not `there` have to be waited for; until then something else is in their place."""
    read = CompiledAdapter.read

    def late(self: CompiledAdapter, start: int, target: np.ndarray, wait: bool = True) -> None:
        target[:] = 255
        if not wait and not there():
            raise BlockingIOError
        read(self, start, target, wait)

    monkeypatch.setattr(CompiledAdapter, "read", late)


def test_no_step_waits_for_the_disk(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream goes on while an adapter is on its way from disk; once nobody streams, the engine waits for it."""
    info = world.adapter(1)
    there: list[bool] = []
    read_only_if(monkeypatch, lambda: bool(there))
    engine = world.engine([info])
    engine.add(world.request("streams", [3, 4, 5], max_tokens=8, ignore_eos=True))
    engine.step()
    engine.add(world.request("waits", [3, 4, 5], info.digest, max_tokens=2, ignore_eos=True))
    ended = {event.request_id: event.tokens for _ in range(4) for event in engine.step()}
    assert set(ended) == {"streams"} and not engine.stats().adapters[0].resident
    there.append(True)
    seen: dict[str, list[int]] = {"streams": [], "waits": []}
    while engine.has_work():
        for event in engine.step():
            seen[event.request_id] += event.tokens
    assert len(seen["waits"]) == 2 and seen["waits"][0] == world.greedy([3, 4, 5], 1, info.digest)[0]
    there.clear()
    other = world.adapter(2)
    engine.register(other)
    assert len(world.run(engine, [world.request("alone", [3, 4], other.digest, max_tokens=1)])["alone"].tokens) == 1


def test_a_disk_that_never_answers_is_waited_for_in_the_end(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    info = world.adapter(1)
    read_only_if(monkeypatch, lambda: False)
    monkeypatch.setattr("lorikeet.engine.slab.LATEST", 0.0)
    engine = world.engine([info])
    requests = [world.request("base", [3], max_tokens=6), world.request("own", [3], info.digest, max_tokens=2)]
    assert len(world.run(engine, requests)["own"].tokens) in (1, 2)
