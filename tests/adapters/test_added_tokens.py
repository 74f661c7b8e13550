"""Adapters whose vocabulary is not the base's, against transformers + peft on a resized model: alone and mixed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.fixtures import VOCABULARY, make_adapter, make_batch, make_slab, oracle, sample_tokens

from lorikeet.adapters.compiled import compile_adapter
from lorikeet.kernels.cpu import CpuOps
from lorikeet.kernels.reference import ReferenceOps
from lorikeet.model.decoder import forward
from lorikeet.model.sources import checkpoint_files, identify
from lorikeet.model.weights import load
from lorikeet.types import AdapterInfo

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # peft's: of what it saves, and of tied weights
ROWS = [5, 9, *range(VOCABULARY, VOCABULARY + 3)]
BOTH = {"modules_to_save": ["embed_tokens", "lm_head"]}
# kind -> (tokens of the resized model, fields of the config, whether only the trained parts are saved)
KINDS: dict[str, tuple[int, dict[str, Any], bool]] = {
    "both saved": (VOCABULARY + 3, BOTH, False),
    "both saved, nothing else": (VOCABULARY + 3, BOTH, True),
    "padded": (VOCABULARY + 64, BOTH, True),
    "embedding saved": (VOCABULARY + 3, {"modules_to_save": ["embed_tokens"]}, False),
    "resized only": (VOCABULARY + 2, {}, False),
    "pairs on both": (VOCABULARY + 3, {"target_modules": ["v_proj", "embed_tokens", "lm_head"]}, False),
    "pair on the embedding": (VOCABULARY + 3, {"target_modules": ["v_proj", "embed_tokens"]}, False),
    "dora on the head": (
        VOCABULARY + 3,
        {"target_modules": ["v_proj", "lm_head"], "use_dora": True, "modules_to_save": ["embed_tokens"]},
        False,
    ),
    "rows": (VOCABULARY + 3, {"trainable_token_indices": ROWS}, False),
    "rows, nothing else": (VOCABULARY + 3, {"trainable_token_indices": ROWS[::-1]}, True),
    "rows of both": (
        VOCABULARY + 3,
        {"trainable_token_indices": {"embed_tokens": ROWS, "lm_head": ROWS[1:]}},
        True,
    ),
    "same rows of both": (VOCABULARY + 3, {"trainable_token_indices": {"embed_tokens": ROWS, "lm_head": ROWS}}, False),
    "saved and tied": (VOCABULARY + 3, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
    "pairs, tied": (
        VOCABULARY + 3,
        {"target_modules": ["v_proj", "embed_tokens"], "ensure_weight_tying": True},
        False,
    ),
    "smaller": (VOCABULARY - 12, BOTH, True),
    "smaller, rows": (VOCABULARY - 12, {"trainable_token_indices": [5, 9]}, False),
    "as large": (VOCABULARY, BOTH, True),
    "ia3": (VOCABULARY + 3, {}, False),
}
UNTIED = [
    "both saved", "both saved, nothing else", "padded", "embedding saved", "resized only", "pairs on both",
    "dora on the head", "rows", "rows of both", "same rows of both", "smaller", "as large",
]  # fmt: skip
TIED = [
    "both saved", "embedding saved", "resized only", "pair on the embedding", "pairs on both", "dora on the head",
    "rows", "rows, nothing else", "rows of both", "same rows of both", "saved and tied", "pairs, tied", "smaller",
]  # fmt: skip


def resized(base: Path, tokens: int) -> Any:
    """The transformers model of `base` with so many tokens."""
    model = oracle(base)
    torch.manual_seed(tokens)
    model.resize_token_embeddings(tokens, mean_resizing=False)
    return model


def make(kind: str, base: Path, folder: Path, seed: int) -> Path:
    """An adapter that peft wrote, with random values for everything that is trained."""
    from peft import LoraConfig, get_peft_model

    tokens, fields, trained_only = KINDS[kind]
    model = resized(base, tokens)
    common = {
        "r": 4,
        "lora_alpha": 8,
        "init_lora_weights": False,
        "task_type": "CAUSAL_LM",
        "target_modules": ["q_proj"],
    }
    torch.manual_seed(seed)
    with torch.no_grad():
        for table in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            table[VOCABULARY:].normal_(0, 0.16)
        adapted = get_peft_model(model, LoraConfig(**{**common, **fields}))
        for name, parameter in adapted.named_parameters():
            if not parameter.requires_grad:
                continue
            if "magnitude" in name:
                parameter.mul_(1 + 0.4 * torch.randn_like(parameter))
            else:
                table = "embed" in name or "lm_head" in name
                if table and "lora" in name:
                    parameter.mul_(0.2)
                parameter.add_((0.05 if table else 0.2) * torch.randn_like(parameter))
    adapted.save_pretrained(str(folder), save_embedding_layers=False if trained_only else "auto")
    return folder


def compiled(folder: Path, base: Path, cache: Path) -> AdapterInfo:
    spec, files = load(base, torch.float32)[0], checkpoint_files(base)
    return compile_adapter(folder, spec, identify(base), "float32", cache, checkpoint=files)


def theirs(base: Path, folder: Path, tokens: int, row: torch.Tensor) -> torch.Tensor:
    """Logprobs of peft's own model."""
    from peft import PeftModel

    return (
        PeftModel.from_pretrained(resized(base, tokens), str(folder)).eval()(row.unsqueeze(0)).logits[0].log_softmax(-1)
    )


