import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from lorikeet.config import EvalRecipe
from lorikeet.errors import ConfigError, DataError
from lorikeet.evals import report
from lorikeet.evals.harness import Answer, Job, Result, judge, prepare

ROWS: dict[str, list[dict[str, Any]]] = {
    "test.jsonl": [{"text": f"where is parcel {i}", "label": "parcel" if i % 2 else "refund"} for i in range(20)],
    "train.jsonl": [{"text": f"my parcel {i}", "label": "parcel"} for i in range(8)]
    + [{"text": f"money back {i}", "label": "refund"} for i in range(8)]
    + [{"text": "hello", "label": "greeting"}],
    "facts.jsonl": [{"facts": f, "text": t} for f, t in (("a", "x y"), ("b", "z"), ("a", "x"), ("b", "z z"))],
}


def read_rows(path: Path, convert: str | None) -> list[dict[str, Any]]:
    assert convert is None
    return ROWS[path.name]


def recipe(**task: Any) -> EvalRecipe:
    defaults = {
        "name": "intent",
        "adapter": "intent",
        "data": {"test": "test.jsonl"},
        "prompt": "Customer: {text}\nIntent:",
        "reference": "{label}",
        "metric": "accuracy",
    }
    return msgspec.convert({"version": 1, "tasks": [defaults | task]}, EvalRecipe)


class Scripted:
    """The base always says "parcel", the adapter knows the answer but for the rows in `wrong`."""

    def __init__(self, wrong: int = 0) -> None:
        self.wrong = wrong
        self.jobs: list[Job] = []

    def __call__(self, jobs: Sequence[Job]) -> list[Answer]:
        self.jobs = list(jobs)
        truth = [row["label"] for row in ROWS["test.jsonl"]]
        return [
            Answer(" parcel", 5.0)
            if job.adapter is None
            else Answer(" " + (truth[job.row] if job.row >= self.wrong else "?"), 10.0 + job.row)
            for job in jobs
        ]


def test_base_and_adapter_are_judged_on_the_same_rows_in_one_shuffled_load() -> None:
    wanted, generate = recipe(), Scripted(wrong=2)
    (result,) = judge(wanted, prepare(wanted, Path(), read_rows), generate)
    assert (result.n, result.base, result.adapter) == (20, 0.5, 0.9)
    assert result.adapter_ci is not None and result.adapter_ci[0] < 0.9 < result.adapter_ci[1] <= 1.0
    assert (result.p50_ms, result.p95_ms) == (20.0, 29.0)
    order = [(job.adapter, job.row) for job in generate.jobs]
    assert sorted(order, key=str) == sorted([(a, r) for a in (None, "intent") for r in range(20)], key=str)
    assert {adapter for adapter, _ in order[:20]} == {None, "intent"}


def test_choices_come_from_the_data_and_start_as_training_completions_do() -> None:
    wanted = recipe(choices="from-data", data={"test": "test.jsonl", "train": "train.jsonl"})
    generate = Scripted()
    judge(wanted, prepare(wanted, Path(), read_rows), generate)
    assert generate.jobs[0].choices == (" greeting", " parcel", " refund")
    spaced = recipe(choices=["a", "b"], prompt="{text} ")
    assert prepare(spaced, Path(), read_rows)[0].choices == ("a", "b")


def test_baseline_learns_from_the_training_rows() -> None:
    wanted = recipe(baseline="tfidf", input="text", data={"test": "test.jsonl", "train": "train.jsonl"})
    (result,) = judge(wanted, prepare(wanted, Path(), read_rows), Scripted())
    assert result.baseline == 0.5  # it has seen "parcel" with one label alone
    assert result.baseline_ci == result.base_ci  # right on the same rows, so equal in every resample
    with pytest.raises(ConfigError, match=r"tasks\[0\].baseline: needs the rows"):
        prepare(recipe(baseline="tfidf"), Path(), read_rows)


def test_rows_of_one_question_are_one_item_with_several_references() -> None:
    wanted = recipe(
        data={"test": "facts.jsonl", "group_by": "facts"}, prompt="{facts}", reference="{text}", metric="rouge_l"
    )
    (item,) = prepare(wanted, Path(), read_rows)
    assert item.prompts == ["a", "b"]
    assert item.references == [["x y", "x"], ["z", "z z"]]


def test_a_column_that_is_not_there_is_named() -> None:
    with pytest.raises(DataError, match="column 'body' is not in the row; it has 'text', 'label'"):
        prepare(recipe(prompt="{body}"), Path(), read_rows)


def test_report_adds_what_training_cost_and_writes_formats_md(tmp_path: Path) -> None:
    wanted = recipe()
    results = judge(wanted, prepare(wanted, Path(), read_rows), Scripted())
    summary = {"joint_wall_seconds": 60.0, "adapters": {"intent": {"train_seconds": 20.0, "adapter_bytes": 1000}}}
    report.add_training(results, {"intent": "intent"}, summary)
    report.write(results, tmp_path / "out" / "results.json")
    (line,) = msgspec.json.decode((tmp_path / "out" / "results.json").read_bytes())
    assert set(line) == {
        "task", "metric", "n", "base", "base_ci", "adapter", "adapter_ci", "baseline", "baseline_ci", "seed",
        "train_seconds", "core_seconds", "joint_wall_seconds", "adapter_bytes", "p50_ms", "p95_ms",
    }  # fmt: skip
    assert (line["train_seconds"], line["joint_wall_seconds"], line["adapter_bytes"]) == (20.0, 60.0, 1000)


def test_nothing_of_the_table_is_cut_on_a_terminal_of_80_columns() -> None:
    whole = (1.0, 1.0)
    result = Result(
        task="entities", metric="json_field_f1", n=3000, base=0.123, base_ci=(0.1, 0.15), adapter=1.0, adapter_ci=whole,
        baseline=1.0, baseline_ci=whole, core_seconds=1234.0, adapter_bytes=3 * 2**20, p50_ms=12345.0, p95_ms=23456.0,
    )  # fmt: skip
    console = Console(width=80, file=io.StringIO())
    console.print(report.table([result]))
    said = console.file.getvalue()
    for text in ("json_field_f1, 3000", "10.0-15.0", "100.0-100.0", "1234", "3.0", "12345", "23456"):
        assert text in said, said
    assert said.count("100.0-100.0") == 2 and "…" not in said
