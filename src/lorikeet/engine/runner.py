"""Carries out a plan: adapters into the slab, one flat batch, one forward pass, one token for each row that wants one.

Sequences keep a slot while they run; their tokens, blocks and sampling parameters lie in arrays indexed by slot, from
which a batch is gathered without a loop over tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lorikeet.engine.plan import Outcome, Plan, SlotLoad
from lorikeet.engine.sampler import AllowedTokens, SamplingRows, logprobs, sample
from lorikeet.engine.slab import AdapterSlab
from lorikeet.errors import LorikeetError
from lorikeet.kernels.batch import Batch, LayerCache, Segments
from lorikeet.model.decoder import DecoderWeights, ServingOps, forward
from lorikeet.model.spec import ModelSpec
from lorikeet.types import ScheduledSequence, TokenLogprob

Array = npt.NDArray[np.int64]

NOT_FINITE = LorikeetError(
    "the model produced logits that are not numbers for this request",
    hint="the adapter's weights are most likely broken: look for NaN or very large values in them",
    code="not_finite",
)


@dataclass(slots=True)
class _Rows:
    """The plan's sequences in batch order (base first, then adapter by adapter), arrays [B]."""

    slot: Array
    start: Array
    count: Array
    handle: Array
    samples: npt.NDArray[np.bool_]
    score_start: Array
    score_stop: Array


@dataclass(slots=True)
class _Scored:
    """Which rows of logits score prompts. `slot`, `handle`, `count` [S] by sequence; `rows`, `positions` [N] by row."""

    slot: Array
    handle: Array
    count: Array
    rows: Array
    positions: Array
    sample_rows: Array  # the other rows


