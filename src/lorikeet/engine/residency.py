"""Which adapters are in the slab, and where: extents, eviction, compaction. No torch.

The runner owns the bytes; it is told what to do by instructions that it carries out in order, before the step's
forward pass. An adapter counts as resident once the runner has said that its last byte is there.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import Enum
from heapq import heappop, heappush
from math import inf, log2
from time import time

from lorikeet.errors import AdapterError, AdapterInUseError
from lorikeet.types import AdapterCopy, AdapterInfo, AdapterStats

ALIGNMENT = 64  # bytes
HALF_LIFE = 300.0  # seconds until a use counts half
RELOAD_FIXED = 0.5e-3  # seconds a reload costs whatever its size
RELOAD_RATE = 2e9  # bytes a second


@dataclass(slots=True)
class AdapterMove:
    """Slide the adapter under `handle` from byte `source` down to byte `target`; the two may overlap."""

    handle: int
    source: int
    target: int
    nbytes: int


@dataclass(slots=True)
class AdapterDrop:
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
        if offset is None and self._evict(size, keep):
            offset = self._find(size)
            if offset is None:
                offset = self._compact(size)
        if offset is None:
            return Place.FULL
        handle = self._spare_handles.pop() if self._spare_handles else self._handles
        self._handles = max(self._handles, handle + 1)
        extent = self._extents[digest] = self._loading[digest] = _Extent(digest, handle, offset, size)
        insort(self._ordered, extent, key=lambda other: other.offset)
        heappush(self._by_worth, (self._worth(digest), digest))
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
        if self.budget - self._used < size:
            return None
        end = 0
        for extent in self._ordered:
            if extent.offset - end >= size:
                return end
            end = extent.offset + extent.size
        return end if self.budget - end >= size else None

    def _evict(self, size: int, keep: Collection[str]) -> bool:
        """Evict the least valuable adapters until `size` bytes are free; none if that cannot be reached.

        Value is frequency x recency x cost of a reload, for each byte held (GreedyDual-Size-Frequency without its
        clock: Cherkasova 1998).
        """
        free, passed = self.budget - self._used, []
        victims: dict[str, float] = {}
        while free < size and self._by_worth:  # then there may be no hole of that size yet: compaction is cheaper
            worth, digest = heappop(self._by_worth)
            if digest not in self._extents or digest in victims:
                continue
            now_worth = self._worth(digest)
            if worth < now_worth:
                heappush(self._by_worth, (now_worth, digest))
            elif self.evictable(digest, keep):
                victims[digest] = worth
                free += self.size(digest)
            else:
                passed.append((worth, digest))
        if free < size:
            passed += [(worth, digest) for digest, worth in victims.items()]
            victims.clear()
        for entry in passed:
            heappush(self._by_worth, entry)
        for digest in victims:
            self._remove(digest)
        return free >= size

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
        self._spare_handles.append(extent.handle)
        self._instructions.append(AdapterDrop(extent.handle))

    def _compact(self, size: int) -> int | None:
        """Slide adapters down into the holes below them, within this step's bytes, until a hole of `size` opens."""
        end = 0
        for extent in self._ordered:
            if extent.offset > end:
                if self._moved and self._moved + extent.size > self._move_bytes:
                    return None
                self._moved += extent.size
                self._instructions.append(AdapterMove(extent.handle, extent.offset, end, extent.size))
                extent.offset = end
                offset = self._find(size)
                if offset is not None:
                    return offset
            end = extent.offset + extent.size
        return None

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
