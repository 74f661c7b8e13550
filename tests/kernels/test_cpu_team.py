"""Threads that meet: nobody goes on before all have come, and what was written before is seen after."""

from __future__ import annotations

import os
import subprocess
import sys

import numba
import numpy as np
import pytest
import torch

from lorikeet.kernels import cpu_team
from lorikeet.kernels.cpu_runtime import at, kernel, share_threads, use_threads
from lorikeet.kernels.cpu_team import meet, team


@kernel
def relay(counter, written, seen, rounds, parts):  # type: ignore[no-untyped-def]
    """Each round every thread writes its number, then after a meeting reads the others'."""
    use_threads(parts)
    for part in numba.prange(parts):
        own, all_of = at(written, np.int64(0)), at(seen, np.int64(0))
        for turn in range(rounds):
            own[part] = turn + 1
            meet(counter, parts)
            for other in range(parts):
                if own[other] != turn + 1:
                    all_of[part] += 1
            meet(counter, parts)


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> int:
    torch.set_num_threads(request.param)
    return share_threads()


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
def test_no_thread_goes_on_alone(threads: int) -> None:
    counter, written, wrong = np.zeros(1, np.int64), np.zeros(threads, np.int64), np.zeros(threads, np.int64)
    for _ in range(3):  # the counter is not put back in between
        relay(counter.ctypes.data, written.ctypes.data, wrong.ctypes.data, 5000, threads)
    assert not wrong.any()
    assert counter[0] == (0 if threads == 1 else 3 * 2 * 5000 * threads)


@pytest.mark.parametrize("threads", [2], indirect=True)
def test_a_team_is_all_threads_of_torch(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert team() == threads
    monkeypatch.setattr(cpu_team, "meets", lambda parts: False)  # a runtime that runs the iterations in turn
    assert team() == 1


def test_a_team_that_may_shrink_is_none() -> None:
    code = """
import torch
torch.set_num_threads(2)
from lorikeet.kernels import cpu_team
cpu_team.meets = lambda parts: True  # now, while the machine is quiet
print(cpu_team.team())
"""
    for dynamic, threads in (("true", "1"), ("false", "2")):
        environment = {**os.environ, "OMP_DYNAMIC": dynamic, "OMP_NUM_THREADS": "2"}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=100
        )
        assert done.stdout.strip() == threads, done.stderr
