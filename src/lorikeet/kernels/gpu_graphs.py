"""Decode steps as CUDA graphs: launching hundreds of kernels costs the host more than they take on the device.

A graph is captured once for each padded number of sequences and serves any mix of adapters: what differs between steps
lies in buffers that it reads anew (`StaticBatch`, `gpu_tables.DeviceSegments`). Prompts, mixed steps, and adapters that
put something in place of a part of the base run kernel by kernel.

Where several processes hold the model, their sums are part of the graphs. Then all ranks must capture the same graphs
in the same steps and replay them together (NVIDIA, "Using NCCL with CUDA Graphs"). They do without a word, because
`DecodeGraphs.kind` depends on nothing but what all of them have in common: plans, in the order in which the leader made
them, and the headers of the adapters that a plan's sequences use. Those are in every rank's slab by then: an adapter
counts as resident once all ranks have said that they have it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lorikeet.kernels.batch import Batch, LayerCache, Segments, Slab
from lorikeet.kernels.gpu_tables import DeviceSegments, highest_rank

log = logging.getLogger(__name__)

LARGEST = 512  # sequences of a captured step
RANKS = (16, 64, 512)  # up to which a graph is captured: its launches are as large as it may need them

Step = Callable[[Batch], Tensor]
Replay = Callable[[], None]
Capture = Callable[[Callable[[], Tensor]], tuple[Replay, Tensor]]


class StaticSegments(Protocol):
    """Segments whose buffers stay where they are; `DeviceSegments` is one."""

    def segments(self) -> Segments: ...
    def fill(self, segments: Segments | None) -> None: ...


MakeSegments = Callable[[Slab, int, int], StaticSegments]  # slab, rows, highest rank


class StaticBatch:
    """Decode batches of up to `rows` sequences in tensors that stay where they are.

    What is not filled is padding: sequences of one token, whose keys and values are in the last block of the cache.
    """

    def __init__(self, rows: int, cache: Sequence[LayerCache]) -> None:
        blocks, self._block_size = cache[0].k.shape[:2]
        self._spare = blocks - 1
        self._filled = 0

        def buffer(*shape: int, dtype: torch.dtype = torch.int64, value: int = 0) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=cache[0].k.device)

        self.tokens, self.positions = buffer(rows), buffer(rows)
        self.cache_slot = buffer(rows, value=self._spare * self._block_size)
        self.kv_len = buffer(rows, dtype=torch.int32, value=1)
        self.block_table = buffer(rows, blocks, dtype=torch.int32, value=self._spare)
        self._query_start = torch.arange(rows + 1, dtype=torch.int32, device=cache[0].k.device)

    def fill(self, batch: Batch) -> None:
        """Take over a decode batch. In the order of the current stream, which does not wait for the host."""
        assert batch.block_table is not None and batch.cache_slot is not None
        count, width = batch.block_table.shape
        own = (self.tokens, self.positions, self.cache_slot, self.kv_len)
        theirs = (batch.tokens, batch.positions, batch.cache_slot, batch.kv_len)
        torch._foreach_copy_([part[:count] for part in own], list(theirs), non_blocking=True)
        self.block_table[:count, :width].copy_(batch.block_table, non_blocking=True)
        if count < self._filled:
            left = slice(count, self._filled)
            self.tokens[left] = 0
            self.positions[left] = 0
            self.cache_slot[left] = self._spare * self._block_size
            self.kv_len[left] = 1
            self.block_table[left, 0] = self._spare  # of a sequence of one token nothing else is read
        self._filled = count

    def view(self, rows: int, segments: Segments | None, scaled: bool) -> Batch:
        """The first `rows` sequences, padding among them. Logits are those of every row."""
        return Batch(
            tokens=self.tokens[:rows],
            positions=self.positions[:rows],
            query_start=self._query_start[: rows + 1],
            kv_len=self.kv_len[:rows],
            max_query=1,
            max_kv=self.block_table.shape[1] * self._block_size,
            block_table=self.block_table[:rows],
            cache_slot=self.cache_slot[:rows],
            token_segments=segments,
            logit_rows=None,
            scaled=scaled,
        )


class Kind(NamedTuple):
    """What a graph is captured for: padded rows, and adapters up to which rank (0: none), with gains or shifts."""

    rows: int
    rank: int
    scaled: bool


class _Graph(NamedTuple):
    replay: Replay
    logits: Tensor
    segments: StaticSegments | None


class DecodeGraphs:
    """Carries out decode steps of up to `rows` sequences by graphs, all others by `step`.

    `capture` makes a graph of a step (see `capture_cuda`).
    """

    def __init__(
        self, step: Step, slab: Slab, cache: Sequence[LayerCache], rows: int, capture: Capture,
        make_segments: MakeSegments = DeviceSegments.for_decode,
    ) -> None:  # fmt: skip
        self._step, self._slab, self._capture, self._make_segments = step, slab, capture, make_segments
        self._largest = min(rows, LARGEST)
        self._static = StaticBatch(self._padded(self._largest), cache)
        self._graphs: dict[Kind, _Graph] = {}

    def __call__(self, batch: Batch) -> Tensor:
        """Logits [L, vocabulary] of the batch's `logit_rows`, good until the next call."""
        kind = self.kind(batch)
        if kind is None:
            return self._step(batch)
        self._slab.wait(None)  # a graph waits for nothing
        self._static.fill(batch)
        graph = self._graphs.get(kind)
        segments = graph.segments if graph is not None else self._segments(kind)
        if segments is not None:
            segments.fill(batch.token_segments)
        if graph is None:
            graph = self._graphs[kind] = self._make(kind, segments)
        graph.replay()
        count = len(batch.tokens)
        if batch.logit_rows is None or len(batch.logit_rows) == count:
            return graph.logits[:count]
        return graph.logits[batch.logit_rows]

    def kind(self, batch: Batch) -> Kind | None:
        """Which graph is for a batch; None: it runs kernel by kernel."""
        rows = len(batch.tokens)
        if batch.max_query != 1 or batch.overridden or not 0 < rows <= self._largest or batch.cache_slot is None:
            return None
        if batch.token_segments is None:
            return Kind(self._padded(rows), 0, False)
        highest = highest_rank(self._slab, batch.token_segments.adapter)
        rank = next((rank for rank in RANKS if highest <= rank), None)
        return None if rank is None else Kind(self._padded(rows), rank, batch.scaled)

    @staticmethod
    def _padded(rows: int) -> int:
        """The next power of two."""
        return 1 << (rows - 1).bit_length()

    def _segments(self, kind: Kind) -> StaticSegments | None:
        return self._make_segments(self._slab, kind.rows, kind.rank) if kind.rank else None

    def _make(self, kind: Kind, segments: StaticSegments | None) -> _Graph:
        """Capture the step that the buffers hold now: running it more than once changes nothing."""

        def step() -> Tensor:  # on a new batch each time: what kernels prepare once a batch is part of the graph
            own = None if segments is None else segments.segments()
            return self._step(self._static.view(kind.rows, own, kind.scaled))

        replay, logits = self._capture(step)
        log.debug("captured a decode step: %s", kind)
        return _Graph(replay, logits, segments)


class CudaCapture:
    """Captures steps into CUDA graphs that share their memory: only one of them runs at a time."""

    def __init__(self) -> None:
        self._pool: Any = None  # what torch calls it differs from version to version
        self._graphs: list[torch.cuda.CUDAGraph] = []

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        """Run `step` twice, so that its kernels are compiled and libraries have what they need, then capture it."""
        current, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            for _ in range(2):
                step()
        current.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Other threads may read adapters into memory that is pinned already, or ask whether sums are done (NCCL's
        # watchdog): nothing that a capture forbids. It begins when the device is done, sums of all ranks included.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = step()
        self._pool = graph.pool()
        self._graphs.append(graph)
        return graph.replay, logits

    def destroy(self) -> None:
        """Destroy all graphs that were captured, whoever still holds them: a replay after this raises."""
        while self._graphs:
            self._graphs.pop().reset()
