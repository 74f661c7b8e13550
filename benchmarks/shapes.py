"""Random-weight Llama checkpoints and PEFT adapters, made once into a cache folder that every peer can read.

The weights mean nothing; sizes, formats and the cost of a step are those of a real model. Embedding rows of tokens
that are no whole text (single bytes, the end token) are zero: with a tied head greedy decoding never picks them, so
that every token shows in a stream.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice, product
from pathlib import Path
from string import ascii_letters

import torch
from safetensors.torch import save_file

from lorikeet.model.families import load_spec
from lorikeet.model.sources import EMBEDDED, cache_folder, find_model
from lorikeet.model.spec import ModelSpec

_VERSION = 1  # a new one makes everything anew
_HIDDEN_TOKENS = 257  # the end token and the 256 bytes
_MODULES = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama with a tied head."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    mlp: int
    vocabulary: int

    def config(self) -> dict[str, object]:
        """Its `config.json`."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_size,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": 0,
            "pad_token_id": 0,
            "torch_dtype": "bfloat16",
        }


SHAPES = {
    "half": Shape(layers=24, hidden=896, heads=14, kv_heads=2, head_size=64, mlp=4864, vocabulary=32_000),
    "small": Shape(layers=30, hidden=576, heads=9, kv_heads=3, head_size=64, mlp=1536, vocabulary=32_000),
    "tiny": Shape(layers=2, hidden=64, heads=2, kv_heads=1, head_size=32, mlp=128, vocabulary=512),
}
NAMES = ("nano", *SHAPES)  # nano is the embedded base


@dataclass(frozen=True)
class Fixture:
    """A base on disk and the folder in which its adapters lie."""

    name: str
    base: Path
    spec: ModelSpec
    root: Path

    @property
    def model(self) -> str:
        """As `--model` takes it."""
        return EMBEDDED if self.name == "nano" else str(self.base)

    def adapters(self, ranks: Sequence[int]) -> list[Path]:
        """Folders of one adapter for each rank, those made before used again."""
        folders = []
        for i, rank in enumerate(ranks):
            folder = self.root / f"rank-{rank}" / f"adapter-{i}"
            if not folder.exists():
                make_adapter(self.spec, folder, rank, seed=i)
            folders.append(folder)
        return folders


def parameters(spec: ModelSpec) -> int:
    """Of a model without biases and with a tied head."""
    linear = sum(site.d_in * site.d_out for site in spec.sites if site.layer is not None)
    return linear + spec.vocab_size * spec.hidden_size + (2 * spec.num_layers + 1) * spec.hidden_size


def default_cache() -> Path:
    return cache_folder() / "benchmarks"


def fixture(name: str, cache: Path) -> Fixture:
    """The base called `name`, made if it is not there yet."""
    if name == "nano":
        base, root = find_model(None), cache / "nano"
    else:
        shape = SHAPES[name]
        content = json.dumps([_VERSION, asdict(shape)], sort_keys=True)
        root = cache / f"{name}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"
        base = root / name
        if not base.exists():
            _make_base(shape, base)
    return Fixture(name, base, load_spec(base), root)


def make_adapter(spec: ModelSpec, folder: Path, rank: int, seed: int) -> None:
    """Write a PEFT LoRA of `rank` on all seven linear layers, bf16, with a B that is not zero."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for site in spec.sites:
        if site.layer is None:
            continue
        name = f"base_model.model.model.layers.{site.layer}.{_MODULES[site.role]}"
        a, b = torch.randn(rank, site.d_in, generator=draw), torch.randn(site.d_out, rank, generator=draw)
        tensors[f"{name}.lora_A.weight"] = (a * site.d_in**-0.5).bfloat16()
        tensors[f"{name}.lora_B.weight"] = (b * 0.02).bfloat16()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [module.split(".")[1] for module in _MODULES.values()],
    }
    fresh = _fresh(folder)
    (fresh / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, fresh / "adapter_model.safetensors", {"format": "pt"})
    fresh.replace(folder)


def evict(folder: Path) -> None:
    """Ask the system to drop the files of `folder` from its page cache, so that the next reader reads the disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _make_base(shape: Shape, folder: Path) -> None:
    draw = torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return (torch.randn(*size, generator=draw) * size[-1] ** -0.5).bfloat16()

    q, kv = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    sizes = {
        "q": (q, shape.hidden), "k": (kv, shape.hidden), "v": (kv, shape.hidden), "o": (shape.hidden, q),
        "gate": (shape.mlp, shape.hidden), "up": (shape.mlp, shape.hidden), "down": (shape.hidden, shape.mlp),
    }  # fmt: skip
    embed = random(shape.vocabulary, shape.hidden)
    embed[:_HIDDEN_TOKENS] = 0
    ones = torch.ones(shape.hidden, dtype=torch.bfloat16)
    tensors = {"model.embed_tokens.weight": embed, "model.norm.weight": ones}
    for layer in range(shape.layers):
        for role, size in sizes.items():
            tensors[f"model.layers.{layer}.{_MODULES[role]}.weight"] = random(*size)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = ones.clone()
    fresh = _fresh(folder)
    (fresh / "config.json").write_text(json.dumps(shape.config(), indent=2))
    save_file(tensors, fresh / "model.safetensors", {"format": "pt"})
    _write_tokenizer(fresh, shape.vocabulary)
    fresh.replace(folder)


def _write_tokenizer(folder: Path, vocabulary: int) -> None:
    """A byte-level BPE whose tokens beyond the bytes are strings of two and three letters."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    end = "<|end|>"
    pairs = [(a, b) for a, b in product(ascii_letters, repeat=2)]
    triples = (("".join(pair), c) for pair in pairs for c in ascii_letters)
    merges = list(islice((merge for group in (pairs, triples) for merge in group), vocabulary - _HIDDEN_TOKENS))
    tokens = [end, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(merge) for merge in merges)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(end, special=True, normalized=False)])
    assert tokenizer.get_vocab_size() == vocabulary
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _fresh(folder: Path) -> Path:
    """An empty folder beside `folder`, to be renamed when it is whole."""
    fresh = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    return fresh
