"""Copies of adapters to a GPU on a stream of their own, beside what it computes."""

from __future__ import annotations

import weakref
from collections import deque
from typing import Protocol

import torch
from torch import Tensor

from lorikeet.errors import ConfigError


class Copier(Protocol):
    """Copies are carried out one after the other, in the order in which they were asked for.

    A ticket is the number of a copy, from 1 on: what waits for one has waited for all before it.
    """

    def follow(self) -> None:
        """Copies asked for from now on run after everything that the device has been given to compute so far."""
        ...

    def copy(self, source: Tensor, target: Tensor) -> int:
        """Begin a copy between bytes of the same number; its ticket. `source` stays as it is until it is done."""
        ...

    def wait(self, ticket: int) -> None:
        """What the device is given to compute from now on runs after this copy."""
        ...

    def done(self, ticket: int) -> bool:
        """Whether the copy has been carried out. Does not wait."""
        ...

    def finish(self, ticket: int) -> None:
        """Return once the copy has been carried out."""
        ...


class StreamCopier:
    """From pinned host memory to a CUDA device, asynchronous to both."""

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._stream = torch.cuda.Stream(self._device)
        self._events: deque[torch.cuda.Event] = deque()  # of the copies that are not known to be done
        self._done = 0  # all tickets up to this one

    def follow(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def copy(self, source: Tensor, target: Tensor) -> int:
        event = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            event.record(self._stream)
        self._events.append(event)
        return self._done + len(self._events)

    def wait(self, ticket: int) -> None:
        if ticket > self._done:
            torch.cuda.current_stream(self._device).wait_event(self._events[ticket - self._done - 1])

    def done(self, ticket: int) -> bool:
        while self._done < ticket and self._events[0].query():
            self._events.popleft()
            self._done += 1
        return self._done >= ticket

    def finish(self, ticket: int) -> None:
        if ticket > self._done:
            self._events[ticket - self._done - 1].synchronize()


def pinned_memory(nbytes: int) -> Tensor:
    """`nbytes` bytes of host memory that a GPU reads on its own; torch's own pinned memory comes in powers of two.

    Raises ConfigError where the system refuses to pin so much.
    """
    memory = torch.empty(nbytes, dtype=torch.uint8)
    if nbytes == 0:
        return memory
    runtime, place = torch.cuda.cudart(), memory.data_ptr()
    code = int(runtime.cudaHostRegister(place, nbytes, 0))
    if code != 0:
        raise ConfigError(
            f"adapter_host_memory: {nbytes} bytes could not be pinned (CUDA error {code})",
            hint="lower --adapter-host-memory, or raise the limit of locked memory (ulimit -l)",
            param="adapter_host_memory",
        )
    weakref.finalize(memory, runtime.cudaHostUnregister, place)
    return memory
