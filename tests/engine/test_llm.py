"""`lorikeet.LLM` on a real checkpoint folder, against transformers and peft."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import fixtures

import lorikeet
from lorikeet.engine.compiler import AdapterCompiler
from lorikeet.errors import ConfigError, InvalidRequestError, NotFoundError
from lorikeet.kernels.precision import native_bf16_products
from lorikeet.types import SamplingParams

DEMO_DATA = Path(lorikeet.__file__).parent / "data" / "demo"
PROMPTS = ["the quick brown fox", "jumps over", "the lazy dog and then", "another one"]
GREEDY = SamplingParams(max_tokens=24, temperature=0.0, logprobs=0, prompt_logprobs=0)


@pytest.fixture(scope="module")
def folders(checkpoint: Any, adapters: Any) -> tuple[Path, Path]:
    """A base, and the folder of its adapters."""
    return checkpoint("llama"), adapters("llama", 4)[0].parent


@pytest.fixture(scope="module")
def llm(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    import lorikeet.kernels.cpu  # before the next line: its cache of compiled kernels stays where it is

    cache = pytest.MonkeyPatch()
    cache.setenv("LORIKEET_CACHE", str(tmp_path_factory.mktemp("cache")))
    base, adapters = folders
    yield lorikeet.LLM(str(base), adapters=str(adapters), dtype="float32", max_seqs=4, adapter_memory=2**20)
    cache.undo()


def test_greedy_tokens_and_logprobs_are_those_of_transformers_and_peft(llm: Any, folders: tuple[Path, Path]) -> None:
    names = [None, "adapter-02", "adapter-03", "adapter-02"]
    heard: list[int] = []
    completions = llm.generate(PROMPTS, adapters=names, sampling=GREEDY, on_done=heard.append)
    assert sum(heard) == 4
    for prompt, name, done in zip(PROMPTS, names, completions, strict=True):
        ids = llm.tokenizer.encode(prompt)
        whole = torch.tensor([ids + done.tokens])
        with torch.no_grad():
            model = fixtures.oracle(folders[0], None if name is None else folders[1] / name)
            logits = model(whole).logits
        found = [entry.logprob for entry in [*done.prompt_logprobs[1:], *done.logprobs]]
        assert found == pytest.approx(fixtures.next_logprobs(logits, whole)[0].tolist(), abs=1e-4)
        top = logits[0, len(ids) - 1 : -1].topk(2)
        clear = top.values[:, 0] - top.values[:, 1] > 1e-4
        assert (torch.tensor(done.tokens) == top.indices[:, 0])[clear].all()
        assert (done.prompt_tokens, done.finish_reason in ("stop", "length")) == (len(ids), True)


def test_an_adapter_is_read_again_only_when_its_files_changed(
    llm: Any, folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    compile_adapter = AdapterCompiler.compile

    def compiled(self: AdapterCompiler, folder: Path) -> Any:
        read.append(folder)
        return compile_adapter(self, folder)

    monkeypatch.setattr(AdapterCompiler, "compile", compiled)
    copy, other = tmp_path / "copy", folders[1] / "adapter-03"
    shutil.copytree(folders[1] / "adapter-02", copy)
    first = llm.generate(PROMPTS[:1], adapters=str(copy), sampling=GREEDY)[0]
    assert llm.generate(PROMPTS[:1], adapters=str(copy), sampling=GREEDY)[0].logprobs == first.logprobs
    assert read == [copy]
    for file in other.iterdir():
        shutil.copy(file, copy)
    replaced = llm.generate(PROMPTS[:1], adapters=str(copy), sampling=GREEDY)[0]
    assert read == [copy, copy] and replaced.logprobs != first.logprobs
    assert replaced.logprobs == llm.generate(PROMPTS[:1], adapters=str(other), sampling=GREEDY)[0].logprobs


def test_text_stops_and_choices(llm: Any) -> None:
    (free,) = llm.generate(PROMPTS[:1], sampling=SamplingParams(max_tokens=24, temperature=0.0))
    assert free.text == llm.tokenizer.decode(free.tokens)
    at = len(free.text) // 2
    stop = free.text[at : at + 3]
    flat = llm.generate(PROMPTS[:2], sampling=SamplingParams(max_tokens=24, temperature=0.0), stop=[stop])
    assert (flat[0].text, flat[0].stop, flat[0].finish_reason) == (free.text[: free.text.find(stop)], stop, "stop")
    assert len(flat[0].tokens) < len(free.tokens)
    each = llm.generate(PROMPTS[:1] * 2, sampling=SamplingParams(max_tokens=24, temperature=0.0), stop=[[stop], []])
    assert [done.text for done in each] == [flat[0].text, free.text]
    labels = [" dog", " fox", " the other"]
    choices = tuple(tuple(llm.encode_plain(label)) for label in labels)
    (chosen,) = llm.generate(PROMPTS[:1], "adapter-03", SamplingParams(choices=choices))
    assert chosen.text in labels
    assert not llm.engine.has_work()


def test_chat_renders_with_the_models_template(llm: Any) -> None:
    messages = [{"role": "user", "content": "the fox"}]
    (done,) = llm.chat([messages], sampling=GREEDY, progress=True)
    (same,) = llm.generate([llm.encode_plain("<|user|>the fox<|end|>\n<|assistant|>")], sampling=GREEDY)
    assert done == same


def test_a_seed_repeats_an_answer(llm: Any) -> None:
    params = SamplingParams(max_tokens=12, seed=7)
    texts = [done.text for done in llm.generate(PROMPTS[:1] * 3, sampling=params)]
    free = [done.text for done in llm.generate(PROMPTS[:1] * 3, sampling=SamplingParams(max_tokens=12))]
    assert len(set(texts)) == 1 < len(set(free))


def test_more_prompts_than_the_queue_holds(llm: Any, folders: tuple[Path, Path]) -> None:
    small = lorikeet.LLM(str(folders[0]), dtype="float32", queue=3, max_seqs=2, adapter_memory=0)
    done = small.generate(PROMPTS * 5, sampling=SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True))
    assert [len(one.tokens) for one in done] == [3] * 20


def test_so_many_requests_at_once_as_asked_for(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    running: list[int] = []
    step = llm.engine.step

    def watched() -> Any:
        running.append(llm.stats().running + llm.stats().waiting)
        return step()

    monkeypatch.setattr(llm.engine, "step", watched)
    done = llm.generate(PROMPTS * 2, sampling=SamplingParams(max_tokens=2, ignore_eos=True), concurrency=3)
    assert max(running) == 3 and all(one.seconds > 0 for one in done)
    with pytest.raises(InvalidRequestError, match="concurrency: found 0"):
        llm.generate(PROMPTS, concurrency=0)


def test_errors_name_what_is_wrong_and_leave_nothing_behind(llm: Any, folders: tuple[Path, Path]) -> None:
    with pytest.raises(NotFoundError, match="'adapter-9'.*adapter-00, adapter-01"):
        llm.generate(PROMPTS, adapters="adapter-9")
    with pytest.raises(InvalidRequestError, match="3 for 4 prompts"):
        llm.generate(PROMPTS, adapters=["adapter-00"] * 3)
    with pytest.raises(InvalidRequestError, match="top_p"):
        llm.generate(PROMPTS, sampling=[GREEDY] * 3 + [SamplingParams(top_p=2.0)])
    assert not llm.engine.has_work()
    assert len(llm.generate(PROMPTS)) == 4
    with pytest.raises(ConfigError, match="max_sequences"):
        lorikeet.LLM(str(folders[0]), max_sequences=4)
    with pytest.raises(ConfigError, match="not a folder"):
        lorikeet.LLM(str(folders[0]), adapters="nowhere")


@pytest.mark.skipif(not native_bf16_products(), reason="bf16 is slow without AVX512-BF16")
def test_quantised_weights_cost_little_perplexity() -> None:
    """Of the embedded base on the demo's own texts, against bf16 weights: int8 below 1%, int4 below 4%."""
    rows = (DEMO_DATA / "describe" / "test.jsonl").read_text().splitlines()
    texts = [json.loads(row)["text"] for row in rows]
    score = SamplingParams(max_tokens=1, prompt_logprobs=0)
    losses = []
    for quantize in ("none", "int8", "int4"):
        llm = lorikeet.LLM(quantize=quantize, dtype="bfloat16", kv_memory=64 * 2**20)
        found = [c.prompt_logprobs for c in llm.generate(texts, sampling=score)]
        values = [-one.logprob for scores in found if scores is not None for one in scores if one is not None]
        losses.append(sum(values) / len(values))
    plain, int8, int4 = losses
    assert plain > 1.0 and len({plain, int8, int4}) == 3
    assert abs(math.exp(int8 - plain) - 1) < 0.01 and abs(math.exp(int4 - plain) - 1) < 0.04
