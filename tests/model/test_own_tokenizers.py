"""Tokenizers in adapters' folders, saved by transformers, and what is the base's in them."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.fixtures import VOCABULARY

from lorikeet.errors import AdapterError
from lorikeet.model.tokenizer import RECENT, Tokenizer, Tokenizers

TEXT = "the quick <tool> fox <|im_end|> jumps"


def saved(base: Path, folder: Path, add: list[str] | None = None, **special: Any) -> Path:
    """The base's tokenizer with changes, as transformers saves it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(add or [])
    tokenizer.add_special_tokens(special)
    tokenizer.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def base(checkpoint: Callable[..., Path]) -> Tokenizer:
    return Tokenizer(checkpoint("llama"))


def test_added_tokens_are_those_of_transformers(base: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = saved(base.folder, tmp_path / "own", ["<tool>", "zebra"], eos_token="<|im_end|>")
    own = Tokenizers(lambda: base).of(folder)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert own is not None
    assert own.encode(TEXT) == theirs(TEXT)["input_ids"]
    assert VOCABULARY in own.encode(TEXT) and VOCABULARY not in base.encode(TEXT)
    assert own.decode(own.encode(TEXT)) == theirs.decode(theirs(TEXT)["input_ids"], skip_special_tokens=True)
    stream = own.stream()
    assert "".join(stream.push((token,)) for token in own.encode(TEXT)) + stream.finish() == own.decode(
        own.encode(TEXT)
    )
    assert own.largest_id == len(theirs) - 1
    assert own.eos_id == theirs.eos_token_id and own.stop_ids == tuple(sorted({*base.stop_ids, theirs.eos_token_id}))
    assert own.chat_template == base.chat_template
    assert own.sha256 != base.sha256 and not own.same_as(base)


def test_what_transformers_saves_unchanged_is_the_base(base: Tokenizer, tmp_path: Path) -> None:
    own = Tokenizers(lambda: base).of(saved(base.folder, tmp_path / "own"))
    assert own is not None and own.sha256 == base.sha256 and own.same_as(base)


def test_settings_beside_the_bases_vocabulary(base: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}{{ eos_token }}")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    for shares in (True, False):
        own = Tokenizers(lambda: base).of(tmp_path, shares_vocabulary=shares)
        assert own is not None
        assert (own._backend is base._backend) == shares
        assert own.chat([{"role": "user", "content": "hi"}]) == "hi</s>"
        assert own.stop_ids == tuple(sorted({*base.stop_ids, 7, 9}))
        assert own.encode(TEXT) == base.encode(TEXT) and own.sha256 == base.sha256 and not own.same_as(base)


def test_tokens_that_only_the_config_names_are_added_to_the_bases(base: Tokenizer, tmp_path: Path) -> None:
    folder = saved(base.folder, tmp_path / "own", ["<tool>"])
    whole = Tokenizers(lambda: base).of(folder)
    (folder / "tokenizer.json").unlink()
    own = Tokenizers(lambda: base).of(folder)
    assert own is not None and whole is not None
    assert own.encode(TEXT) == whole.encode(TEXT) and base.encode(TEXT) != own.encode(TEXT)


def test_a_folder_without_one_has_the_bases(base: Tokenizer, tmp_path: Path) -> None:
    def never() -> Tokenizer:
        raise AssertionError("the base was loaded")

    assert Tokenizers(never).of(tmp_path) is None


def test_the_same_files_are_one_tokenizer_while_it_is_used(base: Tokenizer, tmp_path: Path) -> None:
    tokenizers = Tokenizers(lambda: base)
    first, second = (saved(base.folder, tmp_path / name, ["<tool>"]) for name in "ab")
    one = tokenizers.of(first)
    assert one is tokenizers.of(second) is not None
    for i in range(RECENT + 2):
        tokenizers.of(saved(base.folder, tmp_path / f"other-{i}", [f"<{i}>"]))
    assert tokenizers.of(first) is one
    del one
    tokenizers._recent.clear()
    gc.collect()
    assert len(tokenizers._known) == 0


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", r"tokenizer\.json: not a readable tokenizer"),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json: expected a JSON object, found list"),
        ("tokenizer_config.json", '{"eos_token": "<nowhere>"}', "eos_token '<nowhere>' is not in the vocabulary"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"7": {"content": "<new>"}}}', "'<new>' expected at id 7"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "its tokenizer cannot be read: ValueError"),
        ("tokenizer_config.json", '{"chat_template": [{}]}', "its tokenizer cannot be read: KeyError"),
        ("generation_config.json", '{"eos_token_id": "7"}', "eos_token_id: expected a token id or a list of them"),
    ],
)
def test_broken_files_are_the_adapters_fault(
    name: str, content: str, message: str, base: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(AdapterError, match=message) as caught:
        Tokenizers(lambda: base).of(tmp_path)
    assert caught.value.status == 422
