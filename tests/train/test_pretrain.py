"""The pretraining loop: it learns, it resumes to the same losses, and what it writes is a Hugging Face Llama."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file
from tokenizers import Tokenizer

from lorikeet.errors import ConfigError, DataError
from lorikeet.model.decoder import forward
from lorikeet.train.corpus import HELD_OUT, PIECE, Corpus, Mixture, pieces, tokenised
from lorikeet.train.optim import AdamW, Muon, TrapezoidalSchedule, orthogonalise
from lorikeet.train.pretrain import PretrainRun, run_pretrain
from lorikeet.train.pretrain_ops import PretrainOps, WorkingCopy, causal_batch, causal_loss, initial_masters
from lorikeet.train.pretrain_recipe import load_recipe
from lorikeet.train.tokenizer import SPECIAL_TOKENS, token_bytes, train_tokenizer

NANO = Path(__file__).parents[2] / "src" / "lorikeet" / "nano"
TEXT = "a bird in the hand is worth two of those that sing over there and 17 more were seen near 42 trees"
WORDS = TEXT.split(" ")
QUIET = Console(quiet=True)


def documents(seed: int) -> Iterator[str]:
    rng = np.random.default_rng(seed)
    while True:
        yield " ".join(rng.choice(WORDS, size=40)) + "."


RECIPE: dict[str, Any] = {
    "version": 1,
    "name": "tiny",
    "seed": 3,
    "export": "out",
    "threads": 1,
    "compile": "never",
    "dtype": "float32",
    "log_steps": 1,
    "validation_steps": 100,
    "model": {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "context": 64,
    },
    "tokenizer": {"characters": {"birds": 20000, "file": 500}},
    "sources": [
        {"kind": "synthetic", "name": "birds", "share": 0.7, "characters": 30000},
        {"kind": "text", "name": "file", "share": 0.3, "path": "text.txt"},
    ],
    "optimization": {
        "tokens": 20 * 512,
        "decay_tokens": 2048,
        "warmup_tokens": 512,
        "length": 32,
        "long_from": 15 * 512,
        "micro_tokens": 256,
        "micro_batches": 2,
        "muon_lr": 0.02,
        "adamw_lr": 0.004,
    },
}


def in_folder(recipe: dict[str, Any], home: Path) -> dict[str, Any]:
    """The recipe with its files below `home`."""
    sources = [
        source | {"path": str(home / source["path"])} if "path" in source else source for source in recipe["sources"]
    ]
    return recipe | {"sources": sources, "state": str(home / "state"), "export": str(home / recipe["export"])}


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Path]:
    """Writes the tiny recipe with changes into a folder of its own."""

    def write(folder: str = "run", **changes: Any) -> Path:
        home = tmp_path / folder
        home.mkdir(exist_ok=True)
        (home / "text.txt").write_text("\x1e".join(" ".join(WORDS[i:] * 40) for i in range(8)))
        (home / "recipe.yaml").write_text(yaml.safe_dump(in_folder(RECIPE | changes, home)))
        return home / "recipe.yaml"

    return write


def losses(recipe_path: Path) -> list[float]:
    lines = (recipe_path.parent / "state" / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if line["split"] == "train"]


def test_loss_falls_and_resuming_gives_the_same_losses(recipe: Callable[..., Path]) -> None:
    whole, parts = recipe("whole"), recipe("parts")
    run_pretrain(whole, documents, console=QUIET)
    run_pretrain(parts, documents, until=7 * 512, console=QUIET)
    run_pretrain(parts, documents, until=16 * 512, resume=True, console=QUIET)
    run_pretrain(parts, documents, resume=True, console=QUIET)
    expected = losses(whole)
    assert len(expected) == 20
    assert expected[-1] < expected[0] - 1.0
    assert losses(parts) == expected


def test_metrics_name_each_source_and_its_bits_per_byte(recipe: Callable[..., Path]) -> None:
    path = recipe()
    run_pretrain(path, documents, console=QUIET)
    lines = [json.loads(x) for x in (path.parent / "state" / "metrics.jsonl").read_text().splitlines()]
    judged = {line["source"]: line["bits_per_byte"] for line in lines if line["split"] == "validation"}
    assert set(judged) == {"birds", "file"}
    assert all(0 < bits < 8 for bits in judged.values())
    card = (path.parent / "out" / "README.md").read_text()
    assert all(f"{bits:.3f}" in card for bits in judged.values())


def test_sigterm_leaves_a_checkpoint_to_go_on_from(
    recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe()
    step = PretrainRun.train_step

    def step_then_term(self: PretrainRun) -> tuple[float, float]:
        result = step(self)
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(PretrainRun, "train_step", step_then_term)
    run_pretrain(path, documents, console=QUIET)
    assert len(losses(path)) == 3
    assert not (path.parent / "out").exists()
    run_pretrain(path, documents, resume=True, until=5 * 512, console=QUIET)
    assert len(losses(path)) == 5


def test_decay_ends_the_run_from_where_it_stands(recipe: Callable[..., Path]) -> None:
    path = recipe()
    run_pretrain(path, documents, until=4 * 512, console=QUIET)
    run_pretrain(path, documents, resume=True, decay=3 * 512, console=QUIET)
    assert len(losses(path)) == 7
    assert "middle of the run" not in (path.parent / "out" / "README.md").read_text()


def test_a_loss_that_is_not_a_number_stops_the_run(
    recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PretrainRun, "train_step", lambda self: (float("nan"), 1.0))
    path = recipe()
    with pytest.raises(DataError, match="loss is nan"):
        run_pretrain(path, documents, console=QUIET)
    assert not (path.parent / "state" / "checkpoint.pt").exists()


def test_export_is_a_llama_with_the_same_logits(recipe: Callable[..., Path]) -> None:
    from transformers import AutoTokenizer, LlamaForCausalLM

    path = recipe()
    run_pretrain(path, documents, until=6 * 512, console=QUIET)
    folder = path.parent / "model"
    run_pretrain(path, documents, export=folder, console=QUIET)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    spec = load_recipe(path).model.spec()
    exported = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    weights = WorkingCopy(spec, exported, torch.float32)
    rows = torch.randint(0, spec.vocab_size, (2, 65), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = forward(spec, weights.weights, causal_batch(rows), PretrainOps(64))
        theirs = model(rows[:, :-1]).logits.flatten(0, 1)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        loss = torch.nn.functional.cross_entropy(theirs, rows[:, 1:].flatten())
    torch.testing.assert_close(causal_loss(spec, weights.weights, rows), loss, rtol=1e-5, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<|user|>\nhi\n<|assistant|>\nho<|end|>\n"
    assert tokenizer.encode("<|user|>") == [SPECIAL_TOKENS.index("<|user|>")]


def test_fused_loss_has_the_gradients_of_autograd() -> None:
    spec = load_shape()
    masters = initial_masters(spec, 0)
    for master in masters.values():
        master.add_(torch.randn(master.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)
    rows = torch.randint(0, spec.vocab_size, (3, 33), generator=torch.Generator().manual_seed(2))
    fused, plain = (WorkingCopy(spec, masters, torch.float64) for _ in range(2))
    causal_loss(spec, fused.weights, rows).backward()
    logits = forward(spec, plain.weights, causal_batch(rows), PretrainOps(32))
    torch.nn.functional.cross_entropy(logits, rows[:, 1:].flatten()).backward()
    expected = plain.grads()
    for name, grad in fused.grads().items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-7)


def load_shape() -> Any:
    import msgspec

    from lorikeet.train.pretrain_recipe import ModelShape

    return msgspec.convert(RECIPE["model"], ModelShape).spec()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"colour": "red"}, "colour"),
        ({"model": RECIPE["model"] | {"depth": 3}}, "depth"),
        ({"sources": [RECIPE["sources"][0] | {"paht": "x"}]}, "paht"),
        ({"optimization": RECIPE["optimization"] | {"micro_tokens": 100}}, "micro_tokens"),
        ({"tokenizer": {"characters": {"nobody": 10}}}, "nobody"),
        ({"version": 2}, "2"),
    ],
)
def test_a_recipe_is_refused_by_the_field_at_fault(
    recipe: Callable[..., Path], change: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        load_recipe(recipe(**change))


def test_starting_over_a_checkpoint_and_resuming_without_one_are_refused(recipe: Callable[..., Path]) -> None:
    path = recipe()
    with pytest.raises(ConfigError, match="does not exist"):
        run_pretrain(path, documents, resume=True, console=QUIET)
    run_pretrain(path, documents, until=512, console=QUIET)
    with pytest.raises(ConfigError, match="--resume"):
        run_pretrain(path, documents, console=QUIET)
    changed = recipe(model=RECIPE["model"] | {"layers": 3})
    with pytest.raises(ConfigError, match="another model shape"):
        run_pretrain(changed, documents, resume=True, console=QUIET)


def test_a_missing_source_is_named(recipe: Callable[..., Path]) -> None:
    path = recipe()
    (path.parent / "text.txt").unlink()
    with pytest.raises(DataError, match=r"file.*text\.txt"):
        run_pretrain(path, documents, console=QUIET)


TOKENIZER = train_tokenizer((text for text, _ in zip(documents(0), range(200), strict=False)), 290)


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_tokenizer_is_lossless(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids, skip_special_tokens=False) == text


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_shipped_tokenizer_is_lossless_and_counts_bytes(text: str) -> None:
    tokenizer, lengths = shipped_tokenizer()
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert sum(lengths[i] for i in ids) == len(text.encode())


_SHIPPED: list[tuple[Tokenizer, list[int]]] = []


def shipped_tokenizer() -> tuple[Tokenizer, list[int]]:
    if not _SHIPPED:
        tokenizer = Tokenizer.from_file(str(NANO / "tokenizer.json"))
        _SHIPPED.append((tokenizer, token_bytes(tokenizer)))
    return _SHIPPED[0]


def test_shipped_model_keeps_its_bounds() -> None:
    weights = load_file(NANO / "model.safetensors")
    config = json.loads((NANO / "config.json").read_text())
    assert sum(file.stat().st_size for file in NANO.iterdir()) <= 32_000_000
    assert sum(tensor.numel() for tensor in weights.values()) <= 15_000_000
    assert config["max_position_embeddings"] >= 1024
    assert all(tensor.dtype == torch.bfloat16 and tensor.isfinite().all() for tensor in weights.values())
    assert {"tokenizer_config.json", "generation_config.json", "README.md"} <= {f.name for f in NANO.iterdir()}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(alphabet="ab \n", max_size=3 * PIECE), max_size=4))
def test_pieces_join_to_the_record(parts: list[str]) -> None:
    record = "\n\n".join(parts)
    assert "".join(pieces(record)) == record


def test_corpus_is_read_once_and_again_when_its_content_changes(tmp_path: Path) -> None:
    calls = []

    def records() -> Iterator[str]:
        calls.append(1)
        return (text for text, _ in zip(documents(1), range(5 * HELD_OUT), strict=False))

    first = tokenised("birds", records, "one", TOKENIZER, tmp_path)
    again = tokenised("birds", records, "one", TOKENIZER, tmp_path)
    assert len(calls) == 1
    assert np.array_equal(first.tokens, again.tokens)
    assert (first.tokens == 0).sum() == 5 * HELD_OUT - 5  # a separator before every document, but those held out
    tokenised("birds", records, "two", TOKENIZER, tmp_path)
    assert len(calls) == 2


def numbered(name: str, blocks: int, first: int) -> Corpus:
    """A corpus whose block i is `first + i` throughout."""
    tokens = np.repeat(np.arange(first, first + blocks + 2, dtype=np.uint16), 512)
    return Corpus(name, tokens, tokens[:100], np.array([1]))


def test_mixture_keeps_shares_and_repeats_nothing_within_an_epoch() -> None:
    corpora = [numbered("x", 300, 0), numbered("y", 50, 1000)]
    mixture = Mixture(corpora, {"x": 3.0, "y": 1.0}, seed=0)
    seen = mixture.rows(160, 512)[:, 0].tolist()
    assert mixture.taken == pytest.approx({"x": 120, "y": 40}, abs=2)
    assert len(set(seen)) == 160
    resumed = Mixture(corpora, {"x": 3.0, "y": 1.0}, seed=0)
    resumed.rows(80, 512)
    assert resumed.rows(80, 512)[:, 0].tolist() == seen[80:]


def test_a_source_that_is_added_later_takes_its_share_from_then_on() -> None:
    """Made up for, it would be the only text for a while, and what was learned before it would be forgotten."""
    mixture = Mixture([numbered("x", 900, 0)], {"x": 1.0}, seed=0)
    mixture.rows(400, 512)
    widened = Mixture([numbered("x", 900, 0), numbered("z", 300, 2000)], {"x": 1.0, "z": 1.0}, seed=0)
    widened.taken.update(mixture.taken)
    from_z = [value >= 2000 for value in widened.rows(100, 512)[:, 0].tolist()]
    assert sum(from_z) == pytest.approx(50, abs=2)
    assert sum(from_z[:20]) == pytest.approx(10, abs=2)


def test_orthogonalise_leaves_singular_values_near_one() -> None:
    matrices = torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(0))
    for batch in (matrices, matrices.mT):
        values = torch.linalg.svdvals(orthogonalise(batch).float())
        assert values.min() > 0.5 and values.max() < 1.4


def test_adamw_follows_torch() -> None:
    start = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    ours, theirs = start.clone(), torch.nn.Parameter(start.clone())
    optimizer = AdamW({"w": ours}, weight_decay=0.1)
    oracle = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.1)
    for i in range(20):
        grad = torch.randn(5, 4, generator=torch.Generator().manual_seed(i))
        theirs.grad = grad.clone()
        optimizer.step({"w": grad}, 0.01)
        oracle.step()
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)


def test_muon_refuses_what_is_no_matrix() -> None:
    with pytest.raises(ValueError, match="norm has shape"):
        Muon({"norm": torch.ones(3)})


def test_schedule_rises_stays_and_falls_to_zero() -> None:
    schedule = TrapezoidalSchedule(warmup=10, total=100, decay=20)
    assert schedule(0) == pytest.approx(0.1)
    assert schedule(50) == 1.0
    assert schedule(90) == pytest.approx(0.5)
    assert schedule(100) == 0.0
