"""Adapters come in while those that asked for them wait for something else."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.test_scheduler import UNIT, Stage

from lorikeet.engine.plan import Plan
from lorikeet.engine.residency import AdapterDrop, Place
from lorikeet.errors import AdapterInUseError
from lorikeet.types import AdapterCopy


def copied(plan: Plan) -> dict[str, int]:
    """Bytes by adapter."""
    counts: Counter[str] = Counter()
    for do in plan.adapters:
        if isinstance(do, AdapterCopy):
            counts[do.digest] += do.count
    return counts


def test_who_waits_for_a_slot_does_not_wait_for_its_adapter() -> None:
    stage = Stage(max_seqs=2, slab=4)
    for _ in range(2):
        stage.add(2, 6)
    stage.step()
    late = stage.add(2, 2, stage.register("late"))
    assert copied(stage.step()) == {"late": UNIT}
    while len(stage.scheduler.running) == 2:
        assert copied(stage.step()) == {}
    plan = stage.step()  # the very step after a slot was free
    assert stage.made(late) == 1 and copied(plan) == {}
    stage.finish()


def test_who_waits_for_tokens_or_blocks_neither() -> None:
    for limits in ({"step_tokens": 4, "max_seqs": 4}, {"blocks": 6, "prefix_cache": False}):
        stage = Stage(slab=4, **limits)
        stage.add(20, 4)
        stage.step()
        late = stage.add(8, 1, stage.register("late"))
        stage.step()
        assert stage.residency.place("late") is Place.RESIDENT and not stage.made(late)
        stage.finish()


def test_nothing_that_runs_or_is_waited_for_goes_for_it() -> None:
    stage = Stage(max_seqs=2, slab=3)
    names = [stage.register(f"a{i}") for i in range(5)]
    for name in names[:2]:
        stage.add(2, 30, name)
    for _ in range(3):
        stage.step()
    for name in names[2:]:
        stage.add(2, 3, name)
    for _ in range(10):
        plan = stage.step()
        assert not any(isinstance(do, AdapterDrop) for do in plan.adapters)
    there = [name for name in names if stage.residency.place(name) is Place.RESIDENT]
    assert there == names[:3]  # two run, there is room for one more
    stage.finish()


def test_a_step_copies_no_more_for_it() -> None:
    stage = Stage(max_seqs=1, slab=12)
    stage.residency._copy_bytes = 2 * UNIT
    stage.add(2, 20)
    stage.step()
    for i in range(2):
        stage.add(2, 1, stage.register(f"large{i}", size=3))
    plans = [copied(stage.step()) for _ in range(4)]
    assert [sum(plan.values()) for plan in plans] == [2 * UNIT] * 3 + [0]
    assert list(plans[0]) == ["large0"], "the second began before the first had all its bytes"
    stage.finish()


def test_what_came_ahead_gives_way_to_whose_turn_it_is() -> None:
    """Many adapters that are waited for have filled the slab while there was no slot; then the least served comes."""
    stage = Stage(max_seqs=2, slab=2, patience=10**9)
    for make in (20, 40):
        stage.add(2, make)
    stage.step()
    for i in range(6):
        stage.add(2, 2, stage.register(f"busy{i}"))
        stage.step()
    assert stage.residency.used == stage.residency.budget and len(stage.scheduler.intake._ahead) == 2
    shy = stage.add(2, 1, stage.register("shy"))
    stage.scheduler.waiting._adapters._served["shy"] = -1.0
    while len(stage.scheduler.running) == 2:
        stage.step()
        assert stage.residency.place("shy") is Place.FULL
    stage.step()
    assert stage.residency.place("shy") is Place.RESIDENT
    while not stage.made(shy):
        stage.step()
    assert len(stage.scheduler.waiting) >= 4, "it had to wait until the others were done"
    stage.finish()


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_whatever_is_brought_in_the_rest_stays(data: st.DataObject) -> None:
    """Before the turn of the one it comes for, an adapter takes the room of none that is waited for."""
    draw = data.draw
    stage = Stage(max_seqs=draw(st.integers(1, 3)), slab=draw(st.integers(4, 8)), blocks=40)
    names = [stage.register(f"a{i}", size) for i, size in enumerate(draw(st.lists(st.integers(1, 3), min_size=8)))]
    scheduler = stage.scheduler
    look_ahead = scheduler.intake.look_ahead

    def watched(adapter: str | None) -> bool:
        before = {name for name in scheduler.waiting.wanted() if stage.residency.place(name) is not Place.FULL}
        done = look_ahead(adapter)
        assert all(stage.residency.place(name) is not Place.FULL for name in before)
        return done

    scheduler.intake.look_ahead = watched  # type: ignore[method-assign]
    for _ in range(draw(st.integers(1, 30))):
        stage.add(draw(st.integers(1, 10)), draw(st.integers(1, 8)), draw(st.sampled_from([None, *names])))
        for _ in range(draw(st.integers(0, 2))):
            stage.step()
    stage.finish()
    assert all(events[-1].finish == "length" for events in stage.events.values())


def test_a_thousand_requests_for_one_cold_adapter_are_one_load() -> None:
    stage = Stage(max_seqs=4, slab=4, step_tokens=64)
    name = stage.register("cold", 2)
    for _ in range(1000):
        stage.add(2, 1, name)
    total: Counter[str] = Counter()
    while stage.scheduler.has_work:
        total.update(copied(stage.step()))
    assert total == {"cold": 2 * UNIT} and stage.scheduler.finished == 1000
    assert stage.scheduler.blocks.free == stage.scheduler.blocks.total and not stage.residency.in_use(name)


# --- by hand --------------------------------------------------------------------------------------------------------


def test_what_is_asked_for_by_hand_comes_in_over_several_steps() -> None:
    """There is room in three holes, which a step cannot join."""
    stage = Stage(slab=6)
    stage.residency._move_bytes = UNIT
    for i in range(6):
        stage.residency.ensure(stage.register(f"s{i}"))
        stage.step()
    for i in (0, 2, 4):
        stage.scheduler.intake.unload(f"s{i}")
    for i in (1, 3, 5):
        stage.residency.pin(f"s{i}")
    name = stage.register("large", 3)
    assert stage.scheduler.intake.bring_in(name) and stage.scheduler.has_work
    stage.finish(limit=10)
    assert all(stage.residency.place(one) is Place.RESIDENT for one in ("s1", "s3", "s5", "large"))


def test_by_hand_nothing_goes_that_somebody_needs() -> None:
    stage = Stage(slab=2)
    stage.add(2, 8, stage.register("used"))
    stage.step()
    stage.step()
    assert not stage.scheduler.intake.bring_in(stage.register("large", 2)) and not stage.scheduler.intake.pending
    with pytest.raises(AdapterInUseError, match="1 requests run on it"):
        stage.scheduler.intake.unload("used")
    assert stage.scheduler.intake.bring_in(stage.register("small"))
    stage.scheduler.intake.unload("small")
    stage.finish()
    assert stage.residency.place("small") is Place.FULL
