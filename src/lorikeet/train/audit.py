"""What is in the data of a run, before a step is taken: findings, what they mean, and the report that is printed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lorikeet.config import AdapterRecipe
from lorikeet.data.formats import BrokenRow, describe_broken
from lorikeet.errors import ConfigError, DataError
from lorikeet.model.tokenizer import Tokenizer
from lorikeet.train.dataset import (
    Example,
    ExampleFile,
    Renderer,
    length_limit,
    split_validation,
    truncate_prompt,
)

PERCENTILES = (5, 25, 50, 75, 95, 99, 100)
SHOWN = 5  # lines that a finding lists


@dataclass(slots=True)
class Audit:
    """Findings about one adapter's data. Lines are lines of the training file unless said otherwise."""

    adapter: str
    rows: int  # in the training file
    limit: int  # max_length, resolved
    broken: list[tuple[Path, list[BrokenRow]]] = field(default_factory=list)
    unteachable: list[int] = field(default_factory=list)  # no token to learn from
    unended: list[int] = field(default_factory=list)  # a turn without an end-of-turn token
    too_long: list[int] = field(default_factory=list)  # over the limit
    would_cut: list[int] = field(default_factory=list)  # of those: the completion alone does not fit
    dropped: int = 0
    truncated: int = 0
    repeated: list[tuple[int, int]] = field(default_factory=list)  # (line, earlier line with the same text)
    contradictory: int = 0  # prompts that have several completions
    leaked: list[tuple[int, int]] = field(default_factory=list)  # (line, line of the test file with the same prompt)
    lengths: dict[int, int] = field(default_factory=dict)  # percentile -> tokens
    tokens: int = 0  # of all training examples
    learned_tokens: int = 0
    labels: dict[str, int] = field(default_factory=dict)  # where completions repeat: completion -> rows, most first
    train: int = 0
    validation: int = 0
    test: int = 0
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(slots=True)
class AdapterData:
    """What an adapter learns from and is judged by while it trains."""

    train: list[Example]
    validation: list[Example]
    template_kind: str
    template_text: str


def prepare(recipe: AdapterRecipe, tokenizer: Tokenizer, context: int, root: Path) -> tuple[AdapterData, Audit]:
    """Read, render, tokenise and audit one adapter's data. `recipe` is resolved; paths are relative to `root`.

    Findings do not raise: those that forbid training stand in `Audit.errors`. ConfigError for what is wrong with the
    recipe itself.
    """
    renderer = Renderer(recipe, tokenizer)
    convert = recipe.data.convert
    file = renderer.read(root / recipe.data.train, convert)
    assert recipe.max_length is not None and recipe.seed is not None
    limit = length_limit(recipe.max_length, [len(e.tokens) for e in file.examples], context)
    audit = Audit(recipe.name, file.rows, limit)
    keep_first = tokenizer.bos_id is not None and all(e.tokens[0] == tokenizer.bos_id for e in file.examples)
    train = _usable(audit, recipe, file, limit, keep_first)
    held_out = recipe.data.validation
    if isinstance(held_out, str):
        other = renderer.read(root / held_out, convert)
        validation = _usable(audit, recipe, other, limit, keep_first)
    else:
        train, validation = split_validation(train, held_out, recipe.seed)
    if recipe.early_stopping is not None and not validation:
        raise ConfigError(
            f"{recipe.name}.early_stopping: needs validation rows, found none",
            hint="set data.validation to a share such as 0.05, or to a file",
            param=f"{recipe.name}.early_stopping",
        )
    if recipe.data.test is not None:
        _compare_with_test(audit, train, renderer.read(root / recipe.data.test, convert))
    _describe(audit, train, validation)
    _judge(audit, recipe, file)
    return AdapterData(train, validation, renderer.kind, renderer.text), audit


def _usable(audit: Audit, recipe: AdapterRecipe, file: ExampleFile, limit: int, keep_first: bool) -> list[Example]:
    """The examples to learn from; what is wrong with the others goes into the audit."""
    if file.broken:
        audit.broken.append((file.path, file.broken))
    usable = []
    for example in file.examples:
        if not example.teaches:
            audit.unteachable.append(example.line)
            audit.dropped += recipe.unteachable == "drop"
            continue
        if not example.ends:
            audit.unended.append(example.line)
        if len(example.tokens) > limit:
            audit.too_long.append(example.line)
            shortened = truncate_prompt(example, limit, keep_first)
            if shortened is None:
                audit.would_cut.append(example.line)
            if recipe.too_long == "drop":
                audit.dropped += 1
            elif recipe.too_long == "truncate_prompt" and shortened is not None:
                audit.truncated += 1
                usable.append(shortened)
            continue
        usable.append(example)
    return usable


def _compare_with_test(audit: Audit, train: Sequence[Example], test: ExampleFile) -> None:
    if test.broken:
        audit.broken.append((test.path, test.broken))
    audit.test = len(test.examples)
    places = {example.prompt: example.line for example in reversed(test.examples)}
    audit.leaked = [(e.line, places[e.prompt]) for e in train if e.prompt in places]


