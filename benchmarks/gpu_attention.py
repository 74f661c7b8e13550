"""How fast is paged attention on a GPU, against the bytes it must read, the products it must do, and torch's own?

    python benchmarks/gpu_attention.py [--heads 32 8 128] [--fp8] [--heads-first] [--tune]

The heads are those of Llama-3.1-8B. Each figure is one layer's attention within a captured graph of several layers,
each with a cache of its own, so that nothing is found in the L2 cache that a real step would not find there. Floors
are the bytes at the bandwidth of a large copy, and the operations at the rate of a large bf16 product, both measured in
the same run; torch is its scaled_dot_product_attention over keys that lie contiguously. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorikeet.kernels.batch import Batch, LayerCache

BLOCK = 16
DECODE = [(batch, length) for batch in (1, 4, 16, 64, 256) for length in (512, 2048, 8192)]
PREFILL = [(512, 512), (2048, 2048), (4096, 4096), (512, 4096)]  # new tokens, all
TUNED = {
    "decode": {"short_keys": (32, 64, 128), "short_warps": (2, 4, 8), "short_stages": (2, 3, 4),
               "piece_keys": (128, 256, 512), "pieces_per_processor": (2, 4, 8)},
    "prefill": {"long_rows": (64, 128), "long_keys": (32, 64, 128), "long_warps": (4, 8), "long_stages": (2, 3, 4)},
}  # fmt: skip


@dataclass(frozen=True)
class Machine:
    bandwidth: float  # bytes a second, read plus written
    rate: float  # operations a second


@dataclass
class Case:
    """Sequences of `new` queries on `length` keys, `batch` of them; a cache for each of several layers."""

    batch: int
    new: int
    length: int
    heads: tuple[int, int, int]
    fp8: bool
    heads_first: bool

    def __post_init__(self) -> None:
        n_heads, kv_heads, d = self.heads
        blocks = -(-self.length // BLOCK)
        tokens, count = self.batch * self.new, self.batch * blocks
        self.layers = max(2, min(32, (1 << 29) // max(self.bytes, 1)))
        gpu: dict[str, Any] = {"device": "cuda"}
        table = torch.randperm(count, **gpu).int().view(self.batch, blocks)
        at = torch.arange(self.length - self.new, self.length, **gpu)
        slots = table[:, at // BLOCK].long() * BLOCK + at % BLOCK
        short = {"dtype": torch.int32, **gpu}
        self.batch_tensors = Batch(
            tokens=torch.zeros(tokens, dtype=torch.int64, **gpu), positions=at.repeat(self.batch),
            query_start=torch.arange(0, tokens + 1, self.new, **short),
            kv_len=torch.full((self.batch,), self.length, **short), max_query=self.new, max_kv=self.length,
            block_table=table, cache_slot=slots.flatten(),
        )  # fmt: skip
        self.q, self.k, self.v = (
            torch.randn(tokens, n, d, dtype=torch.bfloat16, **gpu) for n in (n_heads, kv_heads, kv_heads)
        )
        self.caches = [LayerCache(self._side(count), self._side(count), *self._scales()) for _ in range(self.layers)]

    def _side(self, count: int) -> Tensor:
        _, kv_heads, d = self.heads
        shape = (count, kv_heads, BLOCK, d) if self.heads_first else (count, BLOCK, kv_heads, d)
        side = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
        side = side.to(torch.float8_e4m3fn) if self.fp8 else side
        return side.transpose(1, 2) if self.heads_first else side

    def _scales(self) -> tuple[Tensor | None, Tensor | None]:
        ones = torch.ones(self.heads[1], device="cuda")
        return (ones, ones) if self.fp8 else (None, None)

    @property
    def bytes(self) -> int:
        """That one layer must move: its keys and values, q and the result."""
        n_heads, kv_heads, d = self.heads
        cache = 2 * self.batch * self.length * kv_heads * d * (1 if self.fp8 else 2)
        return cache + 4 * self.batch * self.new * n_heads * d

    @property
    def operations(self) -> int:
        n_heads, _, d = self.heads
        seen = self.new * self.length - self.new * (self.new - 1) // 2
        return 4 * self.batch * n_heads * d * seen

    def floor(self, machine: Machine) -> float:
        return max(self.bytes / machine.bandwidth, self.operations / machine.rate)


def milliseconds(step: Callable[[], object], layers: int, repeats: int = 20) -> float:
    """Of one layer: the median of replays of a graph of all of them, with events around each."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    times = []
    for i in range(repeats + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if i >= 3:
            times.append(begin.elapsed_time(end) / layers)
    return statistics.median(times)


def ours(case: Case, **sizes: int) -> float:
    from lorikeet.kernels.gpu_attention import AttentionWork, Tuning, attention

    def step() -> None:
        work = AttentionWork(case.batch_tensors, case.heads, None, Tuning(**sizes))
        for cache in case.caches:
            attention(case.q, case.k, case.v, work, cache)

    return milliseconds(step, case.layers)


def torchs(case: Case) -> float | None:
    """Of the same shape, the keys contiguous; None where torch would have to be told which keys each query sees."""
    n_heads, kv_heads, d = case.heads
    if 1 < case.new < case.length:
        return None
    gpu: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
    q = torch.randn(case.batch, n_heads, case.new, d, **gpu)
    sides = [[torch.randn(case.batch, kv_heads, case.length, d, **gpu) for _ in range(2)] for _ in range(case.layers)]

    def step() -> None:
        for k, v in sides:
            F.scaled_dot_product_attention(q, k, v, is_causal=case.new > 1, enable_gqa=True)

    return milliseconds(step, case.layers)


def measure_machine() -> Machine:
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    copying = milliseconds(lambda: target.copy_(source), 1)
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    multiplying = milliseconds(lambda: a @ b, 1)
    return Machine(2 * source.numel() / copying * 1e3, 2 * 8192**3 / multiplying * 1e3)


def show(kind: str, case: Case, machine: Machine) -> dict[str, Any]:
    found, peer, floor = ours(case), torchs(case), case.floor(machine) * 1e3
    name = f"{kind}, {case.batch} x {case.new} queries on {case.length} keys{', fp8' if case.fp8 else ''}"
    result = {
        "case": name, "us": found * 1e3, "torch_us": None if peer is None else peer * 1e3, "floor_us": floor * 1e3,
        "gb_s": case.bytes / found / 1e6, "tflops": case.operations / found / 1e9, "of_floor": floor / found,
    }  # fmt: skip
    theirs = "-" if peer is None else f"{peer * 1e3:.1f}"
    print(
        f"{name:52} {found * 1e3:9.1f} {theirs:>9} {floor * 1e3:9.1f} {floor / found:8.0%} "
        f"{result['gb_s']:8.0f} {result['tflops']:8.1f}"
    )
    return result


def tune(kind: str, case: Case) -> None:
    """Print the fastest sizes for a case. Those that do not fit the device are left out."""
    names, choices = list(TUNED[kind]), TUNED[kind].values()
    times = []
    for sizes in itertools.product(*choices):
        chosen = dict(zip(names, sizes, strict=True))
        try:
            times.append((ours(case, **chosen), chosen))
        except Exception as reason:  # too much shared memory, too many registers: the compiler says which
            print(f"left out {chosen}: {type(reason).__name__}")
    for found, chosen in sorted(times, key=lambda one: one[0])[:5]:
        print(f"{kind} {case.batch} x {case.new} on {case.length}: {found * 1e3:.1f} us with {chosen}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, nargs=3, default=(32, 8, 128), metavar=("HEADS", "KV_HEADS", "HEAD_DIM"))
    parser.add_argument("--fp8", action="store_true", help="the cache in fp8 as well")
    parser.add_argument("--heads-first", action="store_true", help="a block's slots of one head side by side")
    parser.add_argument("--tune", action="store_true", help="search for the sizes of tiles instead")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(f"this measures a CUDA device, and torch {torch.__version__} finds none here")
    torch.manual_seed(0)
    heads = tuple(options.heads)

    def case(batch: int, new: int, length: int, fp8: bool = False) -> Case:
        return Case(batch, new, length, heads, fp8, options.heads_first)

    if options.tune:
        for batch, length in ((1, 8192), (64, 2048), (256, 512)):
            tune("decode", case(batch, 1, length))
        tune("prefill", case(1, 4096, 4096))
        return
    machine = measure_machine()
    print(
        f"{torch.cuda.get_device_name()}: copies {machine.bandwidth / 1e9:.0f} GB/s, "
        f"multiplies {machine.rate / 1e12:.0f} TFLOP/s in bf16"
    )
    columns = ("us", "torch us", "floor us", "of floor", "GB/s", "TFLOP/s")
    print(
        f"{'one layer':52} {columns[0]:>9} {columns[1]:>9} {columns[2]:>9} {columns[3]:>8} {columns[4]:>8} {columns[5]}"
    )
    results = []
    for fp8 in (False, True) if options.fp8 else (False,):
        results += [show("decode", case(batch, 1, length, fp8), machine) for batch, length in DECODE]
        results += [show("prefill", case(1, new, length, fp8), machine) for new, length in PREFILL]
    print(json.dumps({**{f.name: getattr(machine, f.name) for f in fields(machine)}, "cases": results}))


if __name__ == "__main__":
    main()
