"""Compiled adapters: one file in the layout of the device slab. No torch.

Layout: 8 bytes magic, 8 bytes little-endian header length, a msgpack header, then at the next multiple of 64 bytes the
data as one contiguous run. Rows of A and B start at multiples of 64 bytes; offsets and strides are in elements from
the start of the data, so that bringing an adapter into the slab is one copy and its table is its offsets plus a base.
Every A of a layer stands before its first B: those that a step reads together (of q, k and v, say) are one stream.

Compiled for several processes that hold the base together (`model.shard`), a file has the part of each, one after the
other, and then once what every rank needs of overrides. Parts differ in their numbers alone: one header is for all.
"""

from __future__ import annotations

import errno
import hashlib
import os
import struct
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from lorikeet.adapters.checkpoint import BaseTensors
from lorikeet.adapters.configs import CONFIG, LoraConfig, LoreftConfig, PeftConfig
from lorikeet.adapters.files import WEIGHTS, AdapterFile, Array, check_lock, read_lock
from lorikeet.adapters.foreign import check_not_reordered
from lorikeet.adapters.normal import Entry, check_adapter, compile_entries
from lorikeet.adapters.overrides import Override, compile_overrides, with_own_vocabulary
from lorikeet.errors import AdapterError, disk_error
from lorikeet.model.shard import Shard
from lorikeet.model.spec import ModelSpec
from lorikeet.types import AdapterInfo, BaseIdentity

Dtype = Literal["float32", "bfloat16"]
MAGIC = b"LORIKEET"
SUFFIX = ".lorikeet"
ALIGNMENT = 64
VERSION = 3  # part of the file's name: raise it when the layout or the meaning of an entry changes
_STORAGE: dict[Dtype, type[np.generic]] = {"float32": np.float32, "bfloat16": np.uint16}
_MAX_HEADER = 64 * 2**20
_NOWAIT = getattr(os, "RWF_NOWAIT", 0)  # not where there is no Linux
STALE_SECONDS = 3600.0  # nobody writes for so long


class CompiledEntry(msgspec.Struct, frozen=True, array_like=True):
    """One site: element offsets and row strides of A [rank, d_in] and B [rank, d_out], and the scalar s.

    `gain` and `shift` are the offsets of vectors [d_out], fp32 whatever the dtype of A and B; -1: none.
    """

    site: int
    a: int
    b: int
    stride_a: int
    stride_b: int
    rank: int
    scale: float
    gain: int = -1
    shift: int = -1


class CompiledOverride(msgspec.Struct, frozen=True, array_like=True):
    """What stands in place of a part of the base (see `overrides.Override`): `rows` of `width` numbers, the first at
    element `at`, `stride` elements apart; `index` names the table's rows that they are, ascending, None: all."""

    role: str
    layer: int | None
    at: int
    rows: int
    width: int
    stride: int
    index: tuple[int, ...] | None = None


class CompiledHeader(msgspec.Struct, frozen=True, kw_only=True):
    """`nbytes` is the length of the data; `base_sha256` the base whose shapes were checked. `vocab_size` is how many
    tokens the adapter's own embedding and head have, None: as the base's.

    `ranks` processes have `nbytes` each, of which the last `shared` are the same for all."""

    digest: str
    base_sha256: str
    dtype: Dtype
    kind: str
    nbytes: int
    entries: list[CompiledEntry]
    overrides: list[CompiledOverride] = []
    invocation: tuple[int, ...] | None = None
    positions: tuple[int, int, int] | None = None
    vocab_size: int | None = None
    ranks: int = 1
    shared: int = 0

    def info(self, path: Path) -> AdapterInfo:
        return AdapterInfo(
            digest=self.digest,
            path=str(path),
            nbytes=self.nbytes,
            max_rank=max((entry.rank for entry in self.entries), default=0),
            sites=len(self.entries),
            kind=self.kind,
            invocation=self.invocation,
            positions=self.positions,
            vocab_size=self.vocab_size,
        )


class Compiled(Protocol):
    """A compiled adapter, wherever it lies."""

    @property
    def header(self) -> CompiledHeader: ...

    def read(self, start: int, target: NDArray[np.uint8], wait: bool = True) -> None:
        """Fill `target` with the data from byte `start` on. Raises AdapterError or OSError; BlockingIOError where that
        would mean to `wait` for the disk: it has been asked for the data, and `target` holds anything."""
        ...


