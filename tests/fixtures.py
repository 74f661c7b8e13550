"""Tiny random checkpoints and adapters whose tests can fail, made by transformers and peft.

Logits have a standard deviation of 2 or more, biases and norms are random, every adapter moves the logprobs by 0.3 on
average. transformers and peft take seconds to import, so they are imported inside the functions.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 320
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
WINDOW = 12  # of the Mistral checkpoint, shorter than the sequences of the tests

_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# name -> (model_type, what differs from the common configuration)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_scaling": _LLAMA3}),
    "llama-tied": (
        "llama",
        {
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        },
    ),
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}),
    "qwen3": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
}


def make_checkpoint(
    family: str, folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any
) -> Path:
    """Write a checkpoint of 3 layers, hidden 64, 4 heads over 2 key-value heads, with its tokenizer, to `folder`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, particular = FAMILIES[family]
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    config = AutoConfig.for_model(model_type, **{**common, **particular, **overrides})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
            else:
                parameter.normal_(0, 0.3 if name.endswith("bias") else 0.16)
        spread = model(sample_tokens(4, 48, seed)).logits.std()
        model.model.norm.weight.mul_(3 / spread)
        model.to(dtype).float()  # the values that a checkpoint of this dtype holds
        assert model(sample_tokens(4, 48, seed)).logits.std() >= 2
    model.to(dtype).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def make_tokenizer(folder: Path) -> Path:
    """Write a byte-level BPE of 320 entries with a chat template to `folder`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "the quick brown fox jumps over the lazy dog and then another one sings of rivers, stars and iron bells "
    tokenizer.train_from_iterator([text * 20], trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@dataclass(frozen=True, kw_only=True)
class AdapterShape:
    """What `make_adapter` makes; the defaults are the smallest interesting adapter."""

    rank: int = 4
    alpha: float = 8
    targets: tuple[str, ...] = LINEAR
    rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    layers: list[int] | None = None


# Sixteen adapters: every rank of the parity tests, different targets, each option of LoRA that is supported.
SHAPES = (
    AdapterShape(rank=1),
    AdapterShape(rank=2, targets=("q_proj", "v_proj")),
    AdapterShape(rank=3, targets=("down_proj",)),
    AdapterShape(rank=5, rslora=True),
    AdapterShape(rank=8, targets=("k_proj", "up_proj")),
    AdapterShape(rank=16, alpha=16, targets=("o_proj", "gate_proj")),
    AdapterShape(rank=24, rslora=True, targets=("q_proj", "down_proj")),
    AdapterShape(rank=64, alpha=32),
    AdapterShape(rank=8, rank_pattern={"q_proj": 3, r"layers\.1\.mlp\.up_proj": 5}),
    AdapterShape(rank=8, alpha_pattern={"v_proj": 24, "layers.2.mlp.down_proj": 2}),
    AdapterShape(rank=2, rslora=True, rank_pattern={"down_proj": 16}, alpha_pattern={"q_proj": 4}),
    AdapterShape(rank=16, layers=[1]),
    AdapterShape(rank=1, targets=("v_proj", "o_proj"), alpha=4),
    AdapterShape(rank=3, targets=("gate_proj",), alpha=6),
    AdapterShape(rank=5, targets=("k_proj", "down_proj")),
    AdapterShape(rank=24, alpha=24, layers=[0, 2]),
)


def make_adapter(
    base: Path,
    folder: Path,
    shape: AdapterShape | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a PEFT LoRA directory for the checkpoint `base`: random A and B that move the logprobs by 0.3 or more.

    The tensors are stored in `dtype`.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    shape = shape or AdapterShape()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokens = sample_tokens(2, 32, seed)
    with torch.no_grad():
        before = next_logprobs(model(tokens).logits, tokens)
        torch.manual_seed(seed)
        config = LoraConfig(
            r=shape.rank,
            lora_alpha=shape.alpha,  # type: ignore[arg-type]
            target_modules=list(shape.targets),
            use_rslora=shape.rslora,
            rank_pattern=dict(shape.rank_pattern),
            alpha_pattern=dict(shape.alpha_pattern),
            layers_to_transform=shape.layers,
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )
        adapted = get_peft_model(model, config)
        parts = [p for name, p in adapted.named_parameters() if "lora_B" in name]
        for _ in range(12):
            moved = (next_logprobs(adapted(tokens).logits, tokens) - before).abs().mean()
            if moved >= 0.3:
                break
            for part in parts:
                part.mul_(1.5)
        assert moved >= 0.3, f"the adapter moves the mean logprob by {moved:.3f} only"
    adapted.to(dtype).save_pretrained(str(folder))
    return folder


def sample_tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids [rows, length] int64, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(SPECIAL), VOCABULARY, (rows, length), generator=generator)


def next_logprobs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Logprob of each token but the first: logits [..., T, V], tokens [..., T] -> [..., T - 1] fp32."""
    logprobs = logits.float().log_softmax(-1)
    return logprobs[..., :-1, :].gather(-1, tokens[..., 1:].unsqueeze(-1)).squeeze(-1)


