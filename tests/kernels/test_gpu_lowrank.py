"""The grouped kernels of a GPU against the reference in fp64: any mix of ranks, segments, sites and dtypes.

Everything that nobody may read is NaN: the ends of the slab's rows, scratch memory, the columns beside a slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.kernels.inputs import make_segments, make_slab, site_group
from torch import Tensor

from lorikeet.kernels.batch import DeviceTable, Segments, Slab, SlabOverride
from lorikeet.kernels.reference import ReferenceOps
from lorikeet.types import Site, SiteGroup

pytest.importorskip("triton", reason="GPU kernels need triton")
from lorikeet.kernels import gpu_lowrank
from lorikeet.kernels.gpu import GpuOps
from lorikeet.kernels.gpu_lowrank import plan_expand, plan_shrink, widths_of
from lorikeet.kernels.gpu_tables import DeviceSegments

BF16, FP32 = torch.bfloat16, torch.float32
TOLERANCE = {FP32: 1e-5, BF16: 1e-2}
LLAMA_8B = {"qkv": (4096, (4096, 1024, 1024)), "o": (4096, (4096,)), "gate_up": (4096, (14336,) * 2),
            "down": (14336, (4096,))}  # fmt: skip


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is NaN."""
    empty = torch.empty

    def nan(*shape: Any, **how: Any) -> Tensor:
        made = empty(*shape, **how)
        return made.fill_(float("nan")) if made.dtype.is_floating_point else made

    monkeypatch.setattr(torch, "empty", nan)


def to_device(slab: Slab, device: str) -> Slab:
    moved = Slab(slab.data.to(device), slab.table, slab.scale, slab.vectors, slab.overrides, slab.vocabulary)
    moved.device = DeviceTable.of(moved)
    return moved


def exact(slab: Slab) -> Slab:
    return Slab(slab.data.double(), slab.table, slab.scale)


def on(device: str, segments: Segments) -> Segments:
    return Segments(segments.rows.to(device), segments.start, segments.adapter, segments.contiguous)


def error(found: Tensor, wanted: Tensor) -> float:
    """The largest difference by the largest value; NaN where either has one."""
    return float((found.double().cpu() - wanted.double()).abs().max() / wanted.double().abs().max().clamp(min=1e-6))


def check(
    device: str,
    d_in: int,
    outs: Sequence[int],
    ranks: Sequence[Sequence[int]],
    lengths: Sequence[int],
    dtypes: tuple[torch.dtype, torch.dtype] = (BF16, BF16),
    *,
    contiguous: bool = False,
    others: int = 3,
    seed: int | None = None,
) -> None:
    """Adapter h has rank `ranks[h][i]` at site i and `lengths[h]` rows; `others` rows have none."""
    generator = torch.Generator()
    drawn = generator.seed() if seed is None else generator.manual_seed(seed).initial_seed()
    act, stored = dtypes
    group, total = site_group(d_in, outs), sum(lengths) + others
    slab = make_slab(ranks, group, stored, generator)
    segments = make_segments(lengths, total, contiguous, generator)
    x = torch.randn(total, d_in, generator=generator).to(act)
    y = torch.randn(total, sum(outs), generator=generator).to(act)
    wanted = ReferenceOps().lowrank_add(y.double(), x.double(), exact(slab), group, segments)
    rows = segments.rows.to(device)
    moved = Segments(rows, segments.start, segments.adapter, contiguous)
    found = GpuOps().lowrank_add(y.to(device), x.to(device), to_device(slab, device), group, moved).cpu()
    base = torch.ones(total, dtype=torch.bool)
    base[segments.rows] = False
    assert torch.equal(found[base], y[base])
    if len(segments.rows):
        assert error(found[segments.rows], wanted[segments.rows]) <= TOLERANCE[act], f"seed {drawn}"


SMALL = {
    "one row each": (48, (40, 24, 8), [[5, 2, 0], [0, 16, 17], [64, 1, 33]], [1, 1, 1]),
    "few and many rows": (272, (80, 136), [[8, 3], [16, 16], [1, 40], [4, 4]], [1, 5, 17, 0]),
    "ranks up to 512": (32, (64,), [[512], [1], [100]], [2, 6, 1]),
    "more stretches than are added at once": (256 * 18 + 16, (16,), [[3], [20]], [1, 6]),
    "tiles of 64": (144, (72, 136), [[20, 3], [70, 0], [5, 9]], [70, 1, 48]),
    "nothing there": (32, (32, 32), [[0, 0], [0, 0]], [3, 1]),
    "no row": (32, (32,), [[4], [4]], [0, 0]),
    "unaligned widths": (37, (51, 19), [[6, 7], [3, 18]], [2, 9]),
}


