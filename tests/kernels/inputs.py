"""Random inputs of the kernels: a slab of adapters, and a paged cache that is NaN where no sequence owns a slot."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import torch
from torch import Tensor

from lorikeet.kernels.batch import Batch, LayerCache, Segments, Slab
from lorikeet.types import Site, SiteGroup

RELATIVE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # error of a kernel, to the largest value of its result


def fresh_generator() -> torch.Generator:
    """Other numbers in every run; what a failing run had stands in its output."""
    seed = int.from_bytes(os.urandom(4))
    print(f"inputs drawn with seed {seed}")
    return torch.Generator().manual_seed(seed)


def assert_near(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    """`found` is what `wanted`, in float64, becomes with inputs in `dtype`."""
    assert found.shape == wanted.shape
    error = (found.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6)
    assert error <= RELATIVE[dtype], f"relative error {error:.2e}"  # NaN is not less


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, tensors that `torch.empty` gives are full of NaN, or of large integers: what is not written shows."""

    def poison(tensor: Tensor) -> Tensor:
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 0x3F3F3F3F)

    empty, empty_like = torch.empty, torch.empty_like
    with (
        mock.patch.object(torch, "empty", lambda *sizes, **kwargs: poison(empty(*sizes, **kwargs))),
        mock.patch.object(torch, "empty_like", lambda *given, **kwargs: poison(empty_like(*given, **kwargs))),
    ):
        yield


def to_device(
    made: tuple[Tensor, Tensor, Tensor, Batch, LayerCache], device: str
) -> tuple[Tensor, Tensor, Tensor, Batch, LayerCache]:
    """What `make_batch` made, on a device."""
    q, k, v, batch, cache = made
    names = ("tokens", "positions", "query_start", "kv_len", "block_table", "cache_slot")
    moved = {name: getattr(batch, name).to(device) for name in names if getattr(batch, name) is not None}
    return (
        q.to(device),
        k.to(device),
        v.to(device),
        replace(batch, **moved),
        LayerCache(cache.k.to(device), cache.v.to(device)),
    )


def site_group(d_in: int, outs: Sequence[int]) -> SiteGroup:
    sites = tuple(Site(i, 0, "qkv"[i], d_in, d_out) for i, d_out in enumerate(outs))
    return SiteGroup(sites, tuple(sum(outs[:i]) for i in range(len(outs))))


def make_slab(ranks: Sequence[Sequence[int]], group: SiteGroup, dtype: torch.dtype, generator: torch.Generator) -> Slab:
    """Adapter h has rank `ranks[h][i]` at site i. Rows are padded with NaN, which nothing may read."""
    parts: list[Tensor] = []
    table = torch.zeros(len(ranks), len(group.sites), 5, dtype=torch.int64)
    used = 0
    for handle, of_sites in enumerate(ranks):
        for site, rank in zip(group.sites, of_sites, strict=True):
            if rank == 0:
                continue
            places = []
            for width in (site.d_in, site.d_out):
                stride = -(-width // 32) * 32 + 32
                matrix = torch.full((rank, stride), float("nan"))
                matrix[:, :width] = torch.randn(rank, width, generator=generator) / width**0.5
                places.append((used, stride))
                parts.append(matrix.flatten())
                used += matrix.numel()
            (a, stride_a), (b, stride_b) = places
            table[handle, site.index] = torch.tensor([a, b, stride_a, stride_b, rank])
    data = torch.cat(parts) if parts else torch.zeros(1)
    return Slab(data.to(dtype), table, torch.rand(len(ranks), len(group.sites), generator=generator) * 4 + 0.5)


def make_segments(lengths: Sequence[int], total: int, contiguous: bool, generator: torch.Generator) -> Segments:
    """One segment an adapter, over `total` rows of which some stay without one."""
    count = sum(lengths)
    start = [0]
    for length in lengths:
        start.append(start[-1] + length)
    rows = torch.arange(count) if contiguous else torch.randperm(total, generator=generator)[:count]
    return Segments(rows, start, list(range(len(lengths))), contiguous)


def make_batch(
    sequences: Sequence[tuple[int, int]],
    heads: tuple[int, int, int],
    block_size: int,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor, Batch, LayerCache]:
    """(q, k, v, batch, cache) of sequences (new tokens, kv_len); `heads` is (heads, kv_heads, head_dim).

    q, k and v are slices of one product, as the decoder makes them.
    """
    n_heads, kv_heads, head_dim = heads
    total = sum(new for new, _ in sequences)
    needed = [-(-length // block_size) for _, length in sequences]
    order = torch.randperm(sum(needed) + 3, generator=generator).int()
    blocks = torch.full((len(sequences), max(needed)), int(order[-1]), dtype=torch.int32)
    shape = (len(order), block_size, kv_heads, head_dim)
    cache = LayerCache(torch.full(shape, float("nan"), dtype=dtype), torch.full(shape, float("nan"), dtype=dtype))
    bounds, slots, used = [0], [], 0
    for b, (new, length) in enumerate(sequences):
        blocks[b, : needed[b]] = order[used : used + needed[b]]
        used += needed[b]
        bounds.append(bounds[-1] + new)
        at = torch.arange(length)
        slot = blocks[b, at // block_size].long() * block_size + at % block_size
        for side in (cache.k, cache.v):
            old = torch.randn(length - new, kv_heads, head_dim, generator=generator).to(dtype)
            side.view(-1, kv_heads, head_dim)[slot[: length - new]] = old
        slots.append(slot[length - new :])
    qkv = torch.randn(total, (n_heads + 2 * kv_heads) * head_dim, generator=generator).to(dtype)
    parts = qkv.split((n_heads * head_dim, kv_heads * head_dim, kv_heads * head_dim), dim=-1)
    q, k, v = (part.unflatten(-1, (-1, head_dim)) for part in parts)
    batch = Batch(
        tokens=torch.zeros(total, dtype=torch.int64),
        positions=torch.cat([torch.arange(length - new, length) for new, length in sequences]),
        query_start=torch.tensor(bounds, dtype=torch.int32),
        kv_len=torch.tensor([length for _, length in sequences], dtype=torch.int32),
        max_query=max(new for new, _ in sequences),
        max_kv=max(length for _, length in sequences),
        block_table=blocks,
        cache_slot=torch.cat(slots),
    )
    return q, k, v, batch, cache
