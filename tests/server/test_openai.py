"""The OpenAI routes over the real engine: forms of prompts and answers, and the published client unmodified."""

from __future__ import annotations

import math
from typing import Any

import openai
import pytest
from tests.server.hosting import Hosted

PROMPT = "the quick brown fox"


@pytest.fixture(scope="module")
def client(live: Hosted) -> Any:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models(live: Hosted, client: Any) -> None:
    models = {model["id"]: model for model in live.http.get("/v1/models").json()["data"]}
    assert list(models)[0] == "llama" and {f"adapter-0{i}" for i in range(4)} <= set(models)
    assert models["adapter-00"]["parent"] == "llama" and models["adapter-00"]["lock"] == "unlocked"
    assert models["llama"]["parent"] is None and models["llama"]["max_model_len"] == 128
    assert client.models.retrieve("adapter-01").id == "adapter-01"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_forms_of_prompts(live: Hosted) -> None:
    ids = live.post("/tokenize", {"prompt": PROMPT}).json()["tokens"]
    other = live.post("/tokenize", {"prompt": "the lazy dog"}).json()["tokens"]
    fields = {"max_tokens": 6, "temperature": 0}
    text = live.complete(prompt=PROMPT, **fields)
    assert text["object"] == "text_completion" and text["usage"]["completion_tokens"] == 6
    assert live.complete(prompt=ids, **fields)["choices"] == text["choices"]
    both = live.complete(prompt=[PROMPT, "the lazy dog"], **fields)
    assert both["choices"] == live.complete(prompt=[ids, other], **fields)["choices"]
    assert [choice["index"] for choice in both["choices"]] == [0, 1]
    assert both["choices"][0]["text"] == text["choices"][0]["text"]
    assert both["usage"]["prompt_tokens"] == len(ids) + len(other)
    assert live.complete(prompt=PROMPT)["usage"]["completion_tokens"] <= 16


def test_an_adapter_changes_the_answer(live: Hosted) -> None:
    answers = {
        name: live.complete(model=name, prompt=PROMPT, max_tokens=8, temperature=0)["choices"][0]["text"]
        for name in ("llama", "adapter-00", "adapter-01")
    }
    assert len(set(answers.values())) == 3


def test_echo_and_logprobs(live: Hosted) -> None:
    ids = live.post("/tokenize", {"prompt": PROMPT}).json()["tokens"]
    fields = {"prompt": PROMPT, "max_tokens": 3, "temperature": 0, "echo": True, "logprobs": 2}
    choice = live.complete(**fields)["choices"][0]
    logprobs = choice["logprobs"]
    assert choice["text"].startswith(PROMPT)
    assert len(logprobs["tokens"]) == len(ids) + 3 == len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"])
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    assert all(value < 0 for value in logprobs["token_logprobs"][1:])
    assert all(2 <= len(top) <= 3 for top in logprobs["top_logprobs"][1:])
    for value, top in list(zip(logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True))[len(ids) :]:
        assert value == max(top.values())  # greedy
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert token.startswith("bytes:") or choice["text"][offset : offset + len(token)] == token
    assert "".join(logprobs["tokens"][: len(ids)]) == PROMPT
    scored = live.complete(**{**fields, "max_tokens": 0})["choices"][0]
    assert scored["text"] == PROMPT and len(scored["logprobs"]["tokens"]) == len(ids)
    assert scored["logprobs"]["token_logprobs"][1:] == pytest.approx(logprobs["token_logprobs"][1 : len(ids)], abs=1e-5)


def test_lm_eval_wire_facts(live: Hosted) -> None:
    """The likelihood request of lm-eval's `local-completions`: token ids, one token more, floats that compare equal."""
    info = live.http.get("/tokenizer_info").json()
    assert info["eos_token"] == "</s>" and info["chat_template"]
    bodies = [{"prompt": prompt, "add_special_tokens": False} for prompt in ("the fox", "a dog")]
    rows = [live.post("/tokenize", body).json()["tokens"] for body in bodies]
    assert live.post("/detokenize", {"tokens": rows[0]}).json() == {"prompt": "the fox"}
    greedy = live.complete(prompt=rows[0], max_tokens=4, temperature=0, logprobs=1)["choices"][0]
    answer = live.complete(model="llama", prompt=rows, max_tokens=1, logprobs=1, echo=True, temperature=0, seed=1234)[
        "choices"
    ]
    for row, choice in zip(rows, sorted(answer, key=lambda c: c["index"]), strict=True):
        assert len(choice["logprobs"]["token_logprobs"]) == len(row) + 1 == len(choice["logprobs"]["top_logprobs"])
        assert all(isinstance(top, dict) for top in choice["logprobs"]["top_logprobs"][1:])
    assert greedy["finish_reason"] == "length"


