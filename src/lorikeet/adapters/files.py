"""Adapters on disk: PEFT directories (read and written), their content hash, and the lock file. No torch."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from lorikeet.adapters.fields import field_error, refuse_unsupported
from lorikeet.adapters.safefile import SafeFile, TensorEntry, unique_pairs
from lorikeet.errors import AdapterError, LockMismatchError
from lorikeet.types import BaseIdentity

CONFIG, WEIGHTS, LOCK = "adapter_config.json", "adapter_model.safetensors", "lorikeet.json"
Signature = tuple[tuple[str, int, int], ...]  # (file name, mtime in ns, size) of what makes an adapter
# What a stored tensor is of its module. A and B: LoRA. `rows`: trained rows of an embedding or a head. `weight`: what
# stands in place of the base's. `shared` parts belong to the adapter as a whole.
Part = Literal[
    "A", "B", "B.bias", "magnitude", "bias", "ia3", "lambda_b", "lambda_d", "shared_A", "shared_B",
    "embedding_A", "embedding_B", "rows", "weight",
    "reft.rotate", "reft.weight", "reft.bias",
]  # fmt: skip
Array = NDArray[np.float32]
Number = TypeVar("Number", int, float)

_MAX_JSON = 2**20
_PICKLED = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "adapter_model.ckpt", "adapter_model.pkl")
_REFT = re.compile(r"reft\.layers\.(?P<layer>\d+)\.(?P<part>rotate|weight|bias)")
_SHARED: dict[str, Part] = {"base_model.vera_A": "shared_A", "base_model.vera_B": "shared_B"}
_SUFFIXES: dict[Part, str] = {
    "A": r"lora_A(?:\.default)?\.weight",
    "B": r"lora_B(?:\.default)?\.weight",
    "B.bias": r"lora_B(?:\.default)?\.bias",
    "magnitude": r"lora_magnitude_vector(?:\.default)?(?:\.weight)?",
    "ia3": r"ia3_l(?:\.default)?",
    "lambda_b": r"vera_lambda_b(?:\.default)?",
    "lambda_d": r"vera_lambda_d(?:\.default)?",
    "embedding_A": r"lora_embedding_A(?:\.default)?",
    "embedding_B": r"lora_embedding_B(?:\.default)?",
    "rows": r"token_adapter\.trainable_tokens_delta(?:\.default)?",
    "bias": r"(?:base_layer\.)?bias",
    "weight": r"(?:base_layer\.|modules_to_save\.(?:default\.)?)?weight",
}
_KEYS = {part: re.compile(rf"(?:base_model\.model\.)?(?P<module>[^/\\]+?)\.{end}") for part, end in _SUFFIXES.items()}
_FLOATS = ("F32", "BF16", "F16", "F64")


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
class LoraConfig(Targets):
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
    modules_to_save: tuple[str, ...] = ()  # ends of the names of modules that were trained as a whole
    token_rows: dict[str, tuple[int, ...]] = field(default_factory=dict)  # which rows of these modules were trained
    ties_weights: bool = False  # on a tied base, what is said of the embedding holds for the head, and the reverse
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
class Ia3Config(Targets):
    """IA3 (Liu et al. 2022): vectors that outputs are multiplied with, or inputs of `feedforward_modules`."""

    feedforward_modules: str | tuple[str, ...] = ()
    kind = "ia3"

    def is_feedforward(self, module: str) -> bool:
        return bool(self.feedforward_modules) and _names(self.feedforward_modules, module)


@dataclass(frozen=True, kw_only=True)
class VeraConfig(Targets):
    """VeRA (Kopiczko et al. 2024): vectors around one pair of projections that all modules share."""

    r: int
    kind = "vera"


@dataclass(frozen=True, kw_only=True)
class LoreftConfig(Targets):
    """LoReFT (Wu et al. 2024): h + R (W h + b - R^T h) on the residual stream after some layers, at the first and the
    last tokens of the prompt. Of each layer `reft.layers.N.rotate` R [d, r], `weight` W [r, d] and `bias` b [r]."""

    r: int
    layers: tuple[int, ...]
    positions: tuple[int, int]
    kind = "loreft"


AdapterConfig = LoraConfig | Ia3Config | VeraConfig | LoreftConfig


def _first_match(patterns: Mapping[str, Number], module: str, default: Number) -> Number:
    return next((v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _names(wanted: str | tuple[str, ...], module: str) -> bool:
    """A string is a regular expression over the whole name; a list holds names or their last parts."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in wanted)


