"""The processes that hold one model together, as each of them sees the others: sums and gathers of tensors."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

log = logging.getLogger(__name__)

JOIN = timedelta(minutes=10)  # that a rank waits for the slowest one, which may still be compiling kernels
LEAVE = 10.0  # seconds that taking the group apart may last


class Ranks:
    """Rank `rank` of `count`, all on this machine; returns when all have come to `meeting`, a path that nobody else
    can read and that does not exist before. On GPUs over NCCL, each rank on its own, else over gloo.

    Every rank makes the same calls in the same order. Raises RuntimeError where another one is gone. On GPUs calls may
    be captured into CUDA graphs: by all ranks at the same places, and all replay the graphs of one capture together.
    Whoever captures says with `before_leaving` how its graphs are destroyed.
    """

    def __init__(self, rank: int, count: int, meeting: Path, device: torch.device | str = "cpu") -> None:
        self.rank, self.count = rank, count
        on_gpu = torch.device(device).type == "cuda"
        if sys.platform == "linux":  # nobody else on the network is part of it
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            init_method=f"file://{meeting}",
            rank=rank,
            world_size=count,
            timeout=JOIN,
            device_id=torch.device("cuda", torch.cuda.current_device()) if on_gpu else None,
        )
        self._widens = not on_gpu
        self._destroys: list[Callable[[], None]] = []
        self._aborting: threading.Thread | None = None
        self._lock = threading.Lock()

    def sum(self, x: Tensor) -> Tensor:
        """x of all ranks, added up; the memory of x may be used for it. On a CPU bf16 is added in fp32."""
        if self._widens and x.dtype == torch.bfloat16:
            return self.sum(x.float()).to(x.dtype)
        x = x.contiguous()
        dist.all_reduce(x)
        return x

    def gather(self, x: Tensor, total: int) -> Tensor:
        """x [L, part] of all ranks side by side, [L, total], on every rank. Parts are as `Shard.head` has them."""
        width = -(-total // self.count)
        if x.shape[1] < width:
            x = torch.nn.functional.pad(x, (0, width - x.shape[1]))
        by_rank = x.new_empty((self.count, x.shape[0], width))
        dist.all_gather(list(by_rank), x.contiguous())
        if total == self.count * width:
            return by_rank.movedim(0, 1).reshape(x.shape[0], total)
        ends = [total * rank // self.count for rank in range(self.count + 1)]
        return torch.cat([part[:, : ends[i + 1] - ends[i]] for i, part in enumerate(by_rank)], dim=1)

    def share(self, x: Tensor) -> None:
        """Put what rank 0 has in x into x on every rank."""
        dist.broadcast(x, 0)

    def before_leaving(self, destroy: Callable[[], None]) -> None:
        """Call `destroy` when the group is taken apart. NCCL gives up no communicator before the last graph that it was
        captured in is destroyed, and waits for that."""
        self._destroys.append(destroy)

    def abort(self) -> None:
        """Give up what is under way, from any thread: whoever waits for a rank that is gone gets an error, or what was
        never computed. Returns at once; the rest goes on beside, until there are no graphs any more."""
        with self._lock:
            if self._aborting is None and dist.is_initialized() and (group := dist.group.WORLD) is not None:
                self._aborting = threading.Thread(target=_abort, args=(group,), name="abort of ranks", daemon=True)
                self._aborting.start()

    def leave(self) -> None:
        """The others may be gone already, in the middle of a graph too."""
        self.abort()  # before graphs are destroyed: one that waits for a rank that is gone would not end
        while self._destroys:
            self._destroys.pop()()
        if self._aborting is not None:
            self._aborting.join(LEAVE)
            if self._aborting.is_alive():
                log.warning("the ranks' communicator is still busy after %g s and is left to the process's end", LEAVE)
                return
        if dist.is_initialized():
            dist.destroy_process_group()


def _abort(group: dist.ProcessGroup) -> None:
    try:
        group.abort()
    except RuntimeError as error:  # of operations that are given up
        log.debug("the ranks' group was aborted: %s", error)
