"""What the compiler makes of the products with weights in fewer bits for a Hopper GPU: see `test_gpu_compiled`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="GPU kernels need triton")

COMPILE = """
import torch
from tests.kernels import launch_compiled
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from lorikeet.kernels import gpu_products as products

run = JITFunction.run

def compiled(self, *args, grid, warmup, **kwargs):
    kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
    launch_compiled.show(self.fn.__name__, kernel)
    return kernel

JITFunction.run = compiled
driver.set_active(launch_compiled.NoDriver())
n, k = 4096, 4096
stored, packed = torch.zeros(n, k, dtype=torch.int8), torch.zeros(n, k // 2, dtype=torch.uint8)
rows, steps, largest = torch.zeros(n), torch.zeros(k // 64, n, 2, dtype=torch.bfloat16), torch.zeros(k // 64, n)
table = torch.zeros(16)
for count in (8, 64, 256):
    x = torch.zeros(count, k, dtype=torch.bfloat16)
    products.int8_linear(x, stored, rows, x[0])
    products.four_bits_linear(x, packed, steps, None, None)
    products.four_bits_linear(x, packed, largest, table, None)
products.dequantise_int8(stored, rows)
products.dequantise_four_bits(packed, steps, None)
products.dequantise_four_bits(packed, largest, table)
"""


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_products_fit_a_multiprocessor(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": root}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment, timeout=140)
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) == 12
    for kernel in kernels:
        assert kernel["stack"] == 0, f"registers do not suffice: {kernel}"
        assert kernel["shared"] <= 227 * 2**10
        if not kernel["kernel"].startswith("dequantise"):
            assert kernel.get("mma.sync") or kernel.get("wgmma.mma_async"), f"no matrix units: {kernel}"
