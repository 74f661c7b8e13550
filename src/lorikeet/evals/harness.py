"""Judge adapters: the test rows of all tasks, base and adapters mixed, through whatever `generate` runs them on."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from lorikeet.config import EvalRecipe, EvalTask, resolve_tasks
from lorikeet.errors import ConfigError
from lorikeet.evals import metrics
from lorikeet.evals.baseline import tfidf
from lorikeet.template import Template

Rows = list[dict[str, Any]]
ReadRows = Callable[[Path, str | None], Rows]  # (file, conversion of formats.md or None)


@dataclass(frozen=True, slots=True)
class Job:
    """One question to one model. `adapter` None is the base."""

    task: str
    row: int
    adapter: str | None
    prompt: str | None
    messages: list[dict[str, str]] | None
    max_tokens: int
    stop: tuple[str, ...]
    choices: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back; `latency_ms` from sending to the last token, None where nobody measured it."""

    text: str
    latency_ms: float | None = None


Generate = Callable[[Sequence[Job]], list[Answer]]


class Result(msgspec.Struct, kw_only=True):
    """One line of the results file (formats.md); scores and intervals 0 to 1.

    `core_seconds` are what training cost: of a job the CPU time it used; else the adapter's share of the wall time,
    times the cores of the machine.
    """

    task: str
    metric: str
    n: int
    base: float
    base_ci: tuple[float, float]
    adapter: float | None = None
    adapter_ci: tuple[float, float] | None = None
    baseline: float | None = None
    baseline_ci: tuple[float, float] | None = None
    seed: int = 0
    train_seconds: float | None = None
    core_seconds: float | None = None
    joint_wall_seconds: float | None = None
    adapter_bytes: int | None = None
    p50_ms: float | None = None
    p95_ms: float | None = None


@dataclass(slots=True)
class Prepared:
    """A task with its rows rendered: one prompt and one list of references a row."""

    task: EvalTask
    prompts: list[str]
    chats: list[list[dict[str, str]]] | None
    references: list[list[str]]
    choices: tuple[str, ...] | None
    baseline: metrics.Scored | None = None
    answers: dict[str | None, list[Answer]] = field(default_factory=dict)


def prepare(recipe: EvalRecipe, folder: Path, read_rows: ReadRows) -> list[Prepared]:
    """Read and render every task of the recipe; paths are relative to `folder`. Raises before anything is run."""
    prepared = []
    for i, task in enumerate(resolve_tasks(recipe)):
        where = f"$.tasks[{i}]"
        metrics.check_metric(task.metric, f"{where}.metric")
        prepared.append(_prepare_task(task, where, folder, read_rows, recipe.seed))
    return prepared


def _prepare_task(task: EvalTask, where: str, folder: Path, read_rows: ReadRows, seed: int) -> Prepared:
    rows = read_rows(folder / task.data.test, task.data.convert)
    if not rows:
        raise ConfigError(f"{where}.data.test: {task.data.test} holds no rows", param=f"{where}.data.test")
    groups = _grouped(rows, task.data.group_by, where)
    if task.data.limit is not None and task.data.limit < len(groups):
        groups = random.Random(seed).sample(groups, task.data.limit)
    texts = [task.reference] if isinstance(task.reference, str) else task.reference or []
    references = [Template(text, f"{where}.reference") for text in texts]
    rendered = [[r.render(row) for row in group for r in references] for group in groups]
    firsts = [group[0] for group in groups]
    chats = None
    if task.messages is not None:
        parts = [(m.role, Template(m.content, f"{where}.messages")) for m in task.messages]
        chats = [[{"role": role, "content": part.render(row)} for role, part in parts] for row in firsts]
        prompts = ["\n".join(message["content"] for message in chat) for chat in chats]
    else:
        assert task.prompt is not None
        template = Template(task.prompt, f"{where}.prompt")
        prompts = [template.render(row) for row in firsts]
    train = read_rows(folder / task.data.train, task.data.convert) if task.data.train is not None else None
    train_labels = [references[0].render(row) for row in train] if train is not None else []
    item = Prepared(task, prompts, chats, rendered, _choices(task, where, rendered, train_labels))
    if task.baseline is not None:
        if train is None:
            raise ConfigError(
                f"{where}.baseline: needs the rows it learns from", hint="add data.train", param=f"{where}.data.train"
            )
        source = Template(f"{{{task.input}}}" if task.input else task.prompt or "", f"{where}.input")
        labels = tfidf(
            [source.render(row) for row in train],
            [label.strip() for label in train_labels],
            [source.render(row) for row in firsts],
            seed,
        )
        item.baseline = metrics.score(task.metric, labels, rendered)
    return item


