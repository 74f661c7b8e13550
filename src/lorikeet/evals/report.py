"""Results on the screen and on disk."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.box import SIMPLE_HEAD
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
        # the joint run holds every core, so an adapter's share of wall time is a share of all of them
        result.core_seconds = entry["train_seconds"] * (os.cpu_count() or 1)
        result.joint_wall_seconds = summary["joint_wall_seconds"]
        result.adapter_bytes = entry["adapter_bytes"]


def table(results: Sequence[Result], title: str = "Base and adapters, one mixed load") -> Table:
    """A row a task, two lines each: scores in percent with their 95% intervals, cost of training and size, latency.

    No wider than 80 columns, so that nothing is cut on a plain terminal.
    """
    out = Table(title=title, box=SIMPLE_HEAD, pad_edge=False)
    out.add_column("task\nmetric, rows", no_wrap=True)
    for name in ("base\n95%", "adapter\n95%", "baseline\n95%", "core-s\nMiB", "p50 ms\np95"):
        out.add_column(name, justify="right", no_wrap=True)
    for r in results:
        out.add_row(
            f"{r.task}\n{r.metric}, {r.n}",
            _percent(r.base, r.base_ci),
            _percent(r.adapter, r.adapter_ci),
            _percent(r.baseline, r.baseline_ci),
            _lines(r.core_seconds and f"{r.core_seconds:.0f}", r.adapter_bytes and f"{r.adapter_bytes / 2**20:.1f}"),
            _lines(r.p50_ms and f"{r.p50_ms:.0f}", r.p95_ms and f"{r.p95_ms:.0f}"),
        )
    return out


def _percent(score: float | None, interval: tuple[float, float] | None) -> str:
    if score is None:
        return "-"
    text = f"{100 * score:.1f}"
    return text if interval is None else f"{text}\n{100 * interval[0]:.1f}-{100 * interval[1]:.1f}"


def _lines(first: str | float | None, second: str | float | None) -> str:
    return "-" if first is None else f"{first}\n{second}"


def write(results: Sequence[Result], path: Path) -> None:
    """The results as a JSON array, replaced in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    temporary.write_bytes(msgspec.json.format(msgspec.json.encode(list(results)), indent=2))
    temporary.replace(path)
