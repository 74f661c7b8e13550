"""Cross entropy over the completion tokens, fused with the head so that a chunk of logits lives at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorikeet.kernels.weight import Weight
from lorikeet.train.precision import bf16_products

CHUNK = 512  # rows of logits held at once


def completion_loss(x: Tensor, weight: Weight, targets: Tensor | None) -> Tensor:
    """x [L, hidden], targets [L] -> negative log likelihood of each target [L], fp32 (fp64 with fp64 x), in nats.

    Without targets: the logits themselves [L, vocabulary], fp32 and unrounded.
    """
    if targets is None:
        return _logits(x, weight)
    loss: Tensor = _CompletionLoss.apply(x, weight, targets)  # type: ignore[no-untyped-call]
    return loss


def _logits(x: Tensor, weight: Weight) -> Tensor:
    if x.dtype != torch.bfloat16:
        return weight.linear(x)
    wide, table = x.float(), weight.dequantised().float()
    with bf16_products():
        logits = wide @ table.T
    return logits if weight.bias is None else logits.add_(weight.bias)


class _CompletionLoss(torch.autograd.Function):
    """Forward computes dloss/dx along the way: backward only scales its rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, targets: Tensor) -> Tensor:
        losses = torch.empty(len(targets), dtype=torch.promote_types(x.dtype, torch.float32))
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        for start in range(0, len(targets), CHUNK):
            rows = slice(start, start + CHUNK)
            goal = targets[rows, None]
            logits = _logits(x[rows], weight)
            normaliser = logits.logsumexp(-1, keepdim=True)
            losses[rows] = (normaliser - logits.gather(1, goal)).squeeze(1)
            if dx is not None:
                probabilities = logits.sub_(normaliser).exp_()
                probabilities.scatter_add_(1, goal, probabilities.new_full(goal.shape, -1.0))
                torch.mm(probabilities.to(x.dtype), weight.dequantised(), out=dx[rows])
        if dx is not None:
            ctx.save_for_backward(dx)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (dx,) = ctx.saved_tensors
        return (dx * grads[0].unsqueeze(1)).to(dx.dtype), None, None
