"""Threads and compiled kernels: what must hold for the process, tried in fresh interpreters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lorikeet import kernels
from lorikeet.errors import ConfigError
from lorikeet.kernels.cpu import CpuOps
from lorikeet.kernels.reference import ReferenceOps


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=200
    )


def test_a_second_start_compiles_nothing(tmp_path: Path) -> None:
    code = """
import torch
from lorikeet.kernels import cpu_rows
x = torch.randn(3, 64)
cpu_rows.silu_mul(x), cpu_rows.logits(x, x)
print([(one.stats.cache_hits.total(), one.stats.cache_misses.total())
       for one in (cpu_rows.silu_kernel, cpu_rows.logits_kernel)])
"""
    first, second = (run(code, NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(2))
    assert (first.stdout, second.stdout) == ("[(0, 1), (0, 1)]\n", "[(1, 0), (1, 0)]\n"), first.stderr + second.stderr


def test_numba_runs_on_the_threads_of_torch() -> None:
    code = """
import torch
torch.set_num_threads(2)
from lorikeet.kernels import cpu_rows, cpu_runtime
import numba
assert cpu_runtime.PARALLEL
threads = lambda: len(__import__("os").listdir("/proc/self/task"))
x = torch.randn(300, 512)
cpu_rows.silu_mul(x)  # starts the team
assert numba.threading_layer() == "omp"
before = threads()
torch.randn(2_000_000).exp_()
assert threads() == before, (before, threads())
torch.set_num_threads(1)
assert cpu_runtime.share_threads() == 1
cpu_rows.logits(x, x)
assert numba.get_num_threads() == 1
"""
    done = run(code, OMP_NUM_THREADS="2", NUMBA_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr


def test_another_threading_layer_means_serial_kernels_and_a_warning() -> None:
    code = """
import torch
from lorikeet.kernels import cpu_rows, cpu_runtime
assert not cpu_runtime.PARALLEL and cpu_runtime.share_threads() == 1
x = torch.randn(300, 512)
gate, up = x.chunk(2, -1)
assert torch.allclose(cpu_rows.silu_mul(x), torch.nn.functional.silu(gate) * up, atol=1e-5)
"""
    done = run(code, NUMBA_THREADING_LAYER="workqueue")
    assert done.returncode == 0, done.stderr
    assert "CPU kernels run on one thread" in done.stderr and "'workqueue'" in done.stderr


def test_pick_by_device() -> None:
    assert isinstance(kernels.pick("cpu"), CpuOps)
    assert type(kernels.pick("reference")) is ReferenceOps
    with pytest.raises(ConfigError, match="'tpu'"):
        kernels.pick("tpu")


def test_importing_the_package_imports_no_numba() -> None:
    done = run("import sys, lorikeet.kernels; assert not {'torch', 'numba'} & set(sys.modules)")
    assert done.returncode == 0, done.stderr
