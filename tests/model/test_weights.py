"""Checkpoints in memory against transformers: logits, sharding, tying, rope tables, damage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.fixtures import FAMILIES, WINDOW, make_batch, oracle, sample_tokens

from lorikeet.errors import ModelError
from lorikeet.kernels.reference import ReferenceOps
from lorikeet.kernels.weight import DenseWeight
from lorikeet.model.decoder import DecoderWeights, forward
from lorikeet.model.names import EMBED, FINAL_NORM, HEAD, MODULES, NORMS, checkpoint_shapes, layer_module
from lorikeet.model.spec import ModelSpec
from lorikeet.model.weights import load, load_spec, rope_tables

Checkpoint = Callable[..., Path]


def logprobs(folder: Path, rows: list[torch.Tensor], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    spec, weights = load(folder, dtype)
    with torch.no_grad():
        return forward(spec, weights, make_batch(rows, [None] * len(rows)), ReferenceOps()).log_softmax(-1)


def named_tensors(spec: ModelSpec, weights: DecoderWeights) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor under its published name."""
    yield f"{EMBED}.weight", weights.embed.dequantised()
    for i, layer in enumerate(weights.layers):
        for norm, name in NORMS.items():
            tensor = getattr(layer, norm)
            if tensor is not None:
                yield f"{layer_module(i, name)}.weight", tensor
        for product, group in spec.groups[i].items():
            weight = getattr(layer, product)
            plain, bias = weight.dequantised(), weight.bias
            for site, offset in zip(group.sites, group.offsets, strict=True):
                module = layer_module(i, MODULES[site.role])
                yield f"{module}.weight", plain[offset : offset + site.d_out]
                if bias is not None:
                    yield f"{module}.bias", bias[offset : offset + site.d_out]
    yield f"{FINAL_NORM}.weight", weights.norm
    if not spec.tie_embeddings:
        yield f"{HEAD}.weight", weights.head.dequantised()


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_those_of_transformers(family: str, checkpoint: Checkpoint) -> None:
    folder = checkpoint(family)
    rows = [sample_tokens(1, length, length)[0] for length in (1, 5 * WINDOW, 17)]
    ours = logprobs(folder, rows).split([len(row) for row in rows])
    model = oracle(folder)
    for row, mine in zip(rows, ours, strict=True):
        with torch.no_grad():
            theirs = model(row.unsqueeze(0)).logits[0].log_softmax(-1)
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)


