"""Sums and gathers over the processes of a model: parts of unequal size, rounding, and inside a CUDA graph.

What several processes make of them is in tests/engine/test_parallel.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lorikeet.kernels.ranks import Ranks
from lorikeet.model.shard import Shard
from lorikeet.model.spec import ModelSpec


@contextmanager
def alone(meeting: Path, device: str) -> Iterator[Ranks]:
    ranks = Ranks(0, 1, meeting, device)
    try:
        yield ranks
    finally:
        ranks.leave()
        assert not dist.is_initialized()


@pytest.mark.parametrize(("tokens", "count"), [(61, 4), (64, 4), (9, 8), (8, 8)])
def test_parts_of_unequal_size_are_put_side_by_side(tokens: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ModelSpec(
        family="llama", vocab_size=tokens, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=8,
        num_kv_heads=8, head_dim=2, max_context=8,
    )  # fmt: skip
    whole = torch.randn(3, tokens)
    parts = [whole[:, Shard(spec, rank, count).head] for rank in range(count)]

    def all_gather(places: list[torch.Tensor], mine: torch.Tensor) -> None:
        for place, part in zip(places, parts, strict=True):
            assert place.shape == mine.shape
            place.fill_(torch.nan)
            place[:, : part.shape[1]] = part

    monkeypatch.setattr(dist, "all_gather", all_gather)
    ranks = Ranks.__new__(Ranks)
    for ranks.rank in range(count):
        ranks.count = count
        assert torch.equal(ranks.gather(parts[ranks.rank], tokens), whole)


def test_one_rank_is_a_group_too(tmp_path: Path) -> None:
    with alone(tmp_path / "meeting", "cpu") as ranks:
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(4, 6).to(dtype)
            assert torch.equal(ranks.sum(x.clone()), x) and ranks.sum(x.clone()).dtype == dtype
            assert torch.equal(ranks.sum(x.t()), x.t())  # rows that do not lie dense
        x = torch.arange(5)
        ranks.share(x)
        assert x.tolist() == [0, 1, 2, 3, 4]
        assert torch.equal(ranks.gather(torch.eye(3), 3), torch.eye(3))
    with alone(tmp_path / "another", "cpu"):  # the group before it is gone
        pass


@pytest.mark.gpu
def test_nccl_inside_a_graph(tmp_path: Path) -> None:
    with alone(tmp_path / "meeting", "cuda") as ranks:
        x = torch.randn(4, 64, device="cuda", dtype=torch.bfloat16)
        place = x.clone()
        ranks.gather(ranks.sum(place), 64)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = ranks.gather(ranks.sum(place) * 2, 64)
            ranks.share(place)
        for _ in range(3):
            x = torch.randn(4, 64, device="cuda", dtype=torch.bfloat16)
            place.copy_(x)
            graph.replay()
            assert torch.equal(found, x * 2)
        del graph
