"""`adapter_config.json`: what it says of an adapter that changes the computation, read and checked, and written.

No torch.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lorikeet.adapters.fields import field_error, refuse_unsupported
from lorikeet.adapters.foreign import check_not_pissa, missing_config
from lorikeet.adapters.safefile import unique_pairs
from lorikeet.errors import AdapterError

CONFIG = "adapter_config.json"
Number = TypeVar("Number", int, float)

_MAX_JSON = 2**20


@dataclass(frozen=True, kw_only=True)
class Targets:
    """The modules that an adapter acts on, as an `adapter_config.json` of any kind says it."""

    target_modules: str | tuple[str, ...] = ()
    exclude_modules: str | tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()

    def targets(self, module: str) -> bool:
        """Whether PEFT would put an adapter on the module of this name (its `check_target_module_exists`)."""
        if self.exclude_modules and _names(self.exclude_modules, module):
            return False
        if isinstance(self.target_modules, str) or module in self.target_modules:
            return _names(self.target_modules, module)
        if not _names(self.target_modules, module):
            return False
        if not self.layers_to_transform:
            return True
        patterns = [rf"(?:^|.*?\.){pattern}" for pattern in self.layers_pattern] or [r".*?\.[^.]*"]
        match = next((m for p in patterns if (m := re.match(rf"{p}\.(\d+)\.", module))), None)
        return match is not None and int(match[1]) in self.layers_to_transform


@dataclass(frozen=True, kw_only=True)
class PeftConfig(Targets):
    """What the configs of PEFT's kinds share: their targets, and what was trained beside them as a whole."""

    modules_to_save: tuple[str, ...] = ()  # ends of the names of modules that were trained as a whole
    token_rows: dict[str, tuple[int, ...]] = field(default_factory=dict)  # which rows of these modules were trained
    ties_weights: bool = False  # on a tied base, what is said of the embedding holds for the head, and the reverse

    def targets(self, module: str) -> bool:
        """As of every kind. A module that is saved whole is no target, though it may be named twice."""
        saved = any(re.match(rf"(^|.*\.){re.escape(name)}($|\..*)", module) for name in self.modules_to_save)
        return not saved and super().targets(module)

    def saves_whole(self, module: str) -> bool:
        """Whether the adapter has a copy of its own of this module."""
        return any(module.endswith(name) for name in self.modules_to_save)


