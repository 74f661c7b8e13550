"""How fast are the CPU kernels of a decode step, against plain torch and against this machine's own floor?

    python benchmarks/kernels.py [--hidden 896] [--rounds 15]

Each round times every contender once, in turn, so that a busy machine slows all of them. The floor is the time that
the bytes and the arithmetic of a kernel take at the read bandwidth and at the float32 rate of dot products measured in
the same rounds; small inputs that stay in the cache may beat it. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from lorikeet.kernels.batch import Batch, LayerCache, Segments, Slab
from lorikeet.kernels.cpu import CpuOps
from lorikeet.kernels.reference import ReferenceOps
from lorikeet.kernels.weight import DenseWeight, pack
from lorikeet.types import Site, SiteGroup

DTYPE = torch.bfloat16
Case = tuple[str, Callable[[], object], Callable[[], object], int, int]  # name, ours, torch's, bytes, operations


def lowrank_case(ops: CpuOps, reference: ReferenceOps, rows: int, hidden: int, rank: int) -> Case:
    """q, k, v of `rows` rows on as many adapters: A and B read once, x and y beside them."""
    outs = (hidden, hidden // 4, hidden // 4)
    sites = tuple(Site(i, 0, role, hidden, out) for i, (role, out) in enumerate(zip("qkv", outs, strict=True)))
    group = SiteGroup(sites, (0, outs[0], outs[0] + outs[1]))
    table, used = torch.zeros(rows, 3, 5, dtype=torch.int64), 0
    for handle in range(rows):
        for site in sites:
            table[handle, site.index] = torch.tensor([used, used + rank * hidden, hidden, site.d_out, rank])
            used += rank * (hidden + site.d_out)
    slab = Slab(torch.randn(used).to(DTYPE), table, torch.ones(rows, 3))
    segments = Segments(torch.arange(rows), list(range(rows + 1)), list(range(rows)), True)
    x, y = torch.randn(rows, hidden).to(DTYPE), torch.zeros(rows, group.d_out, dtype=DTYPE)
    return (
        f"lowrank qkv, {rows} rows on {rows} adapters, rank {rank}",
        lambda: ops.lowrank_add(y, x, slab, group, segments),
        lambda: reference.lowrank_add(y, x, slab, group, segments),
        2 * used + 2 * (x.numel() + 2 * y.numel()),
        2 * used,
    )


def attention_case(ops: CpuOps, reference: ReferenceOps, rows: int, heads: int, kv_heads: int, length: int) -> Case:
    """`rows` sequences of `length` keys, one query each, head size 64."""
    blocks = -(-length // 16)
    table = torch.randperm(rows * blocks).int().view(rows, blocks)
    cache = LayerCache(*(torch.randn(rows * blocks, 16, kv_heads, 64).to(DTYPE) for _ in range(2)))
    slot = table[:, (length - 1) // 16].long() * 16 + (length - 1) % 16
    zeros, start = torch.zeros(rows, dtype=torch.int64), torch.arange(rows + 1, dtype=torch.int32)
    batch = Batch(zeros, zeros, start, torch.full((rows,), length, dtype=torch.int32), 1, length, table, slot)
    q, k, v = (torch.randn(rows, n, 64).to(DTYPE) for n in (heads, kv_heads, kv_heads))
    return (
        f"attention, {rows} rows of {length} keys, {heads} heads on {kv_heads}",
        lambda: ops.attention(q, k, v, batch, cache, None),
        lambda: reference.attention(q, k, v, batch, cache, None),
        2 * 2 * rows * length * kv_heads * 64,
        4 * rows * length * heads * 64,
    )


def row_cases(ops: CpuOps, reference: ReferenceOps, rows: int, hidden: int, vocabulary: int) -> list[Case]:
    x, residual = torch.randn(rows, hidden).to(DTYPE), torch.randn(rows, hidden).to(DTYPE)
    norm, gate_up = torch.ones(hidden, dtype=DTYPE), torch.randn(rows, 8 * hidden).to(DTYPE)
    matrix = torch.randn(8 * hidden, hidden).to(DTYPE)
    packed, plain, head = pack(matrix), DenseWeight(matrix), DenseWeight(torch.randn(vocabulary, hidden).to(DTYPE))
    return [
        (
            f"add + RMSNorm, {rows} rows",
            lambda: ops.add_rms_norm(x, residual, norm, 1e-5),
            lambda: reference.add_rms_norm(x, residual, norm, 1e-5),
            8 * x.numel(),
            4 * x.numel(),
        ),
        (
            f"gated activation, {rows} rows",
            lambda: ops.silu_mul(gate_up),
            lambda: reference.silu_mul(gate_up),
            3 * gate_up.numel(),
            12 * gate_up.numel(),
        ),
        (
            f"linear {hidden} x {8 * hidden}, {rows} rows (packed, plain)",
            lambda: ops.linear(packed, x),
            lambda: reference.linear(plain, x),
            2 * matrix.numel(),
            0,
        ),
        (
            f"logits {hidden} x {vocabulary}, {rows} rows",
            lambda: ops.logits(head, x),
            lambda: reference.logits(head, x),
            2 * vocabulary * hidden,
            2 * rows * vocabulary * hidden,
        ),
    ]


def seconds(function: Callable[[], object]) -> float:
    """Of one call, over enough calls to fill two milliseconds."""
    function()
    calls, begun = 0, time.perf_counter()
    while (spent := time.perf_counter() - begun) < 2e-3:
        function()
        calls += 1
    return spent / calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=320)
    parser.add_argument("--vocabulary", type=int, default=6144)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.manual_seed(0)
    ops, reference = CpuOps(), ReferenceOps()
    heads = options.hidden // 64
    cases = [
        lowrank_case(ops, reference, 32, options.hidden, 16),
        attention_case(ops, reference, 32, heads, heads, 256),
    ]
    cases += row_cases(ops, reference, 32, options.hidden, options.vocabulary)
    stream, square = torch.ones(1 << 26), DenseWeight(torch.randn(2048, 512))
    x = torch.randn(256, 512)
    times: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        times.setdefault("stream", []).append(seconds(lambda: stream.sum()))
        times.setdefault("square", []).append(seconds(lambda: ops.logits(square, x)))
        for name, ours, theirs, _, _ in cases:
            times.setdefault(name, []).append(seconds(ours))
            times.setdefault(f"torch {name}", []).append(seconds(theirs))
    bandwidth = 4 * stream.numel() / min(times["stream"])
    rate = 2 * 256 * 2048 * 512 / min(times["square"])
    print(f"read bandwidth {bandwidth / 1e9:.1f} GB/s, float32 dot products {rate / 1e9:.0f} GFLOP/s")
    print(f"{'kernel':58} {'ours us':>9} {'torch us':>9} {'faster':>7} {'floor us':>9}")
    results = []
    for name, _, _, read, operations in cases:
        ours, theirs = min(times[name]), min(times[f"torch {name}"])
        ratio = statistics.median(b / a for a, b in zip(times[name], times[f"torch {name}"], strict=True))
        floor = max(read / bandwidth, operations / rate)
        print(f"{name:58} {ours * 1e6:9.1f} {theirs * 1e6:9.1f} {ratio:6.1f}x {floor * 1e6:9.1f}")
        results.append(
            {"kernel": name, "us": ours * 1e6, "torch_us": theirs * 1e6, "faster": ratio, "floor_us": floor * 1e6}
        )
    print(json.dumps({"read_gb_s": bandwidth / 1e9, "gflops": rate / 1e9, "kernels": results}))


if __name__ == "__main__":
    main()
