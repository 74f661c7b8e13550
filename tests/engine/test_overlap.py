"""A step that is launched before the one before it is collected: the same answers, and none too many.

On a GPU it hides what the host does between steps. Here the order of things is the same, on a CPU.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorikeet.engine.engine import Engine


def overlapping(engine: Engine) -> Engine:
    engine._overlaps = engine._runner._keeps_sampled = True
    return engine


def watched(engine: Engine) -> list[int]:
    """How many steps were launched ahead."""
    ahead, follow = [0], engine._scheduler.follow

    def counting(*arguments: Any) -> Any:
        plan = follow(*arguments)
        ahead[0] += plan is not None
        return plan

    engine._scheduler.follow = counting  # type: ignore[method-assign]
    return ahead


def test_answers_are_the_dense_ones_and_most_steps_are_ahead(world: Any) -> None:
    infos = [world.adapter(1), world.adapter(2, 3, scaled=True)]
    engine = overlapping(world.engine(infos))
    ahead = watched(engine)
    digests = [None, *(info.digest for info in infos)]
    requests = [world.request(f"{i}", world.prompt(i, 5), digests[i % 3], max_tokens=20) for i in range(6)]
    answers = world.run(engine, requests)
    for request in requests:
        assert answers[request.request_id].tokens == world.greedy(request.tokens, 20, request.adapter)
    stats = engine.stats()
    assert ahead[0] > stats.steps // 2
    assert stats.blocks_free == stats.blocks_total and stats.running == 0


@settings(max_examples=20, deadline=None)
@given(
    asked=st.lists(
        st.tuples(
            st.integers(0, 2), st.integers(1, 20), st.integers(0, 16), st.sampled_from([0.0, 0.9]), st.booleans()
        ),
        min_size=1,
        max_size=10,
    ),
    max_seqs=st.integers(1, 6),
    blocks=st.integers(12, 60),
    seed=st.integers(0, 2**16),
)
def test_whatever_comes_and_goes_nothing_changes(
    world: Any, asked: list[tuple[int, int, int, float, bool]], max_seqs: int, blocks: int, seed: int
) -> None:
    """Requests come between steps; some end by a stop token, in a step that the next one has already followed."""
    infos = [world.adapter(1), world.adapter(4, 2, invocation=(60,))]
    digests = [None, *(info.digest for info in infos)]
    requests = [
        world.request(
            f"{i}", [60, *world.prompt(i, length)], digests[which], max_tokens=count, temperature=heat, seed=i,
            logprobs=1 if i % 3 == 0 else None, stop_token_ids=tuple(range(0, 61, 5)) if stops else (),
        )
        for i, (which, length, count, heat, stops) in enumerate(asked)
    ]  # fmt: skip
    plain = world.run(world.engine(infos, max_seqs=8, blocks=256), requests)
    draw = random.Random(seed)
    engine = overlapping(world.engine(infos, max_seqs=max_seqs, blocks=blocks))
    answers: dict[str, Any] = {}
    left = list(requests)
    for _ in range(3000):
        while left and draw.random() < 0.4:
            engine.add(left.pop(0))
        if not left and not engine.has_work():
            break
        if engine.has_work():
            world.collect(answers, engine.step())
    for name, answer in plain.items():
        assert (answers[name].tokens, answers[name].finish) == (answer.tokens, answer.finish), name
        assert answers[name].logprobs == pytest.approx(answer.logprobs, abs=1e-4)
    stats = engine.stats()
    assert (stats.blocks_free, stats.running, stats.waiting) == (stats.blocks_total, 0, 0)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**32))
def test_who_cancels_gets_one_final_event_and_harms_nobody(world: Any, seed: int) -> None:
    draw = random.Random(seed)
    info = world.adapter(1)
    engine = overlapping(world.engine([info], max_seqs=3, blocks=40))
    requests = [
        world.request(f"{i}", world.prompt(i, 3 + i), info.digest if i % 2 else None, max_tokens=12, ignore_eos=True)
        for i in range(6)
    ]
    for request in requests:
        engine.add(request)
    answers: dict[str, Any] = {}
    cancelled = set()
    for _ in range(400):
        if not engine.has_work():
            break
        if draw.random() < 0.2:
            name = f"{draw.randrange(6)}"
            if engine._scheduler.knows(name):
                cancelled.add(name)
                engine.cancel(name)
        world.collect(answers, engine.step())
    assert not engine.has_work() and set(answers) == {request.request_id for request in requests}
    for name, answer in answers.items():
        assert answer.finish == ("cancelled" if name in cancelled else "length")
        if name not in cancelled:
            assert len(answer.tokens) == 12
    assert engine.stats().blocks_free == engine.stats().blocks_total


def test_a_stop_token_is_the_last_that_is_sent(world: Any) -> None:
    prompt = world.prompt(3, 6)
    expected = world.greedy(prompt, 12)
    stop = expected[4]
    engine = overlapping(world.engine())
    ahead = watched(engine)
    request = world.request("a", prompt, max_tokens=12, stop_token_ids=(stop,))
    answer = world.run(engine, [request])["a"]
    assert answer.tokens == expected[: expected.index(stop) + 1] and answer.finish == "stop" and ahead[0] > 0


def test_choices_are_never_ahead(world: Any) -> None:
    engine = overlapping(world.engine())
    ahead = watched(engine)
    choices = ((5, 6, 7), (5, 9, 7))
    plain = world.run(world.engine(), [world.request("a", [3, 4], choices=choices, max_tokens=3)])["a"]
    answer = world.run(engine, [world.request("a", [3, 4], choices=choices, max_tokens=3)])["a"]
    assert answer.tokens == plain.tokens and ahead[0] == 0


def test_nothing_is_computed_beyond_the_context(world: Any) -> None:
    engine = overlapping(world.engine(max_context=16))
    ahead = watched(engine)
    prompt = world.prompt(3, 6)
    answer = world.run(engine, [world.request("a", prompt, max_tokens=50, ignore_eos=True)])["a"]
    assert len(answer.tokens) == 10 and answer.finish == "length" and ahead[0] > 5
    steps = engine.stats().steps
    assert steps == 10, "a step was computed for nobody"