class OpenAdapter(Protocol):
    """`open_compiled`, for some rank."""

    def __call__(self, path: Path, *, wait: bool = True) -> Compiled: ...


@dataclass(frozen=True, slots=True)
class CompiledAdapter:
    """In memory. `data` is the slab's part: fp32, or bf16 as uint16 bits, flat."""

    header: CompiledHeader
    data: NDArray[Any]

    def read(self, start: int, target: NDArray[np.uint8], wait: bool = True) -> None:
        target[:] = self.data.view(np.uint8)[start : start + len(target)]


@dataclass(frozen=True, slots=True)
class CompiledFile:
    """On disk, in these `parts` of the file: (first byte, how many)."""

    header: CompiledHeader
    path: Path
    parts: tuple[tuple[int, int], ...]

    def read(self, start: int, target: NDArray[np.uint8], wait: bool = True) -> None:
        done, before = 0, 0
        with self.path.open("rb", buffering=0) as file:
            for at, count in self.parts:
                part = target[done : done + max(before + count - start - done, 0)]
                _read(file.fileno(), at + start + done - before, part.data, wait)
                done, before = done + len(part), before + count

    @property
    def data(self) -> NDArray[Any]:
        """As of a `CompiledAdapter`, read now."""
        data = np.empty(self.header.nbytes, np.uint8)
        self.read(0, data)
        return data.view(_STORAGE[self.header.dtype])


def compile_adapter(
    folder: Path,
    spec: ModelSpec,
    base: BaseIdentity,
    dtype: Dtype,
    cache: Path,
    allow_lock_mismatch: bool = False,
    checkpoint: Sequence[Path] = (),
    ranks: int = 1,
) -> AdapterInfo:
    """Read, check, hash and compile the PEFT directory `folder` for one base; an existing file is used again.

    `checkpoint` are the base's safetensors files, read only for kinds that depend on them. `ranks` processes hold the
    base; `nbytes` is what one of them takes. The file appears whole or not at all. Raises AdapterError (422),
    LockMismatchError (409), or DiskFullError (507).
    """
    lock = read_lock(folder)
    if lock is not None and not allow_lock_mismatch:
        check_lock(lock, base)
    with AdapterFile(folder) as file:
        check_adapter(file.config, file.shapes, spec)  # before any data is read
        check_not_reordered(folder / CONFIG, file.shapes, spec.family)
        tensors, digest = file.load()
        path = cache / compiled_name(digest, base, dtype, ranks)
        if (info := _known(path, digest, base, dtype, ranks)) is not None:
            return info
        tables, config = BaseTensors(checkpoint), file.config
        entries = compile_entries(config, tensors, spec, tables)
        acts: dict[str, Any] = {}
        if isinstance(config, PeftConfig):
            acts["overrides"] = compile_overrides(config, tensors, spec, tables)
            acts["invocation"] = config.invocation if isinstance(config, LoraConfig) else None
            own = with_own_vocabulary(config, file.shapes, spec)
            acts["vocab_size"] = None if own is spec else own.vocab_size
        elif isinstance(config, LoreftConfig):
            acts["positions"] = config.positions
        shards = [Shard(spec, rank, ranks) for rank in range(ranks)]
        header, data = lay_out_parts(entries, shards, digest, base, dtype, config.kind, **acts)
    _write(path, header, data)
    return header.info(path)


def _known(path: Path, digest: str, base: BaseIdentity, dtype: Dtype, ranks: int) -> AdapterInfo | None:
    """What was compiled before. A damaged file, or one that is another adapter's, is removed."""
    if not path.exists():
        return None
    try:
        header = open_compiled(path).header
        if (header.digest, header.base_sha256, header.dtype, header.ranks) == (digest, base.sha256, dtype, ranks):
            os.utime(path)  # its last use, which is what `trim` goes by
            return header.info(path)
    except (AdapterError, FileNotFoundError):
        pass
    path.unlink(missing_ok=True)
    return None


def trim(cache: Path, budget: int, keep: Path) -> None:
    """Delete the compiled files used least recently until those left take at most `budget` bytes; never `keep`."""
    files = [(entry.stat(), Path(entry.path)) for entry in os.scandir(cache) if entry.name.endswith(SUFFIX)]
    total = sum(stat.st_size for stat, _ in files)
    for stat, path in sorted(files, key=lambda file: file[0].st_mtime_ns):
        if total <= budget:
            return
        if path != keep:
            path.unlink(missing_ok=True)
            total -= stat.st_size


