"""Kernels: `reference` is their meaning in plain torch, `cpu` and `gpu` the same names for one kind of device."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from lorikeet.errors import ConfigError

if TYPE_CHECKING:
    from lorikeet.model.decoder import ServingOps


def pick(device: str) -> ServingOps:
    """The kernels for a device: `cpu`, `cuda` (also `cuda:1`), or `reference` (plain torch, slow, the others' oracle).

    Raises ConfigError for other devices, and for `cuda` where something that it needs is missing.
    """
    if device == "cpu":
        from lorikeet.kernels.cpu import CpuOps

        return CpuOps()
    if device == "reference":
        from lorikeet.kernels.reference import ReferenceOps

        return ReferenceOps()
    if device.split(":")[0] == "cuda":
        _check_cuda(device)
        from lorikeet.kernels.gpu import GpuOps

        return GpuOps()
    raise ConfigError(f"device is {device!r}, expected 'cpu', 'cuda' or 'reference'", param="device")


def _check_cuda(device: str) -> None:
    """Raise ConfigError, which says what is missing, where the GPU kernels cannot run."""
    import torch

    if torch.version.cuda is None:
        missing = f"torch {torch.__version__} is built without CUDA"
        hint = "install a CUDA build of torch, or use device=cpu"
    elif not torch.cuda.is_available():
        missing = f"torch {torch.__version__} finds no CUDA device"
        hint = "check the driver with nvidia-smi and CUDA_VISIBLE_DEVICES, or use device=cpu"
    elif find_spec("triton") is None:
        missing = "the package triton is not installed"
        hint = "pip install 'lorikeet-llm[gpu]', or use device=cpu"
    else:
        return
    raise ConfigError(f"device is {device!r}, but {missing}", param="device", hint=hint)
