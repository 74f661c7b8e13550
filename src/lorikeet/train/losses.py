"""Cross entropy over the completion tokens, fused with the head so that a chunk of logits lives at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorikeet.kernels.precision import bf16_products
from lorikeet.kernels.weight import Weight

CHUNK = 512  # rows of logits held at once


def completion_loss(x: Tensor, weight: Weight, targets: Tensor | None) -> Tensor:
    """x [L, hidden], targets [L] -> negative log likelihood of each target [L], fp32 (fp64 with fp64 x), in nats.

    Without targets: the logits themselves [L, vocabulary], fp32 and unrounded.
    """
    if targets is None:
        return _logits(x, _wide_table(weight, x), weight)
    loss: Tensor = _CompletionLoss.apply(x, weight, targets)  # type: ignore[no-untyped-call]
    return loss


def _wide_table(weight: Weight, x: Tensor) -> Tensor:
    return weight.dequantised().to(torch.promote_types(x.dtype, torch.float32))


def _logits(x: Tensor, table: Tensor, weight: Weight) -> Tensor:
    """`table` is the weight in the dtype of the logits."""
    with bf16_products(x.dtype == torch.bfloat16):
        logits = x.to(table.dtype) @ table.T
    return logits if weight.bias is None else logits.add_(weight.bias)


class _CompletionLoss(torch.autograd.Function):
    """Forward computes dloss/dx along the way: backward only scales its rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, targets: Tensor) -> Tensor:
        losses = torch.empty(len(targets), dtype=torch.promote_types(x.dtype, torch.float32))
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        table = _wide_table(weight, x)
        for start in range(0, len(targets), CHUNK):
            rows = slice(start, start + CHUNK)
            goal = targets[rows, None]
            logits = _logits(x[rows], table, weight)
            # The largest logit's probability is at least 1 / vocabulary, so its logarithm is exact enough; summing
            # exponentials by themselves would be slow where they underflow.
            largest, place = logits.max(-1, keepdim=True)
            probabilities = torch.softmax(logits, -1)
            normaliser = largest - probabilities.gather(1, place).log_()
            losses[rows] = (normaliser - logits.gather(1, goal)).squeeze(1)
            if dx is not None:
                probabilities.scatter_add_(1, goal, probabilities.new_full(goal.shape, -1.0))
                torch.mm(probabilities.to(x.dtype), weight.dequantised(), out=dx[rows])
        if dx is not None:
            ctx.save_for_backward(dx)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (dx,) = ctx.saved_tensors
        return (dx * grads[0].unsqueeze(1)).to(dx.dtype), None, None
