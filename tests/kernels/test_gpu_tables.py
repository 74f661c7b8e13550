"""Tiles of segments, and the tables of a device that outlive the steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.inputs import make_segments, make_slab, site_group

from lorikeet.kernels.batch import DeviceTable, Segments, Slab
from lorikeet.kernels.gpu_tables import DeviceSegments, tables_of, tile_rows


def slab_of(*ranks: int) -> Slab:
    generator = torch.Generator().manual_seed(len(ranks))
    return make_slab([[rank] for rank in ranks], site_group(32, (32,)), torch.float32, generator)


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(0, 200), max_size=9), block_m=st.sampled_from((16, 64)))
def test_every_row_is_in_one_tile_of_its_adapter(lengths: list[int], block_m: int) -> None:
    start = np.cumsum([0, *lengths]).tolist()
    handles = [3 * i + 1 for i in range(len(lengths))]
    tiles = tile_rows(Segments(torch.arange(start[-1]), start, handles, True), block_m)
    expected = np.repeat(handles, lengths)
    found = np.full(start[-1], -1)
    for first, count, handle, _ in tiles.tolist():
        assert 0 < count <= block_m and (found[first : first + count] == -1).all()
        found[first : first + count] = handle
    assert found.tolist() == expected.tolist()


def test_tiles_are_as_long_as_segments_make_worthwhile() -> None:
    generator, slab = torch.Generator().manual_seed(0), slab_of(4, 9)
    for lengths, block_m, tiles in (([1, 47], 16, 4), ([1, 48], 64, 2), ([70, 129], 64, 5)):
        tables = DeviceSegments.of(make_segments(lengths, sum(lengths), True, generator), slab)
        assert (tables.block_m, len(tables.tiles), tables.max_rank) == (block_m, tiles, 9)


def test_entries_are_the_lines_of_the_tiles_adapters() -> None:
    slab = slab_of(4, 9, 1)
    slab.vectors = torch.tensor([[[-1, 64]], [[0, -1]], [[-1, -1]]])
    segments = Segments(torch.arange(20), [0, 17, 18, 20], [2, 0, 1], True)
    for table in (None, DeviceTable.of(slab)):
        slab.device = table
        tables = DeviceSegments.of(segments, slab)
        assert tables.tiles[:, 2].tolist() == [2, 2, 0, 1]
        for line, handle in zip(tables.entries[:, 0], (2, 2, 0, 1), strict=True):
            assert line[:5].tolist() == slab.table[handle, 0].tolist()
            assert line[5:6].to(torch.int32).view(torch.float32).item() == slab.scale[handle, 0].item()
            assert line[6:].tolist() == slab.vectors[handle, 0].tolist()


def test_a_device_table_grows_with_the_slab_and_follows_it_row_by_row() -> None:
    slab = slab_of(4, 9)
    slab.device = table = DeviceTable.of(slab)
    slab.table[1, 0, 4] = 7
    assert table.entries[1, 0, 4] == 9
    table.update(slab, 1)
    assert torch.equal(table.entries, slab.lines(slice(None)))
    slab.table, slab.scale = torch.cat((slab.table, slab.table)), torch.cat((slab.scale, slab.scale))
    slab.table[3, 0, 4] = 5
    table.update(slab, 3)
    assert torch.equal(table.entries, slab.lines(slice(None)))


def test_buffers_stay_while_what_is_in_them_changes() -> None:
    generator, slab = torch.Generator().manual_seed(1), slab_of(4, 9, 1)
    tables = DeviceSegments.for_decode(slab, rows=8, max_rank=16)
    places = [part.data_ptr() for part in (tables.rows, tables.tiles, tables.entries)]
    for lengths in ([8, 0, 0], [1, 1, 1], [3, 0, 4]):
        segments = make_segments(lengths, 8, False, generator)
        tables.fill(segments)
        tiles = tile_rows(segments, 16)
        assert tables.tiles[: len(tiles)].tolist() == tiles.tolist()
        assert tables.tiles[len(tiles) :, 1].tolist() == [0] * (8 - len(tiles))
        assert tables.rows[: len(segments.rows)].tolist() == segments.rows.tolist()
    tables.fill(None)
    assert not tables.tiles.any()
    assert places == [part.data_ptr() for part in (tables.rows, tables.tiles, tables.entries)]
    assert tables_of(tables.segments(), slab) is tables


@pytest.mark.parametrize(
    ("lengths", "said"), [([9, 0, 0], "found 9 rows"), ([1, 1, 0], "of rank 9"), ([1, 0, 0], None)]
)
def test_what_does_not_fit_is_refused(lengths: list[int], said: str | None) -> None:
    slab = slab_of(4, 9, 1)
    tables = DeviceSegments.for_decode(slab, rows=8, max_rank=4)
    start = np.cumsum([0, *lengths]).tolist()
    count = sum(length > 0 for length in lengths)
    segments = Segments(torch.arange(start[-1]), start[: count + 1], list(range(count)), True)
    if said is None:
        tables.fill(segments)
        return
    with pytest.raises(ValueError, match=f"{said}.*expected at most 8 rows, 8 tiles, rank 4"):
        tables.fill(segments)


def test_another_slab_gets_tables_of_its_own() -> None:
    segments, one, other = Segments(torch.arange(2), [0, 2], [0], True), slab_of(4), slab_of(8)
    tables = tables_of(segments, one)
    assert tables_of(segments, one) is tables
    assert tables_of(segments, other).entries[0, 0, 4] == 8
