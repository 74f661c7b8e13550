"""Adapters whose vocabulary is not the base's, against transformers + peft on a resized model: alone and mixed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests.adapters.resized import COMMON, make_resized, resized, theirs
from tests.fixtures import VOCABULARY, make_adapter, make_batch, make_slab, oracle, sample_tokens

from lorikeet.adapters.compiled import compile_adapter, open_compiled
from lorikeet.adapters.files import CONFIG, WEIGHTS
from lorikeet.errors import AdapterError
from lorikeet.kernels.cpu import CpuOps
from lorikeet.kernels.reference import ReferenceOps
from lorikeet.model.decoder import forward
from lorikeet.model.sources import checkpoint_files, identify
from lorikeet.model.weights import load
from lorikeet.types import AdapterInfo

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # peft's: of what it saves, and of tied weights
MORE, FEWER = VOCABULARY + 3, VOCABULARY - 12
ROWS = [5, 9, *range(VOCABULARY, MORE)]
BOTH = ["embed_tokens", "lm_head"]
PAIRS = ["v_proj", "embed_tokens", "lm_head"]
# kind -> tokens of the resized model, fields of the config; `trained_only` False: as peft saves it by default
KINDS: dict[str, tuple[int, dict[str, Any]]] = {
    "both saved": (MORE, {"modules_to_save": BOTH, "trained_only": False}),
    "both saved, nothing else": (MORE, {"modules_to_save": BOTH}),
    "padded": (VOCABULARY + 64, {"modules_to_save": BOTH}),
    "embedding saved": (MORE, {"modules_to_save": ["embed_tokens"], "trained_only": False}),
    "resized only": (MORE - 1, {"trained_only": False}),
    "pairs on both": (MORE, {"target_modules": PAIRS, "trained_only": False}),
    "pair on the embedding": (MORE, {"target_modules": PAIRS[:2], "trained_only": False}),
    "dora on the head": (
        MORE,
        {"target_modules": ["lm_head"], "use_dora": True, "modules_to_save": ["embed_tokens"], "trained_only": False},
    ),
    "rows": (MORE, {"trainable_token_indices": ROWS, "trained_only": False}),
    "rows, nothing else": (MORE, {"trainable_token_indices": ROWS[::-1]}),
    "rows of both": (MORE, {"trainable_token_indices": {"embed_tokens": ROWS, "lm_head": ROWS[1:]}}),
    "same rows of both": (
        MORE,
        {"trainable_token_indices": {"embed_tokens": ROWS, "lm_head": ROWS}, "trained_only": False},
    ),
    "saved and tied": (MORE, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "pairs, tied": (MORE, {"target_modules": PAIRS[:2], "ensure_weight_tying": True, "trained_only": False}),
    "fewer": (FEWER, {"modules_to_save": BOTH}),
    "fewer, rows": (FEWER, {"trainable_token_indices": [5, 9], "trained_only": False}),
    "ia3, both saved": (MORE, {"kind": "ia3", "modules_to_save": BOTH, "trained_only": False}),
    "ia3, resized only": (MORE, {"kind": "ia3", "trained_only": False}),
    "vera, embedding saved": (MORE, {"kind": "vera", "modules_to_save": ["embed_tokens"], "trained_only": False}),
    "as many": (VOCABULARY, {"modules_to_save": BOTH}),
}
UNTIED = [
    "both saved", "both saved, nothing else", "padded", "embedding saved", "resized only", "pairs on both",
    "dora on the head", "rows", "rows of both", "same rows of both", "fewer", "fewer, rows", "as many",
    "ia3, both saved", "ia3, resized only", "vera, embedding saved",
]  # fmt: skip
TIED = [
    "both saved", "embedding saved", "resized only", "pair on the embedding", "pairs on both", "dora on the head",
    "rows", "rows, nothing else", "rows of both", "same rows of both", "saved and tied", "pairs, tied", "fewer",
    "fewer, rows", "ia3, both saved", "ia3, resized only", "vera, embedding saved",
]  # fmt: skip


def make(kind: str, base: Path, folder: Path, seed: int = 0) -> Path:
    tokens, fields = KINDS[kind]
    return make_resized(base, folder, tokens, seed, **fields)


def compiled(folder: Path, base: Path, cache: Path) -> AdapterInfo:
    spec, files = load(base, torch.float32)[0], checkpoint_files(base)
    return compile_adapter(folder, spec, identify(base), "float32", cache, checkpoint=files)


@pytest.mark.parametrize(("family", "kinds"), [("llama", UNTIED), ("llama-tied", TIED), ("qwen2", UNTIED[:3])])
def test_own_vocabularies_in_a_mixed_batch_are_pefts(
    family: str, kinds: list[str], checkpoint: Callable[..., Path], tmp_path: Path, cache: Path
) -> None:
    base = checkpoint(family)
    folders = [make(kind, base, tmp_path / str(i), i) for i, kind in enumerate(kinds)]
    folders.append(make_adapter(base, tmp_path / "plain"))
    names, sizes = [*kinds, "plain"], [*(KINDS[kind][0] for kind in kinds), VOCABULARY]
    chosen: list[int | None] = [*range(len(folders)), None, 0]
    rows = [sample_tokens(1, 20 + i, 100 + i)[0].clamp(max=FEWER - 1) for i in range(len(chosen))]
    for row, handle in zip(rows, chosen, strict=True):
        if handle is not None and sizes[handle] > VOCABULARY:
            row[3:9:2] = torch.tensor([VOCABULARY, sizes[handle] - 1, VOCABULARY + 1])
    spec, weights = load(base, torch.float32)
    infos = [compiled(folder, base, cache) for folder in folders]
    assert [info.vocab_size or VOCABULARY for info in infos] == sizes
    slab = make_slab([Path(info.path) for info in infos], spec)
    with torch.no_grad():
        expected = [
            (oracle(base) if handle is None else theirs(base, folders[handle], sizes[handle]))(row.unsqueeze(0))
            for row, handle in zip(rows, chosen, strict=True)
        ]
        lengths = [len(row) for row in rows]
        for ops in (ReferenceOps(), CpuOps()):
            mixed = forward(spec, weights, make_batch(rows, chosen), ops, slab).split(lengths)  # type: ignore[arg-type]
            for ours, reply, handle in zip(mixed, expected, chosen, strict=True):
                name, tokens = ("base", VOCABULARY) if handle is None else (names[handle], sizes[handle])
                logprobs = reply.logits[0].log_softmax(-1)
                assert logprobs.shape[1] == tokens, name
                torch.testing.assert_close(
                    ours[:, :tokens].log_softmax(-1), logprobs, atol=1e-4, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
                )


def test_rows_that_are_the_bases_are_not_stored(checkpoint: Callable[..., Path], tmp_path: Path, cache: Path) -> None:
    """Tables of 323 rows, of which the embedding differs in five, and the head in the three new ones."""
    base = checkpoint("llama")
    compact = compiled(make("rows", base, tmp_path / "rows"), base, cache)
    overrides = open_compiled(Path(compact.path)).header.overrides
    assert [(one.role, one.index) for one in overrides] == [("embed", tuple(ROWS)), ("head", tuple(ROWS[2:]))]
    whole = compiled(make("both saved", base, tmp_path / "both"), base, cache)
    assert [(one.role, one.index) for one in open_compiled(Path(whole.path)).header.overrides] == [
        ("embed", None), ("head", None),
    ]  # fmt: skip
    fewer = compiled(make("fewer, rows", base, tmp_path / "fewer"), base, cache)
    assert [one.index for one in open_compiled(Path(fewer.path)).header.overrides] == [(5, 9)]


def test_what_modules_to_save_names_is_another_adapter(
    checkpoint: Callable[..., Path], tmp_path: Path, cache: Path
) -> None:
    """On a tied base the same file is another model where its embedding is a copy, and its hash is another."""
    base = checkpoint("llama-tied")
    folder = make("resized only", base, tmp_path / "resized")
    tensors = {k: v + 0.1 if "embed" in k else v for k, v in load_file(folder / WEIGHTS).items() if "lm_head" not in k}
    save_file(tensors, folder / WEIGHTS)
    parameter = compiled(folder, base, cache)
    rewrite(folder, modules_to_save=["embed_tokens"])
    with pytest.raises(AdapterError, match=r"lm_head: expected rows for 322 tokens, the base has 320"):
        compiled(folder, base, cache)
    rewrite(folder, ensure_weight_tying=True)
    assert compiled(folder, base, cache).digest != parameter.digest


def rewrite(folder: Path, **fields: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def without(text: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {name: value for name, value in tensors.items() if text not in name}


def shorter(text: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {n: v[:-1].contiguous() if text in n else v for n, v in tensors.items()}


def changed(text: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {n: v + 1 if text in n else v for n, v in tensors.items()}


@pytest.mark.parametrize(
    ("family", "kind", "change", "message"),
    [
        ("llama", "rows, nothing else", None, r"lm_head: expected rows for 323 tokens, the base has 320; 3 rows are"),
        ("llama", "pair on the embedding", None, r"lm_head: expected rows for 323 tokens"),
        ("llama", "both saved, nothing else", shorter("lm_head"), r"same number of tokens, found .* 323, .* 322"),
        ("llama", "pairs on both", without("base_layer"), r"embed_tokens: expected rows for 323 tokens"),
        ("llama", "both saved", changed("lm_head.modules"), r"lm_head\.weight is there twice, with different values"),
        ("llama-tied", "embedding saved", without("lm_head"), None),  # that of the embedding's original is the head
        ("llama-tied", "embedding saved", changed("lm_head"), r"base_layer\.weight and lm_head\.weight have different"),
        ("llama-tied", "same rows of both", changed("lm_head.token_adapter.t"), r"delta and lm_head.* have different"),
    ],
)  # fmt: skip
def test_what_is_not_all_there_is_refused_by_name(
    family: str,
    kind: str,
    change: Any,
    message: str | None,
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    cache: Path,
) -> None:
    base = checkpoint(family)
    folder = make(kind, base, tmp_path / "adapter")
    if change is not None:
        save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)
    if message is None:
        compiled(folder, base, cache)
        return
    with pytest.raises(AdapterError, match=message) as caught:
        compiled(folder, base, cache)
    assert caught.value.status == 422 and caught.value.param


def test_a_gap_between_added_rows_is_named(checkpoint: Callable[..., Path], tmp_path: Path, cache: Path) -> None:
    base = checkpoint("llama-tied")
    folder = make("rows, nothing else", base, tmp_path / "adapter")
    rewrite(folder, trainable_token_indices=[5, 9, 320, 10**9, 322])
    with pytest.raises(AdapterError, match=r"embed_tokens: expected rows for 1000000001 tokens.* the first is 321"):
        compiled(folder, base, cache)


def test_an_activated_adapter_has_no_tables_of_its_own(
    checkpoint: Callable[..., Path], tmp_path: Path, cache: Path
) -> None:
    base = checkpoint("llama")
    folder = make("both saved", base, tmp_path / "adapter")
    rewrite(folder, alora_invocation_tokens=[7, 8])
    with pytest.raises(AdapterError, match="alora_invocation_tokens: expected nothing trained but pairs, found embed"):
        compiled(folder, base, cache)


def test_a_checkpoint_of_a_resized_adapter_cannot_be_merged(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    from lorikeet.adapters.merge import merge, read_source
    from lorikeet.types import MergeSpec

    folder = make("resized only", checkpoint("llama"), tmp_path / "one")
    other = Path(shutil.copytree(folder, tmp_path / "two"))
    with pytest.raises(AdapterError, match=r"weight: only pairs on linear layers can be merged"):
        merge(MergeSpec(adapters=("one", "two"), weights=(1.0, 1.0)), [read_source(folder), read_source(other)])


@st.composite
def training(draw: st.DrawFn) -> tuple[int, bool | str, dict[str, Any]]:
    """A number of tokens, how peft saves, and fields of the config."""
    tokens = draw(st.sampled_from((FEWER, VOCABULARY, VOCABULARY + 1, MORE, VOCABULARY + 64)))
    targets = draw(st.lists(st.sampled_from(("q_proj", *BOTH)), min_size=1, max_size=3, unique=True))
    rows = st.lists(st.integers(6, tokens - 1), min_size=1, max_size=4, unique=True)
    every = st.just([7, *range(VOCABULARY, tokens)])
    options = {
        "modules_to_save": st.lists(st.sampled_from(BOTH), min_size=1, max_size=2, unique=True),
        "trainable_token_indices": st.one_of(
            rows, every, st.fixed_dictionaries({"embed_tokens": every, "lm_head": st.one_of(every, rows)})
        ),
        "ensure_weight_tying": st.just(True),
        "use_dora": st.just(True),
    }
    names = draw(st.lists(st.sampled_from(sorted(options)), max_size=2, unique=True))
    return tokens, draw(st.sampled_from(("auto", "auto", True, False))), {
        "target_modules": targets, **{name: draw(options[name]) for name in names}
    }  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_what_peft_writes_of_any_vocabulary_is_the_same_here_or_refused(
    family: str, checkpoint: Callable[..., Path], tmp_path: Path, cache: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    base = checkpoint(family)
    spec, weights = load(base, torch.float32)
    outcomes: dict[str, int] = {"same": 0, "refused": 0}

    @settings(
        max_examples=40,
        phases=[Phase.generate],
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(training(), st.integers(0, 99))
    def check(trained: tuple[int, bool | str, dict[str, Any]], seed: int) -> None:
        tokens, saves, fields = trained
        targeted = [name for name in BOTH if name in fields["target_modules"]]
        folder = tmp_path / "adapter"
        shutil.rmtree(folder, ignore_errors=True)
        row = sample_tokens(1, 24, seed)[0].clamp(max=FEWER - 1)
        row[4], row[9] = tokens - 1, min(VOCABULARY, tokens - 1)
        model = resized(base, tokens)
        with torch.no_grad():
            torch.manual_seed(seed)
            try:
                adapted = get_peft_model(model, LoraConfig(**{**COMMON, **fields})).eval()
                adapted(row.unsqueeze(0))
            except (ValueError, KeyError, TypeError, AttributeError, NotImplementedError, RuntimeError):
                return  # peft does not take it either
            for name, parameter in adapted.named_parameters():
                if parameter.requires_grad:
                    parameter.mul_(0.2) if "lora" in name else parameter.add_(0.03 * torch.randn_like(parameter))
            expected = adapted(row.unsqueeze(0)).logits[0].log_softmax(-1)
            adapted.save_pretrained(str(folder), save_embedding_layers=saves)
        try:
            info = compiled(folder, base, cache)
        except AdapterError as error:
            assert error.status == 422 and error.param, error.message
            # Everything is in the file where peft saved tables by itself, or none have more rows than the base's.
            complete = tokens <= VOCABULARY or (saves != False and not targeted)  # noqa: E712 (it may be a text)
            assert not complete or "DoRA of the embedding" in error.message, error.message
            outcomes["refused"] += 1
            return
        known = info.vocab_size or VOCABULARY
        if known < tokens:  # nothing in the file says that there were more
            assert not saves
            return
        with torch.no_grad():
            logits = forward(spec, weights, make_batch([row], [0]), ReferenceOps(), make_slab([Path(info.path)], spec))
        torch.testing.assert_close(logits[:, :tokens].log_softmax(-1), expected, atol=1e-4, rtol=0)
        outcomes["same"] += 1

    check()
    assert outcomes["same"] >= 15 and outcomes["refused"] >= 3, outcomes
