"""Weights of linear layers in fewer bits on a GPU: fp8, which its matrix units multiply, and int8, int4 and NF4, which
are widened to bf16 on their way to them (`gpu_products`)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lorikeet.kernels.int4_weight import GROUP, quantise_groups

CAPABILITY = (8, 9)  # from which on CUDA devices multiply fp8
FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # of it
_MULTIPLE = 16  # of both dimensions of a product in fp8
# The quantiles of a normal distribution that NF4 consists of, as published with QLoRA.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


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
            return F.linear(x, self.dequantised().to(x.dtype), self.bias)
        from lorikeet.kernels.gpu_quantise import quantise_rows

        rounded, scale = quantise_rows(x)
        y: Tensor = torch._scaled_mm(rounded, self.stored.T, scale_a=scale, scale_b=self.scale[None], out_dtype=x.dtype)
        return y if self.bias is None else y.add_(self.bias)

    def dequantised(self) -> Tensor:
        return (self.stored.float() * self.scale[:, None]).to(self.dtype)

    def row_norms(self) -> Tensor:
        norms: Tensor = self.dequantised().float().norm(dim=1)
        return norms


class GpuInt8Weight:
    """W as int8 with one fp32 scale a row (symmetric, absolute maximum): half the bytes of bf16. Rows stay bf16."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.bias = bias
        self.shape: tuple[int, int] = (weight.shape[0], weight.shape[1])
        wide = weight.detach().float()
        self.scale = wide.abs().amax(1).clamp(min=1e-30) / 127
        self.stored = (wide / self.scale[:, None]).round_().to(torch.int8)

    def linear(self, x: Tensor) -> Tensor:
        from lorikeet.kernels.gpu_products import MOST_ROWS, int8_linear

        if len(x) > MOST_ROWS:
            return F.linear(x, self.dequantised(), self.bias)
        return int8_linear(x, self.stored, self.scale, self.bias)

    def dequantised(self) -> Tensor:
        from lorikeet.kernels.gpu_products import dequantise_int8

        return dequantise_int8(self.stored, self.scale)

    def row_norms(self) -> Tensor:
        norms: Tensor = self.dequantised().float().norm(dim=1)
        return norms


class _FourBits:
    """W as indices of four bits in groups of 64 columns (`gpu_products.four_bits_linear` says how they lie)."""

    scale: Tensor
    table: Tensor | None = None

    def __init__(self, index: Tensor, bias: Tensor | None) -> None:
        self.bias = bias
        self.shape: tuple[int, int] = (index.shape[0], index.shape[1])
        halves = index.view(self.shape[0], -1, 2, GROUP // 2)
        self.packed = (halves[:, :, 0] | halves[:, :, 1] << 4).flatten(1)

    @staticmethod
    def takes(weight: Tensor) -> bool:
        return weight.shape[1] % GROUP == 0

    def linear(self, x: Tensor) -> Tensor:
        from lorikeet.kernels.gpu_products import MOST_ROWS, four_bits_linear

        if len(x) > MOST_ROWS:
            return F.linear(x, self.dequantised(), self.bias)
        return four_bits_linear(x, self.packed, self.scale, self.table, self.bias)

    def dequantised(self) -> Tensor:
        from lorikeet.kernels.gpu_products import dequantise_four_bits

        return dequantise_four_bits(self.packed, self.scale, self.table)

    def row_norms(self) -> Tensor:
        norms: Tensor = self.dequantised().float().norm(dim=1)
        return norms


class GpuInt4Weight(_FourBits):
    """W in sixteen equal steps a group, `(index - 8) * scale + zero`: 0.56 bytes a number. Rows stay bf16."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        index, self.scale = quantise_groups(weight)
        super().__init__(index, bias)


class Nf4Weight(_FourBits):
    """W in the sixteen values of NF4 (QLoRA, Dettmers et al. 2023) times a group's largest magnitude in fp32: 0.56
    bytes a number. Rows stay bf16.

    Values that were dequantised from NF4 in blocks of 64 come back as they were, if they come in fp32: each block has
    its largest magnitude still, which stands for -1 or 1.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.table = torch.tensor(NF4, device=weight.device)
        groups = weight.detach().float().view(weight.shape[0], -1, GROUP)
        largest = groups.abs().amax(2)
        share = groups / largest.clamp(min=1e-38)[:, :, None]
        index = torch.bucketize(share, (self.table[1:] + self.table[:-1]) / 2, out_int32=True).to(torch.uint8)
        self.scale = largest.T.contiguous()
        super().__init__(index.flatten(1), bias)
