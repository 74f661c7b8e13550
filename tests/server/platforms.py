"""A whole `lorikeet up` in a thread of the test process, and rows to train on that take seconds."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.server.hosting import Hosted, hosted

from lorikeet.config import PlatformConfig

SCRIPTED_JOB = Path(__file__).parent.parent / "scripted_job.py"
COLOURS = {"rose": "red", "sky": "blue", "grass": "green", "snow": "white"}
RECIPE: dict[str, Any] = {
    "prompt": "Thing: {thing}\nColour:", "completion": " {colour}", "epochs": 2, "rank": 4, "alpha": 8,
    "learning_rate": 5e-3, "batch_rows": 8,
}  # fmt: skip
ROWS = [{"thing": f"the {thing} of day {i}", "colour": colour} for i in range(12) for thing, colour in COLOURS.items()]
TEST_ROWS = [{"thing": f"a {thing}", "colour": colour} for thing, colour in COLOURS.items()] * 2


@contextmanager
def up(home: Path, model: str = "lorikeet-nano", **settings: Any) -> Iterator[Hosted]:
    """`settings` are those of `PlatformConfig`, and `scripted` and those of the engine as `hosted` takes them.

    Where the engine is scripted, so are the jobs.
    """
    fields = {name: settings.pop(name) for name in PlatformConfig.__struct_fields__ if name in settings}
    platform = PlatformConfig(**{"home": str(home), "job_threads": 1, **fields})
    engine = {"max_context": 256, "max_seqs": 8, **settings}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lorikeet.server.supervisor.LOOK_SECONDS", 0.1)  # tests do not wait for a second to pass
        patch.setattr("lorikeet.server.following.POLL_SECONDS", 0.05)
        if settings.get("scripted"):
            patch.setattr("lorikeet.server.supervisor.child_command", lambda _: [sys.executable, str(SCRIPTED_JOB)])
        with hosted(Path(model), serve_settings={"platform": platform}, **engine) as server:
            yield server


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def make(server: Hosted, repo: str, dataset: str = "colours", test: bool = True) -> None:
    """A repository, and the dataset if it is not there."""
    made = server.post("/api/repos", {"name": repo, "exists_ok": True})
    assert made.status_code == 201, made.text
    files = {"file": ("train.jsonl", jsonl(ROWS))} | ({"test": ("test.jsonl", jsonl(TEST_ROWS))} if test else {})
    reply = server.http.post("/api/datasets", data={"name": dataset}, files=files)
    assert reply.status_code == 201, reply.text


def train(server: Hosted, repo: str, dataset: str = "colours", description: str = "", **recipe: Any) -> dict[str, Any]:
    body = {"repo": repo, "dataset": dataset, "description": description, "recipe": RECIPE | recipe}
    reply = server.post("/api/jobs", body)
    assert reply.status_code == 201, reply.text
    job: dict[str, Any] = reply.json()
    return job


def job_of(server: Hosted, job_id: str) -> dict[str, Any]:
    found: dict[str, Any] = server.http.get(f"/api/jobs/{job_id}").json()
    return found


def wait(server: Hosted, job_id: str, *states: str, seconds: float = 40) -> dict[str, Any]:
    """The job once it is in one of these states (default: over)."""
    wanted = states or ("completed", "errored", "canceled")
    deadline = time.monotonic() + seconds
    while (job := job_of(server, job_id))["state"] not in wanted:
        assert time.monotonic() < deadline, job
        time.sleep(0.05)
    return job


def wait_for_step(server: Hosted, job_id: str, step: int, seconds: float = 40) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    while ((job := job_of(server, job_id))["progress"] or {}).get("step", 0) < step:
        assert time.monotonic() < deadline and job["state"] in ("queued", "running"), job
        time.sleep(0.05)
    return job
