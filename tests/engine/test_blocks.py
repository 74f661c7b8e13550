"""The block pool against a naive model, and what a block's key depends on."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lorikeet.engine.blocks import BlockPool, block_key, root_key

TOTAL = 8


class PoolMachine(RuleBasedStateMachine):
    """Sequences take, share, publish and give back blocks. The model remembers who holds what, and what each block's
    content is: a block found under a key must still hold that key's content."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(TOTAL)
        self.held: dict[int, list[int]] = {}
        self.content: dict[int, bytes] = {}  # what was last written into each block
        self.names = 0

    @rule(count=st.integers(0, TOTAL + 1))
    def allocate(self, count: int) -> None:
        if count > self.pool.free:
            with pytest.raises(ValueError, match="free"):
                self.pool.allocate(count)
            return
        blocks = self.pool.allocate(count)
        assert len(set(blocks)) == count
        assert not set(blocks) & {b for held in self.held.values() for b in held}, "a used block was handed out"
        self.names += 1
        self.held[self.names] = blocks
        for block in blocks:
            self.content.pop(block, None)  # overwritten

    @precondition(lambda self: self.held)
    @rule(data=st.data(), key=st.sampled_from([bytes([i]) for i in range(5)]))
    def publish(self, data: st.DataObject, key: bytes) -> None:
        blocks = self.held[data.draw(st.sampled_from(sorted(self.held)))]
        if blocks:
            block = data.draw(st.sampled_from(blocks))
            if block not in self.content:  # a full block is written once
                self.content[block] = key
            self.pool.publish(block, self.content[block])

    @rule(keys=st.lists(st.sampled_from([bytes([i]) for i in range(5)]), unique=True))
    def share(self, keys: list[bytes]) -> None:
        found = self.pool.match(keys)
        assert [self.content[block] for block in found] == keys[: len(found)]
        users = Counter(b for held in self.held.values() for b in held)
        assert self.pool.idle(found) == sum(users[b] == 0 for b in found)
        self.pool.retain(found)
        self.names += 1
        self.held[self.names] = found

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.pool.release(self.held.pop(data.draw(st.sampled_from(sorted(self.held)))))

    @invariant()
    def nothing_leaks(self) -> None:
        users = Counter(b for held in self.held.values() for b in held)
        assert self.pool.free == TOTAL - len(users)
        assert self.pool._refs == [users[block] for block in range(TOTAL)]
        free = [*self.pool._blank, *self.pool._cached]
        assert sorted([*free, *users]) == list(range(TOTAL))
        assert all(self.pool._key_of[block] == key for key, block in self.pool._block_of.items())


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_the_end_of_a_chain_is_forgotten_first() -> None:
    pool = BlockPool(4)
    chain = pool.allocate(3)
    for block, key in zip(chain, (b"1", b"2", b"3"), strict=True):
        pool.publish(block, key)
    pool.release(chain)
    assert pool.free == 4
    pool.allocate(2)  # the blank one and the chain's last
    assert pool.match([b"1", b"2", b"3"]) == chain[:2]


def test_recently_used_blocks_stay() -> None:
    pool = BlockPool(2)
    for key in (b"old", b"new"):
        block = pool.allocate(1)
        pool.publish(block[0], key)
        pool.release(block)
    again = pool.match([b"old"])
    pool.retain(again)
    pool.release(again)
    pool.allocate(1)
    assert pool.match([b"old"]) == again
    assert pool.match([b"new"]) == []


def test_keys_are_what_blocks_depend_on() -> None:
    root = root_key("base", "")
    tokens, on, off = [1, 2, 3], bytes([1, 1, 1]), bytes(3)
    key = block_key(root, tokens, on, "adapter")
    different = [
        block_key(root_key("other", ""), tokens, on, "adapter"),
        block_key(root_key("base", "tenant"), tokens, on, "adapter"),
        block_key(root, [1, 2, 4], on, "adapter"),
        block_key(root, tokens, on, "another"),
        block_key(root, tokens, bytes([0, 1, 1]), "adapter"),
        block_key(root, tokens, off, None),
        block_key(key, tokens, on, "adapter"),
    ]
    assert len({key, *different}) == len(different) + 1
    assert block_key(root, tokens, on, "adapter") == key
    assert block_key(root, tokens, off, "adapter") == block_key(root, tokens, off, None), "the base's prefix is shared"
