"""What a run says while it trains: bars on the screen, one JSON object a line in a file."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from lorikeet.train.adapter_run import AdapterRun, StepResult


def metrics_lines(run: str, adapter: AdapterRun, result: StepResult) -> list[dict[str, Any]]:
    """What a step is worth saying: a line for training, and one for validation where it was due (formats.md)."""
    shared = {"v": 1, "t": round(time.time(), 3), "run": run, "adapter": adapter.name, "step": result.step}
    rest = {
        "tokens": adapter.progress.tokens,
        "lr": result.lr,
        "grad_norm": result.grad_norm,
        "seconds": round(adapter.progress.seconds, 3),
    }
    lines: list[dict[str, Any]] = [{**shared, "split": "train", "loss": result.loss, **rest}]
    if result.validation_loss is not None:
        lines.append({**shared, "split": "validation", "loss": result.validation_loss, **rest})
    return lines


class MetricsFile:
    """The lines of formats.md, `tokens` being those that went through the forward pass since the run's begin.

    On resume the lines of steps that will be taken again are removed; those of adapters that another run trains stay.
    """

    def __init__(self, path: Path, run: str, resumed: Sequence[AdapterRun] = ()) -> None:
        self.run = run
        kept: list[str] = []
        if resumed and path.exists():
            steps = {adapter.name: adapter.progress.step for adapter in resumed}
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                    if entry["step"] <= steps.get(entry["adapter"], entry["step"]):
                        kept.append(line)
                except (json.JSONDecodeError, KeyError):
                    continue  # the last line of a run that was killed while it wrote
        path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    def write(self, adapter: AdapterRun, result: StepResult) -> None:
        for line in metrics_lines(self.run, adapter, result):
            self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class Bars:
    """One bar an adapter: steps, loss, validation loss, tokens a second of wall time, time left."""

    def __init__(self, runs: Sequence[AdapterRun], console: Console) -> None:
        self.console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[validation]}"),
            TextColumn("{task.fields[speed]} tok/s"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            refresh_per_second=4,
        )
        self._tasks: dict[str, TaskID] = {}
        self._began = time.perf_counter()
        self._tokens_before = {run.name: run.progress.tokens for run in runs}
        for run in runs:
            self._tasks[run.name] = self._progress.add_task(
                run.name, total=run.total_steps, completed=run.progress.step,
                loss="-", validation="", speed="-", note="",
            )  # fmt: skip

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._progress.stop()

    def update(self, run: AdapterRun, result: StepResult) -> None:
        p = run.progress
        speed = (p.tokens - self._tokens_before[run.name]) / (time.perf_counter() - self._began)
        validation = "" if p.validation_loss is None else f"val {p.validation_loss:.3f}"
        note = "" if p.stopped in (None, "epochs") else p.stopped
        self._progress.update(
            self._tasks[run.name], completed=p.step, loss=f"{result.loss:.3f}", validation=validation,
            speed=f"{speed:,.0f}", note=note,
        )  # fmt: skip
        if not self.console.is_terminal and (result.validation_loss is not None or run.finished):
            self.console.print(
                f"{run.name}: step {p.step} of {run.total_steps}, loss {result.loss:.3f} {validation} {note}".rstrip()
            )
