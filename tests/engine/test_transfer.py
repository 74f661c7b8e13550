"""Adapters that arrive beside the steps: whatever is late, no step reads what is not there."""

from __future__ import annotations

import random
import threading
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorikeet.adapters.compiled import CompiledAdapter, CompiledHeader
from lorikeet.engine import transfer as transfer_module
from lorikeet.engine.host_tier import HostTier
from lorikeet.engine.residency import Place
from lorikeet.engine.slab import AdapterSlab
from lorikeet.engine.transfer import Transfer, _layer_ends
from lorikeet.kernels.reference import ReferenceOps
from lorikeet.types import AdapterCopy

Tensor = torch.Tensor


class DelayedCopier:
    """Copies happen late: at the latest when somebody waits for them, or earlier by chance.

    Until then the target holds NaN, and the source is read when the copy happens, not when it is asked for.
    """

    def __init__(self, chance: float = 0.0, seed: int = 0) -> None:
        self._pending: deque[tuple[Tensor, Tensor]] = deque()
        self._chance, self._draw = chance, random.Random(seed)
        self.asked = self.carried_out = 0

    def follow(self) -> None:
        self._drift()

    def copy(self, source: Tensor, target: Tensor) -> int:
        assert source.shape == target.shape
        target.fill_(0xFF)
        self._pending.append((source, target))
        self.asked += 1
        self._drift()
        return self.asked

    def wait(self, ticket: int) -> None:
        assert ticket <= self.asked
        while self.carried_out < ticket:
            self._next()

    def done(self, ticket: int) -> bool:
        self._drift()
        return self.carried_out >= ticket

    def finish(self, ticket: int) -> None:
        self.wait(ticket)

    def _drift(self) -> None:
        while self._pending and self._draw.random() < self._chance:
            self._next()

    def _next(self) -> None:
        source, target = self._pending.popleft()
        target.copy_(source)
        self.carried_out += 1


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer_module, "_PIECE", 64)


def memory(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8)


def slab_of(world: Any, nbytes: int, host: int, copier: Any, kind: type[Transfer] = Transfer) -> AdapterSlab:
    tier = HostTier(memory(host), world._open, copier)
    return AdapterSlab(nbytes, world.spec, torch.float32, world._open, "cpu", kind(copier, tier, world.spec))


