"""Adapters that peft trained on a model of another vocabulary than the base's, with their tokenizers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tests.fixtures import VOCABULARY, oracle

COMMON: dict[str, Any] = {
    "r": 4, "lora_alpha": 8, "init_lora_weights": False, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"],
}  # fmt: skip


def resized(base: Path, tokens: int) -> Any:
    """The transformers model of `base` with so many tokens."""
    model = oracle(base)
    torch.manual_seed(tokens)
    model.resize_token_embeddings(tokens, mean_resizing=False)
    return model


def make_resized(
    base: Path,
    folder: Path,
    tokens: int,
    seed: int = 0,
    *,
    kind: str = "lora",
    trained_only: bool = True,
    loud: float = 1.0,
    **fields: Any,
) -> Path:
    """Write an adapter of a model with so many tokens: random values for everything that is trained.

    `trained_only`: nothing else is saved. Otherwise peft saves the tables where the vocabulary was resized. Rows of
    the head for added tokens are `loud` times as large as others.
    """
    from peft import IA3Config, LoraConfig, VeraConfig, get_peft_model

    config = {
        "lora": lambda: LoraConfig(**{**COMMON, **fields}),
        "ia3": lambda: IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[], **fields),
        "vera": lambda: VeraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj"], **fields),
    }[kind]()

    model = resized(base, tokens)
    torch.manual_seed(seed)
    with torch.no_grad():
        for table in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            table[VOCABULARY:].normal_(0, 0.16)
        model.get_output_embeddings().weight[VOCABULARY:] *= loud
        adapted = get_peft_model(model, config)
        for name, parameter in adapted.named_parameters():
            if not parameter.requires_grad:
                continue
            if "magnitude" in name or "ia3" in name:
                parameter.mul_(1 + 0.4 * torch.randn_like(parameter))
                continue
            is_table = "embed" in name or "lm_head" in name
            if is_table and "lora" in name:
                parameter.mul_(0.2)
            parameter.add_((0.05 if is_table else 0.2) * torch.randn_like(parameter))
    adapted.save_pretrained(str(folder), save_embedding_layers=False if trained_only else "auto")
    return folder


def theirs(base: Path, folder: Path, tokens: int) -> Any:
    """peft's own model with the adapter."""
    from peft import PeftModel

    return PeftModel.from_pretrained(resized(base, tokens), str(folder)).eval()


def save_tokenizer(base: Path, folder: Path, add: Sequence[str] = (), **special: str) -> Path:
    """The base's tokenizer with added tokens, as transformers saves it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(list(add))
    tokenizer.add_special_tokens(special)
    tokenizer.save_pretrained(str(folder))
    return folder
