"""One adapter in training: its data cursor, schedule, optimizer and early stopping, on a clock of its own.

Nothing here depends on what else is trained beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorikeet.config import AdapterRecipe, AdapterSettings
from lorikeet.model.spec import ModelSpec
from lorikeet.train.dataset import Example
from lorikeet.train.ops import Dropout
from lorikeet.train.packing import Share
from lorikeet.train.parameters import AdapterParameters
from lorikeet.types import ROLES


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step did: the token mean of the loss before it (nats), the norm before clipping."""

    step: int
    loss: float
    tokens: int  # that went through the forward pass
    lr: float
    grad_norm: float
    validation_loss: float | None = None  # after the step, where it was due


@dataclass(slots=True)
class Progress:
    """The clock and the memory of early stopping: with the flat tensors, all there is to a checkpoint."""

    step: int = 0
    tokens: int = 0  # forward tokens, training rows only
    seconds: float = 0.0  # this adapter's share of the joint wall time, by forward tokens
    loss: float | None = None
    validation_loss: float | None = None
    best_loss: float | None = None
    best_step: int = 0
    bad_evaluations: int = 0
    stopped: str | None = None  # why it ended: "epochs", "early stopping", "not finite"


class AdapterRun:
    """`recipe` is resolved. Data order, initial weights and dropout come from its seed alone.

    Batch `step` is `batch_rows` rows of epoch `step // steps_per_epoch`, whose order is drawn from (seed, epoch): the
    step number is the whole data cursor and the state of every random number.
    """

    def __init__(
        self,
        recipe: AdapterRecipe,
        spec: ModelSpec,
        train: list[Example],
        validation: list[Example],
        *,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.recipe, self.name = recipe, recipe.name
        self.settings = _Settings(recipe)
        self.train, self.validation = train, validation
        self.steps_per_epoch = -(-len(train) // self.settings.batch_rows)
        self.total_steps = max(1, math.ceil(self.settings.epochs * self.steps_per_epoch))
        dtype = torch.promote_types(compute_dtype, torch.float32)
        self.parameters = AdapterParameters(
            spec,
            self.settings.roles,
            self.settings.rank,
            self.settings.scale,
            compute_dtype=compute_dtype,
            dtype=dtype,
        )
        self.parameters.initialise(self.settings.seed)
        self.master = torch.nn.Parameter(self.parameters.data)
        self.master.grad = self.parameters.grad
        self.optimizer = torch.optim.AdamW(
            [self.master], lr=self.settings.learning_rate, weight_decay=self.settings.weight_decay, fused=True
        )
        self.progress = Progress()
        self.best: Tensor | None = None
        self._order: tuple[int, list[int]] = (-1, [])

    @property
    def finished(self) -> bool:
        return self.progress.stopped is not None

    def next_rows(self, handle: int) -> Share:
        """The rows of the coming optimizer step."""
        epoch, i = divmod(self.progress.step, self.steps_per_epoch)
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + epoch)
            self._order = (epoch, torch.randperm(len(self.train), generator=generator).tolist())
        size = self.settings.batch_rows
        rows = self._order[1][i * size : (i + 1) * size]
        return Share(handle, rows, [self.train[row] for row in rows])

    @property
    def dropout(self) -> Dropout | None:
        """Of the coming optimizer step."""
        rate = self.settings.dropout
        return Dropout(rate, self.settings.seed, self.progress.step) if rate else None

    def update(self, loss: float, tokens: int) -> StepResult:
        """Clip, AdamW and schedule, from the gradient of the token mean; clears the gradient.

        A loss or gradient that is not finite ends this adapter without touching its weights.
        """
        p, settings = self.progress, self.settings
        grad = self.parameters.grad
        norm = torch.linalg.vector_norm(grad).item()
        p.tokens += tokens
        p.loss = loss
        rate = self.learning_rate(p.step)
        result = StepResult(p.step + 1, loss, tokens, rate, norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            p.stopped = "not finite"
            return result
        if settings.clip and norm > settings.clip:
            grad.mul_(settings.clip / (norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        grad.zero_()
        self.parameters.refresh()
        p.step += 1
        if p.step >= self.total_steps:
            p.stopped = "epochs"
        return result

    def learning_rate(self, step: int) -> float:
        """Of the optimizer step that follows `step` others: linear warm-up, then the schedule down to zero."""
        s = self.settings
        warmup = round(s.warmup * self.total_steps)
        if step < warmup:
            return s.learning_rate * (step + 1) / warmup
        done = (step - warmup) / max(1, self.total_steps - warmup)
        if s.schedule == "cosine":
            return s.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
        return s.learning_rate * (1 - done) if s.schedule == "linear" else s.learning_rate

    @property
    def evaluation_due(self) -> bool:
        """At the end of every epoch and of training."""
        ended = self.progress.stopped == "epochs" or self.progress.step % self.steps_per_epoch == 0
        return bool(self.validation) and ended and self.progress.stopped != "not finite"

    def evaluated(self, loss: float) -> None:
        """Note a validation loss: remember the best weights, end after `patience` evaluations without a better one."""
        p, stopping = self.progress, self.recipe.early_stopping
        p.validation_loss = loss
        if p.best_loss is None or loss < p.best_loss:
            p.best_loss, p.best_step, p.bad_evaluations = loss, p.step, 0
            if stopping is not None:
                self.best = self.parameters.data.clone()
            return
        p.bad_evaluations += 1
        if stopping is not None and p.bad_evaluations >= stopping.patience:
            p.stopped = p.stopped or "early stopping"

    def final_weights(self) -> None:
        """With early stopping the weights of the best evaluation are the ones kept."""
        if self.best is not None:
            self.parameters.data.copy_(self.best)
            self.parameters.refresh()

    def state(self) -> dict[str, Tensor]:
        """The flat tensors of a checkpoint, without copying."""
        moments: dict[str, Any] = self.optimizer.state.get(self.master, {})
        tensors = {"weights": self.parameters.data}
        tensors |= {name: moments[name] for name in ("exp_avg", "exp_avg_sq") if name in moments}
        return tensors | ({} if self.best is None else {"best": self.best})

    def restore(self, tensors: dict[str, Tensor], progress: Progress) -> None:
        """Go on from a checkpoint of the same recipe."""
        self.parameters.data.copy_(tensors["weights"])
        self.parameters.refresh()
        if "exp_avg" in tensors:
            self.optimizer.state[self.master] = {
                "step": torch.tensor(float(progress.step)),
                "exp_avg": tensors["exp_avg"].clone(),
                "exp_avg_sq": tensors["exp_avg_sq"].clone(),
            }
        self.best = tensors["best"].clone() if "best" in tensors else None
        self.progress = progress


class _Settings:
    """A resolved recipe's settings, none of them None."""

    def __init__(self, recipe: AdapterSettings) -> None:
        def given(name: str) -> Any:
            value = getattr(recipe, name)
            assert value is not None, f"{name} is not resolved"
            return value

        self.epochs: float = given("epochs")
        self.seed: int = given("seed")
        self.rank: int = given("rank")
        self.alpha: float = given("alpha")
        self.rslora: bool = given("rslora")
        targets = given("targets")
        self.roles: tuple[str, ...] = ROLES if targets == "all-linear" else tuple(targets)
        self.learning_rate: float = given("learning_rate")
        self.schedule: str = given("schedule")
        self.warmup: float = given("warmup")
        self.batch_rows: int = given("batch_rows")
        self.weight_decay: float = given("weight_decay")
        self.clip: float = given("clip")
        self.dropout: float = given("dropout")

    @property
    def scale(self) -> float:
        """alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA (Kalajdzievski 2023)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)
