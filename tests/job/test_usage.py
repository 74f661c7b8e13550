"""CPU time of jobs: all that the process used is somebody's, and nothing is twice."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorikeet.job.usage import Usage, process_seconds
from lorikeet.registry.records import Job


def job(job_id: str, progress: dict[str, Any] | None = None) -> Job:
    fields: dict[str, Any] = dict.fromkeys(Job.__struct_fields__)
    return Job(**fields | {"id": job_id, "progress": progress})


@given(
    st.lists(st.tuples(st.floats(0, 100), st.dictionaries(st.sampled_from("abc"), st.floats(0, 10), max_size=3))),
    st.floats(0, 1000),
)
def test_what_was_used_is_shared_out(steps: list[tuple[float, dict[str, float]]], before: float) -> None:
    now = shared = 0.0
    usage = Usage([job("a", {"core_seconds": before}), job("b", {"step": 3}), job("c")], lambda: now)
    for used, weights in steps:
        now += used
        usage.share(weights)
        shared = now if weights else shared
    assert sum(map(usage.of, "abc")) == pytest.approx(shared + round(before, 3), abs=0.01)


def test_shares_are_by_weight_or_even() -> None:
    times = iter([10.0, 16.0, 17.0])
    usage = Usage([job("a"), job("b")], lambda: next(times))
    for weights in ({"a": 0.0, "b": 0.0}, {"a": 2.0, "b": 4.0}, {"b": 1.0}):
        usage.share(weights)
    assert (usage.of("a"), usage.of("b")) == (7.0, 10.0)


def test_the_kernel_is_asked() -> None:
    """The oracle is psutil: this process with all its threads, and a child that has ended."""
    before, oracle = process_seconds(), psutil.Process().cpu_times()
    subprocess.run([sys.executable, "-c", "sum(range(5_000_000))"], check=True)
    until = time.process_time() + 0.2
    while time.process_time() < until:
        pass
    after = psutil.Process().cpu_times()
    used = sum(after[:4]) - sum(oracle[:4])  # user, system, those of children
    assert process_seconds() - before == pytest.approx(used, abs=0.06) and used > 0.2
    assert after.children_user > oracle.children_user
