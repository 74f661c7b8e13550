"""Shares of tenants and adapters, priorities, and how long anybody waits, by the scheduler alone."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.test_scheduler import Stage

from lorikeet.engine.blocks import root_key
from lorikeet.engine.fairness import FairQueues
from lorikeet.engine.request import Sequence
from lorikeet.engine.scheduler import LONGEST_WAIT, LOOK_EVERY, SHORT_WAIT
from lorikeet.errors import OverloadedError
from lorikeet.types import Request, SamplingParams


def sequence(number: int, tenant: str = "", adapter: str | None = None, priority: int = 0) -> Sequence:
    request = Request(request_id=str(number), tokens=[1, 2], tenant=tenant, adapter=adapter, priority=priority)
    return Sequence(request, number, 0, limit=9, stop_ids=frozenset(), root=b"")


class Tenants(Stage):
    """A stage on which requests have tenants and priorities."""

    def ask(self, tenant: str, prompt: int, make: int, adapter: str | None = None, priority: int = 0) -> str:
        name = f"{tenant}{self.count}"
        request = Request(
            request_id=name, tokens=list(range(prompt)), adapter=adapter, tenant=tenant, priority=priority,
            sampling=SamplingParams(max_tokens=make),
        )  # fmt: skip
        one = Sequence(
            request, self.count, 0, limit=prompt + make, stop_ids=frozenset(), root=root_key("b", str(self.count))
        )
        self.scheduler.add(one, now=float(self.steps))
        self.count += 1
        return name

    def made_by(self, tenant: str) -> int:
        return sum(len(e.tokens) for name, events in self.events.items() if name.startswith(tenant) for e in events)


def test_a_tenant_with_many_adapters_has_no_larger_share() -> None:
    stage = Tenants(max_seqs=4, slab=64, step_tokens=64)
    adapters = [stage.register(f"a{i}") for i in range(20)]
    for i in range(300):
        stage.ask("noisy", 4, 6, adapters[i % 20])
        if i % 2:
            stage.ask("calm", 4, 6)
    for _ in range(200):
        stage.step()
    noisy, calm = stage.made_by("noisy"), stage.made_by("calm")
    assert 0.8 <= noisy / calm <= 1.25, (noisy, calm)


@pytest.mark.parametrize("weight", [2.0, 3.0])
def test_weights_are_shares(weight: float) -> None:
    stage = Tenants(max_seqs=4, step_tokens=64, tenant_weights={"gold": weight})
    for _ in range(400):
        stage.ask("gold", 4, 6)
        stage.ask("plain", 4, 6)
    for _ in range(200):
        stage.step()
    assert stage.made_by("gold") / stage.made_by("plain") == pytest.approx(weight, rel=0.2)


def test_priority_orders_what_one_tenant_asks_of_one_adapter() -> None:
    queues = FairQueues()
    for number, priority in enumerate((0, 5, -1, 0)):
        queues.enter(sequence(number, priority=priority))
    queues.enter(sequence(9, tenant="other", priority=99))
    order = []
    for key in queues.turns():
        one = queues.pop(key)
        order.append((one.request.tenant, one.arrival))
        queues.charge(one, 10)
    assert [arrival for tenant, arrival in order if not tenant] == [2, 0, 3, 1]
    assert order.index(("other", 9)) <= 1


def test_a_tenant_fills_its_own_queue_only() -> None:
    stage = Tenants(queue=10, tenant_queue=3)
    for _ in range(3):
        stage.ask("greedy", 4, 2)
    with pytest.raises(OverloadedError, match="3 requests of this tenant wait, it may have 3"):
        stage.ask("greedy", 4, 2)
    stage.ask("modest", 4, 2)
    stage.finish()
    stage.ask("greedy", 4, 2)
    stage.finish()


def test_a_full_queue_is_full_for_who_fills_it() -> None:
    """The newest of the noisy one's requests makes room for others, tenants and adapters both; then nobody's does."""
    stage = Tenants(queue=8)
    adapter = stage.register("a")
    noisy = [stage.ask("noisy", 4, 2) for _ in range(8)]
    with pytest.raises(OverloadedError, match="8 requests are waiting, the queue holds 8"):
        stage.ask("noisy", 4, 2)
    others = [stage.ask("calm", 4, 2), stage.ask("noisy", 4, 2, adapter)]
    stage.finish()
    refused = [name for name in noisy if (error := stage.events[name][-1].error) and error.code == "overloaded"]
    assert refused == noisy[-2:]
    assert all(stage.made(name) == 2 for name in noisy[:-2] + others)
    assert all(sum(event.finish is not None for event in events) == 1 for events in stage.events.values())


def test_whose_stream_has_begun_stays_when_the_queue_is_full() -> None:
    stage = Tenants(queue=1, blocks=5, max_seqs=2)
    first, second = stage.ask("a", 4, 12), ""
    for _ in range(40):
        stage.step()
        if not second and stage.scheduler.running:
            second = stage.ask("a", 4, 12)
        if stage.scheduler.preemptions:
            break
    assert stage.scheduler.preemptions
    with pytest.raises(OverloadedError):
        stage.ask("b", 4, 12)
    stage.finish()
    assert stage.made(first) == stage.made(second) == 12


def test_without_fairness_requests_are_taken_as_they_come() -> None:
    stage = Tenants(max_seqs=1, queue=9, fair=False)
    names = [stage.ask("noisy", 4, 3) for _ in range(8)] + [stage.ask("calm", 4, 3)]
    with pytest.raises(OverloadedError):
        stage.ask("meek", 4, 3)
    stage.finish()
    assert list(stage.events) == names


def first_step(stage: Tenants, name: str, limit: int) -> int:
    """Steps until the request has its first token."""
    for count in range(limit):
        if stage.made(name):
            return count
        stage.step()
    raise AssertionError(f"no token after {limit} steps")


@pytest.mark.parametrize("shortage", ["slots", "blocks"])
def test_who_waits_has_a_place_within_a_bound_of_steps(shortage: str) -> None:
    """Others hold all slots, or all blocks, with requests that would run ten times as long."""
    limits: dict[str, Any] = {"max_seqs": 2, "blocks": 2000} if shortage == "slots" else {"max_seqs": 4, "blocks": 190}
    stage = Tenants(patience=50, **limits)
    holding = [stage.ask("noisy", 4, 600) for _ in range(2)]
    for _ in range(120):
        stage.step()
    waiting = stage.ask("calm", 4 if shortage == "slots" else 600, 2)
    assert first_step(stage, waiting, 400) <= LONGEST_WAIT + LOOK_EVERY + 2 + 600 // 12
    stage.finish()
    assert all(stage.made(name) == 600 for name in holding) and stage.made(waiting) == 2
    assert stage.scheduler.preemptions >= 1


def test_an_adapter_that_the_slab_has_no_room_for_comes_in_within_a_bound() -> None:
    """A running sequence of the adapter that is in its place gives way, and ends later."""
    stage = Tenants(slab=1, max_seqs=2, patience=50, blocks=2000)
    busy, shy = stage.register("busy"), stage.register("shy")
    holding = stage.ask("", 4, 900, busy)
    for _ in range(120):
        stage.step()
    waiting = stage.ask("", 4, 2, shy)
    assert first_step(stage, waiting, 300) <= LONGEST_WAIT + 2 * LOOK_EVERY + 4
    stage.finish()
    assert (stage.made(holding), stage.made(waiting)) == (900, 2)


def test_nobody_gives_way_to_one_that_is_not_behind() -> None:
    stage = Tenants(max_seqs=2, patience=10_000, blocks=2000)
    stage.ask("noisy", 4, 300)
    stage.ask("other", 4, 300)
    stage.step()
    stage.ask("calm", 4, 2)
    stage.finish()
    assert stage.scheduler.preemptions == 0


@pytest.mark.parametrize("by", ["tenant", "adapter"])
def test_places_are_shared_soon(by: str) -> None:
    """One who holds all places, with more to come, gives up as many as another can use, but no more than half."""
    stage = Tenants(max_seqs=4, slab=9, blocks=2000)
    busy, calm = (stage.register("busy"), stage.register("calm")) if by == "adapter" else (None, None)
    stage.ask("", 4, 2, calm)  # so that its adapter is there
    stage.finish()
    noisy = [stage.ask("" if calm else "noisy", 4, 300, busy) for _ in range(8)]
    for _ in range(9):
        stage.step()
    asked = stage.steps
    first = stage.ask("" if calm else "calm", 4, 3, calm)
    while not stage.made(first):
        stage.step()
    assert stage.steps - asked <= SHORT_WAIT + LOOK_EVERY + 2
    others = [stage.ask("" if calm else "calm", 4, 100, calm) for _ in range(6)]
    for _ in range(60):
        stage.step()
    mine = [one.request.request_id in others for one in stage.scheduler.running]
    assert mine.count(True) == mine.count(False) == 2
    preemptions = stage.scheduler.preemptions
    for _ in range(30):
        stage.step()
    assert stage.scheduler.preemptions == preemptions <= 3
    stage.finish()
    assert {stage.made(name) for name in noisy} == {300} and {stage.made(name) for name in others} == {100}


def test_a_tenant_with_weight_keeps_more_places() -> None:
    stage = Tenants(max_seqs=4, blocks=2000, tenant_weights={"gold": 3.0})
    for _ in range(4):
        stage.ask("gold", 4, 200)
    stage.step()
    for _ in range(4):
        stage.ask("plain", 4, 200)
    for _ in range(40):
        stage.step()
    assert sorted(one.request.tenant for one in stage.scheduler.running) == ["gold"] * 3 + ["plain"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["x", "y", None]), st.integers(-2, 2)), min_size=1))
def test_turns_take_everybody_once(asked: list[tuple[str, str | None, int]]) -> None:
    """Each turn is of a least served tenant and, of its adapters, of a least served one."""
    queues = FairQueues()
    for number, (tenant, adapter, priority) in enumerate(asked):
        queues.enter(sequence(number, tenant, adapter, priority))
    taken = []
    for key in queues.turns():
        ranks = [queues._rank(other) for other in queues._queues]
        assert queues._rank(key) == min(ranks)
        one = queues.pop(key)
        taken.append(one.arrival)
        queues.charge(one, 1 + one.arrival % 7)
    assert sorted(taken) == list(range(len(asked))) and len(queues) == 0
    assert not queues._waiting
