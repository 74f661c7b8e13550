"""Run by `test_gpu_compiled_attention`: launches as the product makes them, on tensors of a CPU, each compiled for a
Hopper GPU and not run. Prints a JSON line for each kernel."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from tests.kernels.inputs import make_batch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from lorikeet.kernels import gpu_attention, gpu_rows
from lorikeet.kernels.batch import LayerCache
from lorikeet.kernels.gpu_sampling import Sampler, SamplingTable

HEADS = (32, 8, 128)
TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
seen: set[int] = set()


class NoDriver:
    """As much of a driver as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


def show(name: str, kernel: Any) -> None:
    if id(kernel) in seen:
        return
    seen.add(id(kernel))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([TOOL, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"wgmma\.mma_async|mma\.sync|cp\.async\.cg", kernel.asm["ptx"])
    told = {"kernel": name, "shared": kernel.metadata.shared, "warps": kernel.metadata.num_warps}
    numbers = {key.lower(): int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    print(json.dumps({**told, **numbers, **{key: found.count(key) for key in sorted(set(found))}}), flush=True)


def launches(fp8: bool) -> None:
    """What a layer launches for a mixed batch, with and without a window."""
    draw = torch.Generator().manual_seed(0)
    q, k, v, batch, cache = make_batch([(1, 100), (200, 300)], HEADS, 16, torch.bfloat16, draw)
    if fp8:
        scale = torch.ones(HEADS[1])
        cache = LayerCache(cache.k.to(gpu_rows.FP8), cache.v.to(gpu_rows.FP8), scale, scale)
    cos = torch.ones(len(q), HEADS[2] // 2)
    assert batch.cache_slot is not None
    gpu_rows.rope_and_store(q, k, v, cos, cos, cache, batch.cache_slot)
    for window in (None, 4096):
        work = gpu_attention.AttentionWork(batch, HEADS, window, gpu_attention.tuning_of(q))
        gpu_attention.attention(q, k, v, work, cache)
        if fp8:  # scales are found without a cache
            bare = replace(batch, block_table=None, cache_slot=None)
            work = gpu_attention.AttentionWork(bare, HEADS, window, gpu_attention.tuning_of(q))
            gpu_attention.attention(q, k, v, work, None)


def main() -> None:
    run = JITFunction.run

    def compiled(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        show(self.fn.__name__, kernel)
        return kernel

    JITFunction.run = compiled
    driver.set_active(NoDriver())
    gpu_attention._wide = lambda q: False  # as on a GPU: products in bf16
    launches(fp8=False)
    launches(fp8=True)
    x = torch.zeros(4, 4096, dtype=torch.bfloat16)
    gpu_rows.add_rms_norm(x, x, x[0], 1e-5)
    gpu_rows.rms_norm_heads(x.view(4, 32, 128), x[0, :128], 1e-5)
    gpu_rows.silu_mul(x)
    none = torch.zeros(4, dtype=torch.int64)
    Sampler(SamplingTable(4, "cpu"), 4, 128256).sample(torch.zeros(4, 128256), none, none)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
