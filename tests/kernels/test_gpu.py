"""Which kernels a device has, and what is said where the GPU's cannot run."""

from __future__ import annotations

import subprocess
import sys
from importlib.machinery import ModuleSpec

import pytest
import torch

from lorikeet import kernels
from lorikeet.errors import ConfigError


@pytest.mark.parametrize(
    ("cuda", "available", "triton", "said"),
    [
        (None, False, True, "built without CUDA"),
        ("13.0", False, True, "finds no CUDA device"),
        ("13.0", True, False, "triton is not installed"),
    ],
)
def test_what_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, available: bool, triton: bool, said: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(kernels, "find_spec", lambda name: ModuleSpec(name, None) if triton else None)
    with pytest.raises(ConfigError, match=f"device is 'cuda:1', but .*{said}") as error:
        kernels.pick("cuda:1")
    assert error.value.param == "device" and "device=cpu" in str(error.value.hint)


def test_cuda_picks_the_gpu_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = pytest.importorskip("lorikeet.kernels.gpu", reason="GPU kernels need triton", exc_type=ModuleNotFoundError)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "find_spec", lambda name: ModuleSpec(name, None))
    assert isinstance(kernels.pick("cuda"), gpu.GpuOps)


def test_kernels_of_other_devices_import_no_triton() -> None:
    code = "import sys, lorikeet.kernels as k; k.pick('cpu'); k.pick('reference'); sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
