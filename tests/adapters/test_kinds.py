"""Every kind of adapter against transformers + peft: checkpoints that peft wrote, alone and mixed in one batch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.adapters.kinds import ALL, LORA, hooked, make, make_fused, write_loreft
from tests.fixtures import make_batch, make_slab, oracle, sample_tokens

from lorikeet.adapters.compiled import compile_adapter
from lorikeet.adapters.configs import CONFIG
from lorikeet.engine.engine import _where
from lorikeet.errors import AdapterError
from lorikeet.kernels.batch import Segments
from lorikeet.kernels.reference import ReferenceOps
from lorikeet.model.decoder import forward
from lorikeet.model.sources import checkpoint_files, identify
from lorikeet.model.weights import load

KINDS = [
    "dora", "dora, rslora", "lora_bias", "bias all", "bias lora_only", "dora, bias all", "ia3",
    "ia3, up and down", "vera", "lora",
]  # fmt: skip


UNTIED = [
    "modules_to_save",
    "head saved",
    "embedding",
    "head",
    "dora on the head",
    "token rows",
    "rows of both",
    "ia3, head saved",
    "ia3, all saved",
    "vera, embedding saved",
    "lora",
]
TIED = [
    "embedding saved", "head saved", "embedding", "head", "both tied", "saved and tied", "token rows",
    "ia3, head saved", "ia3, all saved", "vera, embedding saved", "lora",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")  # of merging, which is not done here
@pytest.mark.filterwarnings("ignore:Adapter .default.. .* have invalid shape")  # peft of its own biases of B
@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2", "qwen3"])
def test_kinds_in_a_mixed_batch_are_pefts(
    family: str, checkpoint: Callable[..., Path], tmp_path: Path, cache: Path
) -> None:
    kinds = KINDS if family == "qwen2" else ["dora", "lora_bias", "ia3", "vera", "lora"]
    check(kinds, checkpoint(family), tmp_path, cache)


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft's: of what it saves, and of tied weights
@pytest.mark.parametrize(("family", "kinds"), [("llama", UNTIED), ("qwen2", UNTIED), ("llama-tied", TIED)])
def test_embedding_head_and_norms_in_a_mixed_batch_are_pefts(
    family: str, kinds: list[str], checkpoint: Callable[..., Path], tmp_path: Path, cache: Path
) -> None:
    check(kinds, checkpoint(family), tmp_path, cache)


def check(kinds: list[str], base: Path, tmp_path: Path, cache: Path) -> None:
    folders = [make(kind, base, tmp_path / str(i), i) for i, kind in enumerate(kinds)]
    chosen: list[int | None] = [*range(len(folders)), None, 0]
    rows = [sample_tokens(1, 20 + i, 100 + i)[0] for i in range(len(chosen))]
    spec, weights = load(base, torch.float32)
    files = checkpoint_files(base)
    infos = [compile_adapter(folder, spec, identify(base), "float32", cache, checkpoint=files) for folder in folders]
    slab = make_slab([Path(info.path) for info in infos], spec)
    with torch.no_grad():
        mixed = forward(spec, weights, make_batch(rows, chosen), ReferenceOps(), slab).log_softmax(-1)
        for row, handle, ours in zip(rows, chosen, mixed.split([len(row) for row in rows]), strict=True):
            theirs = oracle(base, None if handle is None else folders[handle])(row.unsqueeze(0)).logits[0]
            name = "base" if handle is None else kinds[handle]
            torch.testing.assert_close(
                ours, theirs.log_softmax(-1), atol=1e-4, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_fused_names_are_their_parts(checkpoint: Callable[..., Path], tmp_path: Path, cache: Path) -> None:
    base = checkpoint("llama")
    spec, weights = load(base, torch.float32)
    plain = make_fused(base, tmp_path / "fused")
    row, logits = sample_tokens(1, 30, 7)[0], []
    for folder in (plain, tmp_path / "fused"):
        slab = make_slab([Path(compile_adapter(folder, spec, identify(base), "float32", cache).path)], spec)
        with torch.no_grad():
            logits.append(forward(spec, weights, make_batch([row], [0]), ReferenceOps(), slab))
    torch.testing.assert_close(logits[1], logits[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type: expected 'LORA' or 'IA3' or 'VERA' or 'LOREFT', found 'LOHA'"),
        ({"peft_type": "PREFIX_TUNING"}, "peft_type: .* found 'PREFIX_TUNING'"),
        ({"bias": "some"}, "bias: expected 'none', 'all' or 'lora_only', found 'some'"),
        ({"alora_invocation_tokens": ["a"]}, "alora_invocation_tokens: expected a list of token ids"),
        ({"modules_to_save": [3]}, "modules_to_save: expected a list of module names"),
        ({"trainable_token_indices": [3, 3]}, "trainable_token_indices: expected each token id once"),
    ],
)
def test_what_has_no_normal_form_is_refused_by_name(
    change: dict[str, Any], message: str, adapters: Callable[..., list[Path]], tmp_path: Path
) -> None:
    import shutil

    from lorikeet.adapters.configs import read_config

    folder = Path(shutil.copytree(adapters("llama", 1)[0], tmp_path / "adapter"))
    (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | change))
    with pytest.raises(AdapterError, match=message):
        read_config(folder)


def test_an_input_vector_elsewhere_than_on_down_is_refused(
    checkpoint: Callable[..., Path], tmp_path: Path, cache: Path
) -> None:
    from peft import IA3Config, get_peft_model

    base = checkpoint("llama")
    config = IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj"], feedforward_modules=["q_proj"])
    get_peft_model(oracle(base), config).save_pretrained(str(tmp_path / "ia3"))
    with pytest.raises(AdapterError, match="feedforward_modules names model.layers.0.self_attn.q_proj"):
        compile_adapter(tmp_path / "ia3", load(base, torch.float32)[0], identify(base), "float32", cache)


@pytest.mark.parametrize(("family", "options"), [("llama", {}), ("qwen2", {"use_rslora": True, "r": 3})])
def test_activated_lora_is_pefts(
    family: str, options: dict[str, Any], checkpoint: Callable[..., Path], tmp_path: Path, cache: Path
) -> None:
    """peft's own forward pass with its own offsets: rows of one batch with invocations at different places."""
    from peft import LoraConfig, get_peft_model

    base, invocation = checkpoint(family), [7, 8, 9]
    settings = {**LORA, "target_modules": ALL, "alora_invocation_tokens": invocation, **options}
    adapted = get_peft_model(oracle(base), LoraConfig(**settings))
    adapted.save_pretrained(str(tmp_path / "alora"))
    spec, weights = load(base, torch.float32)
    info = compile_adapter(tmp_path / "alora", spec, identify(base), "float32", cache)
    assert (info.kind, info.invocation) == ("alora", tuple(invocation))
    rows = sample_tokens(6, 24, 5)
    rows[rows == invocation[0]] = 10  # no invocation by chance
    places = [(0,), (5,), (3, 17), (21,), (20, 2), (11, 12)]  # the last one of each row counts; 21 is the very end
    for row, starts in zip(rows, places, strict=True):
        for start in starts:
            row[start : start + 3] = torch.tensor(invocation)
    rows[5, 11:15] = torch.tensor([7, 7, 8, 9])  # one that breaks off where the next begins
    acting = [_where(row.tolist(), info)[0] for row in rows]
    assert [begin for begin, _ in acting] == [0, 5, 17, 21, 20, 12]
    batch = make_batch(list(rows), [0] * 6)
    active = torch.cat([24 * i + torch.arange(begin, 24) for i, (begin, _) in enumerate(acting)])
    batch.token_segments = Segments(active, [0, len(active)], [0], False)
    with torch.no_grad():
        ours = forward(spec, weights, batch, ReferenceOps(), make_slab([Path(info.path)], spec)).log_softmax(-1)
        theirs = oracle(base, tmp_path / "alora")(input_ids=rows).logits.log_softmax(-1)
        plain = oracle(base)(rows).logits.log_softmax(-1)
    assert (theirs - plain).abs().amax(-1).bool().sum() == len(active)  # and the base's before them
    assert (theirs - plain)[0].abs().mean() > 0.1
    torch.testing.assert_close(ours, theirs.flatten(0, 1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("layers", [[1], [0, 2]])
def test_loreft_is_a_hook_on_the_stream(
    layers: list[int], checkpoint: Callable[..., Path], tmp_path: Path, cache: Path
) -> None:
    base = checkpoint("llama")
    spec, weights = load(base, torch.float32)
    tensors = write_loreft(tmp_path / "reft", spec.hidden_size, layers, 3)
    info = compile_adapter(tmp_path / "reft", spec, identify(base), "float32", cache)
    assert (info.kind, info.positions, info.max_rank) == ("loreft", (2, 3, 0), 4)
    row = sample_tokens(1, 20, 8)[0]
    places = [0, 1, 17, 18, 19]
    model = hooked(base, tensors, lambda tokens: places)
    with torch.no_grad():
        plain = oracle(base)(row.unsqueeze(0)).logits[0].log_softmax(-1)
        theirs = model(row.unsqueeze(0)).logits[0].log_softmax(-1)
        batch = make_batch([row], [0])
        batch.token_segments = Segments(torch.tensor(places), [0, len(places)], [0], False)
        ours = forward(spec, weights, batch, ReferenceOps(), make_slab([Path(info.path)], spec)).log_softmax(-1)
    assert (theirs - plain).abs().mean() > 0.05
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": [7]}, "layers: expected numbers below 3, found 7"),
        ({"layers": [1]}, r"reft\.layers\.0\.\w+: adapter_config\.json says nothing of it"),
        ({"first_positions": 0, "last_positions": 0}, "first_positions: expected a position to act on"),
        ({"r": 5}, r"reft\.layers\.0\.rotate: expected \[64, 5\], found \[64, 4\]"),
        ({"component": "mlp_activation"}, "component: expected no such field, found 'mlp_activation'"),
    ],
)
def test_interventions_that_do_not_fit_are_named(
    change: dict[str, Any], message: str, checkpoint: Callable[..., Path], tmp_path: Path, cache: Path
) -> None:
    base = checkpoint("llama")
    write_loreft(tmp_path / "reft", 64, [0, 2], 3)
    path = tmp_path / "reft" / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(AdapterError, match=message):
        compile_adapter(tmp_path / "reft", load(base, torch.float32)[0], identify(base), "float32", cache)
