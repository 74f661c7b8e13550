"""Results on the screen and on disk."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.table import Table

from lorikeet.evals.harness import Result


def add_training(results: Sequence[Result], adapters: Mapping[str, str | None], summary: Mapping[str, Any]) -> None:
    """Fill in cost and size from a training run's `summary.json`, where the task's adapter came from it.

    `adapters` maps task names to adapter names.
    """
    trained = summary.get("adapters", {})
    for result in results:
        entry = trained.get(adapters.get(result.task) or "")
        if entry is None:
            continue
        result.train_seconds = entry["train_seconds"]
        result.joint_wall_seconds = summary["joint_wall_seconds"]
        result.adapter_bytes = entry["adapter_bytes"]


def table(results: Sequence[Result], title: str = "Base and adapters, one mixed load") -> Table:
    """A line a task: scores in percent with their 95% intervals, cost, size, latency."""
    out = Table(title=title)
    for name in ("task", "metric", "rows", "base", "adapter", "baseline", "train core-s", "size", "p50 ms", "p95 ms"):
        out.add_column(name, justify="left" if name in ("task", "metric") else "right")
    for r in results:
        out.add_row(
            r.task,
            r.metric,
            str(r.n),
            _percent(r.base, r.base_ci),
            _percent(r.adapter, r.adapter_ci),
            _percent(r.baseline, None),
            # the joint run holds every core, so an adapter's share of wall time is a share of all of them
            "-" if r.train_seconds is None else f"{r.train_seconds * (os.cpu_count() or 1):.0f}",
            "-" if r.adapter_bytes is None else f"{r.adapter_bytes / 2**20:.1f} MiB",
            "-" if r.p50_ms is None else f"{r.p50_ms:.0f}",
            "-" if r.p95_ms is None else f"{r.p95_ms:.0f}",
        )
    return out


def _percent(score: float | None, interval: tuple[float, float] | None) -> str:
    if score is None:
        return "-"
    text = f"{100 * score:.1f}"
    return text if interval is None else f"{text} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def write(results: Sequence[Result], path: Path) -> None:
    """The results as a JSON array, replaced in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    temporary.write_bytes(msgspec.json.format(msgspec.json.encode(list(results)), indent=2))
    temporary.replace(path)
