"""The differentiable kernels against plain torch and finite differences, in fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.train.small import packed_batch, random_base

from lorikeet.kernels.batch import Segments, Slab
from lorikeet.kernels.reference import ReferenceOps
from lorikeet.model.decoder import forward
from lorikeet.model.spec import ModelSpec
from lorikeet.train.attention import RowBuckets, packed_attention
from lorikeet.train.losses import completion_loss
from lorikeet.train.ops import Dropout, TrainedAdapters, TrainOps
from lorikeet.train.parameters import AdapterParameters

LENGTHS = [5, 1, 9, 12, 3, 20]
ADAPTERS = [0, 0, 1, 1, 2, 2]
reference = ReferenceOps()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def adapters_for(spec: ModelSpec, **options: Any) -> list[AdapterParameters]:
    """Three adapters of different rank and targets, with a non-zero B."""
    made = []
    for i, (roles, rank) in enumerate([(("q", "v"), 1), (("o", "gate", "up"), 3), (("k", "up", "down", "q"), 5)]):
        parameters = AdapterParameters(spec, roles, rank, 0.5 + i, dtype=torch.float64, **options)
        parameters.data.copy_(normal(parameters.data.numel(), seed=i) * 0.3)
        parameters.refresh()
        made.append(parameters)
    return made


def slab_of(spec: ModelSpec, adapters: list[AdapterParameters]) -> Slab:
    """The same adapters as serving holds them: handle i is adapters[i]; gradients reach `data`."""
    data = torch.cat([adapter.data for adapter in adapters])
    table = torch.zeros(len(adapters), len(spec.sites), 5, dtype=torch.int64)
    scale = torch.zeros(len(adapters), len(spec.sites), dtype=torch.float64)
    base = 0
    for handle, adapter in enumerate(adapters):
        for site, a, b in adapter.named_pairs():
            offsets = (base + a.storage_offset(), base + b.storage_offset())
            table[handle, site.index] = torch.tensor([*offsets, site.d_in, site.d_out, adapter.rank])
            scale[handle, site.index] = adapter.scale
        base += adapter.data.numel()
    return Slab(data, table, scale)


def gradcheck(function: Callable[..., Any], *inputs: torch.Tensor) -> None:
    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in inputs], fast_mode=False)


@pytest.mark.parametrize("window", [None, 4])
def test_attention_is_the_references(window: int | None) -> None:
    batch = packed_batch([300, 5, 1, 9, 12, 40, 257, 7])
    tokens = len(batch.tokens)
    q, k, v = normal(tokens, 6, 8), normal(tokens, 2, 8, seed=1), normal(tokens, 2, 8, seed=2)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    layout = RowBuckets.of(batch)
    assert len(layout.buckets) > 2
    ours = packed_attention(q, k, v, layout, window)
    theirs = reference.attention(q, k, v, batch, None, window)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    weights = normal(*ours.shape, seed=3)
    for a, b in zip(
        torch.autograd.grad((ours * weights).sum(), inputs),
        torch.autograd.grad((theirs * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_attention_gradcheck() -> None:
    layout = RowBuckets.of(packed_batch([3, 1, 5]))
    gradcheck(
        lambda q, k, v: packed_attention(q, k, v, layout, 3), normal(9, 4, 2), normal(9, 2, 2), normal(9, 2, 2, seed=1)
    )


def test_a_row_of_nan_stays_alone() -> None:
    batch = packed_batch([3, 5, 6, 2])
    q, k, v = normal(16, 2, 4), normal(16, 2, 4, seed=1), normal(16, 2, 4, seed=2)
    clean = packed_attention(q, k, v, RowBuckets.of(batch), None)
    for x in (q, k, v):
        x[3:8] = float("nan")
    dirty = packed_attention(q, k, v, RowBuckets.of(batch), None)
    others = [*range(3), *range(8, 16)]
    assert torch.equal(clean[others], dirty[others])


def test_elementwise_gradchecks() -> None:
    ops = TrainOps(packed_batch([4]))
    weight, cos, sin = normal(6), normal(4, 3, seed=1).cos(), normal(4, 3, seed=1).sin()
    gradcheck(lambda x: ops.rms_norm(x, weight, 1e-5), normal(4, 6))
    gradcheck(lambda x, r: ops.add_rms_norm(x, r, weight, 1e-5), normal(4, 6), normal(4, 6, seed=1))
    gradcheck(lambda x: ops.rope(x, cos, sin), normal(4, 2, 6))
    gradcheck(ops.silu_mul, normal(4, 6))


def test_elementwise_are_the_references() -> None:
    ops = TrainOps(packed_batch([4]))
    x, r, weight, cos, sin = normal(4, 6), normal(4, 6, seed=1), normal(6), normal(4, 3).cos(), normal(4, 3).sin()
    for ours, theirs in [
        (ops.add_rms_norm(x, r, weight, 1e-5), reference.add_rms_norm(x, r, weight, 1e-5)),
        (ops.add_rms_norm(x, None, weight, 1e-5), reference.add_rms_norm(x, None, weight, 1e-5)),
        (ops.rope(x.view(4, 1, 6), cos, sin), reference.rope(x.view(4, 1, 6), cos, sin)),
        (ops.silu_mul(x), reference.silu_mul(x)),
    ]:
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_loss_gradcheck_and_cross_entropy() -> None:
    _, weights = random_base()
    targets = torch.tensor([3, 60, 0, 7])
    x = normal(4, 24)
    expected = torch.nn.functional.cross_entropy(weights.head.linear(x), targets, reduction="none")
    torch.testing.assert_close(completion_loss(x, weights.head, targets), expected)
    gradcheck(lambda x: completion_loss(x, weights.head, targets), x)


def test_forward_and_gradients_are_the_references() -> None:
    """The whole decoder with three adapters: logits and every gradient of A and B equal autograd's own."""
    spec, weights = random_base(windows=(None, 6))
    batch = packed_batch(LENGTHS, ADAPTERS)
    adapters = adapters_for(spec, compute_dtype=torch.float64)
    slab = slab_of(spec, adapters)
    slab.data.requires_grad_()
    theirs = forward(spec, weights, batch, _CloningReference(), slab)
    trained = TrainedAdapters(adapters, [None] * 3)
    ours = forward(spec, weights, batch, TrainOps(batch), trained)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    targets = torch.randint(0, 61, (len(batch.tokens),), generator=torch.Generator().manual_seed(5))
    torch.nn.functional.cross_entropy(theirs, targets).backward()
    forward(spec, weights, batch, TrainOps(batch, targets), trained).mean().backward()
    gradients = torch.cat([adapter.grad for adapter in adapters])
    assert slab.data.grad is not None and slab.data.grad.norm() > 0.1
    torch.testing.assert_close(gradients, slab.data.grad, rtol=1e-9, atol=1e-12)


