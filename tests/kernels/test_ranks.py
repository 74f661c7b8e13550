"""Sums and gathers over the processes of a model: parts of unequal size, rounding, and inside a CUDA graph.

What several processes make of them is in tests/engine/test_parallel.py.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from lorikeet.kernels import ranks as ranks_module
from lorikeet.kernels.gpu_graphs import CudaCapture
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


class Communicator:
    """As NCCL: what is under way ends at once, the rest not before the last graph is destroyed."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.aborted, self.graphless = threading.Event(), threading.Event()

    def abort(self) -> None:
        self.log.append("aborted")
        self.aborted.set()
        assert self.graphless.wait(30)
        self.log.append("given up")

    def destroy_graphs(self) -> None:
        assert self.aborted.wait(30), "a graph that waits for a lost rank never ends"
        self.log.append("graphs destroyed")
        self.graphless.set()


@pytest.fixture
def communicator(monkeypatch: pytest.MonkeyPatch) -> Communicator:
    """What `Ranks` on GPUs would meet in."""
    one = Communicator()
    fake = SimpleNamespace(
        init_process_group=lambda *_, **__: None,
        is_initialized=lambda: True,
        group=SimpleNamespace(WORLD=one),
        destroy_process_group=lambda: one.log.append("destroyed"),
    )
    monkeypatch.setattr(ranks_module, "dist", fake)
    return one


def test_graphs_go_before_the_communicator(communicator: Communicator, tmp_path: Path) -> None:
    ranks = Ranks(0, 2, tmp_path / "meeting")
    ranks.before_leaving(communicator.destroy_graphs)
    ranks.leave()
    assert communicator.log == ["aborted", "graphs destroyed", "given up", "destroyed"]


def test_a_lost_rank_is_given_up_at_once(communicator: Communicator, tmp_path: Path) -> None:
    """By a thread that watches, which must not wait for whoever holds the graphs."""
    ranks = Ranks(0, 2, tmp_path / "meeting")
    ranks.before_leaving(communicator.destroy_graphs)
    ranks.abort()
    ranks.abort()
    assert communicator.aborted.wait(30) and communicator.log == ["aborted"]
    ranks.leave()
    assert communicator.log == ["aborted", "graphs destroyed", "given up", "destroyed"]


def test_what_does_not_end_is_left_behind(
    communicator: Communicator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ranks_module, "LEAVE", 0.01)
    ranks = Ranks(0, 2, tmp_path / "meeting")
    ranks.leave()
    assert "still busy after 0.01 s" in caplog.text and "destroyed" not in communicator.log
    communicator.destroy_graphs()


@pytest.mark.gpu
def test_nccl_goes_with_graphs_that_somebody_holds(tmp_path: Path) -> None:
    with alone(tmp_path / "meeting", "cuda") as ranks:
        x = torch.ones(4, 64, device="cuda")
        capture = CudaCapture()
        ranks.before_leaving(capture.destroy)
        replays = [capture(lambda: ranks.gather(ranks.sum(x), 64) + 1) for _ in range(2)]
        for replay, found in replays:
            replay()
            assert found.eq(2).all()
    with pytest.raises(RuntimeError):
        replays[0][0]()


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
