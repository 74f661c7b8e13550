"""The tier between disk and device: compiled adapters in pinned host memory, from which a GPU copies on its own.

Which of them stay is decided as in the slab, by a `Residency` of its own. Files are read by a thread: it copies out of
the page cache, or waits for the disk, without the interpreter lock.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lorikeet.adapters.compiled import CompiledHeader, OpenAdapter
from lorikeet.engine.copies import Copier
from lorikeet.engine.residency import AdapterDrop, AdapterMove, Instruction, Residency
from lorikeet.errors import AdapterError
from lorikeet.types import AdapterCopy, AdapterInfo


class HostTier:
    """Adapters in `memory` (uint8 on the host), out of which `copier` copies. Used by one thread at a time."""

    def __init__(self, memory: Tensor, open_adapter: OpenAdapter, copier: Copier) -> None:
        self._memory, self._bytes = memory, memory.numpy()
        self._open, self._copier = open_adapter, copier
        self._policy = Residency(len(memory), copy_bytes=max(len(memory), 1))
        self._reading: dict[str, Future[CompiledHeader]] = {}
        self._read: dict[str, CompiledHeader] = {}
        self._failed: dict[str, BaseException] = {}  # until somebody is told
        self._at: dict[str, int] = {}  # first byte
        self._names: dict[int, str] = {}  # handle -> digest
        self._uses: deque[tuple[int, str]] = deque()  # tickets of copies to the device that may be under way
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="adapter-reader")

    def ask(self, digest: str, path: str, nbytes: int) -> bool:
        """Have an adapter read, unless it is there or on its way; whether it is there or on its way now."""
        self._settle()
        if digest in self._read or digest in self._reading or digest in self._failed:
            return True
        if not self.could_hold(nbytes):
            return False
        self._policy.register(AdapterInfo(digest=digest, path=path, nbytes=nbytes, max_rank=0, sites=0))
        self._policy.ensure(digest)
        self._carry_out(self._policy.instructions())
        return digest in self._reading

    def could_hold(self, nbytes: int) -> bool:
        """Whether there is room for so many bytes if all else goes."""
        return nbytes <= self._policy.budget

    def has(self, digest: str) -> bool:
        """Whether an adapter is there, or cannot be read: `take` does not wait."""
        self._settle()
        return digest in self._read or digest in self._failed

    def take(self, copy: AdapterCopy) -> tuple[CompiledHeader, Tensor]:
        """An adapter's header and its bytes [nbytes] uint8, read now where they are not there. `use` keeps them.

        One that has no room here comes out of memory that is not pinned. Raises what reading it raised.
        """
        if not self.ask(copy.digest, copy.path, copy.nbytes) and self.could_hold(copy.nbytes):
            wait(self._reading.values())  # what is on its way cannot go
            if self._uses:
                self._copier.finish(self._uses[-1][0])
            self.ask(copy.digest, copy.path, copy.nbytes)
        if (future := self._reading.get(copy.digest)) is not None:
            wait([future])
            self._settle()
        if (error := self._failed.pop(copy.digest, None)) is not None:
            raise error
        if copy.digest in self._read:
            at = self._at[copy.digest]
            return self._read[copy.digest], self._memory[at : at + copy.nbytes]
        adapter, data = self._open(Path(copy.path)), np.empty(copy.nbytes, np.uint8)
        self._check(copy, adapter.header)
        adapter.read(0, data)
        return adapter.header, torch.from_numpy(data)

    def use(self, digest: str, ticket: int) -> None:
        """The copy of this ticket reads the adapter's bytes."""
        if digest in self._read:
            self._policy.acquire(digest)
            self._uses.append((ticket, digest))

    def _settle(self) -> None:
        """Take note of what has been read, and of copies that are done."""
        while self._uses and self._copier.done(self._uses[0][0]):
            self._policy.release(self._uses.popleft()[1])
        for digest in [digest for digest, future in self._reading.items() if future.done()]:
            future = self._reading.pop(digest)
            error = future.exception()
            if error is None:
                self._read[digest] = future.result()
                self._policy.arrived(digest)
            else:
                self._failed[digest] = error
                self._policy.failed(digest)
                self._carry_out(self._policy.instructions())

    def _carry_out(self, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            if isinstance(instruction, AdapterCopy):
                if instruction.digest in self._reading:  # asked for again until it is there
                    continue
                self._names[instruction.handle] = instruction.digest
                self._at[instruction.digest] = instruction.offset
                self._reading[instruction.digest] = self._reader.submit(self._load, instruction)
            elif isinstance(instruction, AdapterMove):
                self._move(instruction)
            else:
                self._forget(instruction)

    def _load(self, copy: AdapterCopy) -> CompiledHeader:
        adapter = self._open(Path(copy.path))
        self._check(copy, adapter.header)
        adapter.read(0, self._bytes[copy.offset : copy.offset + copy.nbytes])
        return adapter.header

    def _check(self, copy: AdapterCopy, header: CompiledHeader) -> None:
        if header.nbytes != copy.nbytes:
            raise AdapterError(f"{copy.path}: expected {copy.nbytes} bytes, found {header.nbytes}")

    def _move(self, move: AdapterMove) -> None:
        """Make room: nobody may write or read the bytes meanwhile."""
        digest = self._names[move.handle]
        if digest in self._reading:
            wait([self._reading[digest]])
        for ticket, user in self._uses:
            if user == digest:
                self._copier.finish(ticket)
        self._bytes[move.target : move.target + move.nbytes] = self._bytes[move.source : move.source + move.nbytes]
        self._at[digest] = move.target

    def _forget(self, drop: AdapterDrop) -> None:
        digest = self._names.pop(drop.handle, None)
        if digest is not None:
            self._read.pop(digest, None)
            self._at.pop(digest, None)
