"""Writing a pretrained model as a Hugging Face Llama folder with its tokenizer and its model card."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from lorikeet.model.spec import ModelSpec
from lorikeet.train.pretrain_recipe import Recipe
from lorikeet.train.tokenizer import END_OF_TEXT, PAD, SPECIAL_TOKENS, save_tokenizer


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What the model card says of the run. `rows` and `bits_per_byte` (held-out text) are by source."""

    step: int
    tokens: int
    core_hours: float
    finished: bool
    rows: Mapping[str, int]
    bits_per_byte: Mapping[str, float]


def export_model(
    folder: Path, recipe: Recipe, spec: ModelSpec, masters: Mapping[str, Tensor], tokenizer: Tokenizer, facts: RunFacts
) -> None:
    """Write config, bf16 weights, tokenizer, generation settings and card; each file replaces its old one whole."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        new = Path(name)
        weights = {key: value.to("cpu", torch.bfloat16).contiguous() for key, value in masters.items()}
        save_file(weights, str(new / "model.safetensors"), metadata={"format": "pt"})
        _write_json(new / "config.json", hugging_face_config(spec))
        eos = list(spec.eos_ids)
        _write_json(new / "generation_config.json", {"eos_token_id": eos, "pad_token_id": SPECIAL_TOKENS.index(PAD)})
        save_tokenizer(tokenizer, new, spec.max_context)
        count = sum(value.numel() for value in masters.values())
        (new / "README.md").write_text(model_card(recipe, spec, count, facts), encoding="utf-8")
        for file in sorted(new.iterdir()):
            file.chmod(0o644)  # safetensors writes for the owner alone
            os.replace(file, folder / file.name)


def hugging_face_config(spec: ModelSpec) -> dict[str, object]:
    """`config.json` of a LlamaForCausalLM."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "max_position_embeddings": spec.max_context,
        "rms_norm_eps": spec.norm_eps,
        "rope_theta": spec.rope_theta,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": spec.tie_embeddings,
        "bos_token_id": None,
        "eos_token_id": list(spec.eos_ids),
        "pad_token_id": SPECIAL_TOKENS.index(PAD),
        "torch_dtype": "bfloat16",
    }


def _write_json(path: Path, value: Mapping[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def model_card(recipe: Recipe, spec: ModelSpec, parameters: int, facts: RunFacts) -> str:
    """The README of the folder: shape, data, cost, and bits per byte on text that was held out."""
    plan, rows = recipe.optimization, sum(facts.rows.values())
    table = "\n".join(
        f"| {source.name} | {source.about} | {facts.rows.get(source.name, 0) / max(rows, 1):.0%} "
        f"| {_bits(facts.bits_per_byte.get(source.name))} |"
        for source in recipe.sources
    )
    unfinished = "\nThis is a checkpoint from the middle of the run: its learning rate is not yet zero.\n"
    return f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# {recipe.name}

A small Llama-type decoder that comes with Lorikeet, so that adapters can be trained and served with no download.
It is a base to fine-tune, not an assistant.
{"" if facts.finished else unfinished}
| | |
|---|---|
| parameters | {parameters:,} ({spec.vocab_size * spec.hidden_size:,} of them in the tied embedding) |
| shape | {spec.num_layers} layers, hidden {spec.hidden_size}, {spec.num_heads} heads of {spec.head_dim} \
({spec.num_kv_heads} for keys and values), MLP {spec.intermediate_size} |
| context | {spec.max_context} tokens |
| vocabulary | {spec.vocab_size:,} tokens, byte-level BPE, digits one by one |
| steps | {facts.step:,} of {plan.batch_tokens:,} tokens |
| tokens | {facts.tokens:,} |
| optimizer | Muon for matrices in blocks (peak {plan.muon_lr}), AdamW for the rest (peak {plan.adamw_lr}); \
warm-up, constant, linear decay to zero |
| precision | {recipe.dtype} products, fp32 master weights, shipped in bf16 |
| seed | {recipe.seed} |
| cost | {facts.core_hours:.1f} core-hours of CPU |

| source | what | share of the tokens | bits per byte, held out |
|---|---|---|---|
{table}

Made by `lorikeet pretrain` from `recipes/nano.yaml`. Rows of {plan.length} tokens, and of {spec.max_context} from \
{plan.long_from / 1e6:.0f} M tokens on. `{END_OF_TEXT}` parts documents; the answers in a chat end with `<|end|>`:

```
<|user|>
a question
<|assistant|>
an answer<|end|>
```

The model saw no instructions beyond simple written examples, knows no facts to rely on, and speaks English only.
"""


def _bits(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
