"""Arrays on their way to a device, with a device that copies late."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorikeet.engine import staging as staging_module
from lorikeet.engine.staging import HostStaging, PinnedStaging, staging


class Event:
    """Of a device that has done everything by the time that somebody asks."""

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


@pytest.fixture(scope="module", autouse=True)
def plain_memory() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staging_module, "_pinned", lambda shape, dtype: torch.empty(tuple(shape), dtype=dtype))
        patch.setattr(torch.cuda, "Event", Event)
        yield


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(
        st.lists(
            st.tuples(st.integers(0, 60), st.sampled_from(["i8", "i4", "f8", "f4", "?"]), st.booleans()), max_size=7
        ),
        max_size=8,
    )
)
def test_what_is_put_is_there_after_the_flush(steps: list[list[tuple[int, str, bool]]]) -> None:
    """Of any size and type, also where the buffers turn out too small, and for the step after next."""
    stage, draw = PinnedStaging(torch.device("cpu"), 256), np.random.default_rng(0)
    before: list[tuple[Any, Any]] = []
    for step in steps:
        stage.begin()
        held = []
        for size, kind, flushes in step:
            array = draw.integers(0, 100, (size, 2)[: 1 + size % 2]).astype(kind)
            held.append((array.copy(), stage.put(array)))
            array.fill(0)  # it is nobody's from here on
            if flushes:
                stage.flush()
                assert np.array_equal(held[-1][1].numpy(), held[-1][0])
        stage.flush()
        for array, tensor in (*before, *held):
            assert np.array_equal(tensor.numpy(), array) and tensor.shape == array.shape
        before = held
    for array, tensor in before:
        assert np.array_equal(stage.fetch(tensor).array(), array)


def test_a_cpu_needs_none() -> None:
    stage = staging(torch.device("cpu"), 0)
    array = np.arange(5)
    tensor = stage.put(array)
    array[0] = 7
    assert isinstance(stage, HostStaging) and tensor[0] == 7 and stage.fetch(tensor).array()[0] == 7