class AdapterFile:
    """A PEFT directory whose config and header are checked; `load` reads the tensors.

    `shapes` maps (module name in the base, part) to the stored shape; of LoRA, A is [r, d_in] and B is [d_out, r].
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_config(folder)
        path = folder / WEIGHTS
        if not path.exists():
            pickled = next((name for name in _PICKLED if (folder / name).exists()), None)
            if pickled is not None:
                hint = "save the adapter with safe_serialization=True"
                raise AdapterError(f"{pickled}: pickled weights are not loaded, they can run code", hint=hint)
            raise AdapterError(f"{folder.name}: {WEIGHTS} is missing", hint=f"the folder is {folder}", param=WEIGHTS)
        self._file = SafeFile(path)
        try:
            self._entries = self._parse_names()
        except BaseException:
            self._file.__exit__(None, None, None)
            raise
        self.shapes = {key: entry.shape for key, entry in self._entries.items()}

    def __enter__(self) -> AdapterFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._file.__exit__(kind, value, tb)

    def load(self) -> tuple[dict[tuple[str, Part], Array], str]:
        """All tensors as finite fp32 in their stored shapes, and the content hash of exactly these bytes."""
        data = self._file.read()
        raw = {key: (entry, data[entry.start : entry.stop]) for key, entry in self._entries.items()}
        return {key: self._decode(key, *parts) for key, parts in raw.items()}, content_hash(self.config, raw)

    def _parse_names(self) -> dict[tuple[str, Part], TensorEntry]:
        entries: dict[tuple[str, Part], TensorEntry] = {}
        for name, entry in self._file.entries.items():
            key = parse_name(name)
            if entry.dtype not in _FLOATS:
                raise AdapterError(f"{WEIGHTS}: {name}: expected {' or '.join(_FLOATS)}, found {entry.dtype}")
            if key[1] in ("A", "B") and len(entry.shape) != 2:
                raise AdapterError(f"{WEIGHTS}: {name}: expected two dimensions, found {list(entry.shape)}")
            if key in entries:
                raise AdapterError(f"{WEIGHTS}: {name}: the tensor is there with and without prefix or `.default`")
            entries[key] = entry
        if not entries:
            raise AdapterError(f"{WEIGHTS}: no tensors")
        return entries

    def _decode(self, key: tuple[str, Part], entry: TensorEntry, raw: memoryview) -> Array:
        values = decode(entry, raw)
        if not np.isfinite(values).all():
            bad = int(np.count_nonzero(~np.isfinite(values)))
            raise AdapterError(f"{WEIGHTS}: {stored_name(*key)}: {bad} of {values.size} values are NaN or infinite")
        return values


def parse_name(name: str) -> tuple[str, Part]:
    """What a tensor of the file is: (module of the base, part of it). AdapterError for a name that is not known."""
    if name in _SHARED:
        return "", _SHARED[name]
    if (reft := _REFT.fullmatch(name)) is not None:
        parts: dict[str, Part] = {"rotate": "reft.rotate", "weight": "reft.weight", "bias": "reft.bias"}
        return f"model.layers.{int(reft['layer'])}", parts[reft["part"]]
    for part, key in _KEYS.items():
        match = key.fullmatch(name)
        if match is not None:
            return match["module"], part
    hint = "expected base_model.model.<module>.lora_A.weight or lora_B.weight of linear layers, or IA3's or VeRA's"
    raise AdapterError(f"{WEIGHTS}: tensor {name!r} is not supported", hint=hint, param=name)


def stored_name(module: str, part: Part) -> str:
    """How PEFT names it, without what stands in front of every module."""
    if part in ("reft.rotate", "reft.weight", "reft.bias"):
        return f"reft.{module.removeprefix('model.')}.{part.removeprefix('reft.')}"
    shared = next((name for name, one in _SHARED.items() if one == part), None)
    ends = {"A": "lora_A.weight", "B": "lora_B.weight", "B.bias": "lora_B.bias", "magnitude": "lora_magnitude_vector",
            "ia3": "ia3_l", "lambda_b": "vera_lambda_b", "lambda_d": "vera_lambda_d", "bias": "bias",
            "embedding_A": "lora_embedding_A", "embedding_B": "lora_embedding_B", "weight": "weight",
            "rows": "token_adapter.trainable_tokens_delta"}  # fmt: skip
    return shared or f"{module}.{ends[part]}"


def decode(entry: TensorEntry, raw: memoryview) -> Array:
    """Stored bytes -> fp32 of the entry's shape (fp32 is not copied)."""
    if entry.dtype == "BF16":
        wide = np.frombuffer(raw, "<u2").astype(np.uint32) << 16
        return wide.view(np.float32).reshape(entry.shape)
    stored = np.frombuffer(raw, {"F32": "<f4", "F16": "<f2", "F64": "<f8"}[entry.dtype])
    with np.errstate(over="ignore"):  # an fp64 beyond fp32 becomes infinite, which the caller refuses
        return stored.astype(np.float32, copy=False).reshape(entry.shape)