# --- steps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chance", [0.0, 0.5, 1.0])
def test_answers_do_not_depend_on_when_adapters_arrive(world: Any, chance: float) -> None:
    """Through evictions and moves in the slab and in the host tier, in parts, with adapters of every kind."""
    infos = [world.adapter(50 + i, rank) for i, rank in enumerate((1, 2, 5, 1, 4))]
    infos += [world.adapter(60, 2, scaled=True), world.adapter(61, 2, overrides=True)]
    infos += [world.adapter(62, 2, ("q", "residual"), scaled=True), world.adapter(63, 3, ("up", "embed", "head"))]
    total = sum(info.nbytes for info in infos)
    slab = slab_of(world, total * 6 // 10, total * 7 // 10, DelayedCopier(chance, seed=1))
    engine = world.engine(infos, slab_bytes=total * 6 // 10, slab=slab)
    engine._residency._copy_bytes = engine._residency._move_bytes = 2048
    chosen = random.Random(0)
    expected = {info.digest: world.greedy([7, 8, 9], 3, info.digest) for info in infos}
    for turn in range(12):
        there = [info.digest for info in infos if engine._residency.place(info.digest) is Place.RESIDENT]
        pinned = chosen.choice(there) if there else None
        if pinned is not None:
            engine._residency.pin(pinned)
        picked = chosen.sample(infos, 3)
        requests = [world.request(f"{turn}-{i}", [7, 8, 9], x.digest, max_tokens=3) for i, x in enumerate(picked)]
        answers = world.run(engine, requests)
        for request, info in zip(requests, picked, strict=True):
            assert answers[request.request_id].tokens == expected[info.digest], (turn, info.kind)
        if pinned is not None:
            engine._residency.pin(pinned, False)
    assert len({tuple(tokens) for tokens in expected.values()}) > 5


def test_a_step_that_did_not_wait_would_be_seen(world: Any) -> None:
    """The test above can fail."""

    class Hasty(Transfer):
        def wait(self, layer: int | None) -> None:
            pass

    info = world.adapter(1)
    slab = slab_of(world, 2**20, 2**20, DelayedCopier(), Hasty)
    answer = world.run(world.engine([info], slab=slab), [world.request("a", [7, 8, 9], info.digest)])["a"]
    assert answer.tokens != world.greedy([7, 8, 9], 12, info.digest)


def test_a_step_begins_before_the_last_layer_is_there(world: Any) -> None:
    copier, seen = DelayedCopier(), []

    class Watching(ReferenceOps):
        def lowrank_add(self, y: Any, x: Any, slab: Any, group: Any, segments: Any) -> Any:
            y = super().lowrank_add(y, x, slab, group, segments)
            seen.append((group.sites[0].layer, copier.carried_out))
            return y

    info = world.adapter(1)
    engine = world.engine([info], slab=slab_of(world, 2**20, 2**20, copier), ops=Watching())
    answer = world.run(engine, [world.request("a", [7, 8, 9], info.digest)])["a"]
    assert answer.tokens == world.greedy([7, 8, 9], 12, info.digest)
    first = [done for layer, done in seen[:4] if layer == 0]
    assert first and max(first) < copier.asked, "all of the adapter was waited for at once"


def test_the_base_waits_for_nobody(world: Any) -> None:
    copier = DelayedCopier()
    info = world.adapter(1)
    engine = world.engine([info], slab=slab_of(world, 2**20, 2**20, copier))
    engine.manage("load", info.digest)
    world.run(engine, [world.request("a", [7, 8, 9])])
    assert copier.asked > 0 and copier.carried_out == 0


@settings(max_examples=40, deadline=None)
@given(
    rank=st.integers(0, 6),
    roles=st.sets(st.sampled_from(["q", "k", "o", "gate", "down", "embed", "head", "residual"]), min_size=1),
    scaled=st.booleans(),
    overrides=st.booleans(),
)
def test_a_layer_is_there_when_its_part_is(
    world: Any, rank: int, roles: set[str], scaled: bool, overrides: bool
) -> None:
    spec = world.spec
    info = world.adapter(7, rank, roles, scaled, overrides)
    header = world.adapters[info.digest].header
    sites = (*spec.sites, *spec.residual_sites)
    ends = _layer_ends(header, [site.layer for site in sites], spec.num_layers)
    assert ends[-1] == header.nbytes and len(ends) == spec.num_layers + 1
    for entry in header.entries:
        site = sites[entry.site]
        needed = max(entry.a + entry.rank * entry.stride_a, entry.b + entry.rank * entry.stride_b)
        needed = max(needed, *(at + site.d_out for at in (entry.gain, entry.shift) if at >= 0), 0)
        assert 4 * needed <= ends[-1 if site.layer is None else site.layer]


# --- the tier -----------------------------------------------------------------------------------------------------


def test_no_step_waits_while_a_file_is_read(world: Any) -> None:
    info, free = world.adapter(1), threading.Event()

    def slow(path: Path) -> CompiledAdapter:
        assert free.wait(20)
        return world._open(path)

    copier = DelayedCopier(1.0)
    tier = HostTier(memory(2**20), slow, copier)
    slab = AdapterSlab(2**20, world.spec, torch.float32, world._open, "cpu", Transfer(copier, tier, world.spec))
    engine = world.engine([info], slab=slab)
    engine.add(world.request("streams", [3, 4, 5], max_tokens=8, ignore_eos=True))
    engine.step()
    engine.add(world.request("waits", [3, 4, 5], info.digest, max_tokens=2, ignore_eos=True))
    ended = {event.request_id for _ in range(4) for event in engine.step()}
    assert ended == {"streams"}
    free.set()
    seen: dict[str, list[int]] = {"streams": [], "waits": []}
    while engine.has_work():
        for event in engine.step():
            seen[event.request_id] += event.tokens
    assert seen["waits"][0] == world.greedy([3, 4, 5], 1, info.digest)[0]


def test_a_file_that_cannot_be_read_fails_its_requests_alone(world: Any) -> None:
    good, bad = world.adapter(1), world.adapter(2)

    def open_adapter(path: Path) -> CompiledAdapter:
        if str(path) == bad.path:
            raise OSError("gone")
        return world._open(path)

    copier = DelayedCopier(1.0)
    tier = HostTier(memory(2**20), open_adapter, copier)
    slab = AdapterSlab(2**20, world.spec, torch.float32, world._open, "cpu", Transfer(copier, tier, world.spec))
    engine = world.engine([good, bad], slab=slab)
    answers = world.run(engine, [world.request("g", [5, 6], good.digest), world.request("b", [5, 6], bad.digest)])
    assert answers["g"].tokens == world.greedy([5, 6], 12, good.digest)
    error = answers["b"].events[-1].error
    assert (error.code, error.retryable) == ("adapter_lost", True) and "gone" in error.message


def test_an_adapter_larger_than_the_tier_comes_past_it(world: Any) -> None:
    info = world.adapter(1, rank=8)
    engine = world.engine([info], slab=slab_of(world, 2**20, 512, DelayedCopier()))
    answer = world.run(engine, [world.request("a", [5, 6], info.digest)])["a"]
    assert answer.tokens == world.greedy([5, 6], 12, info.digest)


def test_a_request_that_waits_has_its_adapter_read(world: Any) -> None:
    info = world.adapter(1)
    slab = slab_of(world, 2**20, 2**20, DelayedCopier())
    engine = world.engine([info], slab=slab)
    engine.add(world.request("a", [5, 6], info.digest))
    tier = slab._transfer._tier
    for future in list(tier._reading.values()):
        future.result(20)
    assert tier.has(info.digest)


def file_of(name: str, nbytes: int) -> CompiledAdapter:
    header = CompiledHeader(
        digest=name, base_sha256="", dtype="float32", kind="lora", nbytes=nbytes, entries=[]
    )  # fmt: skip
    data = np.random.default_rng(nbytes + int(name)).integers(0, 255, nbytes, np.uint8).view(np.float32)
    return CompiledAdapter(header, data)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.integers(1, 12), min_size=2, max_size=8), st.floats(0, 1))
def test_what_the_tier_gives_is_the_file(seed: int, sizes: list[int], chance: float) -> None:
    """Whatever was evicted or moved meanwhile, a copy out of the tier brings the adapter's own bytes."""
    files = {str(i): file_of(str(i), 64 * size) for i, size in enumerate(sizes)}
    draw, copier = random.Random(seed), DelayedCopier(chance, seed)
    tier = HostTier(memory(64 * 14), lambda path: files[str(path)], copier)
    targets = []
    for _ in range(60):
        name = draw.choice(list(files))
        nbytes = files[name].header.nbytes
        if draw.random() < 0.4:
            tier.ask(name, name, nbytes)
            continue
        header, source = tier.take(AdapterCopy(name, name, 0, 0, nbytes, 0, nbytes))
        assert header.digest == name
        target = torch.zeros(nbytes, dtype=torch.uint8)
        tier.use(name, copier.copy(source, target))
        targets.append((name, target))
    copier.finish(copier.asked)
    for name, target in targets:
        assert target.numpy().tobytes() == files[name].data.tobytes()
