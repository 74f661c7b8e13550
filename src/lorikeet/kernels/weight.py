"""A linear layer's weight. Nothing else touches W, so a packing or a quantisation stays a private matter."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lorikeet.kernels.precision import native_bf16_products


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


class Table(Weight, Protocol):
    """A weight whose rows can be read one by one: the embedding, and the head that may be tied to it."""

    def rows(self, index: Tensor) -> Tensor:
        """W[index]: [N, d_in] for an index [N]."""
        ...


class Panels(NamedTuple):
    """W as our own product reads it (see `cpu_products`): [d_out / 32, d_in / 2, 32, 2] in bf16 or int8, and by output
    a scale (int8 only) and a shift, fp32 [d_out]."""

    stored: Tensor
    scale: Tensor
    shift: Tensor


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

    def rows(self, index: Tensor) -> Tensor:
        return torch.nn.functional.embedding(index, self.weight)

    def dequantised(self) -> Tensor:
        return self.weight

    def row_norms(self) -> Tensor:
        norms: Tensor = self.weight.float().norm(dim=1)
        return norms


class PackedWeight:
    """W in the blocked layout of oneDNN, reordered once: the only copy, bf16 or fp32, on a CPU.

    Plain weights are reordered anew in every product: packed ones take about half the time at 1 to 32 rows in bf16,
    and a third in fp32, and never lose at more rows.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
        self.dtype = weight.dtype
        self.bias = bias

    @staticmethod
    def available(weight: Tensor) -> bool:
        """Whether oneDNN computes with this weight here (bf16 needs AVX512-BF16, AMX or the like to pay)."""
        if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
            return False
        if weight.dtype == torch.bfloat16:
            return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        return weight.dtype == torch.float32

    @property
    def shape(self) -> tuple[int, int]:
        return (self._packed.shape[0], self._packed.shape[1])

    def linear(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return y

    def dequantised(self) -> Tensor:
        plain: Tensor = self._packed.to_dense()
        return plain

    def row_norms(self) -> Tensor:
        norms: Tensor = self.dequantised().float().norm(dim=1)
        return norms


class PanelWeight:
    """W in bf16, in panels of 32 outputs that our own kernel reads, whatever the number of rows: the only copy.

    Against oneDNN's packed products it takes 0.75 to 0.95 of the time, from 1 row to 512 (docs/log.md).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        from lorikeet.kernels.cpu_products import to_panels

        shift = torch.zeros(weight.shape[0]) if bias is None else bias.detach().float()
        self.panels = Panels(to_panels(weight.detach()), shift, shift)
        self.bias = bias

    @staticmethod
    def available(weight: Tensor) -> bool:
        if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or not native_bf16_products():
            return False
        return weight.shape[0] % 32 == 0 and weight.shape[1] % 2 == 0

    @property
    def shape(self) -> tuple[int, int]:
        panels, pairs, outputs, _ = self.panels.stored.shape
        return (panels * outputs, pairs * 2)

    def linear(self, x: Tensor) -> Tensor:
        from lorikeet.kernels.cpu_products import panel_linear

        return panel_linear(x, *self.panels, x.dtype)

    def rows(self, index: Tensor) -> Tensor:
        from lorikeet.kernels.cpu_products import panel_rows

        return panel_rows(self.panels.stored, index)

    def dequantised(self) -> Tensor:
        from lorikeet.kernels.cpu_products import from_panels

        return from_panels(self.panels.stored)

    def row_norms(self) -> Tensor:
        norms: Tensor = self.dequantised().float().norm(dim=1)
        return norms


class Int8Weight:
    """W as int8 with one float32 scale a row (symmetric, absolute maximum), multiplied in bf16: half the bytes to read.

    Panels and our own kernel where the processor and the shape allow it, torch's `_weight_int8pack_mm` elsewhere.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.dtype, self.bias = weight.dtype, bias
        self.shape: tuple[int, int] = (weight.shape[0], weight.shape[1])
        wide = weight.detach().float()
        scale = wide.abs().amax(1).clamp(min=1e-30) / 127
        plain = (wide / scale[:, None]).round_().to(torch.int8)
        shift = torch.zeros(weight.shape[0]) if bias is None else bias.detach().float()
        self._plain, self.panels = Panels(plain, scale, shift), None
        if PanelWeight.available(weight):
            from lorikeet.kernels.cpu_products import to_panels

            self.panels = self._plain = Panels(to_panels(plain), scale, shift)

    def linear(self, x: Tensor) -> Tensor:
        if self.panels is not None:
            from lorikeet.kernels.cpu_products import panel_linear

            return panel_linear(x, *self.panels, x.dtype)
        y = torch._weight_int8pack_mm(x, self._plain.stored, self._plain.scale.to(x.dtype))
        return y if self.bias is None else y.add_(self.bias)

    def rows(self, index: Tensor) -> Tensor:
        stored, scale, _ = self._plain
        if self.panels is not None:
            from lorikeet.kernels.cpu_products import panel_rows

            picked = panel_rows(stored, index)
        else:
            picked = stored[index]
        return (picked.float() * scale[index, None]).to(self.dtype)

    def dequantised(self) -> Tensor:
        stored, scale, _ = self._plain
        if self.panels is not None:
            from lorikeet.kernels.cpu_products import from_panels

            stored = from_panels(stored)
        return (stored.float() * scale[:, None]).to(self.dtype)

    def row_norms(self) -> Tensor:
        norms: Tensor = self.dequantised().float().norm(dim=1)
        return norms


def pack(weight: Tensor, bias: Tensor | None = None) -> Weight:
    """The fastest form of a weight that is only ever multiplied; the caller drops `weight` to keep one copy."""
    for kind in (PanelWeight, PackedWeight):
        if kind.available(weight):
            return kind(weight, bias)
    return DenseWeight(weight, bias)


def pack_table(weight: Tensor, int8: bool = False) -> Table:
    """The fastest form of a head, and of the embedding where that is the same: panels, whose logits are not rounded
    and whose rows can be read, in bf16 or int8; a plain tensor where there can be no panels."""
    if not PanelWeight.available(weight):
        return DenseWeight(weight)
    return Int8Weight(weight) if int8 else PanelWeight(weight)
