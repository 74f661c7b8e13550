"""What this machine could do: its read bandwidth and its rate of matrix products, and the work of a step in both.

A step cannot be faster than its bytes at the bandwidth, nor than its operations at the rate that the faster of the
vendor library and our own products reaches with that many rows. With fewer than 32 rows that rate is one of reading,
which the bandwidth accounts for: the limit takes the rate at 32 rows there. The peak is the rate at 512 rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lorikeet.kernels.weight import DenseWeight, PackedWeight, pack
from lorikeet.model.spec import ModelSpec

FEW_ROWS, PEAK_ROWS = 32, 512


@dataclass(frozen=True)
class Work:
    """Bytes read and floating point operations."""

    bytes: float
    operations: float


@dataclass(frozen=True)
class Machine:
    """`bandwidth` in bytes a second; `rates` in operations a second by the rows of a product."""

    bandwidth: float
    rates: dict[int, float]

    def seconds(self, work: Work, rows: int) -> float:
        """At least, with the rate measured at the nearest number of rows from above (the peak beyond them)."""
        nearest = min((known for known in self.rates if known >= max(rows, FEW_ROWS)), default=max(self.rates))
        return max(work.bytes / self.bandwidth, work.operations / self.rates[nearest])


class Meter:
    """Measures the machine again whenever it is asked to, with the product of `spec` that is largest."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, rows: Sequence[int], stream_bytes: int = 1 << 28) -> None:
        self._stream = torch.ones(stream_bytes // 4)
        matrix = torch.randn(2 * spec.intermediate_size, spec.hidden_size).to(dtype)
        vendor = PackedWeight if PackedWeight.available(matrix) else DenseWeight
        self._operations, self._weights = 2 * matrix.numel(), (vendor(matrix), pack(matrix))
        self._inputs = {n: torch.randn(n, spec.hidden_size).to(dtype) for n in sorted({*rows, FEW_ROWS, PEAK_ROWS})}

    @torch.inference_mode()
    def measure(self) -> Machine:
        """The best of some milliseconds of each."""
        reading = _best(lambda: self._stream.sum())
        rates = {
            rows: rows * self._operations / min(_best(lambda w=w, x=x: w.linear(x)) for w in self._weights)
            for rows, x in self._inputs.items()
        }
        return Machine(4 * self._stream.numel() / reading, rates)


def _best(function: Callable[[], object], seconds: float = 0.03, calls: int = 4) -> float:
    function()
    times: list[float] = []
    while len(times) < calls or sum(times) < seconds:
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return min(times)


def linear_size(spec: ModelSpec) -> int:
    """Parameters of the linear layers, the head left out."""
    return sum(site.d_in * site.d_out for site in spec.sites if site.layer is not None)


def rank_size(spec: ModelSpec) -> int:
    """Parameters that each rank of an adapter on all linear layers has."""
    return sum(site.d_in + site.d_out for site in spec.sites if site.layer is not None)


@dataclass(frozen=True)
class Itemsizes:
    """Bytes of a number: in the linear layers, in embedding, cache and adapters, and in a cache that differs."""

    linear: float
    other: int
    cache: int | None = None


# Of a number in the linear layers, by `--quantize`; four bits have a scale and a zero for every 64.
QUANTISED = {"int8": 1.0, "fp8": 1.0, "int4": 0.5625, "nf4": 0.5625}


def weight_bytes(spec: ModelSpec, sizes: Itemsizes) -> float:
    """Of the linear layers and of a tied head."""
    return sizes.linear * linear_size(spec) + sizes.other * spec.vocab_size * spec.hidden_size


def decode_work(spec: ModelSpec, sizes: Itemsizes, rows: int, context: int, distinct: float, adapted: float,
                rank: int) -> Work:  # fmt: skip
    """One step of `rows` sequences of `context` tokens, `adapted` of them on `distinct` adapters of `rank`."""
    weights = linear_size(spec) + spec.vocab_size * spec.hidden_size
    cache = 2 * rows * context * spec.num_layers * spec.kv_size
    low_rank = rank * rank_size(spec)
    attention = 4 * rows * context * spec.num_layers * spec.q_size
    return Work(
        weight_bytes(spec, sizes) + (sizes.cache or sizes.other) * cache + sizes.other * distinct * low_rank,
        2 * (rows * weights + adapted * low_rank) + attention,
    )


def prefill_work(spec: ModelSpec, sizes: Itemsizes, rows: int, prompt: int, distinct: float, adapted: float,
                 rank: int) -> Work:  # fmt: skip
    """The prompts of `rows` sequences, and the logits of the last token of each."""
    head = spec.vocab_size * spec.hidden_size
    low_rank = rank * rank_size(spec)
    attention = 4 * rows * prompt * (prompt + 1) / 2 * spec.num_layers * spec.q_size
    return Work(
        weight_bytes(spec, sizes) + sizes.other * distinct * low_rank,
        2 * (rows * prompt * linear_size(spec) + rows * head + adapted * prompt * low_rank) + attention,
    )