def test_streaming_equals_not_streaming(live: Hosted) -> None:
    fields = {"prompt": [PROMPT, "over the"], "max_tokens": 9, "temperature": 0.8, "seed": 5, "n": 2, "logprobs": 1,
              "echo": True, "model": "adapter-00"}  # fmt: skip
    whole = live.complete(**fields)
    events = live.stream("/v1/completions", {**fields, "stream": True, "stream_options": {"include_usage": True}})
    assert events[-1] == "[DONE]" and events[-2]["choices"] == []
    usage, expected = events[-2]["usage"], whole["usage"]
    assert {k: usage[k] for k in ("prompt_tokens", "completion_tokens")} == {
        k: expected[k] for k in ("prompt_tokens", "completion_tokens")
    }
    assert all(event["usage"] is None for event in events[:-2])
    for index, choice in enumerate(whole["choices"]):
        parts = [c for event in events[:-2] for c in event["choices"] if c["index"] == index]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + [choice["finish_reason"]]
        for key in ("tokens", "text_offset"):
            assert [x for part in parts for x in part["logprobs"][key]] == choice["logprobs"][key]
    assert len({choice["text"] for choice in whole["choices"]}) == 4


def test_seeds(live: Hosted) -> None:
    def sample(**more: Any) -> list[str]:
        body = live.complete(prompt=PROMPT, max_tokens=8, temperature=1.0, **more)
        return [choice["text"] for choice in body["choices"]]

    assert sample(seed=7) == sample(seed=7)
    assert sample(seed=7, n=3) == sample(seed=7) + sample(seed=8) + sample(seed=9)
    assert sample() != sample()


def test_stop_strings(live: Hosted) -> None:
    fields = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "logprobs": 0}
    free = live.complete(**fields)
    text = free["choices"][0]["text"]
    stop = text[6:8]
    at = text.index(stop)
    for form in (stop, [stop, "never in there"]):
        cut = live.complete(**fields, stop=form)
        choice = cut["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (text[:at], "stop")
        assert cut["usage"]["completion_tokens"] < free["usage"]["completion_tokens"]
        assert all(offset < at for offset in choice["logprobs"]["text_offset"])
    streamed = live.stream("/v1/completions", {**fields, "stop": stop, "stream": True})
    assert "".join(event["choices"][0]["text"] for event in streamed[:-1]) == text[:at]
    assert streamed[-2]["choices"][0]["finish_reason"] == "stop"


def test_guided_choice(live: Hosted) -> None:
    labels = [" lazy dog", " brown fox jumps over the lazy dog and then", " q"]
    for seed in range(4):
        body = live.complete(prompt=PROMPT, guided_choice=labels, temperature=2.0, seed=seed, max_tokens=60)
        assert body["choices"][0]["text"] in labels and body["choices"][0]["finish_reason"] == "stop"
    assert live.complete(prompt=PROMPT, guided_choice=labels)["choices"][0]["text"] in labels


def test_the_second_time_the_prompt_is_cached(live: Hosted) -> None:
    prompt = "the quick brown fox jumps over the lazy dog " * 3
    live.complete(prompt=prompt, max_tokens=1)
    usage = live.complete(prompt=prompt, max_tokens=1)["usage"]
    assert 0 < usage["prompt_tokens_details"]["cached_tokens"] < usage["prompt_tokens"]


def test_chat(live: Hosted) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the quick"}]
    fields = {"messages": messages, "temperature": 0, "max_completion_tokens": 7}
    chat = live.post("/v1/chat/completions", {**fields, "logprobs": True, "top_logprobs": 2}).json()
    choice = chat["choices"][0]
    assert chat["object"] == "chat.completion" and choice["message"]["role"] == "assistant"
    rendered = "<|system|>be brief<|end|>\n<|user|>the quick<|end|>\n<|assistant|>"
    ids = live.post("/tokenize", {"prompt": rendered, "add_special_tokens": False}).json()["tokens"]
    plain = live.complete(prompt=ids, temperature=0, max_tokens=7)
    assert plain["choices"][0]["text"] == choice["message"]["content"]
    assert chat["usage"]["prompt_tokens"] == len(ids)
    for entry in choice["logprobs"]["content"]:
        assert math.isclose(entry["logprob"], entry["top_logprobs"][0]["logprob"])
        assert bytes(entry["bytes"]).decode("utf-8", "replace") == entry["token"]
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "quick"}]
    again = live.post("/v1/chat/completions", {**fields, "messages": [messages[0], {"role": "user", "content": parts}]})
    assert again.json()["choices"][0]["message"] == choice["message"]


def test_the_published_client(client: Any) -> None:
    done = client.completions.create(model="adapter-00", prompt=PROMPT, max_tokens=5, temperature=0, logprobs=1)
    streamed = client.completions.create(model="adapter-00", prompt=PROMPT, max_tokens=5, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == done.choices[0].text
    assert done.usage.completion_tokens == 5 and done.model == "adapter-00"
    messages = [{"role": "user", "content": "hello"}]
    chat = client.chat.completions.create(model="llama", messages=messages, temperature=0, max_tokens=5, logprobs=True)
    chunks = list(
        client.chat.completions.create(
            model="llama", messages=messages, temperature=0, max_tokens=5, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == chat.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == chat.usage.completion_tokens
    with pytest.raises(openai.NotFoundError, match="nobody") as missing:
        client.completions.create(model="nobody", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.UnprocessableEntityError, match="suffix"):
        client.completions.create(model="llama", prompt="x", suffix="y")
