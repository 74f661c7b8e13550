"""Fusing: base + adapter as a plain Hugging Face checkpoint.

What an adapter changes (`changes`) is computed in fp32 (fp64 where the base is) and rounded once, to the base's own
dtype or the one asked for. Tensors go from file to file in blocks of rows, so that memory holds a block and not the
model. No torch.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from lorikeet.adapters.changes import Change, changes_of
from lorikeet.adapters.compiled import bfloat16_bits
from lorikeet.adapters.files import TOKENIZER_FILES, AdapterFile, Lock, check_lock, read_lock
from lorikeet.adapters.safefile import DTYPE_BYTES, SafeFile
from lorikeet.adapters.stored import FLOATS, Tensor, Values, open_tensors, quantised_dtype
from lorikeet.errors import AdapterError, ConfigError, ModelError
from lorikeet.model.names import checkpoint_shapes
from lorikeet.model.spec import ModelSpec
from lorikeet.types import BaseIdentity

Dtype = Literal["float32", "bfloat16", "float16"]
Report = Callable[[int, int], None]

_FLOATS = tuple(FLOATS.values())
_BLOCK = 2**22  # values that are widened at a time
_MAX_HEADER = 100 * 2**20  # what safetensors itself allows
_INDEX = "model.safetensors.index.json"
# Other forms of the base's weights: beside the fused ones they would be a second, different model.
_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".index.json")
_TEMPLATES = "additional_chat_templates"  # the one folder that belongs to a tokenizer


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """The checkpoint to fuse into; `config` is its config.json, and `spec` what that says of the decoder.

    `identity` is asked only for an adapter that has a lock file.
    """

    folder: Path
    files: Sequence[Path]
    config: Mapping[str, Any]
    spec: ModelSpec
    identity: Callable[[], BaseIdentity]


def fuse(
    base: BaseModel,
    adapter: Path,
    output: Path,
    *,
    dtype: Dtype | None = None,
    force: bool = False,
    allow_lock_mismatch: bool = False,
    report: Report | None = None,
) -> Lock | None:
    """Write `base` with the PEFT directory `adapter` put in as the checkpoint `output`; the adapter's lock.

    Config, tokenizer and generation config are the base's; an adapter that has a tokenizer, a chat template or stop ids
    of its own brings them along. The folder appears whole or not at all. `report` hears of (bytes written, in all).

    Raises ConfigError where `output` is in the way, AdapterError for an adapter that does not fit or cannot be held by
    plain weights, LockMismatchError for one of another base, ModelError for a base that cannot be read or whose
    weights leave the range of the dtype.
    """
    _check_output(base.folder, adapter, output, force)
    lock = read_lock(adapter)
    if lock is not None and not allow_lock_mismatch:
        check_lock(lock, base.identity())
    output.parent.mkdir(parents=True, exist_ok=True)
    fresh = output.parent / f".{output.name}.{os.getpid()}.new"
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        fresh.mkdir()
        with ExitStack() as stack:
            files = [stack.enter_context(SafeFile(p, error=ModelError, max_header=_MAX_HEADER)) for p in base.files]
            tensors = open_tensors(files, quantised_dtype(base.config, base.folder / "config.json"))
            _check_tensors(base, tensors)
            with AdapterFile(adapter) as file:
                changes = changes_of(adapter.name, file, base.spec, tensors)
            writer = _Writer(tensors, None if dtype is None else FLOATS[dtype], report)
            _write_weights(base, tensors, changes, fresh, writer)
        _write_rest(base, fresh, dtype)
        _write_tokenizer(adapter, lock, fresh)
        _appear(fresh, output)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    return lock


def _check_output(base: Path, adapter: Path, output: Path, force: bool) -> None:
    if not (output.exists() or output.is_symlink()):
        return
    if any(source.resolve().is_relative_to(output.resolve()) for source in (base, adapter)):
        raise ConfigError(f"--output: {output} holds the base or the adapter", param="output")
    if not (output / "config.json").exists() or output.is_symlink():
        raise ConfigError(f"--output: {output} exists and is not a model's folder", param="output")
    if not force:
        raise ConfigError(f"--output: {output} exists", hint="--force replaces it", param="output")


def _appear(fresh: Path, output: Path) -> None:
    if not output.exists():
        fresh.rename(output)
        return
    old = output.parent / f".{output.name}.{os.getpid()}.old"
    output.rename(old)
    fresh.rename(output)
    shutil.rmtree(old)


# --- weights ------------------------------------------------------------------------------------------------------


def _write_weights(
    base: BaseModel, tensors: Mapping[str, Tensor], changes: Mapping[str, Change], target: Path, writer: _Writer
) -> None:
    """The files of the base under their own names, with the index where there are several."""
    for path in base.files:
        writer.write(target / path.name, {n: t for n, t in tensors.items() if t.file == path.name}, changes)
    index = base.folder / _INDEX
    if index.exists():
        old = json.loads(index.read_text("utf-8"))
        metadata = {**(old.get("metadata") or {}), "total_size": writer.total}
        content = {"metadata": metadata, "weight_map": {name: t.file for name, t in sorted(tensors.items())}}
        (target / _INDEX).write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def _check_tensors(base: BaseModel, tensors: Mapping[str, Tensor]) -> None:
    """Every tensor of the spec is there, in its shape, as floats."""
    for name, shape in checkpoint_shapes(base.spec).items():
        tensor = tensors.get(name)
        if tensor is None:
            raise ModelError(f"{base.folder}: tensor {name} is missing", param=name)
        if tensor.shape != shape:
            raise ModelError(f"{base.folder}: {name}: expected {list(shape)}, found {list(tensor.shape)}", param=name)
        if tensor.dtype not in _FLOATS:
            raise ModelError(
                f"{base.folder}: {name}: expected {' or '.join(_FLOATS)}, found {tensor.dtype}", param=name
            )


class _Writer:
    """Writes tensors with the adapter in them as safetensors files, all floats in `dtype` (None: each in its own)."""

    def __init__(self, tensors: Mapping[str, Tensor], dtype: str | None, report: Report | None) -> None:
        self._dtype, self._report = dtype, report
        self._done = 0
        self.total = sum(math.prod(tensor.shape) * DTYPE_BYTES[self._stored(tensor)] for tensor in tensors.values())

    def write(self, path: Path, tensors: Mapping[str, Tensor], changes: Mapping[str, Change]) -> None:
        # Wide dtypes first, so that all are aligned.
        order = sorted(tensors, key=lambda name: (-DTYPE_BYTES[self._stored(tensors[name])], name))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name in order:
            dtype, shape = self._stored(tensors[name]), tensors[name].shape
            stop = at + math.prod(shape) * DTYPE_BYTES[dtype]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (at, stop)}
            at = stop
        encoded = msgspec.json.encode(header)
        encoded += b" " * (-len(encoded) % 8)
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(encoded)) + encoded)
            for name in order:
                for block in _blocks(name, tensors[name], self._stored(tensors[name]), changes.get(name)):
                    file.write(block)
                    self._done += len(block)
                    if self._report is not None:
                        self._report(self._done, self.total)
            file.flush()
            os.fsync(file.fileno())

    def _stored(self, tensor: Tensor) -> str:
        return self._dtype if self._dtype is not None and tensor.dtype in _FLOATS else tensor.dtype


def _blocks(name: str, tensor: Tensor, dtype: str, change: Change | None) -> Iterator[memoryview]:
    """The bytes of the new tensor, a block of rows at a time; a tensor that stays as it is, is copied."""
    if change is None and dtype == tensor.dtype and tensor.raw is not None:
        for start in range(0, len(tensor.raw), 4 * _BLOCK):
            yield tensor.raw[start : start + 4 * _BLOCK]
        return
    rows = tensor.shape[0] if tensor.shape else 1
    step = max(1, _BLOCK // max(math.prod(tensor.shape[1:]), 1))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        values = tensor.rows(start, stop)
        if change is not None:
            values = change.apply(values, slice(start, stop))
        yield _rounded(name, values, dtype)


def _rounded(name: str, values: Values, dtype: str) -> memoryview:
    """To the stored dtype, nearest, ties to even. ModelError where a value has no finite form there."""
    stored: NDArray[Any]
    try:
        if dtype == "BF16":
            stored = bfloat16_bits(values.astype(np.float32, copy=False))
        else:
            with np.errstate(over="ignore"):
                stored = values.astype({"F32": "<f4", "F16": "<f2", "F64": "<f8"}[dtype])
            if not np.isfinite(stored).all():
                raise AdapterError("not finite")
    except AdapterError:
        hint = "fuse with --dtype bfloat16 or float32" if dtype == "F16" else "look for NaN in the base and the adapter"
        raise ModelError(f"{name}: a value is too large for {dtype}, or no number", hint=hint, param=name) from None
    return memoryview(np.ascontiguousarray(stored).reshape(-1).view(np.uint8).data)


# --- everything else ----------------------------------------------------------------------------------------------


def _write_rest(base: BaseModel, target: Path, dtype: Dtype | None) -> None:
    for path in sorted(base.folder.iterdir()):
        if path.name.startswith(".") or path.name.endswith(_OTHER_WEIGHTS):
            continue
        if path.is_file():
            shutil.copyfile(path, target / path.name)
        elif path.name == _TEMPLATES:
            shutil.copytree(path, target / path.name)
    config = {name: value for name, value in base.config.items() if name != "quantization_config"}
    if dtype is not None:
        config.pop("dtype", None)
        config["torch_dtype"] = dtype  # the older name of the same field, which every reader knows
    if config != base.config:
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def _write_tokenizer(adapter: Path, lock: Lock | None, target: Path) -> None:
    """What the adapter's requests are rendered and tokenised with when it is served, and where its answers end."""
    template, generation = target / "chat_template.jinja", "generation_config.json"
    if (adapter / "tokenizer_config.json").exists() and "chat_template" in _json(adapter / "tokenizer_config.json"):
        template.unlink(missing_ok=True)  # it would go before the one in the config
    for name in TOKENIZER_FILES:
        if (adapter / name).exists() and name != generation:
            shutil.copyfile(adapter / name, target / name)
    if lock is not None and lock.template is not None and lock.template.kind == "chat":
        template.write_text(lock.template.text, "utf-8")
    if (adapter / generation).exists():
        both = [_json(folder / generation) for folder in (target, adapter) if (folder / generation).exists()]
        ends = [one.get("eos_token_id") or [] for one in both]
        ids = {end for listed in ends for end in (listed if isinstance(listed, list) else [listed])}
        text = json.dumps(both[0] | {"eos_token_id": sorted(ids)}, indent=2)
        (target / generation).write_text(text + "\n", "utf-8")


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path.name}: cannot be read as JSON: {error}", hint=f"the file is {path}") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{path.name}: expected a JSON object, found {type(value).__name__}")
    return value
