"""Decode steps out of static, padded buffers give the same logits, whatever is in the batch.

What is left to a device is to capture them: here a replay is the step itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.host_graphs import HostSegments, again

from lorikeet.kernels.batch import Batch, LayerCache, Segments, Slab
from lorikeet.kernels.gpu_graphs import RANKS, CudaCapture, DecodeGraphs, StaticBatch
from lorikeet.kernels.reference import Forward, ReferenceOps

Tensor = torch.Tensor


class GraphedOps(ReferenceOps):
    """Runs each batch both ways and compares."""

    spare_blocks = 1

    def __init__(self) -> None:
        self.kinds: Counter[Any] = Counter()

    def prepare(self, forward: Forward, slab: Slab, cache: Sequence[LayerCache], rows: int) -> Any:
        for layer in cache:
            layer.k.fill_(torch.nan)
            layer.v.fill_(torch.nan)
        one_by_one = super().prepare(forward, slab, cache, rows)
        graphs = DecodeGraphs(one_by_one, slab, cache, rows, again, HostSegments)

        def step(batch: Batch) -> Tensor:
            kind = graphs.kind(batch)
            self.kinds[kind] += 1
            logits = graphs(batch)
            torch.testing.assert_close(logits, one_by_one(batch), atol=1e-4, rtol=1e-4)
            assert torch.isfinite(logits).all()
            return logits

        return step


@settings(max_examples=8, deadline=None)
@given(
    asked=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 30), st.integers(1, 14)), min_size=1, max_size=9),
    max_seqs=st.integers(1, 8),
)
def test_padded_is_plain(world: Any, asked: list[tuple[int, int, int]], max_seqs: int) -> None:
    """Random mixes of adapters and the base, sequences that come and go, every number of them."""
    infos = [world.adapter(1, 2), world.adapter(2, 5, ("k", "up")), world.adapter(3, 1, scaled=True)]
    infos.append(world.adapter(4, 2, invocation=(60,)))
    digests = [None, *(info.digest for info in infos)]
    ops = GraphedOps()
    engine = world.engine(infos, ops=ops, max_seqs=max_seqs, blocks=128, prefix_cache=False)
    requests = [
        world.request(f"{i}", [60, *world.prompt(i, length)], digests[which], max_tokens=count, ignore_eos=True)
        for i, (which, length, count) in enumerate(asked)
    ]
    answers = world.run(engine, requests)
    assert all(answers[one.request_id].finish == "length" for one in requests)


def test_which_steps_are_graphs(world: Any) -> None:
    infos = [world.adapter(1), world.adapter(3, 1, scaled=True), world.adapter(5, 2, overrides=True)]
    ops = GraphedOps()
    engine = world.engine(infos, ops=ops)
    plain = [world.request(f"p{i}", [5, 6, 7], None, max_tokens=4, ignore_eos=True) for i in range(3)]
    world.run(engine, plain)
    assert {kind for kind in ops.kinds if kind} == {(4, 0, False)} and ops.kinds[None] >= 1
    ops.kinds.clear()
    mixed = [
        world.request(f"m{i}", [5, 6, 7], info.digest, max_tokens=4, ignore_eos=True) for i, info in enumerate(infos)
    ]
    world.run(engine, mixed[:1])
    assert {kind for kind in ops.kinds if kind} == {(1, RANKS[0], False)}
    ops.kinds.clear()
    world.run(engine, mixed[:2])
    assert (2, RANKS[0], True) in ops.kinds
    ops.kinds.clear()
    world.run(engine, mixed[2:])
    assert set(ops.kinds) == {None}, "what replaces a part of the base runs kernel by kernel"


def test_each_graph_is_made_once(world: Any) -> None:
    made = []

    def counting(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        made.append(step)
        return again(step)

    class Counted(ReferenceOps):
        spare_blocks = 1

        def prepare(self, forward: Forward, slab: Slab, cache: Sequence[LayerCache], rows: int) -> Any:
            return DecodeGraphs(super().prepare(forward, slab, cache, rows), slab, cache, rows, counting, HostSegments)

    infos = [world.adapter(i, 2) for i in range(20)]
    engine = world.engine(infos, ops=Counted(), max_seqs=4, slab_bytes=6 * infos[0].nbytes)
    requests = [world.request(f"{i}", [4, i + 1], x.digest, max_tokens=3) for i, x in enumerate(infos)]
    answers = world.run(engine, requests)
    assert len(made) <= 3, "a new mix of adapters needs no new graph"
    for i in (0, 7, 19):
        assert answers[f"{i}"].tokens == world.greedy([4, i + 1], 3, infos[i].digest)


def test_what_was_filled_and_is_not_becomes_padding() -> None:
    cache = [LayerCache(torch.zeros(9, 4, 1, 2), torch.zeros(9, 4, 1, 2))]
    static = StaticBatch(8, cache)

    def batch(count: int) -> Batch:
        long = torch.arange(1, count + 1)
        return Batch(
            tokens=long, positions=long + 1, query_start=torch.arange(count + 1, dtype=torch.int32),
            kv_len=long.int() + 2, max_query=1, max_kv=12, block_table=torch.ones(count, 3, dtype=torch.int32),
            cache_slot=long + 3,
        )  # fmt: skip

    fresh = StaticBatch(8, cache)
    static.fill(batch(7))
    static.fill(batch(2))
    fresh.fill(batch(2))
    for name in ("tokens", "positions", "cache_slot", "kv_len"):
        assert torch.equal(getattr(static, name), getattr(fresh, name)), name
    assert torch.equal(static.block_table[:, 0], fresh.block_table[:, 0])
    assert static.view(8, None, False).cache_slot[2:].eq(8 * 4).all()


def test_a_rank_beyond_all_graphs_runs_kernel_by_kernel() -> None:
    slab = Slab(torch.zeros(1), torch.zeros(1, 1, 5, dtype=torch.int64), torch.zeros(1, 1))
    cache = [LayerCache(torch.zeros(3, 4, 1, 2), torch.zeros(3, 4, 1, 2))]
    graphs = DecodeGraphs(lambda batch: torch.zeros(1, 1), slab, cache, 4, again, HostSegments)
    one = torch.zeros(1, dtype=torch.int64)
    batch = Batch(
        tokens=one, positions=one, query_start=torch.tensor([0, 1]), kv_len=one.int() + 1, max_query=1, max_kv=1,
        block_table=one.int().view(1, 1), cache_slot=one, token_segments=Segments(one, [0, 1], [0], True),
    )  # fmt: skip
    for rank, expected in ((0, RANKS[0]), (RANKS[0], RANKS[0]), (RANKS[0] + 1, RANKS[1]), (RANKS[-1] + 1, None)):
        slab.table[0, 0, 4] = rank
        kind = graphs.kind(batch)
        assert (kind and kind.rank) == expected


def test_the_kernels_of_a_gpu_read_static_tables(world: Any, device: str) -> None:
    """The very kernels and tables that a graph is captured with, other adapters in each step."""
    if device != "cpu":
        pytest.skip("the tiny base lies on the CPU")
    from lorikeet.kernels.gpu import GpuOps

    kinds = []

    class Graphed(GpuOps):
        def prepare(self, forward: Forward, slab: Slab, cache: Sequence[LayerCache], rows: int) -> Any:
            graphs = DecodeGraphs(super().prepare(forward, slab, cache, rows), slab, cache, rows, again)

            def step(batch: Batch) -> Tensor:
                kinds.append(graphs.kind(batch))
                return graphs(batch)

            return step

    infos = [world.adapter(31, 3), world.adapter(33, 5, ("q", "up"), scaled=True)]
    digests = [infos[0].digest, None, infos[1].digest]
    requests = [world.request(f"{i}", [5, 6 + i], digest, max_tokens=4 - i) for i, digest in enumerate(digests)]
    answers = world.run(world.engine(infos, ops=Graphed()), requests)
    for request in requests:
        expected = world.greedy(request.tokens, request.sampling.max_tokens, request.adapter)
        assert answers[request.request_id].tokens == expected
    assert {kind.scaled for kind in kinds if kind} == {True, False}


# --- captured by CUDA ---------------------------------------------------------------------------------------------


class Cuda:
    """What `CudaCapture` says to torch.cuda, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        said = self.log

        class Stream:
            def wait_stream(self, other: Any) -> None:
                said.append("wait")

        class CUDAGraph:
            def pool(self) -> str:
                return "pool"

            def replay(self) -> None:
                said.append("replay")

            def reset(self) -> None:
                said.append("reset")

        @contextmanager
        def graph(graph: Any, pool: Any, capture_error_mode: str) -> Iterator[None]:
            said.append(f"begin {pool} {capture_error_mode}")
            yield
            said.append("end")

        monkeypatch.setattr(torch.cuda, "current_stream", Stream)
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        monkeypatch.setattr(torch.cuda, "CUDAGraph", CUDAGraph)
        monkeypatch.setattr(torch.cuda, "graph", graph)


