"""Requests to adapters of several vocabularies in one engine: each as if it were alone, and as peft's own model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import fixtures
from tests.adapters.resized import make_resized, save_tokenizer, theirs
from tests.fixtures import VOCABULARY

from lorikeet.adapters.compiled import open_compiled
from lorikeet.adapters.files import Lock, LockedBase, write_lock
from lorikeet.engine.slab import AdapterSlab
from lorikeet.errors import AdapterError, InvalidRequestError, LockMismatchError
from lorikeet.types import AdapterCopy, SamplingParams

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
BOTH = ["embed_tokens", "lm_head"]
# name -> tokens; how the adapter differs
SIZES = {"more": VOCABULARY + 3, "many": VOCABULARY + 70, "fewer": VOCABULARY - 12, "plain": VOCABULARY}
ADDED = ["<tool>", "<|im_end|>", "zebra"]
NAMES: list[str | None] = ["more", None, "many", "plain", "more", "fewer", None, "plain"]


@pytest.fixture(scope="module")
def root(checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base, root = checkpoint("llama"), tmp_path_factory.mktemp("adapters")
    for i, (name, tokens) in enumerate(SIZES.items()):
        if name != "plain":
            make_resized(base, root / name, tokens, i, loud=2.0, modules_to_save=BOTH, trained_only=bool(i % 2))
    fixtures.make_adapter(base, root / "plain")
    save_tokenizer(base, root / "more", ADDED)
    save_tokenizer(base, root / "many", [f"<{i}>" for i in range(60)], eos_token="<|im_end|>")
    shrunk(root / "fewer", base)
    return root


def shrunk(folder: Path, base: Path) -> None:
    """The base's tokenizer without its last merges."""
    content = json.loads((base / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {token: i for token, i in vocabulary.items() if i < SIZES["fewer"]}
    gone = vocabulary.keys() - content["model"]["vocab"].keys()
    content["model"]["merges"] = [pair for pair in content["model"]["merges"] if "".join(pair) not in gone]
    (folder / "tokenizer.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def llm(checkpoint: Any, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    import lorikeet.kernels.cpu  # before the next line: its cache of compiled kernels stays where it is

    cache = pytest.MonkeyPatch()
    cache.setenv("LORIKEET_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield lorikeet.LLM(str(checkpoint("llama")), adapters=str(root), dtype="float32", max_seqs=8, adapter_memory=2**20)
    cache.undo()


def prompts(seed: int = 0) -> list[list[int]]:
    """Token ids for NAMES; those of more tokens than the base hold the added ones."""
    found = []
    for i, name in enumerate(NAMES):
        row = fixtures.sample_tokens(1, 9 + i, seed + i)[0].clamp(max=SIZES["fewer"] - 1).tolist()
        if name in ("more", "many"):
            row[2], row[5] = SIZES[name] - 1, VOCABULARY
        found.append(row)
    return found


def test_a_mixed_batch_is_pefts(llm: Any, root: Path, checkpoint: Any) -> None:
    greedy = SamplingParams(max_tokens=12, temperature=0.0, logprobs=5, prompt_logprobs=5, ignore_eos=True)
    generated = set()
    for name, prompt, done in zip(NAMES, prompts(), llm.generate(prompts(), NAMES, greedy), strict=True):
        tokens = SIZES.get(name or "plain", VOCABULARY)
        base, whole = checkpoint("llama"), torch.tensor([[*prompt, *done.tokens]])
        with torch.no_grad():
            model = theirs(base, root / name, tokens) if name is not None else fixtures.oracle(base)
            logits = model(whole).logits[0]
        entries = [*done.prompt_logprobs[1:], *done.logprobs]
        expected = fixtures.next_logprobs(logits, whole[0]).tolist()
        assert [one.logprob for one in entries] == pytest.approx(expected, abs=1e-4)
        best = logits[:-1].log_softmax(-1).topk(5)
        for one, values in zip(entries, best.values.tolist(), strict=True):
            assert [value for _, value in one.top] == pytest.approx(values, abs=1e-4)
            assert all(token < tokens for token, _ in one.top)
        assert max(done.tokens) < tokens
        generated |= {(name, token) for token in done.tokens if token >= VOCABULARY}
    assert {name for name, _ in generated} == {"more", "many"}, "no adapter generated a token that it adds"


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {"temperature": 3.0},
        {"temperature": 2.0, "top_k": 321},
        {"temperature": 2.5, "top_p": 0.9},
    ],
)
def test_each_gets_what_it_gets_alone(llm: Any, settings: dict[str, Any]) -> None:
    params = [
        SamplingParams(max_tokens=16, seed=i, logprobs=3, prompt_logprobs=0, ignore_eos=True, **settings)
        for i in range(len(NAMES))
    ]
    together = llm.generate(prompts(), NAMES, params)
    for i, (name, prompt) in enumerate(zip(NAMES, prompts(), strict=True)):
        (alone,) = llm.generate([prompt], name, params[i])
        assert together[i].tokens == alone.tokens
        for mixed, single in zip(together[i].logprobs, alone.logprobs, strict=True):
            assert mixed.logprob == pytest.approx(single.logprob, abs=1e-5)
            assert [token for token, _ in mixed.top] == [token for token, _ in single.top]


def test_every_token_of_an_adapter_and_no_other_is_sampled(llm: Any) -> None:
    """At a temperature at which all are about as likely."""
    flat = [SamplingParams(max_tokens=200, temperature=100.0, seed=i, ignore_eos=True) for i in range(len(NAMES))]
    for name, done in zip(NAMES, llm.generate(prompts(), NAMES, flat), strict=True):
        tokens = SIZES.get(name or "plain", VOCABULARY)
        assert max(done.tokens) < tokens
        if name == "many":
            assert max(done.tokens) >= VOCABULARY


def test_choices_and_stops_of_added_tokens(llm: Any) -> None:
    choices = (tuple(llm.encode_plain("<tool>", "more")), tuple(llm.encode_plain("zebra<tool>", "more")))
    assert choices == ((VOCABULARY,), (VOCABULARY + 2, VOCABULARY))
    params = SamplingParams(max_tokens=4, temperature=0.0, choices=choices)
    chosen, plain = llm.generate(prompts()[:2], ["more", None], [params, SamplingParams(max_tokens=4)])
    assert tuple(chosen.tokens) in choices and chosen.text in ("<tool>", "zebra<tool>")
    assert max(plain.tokens) < VOCABULARY
    first = llm.generate([prompts()[2]], "many", SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True))[
        0
    ].tokens
    stopped = SamplingParams(max_tokens=3, temperature=0.0, stop_token_ids=(first[0],))
    assert llm.generate([prompts()[2]], "many", stopped)[0].finish_reason == "stop"
    end = llm.tokenizer_of("many").eos_id
    assert end == VOCABULARY + 60
    forced = SamplingParams(max_tokens=4, temperature=0.0, choices=((7,), (7, 8)))  # 8, or an end after the first
    done = llm.generate([prompts()[2]], "many", forced)[0]
    assert done.tokens in ([7, 8], [7, end], [7, *llm.engine.stop_ids])


@pytest.mark.parametrize(
    ("name", "tokens", "size"),
    [(None, [7, VOCABULARY], VOCABULARY), ("plain", [VOCABULARY], VOCABULARY),
     ("more", [VOCABULARY + 3], VOCABULARY + 3), ("fewer", [7, VOCABULARY - 12], VOCABULARY - 12)],
)  # fmt: skip
def test_ids_beyond_the_adapters_own_are_refused(llm: Any, name: str | None, tokens: list[int], size: int) -> None:
    with pytest.raises(InvalidRequestError, match=f"prompt: found token id {tokens[-1]}; expected ids below .* {size}"):
        llm.generate([tokens], name)
    for params in (SamplingParams(choices=((tokens[-1],),)), SamplingParams(stop_token_ids=(tokens[-1],))):
        with pytest.raises(InvalidRequestError, match=f"below the vocabulary's size {size}"):
            llm.generate([[7]], name, params)


def test_text_goes_through_the_adapters_tokenizer(llm: Any) -> None:
    own, base = llm.tokenizer_of("more"), llm.tokenizer_of("plain")
    assert base is llm.tokenizer and own is not base
    text = "the <tool> fox"
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    (done,) = llm.generate([text], "more", params)
    assert done.prompt_tokens == len(own.encode(text)) < len(base.encode(text))
    assert done.text == own.decode(done.tokens)
    (streamed,) = llm.generate([text], "more", params, stop="never in it")  # token by token
    assert streamed.text == done.text
    assert llm.render_chat([{"role": "user", "content": "<tool>"}], "more") == own.encode(
        "<|user|><tool><|end|>\n<|assistant|>", False
    )


def test_a_handle_forgets_the_vocabulary_of_who_had_it(llm: Any) -> None:
    slab = AdapterSlab(2**20, llm.engine.spec, torch.float32)
    for name, expected in (("more", {0: VOCABULARY + 3}), ("plain", {}), ("fewer", {0: VOCABULARY - 12})):
        info = llm._compiled(llm._folder(name)).info
        copy = AdapterCopy(info.digest, info.path, 0, 0, info.nbytes, 0, info.nbytes)
        assert slab.carry_out([copy]) == {}
        assert slab.slab.vocabulary == expected
    assert open_compiled(Path(info.path)).header.vocab_size == VOCABULARY - 12


def test_a_tokenizer_that_the_tables_have_no_rows_for(llm: Any, checkpoint: Any, tmp_path: Path) -> None:
    base = checkpoint("llama")
    folder = save_tokenizer(base, fixtures.make_adapter(base, tmp_path / "plain"), ADDED)
    with pytest.raises(AdapterError, match=r"plain: 'zebra' of its tokenizer has the id 322, but .* have 320 rows"):
        llm.generate(["hi"], str(folder))
    save_tokenizer(base, folder, pad_token="[PAD]")  # as many do who train without resizing: no text has it
    assert llm.generate(["hi"], str(folder), SamplingParams(max_tokens=1))[0].tokens
    with pytest.raises(InvalidRequestError, match="found token id 320"):
        llm.generate(["hi [PAD]"], str(folder))
    for file in folder.glob("tokenizer*"):
        file.unlink()
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 400]}')
    with pytest.raises(AdapterError, match="eos_token_id: expected ids below 320, found 400"):
        llm.generate(["hi"], str(folder))
    short = make_resized(base, tmp_path / "short", VOCABULARY - 12, modules_to_save=BOTH)
    with pytest.raises(
        AdapterError, match=r"short: .* has the id 319, but .* have 308 rows"
    ):  # of the base's tokenizer
        llm.generate(["hi"], str(short))


def test_a_lock_is_of_the_tokenizer_in_the_folder(llm: Any, root: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(root / "more", tmp_path / "locked"))
    base, own = llm.engine.base, llm.tokenizer_of("more")
    locked = LockedBase(base.name, base.sha256)
    write_lock(folder, Lock(base=locked, tokenizer_sha256=own.sha256, stop_ids=own.stop_ids))
    llm.generate(["<tool>"], str(folder), SamplingParams(max_tokens=1))
    write_lock(folder, Lock(base=locked, tokenizer_sha256=base.tokenizer_sha256, stop_ids=base.stop_ids))
    with pytest.raises(LockMismatchError, match="another tokenizer"):
        llm.generate(["<tool>"], str(folder), SamplingParams(max_tokens=2))