@dataclass(frozen=True, kw_only=True)
class LoraConfig(PeftConfig):
    """What the config of a LoRA says that changes the computation.

    Ranks and alphas of a module are those of the first pattern that matches its name, else `r` and `alpha`.
    """

    r: int
    alpha: float
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    use_dora: bool = False
    lora_bias: bool = False
    bias: str = "none"  # none | lora_only | all: which of the base's own biases were trained
    invocation: tuple[int, ...] | None = None  # token ids from whose last occurrence on the adapter acts (aLoRA)

    def rank_of(self, module: str) -> int:
        return _first_match(self.rank_pattern, module, self.r)

    def scale_of(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA (Kalajdzievski 2023)."""
        rank, alpha = self.rank_of(module), _first_match(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    @property
    def kind(self) -> str:
        """ "lora" where A, B and their scale are all there is."""
        special = {"dora": self.use_dora, "alora": self.invocation is not None, "lora": self.is_plain}
        return next((name for name, there in special.items() if there), "lora and more")

    @property
    def is_plain(self) -> bool:
        whole = self.modules_to_save or self.token_rows
        return not (self.use_dora or self.lora_bias or self.bias != "none" or whole or self.invocation is not None)


@dataclass(frozen=True, kw_only=True)
class Ia3Config(PeftConfig):
    """IA3 (Liu et al. 2022): vectors that outputs are multiplied with, or inputs of `feedforward_modules`."""

    feedforward_modules: str | tuple[str, ...] = ()
    kind = "ia3"

    def is_feedforward(self, module: str) -> bool:
        return bool(self.feedforward_modules) and _names(self.feedforward_modules, module)


@dataclass(frozen=True, kw_only=True)
class VeraConfig(PeftConfig):
    """VeRA (Kopiczko et al. 2024): vectors around one pair of projections that all modules share."""

    r: int
    kind = "vera"


@dataclass(frozen=True, kw_only=True)
class LoreftConfig(Targets):
    """LoReFT (Wu et al. 2024): h + R (W h + b - R^T h) on the residual stream after some layers, at the first and the
    last tokens of the prompt. Of each layer `reft.layers.N.rotate` R [d, r], `weight` W [r, d] and `bias` b [r].

    `positions`: how many first and last tokens, and how many at the prompt's end are left out.
    """

    r: int
    layers: tuple[int, ...]
    positions: tuple[int, int, int]
    kind = "loreft"


AdapterConfig = LoraConfig | Ia3Config | VeraConfig | LoreftConfig


def _first_match(patterns: Mapping[str, Number], module: str, default: Number) -> Number:
    return next((v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _names(wanted: str | tuple[str, ...], module: str) -> bool:
    """A string is a regular expression over the whole name; a list holds names or their last parts."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in wanted)


# --- reading ---------------------------------------------------------------------------------------------------------


def read_config(folder: Path) -> AdapterConfig:
    """`adapter_config.json`, every field handled, known to be irrelevant, or refused by name (AdapterError)."""
    check_not_pissa(folder)
    raw = _read_json(folder / CONFIG)
    kind = refuse_unsupported(raw, CONFIG)
    if kind == "LOREFT":
        first, last, left_out = (
            _count(name, raw.get(name, 0)) for name in ("first_positions", "last_positions", "last_offset")
        )
        if not first and not last:
            raise field_error(CONFIG, "first_positions", "a position to act on, first or last", 0)
        return LoreftConfig(
            r=_checked("r", raw.get("r"), int),
            layers=_layers(raw.get("layers"), "layers"),
            positions=(first, last, left_out),
        )
    targets = _read_targets(raw)
    targets["modules_to_save"] = tuple(_strings("modules_to_save", raw.get("modules_to_save") or ()))
    if kind == "IA3":
        inputs = _targets("feedforward_modules", raw.get("feedforward_modules") or ())
        return Ia3Config(feedforward_modules=inputs, **targets)
    rank = _checked("r", raw.get("r", 8 if kind == "LORA" else 256), int)
    if kind == "VERA":
        return VeraConfig(r=rank, **targets)
    if raw.get("bias", "none") not in ("none", "all", "lora_only"):
        raise field_error(CONFIG, "bias", "'none', 'all' or 'lora_only'", raw["bias"])
    return LoraConfig(
        r=rank,
        alpha=_checked("lora_alpha", raw.get("lora_alpha", 8), float),
        use_rslora=_flag("use_rslora", raw.get("use_rslora")),
        rank_pattern=_patterns("rank_pattern", raw, int),
        alpha_pattern=_patterns("alpha_pattern", raw, float),
        use_dora=_flag("use_dora", raw.get("use_dora")),
        lora_bias=_flag("lora_bias", raw.get("lora_bias")),
        bias=raw.get("bias") or "none",
        token_rows=_token_rows(raw.get("trainable_token_indices")),
        ties_weights=_flag("ensure_weight_tying", raw.get("ensure_weight_tying")),
        invocation=_invocation(raw.get("alora_invocation_tokens")),
        **targets,
    )


def _read_targets(raw: dict[str, Any]) -> dict[str, Any]:
    """The fields of `Targets`."""
    layers = raw.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    patterns = raw.get("layers_pattern") or ()
    patterns = [patterns] if isinstance(patterns, str) else patterns
    targets = raw.get("target_modules")
    if layers is not None and isinstance(targets, str):
        raise field_error(CONFIG, "layers_to_transform", "null with a target_modules pattern", layers)
    return {
        "target_modules": _targets("target_modules", targets),
        "exclude_modules": _targets("exclude_modules", raw.get("exclude_modules") or ()),
        "layers_to_transform": None if layers is None else _layers(layers),
        "layers_pattern": tuple(_expression("layers_pattern", one) for one in patterns),
    }


def _expression(name: str, value: Any) -> str:
    try:
        re.compile(value)
    except (re.error, TypeError, RecursionError, OverflowError) as error:
        raise field_error(CONFIG, name, "a regular expression", value, str(error)) from error
    return str(value)


def _strings(name: str, value: Any) -> list[str]:
    if not isinstance(value, list | tuple) or not all(isinstance(one, str) and one for one in value):
        raise field_error(CONFIG, name, "a list of module names", value)
    return sorted(value)


def _token_rows(value: Any) -> dict[str, tuple[int, ...]]:
    """A list is of the embedding's rows."""
    name = "trainable_token_indices"
    value = {"embed_tokens": value} if isinstance(value, list) and value else value or {}
    if not isinstance(value, dict):
        raise field_error(CONFIG, name, "a list of token ids, or one for each module", value)
    for rows in value.values():
        if not isinstance(rows, list) or not all(type(one) is int and one >= 0 for one in rows):
            raise field_error(CONFIG, name, "a list of token ids", rows)
        if len(set(rows)) != len(rows):
            raise field_error(CONFIG, name, "each token id once", rows)
    return {key: tuple(rows) for key, rows in value.items()}


def _invocation(value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not value or not all(type(one) is int and one >= 0 for one in value):
        raise field_error(CONFIG, "alora_invocation_tokens", "a list of token ids", value)
    return tuple(value)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_JSON:
            raise AdapterError(f"{path.name}: {path.stat().st_size} bytes, expected at most {_MAX_JSON}")
        value = json.loads(path.read_text("utf-8"), object_pairs_hook=unique_pairs)
    except FileNotFoundError:
        raise missing_config(path.parent, path.name) from None
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path.name}: cannot be read as JSON: {error}", hint=f"the file is {path}") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{path.name}: expected a JSON object, found {type(value).__name__}")
    return value


