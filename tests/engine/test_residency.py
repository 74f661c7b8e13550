"""Which adapters are in the slab: a byte-for-byte simulation beside the bookkeeping."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lorikeet.engine.residency import AdapterDrop, AdapterMove, Place, Residency
from lorikeet.errors import AdapterError
from lorikeet.types import AdapterCopy, AdapterInfo

UNIT = 64


def info(name: str, nbytes: int) -> AdapterInfo:
    return AdapterInfo(digest=name, path=name, nbytes=nbytes, max_rank=1, sites=1)


class Slab:
    """Carries instructions out on one cell for each 64 bytes; a cell remembers whose which part it holds."""

    def __init__(self, budget: int) -> None:
        self.cells: list[tuple[str, int] | None] = [None] * (budget // UNIT)
        self.at: dict[int, int] = {}  # handle -> first cell

    def carry_out(self, residency: Residency) -> int:
        """Do this step's instructions; bytes copied."""
        copied = 0
        for do in residency.instructions():
            if isinstance(do, AdapterCopy):
                first, last = do.start // UNIT, -(-(do.start + do.count) // UNIT)
                self.at[do.handle] = do.offset // UNIT
                for part in range(first, last):
                    self.cells[do.offset // UNIT + part] = (do.digest, part)
                copied += do.count
                residency.arrived(do.digest)
            elif isinstance(do, AdapterMove):
                source, target, count = do.source // UNIT, do.target // UNIT, do.nbytes // UNIT
                assert target < source
                self.cells[target : target + count] = self.cells[source : source + count]
                self.at[do.handle] = target
            else:
                assert isinstance(do, AdapterDrop)
                self.at.pop(do.handle, None)
        return copied

    def holds(self, residency: Residency, digest: str) -> bool:
        first = self.at[residency.handle(digest)]
        count = residency.size(digest) // UNIT
        return self.cells[first : first + count] == [(digest, part) for part in range(count)]


class ResidencyMachine(RuleBasedStateMachine):
    """Adapters of random sizes come, are used, pinned and pushed out; what would fit is never refused for good."""

    @initialize(
        cells=st.integers(4, 24),
        sizes=st.lists(st.integers(1, 8), min_size=3, max_size=10),
        copy=st.sampled_from([UNIT, 3 * UNIT, 2**20]),
        move=st.sampled_from([0, UNIT, 2**20]),
    )
    def start(self, cells: int, sizes: list[int], copy: int, move: int) -> None:
        self.now = 0.0
        self.residency = Residency(cells * UNIT, copy_bytes=copy, move_bytes=move, clock=lambda: self.now)
        self.slab = Slab(cells * UNIT)
        self.users: dict[str, int] = {}
        self.pinned: set[str] = set()
        for i, size in enumerate([1, *sizes]):
            adapter = info(f"a{i}", size * UNIT - 10)
            if size > cells:
                with pytest.raises(AdapterError, match=rf"{adapter.nbytes}.*{cells * UNIT}"):
                    self.residency.register(adapter)
            else:
                self.residency.register(adapter)
                self.users[adapter.digest] = 0

    def known(self) -> st.SearchStrategy[str]:
        return st.sampled_from(sorted(self.users))

    @precondition(lambda self: self.users)
    @rule(data=st.data(), kept=st.integers(0, 3))
    def bring_in(self, data: st.DataObject, kept: int) -> None:
        digest = data.draw(self.known())
        keep = set(sorted(self.users)[:kept]) - {digest}
        fixed = {d for d in self.users if d != digest and (self.users[d] or d in self.pinned)} | keep
        resident = self.residency.movable().keys() | self.pinned
        there = {d for d in fixed if d in resident and self.residency.place(d) is not Place.FULL}
        would_fit = sum(map(self.residency.size, there)) + self.residency.size(digest) <= self.residency.budget
        steps = len(self.users) * 10 + 20
        for _ in range(steps):
            self.now += 1
            place = self.residency.ensure(digest, keep)
            self.slab.carry_out(self.residency)
            if place is Place.RESIDENT:
                break
        assert (place is Place.RESIDENT) == would_fit
        for other in there:
            assert self.residency.place(other) is Place.RESIDENT, "one that must stay was evicted"

    @precondition(lambda self: self.users)
    @rule(data=st.data())
    def use(self, data: st.DataObject) -> None:
        digest = data.draw(self.known())
        if self.residency.place(digest) is Place.RESIDENT:
            self.residency.acquire(digest)
            self.users[digest] += 1

    @precondition(lambda self: any(self.users.values()))
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(sorted(d for d, count in self.users.items() if count)))
        self.residency.release(digest)
        self.users[digest] -= 1

    @precondition(lambda self: self.users)
    @rule(data=st.data(), pinned=st.booleans())
    def pin(self, data: st.DataObject, pinned: bool) -> None:
        digest = data.draw(self.known())
        if self.residency.place(digest) is Place.RESIDENT:
            self.residency.pin(digest, pinned)
            (self.pinned.add if pinned else self.pinned.discard)(digest)

    @invariant()
    def the_bytes_are_where_the_books_say(self) -> None:
        if not hasattr(self, "residency"):
            return
        extents = sorted((e.offset, e.offset + e.size) for e in self.residency._extents.values())
        assert all(end <= start for (_, end), (start, _) in zip(extents, extents[1:], strict=False))
        assert not extents or extents[-1][1] <= self.residency.budget
        handles = [e.handle for e in self.residency._extents.values()]
        assert len(set(handles)) == len(handles) <= self.residency._handles <= len(self.users)
        for digest in self.users:
            if self.residency.place(digest) is Place.RESIDENT:
                assert self.slab.holds(self.residency, digest)


