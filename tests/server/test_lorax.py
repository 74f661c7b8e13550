"""The LoRAX routes over the real engine, by the published client and by hand."""

from __future__ import annotations

import asyncio
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.server.hosting import Hosted

from lorikeet.adapters.files import Lock, LockedBase, LockedTemplate, write_lock

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lorax
    from lorax.errors import NotFoundError, ValidationError

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated.*:DeprecationWarning")
PROMPT = "the quick brown fox"


@pytest.fixture
def client(live: Hosted) -> Any:
    client = lorax.Client(live.url, timeout=60)
    yield client
    if client.session is not None:
        client.session.close()


def test_generate(live: Hosted, client: Any) -> None:
    answer = client.generate(PROMPT, adapter_id="adapter-00", max_new_tokens=6, decoder_input_details=True,
                             return_k_alternatives=2)  # fmt: skip
    other = live.complete(model="adapter-00", prompt=PROMPT, max_tokens=6, temperature=0)
    assert answer.generated_text == other["choices"][0]["text"]
    details = answer.details
    assert (details.finish_reason, details.generated_tokens, details.seed) == ("length", 6, None)
    assert details.prompt_tokens == len(details.prefill) == other["usage"]["prompt_tokens"]
    assert details.prefill[0].logprob is None and all(token.logprob < 0 for token in details.prefill[1:])
    assert len(details.tokens) == 6 and all(len(token.alternative_tokens) == 2 for token in details.tokens)
    assert "".join(token.text for token in details.tokens) == answer.generated_text


def test_stream(client: Any) -> None:
    whole = client.generate(PROMPT, max_new_tokens=7)
    events = list(client.generate_stream(PROMPT, max_new_tokens=7))
    assert [event.token.id for event in events] == [token.id for token in whole.details.tokens]
    assert all(event.generated_text is None and event.details is None for event in events[:-1])
    assert events[-1].generated_text == whole.generated_text and events[-1].details.generated_tokens == 7


def test_sampling_and_full_text(client: Any) -> None:
    one, two = (client.generate(PROMPT, do_sample=True, seed=11, max_new_tokens=8) for _ in range(2))
    assert one.generated_text == two.generated_text and one.details.seed == 11
    assert client.generate(PROMPT, temperature=0.9, max_new_tokens=2).details.seed is not None
    full = client.generate(PROMPT, return_full_text=True, max_new_tokens=3)
    assert full.generated_text.startswith(PROMPT)
    greedy = client.generate("jumps over the lazy dog " + PROMPT, max_new_tokens=5, truncate=4)
    assert greedy.details.prompt_tokens == 4


def test_a_stop_sequence_is_part_of_the_answer(client: Any) -> None:
    free = client.generate(PROMPT, max_new_tokens=12).generated_text
    stop = free[6:8]
    answer = client.generate(PROMPT, max_new_tokens=12, stop_sequences=[stop])
    assert answer.details.finish_reason == "stop_sequence"
    assert answer.generated_text == free[: free.index(stop) + len(stop)]
    streamed = list(client.generate_stream(PROMPT, max_new_tokens=12, stop_sequences=[stop]))
    assert streamed[-1].generated_text == answer.generated_text


def test_the_async_client(live: Hosted) -> None:
    async def run() -> None:
        client = lorax.AsyncClient(live.url, timeout=60)
        whole = await client.generate(PROMPT, adapter_id="adapter-01", max_new_tokens=4)
        events = [event async for event in client.generate_stream(PROMPT, adapter_id="adapter-01", max_new_tokens=4)]
        assert events[-1].generated_text == whole.generated_text

    asyncio.run(run())


def test_errors_have_the_protocols_shape(live: Hosted, client: Any) -> None:
    with pytest.raises(NotFoundError, match="nobody"):
        client.generate(PROMPT, adapter_id="nobody")
    with pytest.raises(ValidationError, match=r"128.*shorten"):
        client.generate("the " * 400)
    with pytest.raises(ValidationError, match="best_of"):
        client.generate(PROMPT, best_of=2, do_sample=True)
    with pytest.raises(ValidationError, match="nobody|128"):
        list(client.generate_stream("the " * 400))
    for path in ("/", "/generate", "/generate_stream"):
        reply = live.post(path, {"inputs": "x", "parameters": {"typical": 1}})
        assert reply.status_code == 422 and reply.json()["error_type"] == "validation"
        assert "unknown field 'parameters.typical'" in reply.json()["error"]
        assert live.http.post(path, content=b"{").json()["error_type"] == "validation"


@pytest.mark.parametrize(
    ("field", "value"),
    [("merged_adapters", {"ids": ["a"], "weights": [1.0], "density": 5}), ("adapter_source", "nowhere"),
     ("typical_p", 0.5), ("watermark", True), ("repetition_penalty", 1.1), ("response_format", {"type": "json_object"}),
     ("max_new_tokens", -1), ("top_k", 0), ("frequency_penalty", 0.5)],
)  # fmt: skip
def test_unsupported_values_are_named(live: Hosted, field: str, value: Any) -> None:
    reply = live.post("/generate", {"inputs": "x", "parameters": {field: value}})
    assert reply.status_code == 422 and f"'parameters.{field}" in reply.json()["error"]


def test_columns_are_rendered_by_the_adapters_template(live: Hosted, adapters: Callable[..., list[Path]]) -> None:
    root = live.state.models.catalogue.root
    assert root is not None
    base = live.state.info.base
    folder = root / "locked"
    shutil.copytree(adapters("llama", 1)[0], root / ".new")
    template = LockedTemplate.of("prompt", "Customer: {text}\nIntent:")
    write_lock(root / ".new", Lock(base=LockedBase(base.name, base.sha256), tokenizer_sha256=base.tokenizer_sha256,
                                   stop_ids=base.stop_ids, template=template))  # fmt: skip
    (root / ".new").rename(folder)
    parameters = {"adapter_id": "locked", "max_new_tokens": 5}
    rendered = live.post("/generate", {"inputs": "Customer: my card\nIntent:", "parameters": parameters})
    columns = live.post("/generate", {"inputs": {"text": "my card"}, "parameters": parameters})
    assert columns.status_code == 200 and columns.json() == rendered.json()
    missing = live.post("/generate", {"inputs": {"txt": "my card"}, "parameters": parameters})
    assert missing.status_code == 422 and "'text'" in missing.json()["error"]
    none = live.post("/generate", {"inputs": {"text": "x"}, "parameters": {"adapter_id": "adapter-00"}})
    assert none.status_code == 400 and "no prompt template" in none.json()["error"]
    shutil.rmtree(folder)
