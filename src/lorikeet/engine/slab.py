"""The slab of resident adapters: one flat buffer, and the table that kernels read. Carries out what residency says."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from lorikeet.adapters.compiled import CompiledEntry, CompiledHeader, OpenAdapter, open_compiled
from lorikeet.engine.residency import AdapterMove, Instruction
from lorikeet.engine.transfer import Transfer
from lorikeet.errors import AdapterError, AdapterLostError, LorikeetError
from lorikeet.kernels.batch import DeviceTable, Slab, SlabOverride
from lorikeet.model.spec import ModelSpec
from lorikeet.types import ROLES, AdapterCopy, AdapterInfo, ErrorInfo

LATEST = 0.5  # seconds that the disk may take before a step waits for it


class AdapterSlab:
    """`nbytes` bytes of adapters in `dtype` for a model.

    Without `transfer` they are copied out of their files at once, as on a CPU; with it out of the host tier, beside
    what the device computes.
    """

    def __init__(
        self,
        nbytes: int,
        spec: ModelSpec,
        dtype: torch.dtype,
        open_adapter: OpenAdapter = open_compiled,
        device: torch.device | str = "cpu",
        transfer: Transfer | None = None,
    ) -> None:
        sites = len(spec.sites) + len(spec.residual_sites)
        self._linear_sites = spec.num_layers * len(ROLES)
        self.dtype = str(dtype).removeprefix("torch.")
        self.slab = Slab(
            data=torch.empty(nbytes // dtype.itemsize, dtype=dtype, device=device),
            table=torch.zeros((16, sites, 5), dtype=torch.int64),
            scale=torch.zeros((16, sites)),
            vectors=torch.full((16, sites, 2), -1, dtype=torch.int64),
            arriving=transfer,
        )
        if self.slab.data.device.type != "cpu":
            self.slab.device = DeviceTable.of(self.slab)
        self.scaled: set[int] = set()  # handles with gains or shifts
        self.overriding: set[int] = set()  # handles that do more than act on linear layers
        self._bytes = self.slab.data.view(torch.uint8)
        self._open, self._transfer = open_adapter, transfer
        self._late: dict[str, float] = {}  # since when the disk has been asked for an adapter

    def prefetch(self, info: AdapterInfo) -> None:
        """A request waits for this adapter: bring it nearer, where there is a tier between disk and slab."""
        if self._transfer is not None:
            self._transfer.prefetch(info.digest, info.path, info.nbytes)

    def need(self, handles: Iterable[int]) -> None:
        """The next step reads the adapters under these handles (-1 is the base)."""
        if self._transfer is not None:
            self._transfer.need(handles)

    def carry_out(self, instructions: Sequence[Instruction], late: set[str] | None = None) -> dict[str, ErrorInfo]:
        """Do what residency says, in order; adapters that cannot be read, with the reason.

        Nothing is copied of those that the disk has yet to bring, and they are added to `late`; None: wait for it.
        """
        failed = {}
        for instruction in instructions:
            if isinstance(instruction, AdapterCopy):
                digest = instruction.digest
                since = self._late.setdefault(digest, time.monotonic())  # it is not told to come later for ever
                wait = late is None or time.monotonic() - since >= LATEST
                try:
                    self._copy(instruction, wait)
                except BlockingIOError:
                    assert late is not None
                    late.add(digest)
                    continue
                except (LorikeetError, OSError, IndexError, ValueError, RuntimeError) as error:  # also a damaged header
                    said = f"the compiled adapter {digest[:12]} cannot be read: {error}"
                    failed[digest] = AdapterLostError(said, hint="try again", param="adapter").info()
                self._late.pop(digest, None)
            elif isinstance(instruction, AdapterMove):
                self._move(instruction)
            else:
                if instruction.handle < len(self.slab.table):  # else it goes before its last byte was there
                    self.slab.table[instruction.handle] = 0
                    self._show(instruction.handle)
                self._forget(instruction.handle)
                if self._transfer is not None:
                    self._transfer.forget(instruction.handle)
        return failed

    def _copy(self, copy: AdapterCopy, wait: bool) -> None:
        """Bring bytes of an adapter in, and once all are there, the adapter. BlockingIOError: the disk has yet to bring
        them, and that is not waited for."""
        target = self._bytes[copy.offset : copy.offset + copy.nbytes]
        if self._transfer is None:
            adapter = self._open(Path(copy.path), wait=wait)
            header = adapter.header
            self._check(copy, header)
            adapter.read(copy.start, target.numpy()[copy.start : copy.start + copy.count], wait)
        else:
            if not wait and not self._transfer.ready(copy):
                raise BlockingIOError(errno.EAGAIN, "on its way from disk", copy.path)
            header, source = self._transfer.take(copy)
            self._check(copy, header)
            self._transfer.start(copy, header, source, target)
        if copy.start + copy.count == copy.nbytes:
            self._install(copy, header.entries)
            self._install_overrides(copy, header)

    def _check(self, copy: AdapterCopy, header: CompiledHeader) -> None:
        if (header.digest, header.nbytes, header.dtype) != (copy.digest, copy.nbytes, self.dtype):
            raise AdapterError(
                f"{copy.path}: expected {copy.nbytes} bytes of {self.dtype} for {copy.digest[:12]}, "
                f"found {header.nbytes} bytes of {header.dtype} for {header.digest[:12]}"
            )

    def _install(self, copy: AdapterCopy, entries: Sequence[CompiledEntry]) -> None:
        table, scale, vectors = self.slab.table, self.slab.scale, self.slab.vectors
        assert vectors is not None
        if copy.handle >= len(table):
            more = max(copy.handle + 1, 2 * len(table)) - len(table)
            self.slab.table = table = torch.cat((table, table.new_zeros((more, *table.shape[1:]))))
            self.slab.scale = scale = torch.cat((scale, scale.new_zeros((more, scale.shape[1]))))
            self.slab.vectors = vectors = torch.cat((vectors, vectors.new_full((more, *vectors.shape[1:]), -1)))
        base = copy.offset // self.slab.data.itemsize
        fields = np.array(
            [(e.site, e.a, e.b, e.stride_a, e.stride_b, e.rank, e.gain, e.shift) for e in entries], np.int64
        )
        fields = fields.reshape(-1, 8)  # also where there are none
        sites, places, given = fields[:, 0], fields[:, 1:6], fields[:, 6:]
        places[:, :2] += base
        scales = np.array([e.scale for e in entries], np.float32)
        vectors_at = np.where(given < 0, -1, base + given)
        for tensor, empty, values in ((table, 0, places), (scale, 0, scales), (vectors, -1, vectors_at)):
            line = tensor.numpy()[copy.handle]
            line[:] = empty
            line[sites] = values
        self._show(copy.handle)
        self._forget(copy.handle)
        if (given >= 0).any():
            self.scaled.add(copy.handle)

    def _show(self, handle: int) -> None:
        """The tables have changed under a handle: kernels on another device read their own."""
        if self.slab.device is not None:
            self.slab.device.update(self.slab, handle)

    def _install_overrides(self, copy: AdapterCopy, header: CompiledHeader) -> None:
        base = copy.offset // self.slab.data.itemsize
        if header.overrides or any(entry.site >= self._linear_sites for entry in header.entries):
            self.overriding.add(copy.handle)
        self.slab.overrides[copy.handle] = [
            SlabOverride(
                o.role, o.layer, base + o.at, o.rows, o.width, o.stride,
                None if o.index is None else torch.tensor(o.index, device=self.slab.data.device),
            )
            for o in header.overrides
        ]  # fmt: skip
        if header.vocab_size is not None:
            self.slab.vocabulary[copy.handle] = header.vocab_size

    def _forget(self, handle: int) -> None:
        """What is known of the adapter that was there before, or is there until now."""
        self.scaled.discard(handle)
        self.overriding.discard(handle)
        self.slab.overrides.pop(handle, None)
        self.slab.vocabulary.pop(handle, None)

    def _move(self, move: AdapterMove) -> None:
        if self._transfer is not None:
            self._transfer.wait_for_all()
        source = self._bytes[move.source : move.source + move.nbytes]
        if move.source - move.target < move.nbytes:
            source = source.clone()
        self._bytes[move.target : move.target + move.nbytes] = source
        if move.handle < len(self.slab.table):
            distance = (move.source - move.target) // self.slab.data.itemsize
            self.slab.table[move.handle, :, :2] -= distance
            vectors = self.slab.vectors
            assert vectors is not None
            vectors[move.handle] -= distance * (vectors[move.handle] >= 0)
            self._show(move.handle)
            moved = [replace(one, at=one.at - distance) for one in self.slab.overrides.get(move.handle, ())]
            self.slab.overrides[move.handle] = moved
