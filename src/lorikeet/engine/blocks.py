"""Blocks of the paged key-value cache: who holds which, and what the free ones still remember. No torch."""

from __future__ import annotations

from array import array
from collections import OrderedDict, deque
from collections.abc import Sequence
from hashlib import blake2b


def root_key(base: str, salt: str) -> bytes:
    """Where every chain of block keys of one base and one tenant begins."""
    return blake2b(f"{base}\0{salt}".encode(), digest_size=16).digest()


def block_key(parent: bytes, tokens: Sequence[int], mask: bytes, adapter: str | None) -> bytes:
    """The key of a full block: what its keys and values depend on, and nothing else.

    `mask` has a byte for each token, non-zero where the adapter acts on it; the adapter's content hash enters only
    where it does, so that a request shares the base's blocks up to the adapter's first token.
    """
    digest = blake2b(parent, digest_size=16)
    digest.update(array("q", tokens).tobytes())
    digest.update(mask)
    if adapter is not None and any(mask):
        digest.update(adapter.encode())
    return digest.digest()


class BlockPool:
    """`total` blocks with reference counts. A block is in use (held by at least one sequence), or free; a free block
    whose content is known by its key waits in least-recently-used order to be found again or taken over.

    Only full blocks are ever published, and a sequence writes only into blocks it holds alone: nothing is copied.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._refs = [0] * total
        self._blank = deque(range(total))
        self._cached: OrderedDict[int, None] = OrderedDict()  # free but remembered, least recently used first
        self._key_of: list[bytes | None] = [None] * total
        self._block_of: dict[bytes, int] = {}
        self.hits = 0

    @property
    def free(self) -> int:
        return len(self._blank) + len(self._cached)

    @property
    def cached(self) -> int:
        return len(self._cached)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks for the caller alone. Raises ValueError when fewer are free: look at `free` first."""
        if count > self.free:
            raise ValueError(f"{count} blocks asked for, {self.free} free")
        taken = []
        for _ in range(count):
            block = self._blank.popleft() if self._blank else self._forget_oldest()
            self._refs[block] = 1
            taken.append(block)
        return taken

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """The blocks of the longest known beginning of a chain. They are not held until `retain`."""
        found = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def idle(self, blocks: Sequence[int]) -> int:
        """How many of `blocks` are free now, and would count against `free` when retained."""
        return sum(self._refs[block] == 0 for block in blocks)

    def retain(self, blocks: Sequence[int]) -> None:
        """Hold blocks that `match` found."""
        for block in blocks:
            if self._refs[block] == 0:
                del self._cached[block]
            self._refs[block] += 1
        self.hits += len(blocks)

    def release(self, blocks: Sequence[int]) -> None:
        """Give back blocks of one sequence, in its order. A chain's end is forgotten before its beginning."""
        for block in reversed(blocks):
            self._refs[block] -= 1
            if self._refs[block] > 0:
                continue
            if self._key_of[block] is None:
                self._blank.append(block)
            else:
                self._cached[block] = None

    def publish(self, block: int, key: bytes) -> None:
        """The held `block` is full and computed: others may find it. The first block under a key stays the one."""
        if self._key_of[block] is None and key not in self._block_of:
            self._key_of[block] = key
            self._block_of[key] = block

    def _forget_oldest(self) -> int:
        block, _ = self._cached.popitem(last=False)
        key = self._key_of[block]
        assert key is not None
        del self._block_of[key]
        self._key_of[block] = None
        return block
