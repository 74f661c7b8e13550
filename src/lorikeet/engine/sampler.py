"""From logits to tokens, for all rows of a step at once.

What a row samples depends on its logits, its parameters, its seed and its position alone: not on the batch it is in,
nor on how its prompt was chunked, nor on a preemption.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

CANDIDATES = 512  # most likely tokens looked at before a whole row is sorted


@dataclass(slots=True)
class SamplingRows:
    """Parameters of R rows, arrays [R]: temperature, top_p, min_p float64; top_k, position int64; seed uint64."""

    temperature: npt.NDArray[np.float64]
    top_k: npt.NDArray[np.int64]
    top_p: npt.NDArray[np.float64]
    min_p: npt.NDArray[np.float64]
    seed: npt.NDArray[np.uint64]
    position: npt.NDArray[np.int64]


@dataclass(slots=True)
class AllowedTokens:
    """For some rows the only tokens that may be sampled: pairs (rows[i], tokens[i]), int64 [N] each."""

    rows: Tensor
    tokens: Tensor


def sample(logits: Tensor, rows: SamplingRows, allowed: AllowedTokens | None = None) -> tuple[Tensor, Tensor]:
    """Next tokens [R] int64 and whether the row's logits are sound [R] bool, from fp32 logits [R, V].

    Temperature first, then top-k, top-p over what is left, min-p relative to the most likely token. Temperature 0 is
    the most likely token (the lowest id among equals).
    """
    finite = torch.isfinite(logits.amax(dim=-1))
    if allowed is not None:
        logits = _restrict(logits, allowed)
    random = rows.temperature > 0
    if not random.any():
        return logits.argmax(dim=-1), finite
    if random.all():
        return _sample_random(logits, rows), finite
    index = np.flatnonzero(random)
    some = SamplingRows(
        rows.temperature[index], rows.top_k[index], rows.top_p[index], rows.min_p[index], rows.seed[index],
        rows.position[index],
    )  # fmt: skip
    at = torch.from_numpy(index).to(logits.device)
    tokens = logits.argmax(dim=-1)
    tokens[at] = _sample_random(logits[at], some)
    return tokens, finite


def logprobs(logits: Tensor, chosen: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-softmax of fp32 logits [R, V] before any temperature or filter.

    Returns the chosen tokens' [R], and the `top` most likely tokens' ids and values [R, top], best first.
    """
    normaliser = logits.logsumexp(dim=-1, keepdim=True)
    values, ids = logits.topk(top, dim=-1)
    return (logits.gather(1, chosen.unsqueeze(1)) - normaliser).squeeze(1), ids, values - normaliser


def uniform(seed: npt.NDArray[np.uint64], position: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for each (seed, position): SplitMix64's finaliser (Steele, Lea, Flood 2014), used twice."""
    with np.errstate(over="ignore"):
        mixed = _mix(seed) + position.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        bits = _mix(mixed) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _restrict(logits: Tensor, allowed: AllowedTokens) -> Tensor:
    kept = logits[allowed.rows, allowed.tokens]
    masked = logits.clone()
    masked[allowed.rows] = -torch.inf
    masked[allowed.rows, allowed.tokens] = kept
    return masked


def _sample_random(logits: Tensor, rows: SamplingRows) -> Tensor:
    """Inverse-CDF sampling over the vocabulary in the order of its ids, sums in fp64."""

    def column(values: npt.NDArray[np.float64]) -> Tensor:
        return torch.from_numpy(values).to(logits.device, torch.float32).unsqueeze(1)

    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / column(np.maximum(rows.temperature, 1e-7))
    vocab = logits.shape[1]
    limited = (rows.top_k > 0) & (rows.top_k < vocab)
    if limited.any() or (rows.top_p < 1).any():
        threshold = _nucleus(scaled, np.where(limited, rows.top_k, vocab), rows.top_p)
        scaled = scaled.masked_fill(scaled < threshold, -torch.inf)
    if (rows.min_p > 0).any():  # the most likely token is at 0
        scaled = scaled.masked_fill(scaled < column(rows.min_p).log(), -torch.inf)
    cumulative = scaled.exp().to(torch.float64).cumsum(dim=-1)
    total = cumulative[:, -1:]
    at = torch.from_numpy(uniform(rows.seed, rows.position)).to(logits.device).unsqueeze(1) * total
    at = torch.minimum(at, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, at, right=True).squeeze(1).clamp_(max=vocab - 1)


def _nucleus(scaled: Tensor, top_k: npt.NDArray[np.int64], top_p: npt.NDArray[np.float64]) -> Tensor:
    """The lowest scaled logit [R, 1] that top-k and then top-p keep; equals of it are kept too.

    A full sort is only needed where the nucleus of a row does not lie within its CANDIDATES most likely tokens.
    """
    vocab = scaled.shape[1]
    keep = torch.from_numpy(top_k).to(scaled.device).unsqueeze(1)
    mass = torch.from_numpy(top_p).to(scaled.device).unsqueeze(1)
    everything = scaled.exp().sum(dim=-1, keepdim=True, dtype=torch.float64)
    for count in (min(CANDIDATES, vocab), vocab):
        values, _ = scaled.topk(count, dim=-1)
        weights = values.to(torch.float64).exp()
        within_k = torch.arange(count, device=scaled.device) < keep
        total = torch.where(keep < vocab, (weights * within_k).sum(dim=-1, keepdim=True), everything)
        before = weights.cumsum(dim=-1) - weights
        kept = within_k & ((before < mass * total) | (mass >= 1))
        last = kept.sum(dim=-1, keepdim=True) - 1
        complete = (keep <= count) | ((keep >= vocab) & ((last < count - 1) | (mass >= 1)))
        if count == vocab or bool(complete.all()):
            break
    threshold = values.gather(1, last.clamp(min=0))
    unfiltered = (keep >= vocab) & (mass >= 1)
    return threshold.masked_fill(unfiltered, -torch.inf)
