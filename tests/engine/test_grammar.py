"""Choices: every path through the trie is a choice, and every choice is a path."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorikeet.engine.grammar import Choices

STOP = 9


@given(st.sets(st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple), min_size=1, max_size=8), st.data())
def test_paths_are_choices(choices: set[tuple[int, ...]], data: st.DataObject) -> None:
    state = Choices(choices, [STOP])
    said: list[int] = []
    while not state.done:
        allowed = state.allowed()
        expected = {c[len(said)] for c in choices if list(c[: len(said)]) == said and len(c) > len(said)}
        if tuple(said) in choices:
            assert state.complete
            expected.add(STOP)
        assert allowed == sorted(expected)
        if data.draw(st.booleans()):
            said += state.forced()
        if not state.done:
            token = data.draw(st.sampled_from(state.allowed()))
            state.advance(token)
            said.append(token)
    assert tuple(token for token in said if token != STOP) in choices
    assert state.allowed() == []


@given(st.sets(st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple), min_size=1, max_size=8), st.data())
def test_choices_are_paths(choices: set[tuple[int, ...]], data: st.DataObject) -> None:
    wanted = data.draw(st.sampled_from(sorted(choices)))
    state = Choices(choices, [STOP])
    for token in wanted:
        state.advance(token)
    assert state.complete
    if not state.done:
        state.advance(STOP)
    assert state.done


def test_what_is_not_allowed_is_refused() -> None:
    state = Choices([(1, 2), (1, 3, 4)], [STOP])
    for token in (2, STOP):
        with pytest.raises(ValueError, match="allowed are \\[1\\]"):
            state.advance(token)
    assert state.forced() == [1]
    state.advance(3)
    assert state.forced() == [4]
    assert state.done
    with pytest.raises(ValueError, match="not allowed"):
        state.advance(STOP)
