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

CANDIDATES = 512  # most likely tokens looked at before more of a row is sorted
BLOCK = 64  # neighbours in the vocabulary whose weights are summed first


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
    likeliest, finite = _likeliest(logits)
    if allowed is not None:
        logits = _restrict(logits, allowed)
        likeliest, _ = _likeliest(logits)
    random = rows.temperature > 0
    if not random.any():
        return likeliest, finite
    if random.all():
        return _sample_random(logits, rows), finite
    index = np.flatnonzero(random)
    some = SamplingRows(
        rows.temperature[index], rows.top_k[index], rows.top_p[index], rows.min_p[index], rows.seed[index],
        rows.position[index],
    )  # fmt: skip
    at = torch.from_numpy(index).to(logits.device)
    likeliest[at] = _sample_random(logits[at], some)
    return likeliest, finite


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


def _likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The most likely tokens [R], and whether their logits are finite [R]: NaN and infinity are the largest.

    On a CPU NumPy's vectorised search takes a tenth of torch's time, and so do its small operations between steps.
    """
    if logits.device.type != "cpu":
        best = logits.argmax(dim=-1)
        return best, torch.isfinite(logits.gather(1, best.unsqueeze(1)).squeeze(1))
    array = logits.numpy()
    found = array.argmax(axis=-1)
    return torch.from_numpy(found), torch.from_numpy(np.isfinite(array[np.arange(len(found)), found]))


def _restrict(logits: Tensor, allowed: AllowedTokens) -> Tensor:
    kept = logits[allowed.rows, allowed.tokens]
    masked = logits.clone()
    masked[allowed.rows.unique()] = -torch.inf
    masked[allowed.rows, allowed.tokens] = kept
    return masked


def _sample_random(logits: Tensor, rows: SamplingRows) -> Tensor:
    """Inverse-CDF sampling over the vocabulary in the order of its ids: first the block, then the token in it."""
    vocab, device = logits.shape[1], logits.device

    def column(values: npt.NDArray[np.float64]) -> Tensor:
        return torch.from_numpy(values).to(device).unsqueeze(1)

    temperature = column(np.maximum(rows.temperature, 1e-7)).float()
    scaled = (logits - logits.amax(dim=-1, keepdim=True)).div_(temperature)  # the most likely token is at 0
    weights = scaled.exp()
    sums = _block_sums(weights)
    limited = (rows.top_k > 0) & (rows.top_k < vocab)
    if limited.any() or (rows.top_p < 1).any() or (rows.min_p > 0).any():
        total = sums.sum(dim=-1, keepdim=True)
        threshold = _nucleus(scaled, total, np.where(limited, rows.top_k, vocab), rows.top_p)
        threshold = torch.maximum(threshold, column(rows.min_p).log().float())
        weights *= scaled >= threshold
        sums = _block_sums(weights)
    rest = column(uniform(rows.seed, rows.position)) * sums.sum(dim=-1, keepdim=True)
    block, rest = _locate(sums, rest)
    within = (block * BLOCK + torch.arange(BLOCK, device=device)).clamp_(max=vocab - 1)
    inside = weights.gather(1, within).double()
    inside[block * BLOCK + torch.arange(BLOCK, device=device) >= vocab] = 0
    token, _ = _locate(inside, rest)
    return (block * BLOCK + token).squeeze(1).clamp_(max=vocab - 1)


def _block_sums(weights: Tensor) -> Tensor:
    """Sums [R, blocks] fp64 over every BLOCK neighbours of [R, V], the last block being what is left."""
    whole = weights.shape[1] // BLOCK * BLOCK
    sums: Tensor = weights[:, :whole].unflatten(1, (-1, BLOCK)).sum(dim=-1).double()
    if whole == weights.shape[1]:
        return sums
    return torch.cat((sums, weights[:, whole:].sum(dim=-1, keepdim=True).double()), dim=1)


def _locate(weights: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Where the running sum of fp64 weights [R, N] passes `target` [R, 1], and what is left of the target there.

    Always a place of positive weight, also where rounding would carry the target past the end.
    """
    cumulative = weights.cumsum(dim=-1)
    end = cumulative[:, -1:]
    target = torch.minimum(target, torch.nextafter(end, torch.zeros_like(end)))
    at = torch.searchsorted(cumulative, target, right=True).clamp_(max=weights.shape[1] - 1)
    return at, target - (cumulative - weights).gather(1, at)


def _nucleus(scaled: Tensor, total: Tensor, top_k: npt.NDArray[np.int64], top_p: npt.NDArray[np.float64]) -> Tensor:
    """The lowest scaled logit [R, 1] that top-k and then top-p keep; equals of it are kept too.

    `total` [R, 1] is the row's sum of exp(scaled). Most nuclei lie within a row's CANDIDATES most likely tokens; only
    the others look at more.
    """
    vocab, device = scaled.shape[1], scaled.device
    threshold = torch.full((len(scaled), 1), -torch.inf, device=device)
    todo = np.flatnonzero((top_k < vocab) | (top_p < 1))
    for count in (CANDIDATES, 16 * CANDIDATES, vocab):
        if len(todo) == 0:
            break
        count = min(count, vocab)
        at = torch.from_numpy(todo).to(device)
        keep, mass = (torch.from_numpy(limit[todo]).to(device).unsqueeze(1) for limit in (top_k, top_p))
        values = _largest(scaled[at], count)
        weights = values.double().exp()
        within_k = torch.arange(count, device=device) < keep
        whole = torch.where(keep < vocab, (weights * within_k).sum(dim=-1, keepdim=True), total[at])
        before = weights.cumsum(dim=-1) - weights
        kept = within_k & ((before < mass * whole) | (mass >= 1))
        last = (kept.sum(dim=-1, keepdim=True) - 1).clamp_(min=0)
        threshold[at] = values.gather(1, last)
        complete = (keep <= count) | ((keep >= vocab) & (last < count - 1))
        todo = todo[~complete.squeeze(1).cpu().numpy()]
    return threshold


def _largest(values: Tensor, count: int) -> Tensor:
    """The `count` largest of each row [R, count], descending. NumPy's vectorised selection is 25 times torch's."""
    if values.device.type != "cpu":
        return values.topk(count, dim=-1).values
    array = values.numpy()
    first = array.shape[1] - count
    array = np.partition(array, first, axis=-1)[:, first:] if first > 0 else array
    best: Tensor = torch.from_numpy(np.sort(array, axis=-1)[:, ::-1].copy())
    return best