def make_slab(paths: list[Path], spec: Any, rank: int = 0) -> Any:
    """A reference `Slab` of compiled adapter files: handle i is `paths[i]`, one after the other in one buffer."""
    from lorikeet.adapters.compiled import open_compiled
    from lorikeet.kernels.batch import Slab, SlabOverride

    sites = len(spec.sites) + len(spec.residual_sites)
    table = torch.zeros(len(paths), sites, 5, dtype=torch.int64)
    scale = torch.zeros(len(paths), sites)
    vectors = torch.full((len(paths), sites, 2), -1)
    parts, at, overrides, vocabulary = [], 0, {}, {}
    for handle, path in enumerate(paths):
        compiled = open_compiled(path, rank)
        for e in compiled.header.entries:
            table[handle, e.site] = torch.tensor([at + e.a, at + e.b, e.stride_a, e.stride_b, e.rank])
            scale[handle, e.site] = e.scale
            vectors[handle, e.site] = torch.tensor([-1 if place < 0 else at + place for place in (e.gain, e.shift)])
        overrides[handle] = [
            SlabOverride(
                o.role,
                o.layer,
                at + o.at,
                o.rows,
                o.width,
                o.stride,
                None if o.index is None else torch.tensor(o.index),
            )
            for o in compiled.header.overrides
        ]
        if compiled.header.vocab_size is not None:
            vocabulary[handle] = compiled.header.vocab_size
        part = torch.from_numpy(compiled.data.copy())
        parts.append(part.view(torch.bfloat16) if compiled.header.dtype == "bfloat16" else part)
        at += part.numel()
    return Slab(torch.cat(parts), table, scale, vectors, overrides, vocabulary)


def make_batch(rows: list[torch.Tensor], adapters: list[int | None]) -> Any:
    """A packed `Batch` without cache: `rows[i]` are the token ids of sequence i, `adapters[i]` its handle or None.

    Rows of one adapter need not be neighbours; logits come for every token.
    """
    from lorikeet.kernels.batch import Batch, Segments

    lengths = torch.tensor([len(row) for row in rows])
    start = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    handles = sorted({handle for handle in adapters if handle is not None})
    members = [
        torch.cat([torch.arange(start[i], start[i + 1]) for i, a in enumerate(adapters) if a == handle])
        for handle in handles
    ]
    bounds = [0, *torch.tensor([len(m) for m in members]).cumsum(0).tolist()] if members else [0]
    segments = None
    if members:
        contiguous = all(bool((m.diff() == 1).all()) for m in members)
        segments = Segments(torch.cat(members), bounds, handles, contiguous)
    return Batch(
        tokens=torch.cat(rows),
        positions=torch.cat([torch.arange(len(row)) for row in rows]),
        query_start=start.int(),
        kv_len=lengths.int(),
        max_query=int(lengths.max()),
        max_kv=int(lengths.max()),
        token_segments=segments,
        scaled=True,
        overridden=True,
    )


def oracle(base: Path, adapter: Path | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """The transformers model of `base`, with `adapter` put on by peft; call it as `oracle(...)(tokens).logits`."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    return (model if adapter is None else PeftModel.from_pretrained(model, str(adapter))).eval()
