"""Tensors of a checkpoint as they are stored: floats, or the 8-bit and 4-bit forms of bitsandbytes. No torch.

8 bits (LLM.int8, Dettmers et al. 2022): `W[i] = int8[i] * SCB[i] / 127`, a scale a row.
4 bits (QLoRA, Dettmers et al. 2023): two indices a byte, the first in the high half, into a map of 16 values, times the
largest magnitude of each block of `blocksize` values in row-major order. Those magnitudes may be quantised themselves:
8-bit indices into a map of 256 values, times the magnitude of their own block, plus an offset.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from lorikeet.adapters.files import Array, decode
from lorikeet.adapters.safefile import DTYPE_BYTES, SafeFile, TensorEntry
from lorikeet.errors import ModelError

Values = NDArray[np.floating[Any]]
Part = tuple[str, TensorEntry, memoryview]  # file, place and bytes of one stored tensor

FLOATS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}
_STATE = ".quant_state.bitsandbytes__"
_ROW_SCALE = ".SCB"


class Tensor(Protocol):
    """A tensor by its published name, however it is stored."""

    @property
    def file(self) -> str:
        """Name of the file that holds it."""
        ...

    @property
    def dtype(self) -> str:
        """Of its values, as safetensors names it."""
        ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def raw(self) -> memoryview | None:
        """Its bytes, where they are values of `dtype` one after the other."""
        ...

    def rows(self, start: int, stop: int) -> Values:
        """[stop - start, the other dimensions as one], fp32, or fp64 where it is stored so. Floats only."""
        ...


def is_quantised(names: Iterable[str]) -> bool:
    """Whether tensors of these names in a checkpoint are parts of quantised ones."""
    return any(_STATE in name or name.endswith(_ROW_SCALE) for name in names)


def open_tensors(files: Sequence[SafeFile], dtype: str = "F32") -> dict[str, Tensor]:
    """The tensors of a checkpoint's files by name; `dtype` is that of the values which quantised ones stand for.

    What belongs to a quantised tensor is no tensor of its own here; whether one is quantised its parts' names say.
    Raises ModelError for parts that are missing or do not fit.
    """
    parts: dict[str, Part] = {}
    for file in files:
        data = file.map()
        for name, entry in file.entries.items():
            parts[name] = (file.path.name, entry, data[entry.start : entry.stop])
    states = {name.partition(_STATE)[0]: name for name in parts if _STATE in name}
    rows = [name.removesuffix("SCB") + "weight" for name in parts if name.endswith(_ROW_SCALE)]
    tensors: dict[str, Tensor] = {name: _four_bits(name, state, parts, dtype) for name, state in states.items()}
    tensors |= {name: _eight_bits(name, parts, dtype) for name in rows}
    belongs = tuple(f"{name}." for name in states)
    extra = {name.removesuffix("weight") + end for name in rows for end in ("SCB", "weight_format")}
    plain = (n for n in parts if n not in tensors and n not in extra and not n.startswith(belongs))
    return tensors | {name: Plain(*parts[name]) for name in plain}


def quantised_dtype(config: Mapping[str, Any], source: Path) -> str:
    """The dtype of what quantised weights stand for, by the content of config.json at `source`; F32 where none are."""
    if not config.get("quantization_config"):
        return "F32"
    name = config.get("dtype") or config.get("torch_dtype")
    if name not in FLOATS:
        raise ModelError(f"{source}: dtype: expected {' or '.join(FLOATS)}, found {name!r}", param="dtype")
    return FLOATS[name]


@dataclass(frozen=True, slots=True)
class Plain:
    """Values one after the other."""

    file: str
    entry: TensorEntry
    raw: memoryview

    @property
    def dtype(self) -> str:
        return self.entry.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    def rows(self, start: int, stop: int) -> Values:
        row = math.prod(self.shape[1:])
        size = row * DTYPE_BYTES[self.dtype]
        raw = self.raw[start * size : stop * size]
        if self.dtype == "F64":
            return np.frombuffer(raw, "<f8").reshape(stop - start, row)
        return decode(TensorEntry(self.dtype, (stop - start, row), 0, len(raw)), raw)


@dataclass(frozen=True, slots=True)
class EightBits:
    """int8 [rows, columns] and a scale a row."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    values: NDArray[np.int8]
    scale: Array
    raw: None = None

    def rows(self, start: int, stop: int) -> Values:
        return self.values[start:stop].astype(np.float32) * (self.scale[start:stop, None] / np.float32(127))