def _checked(name: str, value: Any, kind: type[int] | type[float]) -> Any:
    """A rank (positive integer) or an alpha (finite number)."""
    if kind is int:
        if type(value) is not int or value < 1:
            raise field_error(CONFIG, name, "a positive integer", value)
    elif type(value) not in (int, float) or not math.isfinite(value):
        raise field_error(CONFIG, name, "a finite number", value)
    return kind(value)


def _flag(name: str, value: Any) -> bool:
    if value not in (None, True, False):
        raise field_error(CONFIG, name, "true or false", value)
    return bool(value)


def _patterns(name: str, raw: dict[str, Any], kind: type[int] | type[float]) -> dict[str, Any]:
    value = raw.get(name) or {}
    if not isinstance(value, dict):
        raise field_error(CONFIG, name, "an object", value)
    return {_expression(name, key): _checked(f"{name}.{key}", one, kind) for key, one in value.items()}


def _targets(name: str, value: Any) -> str | tuple[str, ...]:
    if isinstance(value, str):
        return _expression(name, value)
    if not isinstance(value, list | tuple) or not all(isinstance(one, str) for one in value):
        raise field_error(CONFIG, name, "a list of module names or a pattern", value)
    if name == "target_modules" and not value:
        raise field_error(CONFIG, name, "at least one module", value)
    return tuple(sorted(value))


def _count(name: str, value: Any) -> int:
    if type(value) is not int or value < 0:
        raise field_error(CONFIG, name, "0 or more", value)
    return value


def _layers(value: Any, name: str = "layers_to_transform") -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(one) is int for one in value):
        raise field_error(CONFIG, name, "a list of layer numbers", value)
    return tuple(value)


# --- writing ---------------------------------------------------------------------------------------------------------


def peft_fields(config: LoraConfig, base_name: str) -> dict[str, Any]:
    """The `adapter_config.json` that peft reads of a plain LoRA."""
    targets = config.target_modules
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": config.use_rslora,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "exclude_modules": config.exclude_modules or None,
        "layers_to_transform": config.layers_to_transform,
        "layers_pattern": config.layers_pattern or None,
        "modules_to_save": None,
        "use_dora": False,
    }
