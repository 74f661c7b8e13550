"""What happens to each token by itself, forward and backward, in plain torch: the meaning, in any dtype.

`row_kernels` gives the same functions from `kernels` where the device and dtype have faster ones.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lorikeet.kernels.reference import ReferenceOps

_reference = ReferenceOps()


class RowKernels(Protocol):
    """Shapes as in `kernels.reference`; a gradient has the shape and dtype of what it is the gradient of."""

    def add_rms_norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]: ...
    def add_rms_norm_backward(
        self, dnormed: Tensor, dtotal: Tensor, total: Tensor, weight: Tensor, eps: float
    ) -> Tensor: ...
    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor: ...
    def silu_mul(self, gate_up: Tensor) -> Tensor: ...
    def silu_mul_backward(self, dout: Tensor, gate_up: Tensor) -> Tensor: ...
    def dropout(self, x: Tensor, places: Tensor, key: int, rate: float, out: Tensor) -> Tensor: ...


class TorchRows:
    """The functions of `RowKernels`."""

    def add_rms_norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return _reference.add_rms_norm(x, residual, weight, eps)

    def add_rms_norm_backward(
        self, dnormed: Tensor, dtotal: Tensor, total: Tensor, weight: Tensor, eps: float
    ) -> Tensor:
        wide = total.to(torch.promote_types(total.dtype, torch.float32))
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        normed = wide * inverse
        gradient = dnormed.to(wide.dtype) * weight
        gradient -= normed * (gradient * normed).mean(-1, keepdim=True)
        return gradient.mul_(inverse).add_(dtotal).to(total.dtype)

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return _reference.rope(x, cos, sin)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return _reference.silu_mul(gate_up)

    def silu_mul_backward(self, dout: Tensor, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        activated = F.silu(gate)
        return torch.cat((torch.ops.aten.silu_backward(dout * up, gate), dout * activated), -1)

    def dropout(self, x: Tensor, places: Tensor, key: int, rate: float, out: Tensor) -> Tensor:
        rows = _hash((places ^ key) & _LOW)
        columns = _hash(torch.arange(x.shape[1]) + (key >> 32))
        bits = _hash(rows[:, None] ^ columns[None, :])
        return torch.mul(x, (bits >= int(rate * 2**32)).to(x.dtype).mul_(1 / (1 - rate)), out=out)


_LOW = 2**32 - 1


def _hash(x: Tensor) -> Tensor:
    """A 32-bit integer hash (two rounds of multiply and xor-shift) on int64 values below 2^32."""
    x = ((x ^ (x >> 16)) * 0x45D9F3B) & _LOW
    x = ((x ^ (x >> 16)) * 0x45D9F3B) & _LOW
    return x ^ (x >> 16)


def row_kernels(like: Tensor) -> RowKernels:
    """The fastest functions for tensors of this device and dtype."""
    if like.device.type == "cpu" and like.dtype in (torch.bfloat16, torch.float32):
        from lorikeet.kernels import cpu_backward  # compiles, or loads what it compiled before

        return cpu_backward
    return TorchRows()
