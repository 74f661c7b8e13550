"""The tensors of one forward pass: a flat batch of rows, its adapter segments, the paged cache, the adapter slab.

A training batch and a decode batch differ only in which fields are absent.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


@dataclass(slots=True)
class Segments:
    """Which rows belong to which adapter: a permutation beside the batch, shared by all layers.

    Rows `rows[start[i]:start[i + 1]]` use the adapter with handle `adapter[i]`. An adapter stands in one segment,
    rows of the base in none. `contiguous` says that every segment's rows are consecutive and ascending, so that
    kernels may slice instead of gather.
    """

    rows: Tensor  # [N] int64
    start: list[int]  # S + 1
    adapter: list[int]  # S
    contiguous: bool
    tables: object | None = None  # a kernel's own form of it, made on first use and kept for the other layers


@dataclass(slots=True)
class Batch:
    """Rows of T tokens from B sequences, without padding."""

    tokens: Tensor  # [T] int64
    positions: Tensor  # [T] int64, position of each token in its own sequence
    query_start: Tensor  # [B + 1] int32, sequence b owns tokens query_start[b]:query_start[b + 1]
    kv_len: Tensor  # [B] int32, keys that the last token of sequence b may see
    max_query: int  # longest query of the batch, 1 for a pure decode step
    max_kv: int
    block_table: Tensor | None = None  # [B, blocks] int32; absent in training
    cache_slot: Tensor | None = None  # [T] int64, block * block_size + offset; absent in training
    token_segments: Segments | None = None  # None: no row has an adapter
    logit_rows: Tensor | None = None  # [L] int64; None: every row
    logit_segments: Segments | None = None
    scaled: bool = False  # an adapter of the batch has a gain or a shift
    overridden: bool = False  # one acts on embedding or head, or puts something in place of a part of the base


@dataclass(slots=True)
class LayerCache:
    """Keys and values of one layer: [blocks, block_size, kv_heads, head_dim] each, in any order in memory whose last
    dimension is dense. In fp8 a key is what is held times its head's scale."""

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None  # [kv_heads] fp32; None: the cache is not in fp8
    v_scale: Tensor | None = None


@dataclass(frozen=True, slots=True)
class SlabOverride:
    """`rows` of `width` numbers in the slab, the first at element `at`: in place of the rows `index` [rows], ascending,
    of the base's `role` (`embed`, `head`), of all its rows (None), or of a norm's weight."""

    role: str
    layer: int | None
    at: int
    rows: int
    width: int
    stride: int
    index: Tensor | None


class Arriving(Protocol):
    """Adapters whose numbers are still on their way into the slab, beside what the device computes."""

    def wait(self, layer: int | None) -> None:
        """What the device is given from now on reads numbers of this layer (None: any) of the step's adapters."""
        ...


@dataclass(slots=True)
class DeviceTable:
    """The slab's `table`, `scale` and `vectors` where kernels of another device read them, one line of 64 bytes each.

    `entries[handle, site] = (offset A, offset B, row stride A, row stride B, rank, bits of the fp32 scale, gain,
    shift)`, as in `Slab`. Whoever changes a row of the slab's tables calls `update` for its handle before the next
    step. No captured graph reads it, so that it may grow: a step gathers the rows of its own adapters first.
    """

    entries: Tensor  # [handles, sites, 8] int64, on the device of `Slab.data`

    @classmethod
    def of(cls, slab: Slab) -> DeviceTable:
        """A fresh one of all that the slab's tables hold."""
        return cls(slab.lines(slice(None)).to(slab.data.device))

    def update(self, slab: Slab, handle: int) -> None:
        """Take over what the slab's tables hold of one adapter: one small copy, in the order of the current stream."""
        if handle >= len(self.entries):
            self.entries = slab.lines(slice(None)).to(self.entries.device)
            return
        line = slab.lines([handle])[0]
        self.entries[handle].copy_(line.pin_memory() if self.entries.is_cuda else line, non_blocking=True)


@dataclass(slots=True)
class Slab:
    """All resident adapters at their true rank in one flat buffer.

    `table[handle, site] = (offset A, offset B, row stride A, row stride B, rank)` in elements of `data`, rank 0
    where the adapter has no entry; A is [r, d_in], B is [r, d_out]. Their rows, gains and shifts start at multiples of
    64 bytes. `scale[handle, site]` is the entry's scalar s.
    `vocabulary[handle]` is how many tokens the adapter's embedding and head have, where that is not the base's number.
    """

    data: Tensor  # [elements] bf16 or fp32
    table: Tensor  # [handles, sites, 5] int64 on the CPU, as are `scale` and `vectors`; `device` has them elsewhere
    scale: Tensor  # [handles, sites] fp32
    vectors: Tensor | None = None  # [handles, sites, 2] int64: where gain and shift [d_out] begin, fp32; -1: none
    overrides: dict[int, list[SlabOverride]] = field(default_factory=dict)  # by handle
    vocabulary: dict[int, int] = field(default_factory=dict)  # by handle
    device: DeviceTable | None = None  # kept up to date where kernels run on another device than the CPU
    arriving: Arriving | None = None  # absent where what is copied is there at once

    def wait(self, layer: int | None) -> None:
        """Call it before kernels of a layer (None: of no layer) that read `data`."""
        if self.arriving is not None:
            self.arriving.wait(layer)

    def lines(self, handles: slice | list[int]) -> Tensor:
        """What the tables hold of some handles, as a `DeviceTable` has it: [handles, sites, 8] int64 on the CPU."""
        table = self.table[handles]
        lines = torch.empty((*table.shape[:2], 8), dtype=torch.int64)
        lines[..., :5] = table
        lines[..., 5] = self.scale[handles].contiguous().view(torch.int32)
        lines[..., 6:] = -1 if self.vectors is None else self.vectors[handles]
        return lines

    def pair(self, handle: int, site: int, d_in: int, d_out: int) -> tuple[Tensor, Tensor, float] | None:
        """Views of (A [r, d_in], B [r, d_out]) and the scale of one entry, or None where there is none."""
        a, b, stride_a, stride_b, rank = self.table[handle, site].tolist()
        if rank == 0:
            return None
        return (
            torch.as_strided(self.data, (rank, d_in), (stride_a, 1), a),
            torch.as_strided(self.data, (rank, d_out), (stride_b, 1), b),
            float(self.scale[handle, site]),
        )

    def override(self, handle: int, role: str, layer: int | None) -> tuple[Tensor, Tensor | None] | None:
        """A view [rows, width] of what an adapter puts there, and the index of these rows; None: nothing."""
        for one in self.overrides.get(handle, ()):
            if (one.role, one.layer) == (role, layer):
                return torch.as_strided(self.data, (one.rows, one.width), (one.stride, 1), one.at), one.index
        return None

    def gain_and_shift(self, handle: int, site: int, d_out: int) -> tuple[Tensor | None, Tensor | None]:
        """Views of the vectors [d_out] fp32 of one entry, None where it has none."""
        if self.vectors is None:
            return None, None
        width = 4 // self.data.itemsize

        def vector(at: int) -> Tensor | None:
            return None if at < 0 else self.data[at : at + width * d_out].view(torch.float32)

        gain, shift = self.vectors[handle, site].tolist()
        return vector(gain), vector(shift)
