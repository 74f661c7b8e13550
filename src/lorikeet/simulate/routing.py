"""Which of many replicas gets a request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil
from zlib import crc32

from lorikeet.simulate.replica import Replica
from lorikeet.simulate.scenario import Replicas

Router = Callable[[str | None], int]


def make_router(settings: Replicas, replicas: Sequence[Replica]) -> Router:
    """A function from an adapter's digest (None is the base) to the index of a replica.

    - least_loaded: the fewest requests in flight; of equals the next in turn.
    - adapter_hash: always the same one for an adapter; requests to the base as least_loaded.
    - adapter_affinity: the adapter's own one, or the next in the ring that has at most `bound` times the average of
      requests in flight (consistent hashing with bounded loads: Mirrokni, Thorup and Zadimoghaddam 2018).
    """
    count = len(replicas)
    turn = 0

    def least_loaded(adapter: str | None) -> int:
        nonlocal turn
        chosen = min(range(turn, turn + count), key=lambda i: replicas[i % count].in_flight) % count
        turn = (chosen + 1) % count
        return chosen

    def by_hash(adapter: str | None) -> int:
        return least_loaded(None) if adapter is None else crc32(adapter.encode()) % count

    def by_affinity(adapter: str | None) -> int:
        if adapter is None:
            return least_loaded(None)
        most = ceil(settings.bound * (sum(replica.in_flight for replica in replicas) + 1) / count)
        home = crc32(adapter.encode())
        return next(i % count for i in range(home, home + count) if replicas[i % count].in_flight < most)

    return {"least_loaded": least_loaded, "adapter_hash": by_hash, "adapter_affinity": by_affinity}[settings.routing]
