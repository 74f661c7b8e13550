"""Every field of PEFT's LoraConfig: handled, irrelevant to the computation, or refused unless neutral. No torch."""

from __future__ import annotations

from typing import Any

from lorikeet.errors import AdapterError

HANDLED = frozenset(
    {
        "peft_type",
        "task_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
    }
)
# Training only, or provenance: the saved tensors mean the same whatever stands here.
IRRELEVANT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "lora_dropout",
        "megatron_core",
        "peft_version",
        "qalora_group_size",  # read only together with use_qalora
        "revision",
        "runtime_config",
    }
)
# name -> (neutral values besides null, what to do about any other value)
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "alora_invocation_tokens": ((), "activated LoRA is not supported"),
    "arrow_config": ((), "Arrow routing is not supported"),
    "bias": (("none",), "trained biases are not supported"),
    "corda_config": ((), "CorDA changes the base weights; convert the adapter to plain LoRA when saving"),
    "ensure_weight_tying": ((False,), "adapters of embedding and head are not supported"),
    "eva_config": ((), "remove it if the adapter was initialised with EVA and saved as plain LoRA"),
    "fan_in_fan_out": ((False,), "the base's linear layers are stored [out, in]"),
    "init_lora_weights": (
        (True, False, "gaussian", "orthogonal"),
        "this initialisation changes the base weights; save with path_initial_model_for_weight_conversion",
    ),
    "kasa_config": ((), "KaSA is not supported"),
    "layer_replication": ((), "replicated layers are not supported"),
    "loftq_config": (({},), "LoftQ changes the base weights; convert the adapter to plain LoRA when saving"),
    "lora_bias": ((False,), "biases of LoRA B are not supported"),
    "lora_ga_config": ((), "LoRA-GA changes the base weights; convert the adapter to plain LoRA when saving"),
    "megatron_config": ((), "Megatron layers are not supported"),
    "modules_to_save": (([],), "fully trained modules are not supported"),
    "monteclora_config": ((), "MonteCLoRA is not supported"),
    "target_parameters": (([],), "adapters of bare parameters are not supported"),
    "trainable_token_indices": (([], {}), "trained token rows are not supported"),
    "use_bdlora": ((False,), "BD-LoRA is not supported"),
    "use_dora": ((False,), "DoRA is not supported"),
    "use_qalora": ((False,), "QA-LoRA is not supported"),
    "velora_config": ((), "VeLoRA is not supported"),
}
_NEUTRAL_UNKNOWN: tuple[Any, ...] = (None, False, {}, [])


def refuse_unsupported(raw: dict[str, Any], file: str) -> None:
    """Raise AdapterError for the first field that changes the computation and is not handled, by name."""
    if raw.get("peft_type") != "LORA":
        raise field_error(file, "peft_type", "'LORA'", raw.get("peft_type"), "other adapter kinds are not supported")
    if raw.get("task_type") not in (None, "CAUSAL_LM"):
        raise field_error(file, "task_type", "'CAUSAL_LM'", raw["task_type"], "only causal language models are served")
    for name, value in raw.items():
        if name in HANDLED or name in IRRELEVANT:
            continue
        if name not in REFUSED:
            if not _among(value, _NEUTRAL_UNKNOWN):
                raise field_error(file, name, "no such field", value, "this field of PEFT's config is not known here")
            continue
        neutral, hint = REFUSED[name]
        if value is not None and not _among(value, neutral):
            expected = " or ".join(map(repr, neutral)) or "null"
            raise field_error(file, name, expected, value, hint)


def field_error(file: str, name: str, expected: str, found: Any, hint: str | None = None) -> AdapterError:
    """The one form of complaint about a field of a config: file, field, expected, found."""
    return AdapterError(f"{file}: {name}: expected {expected}, found {str(found)[:200]!r}", hint=hint, param=name)


def _among(value: Any, allowed: tuple[Any, ...]) -> bool:
    return any(type(value) is type(one) and value == one for one in allowed)  # 1 == True, so types count
