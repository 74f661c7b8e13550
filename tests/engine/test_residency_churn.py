"""A hundred thousand random loads and evictions of adapters from 64 bytes to 64 kB, beside a copy of the slab."""

from __future__ import annotations

import random
from collections import Counter
from math import ceil

import numpy as np
import pytest

from lorikeet.engine.residency import AdapterDrop, AdapterMove, Place, Residency
from lorikeet.errors import AdapterInUseError
from lorikeet.types import AdapterCopy, AdapterInfo

UNIT = 64  # bytes of a cell
LARGEST = 1000  # cells
OPERATIONS = 10_000  # in each of ten runs


class Churn:
    """What requests, operators and a runner may do to a slab, in random order, and what must hold after each of it."""

    def __init__(self, seed: int) -> None:
        self.chance = chance = random.Random(seed)
        self.cells = chance.choice([1000, 1700, 5000])
        self.copy, self.move = (chance.choice([100, 700, 10_000]) * UNIT for _ in range(2))
        self.now = 0.0
        self.residency = Residency(
            self.cells * UNIT, copy_bytes=self.copy, move_bytes=self.move, clock=lambda: self.now
        )
        self.memory = np.zeros(self.cells, np.int64)
        self.first_cell: dict[int, int] = {}  # by handle, as the runner knows it
        self.mark: dict[str, int] = {}  # what the first cell of an adapter holds; the second holds one more, ...
        self.users: Counter[str] = Counter()
        self.pinned: set[str] = set()
        self.done: Counter[str] = Counter()
        for i in range(60):
            size = int(10 ** chance.uniform(0, 3) * UNIT)
            self.mark[f"a{i}"] = (i + 1) * 10 * LARGEST
            self.register(f"a{i}", min(size, LARGEST * UNIT) - chance.randrange(UNIT))

    def register(self, name: str, nbytes: int) -> None:
        self.residency.register(AdapterInfo(digest=name, path=name, nbytes=nbytes, max_rank=1, sites=1))

    # --- the runner ---------------------------------------------------------------------------------------------

    def step(self, failing: float = 0.0) -> None:
        """Carry out a step's instructions, some copies of which fail."""
        self.now += self.chance.expovariate(1.0)
        moves, copied, failed = [], 0, []
        instructions = self.residency.instructions()
        for do in instructions:
            if isinstance(do, AdapterDrop):
                self.first_cell.pop(do.handle, None)  # nothing of it may have come yet
            elif isinstance(do, AdapterMove):
                source, target, count = do.source // UNIT, do.target // UNIT, do.nbytes // UNIT
                assert self.first_cell[do.handle] == source
                self.memory[target : target + count] = self.memory[source : source + count].copy()
                self.first_cell[do.handle] = target
                moves.append(do.nbytes)
            elif self.chance.random() < failing:
                failed.append(do)
            else:
                self.bring(do)
                copied += do.count
        for do in failed:
            self.residency.failed(do.digest)
            self.pinned.discard(do.digest)
            self.register(do.digest, do.nbytes)
        assert sum(moves) <= self.move or len(moves) == 1
        assert copied <= self.copy
        self.done.update(moves=len(moves), failures=len(failed), parts=copied > 0)
        if instructions:
            self.check_bytes()

    def bring(self, do: AdapterCopy) -> None:
        first = do.offset // UNIT
        assert do.start == 0 or self.first_cell[do.handle] == first, "the parts of an adapter lie apart"
        self.first_cell[do.handle] = first
        begin, end = ceil(do.start / UNIT), ceil((do.start + do.count) / UNIT)
        self.memory[first + begin : first + end] = np.arange(begin, end) + self.mark[do.digest]
        self.residency.arrived(do.digest)

    def check_bytes(self) -> None:
        for extent in self.residency._extents.values():
            if extent.resident:
                first = self.first_cell[extent.handle]
                found = self.memory[first : first + extent.size // UNIT]
                mark = self.mark[extent.digest]
                assert (found == np.arange(mark, mark + len(found))).all(), f"{extent.digest} was written over"

    # --- what may happen --------------------------------------------------------------------------------------------

    def known(self) -> str:
        return self.chance.choice(list(self.mark))

    def resident(self) -> list[str]:
        return [name for name in self.mark if self.residency.place(name) is Place.RESIDENT]

    def ask(self) -> None:
        """A request wants an adapter and does not wait for it."""
        self.residency.ensure(self.known(), keep=set(self.chance.sample(list(self.mark), 5)))
        self.done["asked"] += 1

    def bring_in(self) -> None:
        """What fits beside all that must stay comes in within a bound of steps; what does not never does."""
        residency, wanted = self.residency, self.known()
        keep = set(self.chance.sample(list(self.mark), self.chance.choice([0, 3, 40]))) - {wanted}
        stays = {name for name in self.mark if self.users[name] or name in self.pinned or name in keep}
        stays = {name for name in stays if residency.place(name) is not Place.FULL} - {wanted}
        fits = sum(map(residency.size, stays)) + residency.size(wanted) <= residency.budget
        loading = [extent.size - extent.copied for extent in residency._loading.values()]
        bound = 3 + ceil((sum(loading) + residency.size(wanted)) / self.copy) + 2 * ceil(residency.budget / self.move)
        for _ in range(bound):
            place = residency.ensure(wanted, keep)
            self.check()
            self.step()
            if place is Place.RESIDENT:
                break
        assert (place is Place.RESIDENT) == fits
        assert all(residency.place(name) is not Place.FULL for name in stays), "one that must stay was evicted"
        self.done.update({"came": fits, "stayed out": not fits})

    def use(self) -> None:
        if there := self.resident():
            name = self.chance.choice(there)
            self.residency.acquire(name)
            self.users[name] += 1

    def leave(self) -> None:
        if self.users:
            name = self.chance.choice(list(self.users))
            self.residency.release(name)
            self.users -= Counter([name])  # forgets those that nobody uses

    def pin(self) -> None:
        name = self.known()
        pinned = self.residency.fits(name) and len(self.pinned) < 3
        self.residency.pin(name, pinned)
        (self.pinned.add if pinned else self.pinned.discard)(name)

    def unload(self) -> None:
        name = self.known()
        if self.users[name] or name in self.pinned:
            with pytest.raises(AdapterInUseError):
                self.residency.unload(name)
        else:
            self.residency.unload(name)
            assert self.residency.place(name) is Place.FULL
            self.done["unloaded"] += 1

    # --- what must hold -------------------------------------------------------------------------------------------

    def check(self) -> None:
        residency = self.residency
        end = used = 0
        for extent in residency._ordered:
            assert extent.offset >= end, "two adapters overlap"
            end = extent.offset + extent.size
            used += extent.size
        assert end <= residency.budget and residency.used == used
        assert len(residency._ordered) == len(residency._extents)
        handles = {extent.handle for extent in residency._ordered}
        assert handles.isdisjoint(residency._spare_handles)
        assert len(handles) + len(residency._spare_handles) == residency._handles <= len(self.mark)
        for name in self.users:
            assert residency.place(name) is Place.RESIDENT, "one in use was evicted"
        assert len(residency._by_worth) <= 2 * len(self.mark) + 65

    def operate(self) -> None:
        doings = [self.ask, self.bring_in, self.use, self.leave, self.pin, self.unload, self.step]
        doing = self.chance.choices(doings, [6, 5, 5, 4, 0.3, 0.7, 3])[0]
        doing()
        if doing == self.ask:
            self.step(failing=0.08)
        if self.chance.random() < 0.001:  # everybody goes at once
            while self.users:
                self.leave()
        self.check()


def test_nothing_that_fits_is_refused_whatever_happened_before() -> None:
    done: Counter[str] = Counter()
    for seed in range(10):
        churn = Churn(seed)
        for _ in range(OPERATIONS):
            churn.operate()
        done += churn.done
    assert min(done[what] for what in ("moves", "parts", "failures", "came", "stayed out", "unloaded")) > 100, done