def test_rows_without_logits_are_left_out_early() -> None:
    """The last layer computes the rows of logits alone: the same logits and gradients, dropout on."""
    spec, weights = random_base()
    adapters = adapters_for(spec, compute_dtype=torch.float64)
    rows = torch.tensor([3, 4, 7, 20, 26, 27, 49])
    trained = TrainedAdapters(adapters, [Dropout(0.4, i, 7) for i in range(3)])
    results = []
    for early in (False, True):
        batch = packed_batch(LENGTHS, ADAPTERS)
        batch.logit_rows = rows
        if early:
            batch.logit_segments = Segments(torch.arange(7), [0, 2, 5, 7], [0, 1, 2], contiguous=True)
        logits = forward(spec, weights, batch, TrainOps(batch, None, torch.arange(50)), trained)
        logits.square().sum().backward()
        results.append((logits.detach(), *(adapter.grad.clone() for adapter in adapters)))
        for adapter in adapters:
            adapter.grad.zero_()
    for late, soon in zip(*results, strict=True):
        torch.testing.assert_close(late, soon, rtol=1e-10, atol=1e-10)


class _CloningReference(ReferenceOps):
    """`lowrank_add` on a copy, so that autograd can follow it."""

    def lowrank_add(self, y: torch.Tensor, *args: Any) -> torch.Tensor:
        return super().lowrank_add(y.clone(), *args)


def test_dropout_gradients() -> None:
    """dloss along a random direction of the parameters and finite differences agree with the mask on."""
    spec, weights = random_base()
    batch = packed_batch(LENGTHS, ADAPTERS)
    adapters = adapters_for(spec, compute_dtype=torch.float64)
    dropout = [Dropout(0.4, i, 7) for i in range(3)]
    targets = torch.zeros(50, dtype=torch.int64)

    def loss() -> torch.Tensor:
        return forward(
            spec, weights, batch, TrainOps(batch, targets, torch.arange(50)), TrainedAdapters(adapters, dropout)
        ).mean()

    loss().backward()
    for adapter in adapters:
        direction = normal(adapter.data.numel(), seed=9)
        values = []
        for sign in (1, -1):
            adapter.data.add_(direction, alpha=sign * 1e-6)
            adapter.refresh()
            values.append(loss().item())
            adapter.data.sub_(direction, alpha=sign * 1e-6)
            adapter.refresh()
        assert (values[0] - values[1]) / 2e-6 == pytest.approx(float(adapter.grad @ direction), rel=1e-5)


def mask_of(seed: int, step: int, site: int, places: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return Dropout(0.25, seed, step).of(site, places).times(torch.ones(len(places), 64, dtype=dtype))


def test_dropout_mask() -> None:
    tokens = torch.arange(4000)
    mask = mask_of(3, 11, 5, tokens)
    assert mask.unique().tolist() == [0.0, 1 / 0.75]
    kept = (mask > 0).double()
    assert kept.mean().item() == pytest.approx(0.75, abs=0.005)
    assert kept.mean(0).std().item() < 0.02 and kept.mean(1).std().item() < 0.08
    assert torch.equal(mask[100:200], mask_of(3, 11, 5, tokens[100:200]))
    for other in (mask_of(4, 11, 5, tokens), mask_of(3, 12, 5, tokens), mask_of(3, 11, 6, tokens)):
        agree = (kept == (other > 0)).double().mean().item()
        assert agree == pytest.approx(0.75**2 + 0.25**2, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_kernel_makes_the_same_mask(dtype: torch.dtype) -> None:
    """Places with high bits set, rows that do not lie side by side, and the input as its own output."""
    places = torch.arange(700) * (1 << 20) + 17
    expected = mask_of(3, 11, 5, places)
    assert torch.equal(mask_of(3, 11, 5, places, dtype), expected.to(dtype))
    wide = normal(700, 128, seed=1).to(dtype)
    x = wide[:, :64]
    want = (x.double() * expected).to(dtype)
    out = Dropout(0.25, 3, 11).of(5, places).times(x, out=x)
    assert out is x
    torch.testing.assert_close(out, want, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=0)
    assert torch.equal(out == 0, expected == 0)
