"""Sampling on a GPU picks the tokens that `engine.sampler` picks for the same seeds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.kernels.inputs import fresh_generator
from torch import Tensor

from lorikeet.engine.sampler import AllowedTokens, SamplingRows, sample


def parameters(chance: np.random.Generator, count: int, **fixed: Any) -> SamplingRows:
    drawn = {
        "temperature": chance.choice([0.0, 0.3, 1.0, 1.7], count),
        "top_k": chance.choice([0, 0, 1, 5, 60, 5000], count),
        "top_p": chance.choice([0.05, 0.6, 0.95, 1.0, 1.0], count),
        "min_p": chance.choice([0.0, 0.0, 0.02, 0.3], count),
        "seed": chance.integers(0, 2**64, count, dtype=np.uint64),
        "position": chance.integers(0, 2**31, count),
    }
    for name, value in fixed.items():
        drawn[name] = np.broadcast_to(np.asarray(value, drawn[name].dtype), (count,)).copy()
    return SamplingRows(**drawn)


def sampler_of(rows: SamplingRows, vocab: int, device: str) -> Any:
    """A sampler whose slot i has the parameters of row i, and one slot more."""
    from lorikeet.kernels.gpu_sampling import Sampler, SamplingTable

    count = len(rows.seed)
    table = SamplingTable(count + 1, device)
    columns = (rows.temperature, rows.top_k, rows.top_p, rows.min_p, rows.seed.view(np.int64))
    table.load(torch.arange(count), *(torch.from_numpy(column) for column in columns))
    return Sampler(table, count, vocab)


def picked(logits: Tensor, rows: SamplingRows, device: str, **kinds: bool) -> tuple[Tensor, Tensor]:
    slots, positions = torch.arange(len(logits)), torch.from_numpy(rows.position)
    sampler = sampler_of(rows, logits.shape[1], device)
    tokens, finite = sampler.sample(logits.to(device), slots.to(device), positions.to(device), **kinds)
    return tokens.cpu(), finite.cpu()


def assert_same(logits: Tensor, rows: SamplingRows, found: Tensor) -> None:
    """Equal, but for a row in ten thousand: sums are rounded in another order, and a boundary may lie in between."""
    wanted, _ = sample(logits, rows)
    different = int((found != wanted).sum())
    assert different <= len(found) // 10_000, f"{different} of {len(found)} rows differ: {(found != wanted).nonzero()}"


@pytest.mark.parametrize(("vocab", "spread"), [(7, 3.0), (300, 0.3), (5000, 3.0), (13000, 6.0)])
def test_equals_the_sampler_of_the_engine(device: str, vocab: int, spread: float) -> None:
    draw = fresh_generator()
    logits = torch.randn(12, vocab, generator=draw) * spread
    rows = parameters(np.random.default_rng(draw.initial_seed()), 12)
    tokens, finite = picked(logits, rows, device)
    assert finite.all()
    assert_same(logits, rows, tokens)


@pytest.mark.parametrize("top_k", [0, 3000])
def test_more_candidates_than_a_program_holds(device: str, top_k: int) -> None:
    """Nearly flat rows, of which a limit keeps thousands of tokens, so that the whole row is searched."""
    draw = fresh_generator()
    logits = torch.randn(2, 5000, generator=draw) * 0.1
    chance = np.random.default_rng(draw.initial_seed())
    rows = parameters(chance, 2, temperature=1.0, top_k=top_k, top_p=[0.6, 0.99], min_p=0)
    assert_same(logits, rows, picked(logits, rows, device)[0])


def test_ties_are_kept_together(device: str) -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0, -1.0]]).repeat(16, 1)
    chance = np.random.default_rng(0)
    rows = parameters(chance, 16, temperature=1.0, top_k=2, top_p=1.0, min_p=0.0)
    tokens, _ = picked(logits, rows, device)
    assert_same(logits, rows, tokens)
    assert {0, 1} < set(tokens.tolist()) <= {0, 1, 2, 3}


def test_top_p_is_of_what_top_k_keeps(device: str) -> None:
    """Ten tokens nearly alike: 0.76 of four of them are four, of three or of ten they are not."""
    logits = torch.arange(10).float().mul(-0.01).repeat(16, 1)
    rows = parameters(np.random.default_rng(0), 16, temperature=1.0, top_k=4, top_p=0.76, min_p=0.0)
    tokens, _ = picked(logits, rows, device)
    assert_same(logits, rows, tokens)
    assert set(tokens.tolist()) == {0, 1, 2, 3}


def test_only_what_is_asked_for_is_launched(device: str) -> None:
    draw = fresh_generator()
    logits = torch.randn(9, 500, generator=draw)
    chance = np.random.default_rng(draw.initial_seed())
    greedy = parameters(chance, 9, temperature=0.0)
    assert torch.equal(picked(logits, greedy, device, random=False)[0], logits.argmax(-1))
    free = parameters(chance, 9, temperature=1.0, top_k=0, top_p=1.0)
    assert_same(logits, free, picked(logits, free, device, limited=False)[0])


def test_the_first_of_equal_logits_is_the_most_likely(device: str) -> None:
    logits = torch.zeros(2, 9000)
    logits[0, [4500, 8999, 77]] = 1.0
    rows = parameters(np.random.default_rng(0), 2, temperature=0.0)
    assert picked(logits, rows, device)[0].tolist() == [77, 0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_rows_are_told_apart(device: str, value: float) -> None:
    logits = torch.randn(6, 5000, generator=fresh_generator())
    logits[2, 4321] = value
    logits[3] = -torch.inf
    rows = parameters(np.random.default_rng(0), 6, temperature=[0, 1, 0, 1, 1, 0])
    tokens, finite = picked(logits, rows, device)
    assert finite.tolist() == [True, True, False, False, True, True]
    assert int(tokens.max()) < 5000 and int(tokens.min()) >= 0


def test_rows_that_only_fill_up_and_rows_in_any_order(device: str) -> None:
    draw = fresh_generator()
    logits = torch.randn(4, 600, generator=draw)
    rows = parameters(np.random.default_rng(draw.initial_seed()), 4, temperature=1.0)
    sampler = sampler_of(rows, 600, device)
    order = torch.tensor([2, -1, 0, -1])
    sampler.tokens.fill_(-5)
    positions = torch.from_numpy(rows.position)[order.clamp(min=0)]
    tokens, _ = sampler.sample(logits[order.clamp(min=0)].to(device), order.to(device), positions.to(device))
    wanted, _ = sample(logits, rows)
    assert tokens.tolist() == [wanted[2], -5, wanted[0], -5]


def test_only_allowed_tokens(device: str) -> None:
    from lorikeet.kernels.gpu_sampling import restrict

    draw = fresh_generator()
    logits = torch.randn(6, 300, generator=draw)
    at, tokens = torch.tensor([1, 1, 4]), torch.tensor([3, 8, 0])
    rows = parameters(np.random.default_rng(draw.initial_seed()), 6, temperature=[0, 1, 1, 0, 1, 1])
    bound = restrict(logits.to(device), at.to(device), tokens.to(device)).cpu()
    wanted, _ = sample(logits, rows, AllowedTokens(at, tokens))
    assert picked(bound, rows, device)[0].tolist() == wanted.tolist()
    logits[4, 200] = float("nan")
    bound = restrict(logits.to(device), at.to(device), tokens.to(device)).cpu()
    assert picked(bound, rows, device)[1].tolist() == [True, True, True, True, False, True]


def test_uniform_numbers_of_large_seeds(device: str) -> None:
    """A flat row of 4096 tokens shows the first 12 bits of the number."""
    seeds = np.array([0, 1, 2**63 - 1, 2**63, 2**64 - 1], np.uint64)
    rows = parameters(np.random.default_rng(1), 5, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
    rows = SamplingRows(rows.temperature, rows.top_k, rows.top_p, rows.min_p, seeds, np.array([0, 5, 2**40, 7, 9]))
    logits = torch.zeros(5, 4096)
    assert_same(logits, rows, picked(logits, rows, device)[0])


def test_logits_of_another_vocabulary_are_refused(device: str) -> None:
    rows = parameters(np.random.default_rng(0), 2)
    sampler, none = sampler_of(rows, 50, device), torch.zeros(2, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match=r"logits are torch.float32 \(2, 60\).*of 50, at most 2"):
        sampler.sample(torch.zeros(2, 60, device=device), none, none)


@pytest.mark.gpu
@pytest.mark.parametrize("spread", [0.2, 2.0, 8.0])
def test_a_real_vocabulary(device: str, spread: float) -> None:
    draw = fresh_generator()
    logits = torch.randn(64, 128256, generator=draw) * spread
    rows = parameters(np.random.default_rng(draw.initial_seed()), 64)
    first, finite = picked(logits, rows, device)
    assert finite.all()
    assert_same(logits, rows, first)
    assert torch.equal(picked(logits, rows, device)[0], first), "the same again"
