"""Reading a safetensors file without torch: a bounded, checked header, then the bytes through a memory map.

The format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, the data.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorikeet.errors import AdapterError, LorikeetError

DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: bytes `start:stop` of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class SafeFile:
    """A checked and memory-mapped safetensors file.

    `entries` maps tensor names to places, in order of name. Raises `error` (AdapterError or ModelError) for a file
    that is truncated, corrupt, or whose header is longer than `max_header` bytes.
    """

    def __init__(self, path: Path, *, error: type[LorikeetError] = AdapterError, max_header: int = 16 * 2**20) -> None:
        self.path = path
        self._error = error
        try:
            with path.open("rb") as file:
                size = file.seek(0, 2)
                file.seek(0)
                data_start, header = self._read_header(file.read(8), file.read, size, max_header)
                self.entries = {name: self._entry(name, header[name], data_start, size) for name in sorted(header)}
                self._check_layout(data_start, size)
                self._map = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except OSError as problem:
            raise self._fail(f"cannot be read: {problem.strerror or problem}") from problem

    def tensor_bytes(self, name: str) -> memoryview:
        """The raw little-endian bytes of a tensor, not copied."""
        entry = self.entries[name]
        return self._map[entry.start : entry.stop]

    def _fail(self, message: str) -> LorikeetError:
        return self._error(f"{self.path.name}: {message}", hint=f"the file is {self.path}", param=self.path.name)

    def _read_header(self, prefix: bytes, read: Any, size: int, limit: int) -> tuple[int, dict[str, Any]]:
        if len(prefix) < 8:
            raise self._fail(f"not a safetensors file: {size} bytes, expected a header")
        (length,) = struct.unpack("<Q", prefix)
        if length > limit:
            raise self._fail(f"header of {length} bytes, expected at most {limit}; corrupt or not a safetensors file")
        if 8 + length > size:
            raise self._fail(f"truncated: header of {length} bytes in a file of {size}")
        try:
            header = json.loads(read(length).decode("utf-8"), object_pairs_hook=_no_duplicates)
        except (ValueError, RecursionError) as problem:
            raise self._fail(f"header is not valid: {problem}") from problem
        if not isinstance(header, dict):
            raise self._fail("header is not a JSON object")
        header.pop("__metadata__", None)
        return 8 + length, header

    def _entry(self, name: str, raw: Any, data_start: int, size: int) -> TensorEntry:
        try:
            dtype, shape, (start, stop) = raw["dtype"], tuple(raw["shape"]), raw["data_offsets"]
            valid = isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in (*shape, start, stop))
        except (TypeError, KeyError, ValueError):
            valid = False
        if not valid:
            raise self._fail(f"tensor {name!r}: malformed header entry {str(raw)[:200]}")
        if dtype not in DTYPE_BYTES:
            raise self._fail(f"tensor {name!r}: dtype {dtype} is not supported, expected {', '.join(DTYPE_BYTES)}")
        expected = math.prod(shape) * DTYPE_BYTES[dtype]
        if stop - start != expected:
            raise self._fail(
                f"tensor {name!r}: {dtype}{list(shape)} needs {expected} bytes, the header gives {stop - start}"
            )
        if data_start + stop > size:
            raise self._fail(f"truncated: tensor {name!r} ends at byte {data_start + stop} of a file of {size} bytes")
        return TensorEntry(dtype, shape, data_start + start, data_start + stop)

    def _check_layout(self, data_start: int, size: int) -> None:
        """Tensors follow each other without gap or overlap, up to the end of the file."""
        at = data_start
        for name, entry in sorted(self.entries.items(), key=lambda item: (item[1].start, item[1].stop)):
            if entry.start != at:
                raise self._fail(f"tensor {name!r} starts at byte {entry.start}, expected {at}: overlap or gap")
            at = entry.stop
        if at != size:
            raise self._fail(f"{size - at} bytes after the last tensor, expected none")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"duplicate name {next(n for n in names if names.count(n) > 1)!r}")
    return value
