"""`config.json` of a Hugging Face checkpoint -> `ModelSpec`. No torch.

Every field is handled, known to be irrelevant to the forward pass, or refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorikeet.errors import ModelError
from lorikeet.model.spec import ModelSpec, RopeScaling

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_KV_HEADS_DEFAULT = {"mistral": 8, "qwen2": 32, "qwen3": 32}

_HANDLED = """
    model_type architectures vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim max_position_embeddings rms_norm_eps rope_theta rope_scaling rope_parameters
    tie_word_embeddings attention_bias mlp_bias hidden_act use_sliding_window sliding_window max_window_layers
    layer_types bos_token_id eos_token_id quantization_config
"""
# Training, generation defaults, provenance and label names: none of it changes a logit.
_IRRELEVANT = """
    _name_or_path _attn_implementation attn_implementation transformers_version torch_dtype dtype use_cache
    initializer_range attention_dropout pad_token_id unk_token_id sep_token_id decoder_start_token_id
    return_dict output_attentions output_hidden_states torchscript chunk_size_feed_forward
    bad_words_ids begin_suppress_tokens suppress_tokens diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id
    length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_scores remove_invalid_values repetition_penalty return_dict_in_generate temperature top_k top_p typical_p
    id2label label2id problem_type finetuning_task task_specific_params tokenizer_class prefix
    use_bfloat16 tf_legacy_loss model_max_length max_sequence_length pretraining_tp unsloth_fixed unsloth_version
