"""CpuOps.attention against the reference: decode rows, prefill chunks, windows, head groups, block sizes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.inputs import make_batch

from lorikeet.kernels.batch import Batch, LayerCache
from lorikeet.kernels.cpu import CpuOps
from lorikeet.kernels.cpu_products import AVAILABLE
from lorikeet.kernels.reference import ReferenceOps

DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6}  # one step of values of 2 to 4
HEADS = st.sampled_from(((1, 1, 8), (4, 2, 16), (5, 5, 64), (7, 1, 32), (14, 2, 24), (40, 1, 20), (3, 3, 80)))


def clone(cache: LayerCache) -> LayerCache:
    return LayerCache(cache.k.clone(), cache.v.clone())


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_equals_the_reference(data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    dtype, heads = data.draw(st.sampled_from(DTYPES)), data.draw(HEADS)
    sequence = st.tuples(st.sampled_from((1, 1, 2, 5, 16, 70)), st.sampled_from((0, 0, 1, 7, 128, 300)))
    sequences = [(new, new + old) for new, old in data.draw(st.lists(sequence, min_size=1, max_size=6))]
    block_size = data.draw(st.sampled_from((1, 3, 8, 16, 64)))
    window = data.draw(st.sampled_from((None, None, 1, 5, 64)))
    q, k, v, batch, cache = make_batch(sequences, heads, block_size, dtype, generator)
    paged = data.draw(st.booleans())
    if not paged:
        batch = dataclasses.replace(batch, kv_len=batch.query_start.diff())
    ours, theirs = clone(cache), clone(cache)
    found = CpuOps().attention(q, k, v, batch, ours if paged else None, window)
    wanted = ReferenceOps().attention(q, k, v, batch, theirs if paged else None, window)
    assert found.shape == wanted.shape and found.dtype == dtype
    assert (found.float() - wanted.float()).abs().max() <= TOLERANCE[dtype]
    assert torch.equal(ours.k.nan_to_num(), theirs.k.nan_to_num())
    assert torch.equal(ours.v.nan_to_num(), theirs.v.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 9])
def test_a_mixed_batch_equals_each_sequence_alone(dtype: torch.dtype, window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    sequences = [(1, 40), (17, 17), (1, 1), (30, 90), (3, 12)]
    q, k, v, batch, cache = make_batch(sequences, (6, 2, 32), 16, dtype, generator)
    together = CpuOps().attention(q, k, v, batch, clone(cache), window)
    bounds = batch.query_start.tolist()
    assert batch.block_table is not None and batch.cache_slot is not None
    for b, (new, length) in enumerate(sequences):
        rows = slice(bounds[b], bounds[b + 1])
        alone = Batch(
            batch.tokens[rows], batch.positions[rows], torch.tensor([0, new], dtype=torch.int32),
            batch.kv_len[b : b + 1], new, length, batch.block_table[b : b + 1], batch.cache_slot[rows],
        )  # fmt: skip
        found = CpuOps().attention(q[rows], k[rows], v[rows], alone, clone(cache), window)
        assert torch.equal(found, together[rows])


@pytest.mark.skipif(not AVAILABLE, reason="other products sum a row alone in another order than four together")
@pytest.mark.parametrize("heads", [(9, 3, 64), (4, 4, 64), (6, 2, 32)])
def test_chunks_give_the_same_bits_as_the_whole(heads: tuple[int, int, int]) -> None:
    """Also token by token at the end: who gives way and is computed again goes on as if nothing had been."""
    length, size = 150, 16
    generator = torch.Generator().manual_seed(2)
    q, k, v, batch, cache = make_batch([(length, length)], heads, size, torch.bfloat16, generator)
    whole = CpuOps().attention(q, k, v, batch, clone(cache), None)
    assert batch.cache_slot is not None
    for start, end in ((0, 70), (70, 71), (71, 128), (128, 147), (147, 148), (148, 149), (149, 150)):
        part = slice(start, end)
        chunk = Batch(
            batch.tokens[part], batch.positions[part], torch.tensor([0, end - start], dtype=torch.int32),
            torch.tensor([end], dtype=torch.int32), end - start, end, batch.block_table, batch.cache_slot[part],
        )  # fmt: skip
        assert torch.equal(CpuOps().attention(q[part], k[part], v[part], chunk, cache, None), whole[part]), (start, end)


def test_a_poisoned_sequence_stays_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v, batch, cache = make_batch([(1, 20), (5, 30), (1, 7)], (4, 2, 16), 8, torch.float32, generator)
    clean = CpuOps().attention(q, k, v, batch, clone(cache), None)
    assert batch.block_table is not None
    cache.k[batch.block_table[1].long()] = float("nan")
    cache.v[batch.block_table[1].long()] = float("nan")
    found = CpuOps().attention(q, k, v, batch, cache, None)
    assert found[1:6].isnan().all()
    assert torch.equal(found[[0, 6]], clean[[0, 6]])


def test_blocks_behind_the_window_are_not_read() -> None:
    generator = torch.Generator().manual_seed(2)
    q, k, v, batch, cache = make_batch([(1, 40), (3, 50)], (2, 2, 16), 4, torch.float32, generator)
    clean = CpuOps().attention(q, k, v, batch, clone(cache), 8)
    assert batch.block_table is not None
    for side in (cache.k, cache.v):
        side[batch.block_table[0, :8].long()] = float("nan")
        side[batch.block_table[1, :10].long()] = float("nan")
    assert torch.equal(CpuOps().attention(q, k, v, batch, cache, 8), clean)


def test_what_the_kernel_cannot_read_is_refused() -> None:
    generator = torch.Generator().manual_seed(3)
    q, k, v, batch, cache = make_batch([(1, 4)], (1, 1, 512), 4, torch.float32, generator)
    with pytest.raises(ValueError, match="head_dim is 512"):
        CpuOps().attention(q, k, v, batch, cache, None)
    q, k, v, batch, cache = make_batch([(1, 4)], (1, 1, 16), 4, torch.float32, generator)
    batch = dataclasses.replace(batch, kv_len=batch.kv_len.long())
    with pytest.raises(ValueError, match="kv_len is torch.int64"):
        CpuOps().attention(q, k, v, batch, cache, None)