@dataclass(frozen=True, slots=True)
class Magnitudes:
    """The largest magnitude of each block: as fp32, or as indices with a map, magnitudes and an offset of their own."""

    stored: NDArray[Any]
    map: Array | None = None
    of_blocks: Array | None = None
    blocksize: int = 1
    offset: float = 0.0

    def of(self, start: int, stop: int) -> Array:
        part = self.stored[start:stop]
        if self.map is None or self.of_blocks is None:
            return part
        larger = self.of_blocks[np.arange(start, stop) // self.blocksize]
        found: Array = self.map[part] * larger + np.float32(self.offset)
        return found


@dataclass(frozen=True, slots=True)
class FourBits:
    """Two indices a byte into `map`, and the magnitudes of blocks."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    packed: NDArray[np.uint8]
    map: Array
    magnitudes: Magnitudes
    blocksize: int
    raw: None = None

    def rows(self, start: int, stop: int) -> Values:
        row = math.prod(self.shape[1:])
        first, last = start * row, stop * row
        pairs = np.stack(np.broadcast_arrays(self.map[:, None], self.map), 2).reshape(
            256, 2
        )  # what each byte stands for
        packed = self.packed[first // 2 : -(-last // 2)]
        values = np.take(pairs, packed, axis=0).reshape(-1)[first % 2 :][: last - first]
        block = first // self.blocksize
        magnitudes = self.magnitudes.of(block, -(-last // self.blocksize))
        values *= np.repeat(magnitudes, self.blocksize)[first - block * self.blocksize :][: last - first]
        return values.reshape(stop - start, row)


def _eight_bits(name: str, parts: Mapping[str, Part], dtype: str) -> Tensor:
    stem = name.removesuffix("weight")
    file, entry, raw = _part(name, name, parts, ("I8",))
    scale = _numbers(name, f"{stem}SCB", parts, entry.shape[0])
    if f"{stem}weight_format" in parts:
        layout = bytes(parts[f"{stem}weight_format"][2])
        if any(layout):
            _unfit(name, f"weight_format: expected 0 (rows), found {list(layout)}")
    values = np.frombuffer(raw, np.int8).reshape(entry.shape[0], -1)
    return EightBits(file, dtype, entry.shape, values, scale)


def _four_bits(name: str, state_name: str, parts: Mapping[str, Part], dtype: str) -> Tensor:
    file, _, raw = _part(name, name, parts, tuple(DTYPE_BYTES))  # bytes, whatever dtype they are stored under
    try:
        state = json.loads(bytes(parts[state_name][2]))
        shape, blocksize = tuple(state["shape"]), state["blocksize"]
        nested = "nested_blocksize" in state
        nested_blocksize, offset = (state["nested_blocksize"], state["nested_offset"]) if nested else (1, 0.0)
        whole = all(type(n) is int and n > 0 for n in (*shape, blocksize, nested_blocksize))
    except (ValueError, KeyError, TypeError) as error:
        _unfit(name, f"{state_name} is not a quantisation state: {error}")
    count = math.prod(shape)
    if not whole or not isinstance(offset, float | int) or len(raw) != -(-count // 2):
        _unfit(name, f"{state_name}: expected sizes that fit {len(raw)} bytes, found {state}")
    blocks = -(-count // blocksize)
    if nested:
        _, _, indices = _part(name, f"{name}.absmax", parts, ("U8",), blocks)
        map_, of_blocks = (
            _numbers(name, f"{name}.nested_{what}", parts, size)
            for what, size in (("quant_map", 256), ("absmax", -(-blocks // nested_blocksize)))
        )
        magnitudes = Magnitudes(np.frombuffer(indices, np.uint8), map_, of_blocks, nested_blocksize, float(offset))
    else:
        magnitudes = Magnitudes(_numbers(name, f"{name}.absmax", parts, blocks))
    map16 = _numbers(name, f"{name}.quant_map", parts, 16)
    return FourBits(file, dtype, shape, np.frombuffer(raw, np.uint8), map16, magnitudes, blocksize)


def _numbers(name: str, part: str, parts: Mapping[str, Part], count: int) -> Array:
    _, entry, raw = _part(name, part, parts, ("F32",), count)
    return decode(entry, raw).reshape(-1)


def _part(name: str, part: str, parts: Mapping[str, Part], dtypes: tuple[str, ...], count: int | None = None) -> Part:
    found = parts.get(part)
    if found is None:
        _unfit(name, f"{part} is missing")
    _, entry, _ = found
    if entry.dtype not in dtypes or (count is not None and math.prod(entry.shape) != count):
        expected = f"{' or '.join(dtypes)}{'' if count is None else f' of {count} values'}"
        _unfit(name, f"{part}: expected {expected}, found {entry.dtype} {list(entry.shape)}")
    return found


def _unfit(name: str, problem: str) -> NoReturn:
    raise ModelError(f"{name}: cannot be dequantised: {problem}", hint="the checkpoint is not whole", param=name)
