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
Side = Literal["A", "B"]
Array = NDArray[np.float32]
Number = TypeVar("Number", int, float)

_MAX_JSON = 2**20
_PICKLED = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "adapter_model.ckpt", "adapter_model.pkl")
_KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>[^/\\]+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
_FLOATS = ("F32", "BF16", "F16", "F64")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """What an `adapter_config.json` says that changes the computation.

    Ranks and alphas of a module are those of the first pattern that matches its name, else `r` and `alpha`.
    """

    r: int
    alpha: float
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    target_modules: str | tuple[str, ...] = ()
    exclude_modules: str | tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()

    def rank_of(self, module: str) -> int:
        return _first_match(self.rank_pattern, module, self.r)

    def scale_of(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA (Kalajdzievski 2023)."""
        rank, alpha = self.rank_of(module), _first_match(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

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


def _first_match(patterns: Mapping[str, Number], module: str, default: Number) -> Number:
    return next((v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _names(wanted: str | tuple[str, ...], module: str) -> bool:
    """A string is a regular expression over the whole name; a list holds names or their last parts."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in wanted)


class AdapterFile:
    """A PEFT LoRA directory whose config and header are checked; `load` reads the tensors.

    `shapes` maps (module name in the base, "A" or "B") to the stored shape: A is [r, d_in], B is [d_out, r].
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

    def load(self) -> tuple[dict[tuple[str, Side], Array], str]:
        """All tensors as finite fp32 in their stored shapes, and the content hash of exactly these bytes."""
        data = self._file.read()
        raw = {key: (entry, data[entry.start : entry.stop]) for key, entry in self._entries.items()}
        return {key: self._decode(key, *parts) for key, parts in raw.items()}, content_hash(self.config, raw)

    def _parse_names(self) -> dict[tuple[str, Side], TensorEntry]:
        entries: dict[tuple[str, Side], TensorEntry] = {}
        for name, entry in self._file.entries.items():
            match = _KEY.fullmatch(name)
            if match is None:
                hint = "expected base_model.model.<module>.lora_A.weight or lora_B.weight of linear layers"
                raise AdapterError(f"{WEIGHTS}: tensor {name!r} is not supported", hint=hint, param=name)
            if entry.dtype not in _FLOATS:
                raise AdapterError(f"{WEIGHTS}: {name}: expected {' or '.join(_FLOATS)}, found {entry.dtype}")
            if len(entry.shape) != 2:
                raise AdapterError(f"{WEIGHTS}: {name}: expected two dimensions, found {list(entry.shape)}")
            key: tuple[str, Side] = (match["module"], "A" if match["side"] == "A" else "B")
            if key in entries:
                raise AdapterError(f"{WEIGHTS}: {name}: the tensor is there with and without prefix or `.default`")
            entries[key] = entry
        if not entries:
            raise AdapterError(f"{WEIGHTS}: no tensors")
        return entries

    def _decode(self, key: tuple[str, Side], entry: TensorEntry, raw: memoryview) -> Array:
        values = decode(entry, raw)
        if not np.isfinite(values).all():
            bad = int(np.count_nonzero(~np.isfinite(values)))
            raise AdapterError(f"{WEIGHTS}: {key[0]}.lora_{key[1]}: {bad} of {values.size} values are NaN or infinite")
        return values


def decode(entry: TensorEntry, raw: memoryview) -> Array:
    """Stored bytes -> fp32 of the entry's shape (fp32 is not copied)."""
    if entry.dtype == "BF16":
        wide = np.frombuffer(raw, "<u2").astype(np.uint32) << 16
        return wide.view(np.float32).reshape(entry.shape)
    stored = np.frombuffer(raw, {"F32": "<f4", "F16": "<f2", "F64": "<f8"}[entry.dtype])
    with np.errstate(over="ignore"):  # an fp64 beyond fp32 becomes infinite, which the caller refuses
        return stored.astype(np.float32, copy=False).reshape(entry.shape)


def content_hash(config: LoraConfig, tensors: Mapping[tuple[str, Side], tuple[TensorEntry, memoryview]]) -> str:
    """sha256 over the sorted tensors (name, dtype, shape, bytes) and, for each module, its rank and scale.

    Patterns are resolved first: configs that mean the same hash the same, however they are written.
    """
    digest = hashlib.sha256(b"lora")
    for (module, side), (entry, raw) in sorted(tensors.items(), key=lambda item: item[0]):
        meaning = [module, side, entry.dtype, list(entry.shape), config.rank_of(module), config.scale_of(module)]
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


def read_config(folder: Path) -> LoraConfig:
    """`adapter_config.json`, every field handled, known to be irrelevant, or refused by name (AdapterError)."""
    raw = _read_json(folder / CONFIG)
    refuse_unsupported(raw, CONFIG)
    layers = raw.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    pattern = raw.get("layers_pattern") or ()
    targets = raw.get("target_modules")
    if layers is not None and isinstance(targets, str):
        raise field_error(CONFIG, "layers_to_transform", "null with a target_modules pattern", layers)
    config = LoraConfig(
        r=_checked("r", raw.get("r", 8), int),
        alpha=_checked("lora_alpha", raw.get("lora_alpha", 8), float),
        use_rslora=_flag("use_rslora", raw.get("use_rslora")),
        rank_pattern=_patterns("rank_pattern", raw, int),
        alpha_pattern=_patterns("alpha_pattern", raw, float),
        target_modules=_targets("target_modules", targets),
        exclude_modules=_targets("exclude_modules", raw.get("exclude_modules") or ()),
        layers_to_transform=None if layers is None else _layers(layers),
        layers_pattern=(pattern,) if isinstance(pattern, str) else tuple(pattern),
    )
    expressions = {
        "rank_pattern": list(config.rank_pattern),
        "alpha_pattern": list(config.alpha_pattern),
        "layers_pattern": list(config.layers_pattern),
        "target_modules": [config.target_modules] if isinstance(config.target_modules, str) else [],
        "exclude_modules": [config.exclude_modules] if isinstance(config.exclude_modules, str) else [],
    }
    for name, patterns in expressions.items():
        for expression in patterns:
            try:
                re.compile(expression)
            except (re.error, TypeError, RecursionError, OverflowError) as error:
                raise field_error(CONFIG, name, "a regular expression", expression, str(error)) from error
    return config


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
    return {key: _checked(f"{name}.{key}", one, kind) for key, one in value.items()}


def _targets(name: str, value: Any) -> str | tuple[str, ...]:
    if isinstance(value, str):
        return value
    if not isinstance(value, list | tuple) or not all(isinstance(one, str) for one in value):
        raise field_error(CONFIG, name, "a list of module names or a pattern", value)
    if name == "target_modules" and not value:
        raise field_error(CONFIG, name, "at least one module", value)
    return tuple(sorted(value))


def _layers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(one) is int for one in value):
        raise field_error(CONFIG, "layers_to_transform", "a list of layer numbers", value)
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
