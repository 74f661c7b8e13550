import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import accuracy_score, f1_score

from lorikeet.errors import ConfigError
from lorikeet.evals import metrics

LABELS = ["card_arrival", "lost", "top up", "refund"]
labels = st.lists(st.tuples(st.sampled_from(LABELS), st.sampled_from([*LABELS, "nonsense", ""])), min_size=1)
words = st.lists(
    st.sampled_from(["the", "cat", "sat", "on", "a", "mat", "near", "12", "dogs"]), min_size=1, max_size=12
)


@given(labels)
def test_accuracy_and_macro_f1_follow_sklearn(pairs: list[tuple[str, str]]) -> None:
    truth, answers = [t for t, _ in pairs], [a for _, a in pairs]
    references = [[t] for t in truth]
    assert metrics.score("accuracy", answers, references).score() == pytest.approx(accuracy_score(truth, answers))
    expected = f1_score(truth, answers, labels=sorted(set(truth)), average="macro", zero_division=0)
    assert metrics.score("macro_f1", answers, references).score() == pytest.approx(expected)


@given(words, words)
def test_rouge_l_follows_rouge_score(a: list[str], b: list[str]) -> None:
    oracle = RougeScorer(["rougeL"]).score(" ".join(b), " ".join(a))["rougeL"].fmeasure
    assert metrics.rouge_l(" ".join(a), [" ".join(b)]) == pytest.approx(oracle)


def test_rouge_l_takes_the_best_reference() -> None:
    assert metrics.rouge_l("a cheap pub", ["nothing alike", "A cheap pub."]) == 1.0


def test_strict_means_the_whole_answer() -> None:
    assert metrics.exact(" refund\n", ["refund"]) == 1.0
    assert metrics.exact("refund please", ["refund"]) == 0.0
    assert metrics.exact("Refund", ["refund"]) == 0.0


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ('{"b": 2, "a": "x"}', 1.0),
        ('{"a": "x", "b": 2} ', 1.0),
        ('{"a": "x", "b": true}', 0.0),
        ('{"a": "x", "b": 2} and more', 0.0),
        ('{"a": "x", "a": "x", "b": 2}', 0.0),
        ('{"a": "x"', 0.0),
        ("NaN", 0.0),
    ],
)
def test_json_exact(answer: str, score: float) -> None:
    assert metrics.json_exact(answer, ['{"a": "x", "b": 2}']) == score


def test_json_field_f1_is_micro_over_fields() -> None:
    references = [[json.dumps({"person": ["Ada", "Bob"], "place": []})], [json.dumps({"person": ["Eve"]})]]
    answers = [json.dumps({"person": ["Bob"], "place": ["Rome"]}), "no json"]
    assert metrics.score("json_field_f1", answers, references).score() == pytest.approx(2 * 1 / (2 + 3))


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = random.Random(0)
    covered = 0
    for trial in range(200):
        answers = ["x" if rng.random() < 0.7 else "y" for _ in range(150)]
        low, high = metrics.score("accuracy", answers, [["x"]] * 150).interval(seed=trial, resamples=400)
        covered += low <= 0.7 <= high
    assert 180 <= covered <= 199


def test_interval_is_deterministic_and_holds_the_score() -> None:
    scored = metrics.score("macro_f1", LABELS * 5, [[x] for x in LABELS * 4 + LABELS[::-1]])
    assert scored.interval(1) == scored.interval(1)
    low, high = scored.interval(1)
    assert low <= scored.score() <= high
    assert not np.isnan(low)


def test_unknown_metric_is_named() -> None:
    with pytest.raises(ConfigError, match="found 'bleu'; expected one of accuracy"):
        metrics.check_metric("bleu", "$.tasks[0].metric")
    with pytest.raises(ConfigError, match="cannot load 'python:nowhere.score'"):
        metrics.check_metric("python:nowhere.score", "$.tasks[0].metric")
