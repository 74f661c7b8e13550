"""Carries out a plan: adapters into the slab, one flat batch, one forward pass, one token for each row that wants one.

Sequences keep a slot while they run; their tokens, blocks and sampling parameters lie in arrays indexed by slot, from
which a batch is gathered without a loop over tokens.

`launch` gives a step to the device, `collect` waits for what came of it. On a GPU the next step may be launched in
between: a token that the host does not know yet is read where the device has put it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lorikeet.engine.device_sampler import DeviceSampler
from lorikeet.engine.plan import Outcome, Plan, SlotLoad
from lorikeet.engine.sampler import AllowedTokens, SamplingRows, logprobs, sample
from lorikeet.engine.slab import AdapterSlab
from lorikeet.engine.staging import Fetched, staging
from lorikeet.errors import LorikeetError
from lorikeet.kernels.batch import Batch, LayerCache, Segments
from lorikeet.model.cache_scales import FP8, find_scales
from lorikeet.model.decoder import DecoderWeights, ServingOps, forward
from lorikeet.model.spec import ModelSpec
from lorikeet.types import AdapterInfo, ScheduledSequence, TokenLogprob

Array = npt.NDArray[np.int64]
UNKNOWN = -1  # a token that was sampled and is not on the host yet

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


@dataclass(slots=True)
class Launched:
    """A step that was given to the device; `outcome` is whole when everything in `later` has been done."""

    outcome: Outcome
    later: list[Callable[[], None]] = field(default_factory=list)


class Runner:
    """Holds the key-value cache, the slab and the slots; `blocks` blocks of `block_size` tokens.

    Where several processes hold the model, all must be made together: for an fp8 cache the model is run.
    """

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
        fp8_cache: bool = False,
    ) -> None:
        self.slab, self.block_size, self.device = slab, block_size, torch.device(device)
        shape = (blocks + ops.spare_blocks, block_size, spec.num_kv_heads, spec.head_dim)
        scales: Sequence[tuple[Tensor, Tensor] | None] = [None] * spec.num_layers
        if fp8_cache:
            scales = find_scales(spec, weights, ops, step_tokens, device)
        self.cache = [_layer_cache(shape, dtype, self.device, one) for one in scales]
        self._vocab_size, self._step_tokens = spec.vocab_size, step_tokens
        self._forward = ops.prepare(partial(forward, spec, weights), slab.slab, self.cache, step_tokens)
        self._tokens = np.zeros((max_seqs, max_context + 1), np.int64)
        self._blocks = np.zeros((max_seqs, -(-max_context // block_size)), np.int32)
        self._staging = staging(self.device, 64 * step_tokens + self._blocks.nbytes + 2**16)
        self._sampled = torch.zeros(max_seqs, dtype=torch.int64, device=self.device)  # the latest token of each slot
        self._keeps_sampled = self.device.type != "cpu"  # for steps that are launched before this one is collected
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
        self._sampler = None if self.device.type == "cpu" else DeviceSampler(self._sampling, self.device, self._now)
        self._loaded = np.zeros(max_seqs, np.int64)  # how many sequences each slot has had
        self._logprobs = np.full(max_seqs, -1, np.int64)  # top logprobs asked for, -1: none at all
        self._prompt_logprobs = np.full(max_seqs, -1, np.int64)

    @torch.inference_mode()
    def warm(self) -> None:
        """Run some tokens with an adapter of rank 0, before there are requests, so that no request waits for a kernel
        to be compiled: seconds the first time, then loaded from a cache. On a GPU also all sizes of a decode step."""
        self._warm(1, 1, 0)
        if self.device.type == "cpu":
            return
        seqs = len(self._handle)
        for handle in (0, -1):
            self._warm(1, min(self._tokens.shape[1] - 1, self._step_tokens), handle)
            for count in sorted({min(2**i, seqs) for i in range(seqs.bit_length() + 1)}):
                self._warm(count, 1, handle)
        torch.cuda.synchronize(self.device)

    def _warm(self, sequences: int, tokens: int, handle: int) -> None:
        """One step of so many sequences of so many tokens; they overwrite each other's keys and values."""
        slot, none = np.arange(sequences), np.zeros(sequences, np.int64)
        all_of = np.full(sequences, tokens), np.full(sequences, handle)
        rows = _Rows(slot, none, *all_of, np.ones(sequences, np.bool_), none, none)
        self._staging.begin()
        batch, _, _ = self._batch(rows)
        self._staging.flush()
        logits = self._forward(batch)
        if self._sampler is not None:
            self._sampler.warm(logits[:, : self._vocab_size])

    def run(self, plan: Plan) -> Outcome:
        """One step, from its beginning to its end."""
        return self.collect(self.launch(plan))

    @torch.inference_mode()
    def launch(self, plan: Plan) -> Launched:
        """Begin a step. Steps that were launched before are done before it."""
        launched = Launched(Outcome())
        outcome = launched.outcome
        self._bring(plan, outcome)
        for load in plan.loads:
            self._load(load)
        for slot, index, new in plan.blocks:
            self._blocks[slot, index : index + len(new)] = new
        for slot, position, tokens in plan.tokens:
            self._tokens[slot, position : position + len(tokens)] = tokens
        if plan.sequences:
            self._step(plan, launched)
        return launched

    def collect(self, launched: Launched) -> Outcome:
        """What came of a step; waits for it. Steps are collected in the order in which they were launched."""
        for finish in launched.later:
            finish()
        return launched.outcome

    def prefetch(self, adapter: AdapterInfo) -> None:
        """A request waits for this adapter."""
        self.slab.prefetch(adapter)

    def close(self) -> None:
        """Nothing holds the model but this process."""

    def _bring(self, plan: Plan, outcome: Outcome) -> None:
        """Adapters into the slab."""
        late = outcome.late_adapters if plan.sequences else None  # a step of nobody may wait for the disk
        outcome.failed_adapters = self.slab.carry_out(plan.adapters, late)

    def _load(self, load: SlotLoad) -> None:
        slot, s = load.slot, load.sampling
        self._loaded[slot] += 1
        self._tokens[slot, : len(load.tokens)] = load.tokens
        self._blocks[slot, : len(load.blocks)] = load.blocks
        self._handle[slot], self._acts[slot] = load.handle, (*load.acts[0], *load.acts[1])
        rows = self._sampling
        rows.temperature[slot], rows.top_k[slot] = s.temperature, s.top_k
        rows.top_p[slot], rows.min_p[slot] = s.top_p, s.min_p
        rows.seed[slot] = load.seed
        if self._sampler is not None:
            self._sampler.changed(slot)
        self._logprobs[slot] = -1 if s.logprobs is None else s.logprobs
        self._prompt_logprobs[slot] = -1 if s.prompt_logprobs is None else s.prompt_logprobs

    # --- one step ---------------------------------------------------------------------------------------------

    def _begin(self, plan: Plan) -> tuple[_Rows, Batch, Array, _Scored]:
        """The plan's sequences in batch order, and what `_batch` makes of them, on the device."""
        rows = self._arrange(plan.sequences)
        self._staging.begin()
        batch, sampled, scored = self._batch(rows)
        self._staging.flush()
        self.slab.need(rows.handle.tolist())
        return rows, batch, sampled, scored

    def _step(self, plan: Plan, launched: Launched) -> None:
        rows, batch, sampled, scored = self._begin(plan)
        logits = self._forward(batch)
        if len(scored.slot):
            self._score(logits, scored, launched)
        if len(sampled):
            picked = logits if len(scored.slot) == 0 else logits[self._now(scored.sample_rows)]
            slots, positions = rows.slot[sampled], (rows.start + rows.count)[sampled]
            if not self.slab.slab.vocabulary:
                self._sample(picked, slots, positions, plan, launched)
                return
            for some, at in self._by_vocabulary(picked, rows.handle[sampled]):
                self._sample(some, slots[at], positions[at], plan, launched)

    def _by_vocabulary(self, logits: Tensor, handle: Array) -> list[tuple[Tensor, Array | slice]]:
        """Logits of R rows of these handles [R], and which rows they are: one set for each size of vocabulary, so that
        nothing that comes of a row depends on how many tokens the others' adapters have."""
        own = self.slab.slab.vocabulary
        if not own or own.keys().isdisjoint(handle.tolist()):
            return [(logits[:, : self._vocab_size], slice(None))]
        tokens = np.array([own.get(one, self._vocab_size) for one in handle.tolist()])
        rows = [(count, np.flatnonzero(tokens == count)) for count in np.unique(tokens).tolist()]
        return [(logits[self._now(at), :count], at) for count, at in rows]

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
            tokens=self._input(slots, positions),
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

    def _input(self, slots: Array, positions: Array) -> Tensor:
        """The tokens [T] at these places; those that only the device knows are the latest of their slots."""
        known = self._tokens[slots, positions]
        tokens = self._tensor(known)
        if not self._keeps_sampled:
            return tokens
        missing = np.flatnonzero(known == UNKNOWN)
        if len(missing):
            at, source = self._tensor(missing), self._now(slots[missing])
            tokens[at] = self._sampled[source]
        return tokens

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

    def _sample(self, logits: Tensor, slots: Array, positions: Array, plan: Plan, launched: Launched) -> None:
        """Tokens of `slots` from logits [R, V]; `positions` are where the tokens will stand."""
        tokens, finite = self._pick(logits, slots, positions, self._allowed(slots, plan.allowed))
        if self._keeps_sampled:
            self._tokens[slots, positions] = UNKNOWN
            self._sampled[self._now(slots)] = tokens
        wanted = np.flatnonzero(self._logprobs[slots] >= 0)
        if len(wanted):
            at = self._now(wanted)
            scores = self._token_logprobs(logits[at], tokens[at], self._logprobs[slots[wanted]])
            launched.later.append(lambda: _note_logprobs(slots[wanted], scores(), launched.outcome))
        fetched = self._staging.fetch(tokens), self._staging.fetch(finite)
        loaded = self._loaded[slots]
        launched.later.append(lambda: self._note_tokens(slots, loaded, positions, *fetched, launched.outcome))

    def _pick(
        self, logits: Tensor, slots: Array, positions: Array, allowed: AllowedTokens | None
    ) -> tuple[Tensor, Tensor]:
        if self._sampler is not None:
            return self._sampler.sample(logits, slots, positions, allowed)
        rows = self._sampling
        chosen = SamplingRows(
            rows.temperature[slots],
            rows.top_k[slots],
            rows.top_p[slots],
            rows.min_p[slots],
            rows.seed[slots],
            positions,
        )
        return sample(logits, chosen, allowed)

    def _note_tokens(
        self, slots: Array, loaded: Array, positions: Array, tokens: Fetched, finite: Fetched, outcome: Outcome
    ) -> None:
        new, fine = tokens.array(), finite.array()
        same = self._loaded[slots] == loaded  # a slot may have another sequence by now
        self._tokens[slots[same], positions[same]] = new[same]
        outcome.tokens.update(zip(slots.tolist(), new.tolist(), strict=True))
        if not fine.all():
            outcome.failed.update(dict.fromkeys(slots[~fine].tolist(), NOT_FINITE.info()))

    def _allowed(self, slots: Array, allowed: dict[int, list[int]]) -> AllowedTokens | None:
        if not allowed:
            return None
        lists = [allowed.get(slot, []) for slot in slots.tolist()]
        rows = np.repeat(np.arange(len(lists)), [len(tokens) for tokens in lists])
        return AllowedTokens(self._now(rows), self._now(np.concatenate(lists).astype(np.int64)))

    def _score(self, logits: Tensor, scored: _Scored, launched: Launched) -> None:
        """Logprobs of prompt tokens, by sequence."""
        targets = self._tokens[np.repeat(scored.slot, scored.count), scored.positions + 1]
        top = np.repeat(self._prompt_logprobs[scored.slot], scored.count)
        picked, handle = logits[self._now(scored.rows)], np.repeat(scored.handle, scored.count)
        parts = [
            (at, self._token_logprobs(some, self._now(targets[at]), top[at]))
            for some, at in self._by_vocabulary(picked, handle)
        ]
        launched.later.append(lambda: _note_scores(scored, parts, launched.outcome))

    def _token_logprobs(self, logits: Tensor, chosen: Tensor, top: Array) -> Callable[[], list[TokenLogprob]]:
        """One for each row, once it is called; row i reports its `top[i]` most likely tokens."""
        parts = (chosen, *logprobs(logits, chosen, int(top.max())))
        fetched = [self._staging.fetch(part) for part in parts]

        def finish() -> list[TokenLogprob]:
            tokens, values, top_ids, top_values = (part.array().tolist() for part in fetched)
            return [
                TokenLogprob(token, value, list(zip(ids[:count], likely[:count], strict=True)))
                for token, value, ids, likely, count in zip(
                    tokens, values, top_ids, top_values, top.tolist(), strict=True
                )
            ]

        return finish

    def _tensor(self, array: npt.NDArray[np.generic]) -> Tensor:
        """On the device after the next flush."""
        return self._staging.put(array)

    def _now(self, array: npt.NDArray[np.generic]) -> Tensor:
        """On the device for what is launched from now on."""
        tensor = self._staging.put(array)
        self._staging.flush()
        return tensor


def _layer_cache(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, scales: tuple[Tensor, Tensor] | None
) -> LayerCache:
    """In `dtype`, or with scales in fp8."""
    k, v = (torch.empty(shape, dtype=dtype if scales is None else FP8, device=device) for _ in range(2))
    return LayerCache(k, v, *(() if scales is None else (scale.to(device) for scale in scales)))


def _note_logprobs(slots: Array, scores: list[TokenLogprob], outcome: Outcome) -> None:
    outcome.logprobs.update(zip(slots.tolist(), scores, strict=True))


def _note_scores(
    scored: _Scored, parts: Sequence[tuple[Array | slice, Callable[[], list[TokenLogprob]]]], outcome: Outcome
) -> None:
    """Scores of prompt tokens, put in order and told by sequence."""
    found = np.empty(int(scored.count.sum()), object)
    for at, finish in parts:
        found[at] = finish()
    ends = np.cumsum(scored.count)
    for slot, start, end in zip(scored.slot.tolist(), (ends - scored.count).tolist(), ends.tolist(), strict=True):
        outcome.prompt_logprobs[slot] = found[start:end].tolist()
        if any(score.logprob != score.logprob for score in found[start:end]):
            outcome.failed[slot] = NOT_FINITE.info()


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
