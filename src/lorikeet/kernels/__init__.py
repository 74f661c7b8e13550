"""Kernels: `reference` is their meaning in plain torch, `cpu` and `gpu` the same names for one kind of device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorikeet.errors import ConfigError

if TYPE_CHECKING:
    from lorikeet.model.decoder import ServingOps


def pick(device: str) -> ServingOps:
    """The kernels for a device: `cpu`, or `reference` (plain torch, slow, the oracle of the others).

    Raises ConfigError for other devices.
    """
    if device == "cpu":
        from lorikeet.kernels.cpu import CpuOps

        return CpuOps()
    if device == "reference":
        from lorikeet.kernels.reference import ReferenceOps

        return ReferenceOps()
    if device.split(":")[0] == "cuda":
        raise ConfigError(
            f"device is {device!r}, and this version has no GPU kernels", param="device", hint="use device=cpu"
        )
    raise ConfigError(f"device is {device!r}, expected 'cpu' or 'reference'", param="device")