def test_what_is_captured_was_run_before_and_is_destroyed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, capture = Cuda(monkeypatch), CudaCapture()

    def step() -> Tensor:
        cuda.log.append("step")
        return torch.zeros(1)

    held = [capture(step) for _ in range(2)]
    begun = ["begin None thread_local", "begin pool thread_local"]
    assert cuda.log == [said for one in begun for said in ("wait", "step", "step", "wait", one, "step", "end")]
    cuda.log.clear()
    held[0][0]()
    capture.destroy()
    capture.destroy()
    assert cuda.log == ["replay", "reset", "reset"]


def test_graphs_of_ranks_are_destroyed_before_they_part(device: str) -> None:
    """A slab that says it is on a GPU, and all else on the CPU."""
    if device != "cpu":
        pytest.skip("the tiny slab lies on the CPU")
    from lorikeet.kernels.gpu import GpuOps

    cache = [LayerCache(torch.zeros(3, 4, 1, 2), torch.zeros(3, 4, 1, 2))]
    slab: Any = SimpleNamespace(data=SimpleNamespace(is_cuda=True))
    destroys: list[Any] = []
    ops = GpuOps()
    ops.prepare(lambda *_: torch.zeros(1, 1), slab, cache, 4)
    ops.ranks = SimpleNamespace(before_leaving=destroys.append)  # type: ignore[assignment]
    graphs: Any = ops.prepare(lambda *_: torch.zeros(1, 1), slab, cache, 4)
    assert destroys == [graphs._capture.destroy]
