"""From logits to tokens where both lie on a GPU: the parameters of all slots are there, and nothing waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lorikeet.engine.sampler import AllowedTokens, SamplingRows

if TYPE_CHECKING:
    from lorikeet.kernels.gpu_sampling import Sampler

Array = npt.NDArray[np.int64]
Put = Callable[[npt.NDArray[Any]], Tensor]


class DeviceSampler:
    """As `sampler.sample`, for rows of slots. `parameters` are the host's, by slot: say with `changed` when one is new.

    `put` brings an array to the device for what is launched next.
    """

    def __init__(self, parameters: SamplingRows, device: torch.device, put: Put) -> None:
        from lorikeet.kernels.gpu_sampling import SamplingTable

        self._parameters, self._put = parameters, put
        self._table = SamplingTable(len(parameters.seed), device)
        self._samplers: dict[int, Sampler] = {}  # by the size of the vocabulary
        self._changed: set[int] = set()

    def changed(self, slot: int) -> None:
        """Another sequence has the slot."""
        self._changed.add(slot)

    def sample(
        self, logits: Tensor, slots: Array, positions: Array, allowed: AllowedTokens | None
    ) -> tuple[Tensor, Tensor]:
        """Next tokens [R] int64 and whether the row's logits are sound [R] bool, from fp32 logits [R, V]: good until
        the next call. `positions` [R] are where the tokens will stand."""
        from lorikeet.kernels.gpu_sampling import restrict

        self._show()
        sampler = self._sampler(logits.shape[1])
        if allowed is not None:
            logits = restrict(logits, allowed.rows, allowed.tokens)
        some = self._parameters
        limited = (some.top_k[slots] > 0) | (some.top_p[slots] < 1)
        random = some.temperature[slots] > 0
        return sampler.sample(
            logits, self._put(slots), self._put(positions), random=bool(random.any()), limited=bool(limited.any())
        )

    def warm(self, logits: Tensor) -> None:
        """Compile the kernels, for logits like these [R, V]."""
        nowhere = self._put(np.full(len(logits), -1))
        for random, limited in ((False, False), (True, False), (True, True)):
            self._sampler(logits.shape[1]).sample(logits, nowhere, nowhere, random=random, limited=limited)

    def _sampler(self, vocab: int) -> Sampler:
        from lorikeet.kernels.gpu_sampling import Sampler

        if vocab not in self._samplers:
            self._samplers[vocab] = Sampler(self._table, len(self._parameters.seed), vocab)
        return self._samplers[vocab]

    def _show(self) -> None:
        """Parameters of the slots that have changed, to the device."""
        if not self._changed:
            return
        slots = np.array(sorted(self._changed))
        some = self._parameters
        columns = (some.temperature, some.top_k, some.top_p, some.min_p, some.seed.view(np.int64))
        self._table.load(self._put(slots), *(self._put(column[slots]) for column in columns))
        self._changed.clear()
