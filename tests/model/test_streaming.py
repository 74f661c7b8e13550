"""Streams of tokens become the same text as the whole, in stable pieces; stop strings do not depend on the cuts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fixtures import make_tokenizer
from tokenizers import decoders, models, normalizers

from lorikeet.model.streaming import StopMatcher, StreamDecoder
from lorikeet.model.tokenizer import Tokenizer


def sentencepiece(folder: Path) -> Path:
    """A tokenizer of the Llama 2 kind: `▁` for spaces, byte tokens for what the vocabulary lacks."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdeü", "▁a", "ab", "▁▁"]
    merges = [("▁", "a"), ("a", "b"), ("▁", "▁")]
    backend = tokenizers.Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def tokenizer_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return {
        "byte-level": Tokenizer(make_tokenizer(tmp_path_factory.mktemp("bytes"))),
        "sentencepiece": Tokenizer(sentencepiece(tmp_path_factory.mktemp("pieces"))),
    }


def cut(values: Sequence[int], cuts: list[int]) -> list[Sequence[int]]:
    bounds = sorted({0, len(values), *(c % (len(values) + 1) for c in cuts)})
    return [values[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
@settings(max_examples=300, deadline=None)
@given(
    ids=st.lists(st.integers(0, 330), max_size=40),
    cuts=st.lists(st.integers(0, 100), max_size=10),
    skip=st.booleans(),
)
def test_any_ids_in_any_pieces_make_the_whole(
    kind: str, ids: list[int], cuts: list[int], skip: bool, tokenizer_of: dict[str, Tokenizer]
) -> None:
    tokenizer = tokenizer_of[kind]
    stream = tokenizer.stream(skip_special_tokens=skip)
    text = "".join(stream.push(part) for part in cut(ids, cuts)) + stream.finish()
    assert text == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_no_piece_holds_half_a_character(kind: str, text: str, tokenizer_of: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizer_of[kind]
    stream = tokenizer.stream()
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = [stream.push([token]) for token in ids] + [stream.finish()]
    assert "".join(pieces) == tokenizer.decode(ids)
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


def test_incomplete_characters_wait_and_end_as_one_mark(tokenizer_of: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizer_of["byte-level"]
    ids = tokenizer.encode("a🦜", add_special_tokens=False)
    stream = tokenizer.stream()
    assert [stream.push([token]) for token in ids[:-1]] == ["a", "", "", ""]
    assert stream.finish() == "\ufffd"


def test_the_work_of_a_token_does_not_grow(tokenizer_of: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of["sentencepiece"]
    ids = tokenizer.encode("a ab é b " * 200, add_special_tokens=False)
    seen: list[int] = []
    decode = tokenizer.decode

    def counted(ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        seen.append(len(ids))
        return decode(ids, skip_special_tokens)

    monkeypatch.setattr(tokenizer, "decode", counted)
    StreamDecoder(tokenizer).push(ids)
    assert max(seen) <= 5 and len(seen) <= 2 * len(ids)


LETTERS = st.text("ab", min_size=1, max_size=4)


@settings(max_examples=500, deadline=None)
@given(
    text=st.text("abc", max_size=30),
    stops=st.lists(LETTERS, max_size=3),
    cuts=st.lists(st.integers(0, 100), max_size=10),
)
def test_stops_do_not_depend_on_the_cuts(text: str, stops: list[str], cuts: list[int]) -> None:
    matcher = StopMatcher(stops)
    shown = ""
    for part in cut(list(range(len(text))), cuts):
        shown += matcher.push("".join(text[i] for i in part))
        assert text.startswith(shown)
    shown += matcher.finish()
    # the oracle: the shortest beginning of the text that ends with a stop string
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            assert (shown, matcher.matched) == (text[: end - len(longest)], longest)
            return
    assert (shown, matcher.matched) == (text, None)


def test_only_what_may_become_a_stop_is_held_back() -> None:
    matcher = StopMatcher(["\n\nUser:", "END"])
    assert matcher.push("hello\n") == "hello"
    assert matcher.push("world E") == "\nworld "
    assert matcher.push("N") == ""
    assert matcher.push("emo END rest") == "ENemo "
    assert matcher.matched == "END"


def test_nothing_is_shown_after_a_match() -> None:
    matcher = StopMatcher(["stop"])
    assert matcher.push("a st") == "a "
    assert matcher.push("op and more") == ""
    assert matcher.push("later") == "" and matcher.finish() == "" and matcher.matched == "stop"


def test_without_stops_everything_passes() -> None:
    matcher = StopMatcher([""])
    assert matcher.push("abc") == "abc" and matcher.finish() == "" and matcher.matched is None
