"""Adapters with tokenizers of their own, over HTTP: their words, their templates, their ends."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.adapters.resized import make_resized, save_tokenizer
from tests.fixtures import VOCABULARY, make_adapter
from tests.server.hosting import Hosted, hosted, own_cache

from lorikeet.model.tokenizer import Tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
BOTH = ["embed_tokens", "lm_head"]
TEMPLATE = "{% for m in messages %}<tool>{{ m.content }}{% endfor %}zebra"
GREEDY = {"temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def root(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tools`: added tokens and a template. `chatty`: the base's vocabulary, its answers end at <|user|>. `plain`."""
    base, root = checkpoint("llama"), tmp_path_factory.mktemp("adapters")
    make_resized(base, root / "tools", VOCABULARY + 3, loud=2.0, modules_to_save=BOTH)
    save_tokenizer(base, root / "tools", ["<tool>", "zebra"], eos_token="<|im_end|>")
    (root / "tools" / "chat_template.jinja").write_text(TEMPLATE)
    make_adapter(base, root / "chatty", seed=1)
    save_tokenizer(base, root / "chatty", eos_token="<|user|>")
    make_adapter(base, root / "plain", seed=2)
    return root


@pytest.fixture(scope="module")
def server(checkpoint: Callable[..., Path], root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosted]:
    with own_cache(tmp_path_factory.mktemp("cache")), hosted(checkpoint("llama"), root, max_context=128) as server:
        yield server


@pytest.fixture(scope="module")
def own(root: Path, checkpoint: Callable[..., Path]) -> Tokenizer:
    return Tokenizer(root / "tools", Tokenizer(checkpoint("llama")))


def ids(server: Hosted, model: str, prompt: str, max_tokens: int) -> list[int]:
    """What an answer is made of: the token ids behind its names."""
    settings = {"adapter_id": model, "details": True, "ignore_eos_token": True, "max_new_tokens": max_tokens}
    reply = server.post("/generate", {"inputs": prompt, "parameters": settings})
    assert reply.status_code == 200, reply.text
    return [token["id"] for token in reply.json()["details"]["tokens"]]


def test_tokenize_and_detokenize(server: Hosted, own: Tokenizer) -> None:
    text = "the <tool> zebra"
    reply = server.post("/tokenize", {"prompt": text, "model": "tools"}).json()
    assert reply["tokens"] == own.encode(text) and max(reply["tokens"]) == VOCABULARY + 1
    assert server.post("/detokenize", {"tokens": reply["tokens"], "model": "tools"}).json() == {"prompt": text}
    plain = server.post("/tokenize", {"prompt": text, "model": "plain"}).json()["tokens"]
    assert plain == server.post("/tokenize", {"prompt": text}).json()["tokens"] and max(plain) < VOCABULARY
    refused = server.post("/detokenize", {"tokens": [VOCABULARY], "model": "plain"})
    assert refused.status_code == 400 and f"this model has ids 0 to {VOCABULARY - 1}" in refused.text


def test_text_and_streams_are_its_own_words(server: Hosted, own: Tokenizer) -> None:
    fields = {"model": "tools", "prompt": "the <tool> fox", **GREEDY, "ignore_eos": True}
    tokens = ids(server, "tools", prompt=fields["prompt"], max_tokens=12)
    assert max(tokens) >= VOCABULARY, "the adapter generates none of its tokens"
    reply = server.complete(**fields)
    assert reply["choices"][0]["text"] == own.decode(tokens)
    assert reply["usage"]["prompt_tokens"] == len(own.encode("the <tool> fox"))
    chunks = server.stream("/v1/completions", {**fields, "stream": True})
    assert "".join(c["choices"][0]["text"] for c in chunks[:-1]) == own.decode(tokens)
    echoed = server.complete(**fields, echo=True, logprobs=2)["choices"][0]
    assert echoed["text"] == "the <tool> fox" + own.decode(tokens)
    assert "<tool>" in echoed["logprobs"]["tokens"]


def test_ids_beyond_the_base_are_for_who_has_them(server: Hosted) -> None:
    for model, status in (("tools", 200), ("plain", 400), (server.state.models.base.name, 400)):
        reply = server.post("/v1/completions", {"model": model, "prompt": [7, VOCABULARY + 2], "max_tokens": 1})
        assert reply.status_code == status, reply.text
    reply = server.post("/v1/completions", {"model": "tools", "prompt": [VOCABULARY + 3], "max_tokens": 1})
    assert reply.status_code == 400 and f"this model has ids 0 to {VOCABULARY + 2}" in reply.text


