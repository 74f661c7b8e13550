"""How near are the low-rank kernels of a GPU to its floor, at the shapes of an 8B Llama?

    python benchmarks/gpu_kernels.py [--products qkv o gate_up down] [--rows 1 8 32 64 256 2048]
        [--adapters 1 32 64] [--ranks 8 16 32 64] [--repeats 20] [--early] [--sweep]

A case is one product of a layer: so many rows, dealt evenly to so many adapters, whose ranks take turns. Its kernels
are captured into one CUDA graph over as many layers as do not fit into the L2 cache, behind a write that empties it;
the time is that of a replay by CUDA events, divided by the layers: the median of the repeats. The floor is what reading
x, A and B, and reading and writing y, takes at the bandwidth of a copy, or the arithmetic at the rate of a large bf16
product, whichever is longer: both measured in the same run. Beside it stand the base's product and the two together.
`--early` also measures with launches that begin before the kernel in front has ended, `--sweep` other block sizes.
Results are checked against fp64 first. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import Any

import torch

from lorikeet.kernels.batch import DeviceTable, Segments, Slab
from lorikeet.kernels.gpu_tables import LONGEST_DECODE, tables_of
from lorikeet.types import Site, SiteGroup

PRODUCTS = {
    "qkv": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "gate_up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
}
DTYPE = torch.bfloat16
DEVICE = "cuda"
LAYERS = 256  # of a graph, at most
TOLERANCE = 1e-2


@dataclass(frozen=True)
class Case:
    """`rows` rows dealt to `adapters` adapters; `ranks[h]` is that of adapter h at all sites of the product."""

    product: str
    rows: int
    adapters: int
    ranks: tuple[int, ...]

    @property
    def d_in(self) -> int:
        return PRODUCTS[self.product][0]

    @property
    def outs(self) -> tuple[int, ...]:
        return PRODUCTS[self.product][1]

    @property
    def lengths(self) -> list[int]:
        return [self.rows // self.adapters + (h < self.rows % self.adapters) for h in range(self.adapters)]

    @property
    def width(self) -> int:
        """Elements that a rank has over all sites, and multiplications of a row with it."""
        return self.d_in * len(self.outs) + sum(self.outs)

    @property
    def slab_bytes(self) -> int:
        return sum(self.ranks) * self.width * DTYPE.itemsize

    @property
    def bytes(self) -> int:
        """A and B and x read once, y read and written."""
        return self.slab_bytes + self.rows * (self.d_in + 2 * sum(self.outs)) * DTYPE.itemsize

    @property
    def operations(self) -> int:
        return 2 * self.width * sum(rank * n for rank, n in zip(self.ranks, self.lengths, strict=True))

    def layers(self, cache: int) -> int:
        """How many take four times the cache."""
        return max(2, min(LAYERS, -(-4 * cache // self.bytes)))


@dataclass
class Figure:
    """Times in microseconds, of one layer. `share` is floor by time."""

    product: str
    rows: int
    adapters: int
    lowrank: float
    floor: float
    bound: str
    base: float
    together: float
    early: float | None = None
    error: float = 0.0
    share: float = field(init=False)

    def __post_init__(self) -> None:
        self.share = self.floor / self.lowrank


@dataclass(frozen=True)
class Device:
    """What a device does at best: bytes and operations a second, and how many bytes its cache holds."""

    name: str
    bandwidth: float
    rate: float
    cache: int

    def floor(self, case: Case) -> tuple[float, str]:
        """(microseconds, what bounds them)."""
        memory, arithmetic = case.bytes / self.bandwidth, case.operations / self.rate
        return max(memory, arithmetic) * 1e6, "bytes" if memory >= arithmetic else "FLOPs"


def cases(products: Sequence[str], rows: Sequence[int], adapters: Sequence[int], ranks: Sequence[int]) -> list[Case]:
    """Every one that there is: more adapters than rows are as many adapters as rows, and that once."""
    found = {}
    for name, n, count in product(products, rows, adapters):
        distinct = min(n, count)
        found[name, n, distinct] = Case(name, n, distinct, tuple(ranks[h % len(ranks)] for h in range(distinct)))
    return list(found.values())


def header(early: bool) -> str:
    return (
        f"{'product':8} {'rows':>5} {'adapters':>8} {'lowrank us':>10} {'floor us':>9} {'bound':>6} {'of floor':>8}"
        f" {'base us':>8} {'both us':>8}" + (f" {'early us':>9}" if early else "")
    )


def line(f: Figure) -> str:
    return (
        f"{f.product:8} {f.rows:5} {f.adapters:8} {f.lowrank:10.2f} {f.floor:9.2f} {f.bound:>6} {f.share:8.0%}"
        f" {f.base:8.2f} {f.together:8.2f}" + ("" if f.early is None else f" {f.early:9.2f}")
    )


# --- on the device ----------------------------------------------------------------------------------------------------


class Layers:
    """The tensors of one case, `count` layers of them."""

    def __init__(self, case: Case, count: int) -> None:
        self.case, self.count = case, count
        sites = [
            Site(layer * len(case.outs) + i, layer, "site", case.d_in, out)
            for layer in range(count)
            for i, out in enumerate(case.outs)
        ]
        n = len(case.outs)
        offsets = tuple(sum(case.outs[:i]) for i in range(n))
        self.groups = [SiteGroup(tuple(sites[i : i + n]), offsets) for i in range(0, len(sites), n)]
        self.slab = self._slab(sites)
        start = [sum(case.lengths[:h]) for h in range(case.adapters + 1)]
        rows = torch.arange(case.rows, device=DEVICE)
        self.segments = Segments(rows, start, list(range(case.adapters)), True)
        self.x = torch.randn(count, case.rows, case.d_in, dtype=DTYPE, device=DEVICE)
        self.y = torch.randn(count, case.rows, sum(case.outs), dtype=DTYPE, device=DEVICE)
        bases = max(2, min(count, -(-(2**28) // (case.d_in * sum(case.outs) * DTYPE.itemsize))))
        self.base = torch.randn(bases, sum(case.outs), case.d_in, dtype=DTYPE, device=DEVICE) * case.d_in**-0.5

    def _slab(self, sites: Sequence[Site]) -> Slab:
        table, used = torch.zeros(self.case.adapters, len(sites), 5, dtype=torch.int64), 0
        for site in sites:
            for handle, rank in enumerate(self.case.ranks):
                after = used + rank * site.d_in
                table[handle, site.index] = torch.tensor([used, after, site.d_in, site.d_out, rank])
                used = after + rank * site.d_out
        data = torch.empty(used, dtype=DTYPE, device=DEVICE).normal_(std=0.02)
        slab = Slab(data, table, torch.rand(self.case.adapters, len(sites)) + 0.5)
        slab.device = DeviceTable.of(slab)
        return slab

    def lowrank(self) -> None:
        from lorikeet.kernels.gpu_lowrank import lowrank_add

        tables = tables_of(self.segments, self.slab)
        for i, group in enumerate(self.groups):
            lowrank_add(self.y[i], self.x[i], self.slab, group, tables)

    def products(self) -> None:
        for i in range(self.count):
            torch.mm(self.x[i], self.base[i % len(self.base)].T, out=self.y[i])

    def both(self) -> None:
        from lorikeet.kernels.gpu_lowrank import lowrank_add

        tables = tables_of(self.segments, self.slab)
        for i, group in enumerate(self.groups):
            torch.mm(self.x[i], self.base[i % len(self.base)].T, out=self.y[i])
            lowrank_add(self.y[i], self.x[i], self.slab, group, tables)

    def error(self) -> float:
        """Of the first layer, against the reference in fp64: the largest difference by the largest value."""
        from lorikeet.kernels.gpu import GpuOps
        from lorikeet.kernels.reference import ReferenceOps

        y, x, group = self.y[0].clone(), self.x[0], self.groups[0]
        wanted = ReferenceOps().lowrank_add(y.double(), x.double(), self.slab, group, self.segments)
        found = GpuOps().lowrank_add(y, x, self.slab, group, self.segments)
        return float((found.double() - wanted).abs().max() / wanted.abs().max())


def microseconds(work: Callable[[], None], repeats: int) -> float:
    """Of one replay of `work` as a graph, with a cold cache: the median."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    flush = torch.empty(2**28, dtype=torch.uint8, device=DEVICE)
    found = []
    for _ in range(repeats + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(found[2:])


def measure_device(repeats: int) -> Device:
    """Bandwidth of a copy, bytes read and written; rate of a large bf16 product of random numbers."""
    properties = torch.cuda.get_device_properties(0)
    source = torch.empty(2**31, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    copying = microseconds(lambda: target.copy_(source) and None, repeats)
    a, b = (torch.randn(8192, 8192, dtype=DTYPE, device=DEVICE) for _ in range(2))
    c = torch.empty_like(a)
    multiplying = microseconds(lambda: torch.mm(a, b, out=c) and None, repeats)
    return Device(properties.name, 2 * source.numel() / copying * 1e6, 2 * 8192**3 / multiplying * 1e6,
                  properties.L2_cache_size)  # fmt: skip


def measure(case: Case, device: Device, repeats: int, early: bool) -> Figure:
    count = case.layers(device.cache)
    layers = Layers(case, count)
    error = layers.error()
    lowrank, base, together = (
        microseconds(work, repeats) / count for work in (layers.lowrank, layers.products, layers.both)
    )
    figure = Figure(case.product, case.rows, case.adapters, lowrank, *device.floor(case), base, together, error=error)
    if early:
        with settings(EARLY_LAUNCH=True):
            figure.early = microseconds(layers.lowrank, repeats) / count
            figure.error = max(error, layers.error())
    return figure


@contextmanager
def settings(**values: object) -> Iterator[None]:
    """Other constants and plans of `kernels.gpu_lowrank` for a while."""
    from lorikeet.kernels import gpu_lowrank

    before = {name: getattr(gpu_lowrank, name) for name in values}
    try:
        for name, value in values.items():
            setattr(gpu_lowrank, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(gpu_lowrank, name, value)


def variants() -> Iterator[tuple[str, dict[str, object]]]:
    """Other block sizes for decode, one pass changed at a time."""
    from lorikeet.kernels import gpu_lowrank

    shrink, expand = gpu_lowrank.plan_shrink, gpu_lowrank.plan_expand

    def changed(plan: Callable[..., Any], fields: dict[str, int]) -> Callable[..., Any]:
        return lambda *shape: plan(*shape)._replace(**fields)

    def longer(steps: int) -> Callable[..., Any]:
        def plan(tiles: int, block_m: int, sites: int, d_in: int, rank: int, wide: bool) -> Any:
            planned = shrink(tiles, block_m, sites, d_in, rank, wide)
            return planned._replace(steps=steps, splits=-(-d_in // (planned.block_k * steps)))

        return plan

    for steps in (1, 2, 4, 8, 16, 32):
        yield f"shrink {steps} steps", {"plan_shrink": longer(steps)}
    for warps, stages in product((1, 2, 4), (2, 3, 4, 6)):
        yield (
            f"shrink {warps} warps, {stages} stages",
            {"plan_shrink": changed(shrink, {"warps": warps, "stages": stages})},
        )
    for block_n, steps in product((64, 128, 256, 512), (1, 2, 4, 8)):
        yield (
            f"expand {block_n} columns, {steps} steps",
            {"plan_expand": changed(expand, {"block_n": block_n, "steps": steps})},
        )
    for warps, stages in product((2, 4, 8), (2, 3, 4, 6)):
        yield (
            f"expand {warps} warps, {stages} stages",
            {"plan_expand": changed(expand, {"warps": warps, "stages": stages})},
        )


def sweep(case: Case, device: Device, repeats: int) -> dict[str, float]:
    """Microseconds of each variant; decode only."""
    if max(case.lengths) > LONGEST_DECODE:
        return {}
    layers = Layers(case, case.layers(device.cache))
    found = {"as planned": microseconds(layers.lowrank, repeats) / layers.count}
    for name, values in variants():
        with settings(**values):
            found[name] = microseconds(layers.lowrank, repeats) / layers.count
    for name, time in sorted(found.items(), key=lambda item: item[1])[:6]:
        print(f"    {time:8.2f} us  {name}")
    print(f"    {found['as planned']:8.2f} us  as planned", flush=True)
    return found


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--products", nargs="+", choices=list(PRODUCTS), default=list(PRODUCTS))
    parser.add_argument("--rows", nargs="+", type=positive, default=[1, 8, 32, 64, 256, 2048])
    parser.add_argument("--adapters", nargs="+", type=positive, default=[1, 32, 64])
    parser.add_argument("--ranks", nargs="+", type=positive, default=[8, 16, 32, 64], help="that adapters take in turn")
    parser.add_argument("--repeats", type=positive, default=20)
    parser.add_argument("--early", action="store_true", help="also with launches before the kernel in front has ended")
    parser.add_argument("--sweep", action="store_true", help="also other block sizes, for decode")
    return parser.parse_args(arguments)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"found {value}, expected at least 1")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if not torch.cuda.is_available():
        found = f"torch {torch.__version__} finds none"
        print(f"a CUDA device is needed, and {found}: nothing was measured", file=sys.stderr)
        return 2
    device = measure_device(args.repeats)
    print(f"{device.name}: copy {device.bandwidth / 1e12:.2f} TB/s, bf16 product {device.rate / 1e12:.0f} TFLOP/s")
    print(header(args.early))
    figures, swept = [], {}
    for case in cases(args.products, args.rows, args.adapters, args.ranks):
        figure = measure(case, device, args.repeats, args.early)
        figures.append(figure)
        print(line(figure), flush=True)
        if args.sweep:
            swept[f"{case.product} {case.rows} {case.adapters}"] = sweep(case, device, args.repeats)
    wrong = [figure for figure in figures if not figure.error <= TOLERANCE]
    for figure in wrong:
        print(f"WRONG by {figure.error:.1e}: {line(figure)}", file=sys.stderr)
    print(json.dumps({"device": asdict(device), "torch": torch.__version__, "ranks": args.ranks,
                      "cases": [asdict(figure) for figure in figures], "sweep": swept}))  # fmt: skip
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
