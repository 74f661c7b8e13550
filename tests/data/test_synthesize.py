import json
import re
import sqlite3
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorikeet.data.synthesize import FAMILIES, documents
from lorikeet.data.synthesize.commands import commands
from lorikeet.data.synthesize.grammar import Writer
from lorikeet.data.synthesize.lexicon import lexicon, topics
from lorikeet.data.synthesize.sql import text_to_sql


def take(count: int, seed: int = 0, families: dict[str, float] | None = None) -> list[str]:
    return list(islice(documents(seed, families), count))


def test_same_seed_same_stream() -> None:
    assert take(300, seed=7) == take(300, seed=7)
    assert take(300, seed=7) != take(300, seed=8)


def test_streams_do_not_disturb_each_other() -> None:
    first, second = documents(1), documents(2)
    mixed = [(next(first), next(second)) for _ in range(50)]
    assert [a for a, _ in mixed] == take(50, seed=1)
    assert [b for _, b in mixed] == take(50, seed=2)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_family_within_bounds_and_varied(family: str) -> None:
    texts = take(800, families={family: 1.0})
    assert all(50 <= len(text) <= 2000 for text in texts)
    assert len(set(texts)) >= 0.99 * len(texts)
    for text in texts:
        assert not re.search(r"\{=?\w+(:\w+)?\}", text.replace("{}", "")), f"unexpanded slot in {text!r}"
        assert text.count("<|user|>") == text.count("<|assistant|>") == text.count("<|end|>")


def test_few_duplicates_in_the_mix() -> None:
    texts = take(12_000, seed=3)
    assert 1 - len(set(texts)) / len(texts) < 0.005


def test_weights_decide_the_share() -> None:
    texts = take(2000, families={"sums": 1.0, "sql": 3.0})
    queries = sum("select " in text.lower() for text in texts)
    assert 0.70 < queries / len(texts) < 0.80


@pytest.mark.parametrize("families", [{"poetry": 1.0}, {}, {"sql": 0.0}, {"sql": -1.0, "sums": 2.0}])
def test_wrong_families_are_refused(families: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="families"):
        documents(0, families)


def test_calls_are_json() -> None:
    seen = 0
    for text in take(600, families={"function_calls": 1.0}):
        for answer in re.findall(r"<\|assistant\|>\n(\{.*?\})<\|end\|>", text, re.DOTALL):
            call = json.loads(answer)
            assert len(call) == 2
            question = text.split("<|assistant|>")[0]
            arguments = next(value for value in call.values() if isinstance(value, dict))
            assert all(str(value) in question for value in arguments.values())
            seen += 1
    assert seen > 200


def test_json_lines_parse() -> None:
    seen = 0
    for text in take(800, families={"tables": 1.0}):
        for line in text.splitlines():
            if line.startswith('{"') and line.endswith("}"):
                json.loads(line)
                seen += 1
    assert seen > 200


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32))
def test_queries_run_on_their_schema(seed: int) -> None:
    writer = Writer(seed, lexicon())
    text = text_to_sql(writer)
    creates = re.findall(r"CREATE TABLE .*?\);", text)
    queries = re.findall(r"(?:SELECT|select) .*?(?=\"\}|<|;|\n|$)", text.replace("<|end|>", "\n").replace("</", "\n"))
    assert queries, text
    if not creates:
        return
    database = sqlite3.connect(":memory:")
    for create in creates:
        database.execute(create)
    for query in queries:
        if " < " not in text:
            database.execute(query)
    database.close()


def test_every_template_expands() -> None:
    writer = Writer(0, lexicon())
    for topic in topics():
        for template in (*topic.gists, *topic.asks, *topic.answers):
            assert writer.say(template)
    for group in commands().values():
        for command in group:
            for pattern in command.patterns:
                assert writer.say(pattern)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab ()[]|{}", max_size=12))
def test_templates_expand_or_are_refused(template: str) -> None:
    try:
        text = Writer(0, {"a": lambda w: "x", "b": lambda w: "y"}).say(template)
    except ValueError:
        return
    assert not set(text) & set("()[]|{}")


def test_writer_grammar() -> None:
    writer = Writer(4, {"name": lambda w: w.pick(["Ada", "Alan"])})
    assert writer.say("{who:name} met {=who}") in {"Ada met Ada", "Alan met Alan"}
    assert {writer.say("(a|b[c])") for _ in range(60)} == {"a", "b", "bc"}
    assert writer.sentence("a apple [ ]") == "An apple."
    with pytest.raises(ValueError, match="unknown to the lexicon"):
        writer.say("{nobody}")
