"""What the compiler makes of attention, row and sampling kernels for a Hopper GPU. It needs no GPU, and tells what the
interpreter does not: whether they compile at all, whether registers and shared memory suffice, which products they use.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="GPU kernels need triton")


@pytest.mark.slow
def test_all_kernels_compile_and_none_spills(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.kernels.launch_compiled"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    names = [kernel["kernel"] for kernel in kernels]
    # bf16, fp8 and no cache, with and without a window
    assert names.count("short_kernel") == 2 and names.count("long_kernel") == 6
    assert {"work_kernel", "combine_kernel", "rope_kernel", "add_rms_norm_kernel", "pick_kernel"} < set(names)
    for kernel in kernels:
        assert kernel["stack"] <= 64, f"registers do not suffice: {kernel}"
        assert kernel["shared"] <= 227 * 2**10
        if kernel["kernel"] == "short_kernel":
            assert kernel["mma.sync"] and kernel["cp.async.cg"], (
                f"keys are not under way while others are used: {kernel}"
            )
            assert kernel["shared"] <= 113 * 2**10, "two programs a multiprocessor"
        if kernel["kernel"] == "long_kernel":
            assert kernel["wgmma.mma_async"] and kernel["cp.async.cg"]
