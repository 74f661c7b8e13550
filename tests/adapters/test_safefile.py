"""The safetensors reader against the safetensors library, and against every kind of damage."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from lorikeet.adapters.safefile import SafeFile
from lorikeet.errors import AdapterError, LorikeetError, ModelError


def raw_file(path: Path, header: Any, data: bytes = b"") -> Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return path


def test_reads_what_the_library_wrote(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        "b": rng.normal(size=(3, 5)).astype(np.float32),
        "a": rng.normal(size=(7,)).astype(np.float16),
        "scalar": np.array(4, np.int64),
        "empty": np.zeros((0, 4), np.float32),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    with SafeFile(tmp_path / "x.safetensors") as file:
        assert list(file.entries) == sorted(tensors)
        for data in (file.map(), file.read()):
            for name, expected in tensors.items():
                entry = file.entries[name]
                assert entry.shape == expected.shape
                assert bytes(data[entry.start : entry.stop]) == expected.tobytes()


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"{", b"", "header is not valid"),
        (b"\xff\xff", b"", "header is not valid"),
        (b"[1]", b"", "not a JSON object"),
        (b"[" * 100_000, b"", "header is not valid"),
        ({"x": 3}, b"", "tensor 'x': malformed header entry"),
        ({"x": {**ONE, "shape": [-2]}}, b"\0" * 8, "tensor 'x': malformed"),
        ({"x": {**ONE, "shape": [True, 2]}}, b"\0" * 8, "tensor 'x': malformed"),
        ({"x": {**ONE, "data_offsets": [0]}}, b"\0" * 8, "tensor 'x': malformed"),
        ({"x": {**ONE, "dtype": "F8_E4M3"}}, b"\0" * 8, "dtype F8_E4M3 is not supported"),
        ({"x": {**ONE, "shape": [3]}}, b"\0" * 8, r"F32\[3\] needs 12 bytes, the header gives 8"),
        ({"x": ONE}, b"\0" * 7, "truncated: tensor 'x' ends at byte"),
        ({"x": ONE}, b"\0" * 9, "1 bytes after the last tensor"),
        ({"x": ONE, "y": {**ONE, "data_offsets": [4, 12]}}, b"\0" * 12, "overlap or gap"),
        ({"x": ONE, "y": {**ONE, "data_offsets": [12, 20]}}, b"\0" * 20, "overlap or gap"),
        (
            b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
            b"\0" * 8,
            "duplicate name 'x'",
        ),
    ],
)
def test_damage_is_named(header: Any, data: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=message):
        SafeFile(raw_file(tmp_path / "x.safetensors", header, data))


def test_a_header_is_bounded_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(AdapterError, match="header of 1152921504606846976 bytes, expected at most"):
        SafeFile(path)
    with pytest.raises(ModelError, match="expected at most 10"):
        SafeFile(raw_file(path, {"x": ONE}, b"\0" * 8), error=ModelError, max_header=10)


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"x": np.zeros(4, np.float32)}, path)
    with SafeFile(path) as file:
        with path.open("r+b") as other:
            other.truncate(path.stat().st_size - 1)
        with pytest.raises(AdapterError, match="changed while it was read"):
            file.read()


WHOLE = save({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.float16)})


@settings(max_examples=200, deadline=None)
@given(length=st.integers(0, len(WHOLE) - 1))
def test_every_truncation_is_an_error(length: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "truncated.safetensors"
    path.write_bytes(WHOLE[:length])
    with pytest.raises(AdapterError, match=r"truncated\.safetensors: "):
        SafeFile(path)


@settings(max_examples=300, deadline=None)
@given(at=st.integers(0, len(WHOLE) - 1), byte=st.integers(0, 255))
def test_a_flipped_byte_never_crashes(at: int, byte: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "flipped.safetensors"
    path.write_bytes(WHOLE[:at] + bytes([byte]) + WHOLE[at + 1 :])
    try:
        with SafeFile(path) as file:
            data = file.read()
            assert all(entry.stop <= len(data) for entry in file.entries.values())
    except LorikeetError:
        pass
