"""What a product of the base takes on a GPU for each form of its weights, at the shapes of an 8B Llama.

    python benchmarks/gpu_weights.py [--products qkv o gate_up down] [--rows 1 8 32 64 128 256 512 2048] [--repeats 20]

For each form: its product with the stored bytes, and that with the weight dequantised first, of which
`gpu_products.MOST_ROWS` chooses one. Beside them stand torch's own products in int8 and int4 (tinygemm), up to 256
rows. As many weights as do not fit into the L2 cache are captured into one graph; the time is that of a replay by CUDA
events, divided by them: the median of the repeats. The floor is what reading the bytes takes at the bandwidth of a
copy, or the arithmetic at the rate of a large bf16 product, both measured in the same run. Results are checked against
the dequantised weight first. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from gpu_kernels import DEVICE, DTYPE, PRODUCTS, Device, measure_device, microseconds, positive
from lorikeet.kernels.gpu_weight import Fp8Weight, GpuInt4Weight, GpuInt8Weight, Nf4Weight
from lorikeet.kernels.int4_weight import GROUP, quantise_groups
from lorikeet.kernels.weight import DenseWeight
from roofline import QUANTISED

FORMS: dict[str, Callable[[Tensor, None], Any]] = {
    "bf16": DenseWeight,
    "fp8": Fp8Weight,
    "int8": GpuInt8Weight,
    "int4": GpuInt4Weight,
    "nf4": Nf4Weight,
}
BYTES = {"bf16": 2.0, **QUANTISED}  # of a number
PEER_ROWS = 256  # up to which torch's products are measured: they take one or 16 rows at a time
TOLERANCE = 1e-2
WEIGHTS = 16  # of a graph, at most


class TorchInt8:
    """torch's product with int8 weights."""

    def __init__(self, weight: Tensor, bias: None) -> None:
        self._of = GpuInt8Weight(weight)
        self.dequantised = self._of.dequantised

    def linear(self, x: Tensor) -> Tensor:
        return torch._weight_int8pack_mm(x, self._of.stored, self._of.scale)


class TorchInt4:
    """torch's product with int4 weights in groups (tinygemm): two neighbours a byte, the first in the high half."""

    def __init__(self, weight: Tensor, bias: None) -> None:
        self.dequantised = GpuInt4Weight(weight).dequantised
        index, self._scale = quantise_groups(weight)
        self._packed = torch._convert_weight_to_int4pack((index[:, ::2] << 4 | index[:, 1::2]).contiguous(), 8)

    def linear(self, x: Tensor) -> Tensor:
        return torch._weight_int4pack_mm(x, self._packed, GROUP, self._scale)


PEERS: dict[str, Callable[[Tensor, None], Any]] = {"torch int8": TorchInt8, "torch int4": TorchInt4}


def floor(device: Device, form: str, rows: int, d_in: int, d_out: int) -> float:
    """Microseconds that the bytes or the arithmetic of a product take at least."""
    read = BYTES[form.removeprefix("torch ")] * d_in * d_out + rows * (d_in + d_out) * DTYPE.itemsize
    return max(read / device.bandwidth, 2 * rows * d_in * d_out / device.rate) * 1e6


def measure(device: Device, name: str, form: str, rows: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """A line for each number of rows."""
    from lorikeet.kernels import gpu_products

    d_in, d_out = PRODUCTS[name][0], sum(PRODUCTS[name][1])
    count = max(2, min(WEIGHTS, -(-4 * device.cache // int(BYTES[form.removeprefix("torch ")] * d_in * d_out))))
    make = (FORMS | PEERS)[form]
    weights = [make(torch.randn(d_out, d_in, dtype=DTYPE, device=DEVICE) * d_in**-0.5, None) for _ in range(count)]
    plain, found, most = weights[0].dequantised(), [], gpu_products.MOST_ROWS
    for n in rows:
        if form in PEERS and n > PEER_ROWS:
            continue
        x = torch.randn(n, d_in, dtype=DTYPE, device=DEVICE)
        line: dict[str, Any] = {"product": name, "form": form, "rows": n, "floor": floor(device, form, n, d_in, d_out)}
        for way, limit in (("stored", sys.maxsize), ("dequantised", 0)):
            if way == "dequantised" and form not in ("int8", "int4", "nf4"):
                continue
            gpu_products.MOST_ROWS = limit
            wanted = torch.nn.functional.linear(x, plain).double()
            line[f"{way}_error"] = float((weights[0].linear(x).double() - wanted).norm() / wanted.norm())
            line[way] = microseconds(lambda x=x: [weight.linear(x) for weight in weights] and None, repeats) / count
        gpu_products.MOST_ROWS = most
        found.append(line)
        print(show(line), flush=True)
    return found


def header() -> str:
    head = f"{'product':8} {'form':10} {'rows':>5} {'stored us':>10} {'dequantised us':>15}"
    return f"{head} {'floor us':>9} {'of floor':>8}"


def show(line: dict[str, Any]) -> str:
    dequantised = f"{line['dequantised']:15.1f}" if "dequantised" in line else " " * 15
    best = min(line["stored"], line.get("dequantised", line["stored"]))
    return (
        f"{line['product']:8} {line['form']:10} {line['rows']:5} {line['stored']:10.1f} {dequantised}"
        f" {line['floor']:9.1f} {line['floor'] / best:8.0%}"
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--products", nargs="+", choices=list(PRODUCTS), default=list(PRODUCTS))
    parser.add_argument("--forms", nargs="+", choices=[*FORMS, *PEERS], default=[*FORMS, *PEERS])
    parser.add_argument("--rows", nargs="+", type=positive, default=[1, 8, 32, 64, 128, 256, 512, 2048])
    parser.add_argument("--repeats", type=positive, default=20)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if not torch.cuda.is_available():
        found = f"torch {torch.__version__} finds none"
        print(f"a CUDA device is needed, and {found}: nothing was measured", file=sys.stderr)
        return 2
    device = measure_device(args.repeats)
    print(f"{device.name}: copy {device.bandwidth / 1e12:.2f} TB/s, bf16 product {device.rate / 1e12:.0f} TFLOP/s")
    print(header())
    lines = [
        line for name in args.products for form in args.forms
        for line in measure(device, name, form, args.rows, args.repeats)
    ]  # fmt: skip
    wrong = []
    for line in lines:
        limit = 6 * TOLERANCE if line["form"] == "fp8" else TOLERANCE  # whose rows are rounded too
        if not max(line["stored_error"], line.get("dequantised_error", 0)) <= limit:
            wrong.append(line)
            print(f"WRONG: {line}", file=sys.stderr)
    print(json.dumps({"device": asdict(device), "torch": torch.__version__, "cases": lines}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
