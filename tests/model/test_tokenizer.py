"""Tokenizer and chat templates against transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.fixtures import make_tokenizer

from lorikeet.errors import InvalidRequestError, ModelError
from lorikeet.model.tokenizer import Tokenizer

TEXTS = ["the quick brown fox", " leading and  double spaces ", "naïve 日本語 🦜🦜 \n\ttabs", "<|user|>hi<|end|>", ""]
MESSAGES = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "Grüße"},
    {"role": "assistant", "content": " Hallo! "},
    {"role": "user", "content": "And?"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def changed(folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the tokenizer with other fields in tokenizer_config.json."""

    def change(**fields: Any) -> Path:
        copy = Path(shutil.copytree(folder, tmp_path / "changed", dirs_exist_ok=True))
        config = json.loads((copy / "tokenizer_config.json").read_text())
        (copy / "tokenizer_config.json").write_text(json.dumps(config | fields))
        return copy

    return change


def theirs(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_encode_and_decode_are_those_of_transformers(folder: Path) -> None:
    ours, other = Tokenizer(folder), theirs(folder)
    assert ours.encode_batch(TEXTS) == [ours.encode(text) for text in TEXTS]
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == other.encode(text)
        for skip in (True, False):
            assert ours.decode(ids, skip) == other.decode(ids, skip_special_tokens=skip)
        assert "".join(ours.token_bytes(token).decode("latin-1") for token in ids) == text.encode().decode("latin-1")
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (0, 1, len(other))
    assert ours.token_text(ours.encode("the")[0]).startswith("t")
    assert ours.piece(10**6) is None and ours.token_text(10**6) == ""


def test_spaces_before_punctuation_survive(changed: Callable[..., Path]) -> None:
    tokenizer = Tokenizer(changed(clean_up_tokenization_spaces=True))
    assert tokenizer.decode(tokenizer.encode("what ? don 't !")) == "what ? don 't !"


def test_truncation_and_padding_of_the_file_do_not_apply(folder: Path, tmp_path: Path) -> None:
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(tmp_path).encode(TEXTS[0]) == Tokenizer(folder).encode(TEXTS[0])
    assert Tokenizer(tmp_path).sha256 == Tokenizer(folder).sha256


def test_the_hash_follows_the_vocabulary_alone(folder: Path, changed: Callable[..., Path]) -> None:
    assert Tokenizer(changed(chat_template="other", model_max_length=7)).sha256 == Tokenizer(folder).sha256
    more = changed(added_tokens_decoder={"320": {"content": "<|tool|>", "special": True}})
    assert Tokenizer(more).sha256 != Tokenizer(folder).sha256


def test_tokens_that_only_the_config_knows(changed: Callable[..., Path]) -> None:
    more = changed(added_tokens_decoder={"320": {"content": "<|tool|>", "special": True}})
    tokenizer = Tokenizer(more)
    assert tokenizer.encode("<|tool|>") == [320] == theirs(more).encode("<|tool|>")
    assert tokenizer.decode([320]) == "" and tokenizer.decode([320], False) == "<|tool|>"
    with pytest.raises(ModelError, match=r"added_tokens_decoder: '<\|tool\|>' expected at id 400, found at 320"):
        Tokenizer(changed(added_tokens_decoder={"400": {"content": "<|tool|>", "special": True}}))


@pytest.mark.parametrize(
    "fields", [{}, {"add_bos_token": False}, {"add_bos_token": True, "add_eos_token": True}, {"add_eos_token": False}]
)
def test_llama_tokenizers_add_bos_and_eos_as_configured(fields: dict[str, Any], changed: Callable[..., Path]) -> None:
    folder = changed(tokenizer_class="LlamaTokenizerFast", **fields)
    ours, other = Tokenizer(folder), theirs(folder)
    assert ours.encode("fox") == other.encode("fox")
    assert ours.encode("fox", add_special_tokens=False) == other.encode("fox", add_special_tokens=False)


def test_stop_ids_come_from_every_file(folder: Path, changed: Callable[..., Path]) -> None:
    assert Tokenizer(folder).stop_ids == (1,)
    copy = changed(eos_token={"content": "<|end|>"})
    (copy / "config.json").write_text(json.dumps({"eos_token_id": 1}))
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [4, 1]}))
    assert Tokenizer(copy).stop_ids == (1, 4, 5)