def test_the_template_in_its_folder(server: Hosted, own: Tokenizer) -> None:
    messages = [{"role": "user", "content": "fox"}]
    assert server.state.models.base.tokenizer.chat(messages) != own.chat(messages) == "<tool>foxzebra"
    chat = server.post("/v1/chat/completions", {"model": "tools", "messages": messages, **GREEDY}).json()
    plain = server.complete(model="tools", prompt=own.encode("<tool>foxzebra", False), **GREEDY)
    assert chat["choices"][0]["message"]["content"] == plain["choices"][0]["text"]
    assert chat["usage"] == plain["usage"] | {"prompt_tokens_details": chat["usage"]["prompt_tokens_details"]}


@pytest.mark.parametrize("model", ["tools", "chatty"])
def test_its_end_of_sequence_ends_its_answers_alone(server: Hosted, own: Tokenizer, root: Path, model: str) -> None:
    tokenizer = own if model == "tools" else Tokenizer(root / model, server.state.models.base.tokenizer)
    end = tokenizer.eos_id
    assert end == (VOCABULARY + 2 if model == "tools" else 3)
    for word in map(str, range(100)):
        tokens = ids(server, model, prompt=word, max_tokens=40)
        if end in tokens and not {0, 1} & set(tokens):
            break
    before = tokens[: tokens.index(end)]
    choice = server.complete(model=model, prompt=word, temperature=0, max_tokens=40)
    assert choice["choices"][0]["finish_reason"] == "stop"
    assert choice["choices"][0]["text"] == tokenizer.decode(before)
    assert choice["usage"]["completion_tokens"] == len(before) + 1


def test_guided_choices_in_its_words(server: Hosted) -> None:
    for model in ("tools", "plain"):
        fields = {"model": model, "prompt": "the", "guided_choice": ["<tool>zebra", "zebra<tool>"], "temperature": 0}
        answer = server.complete(**fields)
        assert answer["choices"][0]["text"] in ("<tool>zebra", "zebra<tool>")
        assert (answer["usage"]["completion_tokens"] == 2) == (model == "tools")


def test_at_the_same_time_each_as_alone(server: Hosted) -> None:
    models = ["tools", "plain", server.state.models.base.name, "chatty", "tools", "plain"]
    bodies = [
        {"model": model, "prompt": f"the <tool> {i}", "max_tokens": 24, "seed": i, "temperature": 1.5, "logprobs": 1}
        for i, model in enumerate(models)
    ]
    alone = [server.complete(**body)["choices"][0] for body in bodies]

    async def ask() -> list[Any]:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
            replies = await asyncio.gather(*(http.post("/v1/completions", json=body) for body in bodies))
        return [reply.json()["choices"][0] for reply in replies]

    for one, other in zip(alone, asyncio.run(ask()), strict=True):
        assert one["text"] == other["text"]


def test_merging_needs_one_tokenizer(server: Hosted, root: Path) -> None:
    def merge(*names: str) -> httpx.Response:
        merged = {"ids": list(names), "weights": [1.0] * len(names)}
        return server.post(
            "/generate", {"inputs": "the", "parameters": {"merged_adapters": merged, "max_new_tokens": 2}}
        )

    refused = merge("plain", "chatty")
    assert refused.status_code == 400 and "'plain' and 'chatty' have different tokenizers" in refused.text
    shutil.copytree(root / "chatty", root / "chatty-too")
    (root / "chatty-too" / "chat_template.jinja").write_text(server.state.models.base.tokenizer.chat_template or "")
    assert merge("chatty", "chatty-too").status_code == 200


def test_a_tokenizer_that_is_replaced_is_used(server: Hosted, root: Path, checkpoint: Callable[..., Path]) -> None:
    make_adapter(checkpoint("llama"), root / "changing", seed=5)
    asked = {"prompt": "the <tool>", "model": "changing"}
    before = server.post("/tokenize", asked).json()["tokens"]
    save_tokenizer(checkpoint("llama"), root / "changing", ["<tool>"])
    refused = server.post("/tokenize", asked)
    assert refused.status_code == 422 and "'<tool>' of its tokenizer has the id 320" in refused.text
    for name in os.listdir(root / "changing"):
        if not name.startswith("adapter_"):
            (root / "changing" / name).unlink()
    assert server.post("/tokenize", asked).json()["tokens"] == before