def content_hash(config: AdapterConfig, tensors: Mapping[tuple[str, Part], tuple[TensorEntry, memoryview]]) -> str:
    """sha256 over the sorted tensors (name, dtype, shape, bytes) and what the config says of each module.

    Patterns are resolved first: configs that mean the same hash the same, however they are written.
    """
    digest = hashlib.sha256(config.kind.encode())
    if isinstance(config, LoraConfig) and config.invocation is not None:
        digest.update(msgspec.msgpack.encode(config.invocation))
    if isinstance(config, LoreftConfig):
        digest.update(msgspec.msgpack.encode(config.positions))
    if isinstance(config, LoraConfig) and (config.token_rows or config.ties_weights):
        digest.update(msgspec.msgpack.encode([sorted(config.token_rows.items()), config.ties_weights]))
    for (module, part), (entry, raw) in sorted(tensors.items(), key=lambda item: item[0]):
        meaning: list[Any] = [module, part, entry.dtype, list(entry.shape)]
        if isinstance(config, LoraConfig):
            meaning += [config.rank_of(module), config.scale_of(module)]
        elif isinstance(config, Ia3Config):
            meaning += [config.is_feedforward(module)]
        digest.update(msgspec.msgpack.encode(meaning))
        digest.update(raw)
    return digest.hexdigest()


def signature_of(folder: Path) -> Signature | None:
    """Changes when the adapter's files are replaced; None when the folder holds no adapter."""
    parts = []
    for name in (CONFIG, WEIGHTS, LOCK):
        try:
            stat = (folder / name).stat()
        except OSError:
            if name == CONFIG:
                return None
            continue
        parts.append((name, stat.st_mtime_ns, stat.st_size))
    return tuple(parts)


def read_config(folder: Path) -> AdapterConfig:
    """`adapter_config.json`, every field handled, known to be irrelevant, or refused by name (AdapterError)."""
    raw = _read_json(folder / CONFIG)
    kind = refuse_unsupported(raw, CONFIG)
    if kind == "LOREFT":
        positions = tuple(_count(name, raw.get(name, 0)) for name in ("first_positions", "last_positions"))
        if not any(positions):
            raise field_error(CONFIG, "first_positions", "a position to act on, first or last", 0)
        return LoreftConfig(
            r=_checked("r", raw.get("r"), int),
            layers=_layers(raw.get("layers"), "layers"),
            positions=(positions[0], positions[1]),
        )
    targets = _read_targets(raw)
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
        modules_to_save=tuple(_strings("modules_to_save", raw.get("modules_to_save") or ())),
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
        raise AdapterError(f"{path.parent.name}: {path.name} is missing", hint=f"the folder is {path.parent}") from None
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


# --- writing ------------------------------------------------------------------------------------------------------


