"""Events to deltas: whatever way tokens arrive, the same text, tokens, counts and end."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorikeet.errors import InvalidRequestError, LorikeetError
from lorikeet.model.tokenizer import Tokenizer
from lorikeet.registry.records import Actor
from lorikeet.server.auth import Principal
from lorikeet.server.generation import Assembler, Completion, Job, check_length
from lorikeet.server.models import ServedModel
from lorikeet.types import ErrorInfo, Event, SamplingParams, TokenLogprob

LOCAL = Principal(Actor(tenant=""))


@pytest.fixture(scope="module")
def tokenizer(bare_model: Path) -> Tokenizer:
    return Tokenizer(bare_model)


def assemble(tokenizer: Tokenizer, events: list[Event], stop: tuple[str, ...] = (), **sampling: Any) -> Completion:
    model = ServedModel(name="base", tokenizer=tokenizer)
    job = Job(request_id="r", caller=LOCAL, model=model, tokens=[7], sampling=SamplingParams(**sampling), stop=stop)
    assembler, completion = Assembler(job), Completion()
    for event in events:
        completion.add(assembler.push(event))
        if completion.last.finish is not None:
            break
    return completion


def events_of(tokens: list[int], cuts: list[int], finish: Any = "length") -> list[Event]:
    bounds = sorted({0, len(tokens), *(cut % (len(tokens) + 1) for cut in cuts)})
    groups = [tokens[a:b] for a, b in zip(bounds, bounds[1:], strict=False)] or [[]]
    logprobs = [[TokenLogprob(token, -float(token)) for token in group] for group in groups]
    return [
        Event(request_id="r", tokens=group, logprobs=logprobs[i], finish=finish if i == len(groups) - 1 else None)
        for i, group in enumerate(groups)
    ]


TOKENS = st.lists(st.integers(2, 319), max_size=30)
CUTS = st.lists(st.integers(0, 1000), max_size=8)


@given(tokens=TOKENS, cuts=CUTS)
def test_text_is_the_decoded_tokens_however_they_come(tokenizer: Tokenizer, tokens: list[int], cuts: list[int]) -> None:
    completion = assemble(tokenizer, events_of(tokens, cuts))
    assert completion.text == tokenizer.decode(tokens)
    assert [token.id for token in completion.shown] == tokens == [token.id for token in completion.arrived]
    assert [token.logprob for token in completion.shown] == [-float(token) for token in tokens]
    assert completion.last.completion_tokens == len(tokens)
    for token in completion.shown:
        assert completion.text[token.start : token.start + len(token.text)] == token.text


@given(tokens=TOKENS.filter(bool), cuts=CUTS, data=st.data())
def test_a_stop_string_ends_text_and_tokens(tokenizer: Tokenizer, tokens: list[int], cuts: Any, data: Any) -> None:
    text = tokenizer.decode(tokens)
    at = data.draw(st.integers(0, max(len(text) - 1, 0)))
    stop = text[at : at + data.draw(st.integers(1, 4))]
    if not stop:
        return
    completion = assemble(tokenizer, events_of(tokens, cuts), stop=(stop, "never \x00 there"))
    assert completion.text == text[: text.index(stop)]
    assert completion.last.finish == "stop" and completion.last.stop_string == stop
    assert all(token.start < len(completion.text) for token in completion.shown)
    assert completion.last.completion_tokens == len(completion.arrived) <= len(tokens)
    assert stop in tokenizer.decode([token.id for token in completion.arrived]) or "\ufffd" in stop


def test_half_characters_and_possible_stops_are_held_back(tokenizer: Tokenizer) -> None:
    text = "a\N{BIRD}b stop"
    tokens = tokenizer.encode(text, add_special_tokens=False)
    random.seed(0)
    shown = [
        assemble(tokenizer, events_of(tokens[:n], [], finish=None), stop=("stop", "b s!")).text
        for n in range(len(tokens) + 1)
    ]
    assert all(text.startswith(part) and "\ufffd" not in part for part in shown)
    assert shown[-1] == "a\N{BIRD}b "


def test_an_end_of_sequence_is_counted_and_not_shown(tokenizer: Tokenizer) -> None:
    completion = assemble(tokenizer, events_of([40, 41, 1], [2], finish="stop"))
    assert completion.text == tokenizer.decode([40, 41]) and completion.last.ended_by_token
    assert [token.id for token in completion.shown] == [40, 41]
    assert [(token.id, token.special) for token in completion.arrived] == [(40, False), (41, False), (1, True)]
    assert completion.last.completion_tokens == 3
    chosen = assemble(tokenizer, events_of([40, 41], [], finish="stop"))  # a completed choice ends without one
    assert [token.id for token in chosen.shown] == [40, 41] and not chosen.last.ended_by_token


def test_errors_of_the_engine_are_raised(tokenizer: Tokenizer) -> None:
    error = ErrorInfo(code="overloaded", message="full", status=429, retryable=True, retry_after=2.0)
    with pytest.raises(LorikeetError, match="full") as raised:
        assemble(tokenizer, [Event(request_id="r", finish="error", error=error)])
    assert (raised.value.status, raised.value.retry_after) == (429, 2.0)


def test_lengths() -> None:
    check_length([1] * 10, 6, 16, "prompt", "max_tokens")
    check_length([1] * 16, 0, 16, "prompt", "max_tokens")
    check_length([1] * 15, None, 16, "prompt", "max_tokens")
    for tokens, limit in (([1] * 16, None), ([1] * 17, 0), ([1] * 10, 7)):
        with pytest.raises(InvalidRequestError, match=rf"{len(tokens)} tokens.*16") as error:
            check_length(tokens, limit, 16, "prompt", "max_tokens")
        assert error.value.code == "context_length_exceeded"