def remove_leftovers(cache: Path) -> None:
    """Delete what processes that were killed while they wrote have left."""
    for path in cache.glob(f".*{SUFFIX}.*"):
        with suppress(FileNotFoundError):
            if time.time() - path.lstat().st_mtime > STALE_SECONDS:
                path.unlink()


def compiled_name(digest: str, base: BaseIdentity, dtype: Dtype, ranks: int = 1) -> str:
    """File name of a compiled adapter: what it is, and for which base, dtype, compiler and number of processes."""
    divided = f" {ranks} ranks" if ranks > 1 else ""
    made_for = hashlib.sha256(f"{base.sha256} {dtype} {VERSION}{divided}".encode()).hexdigest()
    return f"{digest}-{made_for[:16]}{SUFFIX}"


def part_of(entry: Entry, shard: Shard) -> Entry:
    """What one rank holds of an entry: B, gain and shift of the outputs that it computes, A of the inputs it reads.

    Where inputs are divided, B (A x) is summed over the ranks as the layer's own product is; gain and shift, for what
    comes of the sum, are whole.
    """
    outputs, inputs = shard.outputs(entry.site.role), shard.inputs(entry.site.role)
    a, b = entry.a[:, inputs], entry.b[:, outputs]
    gain, shift = (None if vector is None else vector[outputs] for vector in (entry.gain, entry.shift))
    return Entry(replace(entry.site, d_in=a.shape[1], d_out=b.shape[1]), a, b, entry.scale, gain, shift)


def lay_out_parts(
    entries: list[Entry],
    shards: Sequence[Shard],
    digest: str,
    base: BaseIdentity,
    dtype: Dtype,
    kind: str = "lora",
    *,
    overrides: Sequence[Override] = (),
    **acts: Any,
) -> tuple[CompiledHeader, list[NDArray[Any]]]:
    """`lay_out` of each shard's part. The arrays, one after the other, are the file's data."""
    parts = [[part_of(entry, shard) for entry in entries] for shard in shards]
    header, first = lay_out(parts[0], digest, base, dtype, kind, overrides=overrides, **acts)
    if len(shards) == 1:
        return header, [first]
    others = [lay_out(part, digest, base, dtype, kind)[1] for part in parts[1:]]
    own = others[0].size
    shared = header.nbytes - others[0].nbytes
    return msgspec.structs.replace(header, ranks=len(shards), shared=shared), [first[:own], *others, first[own:]]