TestResidency = ResidencyMachine.TestCase
TestResidency.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)


def load(residency: Residency, digest: str, slab: Slab | None = None) -> None:
    slab = slab or Slab(residency.budget)
    for _ in range(20):
        place = residency.ensure(digest)
        slab.carry_out(residency)
        if place is Place.RESIDENT:
            return
    raise AssertionError(f"{digest} does not come in")


def test_the_least_valuable_goes() -> None:
    now = [0.0]
    residency = Residency(3 * UNIT, clock=lambda: now[0])
    for name in ("often", "once", "lately", "new"):
        residency.register(info(name, UNIT))
    for name, uses in (("often", 5), ("once", 1)):
        load(residency, name)
        for _ in range(uses):
            residency.acquire(name)
            residency.release(name)
    now[0] = 200.0
    load(residency, "lately")
    residency.acquire("lately")
    residency.release("lately")
    load(residency, "new")
    assert residency.place("once") is Place.FULL
    assert {residency.place(name) for name in ("often", "lately", "new")} == {Place.RESIDENT}


def test_a_step_copies_and_moves_bounded_bytes() -> None:
    residency = Residency(10 * UNIT, copy_bytes=2 * UNIT, move_bytes=2 * UNIT)
    residency.register(info("large", 5 * UNIT))
    assert residency.ensure("large") is Place.LOADING
    counts = []
    while residency.ensure("large") is Place.LOADING:
        (do,) = residency.instructions()
        assert isinstance(do, AdapterCopy)
        counts.append(do.count)
        residency.arrived("large")
    assert counts == [2 * UNIT, 2 * UNIT, UNIT]


def test_what_is_worth_more_than_a_move_is_moved() -> None:
    """Three holes of one unit, and a large adapter: those that were used slide together, those never used go."""
    for used in (True, False):
        residency = Residency(6 * UNIT)
        slab = Slab(6 * UNIT)
        for i in range(6):
            residency.register(info(f"s{i}", UNIT))
            load(residency, f"s{i}", slab)
            if used:
                residency.acquire(f"s{i}")
                residency.release(f"s{i}")
        for i in (0, 2, 4):
            residency.unload(f"s{i}")
        residency.register(info("large", 3 * UNIT))
        assert residency.ensure("large") is Place.LOADING
        slab.carry_out(residency)
        assert slab.holds(residency, "large")
        there = [name for name in ("s1", "s3", "s5") if residency.place(name) is Place.RESIDENT]
        assert all(slab.holds(residency, name) for name in there)
        assert len(there) == (3 if used else 2)


def test_pinned_bytes_are_counted() -> None:
    residency = Residency(4 * UNIT)
    residency.register(info("pinned", 2 * UNIT))
    residency.register(info("large", 3 * UNIT))
    assert residency.fits("large")
    residency.pin("pinned")
    assert not residency.fits("large")