"""
_KNOWN = frozenset((_HANDLED + _IRRELEVANT).split())
_ROPE_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint folder; ModelError where it is missing or broken."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file", hint="a model folder holds config.json and safetensors") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def load_spec(folder: Path) -> ModelSpec:
    """The spec of the checkpoint in `folder`, from config.json and, for the stop ids, generation_config.json."""
    config = read_json(folder / "config.json")
    fields = _Fields(config, folder / "config.json")
    family = fields.one_of("model_type", tuple(ARCHITECTURES))
    _refuse_unsupported(fields, family)
    heads = fields.integer("num_attention_heads")
    hidden = fields.integer("hidden_size")
    absent_kv_heads = heads if "num_key_value_heads" in config else _KV_HEADS_DEFAULT.get(family, heads)
    kv_heads = fields.integer("num_key_value_heads", absent_kv_heads)  # null means as many as heads
    head_dim = fields.integer("head_dim", 128 if family == "qwen3" and "head_dim" not in config else hidden // heads)
    if heads % kv_heads:
        raise fields.error("num_key_value_heads", f"a divisor of num_attention_heads = {heads}", kv_heads)
    if head_dim % 2:
        raise fields.error("head_dim", "an even number", head_dim)
    theta, scaling = _rope(fields)
    attention_bias = fields.flag("attention_bias") if family in ("llama", "qwen3") else False
    layers, context = fields.integer("num_hidden_layers"), fields.integer("max_position_embeddings")
    return ModelSpec(
        family=family,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_context=context,
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=fields.flag("tie_word_embeddings"),
        qkv_bias=family == "qwen2" or attention_bias,
        o_bias=attention_bias,
        mlp_bias=fields.flag("mlp_bias") if family == "llama" else False,
        qk_norm=family == "qwen3",
        windows=_windows(fields, family, layers, context),
        bos_id=config.get("bos_token_id"),
        eos_ids=configured_stop_ids(folder),
    )


def configured_stop_ids(
    folder: Path, names: Sequence[str] = ("config.json", "generation_config.json")
) -> tuple[int, ...]:
    """End-of-sequence ids of these files, ascending."""
    ids: set[int] = set()
    for name in names:
        if (folder / name).exists():
            value = read_json(folder / name).get("eos_token_id")
            listed = value if isinstance(value, list) else [] if value is None else [value]
            if not all(type(one) is int and one >= 0 for one in listed):
                raise ModelError(
                    f"{folder / name}: eos_token_id: expected a token id or a list of them, found {value!r}",
                    param="eos_token_id",
                )
            ids.update(listed)
    return tuple(sorted(ids))


class _Fields:
    """Typed access to config.json; every complaint names file, field, expected and found."""

    def __init__(self, config: dict[str, Any], path: Path) -> None:
        self.config = config
        self.path = path

    def error(self, name: str, expected: str, found: Any) -> ModelError:
        return ModelError(f"{self.path}: {name}: expected {expected}, found {found!r}", param=name)

    def null(self, name: str) -> bool:
        return self.config.get(name) is None

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.config.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise self.error(name, "a positive integer", value)
        return value

    def number(self, name: str, default: float) -> float:
        value = self.config.get(name)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise self.error(name, "a positive number", value)
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.config.get(name)
        if value not in (None, True, False):
            raise self.error(name, "true or false", value)
        return bool(value)

    def one_of(self, name: str, allowed: tuple[str, ...]) -> str:
        value = self.config.get(name)
        if value not in allowed:
            raise self.error(name, " or ".join(allowed), value)
        return str(value)


def _quantises_cache_alone(quantised: dict[str, Any]) -> bool:
    """Whether all that a quantiser added are scales of an fp8 key-value cache (`model.cache_scales`)."""
    scheme, groups = quantised.get("kv_cache_scheme"), quantised.get("config_groups") or {}
    if quantised.get("quant_method") != "compressed-tensors" or not isinstance(scheme, dict):
        return False
    touched = [group.get(part) for group in groups.values() for part in ("weights", "input_activations")]
    return not any(touched) and (scheme.get("type"), scheme.get("num_bits")) == ("float", 8)


def _refuse_unsupported(fields: _Fields, family: str) -> None:
    config = fields.config
    architectures = config.get("architectures")
    if architectures and ARCHITECTURES[family] not in architectures:
        raise fields.error("architectures", ARCHITECTURES[family], architectures)
    if config.get("hidden_act", "silu") != "silu":
        raise fields.error("hidden_act", "silu", config["hidden_act"])
    _check_quantisation(fields)
    biases = {"llama": (), "qwen3": ("mlp_bias",)}.get(family, ("attention_bias", "mlp_bias"))
    for name in biases:
        if config.get(name):
            raise fields.error(name, f"false (a {family} model has no such bias)", config[name])
    for name, value in config.items():
        # A neutral value says "feature off", whatever the feature is.
        if name not in _KNOWN and value not in (None, False, 0, "", [], {}):
            raise ModelError(
                f"{fields.path}: {name} = {value!r} is not supported",
                hint=f"{family} models are computed without it; remove it if it does not change the forward pass",
                param=name,
            )


def _check_quantisation(fields: _Fields) -> None:
    """Tensors in the forms of bitsandbytes are read (`adapters.stored`), and scales of a cache; nothing else is."""
    told = fields.config.get("quantization_config")
    if not told:
        return
    method = told.get("quant_method") if isinstance(told, dict) else told
    if isinstance(told, dict):
        if method is None and (told.get("load_in_4bit") or told.get("load_in_8bit")):
            return  # as transformers wrote it at first
        if method == "bitsandbytes" or _quantises_cache_alone(told):
            return
    raise ModelError(
        f"{fields.path}: quantization_config.quant_method: expected 'bitsandbytes', found {method!r}",
        hint="dequantise the base first, or take the one that was quantised",
        param="quantization_config",
    )


def _rope(fields: _Fields) -> tuple[float, RopeScaling | None]:
    """Rotary theta and scaling, from `rope_theta` + `rope_scaling` or the newer `rope_parameters`."""
    name = "rope_scaling" if fields.null("rope_parameters") else "rope_parameters"
    rope = fields.config.get(name) or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise fields.error(name, "one flat object for all layers", rope)
    both = fields.config.get("rope_theta"), rope.get("rope_theta")
    if None not in both and both[0] != both[1]:
        raise fields.error("rope_theta", f"the same value as {name}.rope_theta = {both[1]}", both[0])
    nested = _Fields(rope, fields.path)
    theta = nested.number("rope_theta", fields.number("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _ROPE_KEYS:
        raise fields.error(f"{name}.rope_type", " or ".join(_ROPE_KEYS), kind)
    for key, value in rope.items():
        neutral = value is None or (key == "partial_rotary_factor" and value == 1.0)
        if key not in _ROPE_KEYS[kind] | {"rope_type", "type", "rope_theta"} and not neutral:
            raise fields.error(f"{name}.{key}", f"no such key with rope type {kind}", value)
    if kind == "default":
        return theta, None
    for key in ("factor", "low_freq_factor", "high_freq_factor"):
        if key in _ROPE_KEYS[kind] and key not in rope:
            raise fields.error(f"{name}.{key}", "a number", None)
    return theta, RopeScaling(
        kind=kind,
        factor=nested.number("factor", 1.0),
        low_freq_factor=nested.number("low_freq_factor", 1.0),
        high_freq_factor=nested.number("high_freq_factor", 4.0),
        original_max_position=nested.integer(
            "original_max_position_embeddings", fields.integer("max_position_embeddings")
        ),
    )


def _windows(fields: _Fields, family: str, layers: int, context: int) -> tuple[int | None, ...]:
    """Attention window of each layer; empty where every layer sees everything."""
    config = fields.config
    kinds = config.get("layer_types")
    if kinds is not None and (len(kinds) != layers or set(kinds) - {"full_attention", "sliding_attention"}):
        raise fields.error("layer_types", f"full_attention or sliding_attention for each of {layers} layers", kinds)
    if family == "llama":
        window, sliding = None, [False] * layers
        if not fields.null("sliding_window"):
            raise fields.error("sliding_window", "null (a llama model has no window)", config["sliding_window"])
    elif family == "mistral":
        window = config.get("sliding_window", 4096)  # null says none
        sliding = [window is not None] * layers
    else:
        window = fields.integer("sliding_window", 4096) if fields.flag("use_sliding_window") else None
        first = config.get("max_window_layers", 28)
        sliding = [window is not None and layer >= first for layer in range(layers)]
        if kinds is not None and (window is not None or "sliding_attention" not in kinds):
            sliding = [kind == "sliding_attention" for kind in kinds]
    if kinds is not None and sliding != [kind == "sliding_attention" for kind in kinds]:
        raise fields.error("layer_types", "what sliding_window and use_sliding_window say", kinds)
    if window is not None and (not isinstance(window, int) or window <= 0):
        raise fields.error("sliding_window", "a positive integer or null", window)
    if window is None or window >= context or not any(sliding):
        return ()
    return tuple(window if slides else None for slides in sliding)
