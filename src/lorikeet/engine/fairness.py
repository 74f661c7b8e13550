"""Whose turn it is: a queue for each adapter of each tenant, and how much each has been served. No torch."""

from __future__ import annotations

import heapq
from bisect import insort
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import NamedTuple

from lorikeet.engine.request import Sequence

PATIENCE = 4096  # tokens that somebody may be ahead of one that waits before he gives way


class Key(NamedTuple):
    """Whose a queue is: a tenant's requests on an adapter's digest (None is the base)."""

    tenant: str
    adapter: str | None


def key_of(sequence: Sequence) -> Key:
    return Key(sequence.request.tenant, sequence.adapter)


class Counters:
    """Virtual token counters (Sheng et al. 2024, "Fairness in Serving Large Language Models").

    Somebody who comes back after a pause starts level with the least served of those that are here, so that nobody
    saves up.
    """

    def __init__(self) -> None:
        self._served: dict[str | None, float] = {}
        self._active: dict[str | None, int] = {}  # requests that wait or run
        self._last_left = 0.0  # counter of the one that was here last

    def enter(self, name: str | None) -> None:
        if name not in self._active:
            floor = min((self._served[other] for other in self._active), default=self._last_left)
            self._served[name] = max(self._served.get(name, 0.0), floor)
        self._active[name] = self._active.get(name, 0) + 1

    def leave(self, name: str | None) -> None:
        self._active[name] -= 1
        if self._active[name] == 0:
            del self._active[name]
            self._last_left = self._served[name]

    def charge(self, name: str | None, tokens: float) -> None:
        self._served[name] = self._served.get(name, 0.0) + tokens

    def of(self, name: str | None) -> float:
        return self._served.get(name, 0.0)


