"""CpuOps.lowrank_add against the reference: any mix of ranks, segments, sites and dtypes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.inputs import make_segments, make_slab, site_group

from lorikeet.kernels.batch import Segments
from lorikeet.kernels.cpu import CpuOps
from lorikeet.kernels.reference import ReferenceOps

DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_equals_the_reference(data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    dtype, slab_dtype = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(DTYPES))
    widths = st.integers(1, 300) | st.sampled_from((32, 96, 320))  # a multiple of 32 takes another kernel
    d_in, outs = data.draw(widths), data.draw(st.lists(st.integers(1, 600), min_size=1, max_size=3))
    lengths = data.draw(st.lists(st.sampled_from((0, 1, 1, 2, 3, 4, 7, 33)), min_size=1, max_size=9))
    rank = st.one_of(st.sampled_from((0, 1, 4, 16)), st.integers(1, 64))
    ranks = [[data.draw(rank) for _ in outs] for _ in lengths]
    group = site_group(d_in, outs)
    total = sum(lengths) + data.draw(st.integers(1, 5))
    segments = make_segments(lengths, total, data.draw(st.booleans()), generator)
    slab = make_slab(ranks, group, slab_dtype, generator)
    x = torch.randn(total, d_in, generator=generator).to(dtype)
    y = torch.randn(total, sum(outs), generator=generator).to(dtype)
    wanted = ReferenceOps().lowrank_add(y.clone(), x, slab, group, segments)
    found = CpuOps().lowrank_add(y.clone(), x, slab, group, segments)
    error = (found.float() - wanted.float()).abs().max() / wanted.float().abs().max().clamp(min=1)
    assert error <= TOLERANCE[dtype]
    base = torch.ones(total, dtype=torch.bool)
    base[segments.rows] = False
    assert torch.equal(found[base], y[base])


def test_reads_and_writes_slices_of_wider_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    group = site_group(48, (40, 24))
    slab = make_slab([[5, 2], [0, 16]], group, torch.bfloat16, generator)
    segments = make_segments([3, 6], 10, False, generator)
    wide_x, wide_y = torch.randn(10, 60, generator=generator), torch.full((10, 80), float("nan"))
    x, y = wide_x[:, 7:55], wide_y[:, 9:73]
    y.copy_(torch.randn(10, 64, generator=generator))
    wanted = ReferenceOps().lowrank_add(y.clone(), x, slab, group, segments)
    assert torch.allclose(CpuOps().lowrank_add(y, x, slab, group, segments), wanted, atol=1e-5)
    assert wide_y[:, :9].isnan().all() and wide_y[:, 73:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_poisoned_adapter_touches_its_own_rows_only(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    group = site_group(64, (96, 32))
    slab = make_slab([[4, 7], [16, 1], [3, 3]], group, dtype, generator)
    segments = make_segments([4, 2, 1], 9, False, generator)
    x, y = (torch.randn(9, width, generator=generator).to(dtype) for width in (64, 128))
    clean = CpuOps().lowrank_add(y.clone(), x, slab, group, segments)
    for site in group.sites:
        pair = slab.pair(1, site.index, site.d_in, site.d_out)
        assert pair is not None
        pair[0].fill_(float("nan"))
        pair[1].fill_(float("nan"))
    found = CpuOps().lowrank_add(y.clone(), x, slab, group, segments)
    own = segments.rows[4:6]
    others = torch.ones(9, dtype=torch.bool)
    others[own] = False
    assert found[own].isnan().all()
    assert torch.equal(found[others], clean[others])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mixed_batch_equals_each_row_alone(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    group = site_group(320, (320, 64, 64))
    slab = make_slab([[16, 16, 16], [1, 0, 5], [64, 24, 3]], group, dtype, generator)
    segments = make_segments([1, 9, 5], 17, False, generator)
    x, y = (torch.randn(17, width, generator=generator).to(dtype) for width in (320, 448))
    together = CpuOps().lowrank_add(y.clone(), x, slab, group, segments)
    for adapter in range(3):
        for row in segments.rows[segments.start[adapter] : segments.start[adapter + 1]].tolist():
            alone = Segments(torch.tensor([0]), [0, 1], [adapter], True)
            found = CpuOps().lowrank_add(y[row : row + 1].clone(), x[row : row + 1], slab, group, alone)
            tolerance = 1e-6 if dtype == torch.float32 else 8e-3  # sums in another order may round the other way
            assert torch.allclose(found[0].float(), together[row].float(), rtol=tolerance, atol=tolerance * 4)


def test_misaligned_operands_are_refused() -> None:
    generator = torch.Generator().manual_seed(3)
    group = site_group(8, (8,))
    slab, segments = make_slab([[2]], group, torch.float32, generator), make_segments([2], 2, True, generator)
    with pytest.raises(ValueError, match="x torch.bfloat16"):
        CpuOps().lowrank_add(torch.zeros(2, 8), torch.zeros(2, 8, dtype=torch.bfloat16), slab, group, segments)
    with pytest.raises(ValueError, match="dense"):
        CpuOps().lowrank_add(torch.zeros(2, 8), torch.zeros(8, 2).T, slab, group, segments)
