"""Adapters on disk: the tensors of PEFT directories (read and written), content hashes, lock files. No torch."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from lorikeet.adapters.configs import (
    CONFIG,
    AdapterConfig,
    Ia3Config,
    LoraConfig,
    LoreftConfig,
    PeftConfig,
    peft_fields,
    read_config,
)
from lorikeet.adapters.foreign import missing_weights, unwrapped
from lorikeet.adapters.safefile import SafeFile, TensorEntry
from lorikeet.errors import AdapterError, LockMismatchError
from lorikeet.types import BaseIdentity

WEIGHTS, LOCK = "adapter_model.safetensors", "lorikeet.json"
# What an adapter's folder may hold of a tokenizer of its own (`model.tokenizer.Tokenizers`).
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json")
Signature = tuple[tuple[str, int, int, int], ...]  # (file name, inode, ctime in ns, size) of what makes an adapter
# What a stored tensor is of its module. A and B: LoRA. `rows`: trained rows of an embedding or a head. `weight`: the
# module's own. `original`: that of the base below what was trained. `shared` parts belong to the adapter as a whole.
Part = Literal[
    "A", "B", "B.bias", "magnitude", "bias", "ia3", "lambda_b", "lambda_d", "shared_A", "shared_B",
    "embedding_A", "embedding_B", "rows", "weight", "original",
    "reft.rotate", "reft.weight", "reft.bias",
]  # fmt: skip
Array = NDArray[np.float32]

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
    "original": r"(?:token_adapter\.)?(?:base_layer|original_module)\.weight",
    "weight": r"(?:modules_to_save\.(?:default\.)?)?weight",
}
_KEYS = {part: re.compile(rf"(?:base_model\.model\.)?(?P<module>[^/\\]+?)\.{end}") for part, end in _SUFFIXES.items()}
_FLOATS = ("F32", "BF16", "F16", "F64")


class AdapterFile:
    """A PEFT directory whose config and header are checked; `load` reads the tensors.

    `shapes` maps (module name in the base, part) to the stored shape; of LoRA, A is [r, d_in] and B is [d_out, r].
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_config(folder)
        path = folder / WEIGHTS
        if not path.exists():
            raise missing_weights(folder, WEIGHTS)
        self._file = SafeFile(path)
        self._copies: list[tuple[tuple[str, Part], TensorEntry]] = []
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
        for key, copy in self._copies:
            if data[copy.start : copy.stop] != raw[key][1]:
                message = f"{WEIGHTS}: {stored_name(*key)} is there twice, with different values"
                raise AdapterError(message, param=key[0])
        return {key: self._decode(key, *parts) for key, parts in raw.items()}, content_hash(self.config, raw)

    def _parse_names(self) -> dict[tuple[str, Part], TensorEntry]:
        entries: dict[tuple[str, Part], TensorEntry] = {}
        for name, entry in self._file.entries.items():
            key = parse_name(name)
            if entry.dtype not in _FLOATS:
                raise AdapterError(f"{WEIGHTS}: {name}: expected {' or '.join(_FLOATS)}, found {entry.dtype}")
            if key[1] in ("A", "B") and len(entry.shape) != 2:
                raise AdapterError(f"{WEIGHTS}: {name}: expected two dimensions, found {list(entry.shape)}")
            if key in entries:  # PEFT writes some under two names where it saves embedding and head beside a pair
                self._copies.append((key, entry))
                continue
            entries[key] = entry
        if not entries:
            raise AdapterError(f"{WEIGHTS}: no tensors")
        return entries

    def _decode(self, key: tuple[str, Part], entry: TensorEntry, raw: memoryview) -> Array:
        values = decode(entry, raw)
        _check_finite(key, values)
        return values


def _check_finite(key: tuple[str, Part], values: Array) -> None:
    if not np.isfinite(values).all():
        bad = int(np.count_nonzero(~np.isfinite(values)))
        raise AdapterError(f"{WEIGHTS}: {stored_name(*key)}: {bad} of {values.size} values are NaN or infinite")


def parse_name(name: str) -> tuple[str, Part]:
    """What a tensor of the file is: (module of the base, part of it). AdapterError for a name that is not known."""
    name = unwrapped(name)
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
            "original": "base_layer.weight", "rows": "token_adapter.trainable_tokens_delta"}  # fmt: skip
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
        if isinstance(config, PeftConfig) and part == "weight":
            meaning += [config.saves_whole(module)]
        digest.update(msgspec.msgpack.encode(meaning))
        digest.update(raw)
    return digest.hexdigest()


def signature_of(folder: Path) -> Signature | None:
    """Changes when the adapter's files are replaced; None when the folder holds no adapter."""
    parts = []
    for name in (CONFIG, WEIGHTS, LOCK, *TOKENIZER_FILES):
        try:
            stat = (folder / name).stat()
        except OSError:
            if name == CONFIG:
                return None
            continue
        parts.append((name, stat.st_ino, stat.st_ctime_ns, stat.st_size))  # a copy may have the time of its original
    return tuple(parts)


# --- writing ------------------------------------------------------------------------------------------------------


def write_peft(
    folder: Path,
    config: LoraConfig,
    pairs: Mapping[str, tuple[Array, Array]],
    *,
    base_name: str,
    lock: Lock | None = None,
    files: Mapping[str, bytes] | None = None,
) -> str:
    """Write a directory that `peft` loads; it appears whole or not at all, and replaces an older one.

    `pairs` maps module names to (A [r, d_in], B [r, d_out]) fp32; the file holds B as PEFT does, [d_out, r].
    `files` are further files of the folder by name. Returns the content hash, as `AdapterFile.load` tells it. Raises
    `AdapterError` for values that are not finite: nobody could load them.
    """
    stored: dict[tuple[str, Part], Array] = {}
    for module, (a, b) in pairs.items():
        stored[module, "A"] = np.ascontiguousarray(a, np.float32)
        stored[module, "B"] = np.ascontiguousarray(b.T, np.float32)
    for key, values in stored.items():
        _check_finite(key, values)
    contents = {
        CONFIG: json.dumps(peft_fields(config, base_name), indent=2).encode(),
        WEIGHTS: save({f"base_model.model.{stored_name(*key)}": one for key, one in stored.items()}, {"format": "pt"}),
        **(files or {}),
    }
    if lock is not None:
        contents[LOCK] = msgspec.json.format(msgspec.json.encode(lock), indent=2)
    write_folder(folder, contents)
    raw = {key: (TensorEntry("F32", one.shape, 0, one.nbytes), one.reshape(-1).data) for key, one in stored.items()}
    return content_hash(config, raw)


def write_folder(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write a folder of files by name; it appears whole or not at all, and replaces an older one."""
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