@pytest.mark.parametrize(("family", "kinds"), [("llama", UNTIED), ("llama-tied", TIED), ("qwen2", UNTIED[:3])])
@pytest.mark.parametrize("ops", [ReferenceOps, CpuOps])
def test_own_vocabularies_in_a_mixed_batch_are_pefts(
    family: str, kinds: list[str], ops: Any, checkpoint: Callable[..., Path], tmp_path: Path, cache: Path
) -> None:
    base = checkpoint(family)
    folders = [make(kind, base, tmp_path / str(i), i) for i, kind in enumerate(kinds)]
    folders.append(make_adapter(base, tmp_path / "plain"))
    sizes = [*(KINDS[kind][0] for kind in kinds), VOCABULARY]
    chosen: list[int | None] = [*range(len(folders)), None, 0]
    rows = [sample_tokens(1, 20 + i, 100 + i)[0] for i in range(len(chosen))]
    for row, handle in zip(rows, chosen, strict=True):
        row[row >= min(sizes)] = 7
        if handle is not None and sizes[handle] > VOCABULARY:  # every added id is read
            row[3 : 3 + 2 * 3 : 2] = torch.tensor([VOCABULARY, sizes[handle] - 1, VOCABULARY + 1])
    spec, weights = load(base, torch.float32)
    infos = [compiled(folder, base, cache) for folder in folders]
    assert [info.vocab_size or VOCABULARY for info in infos] == sizes
    slab = make_slab([Path(info.path) for info in infos], spec)
    with torch.no_grad():
        mixed = forward(spec, weights, make_batch(rows, chosen), ops(), slab)
        for row, handle, ours in zip(rows, chosen, mixed.split([len(row) for row in rows]), strict=True):
            if handle is None:
                expected, name, tokens = oracle(base)(row.unsqueeze(0)).logits[0].log_softmax(-1), "base", VOCABULARY
            else:
                name, tokens = [*kinds, "plain"][handle], sizes[handle]
                expected = theirs(base, folders[handle], tokens, row)
            assert expected.shape[1] == tokens
            torch.testing.assert_close(
                ours[:, :tokens].log_softmax(-1), expected, atol=1e-4, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
            )
            plain = oracle(base)(row.clamp(max=VOCABULARY - 1).unsqueeze(0)).logits[0].log_softmax(-1)
            if handle is not None and name not in ("resized only",):
                known = min(tokens, VOCABULARY)
                assert (expected[:, :known] - plain[:, :known]).abs().mean() > 0.05, f"{name} changes too little"
