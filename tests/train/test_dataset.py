"""Rows -> tokens as the server will send them, and the audit: each finding shown, by line."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tests.fixtures import make_tokenizer
from tests.train.small import resolved

from lorikeet.config import EarlyStopping, Message, TrainData
from lorikeet.errors import ConfigError, DataError
from lorikeet.model.tokenizer import Tokenizer
from lorikeet.train.audit import AdapterData, Audit, prepare, print_report, require_clean
from lorikeet.train.dataset import Example, Renderer, length_limit, split_validation, truncate_prompt


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(make_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def run(
    tmp_path: Path, tokenizer: Tokenizer, *rows: Any, test: list[Any] | None = None, context: int = 256, **recipe: Any
) -> tuple[AdapterData, Audit]:
    data: dict[str, Any] = {"train": str(write(tmp_path / "train.jsonl", *rows)), **recipe.pop("data", {})}
    if test is not None:
        data["test"] = str(write(tmp_path / "test.jsonl", *test))
    shared = {"prompt": "Q: {a}\nA:", "completion": " {b}", "data": TrainData(**data)}
    return prepare(resolved("intent", **{**shared, **recipe}), tokenizer, context, tmp_path)


def row(a: str, b: str) -> dict[str, str]:
    return {"a": a, "b": b}


CHAT = [Message(role="user", content="{a}"), Message(role="assistant", content="{b}")]


def test_prompt_and_completion_are_what_serving_sends(tmp_path: Path, tokenizer: Tokenizer) -> None:
    data, audit = run(tmp_path, tokenizer, row("the fox", "jumps over"), row("dog", "lazy"))
    example = data.train[0]
    ((start, stop),) = example.learned
    assert example.tokens[:start] == tokenizer.encode("Q: the fox\nA:")
    assert example.tokens[start:-1] == tokenizer.encode(" jumps over", add_special_tokens=False)
    assert example.tokens[-1] == tokenizer.eos_id and stop == len(example.tokens)
    assert (data.template_kind, data.template_text) == ("prompt", "Q: {a}\nA:")
    assert audit.errors == audit.warnings == []
    assert audit.learned_tokens == sum(e.learned_tokens for e in data.train)


def test_chat_learns_every_assistant_turn(tmp_path: Path, tokenizer: Tokenizer) -> None:
    messages = [
        Message(role="system", content="be brief"),
        *CHAT,
        Message(role="user", content="and {a} {{}}?"),
        Message(role="assistant", content="no {b}"),
    ]
    # the fixture's template ends a turn with <|end|>, which is no stop id of it: say that it is
    tokenizer = stopping_at_end(tokenizer)
    data, _ = run(tmp_path, tokenizer, row("fox", "dog"), prompt=None, completion=None, messages=messages)
    (example,) = data.train
    first, second = example.learned
    served = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "fox"}]
    assert example.tokens[: first[0]] == tokenizer.encode(tokenizer.chat(served), add_special_tokens=False)
    assert tokenizer.decode(example.tokens[slice(*first)], skip_special_tokens=False) == "dog<|end|>"
    assert tokenizer.decode(example.tokens[slice(*second)], skip_special_tokens=False) == "no dog<|end|>"
    served += [{"role": "assistant", "content": "dog"}, {"role": "user", "content": "and fox {}?"}]
    assert example.tokens[: second[0]] == tokenizer.encode(tokenizer.chat(served), add_special_tokens=False)
    assert data.template_kind == "chat" and "<|end|>" in data.template_text


def stopping_at_end(tokenizer: Tokenizer) -> Tokenizer:
    other = Tokenizer(tokenizer.folder)
    (end,) = other.encode("<|end|>", add_special_tokens=False)
    assert other.eos_id is not None
    other.stop_ids = (other.eos_id, end)
    return other


def test_turns_that_the_server_would_tokenise_otherwise_stand_alone(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A template that drops earlier answers: one example a turn, each with the prompt the server would send."""
    tokenizer = stopping_at_end(tokenizer)
    tokenizer.templates["default"] = (
        "{% for m in messages %}{% if loop.last or m.role == 'user' %}<|{{ m.role }}|>{{ m.content }}<|end|>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    data, _ = run(tmp_path, tokenizer, row("fox", "dog"), prompt=None, completion=None, messages=CHAT + CHAT)
    texts = [tokenizer.decode(e.tokens, skip_special_tokens=False) for e in data.train]
    assert texts == [
        "<|user|>fox<|end|><|assistant|>dog<|end|>",
        "<|user|>fox<|end|><|user|>fox<|end|><|assistant|>dog<|end|>",
    ]


def test_missing_end_of_turn(tmp_path: Path, tokenizer: Tokenizer) -> None:
    _, audit = run(tmp_path, tokenizer, row("fox", "dog"), prompt=None, completion=None, messages=CHAT)
    assert audit.unended == [1]
    assert "no end-of-turn token" in audit.errors[0] and "line 1" in audit.errors[0]


def test_rows_that_cannot_teach(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [row("x", "y"), row("z", ""), row("z", "  ")]
    data, audit = run(tmp_path, tokenizer, *rows)
    assert audit.unteachable == [2, 3] and len(data.train) == 1
    with pytest.raises(
        DataError, match=r"intent: 2 rows with no token to learn from \(.*lines 2, 3\).*unteachable: drop"
    ):
        require_clean([audit])
    _, audit = run(tmp_path, tokenizer, *rows, unteachable="drop")
    assert audit.errors == [] and audit.dropped == 2 and "dropped" in audit.warnings[0]


def test_broken_rows_name_file_and_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [row("x", "y"), "{", {"a": "only"}, {"a": None, "b": "c"}, {"a": ["l"], "b": "c"}]
    _, audit = run(tmp_path, tokenizer, *rows, test=[row("p", "q"), "nope"])
    message = "\n".join(audit.errors)
    assert "train.jsonl:2: not JSON" in message and "train.jsonl:3: intent.completion: column 'b'" in message
    assert "train.jsonl:4: intent.prompt: column 'a' holds NoneType" in message
    assert "train.jsonl:5: intent.prompt: column 'a' holds list" in message and "test.jsonl:2: not JSON" in message


def test_unknown_column_is_refused_with_those_there_are(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"'text', which no row of .*columns there: 'a', 'b'"):
        run(tmp_path, tokenizer, row("x", "y"), prompt="{text}")


def test_too_long(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [row("x", "y"), row("x " * 30, "y"), row("x", "y " * 40)]
    data, audit = run(tmp_path, tokenizer, *rows, max_length=40)
    assert audit.too_long == [2, 3] and audit.would_cut == [3] and "too_long: drop" in audit.errors[0]
    data, audit = run(tmp_path, tokenizer, *rows, max_length=40, too_long="drop")
    assert audit.errors == [] and audit.dropped == 2 and [e.line for e in data.train] == [1]
    data, audit = run(tmp_path, tokenizer, *rows, max_length=40, too_long="truncate_prompt")
    assert audit.truncated == 1 and "1 completions would be cut by the limit of 40" in audit.errors[0]
    cut = data.train[1]
    whole = tokenizer.encode("Q: " + "x " * 30 + "\nA:")
    ((start, stop),) = cut.learned
    assert len(cut.tokens) == 40 == stop and cut.tokens[:start] == whole[-start:]
    assert cut.tokens[start:] == data.train[0].tokens[slice(*data.train[0].learned[0])]


def test_length_limit() -> None:
    assert length_limit("longest", [3, 9, 5], 100) == 9 and length_limit("longest", [300], 100) == 100
    assert length_limit("p50", [1, 2, 3, 4], 100) == 3 and length_limit(50, [3], 100) == 50
    with pytest.raises(ConfigError, match="found 200; the base's context is 100"):
        length_limit(200, [3], 100)


@settings(deadline=None)
@given(st.integers(2, 12), st.integers(1, 6), st.integers(2, 20), st.booleans())
def test_truncation_never_touches_what_is_learned(prompt: int, learned: int, limit: int, keep: bool) -> None:
    tokens = list(range(prompt + learned))
    example = Example(1, tokens, ((prompt, prompt + learned),), "", "")
    if len(tokens) <= limit:
        return
    cut = truncate_prompt(example, limit, keep)
    if cut is None:
        assert learned + 1 + keep > limit
        return
    (a, b) = cut.learned[0]
    assert len(cut.tokens) == limit and cut.tokens[a:b] == tokens[prompt:] and a >= 1 + keep
    assert not keep or cut.tokens[0] == 0


def test_duplicates_and_leaks_and_labels(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [row("x", "one"), row("y", "two"), row("x", "one"), row("x", "two"), row("z", "one"), row("w", "two")]
    _, audit = run(tmp_path, tokenizer, *rows, test=[row("q", "one"), row("z", "two")])
    assert audit.repeated == [(3, 1)] and audit.contradictory == 1 and audit.leaked == [(5, 2)]
    assert audit.labels == {"one": 3, "two": 3} and audit.errors == []
    notes = "\n".join(audit.warnings)
    assert "5 = test 2" in notes and "3 = 1" in notes and "1 prompts have several" in notes


def test_validation(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [row(str(i), "y") for i in range(20)]
    data, audit = run(tmp_path, tokenizer, *rows, data={"validation": 0.25})
    assert (audit.train, audit.validation) == (15, 5)
    assert sorted(e.line for e in data.train + data.validation) == list(range(1, 21))
    again, _ = run(tmp_path, tokenizer, *rows, data={"validation": 0.25})
    assert again.validation == data.validation
    other, _ = run(tmp_path, tokenizer, *rows, data={"validation": 0.25}, seed=1)
    assert other.validation != data.validation
    path = str(write(tmp_path / "v.jsonl", row("v", "w")))
    data, audit = run(tmp_path, tokenizer, *rows, data={"validation": path})
    assert (audit.train, audit.validation) == (20, 1)
    with pytest.raises(ConfigError, match="needs validation rows"):
        run(tmp_path, tokenizer, *rows, early_stopping=EarlyStopping())
    with pytest.raises(ConfigError, match="expected a share below 1"):
        split_validation(data.train, 1.5, 0)


def test_templates_that_cannot_work(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="expected assistant"):
        Renderer(resolved(prompt=None, completion=None, messages=CHAT[:1]), tokenizer)
    bare = Tokenizer(tokenizer.folder)
    bare.templates.clear()
    with pytest.raises(ConfigError, match="no chat template"):
        Renderer(resolved(prompt=None, completion=None, messages=CHAT), bare)
    bare.templates["default"] = "{% if add_generation_prompt %}x{% endif %}{{ messages[0].content }}"
    with pytest.raises(ConfigError, match=r"not the beginning of the conversation with it \(line 1\)"):
        run(tmp_path, bare, row("x", "y"), prompt=None, completion=None, messages=CHAT)
    bare.eos_id, bare.stop_ids = None, ()
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        Renderer(resolved(), bare)


def test_nothing_left(tmp_path: Path, tokenizer: Tokenizer) -> None:
    _, audit = run(tmp_path, tokenizer, row("x", ""), unteachable="drop")
    assert "no row is left to train on" in audit.errors[0]


def test_report_shows_everything(tmp_path: Path, tokenizer: Tokenizer) -> None:
    out = StringIO()
    _, audit = run(tmp_path, tokenizer, row("x", "[one]"), row("x", "[one]"), row("y", ""), "{", test=[row("x", "z")])
    print_report([audit], Console(file=out, width=160))
    text = out.getvalue()
    for part in (
        "intent",
        "1 labels x 2",
        "broken rows",
        "train.jsonl:4",
        "no token to learn",
        "test 1",
        "2 = 1",
    ):
        assert part in text, text
