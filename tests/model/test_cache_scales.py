"""Scales of an fp8 cache: what keys and values reach, by transformers' own cache, and what a checkpoint says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lorikeet.errors import ModelError
from lorikeet.kernels.reference import ReferenceOps
from lorikeet.model import cache_scales
from lorikeet.model.cache_scales import LARGEST, ROOM, find_scales, of_checkpoint, stored_names
from lorikeet.model.shard import Shard
from lorikeet.model.weights import load


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_the_largest_keys_and_values_are_those_of_transformers(
    family: str, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In sequences of a length that does not divide the tokens, with biases, windows and norms of q and k."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(cache_scales, "ROW", 48)
    spec, weights = load(checkpoint(family), torch.float32)
    found = find_scales(spec, weights, ReferenceOps(), 100)
    model = AutoModelForCausalLM.from_pretrained(checkpoint(family), dtype=torch.float32)
    batch = cache_scales._batch(spec, 100, "cpu")
    keys, values = torch.zeros(2, spec.num_layers, spec.num_kv_heads)
    for tokens in batch.tokens.split(batch.query_start.diff().tolist()):
        with torch.no_grad():
            cache = model(tokens[None]).past_key_values
        for i, layer in enumerate(cache.layers):
            keys[i] = torch.maximum(keys[i], layer.keys.abs().amax((0, 2, 3)))
            values[i] = torch.maximum(values[i], layer.values.abs().amax((0, 2, 3)))
    for i, (k, v) in enumerate(found):
        assert k.dtype == v.dtype == torch.float32
        reach_k, reach_v = k * LARGEST / ROOM, v * LARGEST / ROOM
        assert (keys[i] <= reach_k).all() and (reach_k <= 2 * 2**0.5 * keys[i]).all()
        assert (values[i] <= reach_v * 1.00001).all() and (reach_v <= 2.00001 * values[i]).all()
    assert numbers(find_scales(spec, weights, ReferenceOps(), 100)) == numbers(found)


@given(st.floats(2**-60, 2**60, width=32))
def test_a_scale_is_a_power_of_two_with_room(largest: float) -> None:
    scale = cache_scales._scale(torch.tensor([largest])).item()
    assert torch.frexp(torch.tensor(scale)).mantissa == 0.5
    assert ROOM * largest <= scale * LARGEST * 1.000001 <= 2.00001 * ROOM * largest


def test_heads_that_say_nothing() -> None:
    assert cache_scales._scale(torch.tensor([0.0, 448.0, torch.nan, torch.inf])).tolist() == [1.0, 2 * ROOM, 1.0, 1.0]


def test_no_position_turns_a_key_beyond_its_reach() -> None:
    k = torch.randn(1, 2, 8).expand(4000, 2, 8) * torch.tensor([[[1.0], [30.0]]])
    angle = torch.outer(torch.arange(4000.0), 0.1 ** torch.arange(4))
    turned = ReferenceOps().rope(k, angle.cos(), angle.sin()).abs().amax((0, 2))
    reach = cache_scales._reach(k[:1])
    assert (turned <= reach * 1.0001).all() and (turned >= reach * 0.99).all()


def test_tokens_are_from_all_of_the_vocabulary() -> None:
    class Spec:
        vocab_size, max_context = 128_256, 8192

    batch = cache_scales._batch(Spec(), 1024, "cpu")  # type: ignore[arg-type]
    tokens = batch.tokens.sort().values
    assert len(tokens.unique()) == 1024 and int(tokens.diff().max()) < 1000 and int(tokens[-1]) < 128_256
    assert batch.kv_len.tolist() == [256] * 4 and batch.positions[255:257].tolist() == [255, 0]
    short = cache_scales._batch(Spec(), 300, "cpu")  # type: ignore[arg-type]
    assert short.kv_len.tolist() == [256, 44] and short.query_start.dtype == torch.int32


# --- in a checkpoint ----------------------------------------------------------------------------------------------


def stored(spec: Any, shape: tuple[int, ...] = (1,)) -> dict[str, torch.Tensor]:
    numbers = torch.arange(1.0, 100.0)
    made = {}
    for layer in range(spec.num_layers):
        for i, side in enumerate("kv"):
            count = int(torch.tensor(shape).prod())
            made[f"model.layers.{layer}.self_attn.{side}_scale"] = numbers[2 * layer + i :][:count].reshape(shape)
    return made


@pytest.mark.parametrize("shape", [(), (1,), (4,), (4, 1, 1)])
def test_a_rank_takes_the_scales_of_its_heads(small_spec: Any, shape: tuple[int, ...]) -> None:
    spec = replace(small_spec, num_kv_heads=4, num_heads=8)
    tensors = stored(spec, shape)
    assert [name for pair in stored_names(spec) for name in pair] == list(tensors)
    whole = of_checkpoint(tensors, tensors.__getitem__, Shard(spec))
    assert whole is not None and len(whole) == spec.num_layers
    for layer, (k, v) in enumerate(whole):
        assert (
            k.tolist()
            == tensors[f"model.layers.{layer}.self_attn.k_scale"]
            .expand(4 if shape in ((), (1,)) else shape)
            .flatten()
            .tolist()
        )
        assert k.shape == v.shape == (4,) and k.dtype == torch.float32
    for ranks in (2, 8):  # of 8, two hold the same head
        for rank in range(ranks):
            mine = of_checkpoint(tensors, tensors.__getitem__, Shard(spec, rank, ranks))
            assert mine is not None
            first, count = rank * 4 // ranks, max(4 // ranks, 1)
            for (k, v), (all_k, all_v) in zip(mine, whole, strict=True):
                assert torch.equal(k, all_k[first : first + count]) and torch.equal(v, all_v[first : first + count])


def test_what_a_checkpoint_cannot_say(small_spec: Any) -> None:
    tensors = stored(small_spec)
    assert of_checkpoint({}, tensors.__getitem__, Shard(small_spec)) is None
    some = dict(list(tensors.items())[:-1])
    with pytest.raises(ModelError, match=r"layers.1.self_attn.v_scale is missing \(1 of 4 scales"):
        of_checkpoint(some, some.__getitem__, Shard(small_spec))
    name = "model.layers.0.self_attn.k_scale"
    for value, said in ((torch.ones(3), "expected 1 number or 2, .* found 3"), (torch.tensor(-1.0), "above zero")):
        with pytest.raises(ModelError, match=said) as refused:
            of_checkpoint(tensors, (tensors | {name: value}).__getitem__, Shard(small_spec))
        assert refused.value.param == name


CACHE_ALONE: dict[str, Any] = {  # as llm-compressor writes it
    "quant_method": "compressed-tensors", "format": "dense", "ignore": ["lm_head"], "quantization_status": "frozen",
    "config_groups": {}, "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True},
}  # fmt: skip
OF_WEIGHTS = {"config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float"}}}}


def numbers(scales: Any) -> list[list[list[float]]]:
    return [[side.tolist() for side in pair] for pair in scales]


def with_scales(plain: Path, folder: Path, quantised: dict[str, Any], more: dict[str, torch.Tensor]) -> Path:
    shutil.copytree(plain, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantised}))
    save_file(load_file(folder / "model.safetensors") | more, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_scales_of_a_checkpoint_are_used(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    plain = checkpoint("qwen3")
    spec, without = load(plain, torch.float32)
    assert without.cache_scales is None
    tensors = {name: value.bfloat16() for name, value in stored(spec, (2,)).items()}
    folder = with_scales(plain, tmp_path / "quantised", CACHE_ALONE, tensors)
    for ranks in (1, 2):
        for rank in range(ranks):
            _, weights = load(folder, torch.float32, rank=rank, ranks=ranks)
            expected = of_checkpoint(tensors, tensors.__getitem__, Shard(spec, rank, ranks))
            assert numbers(weights.cache_scales) == numbers(expected)
    _, weights = load(folder, torch.float32)
    assert weights.cache_scales is not None
    roomy = replace(weights, cache_scales=[(k / 16, v / 16) for k, v in weights.cache_scales])
    assert numbers(find_scales(spec, roomy, ReferenceOps(), 64)) == numbers(roomy.cache_scales)


@pytest.mark.parametrize(
    "change",
    [
        OF_WEIGHTS,
        {"kv_cache_scheme": None},
        {"kv_cache_scheme": {"num_bits": 8, "type": "int"}},
        {"quant_method": "fp8"},
    ],
)
def test_other_quantised_checkpoints_are_refused(
    checkpoint: Callable[..., Path], tmp_path: Path, change: dict[str, Any]
) -> None:
    folder = with_scales(checkpoint("qwen3"), tmp_path / "quantised", CACHE_ALONE | change, {})
    with pytest.raises(ModelError, match="quantization_config"):
        load(folder, torch.float32)


@pytest.fixture
def small_spec() -> Any:
    from lorikeet.model.spec import ModelSpec

    return ModelSpec(
        family="qwen2", vocab_size=61, hidden_size=24, intermediate_size=40, num_layers=2, num_heads=6, num_kv_heads=2,
        head_dim=8, max_context=256,
    )  # fmt: skip
