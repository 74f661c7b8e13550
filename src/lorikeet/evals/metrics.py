"""Scores and their intervals. Strict: an answer is the whole answer, stripped of surrounding space, not a substring.

Every metric reduces a test set to per-row columns and a function of their weighted sums, so that a bootstrap over
rows is two matrix products whatever the metric.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorikeet.errors import ConfigError

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Scored:
    """`columns [n, c]` per row, and `reduce`: weighted sums [..., c] and total weight -> scores [...]."""

    columns: Floats
    reduce: Callable[[Floats, float], Floats]

    def score(self) -> float:
        return float(self.reduce(self.columns.sum(0), float(len(self.columns))))

    def interval(self, seed: int, resamples: int = 2000, level: float = 0.95) -> tuple[float, float]:
        """Percentile bootstrap over rows (Efron 1979)."""
        n = len(self.columns)
        weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1.0 / n), size=resamples).astype(np.float64)
        scores = self.reduce(weights @ self.columns, float(n))
        low, high = np.quantile(scores, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)


RowScore = Callable[[str, Sequence[str]], float]


def _mean(row_score: RowScore, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Scored:
    values = [row_score(p, r) for p, r in zip(predictions, references, strict=True)]
    return Scored(np.asarray(values, dtype=np.float64)[:, None], lambda sums, n: sums[..., 0] / n)


def exact(prediction: str, references: Sequence[str]) -> float:
    """1 where the stripped answer is one of the references."""
    return float(prediction.strip() in {reference.strip() for reference in references})


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L F1 (Lin 2004) over lower-case alphanumeric words, the best over the references."""
    words = _words(prediction)
    return max(_lcs_f1(words, _words(reference)) for reference in references)


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _lcs_f1(a: list[str], b: list[str]) -> float:
    if not a or not b:
        return 0.0
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b):
            diagonal, row[j + 1] = row[j + 1], diagonal + 1 if x == y else max(row[j], row[j + 1])
    common = row[-1]
    return 2 * common / (len(a) + len(b))


def parse_json(text: str) -> tuple[bool, Any]:
    """(parsed, value): NaN and Infinity are not JSON, a repeated key is not one object."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise ValueError("repeated key")
        return dict(pairs)

    def refuse(constant: str) -> Any:
        raise ValueError(constant)

    try:
        return True, json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError):
        return False, None


def json_exact(prediction: str, references: Sequence[str]) -> float:
    """1 where the whole answer is JSON equal in value to a reference (key order does not matter, 1 is not true)."""
    parsed, value = parse_json(prediction)
    if not parsed:
        return 0.0
    return float(any(_canonical(value) == _canonical(parse_json(reference)[1]) for reference in references))


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _json_field_f1(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Scored:
    """Micro F1 over (path, value) pairs of flattened JSON; of several references the best counts."""
    columns = []
    for prediction, candidates in zip(predictions, references, strict=True):
        parsed, value = parse_json(prediction)
        found = _fields(value) if parsed else []
        columns.append(max((_overlap(found, _fields(parse_json(c)[1])) for c in candidates), key=_f1_of))
    return Scored(np.asarray(columns, dtype=np.float64), lambda sums, _: _f1(sums[..., 0], sums[..., 1], sums[..., 2]))


def _fields(value: Any, path: str = "$") -> list[tuple[str, str]]:
    """List items share a path: their order does not matter, their number does."""
    if isinstance(value, dict):
        return [field for key, item in value.items() for field in _fields(item, f"{path}.{key}")]
    if isinstance(value, list):
        return [field for item in value for field in _fields(item, f"{path}[]")]
    return [(path, json.dumps(value))]


def _overlap(found: list[tuple[str, str]], expected: list[tuple[str, str]]) -> tuple[float, float, float]:
    left = list(expected)
    hits = 0
    for field in found:
        if field in left:
            left.remove(field)
            hits += 1
    return float(hits), float(len(found)), float(len(expected))


def _f1_of(counts: tuple[float, float, float]) -> float:
    hits, found, expected = counts
    return 2 * hits / (found + expected) if found + expected else 1.0


def _f1(hits: Floats, found: Floats, expected: Floats) -> Floats:
    total = np.asarray(found + expected)
    return np.where(total > 0, 2 * hits / np.where(total > 0, total, 1.0), 1.0)


def _macro_f1(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Scored:
    """Mean F1 over the labels of the references. An answer that is no label is a miss for its row's label."""
    expected = [candidates[0].strip() for candidates in references]
    labels = sorted(set(expected))
    answers = np.asarray([p.strip() for p in predictions])[:, None] == np.asarray(labels)[None, :]
    truths = np.asarray(expected)[:, None] == np.asarray(labels)[None, :]
    columns = np.concatenate([answers & truths, answers, truths], axis=1).astype(np.float64)
    c = len(labels)

    def reduce(sums: Floats, _: float) -> Floats:
        hits, found, total = sums[..., :c], sums[..., c : 2 * c], sums[..., 2 * c :]
        present = total > 0  # a resample may lack a label altogether: it then says nothing of it
        f1 = _f1(hits, found, total)
        return np.asarray((f1 * present).sum(-1) / present.sum(-1))

    return Scored(columns, reduce)


def _regex(prediction: str, references: Sequence[str]) -> float:
    return float(any(re.fullmatch(reference, prediction.strip()) for reference in references))


_ROW_METRICS: dict[str, RowScore] = {
    "accuracy": exact,
    "rouge_l": rouge_l,
    "json_exact": json_exact,
    "regex": _regex,
}
NAMES = (*_ROW_METRICS, "macro_f1", "json_field_f1", "python:module.function")


def check_metric(name: str, where: str) -> None:
    """Raise `ConfigError` for a metric that does not exist, before anything runs."""
    if name.startswith("python:"):
        _load(name, where)
    elif name not in NAMES:
        raise ConfigError(f"{where}: found {name!r}; expected one of {', '.join(NAMES)}", param=where)


def score(name: str, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Scored:
    """Score `predictions [n]` against `references [n][>= 1]` with the metric called `name`."""
    if name == "macro_f1":
        return _macro_f1(predictions, references)
    if name == "json_field_f1":
        return _json_field_f1(predictions, references)
    row_score = _load(name, "metric") if name.startswith("python:") else _ROW_METRICS[name]
    return _mean(row_score, predictions, references)


def _load(name: str, where: str) -> RowScore:
    module, _, function = name.removeprefix("python:").rpartition(".")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{where}: cannot load {name!r}: {error}",
            hint="expected python:package.module.function(prediction: str, references: list[str]) -> float",
            param=where,
        ) from None
    return found  # type: ignore[no-any-return]
