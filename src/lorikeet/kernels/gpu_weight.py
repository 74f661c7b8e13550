"""Weights of linear layers in 8-bit floats, multiplied by the matrix units of a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

CAPABILITY = (8, 9)  # from which on CUDA devices multiply fp8
FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # of it
_MULTIPLE = 16  # of both dimensions of a product in fp8


class Fp8Weight:
    """W in fp8 (e4m3) with one fp32 scale a row: half the bytes of bf16 to read. Products are summed in fp32.

    Each row of x is scaled by its own absolute maximum and rounded to fp8 as well. Where a dimension is no multiple of
    16, and on a CPU, the product is that of the dequantised weight.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.dtype, self.bias = weight.dtype, bias
        self.shape: tuple[int, int] = (weight.shape[0], weight.shape[1])
        wide = weight.detach().float()
        self.scale = wide.abs().amax(1).clamp(min=1e-12) / LARGEST
        self.stored = (wide / self.scale[:, None]).to(FP8)
        self._multiplies = weight.is_cuda and not any(size % _MULTIPLE for size in self.shape)

    def linear(self, x: Tensor) -> Tensor:
        if not self._multiplies:
            return torch.nn.functional.linear(x, self.dequantised().to(x.dtype), self.bias)
        from lorikeet.kernels.gpu_quantise import quantise_rows

        rounded, scale = quantise_rows(x)
        y: Tensor = torch._scaled_mm(rounded, self.stored.T, scale_a=scale, scale_b=self.scale[None], out_dtype=x.dtype)
        return y if self.bias is None else y.add_(self.bias)

    def dequantised(self) -> Tensor:
        return (self.stored.float() * self.scale[:, None]).to(self.dtype)

    def row_norms(self) -> Tensor:
        norms: Tensor = self.dequantised().float().norm(dim=1)
        return norms
