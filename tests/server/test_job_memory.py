"""Jobs that take more memory than they may, and what becomes of them, of the others and of the server."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.server.hosting import Hosted
from tests.server.platforms import make, train, up, wait, wait_for_step

from lorikeet.registry.records import Job
from lorikeet.server import job_memory, submission
from lorikeet.server.estimate import Memory

MIB = 2**20
NEED = Memory(shared=120 * MIB, own=40 * MIB)  # what a scripted job is said to need; it holds about 100 MiB
SHORT = {"epochs": 60, "evaluate": False}
LONG = {"epochs": 100_000, "evaluate": False}


@pytest.fixture(autouse=True)
def _needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission, "training_memory", lambda *_: NEED)
    monkeypatch.setattr(job_memory, "LOOK_SECONDS", 0.1)


@pytest.fixture(params=[2])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Hosted]:
    """With so many job processes at once."""
    with up(tmp_path, scripted=True, join=4, job_concurrency=request.param, job_memory=400 * MIB) as server:
        make(server, "r", test=False)
        yield server


def ended(server: Hosted, job: dict[str, Any]) -> tuple[str, str]:
    found = wait(server, job["id"])
    return found["state"], (found["error"] or {}).get("code", "")


def test_a_job_that_grows_too_large_ends_alone(server: Hosted) -> None:
    beside = train(server, "r", **LONG)
    wait_for_step(server, beside["id"], 1)
    greedy = train(server, "r", description="hold 600 at 3", rank=8, **LONG)
    failed = wait(server, greedy["id"])
    assert (failed["state"], failed["error"]["code"], failed["attempts"]) == ("errored", "job_out_of_memory", 1)
    said, hint = failed["error"]["message"], failed["error"]["hint"]
    assert "expected at most 0.2 GiB" in said and "estimate was 0.2 GiB" in said
    assert "batch_rows (now 8) or rank (now 8) or max_length (now longest)" in hint and "--job-memory" in hint
    log = server.http.get(f"/api/jobs/{greedy['id']}/logs").json()["text"]
    assert said in log and hint in log
    version = server.http.get(f"/api/repos/r/versions/{greedy['version']}").json()
    assert version["state"] == "errored"
    now = server.http.get(f"/api/jobs/{beside['id']}").json()
    assert now["state"] == "running" and now["attempts"] == 1
    assert server.http.get("/health/ready").status_code == 200
    assert ended(server, train(server, "r", **SHORT)) == ("completed", "")
    server.post(f"/api/jobs/{beside['id']}/cancel", None)


@pytest.mark.parametrize("server", [1], indirect=True)
def test_a_joined_run_that_grows_too_large_is_split(server: Hosted) -> None:
    first = train(server, "r", **LONG)  # behind which the others queue up
    wait_for_step(server, first["id"], 1)
    greedy = train(server, "r", description="hold 600 at 3", **SHORT)
    good = [train(server, "r", **SHORT) for _ in range(2)]
    server.post(f"/api/jobs/{first['id']}/cancel", None)
    assert ended(server, greedy) == ("errored", "job_out_of_memory")
    for one in good:
        found = wait(server, one["id"])
        assert (found["state"], found["result"]["joined"], found["attempts"]) == ("completed", 1, 2)
        steps = [line["step"] for line in server.http.get(f"/api/jobs/{one['id']}/metrics").json()["items"]]
        assert sorted(set(steps)) == steps  # gone on with, not begun again
    events = server.http.get(f"/api/jobs/{greedy['id']}/events").json()["items"]
    retried = next(one for one in events if one["kind"] == "retrying")
    assert "the process of 3 joined jobs held" in retried["message"] and "tried alone" in retried["message"]
    assert wait(server, greedy["id"])["attempts"] == 2


def test_what_a_job_holds_beyond_its_estimate_is_not_given_to_others(server: Hosted) -> None:
    """It may use what nobody else was promised; who comes next waits for it."""
    large = train(server, "r", description="hold 200 at 1", **LONG)
    wait_for_step(server, large["id"], 20)
    second = train(server, "r", **SHORT)
    wait_for_step(server, large["id"], 60)
    assert server.http.get(f"/api/jobs/{large['id']}").json()["state"] == "running"
    assert server.http.get(f"/api/jobs/{second['id']}").json()["state"] == "queued"
    server.post(f"/api/jobs/{large['id']}/cancel", None)
    assert ended(server, second) == ("completed", "")


def test_an_evaluation_is_told_what_it_depends_on() -> None:
    fields: dict[str, Any] = dict.fromkeys(Job.__struct_fields__)
    judging = Job(**fields | {"kind": "evaluate", "spec": {"recipe": {"max_tokens": 7}}, "memory": 2**30})
    told = job_memory.too_much(judging, 1, 3 * 2**30, 2 * 2**30)
    assert (told.code, told.param, told.retryable) == ("job_out_of_memory", "max_tokens", False)
    assert "held 3.0 GiB of memory, expected at most 2.0 GiB" in told.message and "max_tokens (now 7)" in str(told.hint)


# --- what is held -------------------------------------------------------------------------------------------------

FORKS = """
import os, sys, mmap
block = bytearray(b"x" * (120 << 20))
shared = mmap.mmap(-1, 40 << 20)
shared.write(b"y" * (40 << 20))
if os.fork() == 0:
    own = bytearray(b"z" * (30 << 20))
print("ready", flush=True)
sys.stdin.read()
"""


def test_what_a_process_and_its_children_hold() -> None:
    """The oracle is psutil: what is private to each, and what they share once."""
    process = subprocess.Popen([sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    try:
        assert [process.stdout.readline(), process.stdout.readline()] == [b"ready\n"] * 2
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children()]
        assert len(family) == 2
        pss = sum(one.memory_full_info().pss for one in family)
        found = job_memory.held(process.pid)
        assert 190 * MIB <= found <= pss  # mapped libraries are not counted, all else is
        assert found >= pss - 30 * MIB
        simply = job_memory.held(process.pid, 2**40)
        assert simply >= 310 * MIB  # the cheap count, which is too high
    finally:
        process.stdin.close()
        process.wait(10)
        process.stdout.close()
    assert job_memory.held(process.pid) == 0


@given(st.integers(0, 2**40), st.integers(0, 2**40), st.integers(0, 2**40))
def test_what_is_allowed(estimate: int, others: int, budget: int) -> None:
    most = job_memory.allowed(estimate, others, budget)
    assert most >= estimate  # an estimate that holds ends no job
    if estimate + others <= budget:  # as those are that were started
        assert most <= max(budget - others, estimate * job_memory.MARGIN)
