"""kill -9 of a whole `lorikeet up`, at random moments of an upload, a job and moves of an alias; then it starts again.

What was acknowledged is there, what was under way is there wholly or not at all, and the job goes on.
"""

from __future__ import annotations

import random
import signal
import sqlite3
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.scripted_job import write_adapter
from tests.server.hosting import own_cache
from tests.server.killable import crashing, unused_port
from tests.server.platforms import RECIPE, ROWS

STEPS = 200
FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass
class Truth:
    """What the server has acknowledged, and what was under way."""

    versions: dict[int, bytes] = field(default_factory=dict)  # number -> weights
    alias: int | None = None
    moving: int | None = None
    uploads: int = 0


def keep_uploading(http: httpx.Client, truth: Truth, folder: Path, stop: threading.Event) -> None:
    """Each upload has a key of its own, and is tried again under it by the next server."""
    while not stop.is_set():
        adapter = write_adapter(folder / str(truth.uploads), truth.uploads)
        files = [("files", (name, (adapter / name).read_bytes())) for name in FILES]
        headers = {"idempotency-key": f"upload-{truth.uploads}"}
        try:
            reply = http.post("/api/repos/r/versions", files=files, headers=headers)
        except httpx.TransportError:
            return
        if reply.status_code == 503:
            continue
        assert reply.status_code == 201, reply.text
        truth.versions[reply.json()["number"]] = files[1][1][1]
        truth.uploads += 1


def keep_moving(http: httpx.Client, truth: Truth, stop: threading.Event) -> None:
    while not stop.is_set():
        if not truth.versions:
            time.sleep(0.01)
            continue
        truth.moving = random.choice(list(truth.versions))
        try:
            reply = http.put("/api/repos/r/aliases/production", json={"version": truth.moving})
        except httpx.TransportError:
            return
        assert reply.status_code == 200, reply.text
        truth.alias, truth.moving = truth.moving, None


def work_and_die(
    process: subprocess.Popen[bytes], http: httpx.Client, truth: Truth, folder: Path, after: float
) -> None:
    stop, errors = threading.Event(), []

    def guarded(*call: Any) -> None:
        try:
            call[0](*call[1:])
        except Exception as error:
            errors.append(error)

    workers = [
        threading.Thread(target=guarded, args=(keep_uploading, http, truth, folder, stop)),
        threading.Thread(target=guarded, args=(keep_moving, http, truth, stop)),
    ]
    for one in workers:
        one.start()
    time.sleep(after)
    process.send_signal(signal.SIGKILL)
    process.wait()
    stop.set()
    for one in workers:
        one.join()
    assert not errors, errors


def check(http: httpx.Client, truth: Truth, home: Path, job: str) -> None:
    database = sqlite3.connect(home / "catalog.db")
    assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    database.close()
    repo = http.get("/api/repos/r").json()
    ready = {one["number"] for one in repo["versions"] if one["state"] == "ready"}
    assert set(truth.versions) <= ready and len(ready) <= len(truth.versions) + 1, (truth, ready)
    assert len(ready) == len(repo["versions"])  # nothing half done
    for number, weights in random.sample(list(truth.versions.items()), min(3, len(truth.versions))):
        assert http.get(f"/api/repos/r/versions/{number}/files/{FILES[1]}").content == weights
    aliases = {one["name"]: one["number"] for one in repo["aliases"]}
    assert aliases.get("production") in (truth.alias, truth.moving)
    truth.alias, truth.moving = aliases.get("production"), None
    history = http.get("/api/repos/r/aliases/production/history").json()["items"] if truth.alias else []
    for later, earlier in zip(history, history[1:], strict=False):
        assert later["previous"] == earlier["number"]
    assert http.get(f"/api/jobs/{job}").json()["state"] in ("queued", "running", "completed")


def crash_again_and_again(place: Path, rounds: int, port: int, seed: int) -> None:
    home, truth, chance = place / "home", Truth(), random.Random(seed)
    with crashing(home, port) as (process, http):
        http.post("/api/repos", json={"name": "r"}).raise_for_status()
        http.post("/api/repos", json={"name": "trained"}).raise_for_status()
        http.post("/api/datasets", json={"name": "d", "rows": ROWS}).raise_for_status()
        recipe = RECIPE | {"epochs": STEPS}
        made = http.post("/api/jobs", json={"repo": "trained", "dataset": "d", "recipe": recipe})
        job = made.raise_for_status().json()["id"]
        work_and_die(process, http, truth, place, chance.uniform(0.3, 3.0))
    for number in range(1, rounds):
        with crashing(home, port) as (process, http):
            check(http, truth, home, job)
            work_and_die(process, http, truth, place, chance.uniform(0.05, 3.0))
        assert number
    with crashing(home, port) as (_, http):
        check(http, truth, home, job)
        deadline = time.monotonic() + 60
        while (found := http.get(f"/api/jobs/{job}").json())["state"] != "completed":
            assert time.monotonic() < deadline and found["state"] in ("queued", "running"), found
            time.sleep(0.1)
        assert found["attempts"] == 1  # the server's end is not the job's fault
        steps = [one["step"] for one in http.get(f"/api/jobs/{job}/metrics?limit=1000").json()["items"]]
        assert steps[-1] == STEPS and all(b <= a + 1 + 40 for a, b in zip(steps, steps[1:], strict=False))
        assert http.get(f"/api/repos/trained/versions/{found['version']}").json()["state"] == "ready"
    assert truth.versions, "nothing was uploaded in between"


def test_killed_at_random_moments(tmp_path: Path) -> None:
    with own_cache(tmp_path / "cache"):
        crash_again_and_again(tmp_path, 5, unused_port(), random.randrange(2**32))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_fifty_random_moments(tmp_path: Path) -> None:
    with own_cache(tmp_path / "cache"):
        crash_again_and_again(tmp_path, 50, unused_port(), random.randrange(2**32))
