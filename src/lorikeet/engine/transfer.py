"""Adapters on their way to a GPU: out of the host tier, layer by layer, while the device computes.

An adapter may be used as soon as its copy has been asked for: the kernels of each layer wait for that layer's part
alone (`Slab.wait`), and only in steps that use the adapter.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import groupby

from torch import Tensor

from lorikeet.adapters.compiled import CompiledHeader
from lorikeet.engine.copies import Copier
from lorikeet.engine.host_tier import HostTier
from lorikeet.model.spec import ModelSpec
from lorikeet.types import AdapterCopy

_PIECE = 2**20  # bytes of a copy at least: smaller ones cost more to begin than to carry out


class Transfer:
    """Copies parts of adapters and knows what kernels have to wait for. `wait` makes it a `kernels.batch.Arriving`."""

    def __init__(self, copier: Copier, tier: HostTier, spec: ModelSpec) -> None:
        self._copier, self._tier = copier, tier
        self._layer = [site.layer for site in (*spec.sites, *spec.residual_sites)]
        self._layers = spec.num_layers
        self._parts: dict[int, list[tuple[int, int]]] = {}  # handle -> (bytes that are there, ticket), ascending
        self._arriving: dict[int, list[int]] = {}  # handle -> ticket of each layer, and last of all
        self._needed: list[int] = []  # the same for the step at hand
        self._last = self._waited = 0  # tickets

    def prefetch(self, digest: str, path: str, nbytes: int) -> None:
        """Somebody waits for an adapter: read it into the host tier, if there is room."""
        self._tier.ask(digest, path, nbytes)

    def ready(self, copy: AdapterCopy) -> bool:
        """Whether `start` can begin at once; if not, the adapter is on its way to the host tier, or waits for room."""
        asked = self._tier.ask(copy.digest, copy.path, copy.nbytes)
        return self._tier.has(copy.digest) if asked else not self._tier.could_hold(copy.nbytes)

    def take(self, copy: AdapterCopy) -> tuple[CompiledHeader, Tensor]:
        """An adapter's header and its bytes in host memory. Raises what reading it raised."""
        return self._tier.take(copy)

    def start(self, copy: AdapterCopy, header: CompiledHeader, source: Tensor, target: Tensor) -> None:
        """Begin to copy the bytes that `copy` names from `source` [nbytes] to `target` [nbytes] on the device."""
        self._copier.follow()  # what was computed until now may read what lay there
        ends = _layer_ends(header, self._layer, self._layers)
        parts = self._parts.setdefault(copy.handle, [])
        stop = copy.start + copy.count
        begin = copy.start
        for end in (*sorted({end for end in ends if copy.start < end < stop}), stop):
            if end < stop and end - begin < _PIECE:
                continue
            if end > begin:
                self._last = self._copier.copy(source[begin:end], target[begin:end])
                parts.append((end, self._last))
            begin = end
        self._tier.use(copy.digest, self._last)
        if stop == copy.nbytes:
            del self._parts[copy.handle]
            there = [end for end, _ in parts]
            self._arriving[copy.handle] = [parts[bisect_left(there, end)][1] if end else 0 for end in ends]

    def need(self, handles: Iterable[int]) -> None:
        """The next step is with the adapters under these handles."""
        if not self._arriving:
            self._needed = []
            return
        for handle in [one for one, tickets in self._arriving.items() if self._copier.done(tickets[-1])]:
            del self._arriving[handle]
        tickets = [self._arriving[handle] for handle in set(handles) if handle in self._arriving]
        self._needed = [max(column) for column in zip(*tickets, strict=True)]

    def wait(self, layer: int | None) -> None:
        """The device reads a layer of the step's adapters from now on; None: any part of them."""
        if self._needed:
            self._wait_for(self._needed[-1 if layer is None else layer])

    def wait_for_all(self) -> None:
        """The device touches any adapter from now on."""
        self._wait_for(self._last)

    def forget(self, handle: int) -> None:
        """The adapter under `handle` goes. Copies on their way come before any that are asked for later."""
        self._parts.pop(handle, None)
        self._arriving.pop(handle, None)

    def _wait_for(self, ticket: int) -> None:
        if ticket > self._waited:
            self._copier.wait(ticket)
            self._waited = ticket


def _layer_ends(header: CompiledHeader, layer: Sequence[int | None], layers: int) -> list[int]:
    """Up to which byte an adapter must be there for each layer, and last for all of it. `layer` is that of each site.

    Entries lie in the order of the header, those of a layer side by side.
    """
    size = 4 if header.dtype == "float32" else 2
    groups = [(at, min(e.a for e in part)) for at, part in groupby(header.entries, lambda e: layer[e.site])]
    ends = [0] * layers + [header.nbytes]
    starts = [start * size for _, start in groups[1:]]
    for (at, _), end in zip(groups, (*starts, header.nbytes), strict=True) if groups else ():
        if at is not None:
            ends[at] = max(ends[at], end)
    return ends