class Runner:
    """Holds the key-value cache, the slab and the slots; `blocks` blocks of `block_size` tokens."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: DecoderWeights,
        ops: ServingOps,
        slab: AdapterSlab,
        *,
        blocks: int,
        block_size: int,
        max_seqs: int,
        max_context: int,
        step_tokens: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self.slab, self.block_size, self.device = slab, block_size, torch.device(device)
        shape = (blocks, block_size, spec.num_kv_heads, spec.head_dim)
        self.cache = [
            LayerCache(torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device))
            for _ in range(spec.num_layers)
        ]
        self._vocab_size = spec.vocab_size
        self._forward = ops.prepare(partial(forward, spec, weights), slab.slab, self.cache, step_tokens)
        self._tokens = np.zeros((max_seqs, max_context + 1), np.int64)
        self._blocks = np.zeros((max_seqs, -(-max_context // block_size)), np.int32)
        self._handle = np.full(max_seqs, -1, np.int64)
        self._acts = np.zeros((max_seqs, 4), np.int64)  # two stretches of positions
        self._sampling = SamplingRows(
            temperature=np.zeros(max_seqs),
            top_k=np.zeros(max_seqs, np.int64),
            top_p=np.ones(max_seqs),
            min_p=np.zeros(max_seqs),
            seed=np.zeros(max_seqs, np.uint64),
            position=np.zeros(max_seqs, np.int64),
        )
        self._logprobs = np.full(max_seqs, -1, np.int64)  # top logprobs asked for, -1: none at all
        self._prompt_logprobs = np.full(max_seqs, -1, np.int64)

    @torch.inference_mode()
    def warm(self) -> None:
        """Run one token with an adapter of rank 0, before there are requests, so that no request waits for a kernel to
        be compiled: seconds the first time, then loaded from a cache."""
        one, none = np.ones(1, np.int64), np.zeros(1, np.int64)
        rows = _Rows(none, none, one, none, one.astype(np.bool_), none, none)
        self._forward(self._batch(rows)[0])

    @torch.inference_mode()
    def run(self, plan: Plan) -> Outcome:
        """One step."""
        outcome = Outcome()
        late = outcome.late_adapters if plan.sequences else None  # a step of nobody may wait for the disk
        outcome.failed_adapters = self.slab.carry_out(plan.adapters, late)
        for load in plan.loads:
            self._load(load)
        for slot, index, new in plan.blocks:
            self._blocks[slot, index : index + len(new)] = new
        for slot, position, tokens in plan.tokens:
            self._tokens[slot, position : position + len(tokens)] = tokens
        if plan.sequences:
            self._step(plan, outcome)
        return outcome

    def _load(self, load: SlotLoad) -> None:
        slot, s = load.slot, load.sampling
        self._tokens[slot, : len(load.tokens)] = load.tokens
        self._blocks[slot, : len(load.blocks)] = load.blocks
        self._handle[slot], self._acts[slot] = load.handle, (*load.acts[0], *load.acts[1])
        rows = self._sampling
        rows.temperature[slot], rows.top_k[slot] = s.temperature, s.top_k
        rows.top_p[slot], rows.min_p[slot] = s.top_p, s.min_p
        rows.seed[slot] = load.seed
        self._logprobs[slot] = -1 if s.logprobs is None else s.logprobs
        self._prompt_logprobs[slot] = -1 if s.prompt_logprobs is None else s.prompt_logprobs

    # --- one step ---------------------------------------------------------------------------------------------

    def _step(self, plan: Plan, outcome: Outcome) -> None:
        rows = self._arrange(plan.sequences)
        batch, sampled, scored = self._batch(rows)
        logits = self._forward(batch)
        if len(scored.slot):
            self._score(logits, scored, outcome)
        if len(sampled):
            picked = logits if len(scored.slot) == 0 else logits[self._tensor(scored.sample_rows)]
            slots, positions = rows.slot[sampled], (rows.start + rows.count)[sampled]
            if not self.slab.slab.vocabulary:
                self._sample(picked, slots, positions, plan, outcome)
                return
            for some, at in self._by_vocabulary(picked, rows.handle[sampled]):
                self._sample(some, slots[at], positions[at], plan, outcome)

    def _by_vocabulary(self, logits: Tensor, handle: Array) -> list[tuple[Tensor, Array | slice]]:
        """Logits of R rows of these handles [R], and which rows they are: one set for each size of vocabulary, so that
        nothing that comes of a row depends on how many tokens the others' adapters have."""
        own = self.slab.slab.vocabulary
        if not own or own.keys().isdisjoint(handle.tolist()):
            return [(logits[:, : self._vocab_size], slice(None))]
        tokens = np.array([own.get(one, self._vocab_size) for one in handle.tolist()])
        rows = [(count, np.flatnonzero(tokens == count)) for count in np.unique(tokens).tolist()]
        return [(logits[self._tensor(at), :count], at) for count, at in rows]

    def _arrange(self, sequences: Sequence[ScheduledSequence]) -> _Rows:
        fields = np.array(
            [(s.slot, s.start, s.count, s.samples, s.score_start, s.score_stop) for s in sequences], np.int64
        )
        handle = self._handle[fields[:, 0]]
        order = np.argsort(handle, kind="stable")
        slot, start, count, samples, score_start, score_stop = fields[order].T
        return _Rows(slot, start, count, handle[order], samples.astype(np.bool_), score_start, score_stop)

    def _batch(self, rows: _Rows) -> tuple[Batch, Array, _Scored]:
        """The batch, the sequences (indices into `rows`) that sample, and the rows of logits that score prompts."""
        size = self.block_size
        query_start = np.zeros(len(rows.slot) + 1, np.int64)
        np.cumsum(rows.count, out=query_start[1:])
        sequence = np.repeat(np.arange(len(rows.slot)), rows.count)
        positions = np.arange(query_start[-1]) + (rows.start - query_start[:-1])[sequence]
        slots = rows.slot[sequence]
        kv_len = rows.start + rows.count
        max_kv = int(kv_len.max())
        cache_slot = self._blocks[slots, positions // size].astype(np.int64) * size + positions % size
        logit_rows, scored = _logit_rows(rows, query_start)
        begin, end, other_begin, other_end = self._acts[slots].T
        acts = (positions >= begin) & (positions < end) | (positions >= other_begin) & (positions < other_end)
        handle = np.where(acts, rows.handle[sequence], -1)
        token_segments, logit_segments = self._segments(handle), self._segments(handle[logit_rows])
        if token_segments is not None and logit_segments is None:  # known, and none: no adapter acts on these rows
            logit_segments = Segments(self._tensor(logit_rows[:0]), [0], [], True)
        batch = Batch(
            tokens=self._tensor(self._tokens[slots, positions]),
            positions=self._tensor(positions),
            query_start=self._tensor(query_start.astype(np.int32)),
            kv_len=self._tensor(kv_len.astype(np.int32)),
            max_query=int(rows.count.max()),
            max_kv=max_kv,
            block_table=self._tensor(self._blocks[rows.slot, : -(-max_kv // size)]),
            cache_slot=self._tensor(cache_slot),
            token_segments=token_segments,
            logit_rows=self._tensor(logit_rows),
            logit_segments=logit_segments,
            scaled=_any_of(rows.handle, self.slab.scaled),
            overridden=_any_of(rows.handle, self.slab.overriding),
        )
        return batch, np.flatnonzero(rows.samples), scored

    def _segments(self, handle: Array) -> Segments | None:
        """From the handle of each row, -1 where none acts; rows of one handle stand one behind the other."""
        rows = np.flatnonzero(handle >= 0)
        if not len(rows):
            return None
        acting = handle[rows]
        starts = np.flatnonzero(np.diff(acting, prepend=-1))
        return Segments(
            rows=self._tensor(rows),
            start=[*starts.tolist(), len(rows)],
            adapter=acting[starts].tolist(),
            contiguous=bool(rows[-1] - rows[0] + 1 == len(rows)),
        )

    def _sample(self, logits: Tensor, slots: Array, positions: Array, plan: Plan, outcome: Outcome) -> None:
        """Tokens of `slots` from logits [R, V]; `positions` are where the tokens will stand."""
        all_rows = self._sampling
        rows = SamplingRows(
            all_rows.temperature[slots],
            all_rows.top_k[slots],
            all_rows.top_p[slots],
            all_rows.min_p[slots],
            all_rows.seed[slots],
            positions,
        )
        tokens, finite = sample(logits, rows, self._allowed(slots, plan.allowed))
        new = tokens.cpu().numpy()
        self._tokens[slots, positions] = new
        outcome.tokens.update(zip(slots.tolist(), new.tolist(), strict=True))
        wanted = np.flatnonzero(self._logprobs[slots] >= 0)
        if len(wanted):
            at = self._tensor(wanted)
            found = _token_logprobs(logits[at], tokens[at], self._logprobs[slots[wanted]])
            outcome.logprobs.update(zip(slots[wanted].tolist(), found, strict=True))
        if not bool(finite.all()):
            for slot in slots[~finite.cpu().numpy()].tolist():
                outcome.failed[slot] = NOT_FINITE.info()

    def _allowed(self, slots: Array, allowed: dict[int, list[int]]) -> AllowedTokens | None:
        if not allowed:
            return None
        lists = [allowed.get(slot, []) for slot in slots.tolist()]
        rows = np.repeat(np.arange(len(lists)), [len(tokens) for tokens in lists])
        return AllowedTokens(self._tensor(rows), self._tensor(np.concatenate(lists).astype(np.int64)))

    def _score(self, logits: Tensor, scored: _Scored, outcome: Outcome) -> None:
        """Logprobs of prompt tokens, by sequence."""
        targets = self._tokens[np.repeat(scored.slot, scored.count), scored.positions + 1]
        top = np.repeat(self._prompt_logprobs[scored.slot], scored.count)
        found = np.empty(len(top), object)
        picked, handle = logits[self._tensor(scored.rows)], np.repeat(scored.handle, scored.count)
        for some, at in self._by_vocabulary(picked, handle):
            found[at] = _token_logprobs(some, self._tensor(targets[at]), top[at])
        ends = np.cumsum(scored.count)
        for slot, start, end in zip(scored.slot.tolist(), (ends - scored.count).tolist(), ends.tolist(), strict=True):
            outcome.prompt_logprobs[slot] = found[start:end].tolist()
            if any(score.logprob != score.logprob for score in found[start:end]):
                outcome.failed[slot] = NOT_FINITE.info()

    def _tensor(self, array: npt.NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self.device)


def _any_of(handles: Array, some: set[int]) -> bool:
    return bool(some) and not some.isdisjoint(handles.tolist())


def _logit_rows(rows: _Rows, query_start: Array) -> tuple[Array, _Scored]:
    """Batch rows whose logits are needed, sequence by sequence: those that score the prompt, then the sampling one."""
    last = query_start[1:] - 1
    scores = rows.score_stop - rows.score_start
    samples = rows.samples.astype(np.int64)
    none = np.zeros(0, np.int64)
    if not scores.any():
        return last[rows.samples], _Scored(none, none, none, none, none, none)
    total = scores + samples
    ends = np.cumsum(total)
    sequence = np.repeat(np.arange(len(total)), total)
    index = np.arange(ends[-1]) - (ends - total)[sequence]  # of the row within its sequence's rows
    is_score = index < scores[sequence]
    position = np.where(is_score, rows.score_start[sequence] + index, (rows.start + rows.count - 1)[sequence])
    logit_rows = query_start[sequence] + position - rows.start[sequence]
    scoring = np.flatnonzero(scores)
    scored = _Scored(
        slot=rows.slot[scoring],
        handle=rows.handle[scoring],
        count=scores[scoring],
        rows=np.flatnonzero(is_score),
        positions=position[is_score],
        sample_rows=np.flatnonzero(~is_score),
    )
    return logit_rows, scored


def _token_logprobs(logits: Tensor, chosen: Tensor, top: Array) -> list[TokenLogprob]:
    """One for each row; row i reports its `top[i]` most likely tokens."""
    values, top_ids, top_values = (part.tolist() for part in logprobs(logits, chosen, int(top.max())))
    return [
        TokenLogprob(token, value, list(zip(ids[:count], likely[:count], strict=True)))
        for token, value, ids, likely, count in zip(
            chosen.tolist(), values, top_ids, top_values, top.tolist(), strict=True
        )
    ]
