"""Weights in four bits with a scale and a zero for each group of 64 columns, and how they are found."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from lorikeet.kernels.weight import Weight, pack

GROUP = 64  # columns that share a scale and a zero
_STEPS = 15
_MIDDLE = 8
_SMALLEST = 1e-12  # scale of a group whose values are all the same
_ROWS = 512  # of an identity that are multiplied at once


def quantise_groups(weight: Tensor) -> tuple[Tensor, Tensor]:
    """W [d_out, d_in], d_in a multiple of 64 -> indices uint8 [d_out, d_in] from 0 to 15, and scale and zero of each
    group, bf16 [d_in / 64, d_out, 2], with W about `(index - 8) * scale + zero`.

    A group's smallest and largest value are the ends of its sixteen steps. Indices are found for the scale and zero as
    they are stored, so that rounding these costs next to nothing.
    """
    d_out, d_in = weight.shape
    wide = weight.detach().float().view(d_out, d_in // GROUP, GROUP)
    low, high = wide.amin(2, keepdim=True), wide.amax(2, keepdim=True)
    scale = ((high - low) / _STEPS).clamp_(min=_SMALLEST).bfloat16()
    zero = (low + _MIDDLE * scale.float()).bfloat16()
    index = ((wide - zero.float()) / scale.float()).add_(_MIDDLE).round_().clamp_(0, _STEPS).to(torch.uint8)
    return index.view(d_out, d_in), torch.cat([scale, zero], 2).transpose(0, 1).contiguous()


class Int4Weight:
    """W in four bits on a CPU, multiplied by torch's own operator: 0.56 bytes a number. Products of bf16 rows.

    d_in is a multiple of 64 and d_out one of 16 (`takes`).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.bias = bias
        self.shape: tuple[int, int] = (weight.shape[0], weight.shape[1])
        index, self.scale = quantise_groups(weight)
        self.packed: Tensor = torch._convert_weight_to_int4pack_for_cpu(index.int(), 1)

    @staticmethod
    def takes(weight: Tensor) -> bool:
        return weight.shape[1] % GROUP == 0 and weight.shape[0] % 16 == 0

    def linear(self, x: Tensor) -> Tensor:
        y: Tensor = torch._weight_int4pack_mm_for_cpu(x.contiguous(), self.packed, GROUP, self.scale)
        return y if self.bias is None else y.add_(self.bias)

    def dequantised(self) -> Tensor:
        """As the operator sees it: its order of the bytes is its own, and differs between processors."""
        one = torch.eye(self.shape[1], dtype=torch.bfloat16)
        parts = [torch._weight_int4pack_mm_for_cpu(some, self.packed, GROUP, self.scale) for some in one.split(_ROWS)]
        return torch.cat(parts).T.contiguous()

    def row_norms(self) -> Tensor:
        norms: Tensor = self.dequantised().float().norm(dim=1)
        return norms


class Form(Protocol):
    """A kind of weight that not every shape can be held in."""

    def takes(self, weight: Tensor) -> bool: ...

    def __call__(self, weight: Tensor, bias: Tensor | None) -> Weight: ...


class WhereItFits:
    """Makes weights of a form where it takes their shape, and plain bf16 ones elsewhere.

    `wide`: values that a checkpoint's own quantisation stands for are wanted in fp32, not rounded to bf16 before they
    are quantised again.
    """

    wide = True

    def __init__(self, form: Form) -> None:
        self.form = form

    def __call__(self, weight: Tensor, bias: Tensor | None) -> Weight:
        return self.form(weight, bias) if self.form.takes(weight) else pack(weight.bfloat16(), bias)
