"""Who runs in the next step. Plain policy, no torch: the same class runs in tests and simulations."""

from __future__ import annotations

import heapq
from bisect import insort
from collections import deque
from collections.abc import Mapping

from lorikeet.engine.blocks import BlockPool, block_key
from lorikeet.engine.fairness import FairQueues, Key
from lorikeet.engine.intake import AdapterIntake
from lorikeet.engine.plan import Outcome, Plan, SlotLoad
from lorikeet.engine.request import Sequence, Status
from lorikeet.engine.residency import Place, Residency
from lorikeet.errors import AdapterError, DeadlineError, OverloadedError
from lorikeet.types import AdapterCopy, ErrorInfo, Event, FinishReason, ScheduledSequence, TokenLogprob

FREE_TOKENS = 24  # up to so many tokens a step of a CPU takes hardly longer: it waits for the weights, not for sums
CROWD = 2  # requests without a first token for each that streams, from which the first tokens come first
LEAST_TOKENS = 12  # of prompts in a step, however many sequences decode
LONGEST_WAIT = 64  # steps that the next in turn waits before running sequences of over-served others give way
SHORT_WAIT = 4  # steps, before somebody with two places more gives way
LOOK_EVERY = 4  # steps


class Scheduler:
    """Continuous batching over one block pool and one adapter slab.

    A step decodes every running sequence that can, then goes on with prompts in chunks, then admits waiting
    requests, under `step_tokens` tokens and `logit_rows` rows of logits in all. Beside sequences that decode there are
    only `chunk_tokens` tokens of prompts (None: what fills a step up to `free_tokens`, or half as many as streams), so
    that streams go on evenly, unless far more requests wait for their first token than stream, or have waited since
    before the streams began. When blocks run out the latest arrival gives up its place and is recomputed later. A
    request whose adapter is not resident waits in its own queue. Whoever is next in turn and has waited for
    LONGEST_WAIT steps takes the place of a sequence whose tenant, or adapter, is far ahead.
    """

    def __init__(
        self,
        blocks: BlockPool,
        residency: Residency,
        *,
        block_size: int,
        max_seqs: int,
        step_tokens: int,
        chunk_tokens: int | None = None,
        logit_rows: int,
        queue: int,
        prefix_cache: bool = True,
        tenant_queue: int | None = None,
        tenant_weights: Mapping[str, float] | None = None,
        fair: bool = True,
        free_tokens: int = FREE_TOKENS,
    ) -> None:
        assert logit_rows > max_seqs and step_tokens >= max_seqs
        self.blocks, self.residency = blocks, residency
        self.block_size, self.step_tokens, self.logit_rows = block_size, step_tokens, logit_rows
        self.chunk_tokens, self.free_tokens = chunk_tokens, free_tokens
        self.max_seqs, self.queue, self.prefix_cache = max_seqs, queue, prefix_cache
        self.tenant_queue = tenant_queue
        self.waiting = FairQueues(tenant_weights, fair=fair)
        self.intake = AdapterIntake(residency, self.waiting, max_seqs=max_seqs)
        self.running: list[Sequence] = []  # by arrival
        self._by_id: dict[str, Sequence] = {}
        self._by_slot: dict[int, Sequence] = {}
        self._free_slots = list(range(max_seqs))
        self._deadlines: list[tuple[float, int, Sequence]] = []
        self._events: list[Event] = []
        self._finish_times: deque[float] = deque(maxlen=64)
        self._now = 0.0
        self._step = 0
        self._latest = -1  # arrival
        self.preemptions = self.prefill_tokens = self.decode_tokens = self.prefix_hit_tokens = self.finished = 0

    # --- requests come and go ---------------------------------------------------------------------------------

    def add(self, sequence: Sequence, now: float) -> None:
        """Queue a sequence. Raises OverloadedError when the queue is full of those with no more requests in it; else
        one of theirs goes."""
        tenant = sequence.request.tenant
        if self.tenant_queue is not None and self.waiting.waiting_of(tenant) >= self.tenant_queue:
            raise OverloadedError(
                f"{self.waiting.waiting_of(tenant)} requests of this tenant wait, it may have {self.tenant_queue}",
                hint="wait for answers before sending more",
                retry_after=self._retry_after(now),
            )
        if len(self.waiting) >= self.queue:
            self._turn_away(self.waiting.surplus(sequence), sequence, now)
        self._by_id[sequence.request.request_id] = sequence
        self._latest = max(self._latest, sequence.arrival)
        sequence.found_room = len(self.waiting) < len(self._free_slots)
        sequence.queued = self._step
        deadline = sequence.request.deadline
        if deadline is not None:
            heapq.heappush(self._deadlines, (deadline, sequence.arrival, sequence))
        self.waiting.enter(sequence)

    def _turn_away(self, surplus: Sequence, newcomer: Sequence, now: float) -> None:
        error = OverloadedError(
            f"{len(self.waiting)} requests are waiting, the queue holds {self.queue}",
            hint="try again later or serve with a larger --queue",
            retry_after=self._retry_after(now),
        )
        if surplus is newcomer:
            raise error
        self._finish(surplus, "error", error.info())

    def knows(self, request_id: str) -> bool:
        return request_id in self._by_id

    def cancel(self, request_id: str) -> None:
        """End a request. Its blocks are free at once; a request that is not there has ended already."""
        sequence = self._by_id.get(request_id)
        if sequence is not None:
            self._finish(sequence, "cancelled")

    @property
    def has_work(self) -> bool:
        return bool(self._by_id or self._events or self.residency.loading or self.intake.pending)

    def _retry_after(self, now: float) -> float:
        """Seconds until about a tenth of the queue is done, at the pace of the latest requests."""
        if len(self._finish_times) < 2:
            return 1.0
        pace = len(self._finish_times) / max(now - self._finish_times[0], 1e-3)
        return min(max(len(self.waiting) / 10 / pace, 1.0), 60.0)

    # --- planning ---------------------------------------------------------------------------------------------

    def schedule(self, now: float) -> Plan:
        """The next step. Follow it by `update` with what came of it, and by that of the steps that `follow` gave."""
        self._now = now
        self._step += 1
        self._expire(now)
        self._give_way()
        plan = Plan(token_limit=self.step_tokens)
        preempted = self.preemptions
        self._decode(plan)
        if plan.token_count:
            decoding = [self._by_slot[item.slot] for item in plan.sequences]
            plan.token_limit = min(self.step_tokens, plan.token_count + self._beside(decoding))
        self._prefill(plan)
        if self.preemptions == preempted:  # else the sequence that just gave way would come straight back
            self._admit(plan)
        plan.adapters = self.residency.instructions()
        return plan

    def follow(self, plan: Plan, now: float) -> Plan | None:
        """The step after `plan`, before anybody knows what comes of that one; None: `update` first, then `schedule`.

        Only where it cannot be another one: all that run decode, nobody can come in or has to give way, no adapter is
        on its way. That a sequence ends with `plan` is found out one step late: what was computed for it is dropped.
        """
        deadline_passed = bool(self._deadlines) and self._deadlines[0][0] <= now
        loading = self.residency.loading or self.residency.has_instructions or bool(self.intake.pending)
        crowded = len(self.waiting) and (self._free_slots or (self._step + 1) % LOOK_EVERY == 0)
        slots = {item.slot for item in plan.sequences}
        if deadline_passed or loading or crowded or any(one.slot not in slots for one in self.running):
            return None
        following, going_on = Plan(token_limit=self.step_tokens), []
        needed = 0
        for item in plan.sequences:
            sequence = self._by_slot.get(item.slot)
            if sequence is None:  # cancelled meanwhile
                continue
            if not item.samples or sequence.choices is not None:
                return None
            start = item.start + item.count
            if start + 1 < sequence.limit:
                going_on.append((sequence, start))
                needed += self._blocks_for(start + 1) - len(sequence.blocks)
        if not going_on or needed > self.blocks.free:
            return None
        self._now = now
        self._step += 1
        for sequence, start in going_on:
            index = len(sequence.blocks)
            if new := self.blocks.allocate(self._blocks_for(start + 1) - index):
                sequence.blocks += new
                following.blocks.append((sequence.slot, index, new))
            following.sequences.append(ScheduledSequence(sequence.slot, start, 1, True))
            self.waiting.charge(sequence, 1)
        following.token_count = following.logit_rows = len(going_on)
        return following

    def _beside(self, decoding: list[Sequence]) -> int:
        """Prompt tokens that a step of these sequences takes with it."""
        if self.chunk_tokens is not None:
            return self.chunk_tokens
        count = len(decoding)
        prompts = len(self.running) - count + min(len(self.waiting), len(self._free_slots))
        if prompts > CROWD * count or self._owed(decoding):
            return self.step_tokens
        return max(self.free_tokens - count, count // 2, LEAST_TOKENS)

    def _owed(self, decoding: list[Sequence]) -> bool:
        """Whether most streams began when a prompt that still waits was there already: who came together has the
        first tokens together, and nobody streams at the cost of those.

        Prompts that had to wait for a place count for nothing here: under a backlog all have waited long, and the
        streams must stay even.
        """
        prompts = [one for one in self.running if not one.decodes]
        if len(self.waiting) and self._free_slots:
            prompts.append(self.waiting.next())
        arrivals = [one.arrival for one in prompts if one.found_room]
        return bool(arrivals) and 2 * sum(one.began >= min(arrivals) for one in decoding) > len(decoding)

    def _give_way(self) -> None:
        """The next in turn has waited long enough for a place, for blocks, or for those that keep its adapter out of
        the slab. Of places, whoever has two more than it gives one soon; in the end the sequence that is furthest ahead
        of it, if far enough, waits instead."""
        if self._step % LOOK_EVERY or not len(self.waiting) or not self.running:
            return
        head = self.waiting.next()
        waited = self._step - head.queued
        in_the_way = self.running
        place = Place.RESIDENT if head.adapter is None else self.residency.place(head.adapter)
        if place is Place.RESIDENT:
            needed = self._blocks_for(len(head.tokens)) + len(self.running)
            if self._free_slots and needed <= self.blocks.free:
                return
            if not self._free_slots and waited >= SHORT_WAIT and (one := self.waiting.crowding(self.running, head)):
                self._preempt(one)
                return
        else:
            in_the_way = self.intake.in_the_way(self.running)
        if waited >= LONGEST_WAIT and place is not Place.LOADING and in_the_way:
            lead, _, victim = max((self.waiting.ahead(one, head), one.arrival, one) for one in in_the_way)
            if lead > 0:
                self._preempt(victim)

    def _expire(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            _, _, sequence = heapq.heappop(self._deadlines)
            if sequence.status is not Status.FINISHED:
                made = len(sequence.tokens) - sequence.prompt_length
                error = DeadlineError(f"deadline: passed after {made} generated tokens", param="deadline")
                self._finish(sequence, "error", error.info())

    def _decode(self, plan: Plan) -> None:
        for sequence in tuple(self.running):
            if sequence.status is Status.RUNNING and sequence.decodes and self._grow(sequence, plan):
                count = self._chunk(sequence, plan)
                if count > 0:
                    self._run(sequence, count, plan)

    def _prefill(self, plan: Plan) -> None:
        prompts = [sequence for sequence in self.running if not sequence.decodes]
        prompts.sort(key=self.waiting.rank)
        for sequence in prompts:
            count = self._chunk(sequence, plan)
            if count > 0:
                self._run(sequence, count, plan)

    def _admit(self, plan: Plan) -> None:
        """Admit waiting requests, least served adapter first.

        A shortage of slots, blocks or tokens ends the round, so that nobody is overtaken for good; a missing adapter
        holds up its own queue only. For those that wait on their adapters are brought in meanwhile.
        """
        short = stuck = False  # stuck: an adapter waits for room in the slab; nobody less deserving may ask before it
        ahead = self.intake.turns_ahead
        for key in self.waiting.turns():
            short = short or not self._free_slots or plan.token_count >= plan.token_limit
            if short:
                ahead -= 1
                if stuck or ahead < 0 or not self.intake.look_ahead(key.adapter):
                    break
                continue
            place = Place.RESIDENT if key.adapter is None else self._place(key.adapter, stuck)
            stuck |= place is Place.FULL
            if place is Place.RESIDENT:
                short = not self._admit_one(key, plan)
        if self.intake.pending and not stuck:
            self.intake.go_on()

    def _place(self, adapter: str, stuck: bool) -> Place:
        try:
            return self.intake.place(adapter, stuck)
        except AdapterError as error:
            self._fail_adapter(adapter, error.info())
            return Place.LOADING

    def _admit_one(self, key: Key, plan: Plan) -> bool:
        sequence = self.waiting.head(key)
        if not self._take_blocks(sequence):
            return False
        count = self._chunk(sequence, plan)
        if count <= 0:
            self._give_blocks(sequence)
            return False
        self._start(self.waiting.pop(key), plan)
        self._run(sequence, count, plan)
        return True

    def _chunk(self, sequence: Sequence, plan: Plan) -> int:
        """How many tokens of a sequence fit into what is left of the step; those that must be scored count as rows."""
        rows = self.logit_rows - plan.logit_rows
        count = min(sequence.pending, plan.token_limit - plan.token_count)
        unscored = sequence.unscored
        if rows <= 0 or not unscored:
            return count if rows > 0 else 0
        free_of_charge = max(unscored.start - sequence.computed, 0)
        return min(count, free_of_charge + rows - 1)

    def _run(self, sequence: Sequence, count: int, plan: Plan) -> None:
        start, stop = sequence.computed, sequence.computed + count
        samples = stop == len(sequence.tokens) and sequence.generates
        unscored = sequence.unscored
        score_start, score_stop = max(start, unscored.start), min(stop, unscored.stop)
        if score_start >= score_stop:
            score_start = score_stop = 0
        plan.sequences.append(ScheduledSequence(sequence.slot, start, count, samples, score_start, score_stop))
        if samples and sequence.choices is not None:
            plan.allowed[sequence.slot] = sequence.choices.allowed()
        if sequence.unsent:
            position = len(sequence.tokens) - sequence.unsent
            plan.tokens.append((sequence.slot, position, sequence.tokens[position:]))
            sequence.unsent = 0
        plan.token_count += count
        plan.logit_rows += samples + score_stop - score_start
        self.waiting.charge(sequence, count)

    # --- slots and blocks -------------------------------------------------------------------------------------

    def _start(self, sequence: Sequence, plan: Plan) -> None:
        sequence.slot = heapq.heappop(self._free_slots)
        sequence.status = Status.RUNNING
        sequence.admissions += 1
        sequence.unsent = 0
        handle = -1
        if sequence.adapter is not None:
            self.residency.acquire(sequence.adapter)
            handle = self.residency.handle(sequence.adapter)
        self._by_slot[sequence.slot] = sequence
        insort(self.running, sequence, key=lambda running: running.arrival)
        plan.loads.append(
            SlotLoad(
                slot=sequence.slot,
                tokens=sequence.tokens,
                blocks=list(sequence.blocks),
                handle=handle,
                sampling=sequence.sampling,
                seed=sequence.seed,
                acts=sequence.acts,
            )
        )

    def _stop(self, sequence: Sequence) -> None:
        """Take a running sequence out: slot, blocks and adapter are free again."""
        self.running.remove(sequence)
        del self._by_slot[sequence.slot]
        heapq.heappush(self._free_slots, sequence.slot)
        sequence.slot = -1
        self._give_blocks(sequence)
        if sequence.adapter is not None:
            self.residency.release(sequence.adapter)

    def _take_blocks(self, sequence: Sequence) -> bool:
        """Blocks for all tokens known so far, those of the longest cached beginning among them, or none at all.

        At least one token is left to compute, and the block it is written to is the sequence's own.
        """
        found: list[int] = []
        if self.prefix_cache:
            reusable = sequence.scored if sequence.scores_prompt and sequence.unscored else len(sequence.tokens) - 1
            found = self.blocks.match(self._keys(sequence, reusable // self.block_size))
        needed = self._blocks_for(len(sequence.tokens)) - len(found)
        room = self.blocks.free - self.blocks.idle(found)
        if needed + len(self.running) > room and (self.running or needed > room):  # leave a block for each to grow
            return False
        self.blocks.retain(found)
        sequence.blocks = found + self.blocks.allocate(needed)
        sequence.computed = len(found) * self.block_size
        sequence.published = len(found)
        if sequence.admissions == 0:
            sequence.cached_tokens = sequence.computed
            self.prefix_hit_tokens += sequence.computed
        return True

    def _give_blocks(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.blocks)
        sequence.blocks = []
        sequence.computed = 0

    def _grow(self, sequence: Sequence, plan: Plan) -> bool:
        """Blocks for the tokens that have none; False when the sequence itself had to give way."""
        index = len(sequence.blocks)
        needed = self._blocks_for(len(sequence.tokens)) - index
        if needed <= 0:
            return True
        while self.blocks.free < needed:
            victim = self.running[-1]  # not in the plan yet: sequences are taken by arrival
            self._preempt(victim)
            if victim is sequence:
                return False
        new = self.blocks.allocate(needed)
        sequence.blocks += new
        plan.blocks.append((sequence.slot, index, new))
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._stop(sequence)
        sequence.status = Status.WAITING
        sequence.queued = self._step
        self.waiting.push_back(sequence)
        self.preemptions += 1

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def _keys(self, sequence: Sequence, count: int) -> list[bytes]:
        """Keys of the first `count` blocks, which must be full."""
        keys, size = sequence.keys, self.block_size
        while len(keys) < count:
            parent = keys[-1] if keys else sequence.root
            start = len(keys) * size
            mask = bytearray(size)
            for begin, end in () if sequence.adapter is None else sequence.acts:
                low, high = max(begin - start, 0), min(end - start, size)
                mask[low:high] = b"\1" * max(high - low, 0)
            keys.append(block_key(parent, sequence.tokens[start : start + size], bytes(mask), sequence.adapter))
        return keys[:count]

    def _publish(self, sequence: Sequence) -> None:
        full = sequence.computed // self.block_size
        if not self.prefix_cache or full <= sequence.published:
            return
        keys = self._keys(sequence, full)
        for index in range(sequence.published, full):
            self.blocks.publish(sequence.blocks[index], keys[index])
        sequence.published = full

    # --- what came of it --------------------------------------------------------------------------------------

    def update(self, plan: Plan, outcome: Outcome) -> list[Event]:
        """Take in a step's outcome; the events to send, those of cancelled and expired requests among them."""
        for instruction in plan.adapters:
            if not isinstance(instruction, AdapterCopy) or instruction.digest in outcome.failed_adapters:
                continue
            if instruction.digest in outcome.late_adapters:
                self.residency.postponed(instruction)
            else:
                self.residency.arrived(instruction.digest)
        for digest, error in outcome.failed_adapters.items():
            self.intake.failed(digest)
            self._fail_adapter(digest, error)
        for item in plan.sequences:
            sequence = self._by_slot.get(item.slot)
            if sequence is not None:  # else it ended while this step was under way
                self._advance(sequence, item, outcome)
        events, self._events = self._events, []
        return events

    def _advance(self, sequence: Sequence, item: ScheduledSequence, outcome: Outcome) -> None:
        if item.slot in outcome.failed:
            self._finish(sequence, "error", outcome.failed[item.slot])
            return
        sequence.computed += item.count
        if item.score_stop > item.score_start:
            sequence.scores += outcome.prompt_logprobs[item.slot]
            sequence.scored = item.score_stop
        self._publish(sequence)
        if not item.samples:
            self.prefill_tokens += item.count
            if sequence.pending == 0:  # nothing to generate
                self._finish(sequence, "length")
            return
        self.prefill_tokens += item.count - 1
        self.decode_tokens += 1
        self._append(sequence, outcome.tokens[item.slot], outcome.logprobs.get(item.slot))

    def _append(self, sequence: Sequence, token: int, logprob: TokenLogprob | None) -> None:
        new = [token]
        finish: FinishReason | None = None
        if sequence.choices is not None:
            sequence.choices.advance(token)
            if logprob is None:  # what has no alternative needs no forward pass of its own
                new += sequence.choices.forced()
                sequence.unsent = len(new) - 1
            finish = "stop" if sequence.choices.done else None
        elif token in sequence.stop_ids:
            finish = "stop"
        if sequence.began < 0:
            sequence.began = self._latest
        sequence.tokens += new
        if finish is None and len(sequence.tokens) >= sequence.limit:
            finish = "length"
        logprobs = None if logprob is None else [logprob]
        if finish is not None:
            self._finish(sequence, finish, tokens=new, logprobs=logprobs)
        else:
            self._events.append(self._event(sequence, tokens=new, logprobs=logprobs))

    def _event(
        self,
        sequence: Sequence,
        finish: FinishReason | None = None,
        error: ErrorInfo | None = None,
        tokens: list[int] | None = None,
        logprobs: list[TokenLogprob] | None = None,
    ) -> Event:
        scores = None
        if sequence.scores_prompt and sequence.scores and not sequence.unscored and error is None:
            scores, sequence.scores = sequence.scores, []  # said once
        return Event(
            request_id=sequence.request.request_id,
            tokens=tokens or [],
            logprobs=logprobs,
            prompt_logprobs=scores,
            cached_tokens=sequence.cached_tokens,
            finish=finish,
            error=error,
        )

    def _finish(
        self,
        sequence: Sequence,
        finish: FinishReason,
        error: ErrorInfo | None = None,
        tokens: list[int] | None = None,
        logprobs: list[TokenLogprob] | None = None,
    ) -> None:
        if sequence.status is Status.RUNNING:
            self._stop(sequence)
        else:
            self.waiting.remove(sequence)
        self.waiting.leave(sequence)
        sequence.status = Status.FINISHED
        del self._by_id[sequence.request.request_id]
        self.finished += 1
        self._finish_times.append(self._now)
        self._events.append(self._event(sequence, finish, error, tokens, logprobs))

    def _fail_adapter(self, adapter: str, error: ErrorInfo) -> None:
        for sequence in self.waiting.of(adapter):
            self._finish(sequence, "error", error)
