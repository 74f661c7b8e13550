"""Whose turn it is: a queue for each adapter, and how much each has been served. No torch."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping

from lorikeet.engine.request import Sequence

Key = str | None  # an adapter's digest; None is the base


class FairQueues:
    """Waiting sequences in a queue for each adapter, and a virtual token counter for each (Sheng et al. 2024,
    "Fairness in Serving Large Language Models").

    The least served adapter is next. One that comes back after a pause starts level with the least served of those
    that are here, so that nobody saves up. When an adapter finds no room in the slab, the most over-served resident
    ones make way: their waiting requests are held back until it is in.
    """

    def __init__(self, patience: int = 4096) -> None:
        self._queues: dict[Key, deque[Sequence]] = {}
        self._served: dict[Key, int] = {}
        self._patience = patience  # tokens an adapter may be ahead of one that has no room
        self._active: dict[Key, int] = {}  # requests that wait or run
        self._last_left = 0  # counter of the adapter that was here last
        self._length = 0
        self._wants_room: Key = None
        self._giving_way: set[str] = set()

    def __len__(self) -> int:
        return self._length

    def enter(self, sequence: Sequence) -> None:
        """A new request, behind the others of its adapter."""
        key = sequence.adapter
        if key not in self._active:
            floor = min((self._served[other] for other in self._active), default=self._last_left)
            self._served[key] = max(self._served.get(key, 0), floor)
        self._active[key] = self._active.get(key, 0) + 1
        self._queues.setdefault(key, deque()).append(sequence)
        self._length += 1

    def leave(self, sequence: Sequence) -> None:
        """A request has ended, wherever it was."""
        key = sequence.adapter
        self._active[key] -= 1
        if self._active[key] == 0:
            del self._active[key]
            self._last_left = self._served[key]

    def push_back(self, sequence: Sequence) -> None:
        """A preempted sequence, back to its place by arrival."""
        queue = self._queues.setdefault(sequence.adapter, deque())
        index = next((i for i, other in enumerate(queue) if other.arrival > sequence.arrival), len(queue))
        queue.insert(index, sequence)
        self._length += 1

    def head(self, key: Key) -> Sequence:
        return self._queues[key][0]

    def of(self, key: Key) -> Collection[Sequence]:
        return self._queues.get(key, ())

    def pop(self, key: Key) -> Sequence:
        sequence = self._queues[key][0]
        self.remove(sequence)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        key = sequence.adapter
        queue = self._queues[key]
        queue.remove(sequence)
        self._length -= 1
        if not queue:
            del self._queues[key]
            if key == self._wants_room:
                self._clear()

    def turns(self) -> Iterator[Key]:
        """Adapters with waiting requests, least served first; one that was served while it had its turn comes again
        with its new count, one that was not is passed over."""
        heap = [(self._served[key], queue[0].arrival, key) for key, queue in self._queues.items()]
        heapq.heapify(heap)  # arrivals differ, so that keys are never compared
        while heap:
            _, arrival, key = heapq.heappop(heap)
            yield key
            if key in self._queues and self.head(key).arrival != arrival:
                heapq.heappush(heap, (self._served[key], self.head(key).arrival, key))

    def charge(self, key: Key, tokens: int) -> None:
        self._served[key] = self._served.get(key, 0) + tokens

    def served(self, key: Key) -> int:
        return self._served.get(key, 0)

    # --- room in the slab -------------------------------------------------------------------------------------

    def wanted(self) -> Collection[str]:
        """Adapters that must not be evicted because requests wait for them."""
        return {key for key in self._queues if key is not None and key not in self._giving_way}

    def held_back(self, key: str) -> bool:
        return key in self._giving_way

    def make_way(self, key: str, size: int, movable: Callable[[], Mapping[str, int]]) -> None:
        """`key` finds no room of `size` bytes: those of the `movable` adapters (with their sizes) that are furthest
        ahead of it, if far enough, stop taking requests."""
        if self._wants_room is not None:
            return
        resident = movable()
        for other in sorted(resident, key=self.served, reverse=True):
            if size <= 0 or self.served(other) <= self.served(key) + self._patience:
                break
            self._wants_room = key
            self._giving_way.add(other)
            size -= resident[other]

    def made_way(self, key: str) -> None:
        """`key` has its room."""
        if key == self._wants_room:
            self._clear()

    def _clear(self) -> None:
        self._wants_room = None
        self._giving_way = set()
