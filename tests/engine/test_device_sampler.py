"""The parameters of slots, on the device as on the host."""

from __future__ import annotations

import numpy as np
import torch

from lorikeet.engine.device_sampler import DeviceSampler
from lorikeet.engine.sampler import AllowedTokens, SamplingRows, sample


def test_slots_have_their_own_parameters(device: str) -> None:
    """Slots change hands between steps; rows of a step are slots in any order; a constraint holds for its rows."""
    slots, vocab, draw = 5, 61, np.random.default_rng(0)
    rows = SamplingRows(
        np.zeros(slots), np.zeros(slots, np.int64), np.ones(slots), np.zeros(slots), np.zeros(slots, np.uint64),
        np.zeros(slots, np.int64),
    )  # fmt: skip
    sampler = DeviceSampler(rows, torch.device(device), lambda array: torch.from_numpy(np.array(array)).to(device))
    for step in range(4):
        for slot in draw.choice(slots, 3, replace=False).tolist():
            rows.temperature[slot], rows.top_k[slot] = draw.choice([0.0, 0.7]), draw.choice([0, 9])
            rows.top_p[slot], rows.min_p[slot] = draw.choice([1.0, 0.8]), draw.choice([0.0, 0.05])
            rows.seed[slot] = draw.integers(2**63, 2**64 - 1, dtype=np.uint64)
            sampler.changed(slot)
        chosen = draw.permutation(slots)[: 2 + step % 3]
        positions = draw.integers(0, 100, len(chosen))
        logits = torch.from_numpy(draw.normal(0, 3, (len(chosen), vocab)).astype(np.float32))
        allowed = AllowedTokens(torch.tensor([0, 0]), torch.tensor([3, 8])) if step == 3 else None
        own = SamplingRows(
            *(part[chosen] for part in (rows.temperature, rows.top_k, rows.top_p, rows.min_p, rows.seed)), positions
        )
        expected, _ = sample(logits, own, allowed)
        if allowed is not None:
            allowed = AllowedTokens(allowed.rows.to(device), allowed.tokens.to(device))
        found, finite = sampler.sample(logits.to(device), chosen, positions, allowed)
        assert found.cpu().tolist() == expected.tolist() and finite.all()
