"""config.json -> ModelSpec: both spellings of rope, windows, biases, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorikeet.errors import ModelError
from lorikeet.model.families import ARCHITECTURES, load_spec
from lorikeet.model.spec import RopeScaling

COMMON = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 50000.0,
}


def spec_of(folder: Path, family: str = "llama", **fields: Any) -> Any:
    config = {"model_type": family, "architectures": [ARCHITECTURES.get(family, "X")], **COMMON, **fields}
    config = {name: value for name, value in config.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(config))
    return load_spec(folder)


LLAMA3 = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_scaling": {"type": "llama3", **LLAMA3}},
        {"rope_theta": "absent", "rope_parameters": {"rope_type": "llama3", "rope_theta": 50000.0, **LLAMA3}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 50000.0, **LLAMA3}},
    ],
)
def test_old_and_new_spellings_of_rope_mean_the_same(fields: dict[str, Any], tmp_path: Path) -> None:
    spec = spec_of(tmp_path, **fields)
    assert spec.rope_theta == 50000.0
    assert spec.rope_scaling == RopeScaling(
        kind="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_scaling": None},
        {"rope_scaling": {"rope_type": "default"}},
        {"rope_theta": "absent", "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}},
    ],
)
def test_no_scaling(fields: dict[str, Any], tmp_path: Path) -> None:
    spec = spec_of(tmp_path, **fields)
    assert spec.rope_scaling is None and spec.rope_theta == 50000.0


@pytest.mark.parametrize(
    ("family", "fields", "windows"),
    [
        ("llama", {}, ()),
        ("mistral", {"sliding_window": 16}, (16, 16, 16, 16)),
        ("mistral", {"sliding_window": None}, ()),
        ("mistral", {}, ()),  # the default, 4096, is beyond the context
        ("mistral", {"sliding_window": 256}, ()),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": False}, ()),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 3}, (None, None, None, 16)),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": True}, ()),  # by default the first 28 layers are full
        (
            "qwen3",
            {
                "sliding_window": 16,
                "use_sliding_window": True,
                "layer_types": ["full_attention", "sliding_attention"] * 2,
            },
            (None, 16, None, 16),
        ),
        ("qwen3", {"layer_types": ["full_attention"] * 4, "sliding_window": None}, ()),
    ],
)
def test_windows(family: str, fields: dict[str, Any], windows: tuple[int | None, ...], tmp_path: Path) -> None:
    assert spec_of(tmp_path, family, **fields).windows == windows


@pytest.mark.parametrize(
    ("family", "fields", "expected"),
    [
        ("llama", {}, (False, False, False, False)),
        ("llama", {"attention_bias": True}, (True, True, False, False)),
        ("llama", {"mlp_bias": True}, (False, False, True, False)),
        ("mistral", {}, (False, False, False, False)),
        ("qwen2", {}, (True, False, False, False)),
        ("qwen3", {"head_dim": 16}, (False, False, False, True)),
        ("qwen3", {"head_dim": 16, "attention_bias": True}, (True, True, False, True)),
    ],
)
def test_biases(family: str, fields: dict[str, Any], expected: tuple[bool, ...], tmp_path: Path) -> None:
    spec = spec_of(tmp_path, family, **fields)
    assert (spec.qkv_bias, spec.o_bias, spec.mlp_bias, spec.qk_norm) == expected


def test_defaults_are_those_of_the_family(tmp_path: Path) -> None:
    assert spec_of(tmp_path, "qwen3").head_dim == 128
    assert spec_of(tmp_path, "llama").head_dim == 16
    assert spec_of(tmp_path, "llama", num_key_value_heads="absent").num_kv_heads == 4
    assert spec_of(tmp_path, "llama", num_key_value_heads=None).num_kv_heads == 4
    assert spec_of(tmp_path, "mistral", num_key_value_heads="absent", num_attention_heads=16).num_kv_heads == 8
    assert spec_of(tmp_path, "llama", rope_theta="absent", rms_norm_eps="absent").rope_theta == 10000.0


@pytest.mark.parametrize("told", [{"quant_method": "bitsandbytes", "load_in_8bit": True}, {"load_in_4bit": True}, None])
def test_bitsandbytes_is_read(told: Any, tmp_path: Path) -> None:
    assert spec_of(tmp_path, quantization_config=told) == spec_of(tmp_path)


def test_stop_ids_come_from_both_files(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 7]}))
    assert spec_of(tmp_path, eos_token_id=8).eos_ids == (7, 8, 9)


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("gemma", {}, "model_type: expected llama or mistral or qwen2 or qwen3, found 'gemma'"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "architectures: expected LlamaForCausalLM"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act: expected silu, found 'gelu'"),
        ("llama", {"quantization_config": {"bits": 4}}, "quant_method: expected 'bitsandbytes', found None"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quant_method: expected .* found 'gptq'"),
        ("llama", {"quantization_config": "nf4"}, "quant_method: expected 'bitsandbytes', found 'nf4'"),
        ("llama", {"num_local_experts": 8}, "num_local_experts = 8 is not supported"),
        ("llama", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0 is not supported"),
        ("llama", {"pruned_heads": {"0": [1]}}, "pruned_heads = .* is not supported"),
        ("llama", {"sliding_window": 16}, "sliding_window: expected null"),
        ("mistral", {"sliding_window": -1}, "sliding_window: expected a positive integer or null, found -1"),
        ("mistral", {"attention_bias": True}, "attention_bias: expected false"),
        ("qwen2", {"mlp_bias": True}, "mlp_bias: expected false"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type: expected default or .* 'yarn'"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_type: expected .* found 'dynamic'"),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, r"rope_scaling\.factor: expected a number, found None"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor: expected a number"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta": 1}}, r"rope_scaling\.beta: expected"),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "rope_theta: expected the same"),
        ("qwen3", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "expected one flat object"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types: expected full_attention or"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 4}, "layer_types: expected what sliding_window and"),
        ("llama", {"layer_types": ["chunked_attention"] * 4}, "layer_types: expected full_attention or"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads: expected a divisor .* = 4, found 3"),
        ("llama", {"head_dim": 15}, "head_dim: expected an even number, found 15"),
        ("llama", {"vocab_size": "absent"}, "vocab_size: expected a positive integer, found None"),
        ("llama", {"hidden_size": "64"}, "hidden_size: expected a positive integer, found '64'"),
        ("llama", {"rms_norm_eps": 0}, "rms_norm_eps: expected a positive number, found 0"),
        ("llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings: expected true or false, found 'no'"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(
    family: str, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        spec_of(tmp_path, family, **fields)
    assert str(tmp_path) in caught.value.message and caught.value.param


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_what_transformers_writes_is_accepted(family: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(family, **COMMON)
    config.to_json_file(tmp_path / "config.json", use_diff=False)  # every field there is
    spec = load_spec(tmp_path)
    assert (spec.family, spec.hidden_size, spec.num_kv_heads) == (family, 64, 2)
    assert spec.head_dim == getattr(config, "head_dim", None) or 16


def test_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        load_spec(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="expected a JSON object"):
        load_spec(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read as JSON"):
        load_spec(tmp_path)
