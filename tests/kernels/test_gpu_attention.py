"""The attention of a GPU against the reference in float64: decode, prefill and both, windows, groups, fp8.

What no sequence owns of the cache is NaN, and so is the memory that results are written to.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from tests.kernels.inputs import assert_near, fresh_generator, make_batch, poisoned_memory, to_device
from torch import Tensor

from lorikeet.kernels.batch import Batch, LayerCache
from lorikeet.kernels.reference import ReferenceOps
from lorikeet.kernels.weight import DenseWeight

DTYPES = (torch.float32, torch.bfloat16)
REFERENCE = ReferenceOps()
Made = tuple[Tensor, Tensor, Tensor, Batch, LayerCache]
MIXED = [(1, 1), (1, 40), (5, 5), (40, 60), (1, 120), (3, 30)]  # (new tokens, all)


@pytest.fixture
def draw() -> torch.Generator:
    return fresh_generator()


def clone(cache: LayerCache) -> LayerCache:
    return dataclasses.replace(cache, k=cache.k.clone(), v=cache.v.clone())


def made(
    sequences: Sequence[tuple[int, int]],
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    draw: torch.Generator,
    device: str,
) -> Made:
    return to_device(make_batch(sequences, heads, 16, dtype, draw), device)


def reference(inputs: Made, window: int | None) -> Tensor:
    q, k, v, batch, cache = inputs
    wide = LayerCache(cache.k.double(), cache.v.double())
    return REFERENCE.attention(q.double(), k.double(), v.double(), batch, wide, window)


def ours(inputs: Made, window: int | None, **sizes: int) -> Tensor:
    """With tiles of these sizes. New keys and values are written to a copy of the cache."""
    from lorikeet.kernels.gpu_attention import AttentionWork, Tuning, attention, tuning_of
    from lorikeet.kernels.gpu_rows import store

    q, k, v, batch, cache = inputs
    cache = clone(cache)
    assert batch.cache_slot is not None
    with poisoned_memory():
        store(k, v, cache, batch.cache_slot)
        tuning = Tuning(**sizes) if sizes else tuning_of(q)
        work = AttentionWork(batch, (q.shape[1], k.shape[1], q.shape[2]), window, tuning)
        return attention(q, k, v, work, cache)


SMALL = {"short_keys": 16, "piece_keys": 16, "long_rows": 64, "long_keys": 32}  # many pieces and tiles of few keys


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(2, 2, 64), (4, 1, 128), (14, 2, 64)])
@pytest.mark.parametrize("window", [None, 9])
def test_a_mixed_batch(
    device: str, draw: torch.Generator, dtype: torch.dtype, heads: tuple[int, int, int], window: int | None
) -> None:
    inputs = made(MIXED, heads, dtype, draw, device)
    assert_near(ours(inputs, window, **SMALL), reference(inputs, window), dtype)


@pytest.mark.parametrize("lengths", [[1], [17, 3, 130, 1, 64]])
@pytest.mark.parametrize("heads", [(4, 1, 64), (7, 1, 80), (20, 1, 32)])  # 20 heads: more rows than a short tile
def test_decode(device: str, draw: torch.Generator, lengths: list[int], heads: tuple[int, int, int]) -> None:
    inputs = made([(1, length) for length in lengths], heads, torch.float32, draw, device)
    assert_near(ours(inputs, None, **SMALL), reference(inputs, None), torch.float32)


@pytest.mark.parametrize("sequences", [[(50, 50)], [(33, 130), (17, 17)]])
@pytest.mark.parametrize("window", [None, 1, 40])
def test_prefill(device: str, draw: torch.Generator, sequences: list[tuple[int, int]], window: int | None) -> None:
    inputs = made(sequences, (8, 2, 64), torch.float32, draw, device)
    assert_near(ours(inputs, window, **SMALL), reference(inputs, window), torch.float32)


def test_the_sizes_that_are_used(device: str, draw: torch.Generator) -> None:
    inputs = made([(1, 300), (50, 90)], (4, 1, 64), torch.bfloat16, draw, device)
    assert_near(ours(inputs, None), reference(inputs, None), torch.bfloat16)


def test_without_a_cache(device: str, draw: torch.Generator) -> None:
    from lorikeet.kernels.gpu import GpuOps

    q, k, v, batch, _ = made([(1, 1), (40, 40), (3, 3)], (4, 2, 64), torch.float32, draw, device)
    batch = dataclasses.replace(batch, block_table=None, cache_slot=None)
    with poisoned_memory():
        found = GpuOps().attention(q, k, v, batch, None, 11)
    assert_near(found, REFERENCE.attention(q.double(), k.double(), v.double(), batch, None, 11), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_cache_write_and_attention(device: str, draw: torch.Generator, dtype: torch.dtype) -> None:
    """As the decoder calls them, layer after layer; one layer has a window."""
    from lorikeet.kernels.gpu import GpuOps

    ops = GpuOps()
    q, k, v, batch, cache = made([(1, 30), (20, 50)], (4, 1, 64), dtype, draw, device)
    cos, sin = torch.randn(2, len(q), 32, generator=draw).to(device)
    assert batch.cache_slot is not None
    turned = REFERENCE.rope(k.double(), cos.double(), sin.double())
    for window in (None, 7):
        written = clone(cache)
        with poisoned_memory():
            found = ops.attend(q, k, v, cos, sin, batch, written, window)
        new = written.k.view(-1, *k.shape[1:])[batch.cache_slot]
        assert_near(new, turned, dtype)
        wide = LayerCache(cache.k.double(), cache.v.double())
        wanted = REFERENCE.attention(ops.rope(q, cos, sin).double(), new.double(), v.double(), batch, wide, window)
        assert_near(found, wanted, dtype)


def test_the_same_buffers_serve_other_lengths(device: str, draw: torch.Generator) -> None:
    """As a captured graph does: capacities stay, what lies in the buffers changes, rows are filled up."""
    from lorikeet.kernels.gpu import GpuOps

    ops = GpuOps()
    q, k, v, batch, cache = made([(1, 150)] * 4, (4, 2, 64), torch.float32, draw, device)
    table = torch.zeros(4, 4, device=device)
    assert batch.block_table is not None and batch.cache_slot is not None
    everything = [batch.query_start.clone(), batch.kv_len.clone(), batch.cache_slot.clone()]
    for lengths in ([150, 150, 150, 150], [3, 90], [64, 1, 17]):
        count = len(lengths)
        for buffer, values in zip((batch.query_start, batch.kv_len, batch.cache_slot), everything, strict=True):
            buffer.copy_(values)
        batch.kv_len[:count] = torch.tensor(lengths, dtype=torch.int32)
        batch.kv_len[count:] = 0
        at = torch.tensor(lengths, device=device) - 1
        blocks = batch.block_table[:count].gather(1, at.unsqueeze(1) // 16).squeeze(1)
        batch.cache_slot[:count] = blocks.long() * 16 + at % 16
        batch.cache_slot[count:] = -1
        ops.embed(DenseWeight(table), torch.zeros(1, dtype=torch.int64, device=device))  # a forward pass begins
        written = clone(cache)
        with poisoned_memory():
            found = ops.attention(q, k, v, batch, written, None)
        part = Batch(
            batch.tokens[:count], batch.positions[:count], batch.query_start[: count + 1], batch.kv_len[:count], 1,
            150, batch.block_table[:count], batch.cache_slot[:count],
        )  # fmt: skip
        wanted = reference((q[:count], k[:count], v[:count], part, cache), None)
        assert_near(found[:count], wanted, torch.float32)
        assert not found[count:].any(), "rows that only fill up are zeros"
        untouched = torch.ones_like(cache.k, dtype=torch.bool)
        untouched.view(-1, *k.shape[1:])[batch.cache_slot[:count]] = False
        assert torch.equal(written.k[untouched].nan_to_num(7), cache.k[untouched].nan_to_num(7))


def test_sequences_without_queries_are_skipped(device: str, draw: torch.Generator) -> None:
    inputs = made([(1, 40), (6, 20), (1, 9)], (2, 1, 64), torch.float32, draw, device)
    q, k, v, batch, cache = inputs
    wanted = reference(inputs, None)
    assert batch.block_table is not None
    padded = dataclasses.replace(
        batch,
        query_start=torch.cat((batch.query_start, batch.query_start[-1:].expand(3))),
        kv_len=torch.cat((batch.kv_len, torch.tensor([0, 7, 0], dtype=torch.int32, device=device))),
        block_table=torch.cat((batch.block_table, batch.block_table)),
    )
    assert_near(ours((q, k, v, padded, cache), None, **SMALL), wanted, torch.float32)


@pytest.mark.filterwarnings("ignore:All-NaN")  # the interpreter's maximum
def test_a_poisoned_sequence_stays_alone(device: str, draw: torch.Generator) -> None:
    inputs = made([(1, 20), (30, 45), (1, 7)], (4, 1, 64), torch.float32, draw, device)
    clean = ours(inputs, None, **SMALL)
    _, _, _, batch, cache = inputs
    assert batch.block_table is not None
    own = batch.block_table[1, :3].long()
    cache.k[own] = float("nan")
    cache.v[own] = float("nan")
    found = ours(inputs, None, **SMALL)
    assert found[1:31].isnan().all()
    assert torch.equal(found[[0, 31]], clean[[0, 31]])


def test_blocks_behind_the_window_are_not_read(device: str, draw: torch.Generator) -> None:
    inputs = made([(1, 100), (40, 150)], (2, 1, 64), torch.float32, draw, device)
    clean = ours(inputs, 20, **SMALL)
    _, _, _, batch, cache = inputs
    assert batch.block_table is not None
    for side in (cache.k, cache.v):
        side[batch.block_table[0, :5].long()] = float("nan")  # keys 0 to 79 of 100
        side[batch.block_table[1, :5].long()] = float("nan")  # query 110 sees the keys from 91
    assert torch.equal(ours(inputs, 20, **SMALL), clean)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 13])
def test_fp8_cache(device: str, draw: torch.Generator, dtype: torch.dtype, window: int | None) -> None:
    """Against float64 over what the cache holds, so reading it costs no more than the dtype's own error. (What writing
    costs is in `test_gpu_rows`: a sixteenth of a value, and with values of one size as much of the result.)"""
    from lorikeet.kernels.gpu_attention import AttentionWork, Tuning, attention
    from lorikeet.kernels.gpu_rows import FP8

    heads = (4, 2, 64)
    q, k, v, batch, cache = made([(1, 70), (20, 50), (1, 5)], heads, dtype, draw, device)
    assert batch.cache_slot is not None
    cache.k.view(-1, *k.shape[1:])[batch.cache_slot] = k
    cache.v.view(-1, *v.shape[1:])[batch.cache_slot] = v
    k_scale, v_scale = torch.rand(2, heads[1], generator=draw).to(device) / 8 + 0.01
    held = LayerCache(
        (cache.k.float() / k_scale[:, None]).to(FP8), (cache.v.float() / v_scale[:, None]).to(FP8), k_scale, v_scale
    )
    meant = LayerCache(held.k.double() * k_scale[:, None], held.v.double() * v_scale[:, None])
    with poisoned_memory():
        found = attention(q, k, v, AttentionWork(batch, heads, window, Tuning(**SMALL)), held)
    new_k, new_v = (side.view(-1, *k.shape[1:])[batch.cache_slot] for side in (meant.k, meant.v))
    assert_near(found, REFERENCE.attention(q.double(), new_k, new_v, batch, meant, window), dtype)


def test_the_reference_knows_fp8(device: str, draw: torch.Generator) -> None:
    """Keys and values lose at most a sixteenth of themselves, so attention over them about as much."""
    from lorikeet.kernels.gpu_rows import FP8

    inputs = made([(1, 40), (9, 20)], (4, 2, 64), torch.float32, draw, device)
    q, k, v, batch, cache = inputs
    scale = torch.full((2,), 0.05, device=device)
    held = LayerCache((cache.k / 0.05).to(FP8), (cache.v / 0.05).to(FP8), scale, scale)
    found, wanted = REFERENCE.attention(q, k, v, batch, held, None), reference(inputs, None)
    assert (found.double() - wanted).norm() / wanted.norm() < 1 / 16


def test_what_the_kernels_cannot_read_is_refused(device: str, draw: torch.Generator) -> None:
    from lorikeet.kernels.gpu_attention import AttentionWork, Tuning, attention

    q, k, v, batch, cache = made([(1, 4)], (2, 1, 64), torch.float32, draw, device)
    with pytest.raises(ValueError, match=r"kv_len is torch.int64"):
        AttentionWork(dataclasses.replace(batch, kv_len=batch.kv_len.long()), (2, 1, 64), None, Tuning())
    work = AttentionWork(batch, (2, 1, 64), None, Tuning())
    with pytest.raises(ValueError, match="without a cache"):
        attention(
            q, k, v, AttentionWork(dataclasses.replace(batch, block_table=None), (2, 1, 64), None, Tuning()), cache
        )
    with pytest.raises(ValueError, match=r"cache.k is torch.bfloat16, expected torch.float32"):
        attention(q, k, v, work, LayerCache(cache.k.bfloat16(), cache.v.bfloat16()))
    with pytest.raises(ValueError, match=r"listed for .*\(2, 1, 64\).* found \(1, 1, 64\)"):
        attention(q[:, :1], k, v, work, cache)


LLAMA = (32, 8, 128)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 1000])
@pytest.mark.parametrize("heads", [LLAMA, (28, 4, 128), (16, 16, 64)])
@pytest.mark.parametrize(
    "sequences", [[(1, 8000)], [(1, n) for n in range(1, 4000, 63)], [(1, 700), (900, 900), (513, 3000), (2, 90)]]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_real_shapes(
    device: str, draw: torch.Generator, dtype: torch.dtype, sequences: list[tuple[int, int]],
    heads: tuple[int, int, int], window: int | None,
) -> None:  # fmt: skip
    inputs = made(sequences, heads, dtype, draw, device)
    assert_near(ours(inputs, window), reference(inputs, window), dtype)


@pytest.mark.gpu
def test_a_captured_graph_serves_other_lengths(device: str, draw: torch.Generator) -> None:
    from lorikeet.kernels.gpu import GpuOps

    ops, rows = GpuOps(), 8
    q, k, v, batch, cache = made([(1, 2000)] * rows, LLAMA, torch.bfloat16, draw, device)
    assert batch.cache_slot is not None and batch.block_table is not None
    table, token = torch.zeros(4, 4, device=device), torch.zeros(1, dtype=torch.int64, device=device)

    def step() -> Tensor:
        ops.embed(DenseWeight(table), token)
        return ops.attention(q, k, v, batch, cache, None)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for length in (2000, 1, 777, 1500):
        batch.kv_len.fill_(length)
        batch.cache_slot.copy_(batch.block_table[:, (length - 1) // 16].long() * 16 + (length - 1) % 16)
        graph.replay()
        assert_near(found, reference((q, k, v, batch, cache), None), torch.bfloat16)
