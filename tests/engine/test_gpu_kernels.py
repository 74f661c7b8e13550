"""Whole requests on the kernels of a GPU: on the device, or under Triton's interpreter with tensors on the CPU."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton", reason="GPU kernels need triton")
from lorikeet.kernels.gpu import GpuOps


def test_a_mixed_batch_answers_as_the_reference(world: Any, device: str) -> None:
    """The base, adapters of several ranks on several sites, with gains and with a head of their own, in one batch."""
    if device != "cpu":
        pytest.skip("the tiny base lies on the CPU")
    infos = [
        world.adapter(31, 3, ("q", "k", "down")),
        world.adapter(32, 20, ("v", "o", "gate")),
        world.adapter(33, 5, ("q", "up"), scaled=True),
        world.adapter(34, 2, ("embed", "v", "head", "residual"), overrides=True),
    ]
    digests = [None, *(info.digest for info in infos)]

    def answers(**how: Any) -> dict[str, list[int]]:
        requests = [
            world.request(f"r{i}", world.prompt(40 + i, 3 + 5 * i), digest, max_tokens=4)
            for i, digest in enumerate(digests)
        ]
        found = world.run(world.engine(infos, **how), requests)
        return {name: answer.tokens for name, answer in found.items()}

    assert answers(ops=GpuOps()) == answers()
