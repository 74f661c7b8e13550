"""What the compiler makes of the low-rank kernels for a Hopper GPU. It needs no GPU, and tells at once whether memory
is read 16 bytes at a time, whether registers suffice, and whether the kernels compile at all: the interpreter does not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="GPU kernels need triton")

COMPILE = """
import json, re, subprocess, sys
from pathlib import Path
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lorikeet.kernels import gpu_lowrank as kernels

POINTERS = {"u": "*fp32", "x": "*bf16", "y": "*bf16", "data": "*bf16", "tiles": "*i64", "entries": "*i64",
            "rows": "*i64"}
TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
ANY = ("first_site", "u_rows", "splits", "steps", "all_sites")  # numbers that may be odd

def instructions(kernel, constants, warps, stages):
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else POINTERS.get(name, "i32")
        if name not in constants and name not in ANY:
            attributes[(i,)] = [["tt.divisibility", 16]]
    fixed = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, fixed, attributes)
    options = {"num_warps": warps, "num_stages": stages}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    found = re.findall(r"(?:ld|st)\\.global[.\\w:]*|cp\\.async\\.[a-z]+\\.shared[.\\w:]*|wgmma\\.mma_async|mma\\.sync|"
                       r"griddepcontrol\\.\\w+", made.asm["ptx"])
    Path(sys.argv[1]).write_bytes(made.asm["cubin"])
    usage = subprocess.run([TOOL, "-res-usage", sys.argv[1]], capture_output=True, text=True, check=True).stdout
    stack = int(re.search(r"STACK:(\\d+)", usage)[1])
    return {"shared": made.metadata.shared, "stack": stack, **{name: found.count(name) for name in set(found)}}

def both(tiles, block_m, rank, early):
    widths = (4096, 1024, 1024)
    shrink = kernels.plan_shrink(tiles, block_m, 3, 4096, rank, False)
    expand = kernels.plan_expand(tiles, block_m, widths, rank, False)
    first = dict(D_IN=4096, N_SITES=3, BLOCK_M=block_m, BLOCK_R=shrink.block_r, BLOCK_K=shrink.block_k,
                 WIDE=False, EARLY=early)
    second = dict(N_SITES=3, D0=4096, D1=1024, D2=1024, BLOCK_M=block_m, BLOCK_N=expand.block_n, BLOCK_R=expand.block_r,
                  SPLITS=shrink.splits, AT_ONCE=shrink.splits if block_m == 16 else 1, WIDE=False,
                  EARLY=early)
    return (instructions(kernels.shrink_kernel, first, shrink.warps, shrink.stages),
            instructions(kernels.expand_kernel, second, expand.warps, expand.stages))

print(json.dumps([both(64, 16, 64, False), both(64, 16, 64, True), both(8, 64, 64, False)]))
"""


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_memory_is_read_in_whole_lines_and_ahead_of_its_use(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE, str(tmp_path / "kernel.cubin")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=140)
    assert done.returncode == 0, done.stderr
    decode, early, prompt = json.loads(done.stdout.splitlines()[-1])
    for kernel in (*decode, *early, *prompt):
        narrow = [name for name in kernel if "global" in name and name.endswith((".b8", ".b16", ".u16"))]
        assert not narrow, f"numbers read or written one by one: {kernel}"
        assert any(name.startswith("cp.async") for name in kernel), f"nothing under way while it multiplies: {kernel}"
        assert kernel["stack"] == 0, f"registers do not suffice: {kernel}"
        assert kernel["shared"] <= 227 * 2**10
    assert all(kernel["mma.sync"] for kernel in (*decode, *early)) and all(k["wgmma.mma_async"] for k in prompt)
    waits = [["griddepcontrol.wait" in kernel for kernel in pair] for pair in (decode, early, prompt)]
    assert waits == [[False, False], [True, True], [False, False]]
