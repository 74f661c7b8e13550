"""Joint training == each adapter trained alone; and both follow peft with torch's AdamW."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.train.small import random_base, random_examples, resolved

from lorikeet.config import EarlyStopping
from lorikeet.model.decoder import DecoderWeights
from lorikeet.model.spec import ModelSpec
from lorikeet.train.adapter_run import AdapterRun
from lorikeet.train.joint import JointTrainer

# Different ranks, targets, batch sizes, lengths, schedules; two leave early, one by early stopping.
SETTINGS: list[dict[str, Any]] = [
    {"rank": 4, "batch_rows": 4, "dropout": 0.2, "clip": 0.5, "learning_rate": 1e-2, "weight_decay": 0.1, "seed": 1},
    {"rank": 1, "batch_rows": 7, "targets": ["q", "down"], "clip": 0.05, "schedule": "linear", "warmup": 0.2},
    {"rank": 3, "batch_rows": 2, "dropout": 0.5, "targets": ["k", "v", "up"], "rslora": True, "schedule": "constant"},
    {"rank": 2, "batch_rows": 5, "early_stopping": EarlyStopping(patience=2), "learning_rate": 0.02, "seed": 3},
]
STEPS = [100, 100, 30, 100]
LATE = 1  # this adapter enters after 25 steps


def make_runs(spec: ModelSpec, dtype: torch.dtype, steps: list[int] = STEPS) -> list[AdapterRun]:
    runs = []
    for i, (settings, count) in enumerate(zip(SETTINGS, steps, strict=True)):
        train = random_examples(23, i, longest=(12, 40, 20, 30)[i])
        validation = random_examples(6, 50 + i) if "early_stopping" in settings else []
        per_epoch = -(-len(train) // settings["batch_rows"])
        recipe = resolved(f"adapter-{i}", **{"epochs": count / per_epoch, **settings})
        run = AdapterRun(recipe, spec, train, validation, compute_dtype=dtype)
        assert run.total_steps == count
        runs.append(run)
    return runs


def train(
    base: tuple[ModelSpec, DecoderWeights], runs: list[AdapterRun], *, late: int | None = None, step_tokens: int = 8192
) -> dict[str, list[float]]:
    """All losses, training and validation, of every run in order."""
    trainer = JointTrainer(*base, step_tokens=step_tokens)
    for i, run in enumerate(runs):
        if i != late:
            trainer.add(run)
    losses: dict[str, list[float]] = {run.name: [] for run in runs}
    for step in range(1000):
        if step == 25 and late is not None:
            trainer.add(runs[late])
        if not trainer.active:
            break
        for name, result in trainer.step().items():
            losses[name] += [result.loss] if result.validation_loss is None else [result.loss, result.validation_loss]
    return losses


def test_joint_is_alone_fp64() -> None:
    """100 steps, dropout and clipping on, other accumulation; two leave early, one enters late: within 1e-9."""
    base = random_base(torch.float64)
    together = make_runs(base[0], torch.float64)
    joint = train(base, together, late=LATE, step_tokens=150)
    assert together[3].progress.stopped == "early stopping" and together[3].progress.step < 100
    assert [len(joint[run.name]) for run in together[:3]] == [100, 100, 30]
    for i, run in enumerate(make_runs(base[0], torch.float64)):
        alone = train(base, [run], step_tokens=(8192, 60, 8192, 41)[i])
        assert joint[run.name] == pytest.approx(alone[run.name], abs=1e-9, rel=0)
        assert alone[run.name][0] - min(alone[run.name]) > 0.05  # it did learn
        torch.testing.assert_close(together[i].parameters.data, run.parameters.data, rtol=1e-7, atol=1e-9)


def test_joint_is_alone_fp32() -> None:
    base = random_base(torch.float32)
    joint = train(base, make_runs(base[0], torch.float32, [20] * 4), step_tokens=200)
    for run in make_runs(base[0], torch.float32, [20] * 4):
        alone = train(base, [run])
        assert joint[run.name] == pytest.approx(alone[run.name], rel=1e-5)


def test_a_poisoned_adapter_ends_alone() -> None:
    """NaN in one adapter: it stops with its reason, no other run changes by a bit."""
    base = random_base(torch.float32)
    clean = train(base, make_runs(base[0], torch.float32, [10] * 4)[:3])
    runs = make_runs(base[0], torch.float32, [10] * 4)[:3]
    runs[1].parameters.data[3] = float("nan")
    runs[1].parameters.refresh()
    dirty = train(base, runs)
    assert runs[1].progress.stopped == "not finite" and len(dirty["adapter-1"]) == 1
    for name in ("adapter-0", "adapter-2"):
        assert dirty[name] == pytest.approx(clean[name], rel=1e-5)


def test_bf16_follows_fp32() -> None:
    """A bf16 base with fp32 masters ends near the fp32 run, and small updates are not lost."""
    settings = {"rank": 4, "batch_rows": 8, "learning_rate": 3e-3, "epochs": 30.0}
    ends = {}
    for dtype in (torch.float32, torch.bfloat16):
        spec, weights = random_base(dtype)
        run = AdapterRun(resolved(**settings), spec, random_examples(24), [], compute_dtype=dtype)
        assert run.parameters.data.dtype == torch.float32
        losses = train((spec, weights), [run])["a"]
        ends[dtype] = (losses[0], losses[-1])
    assert ends[torch.bfloat16][0] == pytest.approx(ends[torch.float32][0], rel=0.03)
    assert ends[torch.bfloat16][1] == pytest.approx(ends[torch.float32][1], rel=0.1)
    assert ends[torch.float32][1] < 0.6 * ends[torch.float32][0]


def test_schedules() -> None:
    base = random_base(torch.float32)[0]

    def rates(**settings: Any) -> list[float]:
        run = AdapterRun(resolved(batch_rows=1, epochs=10, learning_rate=1.0, **settings), base, random_examples(1), [])
        return [run.learning_rate(step) for step in range(10)]

    assert rates(schedule="constant", warmup=0.0) == [1.0] * 10
    assert rates(schedule="linear", warmup=0.2) == pytest.approx([0.5, 1.0, *[1 - i / 8 for i in range(8)]])
    cosine = rates(schedule="cosine", warmup=0.0)
    assert cosine[0] == 1 and cosine[5] == pytest.approx(0.5) and 0 < cosine[9] < 0.03


def test_batches_are_rows_of_an_epoch() -> None:
    """Every row once an epoch, in an order of the epoch's own, the same for the same seed."""
    spec = random_base(torch.float32)[0]
    orders = []
    for _ in range(2):
        run = AdapterRun(resolved(batch_rows=4, epochs=2, seed=5), spec, random_examples(10), [])
        epochs = []
        for step in range(6):
            run.progress.step = step
            epochs.append(run.next_rows(0).rows)
        orders.append(epochs)
    assert orders[0] == orders[1]
    first, second = ([row for rows in orders[0][i : i + 3] for row in rows] for i in (0, 3))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert [len(rows) for rows in orders[0]] == [4, 4, 2] * 2


def test_early_stopping_keeps_the_best_weights() -> None:
    base = random_base(torch.float32)
    run = make_runs(base[0], torch.float32)[3]
    losses = train(base, [run])["adapter-3"]
    assert run.progress.stopped == "early stopping" and run.progress.best_step < run.progress.step
    run.final_weights()
    assert JointTrainer(*base).evaluate(run) == pytest.approx(run.progress.best_loss, rel=1e-6)
    assert run.progress.best_loss in losses
