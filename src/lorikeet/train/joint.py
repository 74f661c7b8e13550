"""Joint training: every adapter that still trains takes one optimizer step in shared forward passes over one base."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from lorikeet.model.decoder import DecoderWeights, forward
from lorikeet.model.spec import ModelSpec
from lorikeet.train.adapter_run import AdapterRun, StepResult
from lorikeet.train.dataset import Example
from lorikeet.train.ops import TrainedAdapters, TrainOps
from lorikeet.train.packing import Pass, Share, pack, split


class JointTrainer:
    """Adapters come with `add` at any time and leave when they have finished; the others do not notice.

    `step_tokens` bounds the tokens of one forward pass: more rows become several passes whose gradients add up, with
    the same result.
    """

    def __init__(self, spec: ModelSpec, weights: DecoderWeights, *, step_tokens: int = 8192) -> None:
        self.spec, self.weights, self.step_tokens = spec, weights, step_tokens
        self.runs: list[AdapterRun] = []

    def add(self, run: AdapterRun) -> None:
        self.runs.append(run)

    def remove(self, run: AdapterRun) -> None:
        """Before it has finished, between two steps."""
        self.runs.remove(run)

    @property
    def active(self) -> list[AdapterRun]:
        return [run for run in self.runs if not run.finished]

    def step(self) -> dict[str, StepResult]:
        """One optimizer step of every active adapter, and validation where it is due. What each did, by name."""
        began = time.perf_counter()
        runs = self.active
        shares = [run.next_rows(handle) for handle, run in enumerate(runs)]
        learned = [sum(example.learned_tokens for example in share.examples) for share in shares]
        sums = [0.0] * len(runs)
        for group in split(shares, self.step_tokens):
            packed = pack(group)
            losses = self._losses(runs, packed, dropout=True)
            parts = [losses[span].sum() for span in packed.spans]
            total = torch.stack([p / learned[s.handle] for p, s in zip(parts, packed.shares, strict=True)]).sum()
            total.backward()
            for part, share in zip(parts, packed.shares, strict=True):
                sums[share.handle] += part.item()
        results = {
            run.name: run.update(loss / count, share.tokens)
            for run, share, loss, count in zip(runs, shares, sums, learned, strict=True)
        }
        self._account(runs, [share.tokens for share in shares], time.perf_counter() - began)
        for run in runs:
            if run.evaluation_due:
                loss = self.evaluate(run)
                run.evaluated(loss)
                results[run.name] = replace(results[run.name], validation_loss=loss)
        return results

    def evaluate(self, run: AdapterRun) -> float:
        """The token mean of the loss over the adapter's validation rows, in nats."""
        began = time.perf_counter()
        examples = run.validation
        total = 0.0
        with torch.no_grad():
            for group in split([Share(0, list(range(len(examples))), examples)], self.step_tokens):
                total += self._losses([run], pack(group), dropout=False).double().sum().item()
        self._account([run], [1], time.perf_counter() - began)
        return total / sum(example.learned_tokens for example in examples)

    def losses(self, run: AdapterRun, examples: list[Example]) -> torch.Tensor:
        """Negative log likelihood of every learned token of `examples`, without dropout: what `evaluate` averages."""
        with torch.no_grad():
            return self._losses([run], pack([Share(0, list(range(len(examples))), examples)]), dropout=False)

    def _losses(self, runs: Sequence[AdapterRun], packed: Pass, dropout: bool) -> torch.Tensor:
        adapters = TrainedAdapters([run.parameters for run in runs], [run.dropout if dropout else None for run in runs])
        ops = TrainOps(packed.batch, packed.targets, packed.places)
        return forward(self.spec, self.weights, packed.batch, ops, adapters)

    def _account(self, runs: Sequence[AdapterRun], tokens: Sequence[int], seconds: float) -> None:
        for run, count in zip(runs, tokens, strict=True):
            run.progress.seconds += seconds * count / sum(tokens)
