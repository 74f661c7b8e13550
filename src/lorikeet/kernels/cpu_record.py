"""Recording a forward pass: the decoder runs once on empty tensors, and what it asks for becomes a program.

A step of many small kernels is bounded by what launching them costs. So the decoder, written in kernels as it is, is
run once by a `Recorder`, whose kernels compute nothing: they choose where their results will be and write down what
to do. `Program` carries that out in one launch, whatever the number of rows.

What few adapters do is no part of it: tables and norms of their own, pairs on embedding and head, interventions on the
residual stream. The recorder notes the places where they may, and a step that has such adapters makes a pause at the
places where one of them does: what they do there is left to the kernels, for their rows.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorikeet.kernels.batch import Batch, LayerCache, Segments, Slab
from lorikeet.kernels.cpu_attention import EVERYTHING, BatchArguments
from lorikeet.kernels.cpu_lowrank import SegmentArrays, SiteArray
from lorikeet.kernels.cpu_products import AVAILABLE, STEP, STORED
from lorikeet.kernels.cpu_program import BY_ROW_LAST, TURN, WIDTH, Code, Field, program_kernel
from lorikeet.kernels.cpu_rows import check_rows
from lorikeet.kernels.cpu_runtime import TAGS
from lorikeet.kernels.cpu_team import team
from lorikeet.kernels.cpu_tiles import TILE
from lorikeet.kernels.reference import Forward, ReferenceOps
from lorikeet.kernels.weight import DenseWeight, Panels, Table, Weight
from lorikeet.types import Site, SiteGroup

Show = Callable[[int], Tensor]  # the first so many rows of a result


@dataclass(frozen=True, slots=True)
class Pause:
    """A place in a program, after `at` operations, where adapters may have more to do than these.

    They do where they put something in place of the base's `role` in `layer`, or where they act on `site`.
    `work` is given the kernels, the batch, and of the rows that the place is about their segments and their number.
    """

    at: int
    kind: Field
    role: str
    layer: int | None
    site: Site | None
    work: Callable[[ReferenceOps, Batch, Segments, int], None]


class NotRecordable(Exception):
    """The forward pass needs a kernel that programs have not; it says which."""


class Buffers:
    """Memory of the results, taken again once no tensor shows it.

    Kept apart by shape and dtype: operations that divide the rows among the threads in the same way do not meet, and
    then a thread may still read a row of one result while another writes a row of the next.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._held: dict[tuple[int, torch.dtype], list[Any]] = {}

    def take(self, width: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor [rows, width]."""
        arrays = self._held.setdefault((width, dtype), [])
        for array in arrays:
            if sys.getrefcount(array) == 3:  # the list's, the loop's and the call's own; a tensor's storage holds one
                break
        else:
            array = np.empty(self.rows * width * dtype.itemsize, np.uint8)
            arrays.append(array)
        return self._shown(array, width, dtype)

    def later(self, tensor: Tensor) -> Show:
        """How to look at a result [rows, width] once the program runs. It does not keep its memory from being taken
        again, by what comes after the place where it is looked at."""
        width, dtype = tensor.shape[1], tensor.dtype
        arrays, address = self._held[width, dtype], tensor.data_ptr()
        index = [array.ctypes.data for array in arrays].index(address)
        return lambda rows: self._shown(arrays[index], width, dtype)[:rows]

    def _shown(self, array: Any, width: int, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(array).view(dtype).view(self.rows, width)


class Recorder:
    """The kernels of a forward pass that is recorded: each gives a tensor of `rows` rows and notes what to do."""

    inplace = True

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.rows = batch.tokens.shape[0]
        self.operations: list[list[int]] = []
        self.numbers: list[float] = []
        self.kept: list[Any] = []  # whose addresses are in the program
        self.stored: set[torch.dtype] = set()
        self.pauses: list[Pause] = []
        self.head: tuple[Show, Site] | None = None  # what the head reads, for the adapters that act on it
        self.tokens = 0  # of the base's embedding
        self._buffers = Buffers(self.rows)
        self.kept.append(self._buffers)
        self._kind = Field.TOKEN_ROWS

    def _note(self, code: Code, *arguments: int, number: float = 0.0) -> None:
        row = [int(code), int(self._kind), 1, *arguments]
        self.operations.append(row + [0] * (WIDTH - len(row)))
        self.numbers.append(number)

    def _result(self, width: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return self._buffers.take(width, dtype)

    def take(self, table: Tensor, index: Tensor) -> Tensor:
        """Rows of a table, or of a result. Once the wanted rows are taken, all that follows is of these."""
        fields = {
            id(self.batch.tokens): Field.TOKENS,
            id(self.batch.positions): Field.POSITIONS,
            id(self.batch.logit_rows): Field.WANTED,
        }
        field = fields[id(index)]
        if field is Field.WANTED:
            self._kind = Field.LOGIT_ROWS
        check_rows("take", table)
        out, width = self._result(table.shape[1], table.dtype), table.element_size()
        self.kept.append(table)
        self._note(Code.TAKE, field, table.data_ptr(), table.stride(0) * width, table.shape[1] * width, out.data_ptr())
        return out

    def embed(self, table: Table, tokens: Tensor) -> Tensor:
        """Of the batch's tokens; `Program` sees to it that the table has a row for each."""
        self.tokens, d = table.shape
        if isinstance(table, DenseWeight):
            return self.take(table.weight, self.batch.tokens)
        stored, scale, _ = self._panels(table)
        out = self._result(d)
        self._note(Code.TAKE_PANELS, Field.TOKENS, stored.data_ptr(), stored.shape[1], scale.data_ptr(), out.data_ptr())
        return out

    def _pause(
        self,
        role: str,
        layer: int | None,
        site: Site | None,
        work: Callable[[ReferenceOps, Batch, Segments, int], None],
    ) -> None:
        self.pauses.append(Pause(len(self.operations), self._kind, role, layer, site, work))

    def adapt_embedding(self, x: Tensor, tokens: Tensor, adapters: Any, site: Site, segments: Segments) -> Tensor:
        show = self._buffers.later(x)

        def work(ops: ReferenceOps, batch: Batch, segments: Segments, rows: int) -> None:
            ops.adapt_embedding(show(rows), batch.tokens, adapters, site, segments)

        self._pause("embed", None, site, work)
        return x

    def adapt_norm(
        self, h: Tensor, residual: Tensor, adapters: Any, role: str, layer: int | None, segments: Segments, eps: float
    ) -> Tensor:
        normed, stream = self._buffers.later(h), self._buffers.later(residual)

        def work(ops: ReferenceOps, batch: Batch, segments: Segments, rows: int) -> None:
            ops.adapt_norm(normed(rows), stream(rows), adapters, role, layer, segments, eps)

        self._pause(role, layer, None, work)
        return h

    def adapt_residual(
        self, x: Tensor, residual: Tensor, adapters: Any, site: Site, segments: Segments
    ) -> tuple[Tensor, Tensor | None]:
        """What is added to the stream, to the one of its parts that is new; no adapter multiplies the stream."""
        new, old, group = self._buffers.later(x), self._buffers.later(residual), SiteGroup((site,), (0,))

        def work(ops: ReferenceOps, batch: Batch, segments: Segments, rows: int) -> None:
            x, stream = new(rows), new(rows) + old(rows)
            ops.output_scale(ops.lowrank_add(x, stream, adapters, group, segments), adapters, group, segments)

        self._pause("residual", site.layer, site, work)
        return x, residual

    def adapt_logits(self, logits: Tensor, x: Tensor, adapters: Any, site: Site, segments: Segments) -> Tensor:
        self.head = (self._buffers.later(x), site)
        return logits

    def reduce(self, x: Tensor) -> Tensor:
        return x

    def gather(self, logits: Tensor, tokens: int) -> Tensor:
        return logits

    def linear(self, weight: Weight, x: Tensor) -> Tensor:
        out = self._result(weight.shape[0])
        self._note(Code.LINEAR, *self._product(weight, x), out.data_ptr(), out.stride(0) * 2)
        return out

    def _product(self, weight: Weight, x: Tensor) -> tuple[int, ...]:
        stored, scale, shift = self._panels(weight)
        count, pairs, _, _ = stored.shape
        return (
            x.data_ptr(), x.stride(0) * 2, stored.data_ptr(), pairs, count, scale.data_ptr(), shift.data_ptr(),
        )  # fmt: skip

    def _panels(self, weight: Weight) -> Panels:
        panels: Panels | None = getattr(weight, "panels", None)
        if panels is None:
            raise NotRecordable(f"a weight held as {type(weight).__name__}")
        self.stored.add(panels.stored.dtype)
        self.kept.append(panels)
        return panels

    def lowrank_add(self, y: Tensor, x: Tensor, adapters: Any, group: SiteGroup, segments: Segments) -> Tensor:
        wanted = self.batch.logit_segments if self._kind is Field.LOGIT_ROWS else self.batch.token_segments
        assert segments is wanted, "the segments of the rows that the kernel is for"
        sites = SiteArray(group)
        self.kept.append(sites)
        arguments = (
            y.data_ptr(), y.stride(0) * 2, x.data_ptr(), x.stride(0) * 2, x.shape[1], *sites.arguments,
        )  # fmt: skip
        self._note(Code.SHRINK, *arguments)
        self._note(Code.EXPAND, *arguments)
        return y

    def output_scale(self, y: Tensor, adapters: Any, group: SiteGroup, segments: Segments) -> Tensor:
        sites = SiteArray(group)
        self.kept.append(sites)
        self._note(Code.SCALE, y.data_ptr(), y.stride(0) * 2, *sites.arguments)
        return y

    def add_rms_norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        check_rows("add_rms_norm", x, weight)
        self.kept.append(weight)
        out = self._result(x.shape[1])
        total = x if residual is None else self._result(x.shape[1])
        place = (0, 0) if residual is None else (residual.data_ptr(), residual.stride(0) * 2)
        self._note(
            Code.NORM, x.data_ptr(), x.stride(0) * 2, 1, x.shape[1], *place, total.data_ptr(), out.data_ptr(),
            weight.data_ptr(), number=eps,
        )  # fmt: skip
        return out, total

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Of the heads: x [rows, heads, d]."""
        _, heads, d = x.shape
        check_rows("rms_norm", x, weight)
        self.kept.append(weight)
        out = self._result(heads * d)
        self._note(
            Code.NORM, x.data_ptr(), x.stride(0) * 2, heads, d, 0, 0, 0, out.data_ptr(), weight.data_ptr(), number=eps
        )
        return out.view(self.rows, heads, d)

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        _, heads, d = x.shape
        check_rows("rope", cos, sin)
        assert x.stride(1) == d and cos.stride(0) == sin.stride(0)
        out = self._result(heads * d)
        self._note(
            Code.ROPE, x.data_ptr(), x.stride(0) * 2, heads, d, cos.data_ptr(), sin.data_ptr(), cos.stride(0) * 4,
            out.data_ptr(),
        )  # fmt: skip
        return out.view(self.rows, heads, d)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        d = gate_up.shape[1] // 2
        out = self._result(d)
        self._note(Code.SILU, gate_up.data_ptr(), gate_up.stride(0) * 2, d, out.data_ptr())
        return out

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, batch: Batch, cache: LayerCache | None,
        window: int | None,
    ) -> Tensor:  # fmt: skip
        return self.attention(self.rope(q, cos, sin), self.rope(k, cos, sin), v, batch, cache, window)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, batch: Batch, cache: LayerCache | None, window: int | None
    ) -> Tensor:
        (_, heads, d), kv_heads = q.shape, k.shape[1]
        if cache is None or d > TILE:
            raise NotRecordable(f"attention without a cache, or with heads of {d} (at most {TILE})")
        assert all(part.stride(1) == d for part in (q, k, v)), "a token's heads lie dense behind one another"
        check_rows("attention", q, k, v, cache.k, cache.v)
        block_size = cache.k.shape[1]
        strides = [(c.data_ptr(), c.stride(0) * 2, c.stride(1) * 2) for c in (cache.k, cache.v)]
        head_strides = (cache.k.stride(2) * 2, cache.v.stride(2) * 2)
        for rows, place, head_stride in zip((k, v), strides, head_strides, strict=True):
            self._note(Code.STORE, rows.data_ptr(), rows.stride(0) * 2, *place, block_size, kv_heads, head_stride, d)
        out = self._result(heads * d)
        self.kept.append(cache)
        self._note(
            Code.ATTENTION, q.data_ptr(), q.stride(0) * 2, out.data_ptr(), heads * d * 2, kv_heads, heads // kv_heads,
            EVERYTHING if window is None else window, *strides[0], *strides[1], block_size, *head_strides, d,
            number=math.log2(math.e) / math.sqrt(d),
        )  # fmt: skip
        return out

    def logits(self, weight: Weight, x: Tensor) -> Tensor:
        if not isinstance(weight, DenseWeight):
            self._note(Code.PANEL_LOGITS, *self._product(weight, x), 4 * weight.shape[0])
            return torch.empty(0, weight.shape[0])
        if weight.weight.dtype != torch.bfloat16 or x.shape[1] % STEP:
            raise NotRecordable(f"a head of {x.shape[1]} inputs held as {type(weight).__name__}")
        table = weight.weight
        self.kept.append(table)
        self._note(
            Code.LOGITS, x.data_ptr(), x.stride(0) * 2, table.data_ptr(), table.stride(0) * 2, table.shape[0],
            x.shape[1] // STEP,
        )  # fmt: skip
        return torch.empty(0, table.shape[0])

    def finish(self) -> list[list[int]]:
        """The operations, with a meeting after each but where the next reads only what the same thread wrote.

        A product and the shrink behind it read the same rows: threads of odd number shrink first. So one waits for
        the memory that adapters lie in while another multiplies, instead of both for each in turn.
        """
        for row, following in zip(self.operations, self.operations[1:], strict=False):
            by_row = row[0] <= BY_ROW_LAST and following[0] <= BY_ROW_LAST and row[1] == following[1]
            shrinks = row[0] == Code.LINEAR and following[0] == Code.SHRINK
            if by_row or shrinks:
                row[2] = 0
            if shrinks:
                row[TURN], following[TURN] = 1, -1
        return self.operations


class Program:
    """A recorded forward pass of up to `rows` rows. Used by one thread at a time."""

    def __init__(
        self,
        forward: Forward,
        slab: Slab,
        cache: Sequence[LayerCache],
        rows: int,
        ops: ReferenceOps | None = None,
    ) -> None:
        """`ops` are the kernels of what few adapters do. Raises NotRecordable where this processor, or the model, needs
        kernels that programs do not have."""
        if not AVAILABLE:
            raise NotRecordable("bf16 products on a processor without AVX512-BF16")
        recorder = Recorder(_any_batch(rows))
        vocabulary = forward(recorder.batch, recorder, slab, cache).shape[1]
        if len(recorder.stored) != 1:
            raise NotRecordable(f"linear layers held as {recorder.stored}")
        self.rows, self._slab, self._vocabulary, self._kept = rows, slab, vocabulary, recorder.kept
        self._ops, self._pauses, self._head = ops or ReferenceOps(), recorder.pauses, recorder.head
        self._last_token = recorder.tokens - 1
        self._stored = STORED[recorder.stored.pop()]
        self._operations = np.array(recorder.finish(), np.int64)
        self._numbers = np.array(recorder.numbers, np.float32)
        self._fields = np.zeros(len(Field) + 6, np.int64)  # segments take four each
        self._parts, self._counter = team(), np.zeros(8, np.int64)
        arrays = (self._operations, self._numbers, self._fields, self._counter)
        self._addresses = [int(array.ctypes.data) for array in arrays]
        self._scratch = np.empty(0, np.float32)
        self._widest = max(self._operations[self._operations[:, 0] == Code.SHRINK, 9], default=0)

    def __call__(self, batch: Batch) -> Tensor:
        """Logits [L, vocabulary] (fp32) of the batch's `logit_rows`; the keys and values of its tokens are stored."""
        assert batch.logit_rows is not None and batch.cache_slot is not None
        tokens, wanted = batch.tokens.shape[0], batch.logit_rows.shape[0]
        if max(tokens, wanted) > self.rows:
            raise ValueError(f"a step of {tokens} tokens and {wanted} rows of logits; expected at most {self.rows}")
        slab, arguments = self._slab, BatchArguments(batch)
        out = torch.empty(wanted, self._vocabulary)
        # Tokens that an adapter adds are not in the base's table: it has rows of its own for them.
        known = batch.tokens.clamp(max=self._last_token) if batch.overridden else batch.tokens
        segments = [
            None if part is None else SegmentArrays(part) for part in (batch.token_segments, batch.logit_segments)
        ]
        self._fields[:] = (
            tokens, wanted, known.data_ptr(), batch.positions.data_ptr(), batch.logit_rows.data_ptr(),
            *arguments.sequences, *arguments.table, arguments.slots, out.data_ptr(),
            slab.table.data_ptr(), slab.table.shape[1], slab.scale.data_ptr(), slab.data.data_ptr(),
            self._room(segments[0]),
            *((0, 0, 0, 0) if segments[0] is None else segments[0].arguments),
            *((0, 0, 0, 0) if segments[1] is None else segments[1].arguments),
            batch.scaled, 0 if slab.vectors is None else slab.vectors.data_ptr(),
        )  # fmt: skip
        begin = 0
        for pause, of_rows in self._due(batch):
            self._launch(begin, pause.at)
            pause.work(self._ops, batch, of_rows, wanted if pause.kind is Field.LOGIT_ROWS else tokens)
            begin = pause.at
        self._launch(begin, len(self._operations))
        if batch.overridden and batch.logit_segments is not None and self._head is not None:
            show, site = self._head
            return self._ops.adapt_logits(out, show(wanted), slab, site, batch.logit_segments)
        return out

    def _launch(self, begin: int, end: int) -> None:
        """Carry out the operations [begin, end)."""
        if begin == end:
            return
        operations, numbers, fields, counter = self._addresses
        program_kernel(
            operations + 8 * WIDTH * begin, end - begin, numbers + 4 * begin, fields, counter, self._parts,
            TAGS[torch.bfloat16], TAGS[self._slab.data.dtype], self._stored,
        )  # fmt: skip

    def _due(self, batch: Batch) -> Iterator[tuple[Pause, Segments]]:
        """The pauses at which an adapter of the batch has something to do, with the segments of the rows there."""
        if not batch.overridden:
            return
        of_kind = {Field.TOKEN_ROWS: batch.token_segments, Field.LOGIT_ROWS: batch.logit_segments}
        parts = {
            kind: {(one.role, one.layer) for handle in segments.adapter for one in self._slab.overrides.get(handle, ())}
            for kind, segments in of_kind.items()
            if segments is not None
        }
        for pause in self._pauses:
            segments = of_kind[pause.kind]
            if segments is None or not segments.adapter:
                continue
            if (pause.role, pause.layer) in parts[pause.kind] or self._acts(segments.adapter, pause.site):
                yield pause, segments

    def _acts(self, handles: list[int], site: Site | None) -> bool:
        if site is None:
            return False
        vectors = self._slab.vectors
        paired = self._slab.table.numpy()[handles, site.index, 4].any()
        return bool(paired or (vectors is not None and (vectors.numpy()[handles, site.index] >= 0).any()))

    def _room(self, segments: SegmentArrays | None) -> int:
        """The address of room for s A x of all rows at the sites of any one group."""
        if segments is None:
            return 0
        ranks = self._slab.table.numpy()[segments.adapters, :, 4].max(1)
        floats = int(ranks @ np.diff(segments.start)) * int(self._widest)
        if floats > len(self._scratch):
            self._scratch = np.empty(2 * floats, np.float32)
        return int(self._scratch.ctypes.data)


def _any_batch(rows: int) -> Batch:
    """A batch in which everything is present, for a pass that looks at shapes alone."""
    long, short = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.int32)
    segments = [Segments(long, [0, rows], [0], True) for _ in range(2)]
    return Batch(
        tokens=long, positions=long.clone(), query_start=short, kv_len=short, max_query=rows, max_kv=rows,
        block_table=short.unsqueeze(1), cache_slot=long.clone(), token_segments=segments[0], logit_rows=long.clone(),
        logit_segments=segments[1], scaled=True, overridden=True,
    )  # fmt: skip
