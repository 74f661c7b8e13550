"""What stands in for a GPU's graphs on a CPU: a replay is the step itself. Also as a rank that follows."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lorikeet import kernels
from lorikeet.kernels.batch import Batch, LayerCache, Segments, Slab
from lorikeet.kernels.gpu_graphs import DecodeGraphs
from lorikeet.kernels.reference import Forward, ReferenceOps

Tensor = torch.Tensor
LOGS = "LORIKEET_TEST_GRAPHS"  # the folder where each rank says what it captures and replays
UNREADABLE = "LORIKEET_TEST_UNREADABLE"  # the stem of an adapter's file that ranks that follow cannot read at first


class HostSegments:
    """What `DeviceSegments` is for kernels that read lists."""

    def __init__(self, slab: Slab, rows: int, max_rank: int) -> None:
        self._held = Segments(torch.zeros(rows, dtype=torch.int64), [0], [], False)

    def segments(self) -> Segments:
        return self._held

    def fill(self, segments: Segments | None) -> None:
        held = self._held
        held.start[:], held.adapter[:] = ([0], []) if segments is None else (segments.start, segments.adapter)
        if segments is not None:
            held.rows[: len(segments.rows)] = segments.rows


def again(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """A replay is the step itself, its result where it was at first."""
    logits = step().clone()

    def replay() -> None:
        logits.copy_(step())

    return replay, logits


class LoggedOps(ReferenceOps):
    """Decode steps run as graphs would: a capture computes the step twice beforehand, sums over all ranks included."""

    spare_blocks = 1

    def prepare(self, forward: Forward, slab: Slab, cache: Sequence[LayerCache], rows: int) -> Any:
        path = Path(os.environ[LOGS], f"rank-{0 if self.ranks is None else self.ranks.rank}")
        scales = [(layer.k_scale.tolist(), layer.v_scale.tolist()) for layer in cache if layer.k_scale is not None]
        path.with_suffix(".scales").write_text(repr(scales))

        def log(said: object) -> None:
            with path.open("a") as file:
                file.write(f"{said}\n")

        def capture(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
            log("capture")
            step()
            step()
            return again(step)

        graphs = DecodeGraphs(super().prepare(forward, slab, cache, rows), slab, cache, rows, capture, HostSegments)

        def run(batch: Batch) -> Tensor:
            log(graphs.kind(batch))
            return graphs(batch)

        return run


def follow() -> None:
    """`follower.main` with these kernels."""
    from lorikeet.engine import follower

    kernels.pick = lambda device: LoggedOps()
    unread, open_compiled = [os.environ.get(UNREADABLE)], follower.open_compiled

    def open_later(path: Path, **rank: int) -> Any:
        if path.stem in unread:
            unread.clear()
            raise OSError("the disk of this rank has a hiccup")
        return open_compiled(path, **rank)

    follower.open_compiled = open_later
    follower.main()