def test_a_window_changes_the_answer(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The parity of the families with a window would mean nothing if the window did not matter."""
    folder = Path(shutil.copytree(checkpoint("mistral"), tmp_path / "wide"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"sliding_window": None}))
    row = sample_tokens(1, 5 * WINDOW)[0]
    difference = (logprobs(folder, [row]) - logprobs(checkpoint("mistral"), [row])).abs()
    assert difference[:WINDOW].max() < 1e-5 < 0.1 < difference[WINDOW:].max()


@pytest.mark.parametrize("family", ["llama-tied", "qwen2", "qwen3"])
def test_every_tensor_is_in_its_place(family: str, checkpoint: Checkpoint) -> None:
    folder = checkpoint(family)
    spec, weights = load(folder, torch.float32)
    stored, ours = load_file(folder / "model.safetensors"), dict(named_tensors(spec, weights))
    assert ours.keys() == stored.keys() == checkpoint_shapes(spec).keys()
    assert all(torch.equal(ours[name], stored[name]) for name in stored)


def test_every_dtype_is_converted_once(checkpoint: Checkpoint) -> None:
    folder = checkpoint("llama", torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        spec, weights = load(folder, dtype)
        tensors = dict(named_tensors(spec, weights))
        assert {tensor.dtype for tensor in tensors.values()} == {dtype}
        assert weights.rope_cos.dtype == torch.promote_types(dtype, torch.float32)
        stored = load_file(folder / "model.safetensors")
        assert all(torch.equal(tensors[name], stored[name].to(dtype)) for name in stored)


def test_a_tied_head_is_the_embedding(checkpoint: Checkpoint) -> None:
    _, weights = load(checkpoint("llama-tied"), torch.float32)
    assert weights.head is weights.embed


def test_make_weight_sees_each_product_once(checkpoint: Checkpoint) -> None:
    made: list[tuple[int, ...]] = []

    def make(weight: torch.Tensor, bias: torch.Tensor | None) -> DenseWeight:
        made.append((*weight.shape, 0 if bias is None else len(bias)))
        return DenseWeight(weight, bias)

    _, weights = load(checkpoint("qwen2"), torch.float32, make)
    assert made == [(128, 64, 128), (64, 64, 0), (224, 64, 0), (64, 112, 0)] * 3
    assert isinstance(weights.head, DenseWeight)  # unrounded logits read it as it lies


def test_shards_are_read_as_one(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model = oracle(checkpoint("qwen3"))
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    row = sample_tokens(1, 20)[0]
    assert torch.equal(logprobs(tmp_path, [row]), logprobs(checkpoint("qwen3"), [row]))


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2"])
def test_rope_tables_are_those_of_transformers(family: str, checkpoint: Checkpoint) -> None:
    folder = checkpoint(family)
    spec = load_spec(folder)
    cos, sin = rope_tables(spec)
    positions = torch.arange(spec.max_context).unsqueeze(0)
    theirs = oracle(folder).model.rotary_emb(torch.zeros(1, dtype=torch.float32), positions)
    for ours, expected in zip((cos, sin), theirs, strict=True):
        torch.testing.assert_close(ours, expected[0, :, : spec.head_dim // 2], atol=2e-5, rtol=0)


@pytest.fixture
def broken(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint("llama-tied"), tmp_path / "broken"))


def rewrite(folder: Path, **change: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    tensors = {**load_file(path), **{name.replace("__", "."): value for name, value in change.items()}}
    save_file({name: value for name, value in tensors.items() if value is not None}, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model__norm__weight": None}, "tensor model.norm.weight is missing"),
        ({"model__norm__weight": torch.ones(63)}, r"model\.norm\.weight: expected \[64\], found \[63\]"),
        ({"model__layers__7__input_layernorm__weight": torch.ones(64)}, r"unexpected tensor model\.layers\.7"),
        ({"model__norm__weight": torch.ones(64, dtype=torch.int8)}, "expected F32 or BF16 .*, found I8"),
        ({"lm_head__weight": torch.ones(320, 64)}, r"lm_head\.weight differs from model\.embed_tokens\.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change: dict[str, Any], message: str, broken: Path) -> None:
    rewrite(broken, **change)
    with pytest.raises(ModelError, match=message):
        load(broken, torch.float32)


def test_harmless_extras_are_read_over(broken: Path) -> None:
    embed = load_file(broken / "model.safetensors")["model.embed_tokens.weight"]
    extra = {"model__layers__0__self_attn__rotary_emb__inv_freq": torch.ones(8), "lm_head__weight": embed.clone()}
    before = logprobs(broken, [sample_tokens(1, 9)[0]])
    rewrite(broken, **extra)
    assert torch.equal(logprobs(broken, [sample_tokens(1, 9)[0]]), before)


def test_files_that_cannot_be_read(broken: Path) -> None:
    path = broken / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        load(broken, torch.float32)
    path.rename(broken / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin: pickled weights are not loaded"):
        load(broken, torch.float32)
    (broken / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor"):
        load(broken, torch.float32)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "../elsewhere.safetensors"}}, "is not the name of a safetensors file beside it"),
        ({"weight_map": {"a": "weights.bin"}}, "is not the name of a safetensors file beside it"),
        ({"weight_map": {"a": "gone.safetensors"}}, r"gone\.safetensors: shard .* is missing"),
        ({"weight_map": {}}, "weight_map: expected a non-empty object"),
        ({}, "weight_map: expected a non-empty object"),
    ],
)
def test_a_broken_index(index: dict[str, Any], message: str, broken: Path) -> None:
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=message):
        load(broken, torch.float32)
