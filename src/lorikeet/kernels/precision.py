"""Which dtype to compute in, and products of bf16 values with an fp32 result, which torch itself gives on no CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_NATIVE_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}  # x86 flags, and the ARM one
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def choose_dtype(name: str, device: str = "cpu") -> torch.dtype:
    """`auto` is bf16 where the processor or the GPU multiplies it natively, else fp32."""
    if name != "auto":
        return DTYPES[name]
    if device != "cpu":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    return torch.bfloat16 if _NATIVE_BF16 & _cpu_flags() else torch.float32


def native_bf16_products() -> bool:
    """Whether the processor has AVX512-BF16, which our own bf16 products are written in."""
    return {"avx512_bf16", "avx512f", "avx512bw"} <= _cpu_flags()


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    return {flag for line in text.splitlines() if line.startswith(("flags", "Features")) for flag in line.split()}


@contextmanager
def bf16_products(allowed: bool = True) -> Iterator[None]:
    """Inside, where `allowed`, fp32 matrix products may multiply in bf16 while they sum and store fp32.

    Exact where every factor came from bf16, and several times as fast as an fp32 product where the processor
    multiplies bf16 natively. A setting of oneDNN and of the whole process: keep the block to the product itself.
    """
    setting: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    if allowed:
        setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before
