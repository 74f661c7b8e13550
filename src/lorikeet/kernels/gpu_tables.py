"""Which rows belong to which adapter, and where that adapter lies, in tables on the device that grouped kernels read.

Work is cut into *tiles*: up to `block_m` rows of one segment. `tiles[t] = (first, count, handle, 0)` are the rows
`rows[first : first + count]`; `entries[t, site]` is the line of that handle and site (`batch.DeviceTable`). Tiles that
a step has no use for have count 0, and rows of the base stand in none. Kernels take one tile a program and read what
they need of it in two loads, which do not wait for each other.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lorikeet.kernels.batch import Segments, Slab

DECODE_ROWS = 16  # of a tile: the least that matrix units take
PROMPT_ROWS = 64  # of a tile where a segment has more than LONGEST_DECODE rows
LONGEST_DECODE = 47
MAX_RANK = 512


class DeviceSegments:
    """Tables for up to `rows` rows in `tiles` tiles of `block_m` rows, of adapters in `slab` of up to `max_rank`.

    The buffers stay where they are, and launches depend on their sizes alone: a graph captured with them serves
    whatever `fill` has put there before it is replayed.
    """

    def __init__(self, slab: Slab, rows: int, tiles: int, block_m: int, max_rank: int) -> None:
        device = slab.data.device
        self.slab, self.block_m, self.max_rank = slab, block_m, max_rank
        self.rows = torch.zeros(rows, dtype=torch.int64, device=device)
        self.tiles = torch.zeros((tiles, 4), dtype=torch.int64, device=device)
        self.entries = torch.zeros((tiles, slab.table.shape[1], 8), dtype=torch.int64, device=device)

    @classmethod
    def for_decode(cls, slab: Slab, rows: int, max_rank: int = MAX_RANK) -> DeviceSegments:
        """Empty ones for any mix of adapters over up to `rows` rows: a row may have a tile of its own."""
        return cls(slab, rows, rows, DECODE_ROWS, max_rank)

    @classmethod
    def of(cls, segments: Segments, slab: Slab) -> DeviceSegments:
        """As large as one batch needs them, with tiles as its segments are long."""
        lengths = np.diff(segments.start)
        longest = int(lengths.max(initial=0))
        block_m = DECODE_ROWS if longest <= LONGEST_DECODE else PROMPT_ROWS
        tiles = int((-(-lengths // block_m)).sum())
        filled = cls(slab, len(segments.rows), tiles, block_m, highest_rank(slab, segments.adapter))
        filled.fill(segments)
        return filled

    def segments(self) -> Segments:
        """What a captured batch has for its segments: these tables, and nothing that only the host would read."""
        return Segments(self.rows, [0], [], False, tables=self)

    def fill(self, segments: Segments | None) -> None:
        """Take over the segments of a step, None: no row has an adapter. In the order of the current stream.

        Raises ValueError for more rows, tiles or ranks than there is room for.
        """
        tiles = np.zeros((len(self.tiles), 4), np.int64)
        if segments is not None:
            found = tile_rows(segments, self.block_m)
            rank = highest_rank(self.slab, segments.adapter)
            if len(found) > len(tiles) or len(segments.rows) > len(self.rows) or rank > self.max_rank:
                raise ValueError(
                    f"segments: found {len(segments.rows)} rows in {len(found)} tiles of rank {rank}; expected at most "
                    f"{len(self.rows)} rows, {len(tiles)} tiles, rank {self.max_rank}"
                )
            tiles[: len(found)] = found
            self.rows[: len(segments.rows)].copy_(segments.rows, non_blocking=True)
        upload(torch.from_numpy(tiles), self.tiles)
        table = self.slab.device
        if table is None:
            upload(self.slab.lines(tiles[:, 2].tolist()), self.entries)
        elif len(tiles):
            torch.index_select(table.entries, 0, self.tiles[:, 2], out=self.entries)


def tables_of(segments: Segments, slab: Slab) -> DeviceSegments:
    """The tables of a batch's segments, made by the first kernel that asks for them."""
    tables = segments.tables
    if not isinstance(tables, DeviceSegments) or tables.slab is not slab:
        tables = segments.tables = DeviceSegments.of(segments, slab)
    return tables


def tile_rows(segments: Segments, block_m: int) -> npt.NDArray[np.int64]:
    """(first, count, handle, 0) of each tile [T, 4], in the order of the segments."""
    start = np.asarray(segments.start, np.int64)
    tiles = -(-np.diff(start) // block_m)
    segment = np.repeat(np.arange(len(tiles)), tiles)
    within = np.arange(len(segment)) - np.repeat(np.cumsum(tiles) - tiles, tiles)
    first = start[segment] + within * block_m
    count = np.minimum(block_m, start[segment + 1] - first)
    handle = np.asarray(segments.adapter, np.int64)[segment]
    return np.stack((first, count, handle, np.zeros_like(first)), axis=1)


def highest_rank(slab: Slab, handles: list[int]) -> int:
    return int(slab.table[..., 4][handles].max()) if handles else 0


def upload(source: Tensor, target: Tensor) -> None:
    """Copy host memory to a tensor of the same shape without waiting for it: `source` may be dropped at once."""
    target.copy_(source.pin_memory() if target.is_cuda else source, non_blocking=True)
