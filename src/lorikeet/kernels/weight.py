"""A linear layer's weight. Nothing else touches W, so a packing or a quantisation stays a private matter."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Weight(Protocol):
    """W [d_out, d_in] with an optional bias [d_out]."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def bias(self) -> Tensor | None: ...

    def linear(self, x: Tensor) -> Tensor:
        """x [T, d_in] -> x W^T + b [T, d_out] in the dtype of x."""
        ...

    def dequantised(self) -> Tensor:
        """W as a plain tensor [d_out, d_in] (a copy where the weight is held in another form)."""
        ...

    def row_norms(self) -> Tensor:
        """Euclidean norm of each row of W, fp32 [d_out]."""
        ...


class DenseWeight:
    """W as a plain tensor."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias

    @property
    def shape(self) -> tuple[int, int]:
        return (self.weight.shape[0], self.weight.shape[1])

    def linear(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight, self.bias)

    def dequantised(self) -> Tensor:
        return self.weight

    def row_norms(self) -> Tensor:
        return self.weight.float().norm(dim=1)
