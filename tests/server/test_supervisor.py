"""The supervisor with job processes that take naps: joining, cancelling, dying, and what a server's end means."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.server.hosting import Hosted
from tests.server.platforms import make, train, up, wait, wait_for_step

from lorikeet.config import PlatformConfig
from lorikeet.errors import ConfigError
from lorikeet.registry.records import Actor
from lorikeet.server.platform import Platform

LONG = {"epochs": 100_000, "evaluate": False}
SHORT = {"epochs": 3, "evaluate": False}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosted]:
    with up(tmp_path_factory.mktemp("home"), scripted=True, join=4, job_memory=2**40) as server:
        make(server, "r")
        yield server


@pytest.fixture(autouse=True)
def _nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "server" in request.fixturenames:
        server = request.getfixturevalue("server")
        for one in server.http.get("/api/jobs?state=queued,running,stopping").json()["items"]:
            cancel(server, one)


def cancel(server: Hosted, job: dict[str, Any]) -> dict[str, Any]:
    reply = server.post(f"/api/jobs/{job['id']}/cancel", None)
    assert reply.status_code == 200, reply.text
    return wait(server, job["id"])


def kinds(server: Hosted, job: dict[str, Any]) -> list[str]:
    return [one["kind"] for one in server.http.get(f"/api/jobs/{job['id']}/events").json()["items"]]


def log(server: Hosted, job: dict[str, Any]) -> str:
    text: str = server.http.get(f"/api/jobs/{job['id']}/logs").json()["text"]
    return text


def test_what_waits_is_joined(server: Hosted) -> None:
    """Up to four; each ends for itself."""
    first = train(server, "r", **LONG)
    wait_for_step(server, first["id"], 1)
    waiting = [train(server, "r", **SHORT) for _ in range(3)]
    long, last = train(server, "r", **LONG), train(server, "r", **SHORT)
    assert cancel(server, first)["state"] == "canceled"
    done = [wait(server, one["id"]) for one in waiting]
    assert [one["result"]["joined"] for one in done] == [4, 4, 4]
    assert cancel(server, long)["state"] == "canceled"
    assert wait(server, last["id"])["result"]["joined"] == 1


def test_cancelled_before_it_runs_and_resumed(server: Hosted) -> None:
    first = train(server, "r", **LONG)
    wait_for_step(server, first["id"], 1)
    second = train(server, "r", **SHORT)
    assert cancel(server, second)["state"] == "canceled" and kinds(server, second) == ["queued", "canceled"]
    stopped = cancel(server, first)
    assert server.post(f"/api/jobs/{second['id']}/resume", None).json()["state"] == "queued"
    assert wait(server, second["id"])["state"] == "completed"
    assert server.post(f"/api/jobs/{second['id']}/resume", None).status_code == 409
    server.post(f"/api/jobs/{first['id']}/resume", None)
    assert wait_for_step(server, first["id"], stopped["progress"]["step"] + 1)["state"] == "running"


def test_what_breaks_its_process_runs_alone_from_then_on(server: Hosted) -> None:
    first = train(server, "r", **LONG)
    wait_for_step(server, first["id"], 1)
    bad = train(server, "r", description="die at 4", epochs=8, evaluate=False)
    make(server, "q")
    good = train(server, "q", epochs=40, evaluate=False)
    cancel(server, first)
    done = [wait(server, one["id"]) for one in (bad, good)]
    assert [one["state"] for one in done] == ["completed", "completed"]
    assert [one["result"]["joined"] for one in done] == [1, 1] and [one["attempts"] for one in done] == [2, 2]
    assert kinds(server, bad).count("retrying") == 1 and "signal 9" in log(server, bad)
    assert "in the server's log: it ran jobs of other repositories" in log(server, good)
    steps = [one["step"] for one in server.http.get(f"/api/jobs/{good['id']}/metrics").json()["items"]]
    assert sorted(set(steps)) == steps and steps[-30:] == list(range(11, 41))  # gone on with, not begun again


def test_killed_again_and_again(server: Hosted) -> None:
    platform = server.state.platform
    assert platform is not None
    job = train(server, "r", **LONG)
    for attempt in (1, 2, 3):
        step = wait_for_step(server, job["id"], 1)["progress"]["step"]
        wait_for_step(server, job["id"], step + 3)
        os.kill(platform.supervisor.pids[0], signal.SIGKILL)
        if attempt < 3:
            wait_for_step(server, job["id"], step + 5)
    ended = wait(server, job["id"])
    assert ended["state"] == "errored" and ended["error"]["code"] == "job_process_died"
    assert kinds(server, job).count("started") == 3


def test_memory_bounds_what_runs_at_once(tmp_path: Path) -> None:
    with up(tmp_path, scripted=True, join=1, job_concurrency=4) as server:
        make(server, "r")
        platform = server.state.platform
        assert platform is not None
        first = train(server, "r", **LONG)
        platform.job_memory = 2 * first["memory"] + 1
        second, third = train(server, "r", **LONG), train(server, "r", **LONG)
        wait_for_step(server, first["id"], 2)
        wait_for_step(server, second["id"], 2)
        assert len(platform.supervisor.pids) == 2
        assert server.http.get(f"/api/jobs/{third['id']}").json()["state"] == "queued"
        cancel(server, first)
        wait_for_step(server, third["id"], 1)


def test_a_server_that_stops_gives_its_jobs_back(tmp_path: Path) -> None:
    with up(tmp_path, scripted=True) as server:
        make(server, "r")
        job = train(server, "r", epochs=150, evaluate=False)
        step = wait_for_step(server, job["id"], 3)["progress"]["step"]
    with up(tmp_path, scripted=True) as server:
        done = wait(server, job["id"])
        assert done["state"] == "completed" and done["attempts"] == 1  # a restart is not the job's fault
        assert "queued" in kinds(server, job)[1:] and kinds(server, job).count("started") == 2
        steps = [one["step"] for one in server.http.get(f"/api/jobs/{job['id']}/metrics").json()["items"]]
        assert steps == list(range(1, 151)) and step < 150


def test_one_server_a_home(tmp_path: Path) -> None:
    config = PlatformConfig(home=str(tmp_path))
    first = Platform(config, "lorikeet-nano")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file is no folder"):
        Platform(PlatformConfig(home=str(tmp_path / "file")), "lorikeet-nano")
    with pytest.raises(ConfigError, match=r"blobs: found 'ftp://x'; expected a folder, or such as s3://bucket/prefix"):
        Platform(PlatformConfig(home=str(tmp_path / "other"), blobs="ftp://x"), "lorikeet-nano")
    with pytest.raises(ConfigError, match="another `lorikeet up` uses"):
        Platform(config, "lorikeet-nano")
    first.close()
    Platform(config, "lorikeet-nano").close()


def test_an_evaluation_follows_once(server: Hosted) -> None:
    """Asked for by a dataset with a test split, however often the end of a training is seen."""
    job = wait(server, train(server, "r", epochs=2)["id"])
    platform = server.state.platform
    assert platform is not None
    asked = platform.catalog.jobs.get(Actor(), job["id"])
    for _ in range(3):
        platform.supervisor._follow_up(asked)
    evaluations = [one for one in server.http.get("/api/jobs").json()["items"] if one["kind"] == "eval"]
    assert [one["adapter"] for one in evaluations] == [f"r/{job['version']}"]
