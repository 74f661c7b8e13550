"""The processes that hold one model together, as each of them sees the others: sums and gathers of tensors."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

JOIN = timedelta(minutes=10)  # that a rank waits for the slowest one, which may still be compiling kernels


class Ranks:
    """Rank `rank` of `count`, all on this machine; returns when all have come to `meeting`, a path that nobody else
    can read and that does not exist before. On GPUs over NCCL, each rank on its own, else over gloo.

    Every rank makes the same calls in the same order. Raises RuntimeError where another one is gone.
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

    def abort(self) -> None:
        """Give up what is under way, from any thread: whoever waits for a rank that is gone gets an error."""
        if dist.is_initialized() and dist.group.WORLD is not None:
            dist.group.WORLD.abort()

    def leave(self) -> None:
        """The others may be gone already."""
        self.abort()
        if dist.is_initialized():
            dist.destroy_process_group()