class FairQueues:
    """Waiting sequences in a queue for each adapter of each tenant, in it by priority (low first), then by arrival.

    The least served tenant is next, of its adapters the least served one. A tenant's tokens count less the larger its
    weight is. When an adapter finds no room in the slab, the most over-served resident ones make way: their waiting
    requests are held back until it is in. Without `fair` nobody's tokens are counted: all are taken as they come.
    """

    def __init__(self, weights: Mapping[str, float] | None = None, patience: int = PATIENCE, fair: bool = True) -> None:
        self._weights = dict(weights or {})
        self._patience = patience
        self._fair = fair
        self._queues: dict[Key, list[Sequence]] = {}
        self._tenants, self._adapters = Counters(), Counters()
        self._waiting: dict[str, int] = {}  # requests of a tenant
        self._length = 0
        self._wants_room: str | None = None
        self._giving_way: set[str] = set()

    def __len__(self) -> int:
        return self._length

    def waiting_of(self, tenant: str) -> int:
        return self._waiting.get(tenant, 0)

    def enter(self, sequence: Sequence) -> None:
        """A new request."""
        self._tenants.enter(sequence.request.tenant)
        self._adapters.enter(sequence.adapter)
        self.push_back(sequence)

    def leave(self, sequence: Sequence) -> None:
        """A request has ended, wherever it was."""
        self._tenants.leave(sequence.request.tenant)
        self._adapters.leave(sequence.adapter)

    def push_back(self, sequence: Sequence) -> None:
        """A sequence that waits (again), to its place."""
        insort(self._queues.setdefault(key_of(sequence), []), sequence, key=_place)
        tenant = sequence.request.tenant
        self._waiting[tenant] = self._waiting.get(tenant, 0) + 1
        self._length += 1

    def head(self, key: Key) -> Sequence:
        return self._queues[key][0]

    def of(self, adapter: str) -> list[Sequence]:
        """All that wait for an adapter."""
        return [sequence for key, queue in self._queues.items() if key.adapter == adapter for sequence in queue]

    def pop(self, key: Key) -> Sequence:
        sequence = self._queues[key][0]
        self.remove(sequence)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        key = key_of(sequence)
        queue = self._queues[key]
        queue.remove(sequence)
        self._length -= 1
        self._waiting[key.tenant] -= 1
        if not self._waiting[key.tenant]:
            del self._waiting[key.tenant]
        if not queue:
            del self._queues[key]
            if key.adapter is not None and key.adapter == self._wants_room and not self.of(key.adapter):
                self._clear()

    def surplus(self, newcomer: Sequence) -> Sequence:
        """Who goes when there is no room for one more: the last of the longest queue of the tenant with most requests
        (by weight), be it `newcomer`. Nobody who has been given tokens goes."""
        if not self._fair:
            return newcomer
        own = key_of(newcomer)

        def length(key: Key) -> tuple[float, int, bool]:
            of_tenant = self.waiting_of(key.tenant) + (key.tenant == own.tenant)
            of_key = len(self._queues.get(key, ())) + (key == own)
            return of_tenant / self._weights.get(key.tenant, 1.0), of_key, key == own

        longest = max((own, *self._queues), key=length)
        last = [one for one in self._queues.get(longest, ()) if not one.admissions][-1:]
        if longest == own:
            last.append(newcomer)
        return max(last, key=_place, default=newcomer)

    def next(self) -> Sequence:
        """The one whose turn it is; there must be one that waits."""
        return min((queue[0] for queue in self._queues.values()), key=self.rank)

    def turns(self) -> Iterator[Key]:
        """Queues with waiting requests, the least served first; one that was served while it had its turn comes again
        with its new count, one that was not is passed over."""
        heap = [(self._rank(key), queue[0].arrival, key) for key, queue in self._queues.items()]
        heapq.heapify(heap)  # arrivals differ, so that keys are never compared
        while heap:
            rank, arrival, key = heapq.heappop(heap)
            if key not in self._queues:
                continue
            if (now := self._rank(key)) > rank:  # another queue of its tenant, or of its adapter, was served
                heapq.heappush(heap, (now, arrival, key))
                continue
            yield key
            if key in self._queues and self.head(key).arrival != arrival:
                heapq.heappush(heap, (self._rank(key), self.head(key).arrival, key))

    def _rank(self, key: Key) -> tuple[float, float]:
        return self._tenants.of(key.tenant), self._adapters.of(key.adapter)

    def rank(self, sequence: Sequence) -> tuple[tuple[float, float], tuple[int, int]]:
        """Sorts sequences as their turns come."""
        return self._rank(key_of(sequence)), _place(sequence)

    def charge(self, sequence: Sequence, tokens: int) -> None:
        if not self._fair:
            return
        tenant = sequence.request.tenant
        self._tenants.charge(tenant, tokens / self._weights.get(tenant, 1.0))
        self._adapters.charge(sequence.adapter, tokens)

    def ahead(self, other: Sequence, waiting: Sequence) -> float:
        """How many tokens further than its patience with others allows the one that waits, `other` has been served."""
        ours, theirs = key_of(waiting), key_of(other)
        if ours.tenant != theirs.tenant:
            return self._tenants.of(theirs.tenant) - self._tenants.of(ours.tenant) - self._patience
        return self._adapters.of(theirs.adapter) - self._adapters.of(ours.adapter) - self._patience

    def crowding(self, running: Collection[Sequence], head: Sequence) -> Sequence | None:
        """The latest of the tenant that has most places, by weight, or of the adapter that has most of its tenant's,
        where one place less would still be no fewer than `head`'s with one more."""
        if not self._fair:
            return None
        tenants = Counter(one.request.tenant for one in running)
        keys = Counter(key_of(one) for one in running)
        own, weight = key_of(head), self._weights.get(head.request.tenant, 1.0)

        def over(key: Key) -> tuple[bool, float, int]:
            """Whether places of this queue are to be given away, and which ones first."""
            share = self._weights.get(key.tenant, 1.0)
            if key.tenant == own.tenant:
                return keys[key] - 1 > keys[own], tenants[key.tenant] / share, keys[key]
            others = (tenants[key.tenant] - 1) / share >= (tenants[own.tenant] + 1) / weight
            return others, tenants[key.tenant] / share, keys[key]

        crowd = max(keys, key=over)
        return max((one for one in running if key_of(one) == crowd), key=_arrival) if over(crowd)[0] else None

    # --- room in the slab -------------------------------------------------------------------------------------

    def wanted(self) -> set[str]:
        """Adapters that must not be evicted because requests wait for them."""
        return {key.adapter for key in self._queues if key.adapter is not None} - self._giving_way

    def held_back(self, adapter: str) -> bool:
        return adapter in self._giving_way

    def make_way(self, adapter: str, size: int, movable: Callable[[], Mapping[str, int]]) -> None:
        """`adapter` finds no room of `size` bytes: those of the `movable` ones (with their sizes) that are furthest
        ahead of it, if far enough, stop taking requests."""
        if self._wants_room is not None:
            return
        resident, served = movable(), self._adapters.of
        for other in sorted(resident, key=served, reverse=True):
            if size <= 0 or served(other) <= served(adapter) + self._patience:
                break
            self._wants_room = adapter
            self._giving_way.add(other)
            size -= resident[other]

    def made_way(self, adapter: str) -> None:
        """`adapter` has its room."""
        if adapter == self._wants_room:
            self._clear()

    def _clear(self) -> None:
        self._wants_room = None
        self._giving_way = set()


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival


def _place(sequence: Sequence) -> tuple[int, int]:
    return sequence.request.priority, sequence.arrival
