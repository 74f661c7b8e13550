"""The row kernels of a GPU against the reference in float64, their results in memory that holds NaN before."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.inputs import assert_near, fresh_generator, make_batch, poisoned_memory, to_device
from torch import Tensor

from lorikeet.kernels.batch import LayerCache
from lorikeet.kernels.reference import ReferenceOps
from lorikeet.kernels.weight import DenseWeight

DTYPES = (torch.float32, torch.bfloat16)
REFERENCE = ReferenceOps()


@pytest.fixture
def draw() -> torch.Generator:
    return fresh_generator()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "d"), [(1, 1), (3, 100), (5, 1024), (2, 4096)])
def test_norms_of_rows(device: str, draw: torch.Generator, dtype: torch.dtype, rows: int, d: int) -> None:
    from lorikeet.kernels.gpu_rows import add_rms_norm

    joined = torch.randn(rows, d + 24, generator=draw).to(device, dtype)
    x, residual = joined[:, 8 : 8 + d], torch.randn(rows, d, generator=draw).to(device, dtype)
    weight = torch.randn(d, generator=draw).to(device, dtype)
    for other in (None, residual):
        with poisoned_memory():
            normed, total = add_rms_norm(x, other, weight, 1e-5)
        wide = None if other is None else other.double()
        wanted = REFERENCE.add_rms_norm(x.double(), wide, weight.double(), 1e-5)
        assert_near(total, wanted[1], dtype)
        assert_near(normed, REFERENCE.rms_norm(total.double(), weight.double(), 1e-5), dtype)  # of what is read later


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "heads", "d"), [(1, 1, 64), (9, 7, 128), (40, 2, 80)])
def test_norm_and_rope_of_heads(
    device: str, draw: torch.Generator, dtype: torch.dtype, rows: int, heads: int, d: int
) -> None:
    from lorikeet.kernels.gpu_rows import rms_norm_heads, rope

    joined = torch.randn(rows, heads * d + 48, generator=draw).to(device, dtype)
    x = joined[:, 16 : 16 + heads * d].unflatten(-1, (-1, d))
    weight = torch.randn(d, generator=draw).to(device, dtype)
    cos, sin = (torch.randn(rows, d // 2, generator=draw).to(device) for _ in range(2))
    with poisoned_memory():
        normed, turned = rms_norm_heads(x, weight, 1e-6), rope(x, cos, sin)
    assert_near(normed, REFERENCE.rms_norm(x.double(), weight.double(), 1e-6), dtype)
    assert_near(turned, REFERENCE.rope(x.double(), cos.double(), sin.double()), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "d"), [(1, 1), (3, 300), (2, 2048)])
def test_gated_activation(device: str, draw: torch.Generator, dtype: torch.dtype, rows: int, d: int) -> None:
    from lorikeet.kernels.gpu_rows import silu_mul

    x = (torch.randn(rows, 2 * d, generator=draw) * 8).to(device, dtype)
    x[0, 0] = -80.0
    with poisoned_memory():
        found = silu_mul(x)
    assert_near(found, REFERENCE.silu_mul(x.double()), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(4, 2, 64), (7, 1, 128)])
def test_rope_and_cache_in_one(
    device: str, draw: torch.Generator, dtype: torch.dtype, heads: tuple[int, int, int]
) -> None:
    from lorikeet.kernels.gpu_rows import rope_and_store, store

    q, k, v, batch, cache = to_device(make_batch([(1, 20), (5, 30), (3, 3)], heads, 16, dtype, draw), device)
    assert batch.cache_slot is not None
    slots = batch.cache_slot.clone()
    slots[4] = -1  # a row that only fills up the batch
    cos, sin = (torch.randn(len(q), heads[2] // 2, generator=draw).to(device) for _ in range(2))
    turned = REFERENCE.rope(k.double(), cos.double(), sin.double())
    kept = slots >= 0
    for other_order in (False, True):
        ours = LayerCache(*(_laid_out(side, other_order) for side in (cache.k, cache.v)))
        with poisoned_memory():
            found = rope_and_store(q, k, v, cos, sin, ours, slots)
        assert_near(found, REFERENCE.rope(q.double(), cos.double(), sin.double()), dtype)
        assert_near(ours.k[slots[kept] // 16, slots[kept] % 16], turned[kept], dtype)
        assert torch.equal(ours.v[slots[kept] // 16, slots[kept] % 16], v[kept])
        store(k, v, ours, slots)
        wanted = LayerCache(cache.k.clone(), cache.v.clone())
        for side, rows in ((wanted.k, k), (wanted.v, v)):
            side[slots[kept] // 16, slots[kept] % 16] = rows[kept]
        assert torch.equal(ours.k.nan_to_num(7), wanted.k.nan_to_num(7)), "nothing else is written"
        assert torch.equal(ours.v.nan_to_num(7), wanted.v.nan_to_num(7))


def _laid_out(side: Tensor, heads_first: bool) -> Tensor:
    """The same cache, with all slots of a head side by side in memory where asked for."""
    return (
        side.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
        if heads_first
        else side.clone()
    )


def exact_in_fp8(shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
    """Values with three bits behind the leading one, 2 ** -3 to 2 ** 3: no rounding is needed to hold them."""
    mantissa = torch.randint(8, 16, shape, generator=draw).float() / 8
    sign = torch.randint(0, 2, shape, generator=draw) * 2 - 1
    return mantissa * 2.0 ** torch.randint(-3, 4, shape, generator=draw) * sign


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_cache_holds_what_is_divided_by_the_scale(device: str, draw: torch.Generator, dtype: torch.dtype) -> None:
    from lorikeet.kernels.gpu_rows import FP8, store

    values = exact_in_fp8((6, 2, 64), draw).to(device, dtype)
    scale = torch.tensor([0.25, 2.0], device=device)
    values[0, 0, 0], values[1, 1, 1] = 3000.0, -3000.0  # beyond what fp8 can say: clamped
    held = [torch.zeros(2, 16, 2, 64, device=device).to(FP8) for _ in range(2)]
    cache = LayerCache(*held, scale, scale)
    slots = torch.tensor([3, 17, 0, 31, 5, 9], device=device)
    store(values, values, cache, slots)
    expected = (values.float() / scale[:, None]).clamp(-448, 448)
    for side in (cache.k, cache.v):
        assert torch.equal(side[slots // 16, slots % 16].float(), expected)
    assert cache.k.float().count_nonzero() == values.numel()


@pytest.mark.gpu
def test_fp8_cache_rounds_as_torch_does(device: str, draw: torch.Generator) -> None:
    """To the nearest: 3 bits behind the leading one, so at most 1 / 16 of a value off, or half the least step."""
    from lorikeet.kernels.gpu_rows import FP8, store

    values = (torch.randn(64, 8, 128, generator=draw) * 3).to(device, torch.bfloat16)
    values[0, 0, :3] = torch.tensor([float("nan"), 1e-5, 500.0])
    cache = LayerCache(
        *(torch.zeros(4, 16, 8, 128, device=device).to(FP8) for _ in range(2)), *torch.ones(2, 8, device=device)
    )
    slots = torch.randperm(64, generator=draw).to(device)
    store(values, values, cache, slots)
    found = cache.k[slots // 16, slots % 16].float()
    assert torch.equal(found.nan_to_num(-1), values.float().clamp(-448, 448).to(FP8).float().nan_to_num(-1))
    error = (found - values.float().clamp(-448, 448)).abs()
    assert (error <= values.float().abs() / 16 + 2.0**-10)[~values.isnan()].all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_row(device: str, draw: torch.Generator, dtype: torch.dtype) -> None:
    from lorikeet.kernels.gpu import GpuOps

    ops = GpuOps()
    x = torch.randn(6, 64, generator=draw).to(device, dtype)
    weight, head = (torch.randn(*shape, generator=draw).to(device, dtype) for shape in ((64,), (50, 64)))
    cos, sin = torch.randn(2, 6, 32, generator=draw).to(device)

    def everything(x: Tensor) -> list[Tensor]:
        return [
            *ops.add_rms_norm(x, x, weight, 1e-5), ops.rope(x.unsqueeze(1), cos, sin).flatten(1), ops.silu_mul(x),
            ops.logits(DenseWeight(head), x),
        ]  # fmt: skip

    poisoned = x.clone()
    poisoned[2] = float("nan")
    others = torch.tensor([0, 1, 3, 4, 5])
    for clean, found in zip(everything(x), everything(poisoned), strict=True):
        assert found[2].isnan().all()
        assert torch.equal(found[others], clean[others])


def test_logits_are_unrounded(device: str, draw: torch.Generator) -> None:
    from lorikeet.kernels.gpu import GpuOps

    head, x = (torch.randn(n, 128, generator=draw).to(device, torch.bfloat16) for n in (300, 5))
    found = GpuOps().logits(DenseWeight(head), x)
    assert found.dtype == torch.float32
    assert_near(found, x.double() @ head.double().T, torch.float32)


def test_what_kernels_cannot_read_is_refused(device: str) -> None:
    from lorikeet.kernels.gpu_rows import FP8, add_rms_norm, check_cache, rope, silu_mul

    x = torch.zeros(2, 4, device=device)
    with pytest.raises(ValueError, match=r"add_rms_norm: found torch.float32 .* torch.bfloat16"):
        add_rms_norm(x, None, torch.ones(4, dtype=torch.bfloat16, device=device), 1e-5)
    with pytest.raises(ValueError, match="silu_mul"):
        silu_mul(torch.zeros(4, 2, device=device).T)
    with pytest.raises(ValueError, match="angles are torch.float64"):
        rope(torch.zeros(2, 1, 8, device=device), x.double(), x.double())
    rows, side = torch.zeros(1, 2, 8, device=device), torch.zeros(3, 4, 2, 8, device=device)
    with pytest.raises(ValueError, match="has no scale"):
        check_cache(rows, LayerCache(side.to(FP8), side.to(FP8)))
    with pytest.raises(ValueError, match=r"cache.k is torch.float32 with a scale"):
        check_cache(rows, LayerCache(side, side, torch.ones(2), torch.ones(2)))
    with pytest.raises(ValueError, match="one for each head"):
        check_cache(rows, LayerCache(side.to(FP8), side.to(FP8), torch.ones(3), torch.ones(3)))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 64, 8192])
def test_real_shapes(device: str, draw: torch.Generator, rows: int) -> None:
    from lorikeet.kernels.gpu_rows import add_rms_norm, silu_mul

    dtype = torch.bfloat16
    x, residual = (torch.randn(rows, 4096, generator=draw).to(device, dtype) for _ in range(2))
    weight, gate_up = torch.randn(4096, generator=draw), torch.randn(rows, 2 * 14336, generator=draw)
    weight, gate_up = weight.to(device, dtype), gate_up.to(device, dtype)
    with poisoned_memory():
        (normed, total), act = add_rms_norm(x, residual, weight, 1e-5), silu_mul(gate_up)
    wanted = REFERENCE.add_rms_norm(x.double(), residual.double(), weight.double(), 1e-5)
    assert_near(normed, wanted[0], dtype)
    assert_near(total, wanted[1], dtype)
    assert_near(act, REFERENCE.silu_mul(gate_up.double()), dtype)
