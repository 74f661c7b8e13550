"""Kernels: `reference` is their meaning in plain torch, `cpu` and `gpu` the same names for one kind of device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorikeet.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from lorikeet.model.decoder import Ops


def pick(device: str, dtype: torch.dtype | None = None, adapter_dtype: torch.dtype | None = None) -> Ops:
    """The kernels for a device: `cpu`, or `reference` (plain torch, slow, the oracle of the others).

    With `dtype` (of activations) and `adapter_dtype` (of the slab, `dtype` when None) they come compiled, so that no
    request waits for it: seconds the first time, then loaded from a cache. Raises ConfigError for other devices.
    """
    if device == "cpu":
        from lorikeet.kernels.cpu import CpuOps

        ops = CpuOps()
        if dtype is not None:
            ops.warm(dtype, adapter_dtype or dtype)
        return ops
    if device == "reference":
        from lorikeet.kernels.reference import ReferenceOps

        return ReferenceOps()
    if device.split(":")[0] == "cuda":
        raise ConfigError(
            f"device is {device!r}, and this version has no GPU kernels", param="device", hint="use device=cpu"
        )
    raise ConfigError(f"device is {device!r}, expected 'cpu' or 'reference'", param="device")
