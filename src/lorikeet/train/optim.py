"""Optimizers over named fp32 masters: Muon for the matrices inside blocks, AdamW for everything else, and schedules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, iterations: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly: a batch [n, rows, columns] -> the same shape, bf16.

    Newton-Schulz iteration with the quintic of Muon (K. Jordan et al., 2024): singular values end within about
    0.7 to 1.2, which is all that the update needs, and bf16 is enough for it.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.to(torch.bfloat16)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True) + 1e-7).to(x.dtype)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    result: Tensor = x.mT if tall else x
    return result


@dataclass(frozen=True, kw_only=True)
class TrapezoidalSchedule:
    """Warm-up, constant, linear decay to zero ("WSD"): a run may be ended at any point by its decay phase."""

    warmup: int
    total: int
    decay: int

    def __call__(self, done: int) -> float:
        """Factor of the peak learning rate after `done` of `total` (the same unit as the fields: tokens here)."""
        rising = (done + 1) / max(self.warmup, 1)
        falling = (self.total - done) / max(self.decay, 1)
        return max(0.0, min(1.0, rising, falling))


class AdamW:
    """AdamW (Loshchilov and Hutter, 2019) over named fp32 tensors, updated in place; weight decay on matrices only."""

    def __init__(
        self,
        masters: Mapping[str, Tensor],
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
        weight_decay: float = 0.0,
    ) -> None:
        self.masters = dict(masters)
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.count = 0
        self.mean = {name: torch.zeros_like(p) for name, p in self.masters.items()}
        self.square = {name: torch.zeros_like(p) for name, p in self.masters.items()}

    @torch.no_grad()
    def step(self, grads: Mapping[str, Tensor], lr: float) -> None:
        """One update; `grads` has a tensor of each master's shape (any float dtype)."""
        self.count += 1
        first, second = self.betas
        for name, master in self.masters.items():
            grad = grads[name].float()
            mean, square = self.mean[name], self.square[name]
            mean.lerp_(grad, 1 - first)
            square.mul_(second).addcmul_(grad, grad, value=1 - second)
            root = (square / (1 - second**self.count)).sqrt_().add_(self.eps)
            if self.weight_decay and master.dim() > 1:
                master.mul_(1 - lr * self.weight_decay)
            master.addcdiv_(mean, root, value=-lr / (1 - first**self.count))

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean, "square": self.square}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count = state["count"]
        for name in self.masters:
            self.mean[name].copy_(state["mean"][name])
            self.square[name].copy_(state["square"][name])


class Muon:
    """Momentum, orthogonalised, for 2-D matrices (K. Jordan et al., "Muon", 2024), batched over equal shapes.

    A matrix taller than wide moves by sqrt(rows / columns) more, so that outputs change alike whatever the shape.
    """

    def __init__(self, masters: Mapping[str, Tensor], *, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        self.masters = dict(masters)
        self.momentum, self.weight_decay = momentum, weight_decay
        self.velocity = {name: torch.zeros_like(p) for name, p in self.masters.items()}
        self.shapes: dict[tuple[int, ...], list[str]] = {}
        for name, master in self.masters.items():
            if master.dim() != 2:
                raise ValueError(f"Muon takes matrices; {name} has shape {tuple(master.shape)}")
            self.shapes.setdefault(tuple(master.shape), []).append(name)

    @torch.no_grad()
    def step(self, grads: Mapping[str, Tensor], lr: float) -> None:
        """One update; `grads` has a tensor of each master's shape (any float dtype)."""
        for shape, names in self.shapes.items():
            updates = orthogonalise(torch.stack([self._nesterov(name, grads[name]) for name in names]))
            scale = max(1.0, shape[0] / shape[1]) ** 0.5
            for name, update in zip(names, updates, strict=True):
                master = self.masters[name]
                if self.weight_decay:
                    master.mul_(1 - lr * self.weight_decay)
                master.add_(update.float(), alpha=-lr * scale)

    def _nesterov(self, name: str, grad: Tensor) -> Tensor:
        velocity = self.velocity[name].lerp_(grad.float(), 1 - self.momentum)
        return torch.lerp(grad.float(), velocity, self.momentum).to(torch.bfloat16)

    def state_dict(self) -> dict[str, Any]:
        return {"velocity": self.velocity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in self.masters:
            self.velocity[name].copy_(state["velocity"][name])


def global_norm(grads: Sequence[Tensor]) -> Tensor:
    """Euclidean norm over all gradients together, an fp32 scalar."""
    norm: Tensor = torch.stack([grad.float().norm() for grad in grads]).norm()
    return norm
