"""Which adapters are in the slab, and where: extents, eviction, compaction. No torch.

The runner owns the bytes; it is told what to do by instructions that it carries out in order, before the step's
forward pass. An adapter counts as resident once the runner has said that its last byte is there.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import Enum
from heapq import heapify, heappop, heappush
from math import inf, log2
from operator import attrgetter
from time import time

import msgspec

from lorikeet.errors import AdapterError, AdapterInUseError
from lorikeet.types import AdapterCopy, AdapterInfo, AdapterStats

ALIGNMENT = 64  # bytes
HALF_LIFE = 300.0  # seconds until a use counts half
RELOAD_FIXED = 0.5e-3  # seconds a reload costs whatever its size
RELOAD_RATE = 2e9  # bytes a second
MOVE_RATE = 1e10  # bytes a second, within the slab
_offset = attrgetter("offset")


class AdapterMove(msgspec.Struct, tag=True):
    """Slide the adapter under `handle` from byte `source` down to byte `target`; the two may overlap."""

    handle: int
    source: int
    target: int
    nbytes: int


class AdapterDrop(msgspec.Struct, tag=True):
    """Forget the adapter under `handle`; its bytes are free."""

    handle: int


Instruction = AdapterCopy | AdapterMove | AdapterDrop


class Place(Enum):
    RESIDENT = "resident"
    LOADING = "loading"
    FULL = "full"  # no room now: everything else is in use or wanted, or compaction is under way


@dataclass(slots=True, eq=False)
class _Extent:
    """Where a resident or loading adapter lies."""

    digest: str
    handle: int
    offset: int
    size: int  # nbytes rounded up to the alignment
    listed: float = -inf  # the worth under which it was listed last
    copied: int = 0
    resident: bool = False


@dataclass(slots=True)
class _Known:
    info: AdapterInfo
    users: int = 0  # running sequences
    hits: int = 0
    value: float = 0.0  # uses, each halved every HALF_LIFE, as of `last_used`
    last_used: float = 0.0


class Residency:
    """At most `budget` bytes of adapters, of which a step copies at most `copy_bytes` and moves at most `move_bytes`
    (but always at least one adapter, so that a large one gets through)."""

    def __init__(
        self,
        budget: int,
        *,
        copy_bytes: int = 64 * 2**20,
        move_bytes: int = 64 * 2**20,
        clock: Callable[[], float] = time,
    ) -> None:
        self.budget = budget // ALIGNMENT * ALIGNMENT
        self._copy_bytes, self._move_bytes = copy_bytes, move_bytes
        self._clock = clock
        self._known: dict[str, _Known] = {}
        self._pinned: set[str] = set()
        self._extents: dict[str, _Extent] = {}
        self._ordered: list[_Extent] = []  # by offset
        self._loading: dict[str, _Extent] = {}  # those that are not resident yet, first come first
        self._by_worth: list[tuple[float, str]] = []  # a heap; what was used or removed since stands there as it was
        self._used = 0
        self._no_hole = self.budget + 1  # no hole has so many bytes
        self._spare_handles: list[int] = []
        self._handles = 0
        self._instructions: list[Instruction] = []
        self._moved = 0  # bytes in this step

    # --- what is known ----------------------------------------------------------------------------------------

    def register(self, info: AdapterInfo) -> None:
        """Make a compiled adapter known. Raises AdapterError when it is larger than the whole budget."""
        if _aligned(info.nbytes) > self.budget:
            raise AdapterError(
                f"adapter {info.digest[:12]} takes {info.nbytes} bytes, the whole adapter memory is {self.budget}",
                hint="serve with a larger --adapter-memory",
                code="adapter_too_large",
            )
        known = self._known.get(info.digest)
        if known is None:
            self._known[info.digest] = _Known(info)
        else:
            known.info = info

    def knows(self, digest: str) -> bool:
        return digest in self._known

    def info(self, digest: str) -> AdapterInfo:
        return self._known[digest].info

    def pin(self, digest: str, pinned: bool = True) -> None:
        """A pinned adapter is not evicted once it is resident."""
        assert digest in self._known
        (self._pinned.add if pinned else self._pinned.discard)(digest)

    def unload(self, digest: str) -> None:
        """Take a known adapter out of the slab; one that is not there stays out. Raises AdapterInUseError."""
        known = self._known[digest]
        if known.users > 0 or digest in self._pinned:
            reason = f"{known.users} requests run on it" if known.users else "it is pinned"
            raise AdapterInUseError(f"adapter {digest[:12]}: {reason}", hint="unpin it, or try again later")
        if digest in self._extents:
            self._remove(digest)

    def fits(self, digest: str) -> bool:
        """Whether the adapter would fit beside the pinned ones."""
        return sum(self.size(other) for other in self._pinned | {digest}) <= self.budget

    def can_hold(self, digest: str, keep: Collection[str]) -> bool:
        """Whether there is room for the adapter, or can be made, beside those that may not go now."""
        if self._used + self.size(digest) <= self.budget or digest in self._extents:
            return True
        staying = sum(extent.size for extent in self._ordered if not self.evictable(extent.digest, keep))
        return staying + self.size(digest) <= self.budget

    # --- use --------------------------------------------------------------------------------------------------

    def handle(self, digest: str) -> int:
        """The slab's handle of a resident adapter."""
        return self._extents[digest].handle

    def acquire(self, digest: str) -> None:
        """A running sequence uses the adapter, which must be resident."""
        assert self._extents[digest].resident
        known = self._known[digest]
        now = self._clock()
        known.value = known.value * _decay(now - known.last_used) + 1.0
        known.last_used = now
        known.hits += 1
        known.users += 1

    def release(self, digest: str) -> None:
        self._known[digest].users -= 1

    def in_use(self, digest: str) -> bool:
        return self._known[digest].users > 0

    def movable(self) -> dict[str, int]:
        """The adapters in the slab that are not pinned, with their sizes in bytes."""
        return {digest: e.size for digest, e in self._extents.items() if digest not in self._pinned}

    @property
    def loading(self) -> bool:
        return bool(self._loading)

    @property
    def has_instructions(self) -> bool:
        """The runner has something to drop or to move before the next step."""
        return bool(self._instructions)

    @property
    def copies_enough(self) -> bool:
        """The next step copies all that a step may."""
        to_copy = sum(self._known[extent.digest].info.nbytes - extent.copied for extent in self._loading.values())
        return to_copy >= self._copy_bytes

    @property
    def used(self) -> int:
        return self._used

    # --- making room ------------------------------------------------------------------------------------------

    def place(self, digest: str) -> Place:
        """Where a known adapter is now: FULL is not in the slab."""
        extent = self._extents.get(digest)
        if extent is None:
            return Place.FULL
        return Place.RESIDENT if extent.resident else Place.LOADING

    def ensure(self, digest: str, keep: Collection[str] = ()) -> Place:
        """Bring the adapter in, if there is room or can be made. Adapters in `keep` are not evicted for it."""
        place = self.place(digest)
        if place is not Place.FULL:
            return place
        size = self.size(digest)
        offset = self._find(size)
        if offset is None and self._make_room(size, keep):
            offset = self._find(size)
        if offset is None:
            return Place.FULL
        handle = self._spare_handles.pop() if self._spare_handles else self._handles
        self._handles = max(self._handles, handle + 1)
        extent = _Extent(digest, handle, offset, size, listed=self._worth(digest))
        self._extents[digest] = self._loading[digest] = extent
        insort(self._ordered, extent, key=_offset)
        heappush(self._by_worth, (extent.listed, digest))
        self._used += size
        return Place.LOADING

    def evictable(self, digest: str, keep: Collection[str]) -> bool:
        """Whether a resident adapter may go now."""
        known, extent = self._known[digest], self._extents[digest]
        return extent.resident and known.users == 0 and digest not in self._pinned and digest not in keep

    def size(self, digest: str) -> int:
        """Bytes the adapter takes in the slab."""
        return _aligned(self._known[digest].info.nbytes)

    def _find(self, size: int) -> int | None:
        """First fit."""
        if self.budget - self._used < size or size >= self._no_hole:
            return None
        end = 0
        for extent in self._ordered:
            if extent.offset - end >= size:
                return end
            end = extent.offset + extent.size
        if self.budget - end >= size:
            return end
        self._no_hole = size
        return None

    def _make_room(self, size: int, keep: Collection[str]) -> bool:
        """Open a hole of `size` bytes; False where that takes further steps, or cannot be.

        The least valuable adapter goes, if that is enough. Else a run of neighbours is cleared where that costs least:
        those that may go are evicted, the others slide to its lower end, within this step's bytes. Where there are
        `size` bytes in smaller holes, nobody need go: they are gathered if that costs less.
        """
        scattered = self.budget - self._used >= size
        if not scattered:
            victim = self._least_valuable(keep)
            if victim is None:
                return False
            if self._stretch(victim) >= size:
                self._remove(victim.digest)
                return True
        cost, first, last = self._cheapest_run(size, keep)
        if scattered:
            gathering = self._cheapest_run(size, self._extents)
            if gathering[0] <= cost:
                (_, first, last), keep = gathering, self._extents
        end, stay = self._below(first), []
        for extent in self._ordered[first:last]:
            if self.evictable(extent.digest, keep):
                self._remove(extent.digest)
            else:
                stay.append(extent)
        return first < last and self._slide(stay, end)

    def _least_valuable(self, keep: Collection[str]) -> _Extent | None:
        """Of the adapters that may go, the one of least value.

        Value is frequency x recency x cost of a reload, for each byte held (GreedyDual-Size-Frequency without its
        clock: Cherkasova 1998).
        """
        passed, found = [], None
        while self._by_worth and found is None:
            listed, digest = heappop(self._by_worth)
            extent = self._extents.get(digest)
            if extent is None or extent.listed != listed:
                continue
            extent.listed = self._worth(digest)
            if listed < extent.listed:
                heappush(self._by_worth, (extent.listed, digest))
                continue
            passed.append((listed, digest))
            if self.evictable(digest, keep):
                found = extent
        for entry in passed:
            heappush(self._by_worth, entry)
        return found

    def _stretch(self, extent: _Extent) -> int:
        """Bytes that are free once the adapter is gone: its own, and the holes beside it."""
        at = bisect_left(self._ordered, extent.offset, key=_offset)
        return self._above(at) - self._below(at)

    def _below(self, at: int) -> int:
        """Where the adapter before the one at this place ends."""
        return self._ordered[at - 1].offset + self._ordered[at - 1].size if at else 0

    def _above(self, at: int) -> int:
        """Where the adapter after the one at this place begins."""
        return self._ordered[at + 1].offset if at + 1 < len(self._ordered) else self.budget

    def _cheapest_run(self, size: int, keep: Collection[str]) -> tuple[float, int, int]:
        """The neighbours between which `size` bytes can be had at the least cost: seconds, first and last (excluded).

        What goes has to be reloaded as often as it was used lately, what stays has to be moved. With every byte that
        is moved the cheapest run costs less: a slide that takes several steps comes to its end. (inf, 0, 0): none.
        """
        now = self._clock() / HALF_LIFE
        best = (inf, 0, 0)
        costs: list[tuple[int, float]] = []  # of each adapter: bytes that stay occupied, seconds
        below = [0, *(extent.offset + extent.size for extent in self._ordered)]  # where the one before each ends
        above = [*(extent.offset for extent in self._ordered[1:]), self.budget]  # where the one after each begins
        first = occupied = 0
        cost = 0.0
        for last, extent in enumerate(self._ordered):
            if self.evictable(extent.digest, keep):
                costs.append((0, 2.0 ** (self._worth(extent.digest) - now) * extent.size))
            else:
                costs.append((extent.size, extent.copied / MOVE_RATE))
            occupied += costs[last][0]
            cost += costs[last][1]
            while first < last and above[last] - below[first + 1] - (occupied - costs[first][0]) >= size:
                occupied -= costs[first][0]
                cost -= costs[first][1]
                first += 1
            if cost < best[0] and above[last] - below[first] - occupied >= size:
                best = (cost, first, last + 1)
        return best

    def _worth(self, digest: str) -> float:
        """Base 2 logarithm of the value, but for a factor that grows with time and is the same for all: so the order of
        two adapters changes only when one of them is used, and then its worth grows."""
        known = self._known[digest]
        if known.value == 0:
            return -inf
        reload = RELOAD_FIXED + known.info.nbytes / RELOAD_RATE
        return log2(known.value * reload / max(self.size(digest), 1)) + known.last_used / HALF_LIFE

    def _remove(self, digest: str) -> None:
        extent = self._extents.pop(digest)
        self._ordered.remove(extent)
        self._loading.pop(digest, None)
        self._used -= extent.size
        self._no_hole = self.budget + 1
        self._spare_handles.append(extent.handle)
        self._instructions.append(AdapterDrop(extent.handle))
        if len(self._by_worth) > 2 * len(self._extents) + 64:  # mostly of those that are gone
            self._by_worth = [(one.listed, one.digest) for one in self._ordered]
            heapify(self._by_worth)

    def _slide(self, extents: list[_Extent], end: int) -> bool:
        """Move adapters down, one behind the other from byte `end` on; False where this step's bytes do not suffice."""
        for extent in extents:
            if extent.offset > end:
                nbytes = _aligned(extent.copied)
                if self._moved and self._moved + nbytes > self._move_bytes:
                    return False
                self._moved += nbytes
                if nbytes:
                    self._instructions.append(AdapterMove(extent.handle, extent.offset, end, nbytes))
                extent.offset = end
                self._no_hole = self.budget + 1
            end = extent.offset + extent.size
        return True

    # --- between scheduler and runner -------------------------------------------------------------------------

    def instructions(self) -> list[Instruction]:
        """What the runner has to do before this step, in order."""
        taken, self._instructions, self._moved = self._instructions, [], 0
        room = self._copy_bytes
        for extent in self._loading.values():
            if room <= 0:
                break
            info = self._known[extent.digest].info
            count = min(room, info.nbytes - extent.copied)
            taken.append(
                AdapterCopy(
                    digest=extent.digest,
                    path=info.path,
                    handle=extent.handle,
                    offset=extent.offset,
                    nbytes=info.nbytes,
                    start=extent.copied,
                    count=count,
                )
            )
            extent.copied += count
            room -= max(count, 1)
        return taken

    def arrived(self, digest: str) -> None:
        """The runner has carried out a copy: the adapter is resident if that was the last part."""
        extent = self._extents[digest]
        extent.resident = extent.copied == self._known[digest].info.nbytes
        if extent.resident:
            self._loading.pop(digest, None)

    def postponed(self, copy: AdapterCopy) -> None:
        """The runner has not carried out a copy: it is asked again."""
        self._extents[copy.digest].copied -= copy.count

    def failed(self, digest: str) -> None:
        """The runner could not read the adapter: it is forgotten, and has to be registered again."""
        self._remove(digest)
        self._pinned.discard(digest)
        del self._known[digest]

    def stats(self) -> list[AdapterStats]:
        """Known adapters; `last_used` in seconds of the clock (0 is never)."""
        return [
            AdapterStats(
                digest=digest,
                resident=digest in self._extents and self._extents[digest].resident,
                bytes=known.info.nbytes,
                hits=known.hits,
                last_used=known.last_used,
                max_rank=known.info.max_rank,
                running=known.users,
                kind=known.info.kind,
                sites=known.info.sites,
                pinned=digest in self._pinned,
                loading=digest in self._loading,
            )
            for digest, known in self._known.items()
        ]


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _decay(age: float) -> float:
    return float(0.5 ** (age / HALF_LIFE))