def write_peft(
    folder: Path,
    config: LoraConfig,
    pairs: Mapping[str, tuple[Array, Array]],
    *,
    base_name: str,
    lock: Lock | None = None,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write a directory that `peft` loads; it appears whole or not at all, and replaces an older one.

    `pairs` maps module names to (A [r, d_in], B [r, d_out]) fp32; the file holds B as PEFT does, [d_out, r].
    `files` are further files of the folder by name.
    """
    tensors: dict[str, Any] = {}
    for module, (a, b) in pairs.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = np.ascontiguousarray(a, np.float32)
        tensors[f"base_model.model.{module}.lora_B.weight"] = np.ascontiguousarray(b.T, np.float32)
    contents = {
        CONFIG: json.dumps(_peft_config(config, base_name), indent=2).encode(),
        WEIGHTS: save(tensors, metadata={"format": "pt"}),
        **(files or {}),
    }
    if lock is not None:
        contents[LOCK] = msgspec.json.format(msgspec.json.encode(lock), indent=2)
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = folder.parent / f".{folder.name}.{os.getpid()}.new"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    for name, content in contents.items():
        _write_durably(fresh / name, content)
    if folder.exists():
        old = folder.parent / f".{folder.name}.{os.getpid()}.old"
        folder.rename(old)
        fresh.rename(folder)
        shutil.rmtree(old)
    else:
        fresh.rename(folder)


def _peft_config(config: LoraConfig, base_name: str) -> dict[str, Any]:
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


def _write_durably(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


# --- the lock file ------------------------------------------------------------------------------------------------


class LockedBase(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The base an adapter was trained on."""

    name: str
    sha256: str


class LockedTemplate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The template an adapter was trained with: a chat template, or a prompt over columns."""

    kind: Literal["chat", "prompt"]
    text: str
    sha256: str

    @staticmethod
    def of(kind: Literal["chat", "prompt"], text: str) -> LockedTemplate:
        return LockedTemplate(kind, text, hashlib.sha256(text.encode()).hexdigest())


class Lock(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`lorikeet.json`: what an adapter was trained on and with."""

    version: Literal[1] = 1
    base: LockedBase
    tokenizer_sha256: str
    stop_ids: tuple[int, ...]
    template: LockedTemplate | None = None
    recipe_sha256: str | None = None
    data_sha256: str | None = None
    code_version: str | None = None


def read_lock(folder: Path) -> Lock | None:
    """The lock of an adapter folder, None where it has none (an adapter from elsewhere). AdapterError if broken."""
    path = folder / LOCK
    if not path.exists():
        return None
    try:
        lock = msgspec.json.decode(path.read_bytes(), type=Lock)
    except (OSError, msgspec.DecodeError) as error:
        raise AdapterError(f"{LOCK}: {error}", hint=f"the file is {path}", param=LOCK) from error
    if lock.template is not None and LockedTemplate.of(lock.template.kind, lock.template.text) != lock.template:
        raise AdapterError(f"{LOCK}: template.sha256 is not that of template.text", hint="the file was edited")
    return lock


def write_lock(folder: Path, lock: Lock) -> None:
    """Write `lorikeet.json`, whole or not at all."""
    fresh = folder / f".{LOCK}.{os.getpid()}"
    _write_durably(fresh, msgspec.json.format(msgspec.json.encode(lock), indent=2))
    fresh.replace(folder / LOCK)


def check_lock(lock: Lock, base: BaseIdentity) -> None:
    """Raise LockMismatchError (409) whose hint names what differs between the lock and the served base."""
    differences = []
    if lock.base.sha256 != base.sha256:
        differences.append(
            f"base: trained on {lock.base.name} ({lock.base.sha256[:12]}), serving {base.name} ({base.sha256[:12]})"
        )
    if lock.tokenizer_sha256 != base.tokenizer_sha256:
        differences.append(f"tokenizer: {lock.tokenizer_sha256[:12]} then, {base.tokenizer_sha256[:12]} now")
    if sorted(lock.stop_ids) != sorted(base.stop_ids):
        differences.append(f"stop ids: {sorted(lock.stop_ids)} then, {sorted(base.stop_ids)} now")
    if differences:
        raise LockMismatchError(
            f"the adapter was trained for another {' and '.join(d.split(':')[0] for d in differences)}",
            hint="; ".join(differences) + "; retrain it, or start with --allow-lock-mismatch",
        )