def test_a_tokenizer_of_the_older_kind_is_converted(folder: Path, tmp_path: Path) -> None:
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>"})
    )
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.byte_level and tokenizer.eos_id == 1
    for text in TEXTS[:3]:
        assert tokenizer.encode(text) == Tokenizer(folder).encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_what_cannot_be_loaded(tmp_path: Path, changed: Callable[..., Path]) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        Tokenizer(tmp_path)
    with pytest.raises(ModelError, match="eos_token '<nope>' is not in the vocabulary"):
        Tokenizer(changed(eos_token="<nope>"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="not a readable tokenizer"):
        Tokenizer(tmp_path)


CHATML = (
    "{%- for m in messages %}\n    {%- if m.role == 'system' and not loop.first %}\n"
    "        {{- raise_exception('system must come first') }}\n    {%- endif %}\n"
    "{{- '<|im_start|>' + m.role + '\\n' + m.content | trim + '<|im_end|>\\n' }}\n{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}{% for m in rest %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}{% elif m['role'] == 'assistant' %}"
    "{% generation %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
TOOLS = (
    "{% for tool in tools or [] %}{{ tool | tojson(indent=2) }}\n{% endfor %}"
    "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}"
    "{% if enable_thinking is defined and enable_thinking %}<think>{% endif %}"
)


@pytest.mark.parametrize("template", [None, CHATML, LLAMA2, TOOLS])
@pytest.mark.parametrize("generation", [True, False])
def test_templates_render_as_in_transformers(template: str | None, generation: bool, folder: Path) -> None:
    tools = [{"type": "function", "function": {"name": "größe", "parameters": {"a": "<b>"}}}]
    ours = Tokenizer(folder).chat(
        MESSAGES, template, add_generation_prompt=generation, tools=tools, enable_thinking=True
    )
    expected = theirs(folder).apply_chat_template(
        MESSAGES,
        chat_template=template,
        add_generation_prompt=generation,
        tools=tools,
        enable_thinking=True,
        tokenize=False,
    )
    assert ours == expected


def test_today_is_known_to_templates(folder: Path) -> None:
    assert len(Tokenizer(folder).chat(MESSAGES, "{{ strftime_now('%Y') }}")) == 4


@pytest.mark.parametrize(
    ("template", "message", "param"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must alternate", "messages"),
        ("{{ messages[9].content.x }}", "refuses these messages: .*no (element|attribute)|undefined", "messages"),
        ("{{ messages[0].content + 1 }}", "refuses these messages: can only concatenate", "messages"),
        ("{{ ''.__class__.__mro__ }}", "refuses these messages: .*unsafe", "messages"),
        ("{% for x in range(10000000) %}{% endfor %}", "refuses these messages: Range too big", "messages"),
        ("{% set _ = messages.append(1) %}", "refuses these messages: .*unsafe|not safely callable", "messages"),
        ("{% if %}", "not valid, line 1", "chat_template"),
    ],
)
def test_templates_that_fail_are_the_callers_error(template: str, message: str, param: str, folder: Path) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        Tokenizer(folder).chat(MESSAGES, template)
    assert caught.value.status == 400 and caught.value.param == param


def test_where_templates_come_from(changed: Callable[..., Path]) -> None:
    both = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    copy = changed(chat_template=both)
    assert Tokenizer(copy).chat(MESSAGES) == "plain"
    assert Tokenizer(copy).chat(MESSAGES, tools=[{}]) == "tools"
    (copy / "chat_template.jinja").write_text("file {{ bos_token }}")
    assert Tokenizer(copy).chat(MESSAGES) == "file <s>"
    without = changed(chat_template=None)
    (without / "chat_template.jinja").unlink()
    with pytest.raises(InvalidRequestError, match="has no chat template"):
        Tokenizer(without).chat(MESSAGES)
