"""Which dtype to train in, and products of bf16 values with an fp32 result, which torch itself gives on no CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def choose_dtype(name: str) -> torch.dtype:
    """The dtype of the base in training; `auto` is bf16 where the processor multiplies it natively, else fp32."""
    if name != "auto":
        return DTYPES[name]
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


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
