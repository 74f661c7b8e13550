"""Reading a safetensors file without torch: a bounded, checked header first, the bytes after.

The format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, the data.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
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
    """An open safetensors file whose header is checked; nothing of the data is read yet.

    `entries` maps tensor names to places, in order of name. Raises `error` (AdapterError or ModelError) for a file
    that is truncated, corrupt, or whose header is longer than `max_header` bytes.
    """

    def __init__(self, path: Path, *, error: type[LorikeetError] = AdapterError, max_header: int = 16 * 2**20) -> None:
        self.path = path
        self._error = error
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as problem:
            raise self._fail(f"cannot be read: {problem.strerror}") from problem
        try:
            self._size = self._file.seek(0, 2)
            self._header = self._read_header(max_header)
            header = self._parse_header()
            self.entries = {name: self._entry(name, header[name]) for name in sorted(header)}
            self._check_layout()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> SafeFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()

    def map(self) -> memoryview:
        """The whole file, memory-mapped: for files that nobody rewrites while they are in use."""
        return memoryview(mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ))

    def read(self) -> memoryview:
        """The whole file, copied into memory: what is hashed is then what is used, whatever happens to the file."""
        self._file.seek(0)
        data = self._file.readall()
        if len(data) != self._size or not data.startswith(self._header):
            raise self._fail("changed while it was read; write a new folder and rename it into place")
        return memoryview(data)

    def _fail(self, message: str) -> LorikeetError:
        return self._error(f"{self.path.name}: {message}", hint=f"the file is {self.path}", param=self.path.name)

    def _read_header(self, limit: int) -> bytes:
        self._file.seek(0)
        prefix = self._file.read(8)
        if len(prefix) < 8:
            raise self._fail(f"not a safetensors file: {self._size} bytes, expected a header")
        (length,) = struct.unpack("<Q", prefix)
        if length > limit:
            raise self._fail(f"header of {length} bytes, expected at most {limit}; corrupt or not a safetensors file")
        if 8 + length > self._size:
            raise self._fail(f"truncated: header of {length} bytes in a file of {self._size}")
        return prefix + self._file.read(length)

    def _parse_header(self) -> dict[str, Any]:
        try:
            header = json.loads(self._header[8:].decode("utf-8"), object_pairs_hook=unique_pairs)
        except (ValueError, RecursionError) as problem:
            raise self._fail(f"header is not valid: {problem}") from problem
        if not isinstance(header, dict):
            raise self._fail("header is not a JSON object")
        header.pop("__metadata__", None)
        return header

    def _entry(self, name: str, raw: Any) -> TensorEntry:
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
        offset = len(self._header)
        if offset + stop > self._size:
            raise self._fail(f"truncated: tensor {name!r} ends at byte {offset + stop} of a file of {self._size} bytes")
        return TensorEntry(dtype, shape, offset + start, offset + stop)

    def _check_layout(self) -> None:
        """Tensors follow each other without gap or overlap, up to the end of the file."""
        at = len(self._header)
        for name, entry in sorted(self.entries.items(), key=lambda item: (item[1].start, item[1].stop)):
            if entry.start != at:
                raise self._fail(f"tensor {name!r} starts at byte {entry.start}, expected {at}: overlap or gap")
            at = entry.stop
        if at != self._size:
            raise self._fail(f"{self._size - at} bytes after the last tensor, expected none")


def unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`object_pairs_hook` for json: a name that stands twice is an error, not the last one wins."""
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"duplicate name {next(n for n in names if names.count(n) > 1)!r}")
    return value
