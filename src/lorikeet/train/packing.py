"""Examples of many adapters -> flat batches of bounded size, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lorikeet.kernels.batch import Batch, Segments
from lorikeet.train.dataset import Example


@dataclass(frozen=True, slots=True)
class Share:
    """Some rows of one adapter in one forward pass: `rows` are their numbers in the adapter's data."""

    handle: int
    rows: list[int]
    examples: list[Example]

    @property
    def tokens(self) -> int:
        return sum(example.inputs for example in self.examples)


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass. `spans[i]` are the logit rows of `shares[i]`; `places` [T] is row * 2^20 + position."""

    shares: list[Share]
    batch: Batch
    targets: Tensor
    spans: list[slice]
    places: Tensor


def split(shares: Sequence[Share], step_tokens: int) -> list[list[Share]]:
    """Shares -> passes of at most `step_tokens` tokens each, in order; a longer row has a pass of its own.

    Only whole rows move; what a row learns does not depend on the pass it is in.
    """
    passes: list[list[Share]] = []
    room = 0
    for share in shares:
        for row, example in zip(share.rows, share.examples, strict=True):
            if not passes or example.inputs > room:
                passes.append([])
                room = step_tokens
            current = passes[-1]
            if not current or current[-1].handle != share.handle:
                current.append(Share(share.handle, [], []))
            current[-1].rows.append(row)
            current[-1].examples.append(example)
            room -= example.inputs
    return passes


def pack(shares: Sequence[Share]) -> Pass:
    """Lay the rows of each adapter end to end; the last token of a row is only ever a target."""
    examples = [example for share in shares for example in share.examples]
    lengths = np.array([example.inputs for example in examples])
    starts = np.concatenate(([0], lengths.cumsum()))
    tokens = np.concatenate([np.asarray(example.tokens[:-1]) for example in examples])
    positions = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)
    learned = [(at, example, a, b) for at, example in zip(starts, examples, strict=False) for a, b in example.learned]
    logit_rows = np.concatenate([np.arange(at + a - 1, at + b - 1) for at, _, a, b in learned])
    targets = np.concatenate([np.asarray(example.tokens[a:b]) for _, example, a, b in learned])
    rows = np.repeat(np.array([row for share in shares for row in share.rows]), lengths)
    token_ends = np.cumsum([0, *(share.tokens for share in shares)])
    learned_ends = np.cumsum([0, *(sum(e.learned_tokens for e in share.examples) for share in shares)])
    handles = [share.handle for share in shares]
    batch = Batch(
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(positions),
        query_start=torch.from_numpy(starts.astype(np.int32)),
        kv_len=torch.from_numpy(lengths.astype(np.int32)),
        max_query=int(lengths.max()),
        max_kv=int(lengths.max()),
        token_segments=Segments(torch.arange(len(tokens)), token_ends.tolist(), handles, contiguous=True),
        logit_rows=torch.from_numpy(logit_rows),
        logit_segments=Segments(torch.arange(len(logit_rows)), learned_ends.tolist(), handles, contiguous=True),
    )
    return Pass(
        list(shares),
        batch,
        torch.from_numpy(targets),
        [slice(a, b) for a, b in zip(learned_ends, learned_ends[1:], strict=False)],
        torch.from_numpy(rows * 2**20 + positions),
    )
