"""The scheduler's policy without a model: a runner that answers with any tokens stands in."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorikeet.engine.blocks import BlockPool, root_key
from lorikeet.engine.plan import Outcome, Plan
from lorikeet.engine.request import Sequence
from lorikeet.engine.residency import Residency
from lorikeet.engine.scheduler import Scheduler
from lorikeet.types import AdapterInfo, Event, Request, SamplingParams, TokenLogprob

UNIT = 64


class Stage:
    """A scheduler with a pretended model. It checks every plan as the runner would have to trust it."""

    def __init__(self, *, blocks: int = 64, slab: int = 4, patience: int | None = None, **limits: Any) -> None:
        self.limits = {"block_size": 4, "max_seqs": 4, "step_tokens": 16, "logit_rows": 12, "queue": 1000} | limits
        self.residency = Residency(slab * UNIT, clock=lambda: float(self.steps))
        self.scheduler = Scheduler(BlockPool(blocks), self.residency, **self.limits)
        if patience is not None:
            self.scheduler.waiting._patience = patience
        self.steps = 0
        self.count = 0
        self.events: dict[str, list[Event]] = {}
        self.tokens: dict[int, list[int]] = {}  # by slot, as the runner knows them
        self.table: dict[int, list[int]] = {}
        self.handle: dict[int, int] = {}
        self.at: dict[int, str] = {}  # handle -> digest

    def register(self, name: str, size: int = 1) -> str:
        self.residency.register(AdapterInfo(digest=name, path=name, nbytes=size * UNIT, max_rank=1, sites=1))
        return name

    def add(self, prompt: int, make: int, adapter: str | None = None, **sampling: Any) -> str:
        name = f"s{self.count}"
        params = SamplingParams(max_tokens=make, **sampling)
        request = Request(request_id=name, tokens=list(range(prompt)), adapter=adapter, sampling=params)
        self.scheduler.add(
            Sequence(
                request, self.count, 0, limit=prompt + make, stop_ids=frozenset(), root=root_key("b", str(self.count))
            ),
            now=float(self.steps),
        )
        self.count += 1
        return name

    def step(self) -> Plan:
        plan = self.scheduler.schedule(float(self.steps))
        self.steps += 1
        outcome = self._run(plan)
        for event in self.scheduler.update(plan, outcome):
            self.events.setdefault(event.request_id, []).append(event)
        return plan

    def _run(self, plan: Plan) -> Outcome:
        outcome = Outcome()
        for do in plan.adapters:
            if hasattr(do, "digest"):
                self.at[do.handle] = do.digest
        for load in plan.loads:
            self.tokens[load.slot], self.table[load.slot] = list(load.tokens), list(load.blocks)
            self.handle[load.slot] = load.handle
        for slot, index, new in plan.blocks:
            assert len(self.table[slot]) == index
            self.table[slot] += new
        for slot, position, tokens in plan.tokens:
            assert len(self.tokens[slot]) == position
            self.tokens[slot] += tokens
        size = self.limits["block_size"]
        assert sum(item.count for item in plan.sequences) == plan.token_count <= self.limits["step_tokens"]
        rows = sum(item.samples + item.score_stop - item.score_start for item in plan.sequences)
        assert rows == plan.logit_rows <= self.limits["logit_rows"]
        slots = [item.slot for item in plan.sequences]
        assert len(set(slots)) == len(slots) <= self.limits["max_seqs"]
        written = Counter()
        for item in plan.sequences:
            tokens, stop = self.tokens[item.slot], item.start + item.count
            assert item.count > 0 and stop <= len(tokens) <= len(self.table[item.slot]) * size
            assert item.samples <= (stop == len(tokens))
            written.update({self.table[item.slot][at // size] for at in range(item.start, stop)})
            if item.score_stop:
                assert item.start <= item.score_start < item.score_stop <= stop
                scores = range(item.score_start, item.score_stop)
                outcome.prompt_logprobs[item.slot] = [TokenLogprob(tokens[at + 1], -float(at)) for at in scores]
            if item.samples:
                tokens.append(1)
                outcome.tokens[item.slot] = 1
        assert not written or max(written.values()) == 1, "two sequences write into one block"
        for slot in slots:
            if self.handle[slot] >= 0:
                running = next(s for s in self.scheduler.running if s.slot == slot)
                assert self.at[self.handle[slot]] == running.adapter
        return outcome

    def finish(self, limit: int = 3000) -> None:
        for _ in range(limit):
            if not self.scheduler.has_work:
                return
            self.step()
        raise AssertionError("still at work")

    def made(self, name: str) -> int:
        return sum(len(event.tokens) for event in self.events.get(name, []))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_everything_accepted_ends_with_what_it_asked_for(data: st.DataObject) -> None:
    draw = data.draw
    max_seqs = draw(st.integers(1, 4))
    stage = Stage(
        blocks=draw(st.integers(12, 30)),
        slab=draw(st.integers(2, 5)),
        max_seqs=max_seqs,
        step_tokens=draw(st.integers(max_seqs, 20)),
        chunk_tokens=draw(st.sampled_from([None, 1, 5, 20])),
        logit_rows=draw(st.integers(max_seqs + 1, 12)),
        prefix_cache=draw(st.booleans()),
        patience=draw(st.sampled_from([0, 50, 4096])),
    )
    names = [None, *(stage.register(f"a{i}", size) for i, size in enumerate([1, 1, 2, 2]))]
    wanted = {}
    for _ in range(draw(st.integers(1, 25))):
        scores = draw(st.sampled_from([None, None, 0]))
        prompt, make = draw(st.integers(1, 24)), draw(st.integers(0, 20))
        wanted[stage.add(prompt, make, draw(st.sampled_from(names)), prompt_logprobs=scores)] = (prompt, make, scores)
        for _ in range(draw(st.integers(0, 3))):
            stage.step()
    stage.finish()
    for name, (prompt, make, scores) in wanted.items():
        events = stage.events[name]
        assert [event.finish is not None for event in events] == [False] * (len(events) - 1) + [True]
        assert (stage.made(name), events[-1].finish) == (make, "length")
        said = [event.prompt_logprobs for event in events if event.prompt_logprobs is not None]
        if scores is None:
            assert said == []
        else:
            assert [entry and entry.logprob for entry in said[0]] == [None, *(-float(i) for i in range(prompt - 1))]
    assert stage.scheduler.blocks.free == stage.scheduler.blocks.total
    assert sorted(stage.scheduler._free_slots) == list(range(max_seqs))


def test_decode_goes_first_and_prompts_come_in_chunks() -> None:
    stage = Stage(step_tokens=8)
    stage.add(3, 20)
    stage.step()
    stage.add(30, 5)
    plan = stage.step()
    assert [(item.count, item.samples) for item in plan.sequences] == [(1, True), (7, False)]
    plan = stage.step()
    assert [(item.start, item.count) for item in plan.sequences] == [(3 + 1, 1), (7, 7)]


def test_streams_go_on_beside_long_prompts() -> None:
    """What is alone takes a whole step; beside streams prompts take what is free of charge, or half a step more."""
    stage = Stage(blocks=2000, max_seqs=100, step_tokens=1000, logit_rows=200, prefix_cache=False)
    stage.add(3, 900)
    assert [item.count for item in stage.step().sequences] == [3]
    stage.add(300, 50)
    assert [item.count for item in stage.step().sequences] == [1, 23]
    while stage.scheduler.running[-1].pending > 1:
        stage.step()
    for _ in range(4):
        stage.add(30, 50)
    assert stage.step().token_count == 2 + 22
    stage.add(30, 50)  # now more than twice as many wait as stream
    assert stage.step().token_count == 2 + 8 + 4 * 30
    for _ in range(53):
        stage.add(1, 50)
    while len(stage.scheduler.running) < 60:
        stage.step()
    stage.add(500, 1)
    assert [item.count for item in stage.step().sequences] == [1] * 60 + [30]
    for chunk, expected in ((7, 7), (5000, 463)):
        stage.scheduler.chunk_tokens = chunk
        assert stage.step().sequences[-1].count == expected


def test_a_device_that_takes_more_tokens_for_nothing_gets_more() -> None:
    stage = Stage(blocks=2000, max_seqs=8, step_tokens=1000, logit_rows=200, free_tokens=256)
    stage.add(3, 900)
    stage.step()
    stage.add(600, 50)
    assert [item.count for item in stage.step().sequences] == [1, 255]


def test_the_latest_arrival_gives_way() -> None:
    stage = Stage(blocks=8, max_seqs=3, prefix_cache=False)
    first, second, third = (stage.add(4, 20) for _ in range(3))
    stage.finish()
    ends = [min(i for i, e in enumerate(stage.events) if e == name) for name in (first, second, third)]
    assert ends == sorted(ends)
    assert stage.scheduler.preemptions > 0
    assert all(stage.made(name) == 20 for name in (first, second, third))


def test_a_missing_adapter_holds_up_its_own_queue_only() -> None:
    stage = Stage(slab=2)
    large = stage.register("large", 2)
    small = stage.register("small", 1)
    stage.add(2, 30, small)
    stage.step()
    stage.step()  # `small` is in use, so that `large` finds no room
    stuck, free, other = stage.add(2, 2, large), stage.add(2, 2), stage.add(2, 2, small)
    for _ in range(6):
        stage.step()
    assert (stage.made(stuck), stage.made(free), stage.made(other)) == (0, 2, 2)
    stage.finish()
    assert stage.made(stuck) == 2


def test_no_adapter_starves_behind_a_busy_one() -> None:
    stage = Stage(slab=1, max_seqs=2, patience=20)
    busy, shy = stage.register("busy"), stage.register("shy")
    for _ in range(4):
        stage.add(2, 6, busy)
    stage.step()
    waiting = stage.add(2, 3, shy)
    for _ in range(60):  # the busy one's queue never ends
        stage.add(2, 6, busy)
        stage.step()
        if stage.made(waiting) == 3:
            break
    else:
        raise AssertionError("the shy adapter never had its turn")
    stage.finish()


def test_slots_are_shared_between_adapters() -> None:
    stage = Stage(max_seqs=2, slab=4)
    many, few = stage.register("many"), stage.register("few")
    for _ in range(30):
        stage.add(2, 4, many)
    for _ in range(8):
        stage.step()
    late = [stage.add(2, 4, few) for _ in range(3)]
    before = sum(len(e) > 0 and e[-1].finish is not None for e in stage.events.values())
    while not all(stage.made(name) == 4 for name in late):
        stage.step()
    after = sum(e[-1].finish is not None for e in stage.events.values())
    assert after - before - len(late) <= 6, "the newcomer waited for the whole queue before it"
    stage.finish()


def test_the_same_prompt_twice_shares_blocks() -> None:
    stage = Stage(max_seqs=2)
    stage.count = 0
    first = stage.add(12, 2)
    stage.finish()
    stage.count = 0  # the same root
    stage.scheduler.add(
        Sequence(
            Request(request_id="again", tokens=list(range(12)), sampling=SamplingParams(max_tokens=2)),
            99,
            0,
            limit=14,
            stop_ids=frozenset(),
            root=root_key("b", "0"),
        ),
        now=0.0,
    )
    plan = stage.step()
    assert [(item.start, item.count) for item in plan.sequences] == [(8, 4)]
    assert stage.scheduler.prefix_hit_tokens == 8
    stage.finish()
    assert stage.made(first) == stage.made("again") == 2


def test_retry_after_grows_with_the_queue() -> None:
    from lorikeet.errors import OverloadedError

    stage = Stage(queue=40, max_seqs=1)
    for _ in range(40):
        stage.add(2, 2)
    for _ in range(10):
        stage.step()
    while len(stage.scheduler.waiting) < 40:
        stage.add(2, 2)
    with pytest.raises(OverloadedError) as caught:
        stage.add(2, 2)
    assert 1.0 <= caught.value.retry_after <= 60.0
    assert "40" in caught.value.message


def test_who_came_together_has_first_tokens_together() -> None:
    """Prompts that were there before the streams began are not held up for them; those that came later are."""
    stage = Stage(max_seqs=16, step_tokens=64, blocks=400, logit_rows=32)
    wave = [stage.add(32, 40) for _ in range(8)]
    for _ in range(4 + 1):
        stage.step()
    assert all(stage.made(name) >= 1 for name in wave)
    late = stage.add(64, 4)
    plan = stage.step()
    assert plan.token_count == 8 + 16  # the chunk beside eight streams
    for _ in range(4):
        stage.step()
    assert stage.made(late) >= 1
    stage.finish()


def test_under_a_backlog_prompts_wait_in_chunks() -> None:
    """All that are admitted have waited since before the streams began, because there was no place for them."""
    stage = Stage(max_seqs=8, step_tokens=64, blocks=800)
    for i in range(40):
        stage.add(32, 20 + i % 7)
    for _ in range(12):
        stage.step()
    taken = []
    while len(stage.scheduler.waiting) > 4:
        plan = stage.step()
        taken.append(sum(one.count for one in plan.sequences if one.count > 1))
    assert max(taken) <= 24, taken
    stage.finish()