@pytest.mark.parametrize("case", SMALL)
@pytest.mark.parametrize("dtypes", [(BF16, BF16), (FP32, FP32)], ids=["bf16", "fp32"])
def test_small(device: str, case: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    check(device, *SMALL[case], dtypes, contiguous=case == "tiles of 64")


@pytest.mark.parametrize("dtypes", [(BF16, FP32), (FP32, BF16)], ids=["slab fp32", "slab bf16"])
def test_activations_and_slab_may_differ_in_dtype(device: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    check(device, *SMALL["one row each"], dtypes)
    check(device, *SMALL["tiles of 64"], dtypes)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_mix(device: str, data: st.DataObject) -> None:
    dtypes = data.draw(st.sampled_from(((BF16, BF16), (FP32, FP32))))
    d_in = data.draw(st.integers(1, 40) | st.sampled_from((64, 288)))
    outs = data.draw(st.lists(st.integers(1, 90), min_size=1, max_size=3))
    lengths = data.draw(st.lists(st.sampled_from((0, 1, 1, 2, 4, 5, 18)), min_size=1, max_size=4))
    rank = st.one_of(st.sampled_from((0, 1, 16)), st.integers(1, 70))
    ranks = [[data.draw(rank) for _ in outs] for _ in lengths]
    check(device, d_in, outs, ranks, lengths, dtypes, contiguous=data.draw(st.booleans()), seed=data.draw(
        st.integers(0, 2**31)))  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("name", LLAMA_8B)
@pytest.mark.parametrize(
    ("ranks", "lengths"),
    [
        ((16,), [1]),
        ((8, 16, 32, 64), [1] * 64),
        ((16, 512, 1, 0, 64), [4, 5, 1, 2, 16] * 4),
        ((8, 64), [256, 0, 31]),
        ((16, 64, 512), [1800, 1, 200]),
    ],
    ids=["1 row", "64 rows", "any", "256 rows", "2000 rows"],
)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
def test_shapes_of_an_8b(
    device: str, name: str, ranks: Sequence[int], lengths: Sequence[int], dtype: torch.dtype
) -> None:
    d_in, outs = LLAMA_8B[name]
    of_sites = [[ranks[(h + i) % len(ranks)] for i in range(len(outs))] for h in range(len(lengths))]
    check(device, d_in, outs, of_sites, lengths, (dtype, dtype))


def test_offsets_beyond_32_bits(device: str) -> None:
    """On a device: an adapter that lies behind the first 2^31 elements of the slab."""
    if device == "cpu":
        pytest.skip("takes 4 GB")
    generator = torch.Generator().manual_seed(5)
    group = site_group(64, (64,))
    slab = make_slab([[16]], group, BF16, generator)
    far = torch.full((2**31 + slab.data.numel() + 64,), float("nan"), dtype=BF16, device=device)
    far[2**31 + 64 :] = slab.data.to(device)
    moved = Slab(far, slab.table.clone(), slab.scale)
    moved.table[..., :2] += 2**31 + 64
    segments = make_segments([3], 4, False, generator)
    x, y = (torch.randn(4, 64, generator=generator).to(BF16) for _ in range(2))
    wanted = ReferenceOps().lowrank_add(y.double(), x.double(), exact(slab), group, segments)
    found = GpuOps().lowrank_add(y.to(device), x.to(device), moved, group, on(device, segments))
    assert error(found, wanted) <= TOLERANCE[BF16]


def test_reads_and_writes_slices_of_wider_rows(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    group = site_group(48, (40, 24))
    slab = make_slab([[5, 2], [0, 16]], group, BF16, generator)
    segments = make_segments([3, 6], 10, False, generator)
    wide_x = torch.full((10, 60), float("nan"), device=device)
    wide_y = torch.full((10, 80), float("nan"), device=device)
    x, y = wide_x[:, 7:55], wide_y[:, 9:73]
    x.copy_(torch.randn(10, 48, generator=generator))
    y.copy_(torch.randn(10, 64, generator=generator))
    wanted = ReferenceOps().lowrank_add(y.cpu().double(), x.cpu().double(), exact(slab), group, segments)
    GpuOps().lowrank_add(y, x, to_device(slab, device), group, on(device, segments))
    assert error(y, wanted) <= 1e-5
    assert wide_y[:, :9].isnan().all() and wide_y[:, 73:].isnan().all()


def test_a_poisoned_adapter_touches_its_own_rows_only(device: str) -> None:
    generator = torch.Generator().manual_seed(1)
    group = site_group(64, (96, 32))
    slab = make_slab([[4, 7], [16, 1], [3, 3]], group, BF16, generator)
    segments = make_segments([4, 6, 1], 13, False, generator)
    x, y = (torch.randn(13, width, generator=generator).to(BF16) for width in (64, 128))

    def run() -> Tensor:
        moved = to_device(slab, device)
        return GpuOps().lowrank_add(y.to(device), x.to(device), moved, group, on(device, segments)).cpu()

    clean = run()
    for site in group.sites:
        pair = slab.pair(1, site.index, site.d_in, site.d_out)
        assert pair is not None
        pair[0].fill_(float("nan"))
        pair[1].fill_(float("nan"))
    found = run()
    others = torch.ones(13, dtype=torch.bool)
    others[segments.rows[4:10]] = False
    assert found[segments.rows[4:10]].isnan().all()
    assert torch.equal(found[others], clean[others])


def test_the_result_may_stand_in_place_of_the_input(device: str) -> None:
    generator = torch.Generator().manual_seed(4)
    group = site_group(64, (64,))
    slab = make_slab([[4], [20]], group, FP32, generator)
    segments = make_segments([2, 6], 9, False, generator)
    x = torch.randn(9, 64, generator=generator)
    wanted = ReferenceOps().lowrank_add(x.double(), x.double(), exact(slab), group, segments)
    stream = x.to(device)
    found = GpuOps().lowrank_add(stream, stream, to_device(slab, device), group, on(device, segments))
    assert found.data_ptr() == stream.data_ptr() and error(found, wanted) <= 1e-5


def test_tables_that_are_filled_anew_serve_any_mix(device: str) -> None:
    """One set of buffers, launches of one size: as a captured graph has them."""
    generator = torch.Generator().manual_seed(6)
    group = site_group(64, (64, 32))
    slab = make_slab([[4, 0], [20, 7], [1, 33]], group, FP32, generator)
    moved = to_device(slab, device)
    tables = DeviceSegments.for_decode(moved, rows=8, max_rank=64)
    segments_of = tables.segments()
    for lengths in ([8, 0, 0], [1, 1, 1], [0, 5, 2]):
        segments = make_segments(lengths, 8, False, generator)
        x, y = (torch.randn(8, width, generator=generator) for width in (64, 96))
        wanted = ReferenceOps().lowrank_add(y.double(), x.double(), exact(slab), group, segments)
        tables.fill(on(device, segments))
        found = GpuOps().lowrank_add(y.to(device), x.to(device), moved, group, segments_of)
        assert error(found, wanted) <= 1e-5
    tables.fill(None)
    assert torch.equal(GpuOps().lowrank_add(y.to(device), x.to(device), moved, group, segments_of).cpu(), y)


# --- gains and shifts, embedding, head --------------------------------------------------------------------------------


def with_vectors(
    slab: Slab, group: SiteGroup, present: Sequence[tuple[bool, bool]], generator: torch.Generator
) -> None:
    """Give adapter h a gain and a shift at every site, as `present[h]` says."""
    slab.vectors = torch.full((*slab.table.shape[:2], 2), -1)
    parts, used = [slab.data], len(slab.data)
    for handle, which in enumerate(present):
        for site in group.sites:
            for i in (0, 1):
                if which[i]:
                    slab.vectors[handle, site.index, i] = used
                    values = torch.randn(-(-site.d_out // 16) * 16, generator=generator)
                    parts.append(values.view(slab.data.dtype))
                    used += len(parts[-1])
    slab.data = torch.cat(parts)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
def test_output_scale(device: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(7)
    group = site_group(32, (300, 24))
    slab = make_slab([[2, 2]] * 4, group, dtype, generator)
    with_vectors(slab, group, [(True, True), (True, False), (False, True), (False, False)], generator)
    for lengths in ([3, 1, 18, 2], [70, 2, 1, 3]):
        segments = make_segments(lengths, 80, False, generator)
        y = torch.randn(80, 324, generator=generator).to(dtype)
        wanted = ReferenceOps().output_scale(y.clone(), slab, group, segments)
        found = GpuOps().output_scale(y.to(device), to_device(slab, device), group, on(device, segments)).cpu()
        assert error(found, wanted) <= TOLERANCE[dtype]
        untouched = torch.ones(80, dtype=torch.bool)
        untouched[segments.rows[: sum(lengths[:3])]] = False
        assert torch.equal(found[untouched], y[untouched])


def overriding_slab(site: Site, generator: torch.Generator) -> Slab:
    """Six adapters: a pair; some rows of a table; a whole, larger one; a pair in a larger one; both; nothing."""
    group = SiteGroup((site,), (0,))
    slab = make_slab([[3], [0], [0], [5], [20], [0]], group, FP32, generator)
    width = 16 if site.role == "embed" else site.d_in
    some, whole = torch.randn(4, width, generator=generator), torch.randn(66, width, generator=generator)
    at = len(slab.data)
    slab.data = torch.cat((slab.data, some.flatten(), whole.flatten()))
    rows = torch.tensor([1, 7, 30, 47])
    slab.overrides = {
        1: [SlabOverride(site.role, None, at, 4, width, width, rows)],
        2: [SlabOverride(site.role, None, at + some.numel(), 66, width, width, None)],
        4: [SlabOverride(site.role, None, at, 4, width, width, rows)],
    }
    slab.vocabulary = {2: 66, 3: 50}
    return slab


def moved_overrides(slab: Slab, device: str) -> Slab:
    moved = to_device(slab, device)
    moved.overrides = {
        handle: [replace(one, index=None if one.index is None else one.index.to(device)) for one in some]
        for handle, some in slab.overrides.items()
    }
    return moved


def test_embedding(device: str) -> None:
    generator = torch.Generator().manual_seed(8)
    site = Site(0, None, "embed", 48, 16)
    slab = overriding_slab(site, generator)
    pair = make_slab([[0], [0], [0], [5], [0], [0]], site_group(50, (16,)), FP32, generator)  # of a larger vocabulary
    slab.table[3], at = pair.table[3], len(slab.data)
    slab.table[3, 0, :2] += at
    slab.data = torch.cat((slab.data, pair.data))
    segments = make_segments([3, 5, 4, 2, 6, 1], 24, False, generator)
    tokens = torch.randint(0, 48, (24,), generator=generator)
    tokens[segments.rows[8:14]] = torch.tensor([65, 50, 3, 48, 49, 2])
    x = torch.randn(24, 16, generator=generator)
    wanted = ReferenceOps().adapt_embedding(x.clone(), tokens, slab, site, segments)
    found = GpuOps().adapt_embedding(
        x.to(device), tokens.to(device), moved_overrides(slab, device), site, on(device, segments)
    )
    assert error(found, wanted) <= 1e-5


def test_head(device: str) -> None:
    generator = torch.Generator().manual_seed(9)
    site = Site(0, None, "head", 32, 48)
    slab = overriding_slab(site, generator)
    pair = make_slab([[0], [0], [0], [5], [0], [0]], site_group(32, (50,)), FP32, generator)
    slab.table[3], at = pair.table[3], len(slab.data)
    slab.table[3, 0, :2] += at
    slab.data = torch.cat((slab.data, pair.data))
    segments = make_segments([3, 5, 4, 2, 6, 1], 24, False, generator)
    x, logits = (torch.randn(24, width, generator=generator) for width in (32, 48))
    wanted = ReferenceOps().adapt_logits(logits.clone(), x, slab, site, segments)
    found = GpuOps().adapt_logits(
        logits.to(device), x.to(device), moved_overrides(slab, device), site, on(device, segments)
    )
    assert found.shape == wanted.shape == (24, 66)
    for i, handle in enumerate(segments.adapter):
        rows = segments.rows[segments.start[i] : segments.start[i + 1]]
        tokens = slab.vocabulary.get(handle, 48)
        assert error(found.cpu()[rows, :tokens], wanted[rows, :tokens]) <= 1e-5


def test_logits_of_bf16_rows_are_not_rounded(device: str) -> None:
    generator = torch.Generator().manual_seed(10)
    site = Site(0, None, "head", 64, 48)
    group = SiteGroup((site,), (0,))
    slab = make_slab([[3], [20]], group, BF16, generator)
    segments = make_segments([2, 5], 8, False, generator)
    x, logits = torch.randn(8, 64, generator=generator).to(BF16), torch.randn(8, 48, generator=generator)
    wanted = ReferenceOps().lowrank_add(logits.double(), x.double(), exact(slab), group, segments)
    found = GpuOps().adapt_logits(logits.to(device), x.to(device), to_device(slab, device), site, on(device, segments))
    assert error(found, wanted) <= 1e-5


# --- shapes of launches, refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("d_in", [1, 24, 576, 896, 4096, 8192, 14336, 28672])
@pytest.mark.parametrize("block_m", [16, 64])
def test_stretches_cover_the_input_once(d_in: int, block_m: int) -> None:
    for tiles, rank, wide in product((1, 8, 64, 256), (5, 512), (False, True)):
        plan = plan_shrink(tiles, block_m, 3, d_in, rank, wide)
        columns = plan.steps * plan.block_k
        assert plan.splits * columns >= d_in > (plan.splits - 1) * columns
        assert plan.splits <= 16


def test_few_adapters_are_cut_into_more_pieces_than_many() -> None:
    widths = LLAMA_8B["qkv"][1]
    for d_in in (4096, 14336):
        splits = [plan_shrink(tiles, 16, 3, d_in, 64, False).splits for tiles in (1, 8, 64, 256)]
        assert splits == sorted(splits, reverse=True) and splits[0] > 8 and splits[-1] == 1
    columns = [(plan := plan_expand(tiles, 16, widths, 64, False)).block_n * plan.steps for tiles in (1, 8, 64, 256)]
    assert columns == sorted(columns) and columns[0] == 64 and columns[-1] == 1024


def test_products_are_compiled_in_every_size_that_a_batch_may_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [site_group(*shape) for shape in LLAMA_8B.values()] * 2
    slab = make_slab([[0, 0, 0]], groups[0], BF16, torch.Generator())
    seen = []

    def note(y: Tensor, x: Tensor, slab: Slab, group: SiteGroup, tables: DeviceSegments) -> None:
        seen.append(variant(group, len(tables.tiles), tables.block_m, tables.max_rank))

    def variant(group: SiteGroup, tiles: int, block_m: int, rank: int) -> tuple[Any, ...]:
        shrink = plan_shrink(tiles, block_m, len(group.sites), group.d_in, rank, False)
        return group.d_in, widths_of(group), shrink, plan_expand(tiles, block_m, widths_of(group), rank, False)

    monkeypatch.setattr(gpu_lowrank, "lowrank_add", note)
    gpu_lowrank.compile_products(slab, iter(groups), BF16)
    assert len(seen) == len(set(seen)) < 60
    for group, tiles in product(groups, (*range(1, 513, 7), 1000, 5000)):
        for block_m, rank in ((16, 5), (16, 512), (64, 16), (64, 17), (64, 512)):
            assert variant(group, tiles, block_m, rank) in seen


def test_operands_that_no_kernel_takes_are_refused() -> None:
    generator = torch.Generator().manual_seed(3)
    group = site_group(8, (8,))
    slab, segments = make_slab([[2]], group, FP32, generator), make_segments([2], 2, True, generator)
    with pytest.raises(ValueError, match="float64"):
        GpuOps().lowrank_add(torch.zeros(2, 8), torch.zeros(2, 8, dtype=torch.float64), slab, group, segments)
    with pytest.raises(ValueError, match="dense"):
        GpuOps().lowrank_add(torch.zeros(2, 8), torch.zeros(8, 2).T, slab, group, segments)
    apart = SiteGroup((Site(0, 0, "q", 8, 8), Site(2, 0, "v", 8, 8)), (0, 8))
    with pytest.raises(ValueError, match="expected neighbours"):
        widths_of(apart)
