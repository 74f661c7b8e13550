"""Sampling against transformers' own logit processors, and its counter-based uniform numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from lorikeet.engine import sampler
from lorikeet.engine.sampler import AllowedTokens, SamplingRows, logprobs, sample, uniform


def rows(count: int, **values: Any) -> SamplingRows:
    def column(name: str, default: Any, dtype: Any) -> Any:
        return np.broadcast_to(np.asarray(values.get(name, default), dtype), (count,)).copy()

    return SamplingRows(
        temperature=column("temperature", 1.0, np.float64),
        top_k=column("top_k", 0, np.int64),
        top_p=column("top_p", 1.0, np.float64),
        min_p=column("min_p", 0.0, np.float64),
        seed=column("seed", np.arange(count), np.uint64),
        position=column("position", 7, np.int64),
    )


def warped(logits: torch.Tensor, r: SamplingRows, i: int) -> torch.Tensor:
    """Probabilities [V] of row i after transformers' processors."""
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = TemperatureLogitsWarper(float(r.temperature[i]))(None, logits[i : i + 1].clone())
    if r.top_k[i]:
        scores = TopKLogitsWarper(int(r.top_k[i]))(None, scores)
    if r.top_p[i] < 1:
        scores = TopPLogitsWarper(float(r.top_p[i]))(None, scores)
    if r.min_p[i]:
        scores = MinPLogitsWarper(float(r.min_p[i]))(None, scores)
    return scores.double().softmax(-1)[0]


@pytest.mark.parametrize("vocab", [7, 300, 2000])
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_filters_are_those_of_transformers(vocab: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(vocab)
    count = 240
    logits = torch.randn(count, vocab, generator=generator) * spread
    chance = np.random.default_rng(vocab)
    r = rows(
        count,
        temperature=chance.choice([0.5, 1.0, 1.7], count),
        top_k=chance.choice([0, 1, 5, 600, 5000], count),
        top_p=chance.choice([0.05, 0.6, 0.95, 1.0], count),
        min_p=chance.choice([0.0, 0.0, 0.02, 0.3], count),
    )
    tokens, sound = sample(logits, r)
    assert sound.all()
    at = uniform(r.seed, r.position)
    for i in range(count):
        cumulative = warped(logits, r, i).cumsum(0)
        low, high = at[i] - 1e-5, at[i] + 1e-5  # a boundary may lie in between
        wanted = torch.searchsorted(cumulative, torch.tensor([low, high], dtype=torch.float64), right=True)
        assert wanted[0] <= tokens[i] <= wanted[1]


def test_the_whole_row_is_sorted_only_where_it_must_be(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(50, 4000, generator=torch.Generator().manual_seed(1))
    r = rows(50, top_p=np.linspace(0.05, 1.0, 50), top_k=np.arange(50) * 80)
    whole, _ = sample(logits, r)
    monkeypatch.setattr(sampler, "CANDIDATES", 16)
    assert torch.equal(sample(logits, r)[0], whole)


def test_frequencies_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625])
    count = 20000
    tokens, _ = sample(probabilities.log().expand(count, -1), rows(count, seed=3, position=np.arange(count)))
    assert stats.chisquare(np.bincount(tokens.numpy(), minlength=5), probabilities.numpy() * count).pvalue > 1e-3


def test_greedy_rows_among_random_ones() -> None:
    logits = torch.randn(40, 50, generator=torch.Generator().manual_seed(2))
    temperature = np.where(np.arange(40) % 3 == 0, 0.0, 1.0)
    mixed, _ = sample(logits, rows(40, temperature=temperature))
    hot, _ = sample(logits, rows(40))
    assert torch.equal(mixed[::3], logits.argmax(-1)[::3])
    random = torch.from_numpy(temperature > 0)
    assert torch.equal(mixed[random], hot[random])
    assert not torch.equal(hot, logits.argmax(-1))
    assert torch.equal(sample(logits, rows(40, temperature=1e-30))[0], logits.argmax(-1))


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    logits = torch.randn(30, 900, generator=torch.Generator().manual_seed(3)) * 2
    settings = {"temperature": 1.1, "top_k": np.arange(30) * 3, "top_p": np.linspace(0.3, 1, 30)}
    together, _ = sample(logits, rows(30, **settings))
    for i in range(30):
        one = rows(30, **settings)
        alone = SamplingRows(*(getattr(one, name)[i : i + 1] for name in SamplingRows.__slots__))
        assert int(sample(logits[i : i + 1], alone)[0]) == int(together[i])


def test_only_allowed_tokens() -> None:
    logits = torch.randn(6, 30, generator=torch.Generator().manual_seed(4))
    pairs = [(1, 3), (1, 8), (4, 0)]
    allowed = AllowedTokens(torch.tensor([row for row, _ in pairs]), torch.tensor([token for _, token in pairs]))
    for temperature in (0.0, 5.0):
        free, _ = sample(logits, rows(6, temperature=temperature))
        bound, sound = sample(logits, rows(6, temperature=temperature), allowed)
        assert sound.all()
        assert int(bound[1]) in (3, 8) and int(bound[4]) == 0
        others = [0, 2, 3, 5]
        assert torch.equal(bound[others], free[others])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_rows_are_told_apart(value: float) -> None:
    logits = torch.randn(5, 20)
    logits[2, 7] = value
    for temperature in (0.0, 1.0):
        tokens, sound = sample(logits, rows(5, temperature=temperature, top_p=0.9))
        assert sound.tolist() == [True, True, False, True, True]
        assert int(tokens.max()) < 20


def test_logprobs_are_log_softmax() -> None:
    logits = torch.randn(9, 40, generator=torch.Generator().manual_seed(5)) * 4
    chosen = torch.arange(9)
    values, ids, top = logprobs(logits, chosen, 3)
    expected = logits.double().log_softmax(-1)
    torch.testing.assert_close(values.double(), expected[torch.arange(9), chosen], atol=1e-5, rtol=0)
    torch.testing.assert_close(top.double(), expected.topk(3).values, atol=1e-5, rtol=0)
    assert torch.equal(ids, expected.topk(3).indices)
    best, _, first = logprobs(logits, logits.argmax(-1), 1)
    assert torch.equal(best, first[:, 0]), "the most likely token's two logprobs are the same number"


def test_uniform_numbers_are_uniform_and_independent() -> None:
    seeds, positions = np.arange(300, dtype=np.uint64), np.arange(100)
    grid = uniform(np.repeat(seeds, 100), np.tile(positions, 300)).reshape(300, 100)
    assert grid.min() >= 0 and grid.max() < 1
    assert stats.kstest(grid.ravel(), "uniform").pvalue > 1e-3
    for shifted in (grid[1:, :], grid[:, 1:]):
        trimmed = grid[: shifted.shape[0], : shifted.shape[1]]
        assert abs(np.corrcoef(trimmed.ravel(), shifted.ravel())[0, 1]) < 0.02
    assert uniform(np.array([2**64 - 1], np.uint64), np.array([2**40]))[0] != grid[0, 0]
