"""Arrays of a step on their way to the device, and results on their way back.

On a CPU both are the same memory. To a GPU all arrays of a step go as one copy out of pinned memory, and nothing here
waits for the device but `Fetched.array`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes
_TURNS = 3  # buffers: one is filled while the steps before may still be read


class Fetched(Protocol):
    """A result that may still be computed."""

    def array(self) -> npt.NDArray[Any]:
        """It on the host; waits for it."""
        ...


class Staging(Protocol):
    def begin(self) -> None:
        """A new step."""
        ...

    def put(self, array: npt.NDArray[Any]) -> Tensor:
        """The array on the device, to be read by what is launched after the next `flush`."""
        ...

    def flush(self) -> None: ...

    def fetch(self, tensor: Tensor) -> Fetched:
        """Begin to bring a result to the host."""
        ...


class _There:
    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def array(self) -> npt.NDArray[Any]:
        found: npt.NDArray[Any] = self._tensor.numpy()
        return found


class HostStaging:
    """A CPU: arrays are tensors as they are."""

    def begin(self) -> None:
        pass

    def put(self, array: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(array)

    def flush(self) -> None:
        pass

    def fetch(self, tensor: Tensor) -> Fetched:
        return _There(tensor)


class _OnItsWay:
    def __init__(self, pinned: Tensor, event: torch.cuda.Event) -> None:
        self._pinned, self._event = pinned, event

    def array(self) -> npt.NDArray[Any]:
        self._event.synchronize()
        found: npt.NDArray[Any] = self._pinned.numpy()
        return found


class PinnedStaging:
    """A CUDA device. `nbytes` is what the arrays of a step take at most; more is allocated when it is needed."""

    def __init__(self, device: torch.device, nbytes: int) -> None:
        self._device = device
        self._grow(nbytes)

    def _grow(self, nbytes: int) -> None:
        self._host = [_pinned((nbytes,), torch.uint8) for _ in range(_TURNS)]
        self._there = [torch.empty(nbytes, dtype=torch.uint8, device=self._device) for _ in range(_TURNS)]
        self._read: list[torch.cuda.Event | None] = [None] * _TURNS  # when the copy out of a buffer was done
        self._turn = self._used = self._sent = 0

    def begin(self) -> None:
        self.flush()
        self._turn = (self._turn + 1) % _TURNS
        self._used = self._sent = 0
        event = self._read[self._turn]
        if event is not None:
            event.synchronize()  # of _TURNS steps ago: it was done long since

    def put(self, array: npt.NDArray[Any]) -> Tensor:
        array = np.ascontiguousarray(array)
        start = self._used
        end = start + array.nbytes
        if end > len(self._host[0]):
            self.flush()
            self._grow(2 * max(end, array.nbytes))  # what was put before lies in the old buffers, which tensors hold
            start, end = 0, array.nbytes
        self._host[self._turn][start:end].numpy()[:] = array.reshape(-1).view(np.uint8)
        self._used = -(-end // _ALIGNMENT) * _ALIGNMENT
        dtype = torch.from_numpy(array).dtype
        return self._there[self._turn][start:end].view(dtype).view(array.shape)

    def flush(self) -> None:
        if self._used == self._sent:
            return
        part = slice(self._sent, self._used)
        self._there[self._turn][part].copy_(self._host[self._turn][part], non_blocking=True)
        event = self._read[self._turn] or torch.cuda.Event()
        event.record()
        self._read[self._turn] = event
        self._sent = self._used

    def fetch(self, tensor: Tensor) -> Fetched:
        pinned = _pinned(tensor.shape, tensor.dtype)
        pinned.copy_(tensor, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return _OnItsWay(pinned, event)


def _pinned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, pin_memory=True)


def staging(device: torch.device, nbytes: int) -> Staging:
    """What a step's arrays need to get to this device."""
    return HostStaging() if device.type == "cpu" else PinnedStaging(device, nbytes)