def lay_out(
    entries: list[Entry],
    digest: str,
    base: BaseIdentity,
    dtype: Dtype,
    kind: str = "lora",
    *,
    invocation: tuple[int, ...] | None = None,
    positions: tuple[int, int, int] | None = None,
    overrides: Sequence[Override] = (),
    vocab_size: int | None = None,
) -> tuple[CompiledHeader, NDArray[Any]]:
    """Place entries layer by layer, rows aligned, values rounded to `dtype` (nearest, ties to even)."""
    storage = np.dtype(_STORAGE[dtype])
    step = ALIGNMENT // storage.itemsize
    placed: list[CompiledEntry] = []
    at = 0
    for _, group in groupby(entries, key=lambda entry: entry.site.layer):
        layer = list(group)
        strides = [tuple(-(-part.shape[1] // step) * step for part in (entry.a, entry.b)) for entry in layer]
        a = at
        b = a + sum(entry.rank * stride_a for entry, (stride_a, _) in zip(layer, strides, strict=True))
        at = b + sum(entry.rank * stride_b for entry, (_, stride_b) in zip(layer, strides, strict=True))
        for entry, (stride_a, stride_b) in zip(layer, strides, strict=True):
            vectors = []
            for vector in (entry.gain, entry.shift):
                vectors.append(-1 if vector is None else at)
                at += 0 if vector is None else -(-4 * entry.site.d_out // ALIGNMENT) * step
            placed.append(CompiledEntry(entry.site.index, a, b, stride_a, stride_b, entry.rank, entry.scale, *vectors))
            a, b = a + entry.rank * stride_a, b + entry.rank * stride_b
    replaced: list[CompiledOverride] = []
    for one in overrides:
        (rows, width), stride = one.values.shape, -(-one.values.shape[1] // step) * step
        replaced.append(CompiledOverride(one.role, one.layer, at, rows, width, stride, one.index))
        at += rows * stride
    data = np.zeros(at, storage)
    for one, there in zip(overrides, replaced, strict=True):
        rows_of = data[there.at : there.at + there.rows * there.stride].reshape(there.rows, there.stride)
        rows_of[:, : there.width] = one.values if dtype == "float32" else bfloat16_bits(one.values)
    for entry, place in zip(entries, placed, strict=True):
        for part, start, stride in ((entry.a, place.a, place.stride_a), (entry.b, place.b, place.stride_b)):
            rows = data[start : start + entry.rank * stride].reshape(entry.rank, stride)
            rows[:, : part.shape[1]] = part if dtype == "float32" else bfloat16_bits(part)
        for vector, start in ((entry.gain, place.gain), (entry.shift, place.shift)):
            if vector is not None:
                data[start:].view(np.float32)[: len(vector)] = vector
    header = CompiledHeader(
        digest=digest, base_sha256=base.sha256, dtype=dtype, kind=kind, nbytes=data.nbytes, entries=placed,
        invocation=invocation, positions=positions, overrides=replaced, vocab_size=vocab_size,
    )  # fmt: skip
    return header, data


def bfloat16_bits(values: Array) -> NDArray[np.uint16]:
    """fp32 -> bits of the nearest bf16, ties to even. AdapterError where a finite value becomes infinite."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    if ((rounded & 0x7F80) == 0x7F80).any():
        raise AdapterError(f"{WEIGHTS}: a value is too large for bfloat16", hint="serve with --adapter-dtype float32")
    return rounded


def open_compiled(path: Path, rank: int = 0, ranks: int | None = None, *, wait: bool = True) -> CompiledFile:
    """The part of a compiled adapter that `rank` holds. AdapterError where the file is not whole, or is not for `ranks`
    processes (None: for any number); BlockingIOError as of `Compiled.read`."""
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            prefix = bytearray(min(size, 16))
            _read(file.fileno(), 0, memoryview(prefix), wait)
            length = struct.unpack("<Q", prefix[8:])[0] if len(prefix) == 16 and prefix[:8] == MAGIC else None
            if length is None or length > min(size - 16, _MAX_HEADER):
                raise AdapterError(f"{path.name}: not a compiled adapter")
            encoded = bytearray(length)
            _read(file.fileno(), 16, memoryview(encoded), wait)
            header = msgspec.msgpack.decode(encoded, type=CompiledHeader)
    except BlockingIOError:
        raise
    except (OSError, msgspec.DecodeError) as error:
        raise AdapterError(f"{path.name}: not a readable compiled adapter: {error}") from error
    start, own = _aligned(16 + length), header.nbytes - header.shared
    end = start + header.ranks * own
    if end + header.shared != size:
        raise AdapterError(f"{path.name}: expected {end + header.shared} bytes, found {size}")
    if ranks not in (None, header.ranks):
        raise AdapterError(f"{path.name}: expected parts for {ranks} processes, found {header.ranks}")
    return CompiledFile(header, path, ((start + rank * own, own), (end, header.shared)))


def _read(file: int, at: int, target: memoryview, wait: bool) -> None:
    """Fill `target` from byte `at` of a file; BlockingIOError as of `Compiled.read`."""
    flags = 0 if wait else _NOWAIT
    while len(target):
        try:
            count = os.preadv(file, [target], at, flags)
        except BlockingIOError:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_WILLNEED)
            raise
        except OSError as error:
            if not flags or error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            flags = 0  # a file system that does not tell
            continue
        if count == 0:
            raise AdapterError(f"the file ends at byte {at}; {len(target)} more were expected")
        target, at = target[count:], at + count


def _write(path: Path, header: CompiledHeader, data: Sequence[NDArray[Any]]) -> None:
    encoded = msgspec.msgpack.encode(header)
    prefix = MAGIC + struct.pack("<Q", len(encoded)) + encoded
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with fresh.open("wb") as file:
            file.write(prefix.ljust(_aligned(len(prefix)), b"\0"))
            for part in data:
                file.write(part.data)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except OSError as error:
        with suppress(OSError):
            fresh.unlink()
        raise disk_error(error, path.parent) from error


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
