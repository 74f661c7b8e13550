"""Every field of PEFT's configs, kind by kind: handled, irrelevant to the computation, or refused unless neutral.

No torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorikeet.errors import AdapterError


@dataclass(frozen=True)
class Fields:
    """The fields of one kind. `refused`: name -> (neutral values besides null, what to do about any other value)."""

    handled: frozenset[str]
    irrelevant: frozenset[str]
    refused: dict[str, tuple[tuple[Any, ...], str]]


_TARGETS = frozenset(
    {"peft_type", "task_type", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
)
# Training only, or provenance: the saved tensors mean the same whatever stands here.
_PROVENANCE = frozenset(
    {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "runtime_config"}
)
_STORED_BY_INPUT = ((False,), "the base's linear layers are stored [out, in]")
_LORA_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "arrow_config": ((), "Arrow routing is not supported"),
    "corda_config": ((), "CorDA changes the base weights; convert the adapter to plain LoRA when saving"),
    "eva_config": ((), "remove it if the adapter was initialised with EVA and saved as plain LoRA"),
    "fan_in_fan_out": _STORED_BY_INPUT,
    "init_lora_weights": (
        (True, False, "gaussian", "orthogonal"),
        "this initialisation changes the base weights; save with path_initial_model_for_weight_conversion",
    ),
    "kasa_config": ((), "KaSA is not supported"),
    "layer_replication": ((), "replicated layers are not supported"),
    "lora_ga_config": ((), "LoRA-GA changes the base weights; convert the adapter to plain LoRA when saving"),
    "megatron_config": ((), "Megatron layers are not supported"),
    "monteclora_config": ((), "MonteCLoRA is not supported"),
    "target_parameters": (([],), "adapters of bare parameters are not supported"),
    "use_bdlora": ((False,), "BD-LoRA is not supported"),
    "use_qalora": ((False,), "QA-LoRA is not supported"),
    "velora_config": ((), "VeLoRA is not supported"),
}
KINDS = {
    "LORA": Fields(
        _TARGETS
        | {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "lora_bias", "bias"}
        | {"modules_to_save", "trainable_token_indices", "ensure_weight_tying", "alora_invocation_tokens"},
        # The last two count only with use_qalora and with init_lora_weights "loftq", which are refused by themselves;
        # PEFT's conversion of LoftQ to plain LoRA leaves its settings there.
        _PROVENANCE | {"lora_dropout", "megatron_core", "qalora_group_size", "loftq_config"},
        _LORA_REFUSED,
    ),
    "IA3": Fields(
        _TARGETS - {"layers_to_transform", "layers_pattern"} | {"feedforward_modules", "modules_to_save"},
        _PROVENANCE | {"init_ia3_weights"},
        {"fan_in_fan_out": _STORED_BY_INPUT},
    ),
    "VERA": Fields(
        _TARGETS | {"r", "modules_to_save"},
        _PROVENANCE | {"projection_prng_key", "vera_dropout", "d_initial", "init_weights"},
        {
            "fan_in_fan_out": _STORED_BY_INPUT,
            "bias": (("none",), "trained biases are supported for LoRA only"),
            "save_projection": ((True,), "its projections are not in the file; save it with save_projection=True"),
        },
    ),
}
KINDS["LOREFT"] = Fields(  # not PEFT's: the layout that this program reads
    frozenset({"peft_type", "task_type", "r", "layers", "first_positions", "last_positions", "last_offset"}),
    frozenset({"base_model_name_or_path", "inference_mode"}),
    {},
)
_NO_PAIR = "its update of a weight is no low-rank pair of its own"
_PROMPT = "it trains what stands before a prompt, which is not supported"
# Kinds without a normal form, and why.
REFUSED_KINDS = {
    **dict.fromkeys(
        ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE"), _PROMPT
    ),
    **dict.fromkeys(
        ("LOHA", "LOKR", "OFT", "BOFT", "HRA", "FOURIERFT", "WAVEFT", "C3A", "SHIRA", "HIRA", "ROAD", "OSF", "PSOFT"),
        f"{_NO_PAIR}: a product, rotation, spectrum or mask of the weight",
    ),
    "ADALORA": "convert it to LoRA: fold its singular values into B and drop those that were pruned",
    "TRAINABLE_TOKENS": "train it as LoRA with trainable_token_indices",
    "LN_TUNING": "train it as LoRA with the norms in modules_to_save",
    **dict.fromkeys(
        ("ADAPTION_PROMPT", "POLY", "XLORA", "ADAMSS", "BEFT", "LILY", "FROD", "PVERA", "GLORA", "VBLORA", "UNILORA",
         "MISS", "RANDLORA", "DELORA", "GRALORA", "TINYLORA", "PEANUT", "SHADOW", "SUPERTUNING", "DEFT"),
        "this kind is not supported",
    ),
}  # fmt: skip
_NEUTRAL_UNKNOWN: tuple[Any, ...] = (None, False, {}, [])


def refuse_unsupported(raw: dict[str, Any], file: str) -> str:
    """The kind of an adapter's config. AdapterError, by name, for the first field that changes the computation and is
    not handled."""
    kind = raw.get("peft_type")
    if not isinstance(kind, str) or kind not in KINDS:
        reason = REFUSED_KINDS.get(str(kind), "no such kind is known here")
        raise field_error(file, "peft_type", " or ".join(map(repr, KINDS)), kind, reason)
    if raw.get("task_type") not in (None, "CAUSAL_LM"):
        raise field_error(file, "task_type", "'CAUSAL_LM'", raw["task_type"], "only causal language models are served")
    fields = KINDS[kind]
    for name, value in raw.items():
        if name in fields.handled or name in fields.irrelevant:
            continue
        if name not in fields.refused:
            if not _among(value, _NEUTRAL_UNKNOWN):
                raise field_error(file, name, "no such field", value, "this field of PEFT's config is not known here")
            continue
        neutral, hint = fields.refused[name]
        if value is not None and not _among(value, neutral):
            expected = " or ".join(map(repr, neutral)) or "null"
            raise field_error(file, name, expected, value, hint)
    return kind


def field_error(file: str, name: str, expected: str, found: Any, hint: str | None = None) -> AdapterError:
    """The one form of complaint about a field of a config: file, field, expected, found."""
    return AdapterError(f"{file}: {name}: expected {expected}, found {str(found)[:200]!r}", hint=hint, param=name)


def _among(value: Any, allowed: tuple[Any, ...]) -> bool:
    return any(type(value) is type(one) and value == one for one in allowed)  # 1 == True, so types count
