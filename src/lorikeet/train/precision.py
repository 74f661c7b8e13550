"""Products of bf16 values with an fp32 result, which torch's own bf16 products do not give on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def bf16_products() -> Iterator[None]:
    """Inside, fp32 matrix products may multiply in bf16 while they sum and store fp32.

    Exact where every factor came from bf16, and several times as fast as an fp32 product where the processor
    multiplies bf16 natively. A setting of oneDNN and of the whole process: keep the block to the product itself.
    """
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before