def _grouped(rows: Rows, column: str | None, where: str) -> list[Rows]:
    """Rows that ask the same question (equal in `column`) are one item with several references."""
    if column is None:
        return [[row] for row in rows]
    groups: dict[str, Rows] = {}
    for row in rows:
        if column not in row:
            raise ConfigError(f"{where}.data.group_by: no column {column!r}; the rows have {', '.join(row)}")
        groups.setdefault(str(row[column]), []).append(row)
    return list(groups.values())


def _choices(
    task: EvalTask, where: str, references: list[list[str]], train_labels: list[str]
) -> tuple[str, ...] | None:
    """The completions allowed. After a prompt that does not end in space an answer starts with one, as in training."""
    if task.choices is None:
        return None
    if task.choices == "from-data":
        labels = sorted({label.strip() for row in references for label in row} | {x.strip() for x in train_labels})
    else:
        labels = [choice.strip() for choice in task.choices]
    if "" in labels:
        raise ConfigError(f"{where}.choices: an empty answer is no choice", param=f"{where}.choices")
    space = " " if task.prompt is not None and not task.prompt[-1:].isspace() else ""
    return tuple(space + label for label in labels)


def jobs_of(prepared: Sequence[Prepared], seed: int) -> list[Job]:
    """Every row of every task once for the base and once for its adapter, in one shuffled order: a mixed load."""
    jobs = [
        Job(
            task=item.task.name,
            row=row,
            adapter=adapter,
            prompt=None if item.chats is not None else prompt,
            messages=item.chats[row] if item.chats is not None else None,
            max_tokens=item.task.max_tokens,
            stop=tuple(item.task.stop),
            choices=item.choices,
        )
        for item in prepared
        for row, prompt in enumerate(item.prompts)
        for adapter in dict.fromkeys((None, item.task.adapter))
    ]
    random.Random(seed).shuffle(jobs)
    return jobs


def judge(recipe: EvalRecipe, prepared: Sequence[Prepared], generate: Generate) -> list[Result]:
    """Run all jobs through `generate` and score them."""
    jobs = jobs_of(prepared, recipe.seed)
    by_task: dict[str, dict[tuple[str | None, int], Answer]] = {item.task.name: {} for item in prepared}
    for job, answer in zip(jobs, generate(jobs), strict=True):
        by_task[job.task][job.adapter, job.row] = answer
    results = []
    for item in prepared:
        answers = by_task[item.task.name]
        for adapter in dict.fromkeys((None, item.task.adapter)):
            item.answers[adapter] = [answers[adapter, row] for row in range(len(item.prompts))]
        results.append(_result(item, recipe))
    return results


def _result(item: Prepared, recipe: EvalRecipe) -> Result:
    def scored(adapter: str | None) -> metrics.Scored:
        return metrics.score(item.task.metric, [a.text for a in item.answers[adapter]], item.references)

    base = scored(None)
    result = Result(
        task=item.task.name,
        metric=item.task.metric,
        n=len(item.prompts),
        base=base.score(),
        base_ci=base.interval(recipe.seed, recipe.bootstrap),
        seed=recipe.seed,
    )
    if item.baseline is not None:  # the resamples of one seed are the same rows for all three
        result.baseline = item.baseline.score()
        result.baseline_ci = item.baseline.interval(recipe.seed, recipe.bootstrap)
    if item.task.adapter is not None:
        adapted = scored(item.task.adapter)
        result.adapter = adapted.score()
        result.adapter_ci = adapted.interval(recipe.seed, recipe.bootstrap)
    timed = sorted(a.latency_ms for a in item.answers[item.task.adapter] if a.latency_ms is not None)
    if timed:
        result.p50_ms = timed[len(timed) // 2]
        result.p95_ms = timed[min(len(timed) - 1, int(len(timed) * 0.95))]
    return result
