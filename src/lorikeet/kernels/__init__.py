"""Kernels: `reference` is their meaning in plain torch, `cpu` and `gpu` the same names for one kind of device."""
