"""Tiny random bases, packed batches, recipes and examples for the tests of this room."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from lorikeet.config import AdapterRecipe, TrainData, TrainRecipe, resolve_adapters
from lorikeet.kernels.batch import Batch, Segments
from lorikeet.kernels.weight import DenseWeight
from lorikeet.model.decoder import DecoderWeights, LayerWeights
from lorikeet.model.spec import ModelSpec
from lorikeet.train.dataset import Example


def random_base(
    dtype: torch.dtype = torch.float64, *, seed: int = 0, bias: bool = True, windows: tuple[int | None, ...] = ()
) -> tuple[ModelSpec, DecoderWeights]:
    """Two layers, three query heads a key head, biases and q/k norms; weights large enough that logits spread."""
    spec = ModelSpec(
        family="qwen3", vocab_size=61, hidden_size=24, intermediate_size=40, num_layers=2, num_heads=6,
        num_kv_heads=2, head_dim=8, max_context=640, tie_embeddings=True, qk_norm=True, windows=windows, eos_ids=(0,),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale + shift).to(dtype)

    def linear(d_out: int, d_in: int) -> DenseWeight:
        return DenseWeight(tensor(d_out, d_in, scale=d_in**-0.5), tensor(d_out, scale=0.1) if bias else None)

    h, m = spec.hidden_size, spec.intermediate_size
    layers = [
        LayerWeights(
            attn_norm=tensor(h, scale=0.1, shift=1),
            qkv=linear(spec.q_size + 2 * spec.kv_size, h),
            o=linear(h, spec.q_size),
            mlp_norm=tensor(h, scale=0.1, shift=1),
            gate_up=linear(2 * m, h),
            down=linear(h, m),
            q_norm=tensor(8, scale=0.1, shift=1),
            k_norm=tensor(8, scale=0.1, shift=1),
        )
        for _ in range(spec.num_layers)
    ]
    table = DenseWeight(tensor(spec.vocab_size, h))
    angles = torch.arange(spec.max_context)[:, None] * 100.0 ** (-torch.arange(4) / 4)[None, :]
    wide = torch.promote_types(dtype, torch.float32)
    weights = DecoderWeights(  # the last norm gives logits a standard deviation of about 2
        table,
        layers,
        tensor(h, scale=0.1, shift=0.45),
        table,
        angles.cos().to(wide),
        angles.sin().to(wide),
    )
    return spec, weights


def packed_batch(lengths: Sequence[int], adapters: Sequence[int] | None = None, *, seed: int = 0) -> Batch:
    """Rows of random tokens; `adapters[b]` is the ascending handle of row b. Every token is a logit row."""
    generator = torch.Generator().manual_seed(seed)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    segments = None
    if adapters is not None:
        handles = sorted(set(adapters))
        counts = [sum(n for n, a in zip(lengths, adapters, strict=True) if a == handle) for handle in handles]
        start = [sum(counts[:i]) for i in range(len(counts) + 1)]
        segments = Segments(torch.arange(sum(lengths)), start, handles, contiguous=True)
    return Batch(
        tokens=torch.randint(0, 61, (sum(lengths),), generator=generator),
        positions=torch.cat([torch.arange(n) for n in lengths]),
        query_start=ends.to(torch.int32),
        kv_len=torch.tensor(lengths, dtype=torch.int32),
        max_query=max(lengths),
        max_kv=max(lengths),
        token_segments=segments,
    )


def resolved(name: str = "a", **settings: Any) -> AdapterRecipe:
    """A resolved recipe with the given settings; the template is never used."""
    shared = {"data": TrainData(train="x.jsonl"), "prompt": "{a}", "completion": "{b}"}
    recipe = AdapterRecipe(name=name, **{**shared, **settings})
    return resolve_adapters(TrainRecipe(version=1, base="x", output="x", adapters=[recipe]))[0]


def random_examples(count: int, seed: int = 0, *, longest: int = 24, vocabulary: int = 61) -> list[Example]:
    """Rows of 4 to `longest` random tokens of which the last 1 to 3 are learned."""
    generator = random.Random(seed)
    examples = []
    for line in range(1, count + 1):
        tokens = [generator.randrange(vocabulary) for _ in range(generator.randint(4, longest))]
        learned = ((len(tokens) - generator.randint(1, 3), len(tokens)),)
        examples.append(Example(line, tokens, learned, f"{line}", f"{line}"))
    return examples