def _describe(audit: Audit, train: Sequence[Example], validation: Sequence[Example]) -> None:
    audit.train, audit.validation = len(train), len(validation)
    audit.tokens = sum(e.inputs for e in train)
    audit.learned_tokens = sum(e.learned_tokens for e in train)
    if train:
        values = np.percentile([len(e.tokens) for e in train], PERCENTILES, method="higher")
        audit.lengths = {p: int(value) for p, value in zip(PERCENTILES, values, strict=True)}
    first: dict[tuple[str, str], int] = {}
    completions: dict[str, set[str]] = {}
    for example in train:
        completions.setdefault(example.prompt, set()).add(example.completion)
        earlier = first.setdefault((example.prompt, example.completion), example.line)
        if earlier != example.line:
            audit.repeated.append((example.line, earlier))
    audit.contradictory = sum(len(found) > 1 for found in completions.values())
    counts = Counter(example.completion for example in train)
    if 2 * len(counts) <= len(train):
        audit.labels = {text.strip(): n for text, n in counts.most_common()}


def _judge(audit: Audit, recipe: AdapterRecipe, file: ExampleFile) -> None:
    """Findings -> errors and warnings."""
    errors, warnings = audit.errors, audit.warnings
    for path, broken in audit.broken:
        errors.append(f"{len(broken)} broken rows:\n  " + "\n  ".join(describe_broken(path, broken, SHOWN)))
    if audit.unteachable:
        say = f"{len(audit.unteachable)} rows with no token to learn from ({_lines(file.path, audit.unteachable)})"
        if recipe.unteachable == "drop":
            warnings.append(f"{say}: dropped, as `unteachable: drop` says")
        else:
            errors.append(f"{say}; give them a completion or set `unteachable: drop`")
    if audit.unended:
        errors.append(
            f"{len(audit.unended)} rows whose chat template puts no end-of-turn token behind the assistant's text "
            f"({_lines(file.path, audit.unended)}); generation could never end. Expected one of the base's stop ids"
        )
    _judge_lengths(audit, recipe, file.path)
    if not audit.train and not errors:
        errors.append(f"no row is left to train on (of {audit.rows} in {file.path})")
    if audit.leaked:
        shown = ", ".join(f"{a} = test {b}" for a, b in audit.leaked[:SHOWN])
        warnings.append(f"{len(audit.leaked)} training prompts are in the test file too (lines {shown}, ...)")
    if audit.repeated:
        shown = ", ".join(f"{a} = {b}" for a, b in audit.repeated[:SHOWN])
        warnings.append(f"{len(audit.repeated)} training rows repeat an earlier one (lines {shown}, ...)")
    if audit.contradictory:
        warnings.append(f"{audit.contradictory} prompts have several different completions")


def _judge_lengths(audit: Audit, recipe: AdapterRecipe, path: Path) -> None:
    if not audit.too_long:
        return
    say = f"{len(audit.too_long)} rows are longer than {audit.limit} tokens ({_lines(path, audit.too_long)})"
    if recipe.too_long == "drop":
        audit.warnings.append(f"{say}: dropped, as `too_long: drop` says")
    elif recipe.too_long == "error":
        audit.errors.append(f"{say}; raise `max_length`, or set `too_long: drop` or `too_long: truncate_prompt`")
    else:
        if audit.truncated:
            audit.warnings.append(f"{audit.truncated} prompts are cut from the left to fit {audit.limit} tokens")
        if audit.would_cut:
            audit.errors.append(
                f"{len(audit.would_cut)} completions would be cut by the limit of {audit.limit} tokens "
                f"({_lines(path, audit.would_cut)}); raise `max_length` or set `too_long: drop`"
            )


def _lines(path: Path, lines: Sequence[int]) -> str:
    shown = ", ".join(map(str, lines[:SHOWN]))
    return f"{path}: line{'s' if len(lines) > 1 else ''} {shown}" + (", ..." if len(lines) > SHOWN else "")


def print_report(audits: Sequence[Audit], console: Console) -> None:
    """The report: one line an adapter, then every finding."""
    table = Table(title="Training data", title_justify="left", box=SIMPLE)
    # no wider than 80 columns, so that nothing is cut on a plain terminal
    for column in ("adapter", "train", "val", "test", "tokens", "learned", "p50/p95/max"):
        table.add_column(column, justify="left" if column == "adapter" else "right", no_wrap=True)
    table.add_column("completions")
    for audit in audits:
        counts = (f"{n:,}" for n in (audit.train, audit.validation, audit.test, audit.tokens))
        lengths = "/".join(str(audit.lengths.get(p, 0)) for p in (50, 95, 100))
        learned = f"{audit.learned_tokens / max(audit.tokens, 1):.0%}"
        table.add_row(audit.adapter, *counts, learned, lengths, _completions(audit))
    console.print(table)
    for audit in audits:
        for message in audit.errors:
            console.print(f"[red]error[/] {audit.adapter}: {escape(message)}", highlight=False)
        for message in audit.warnings:
            console.print(f"[yellow]note[/] {audit.adapter}: {escape(message)}", highlight=False)


def _completions(audit: Audit) -> str:
    if not audit.labels:
        return "free text"
    counts = list(audit.labels.values())
    each = str(counts[0]) if counts[0] == counts[-1] else f"{counts[-1]} to {counts[0]}"
    return f"{len(counts)} labels x {each}"


def require_clean(audits: Sequence[Audit]) -> None:
    """Raises DataError with every error found."""
    problems = [f"{audit.adapter}: {message}" for audit in audits for message in audit.errors]
    if problems:
        raise DataError("the training data cannot be used:\n" + "\n".join(problems), param="data")
