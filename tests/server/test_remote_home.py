"""A catalog in PostgreSQL, blobs in S3, only work under way below the home: real jobs, and kill -9 in between."""

from __future__ import annotations

import hashlib
import logging
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.registry.postgres import MISSING, find_binaries, private_postgres
from tests.server.hosting import own_cache
from tests.server.killable import HASTY_JOB, crashing, unused_port
from tests.server.platforms import RECIPE, ROWS, TEST_ROWS, jsonl

from lorikeet.registry.catalog import open_catalog
from lorikeet.registry.records import Actor

EPOCHS = 12  # of six steps


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[tuple[dict[str, str], Any]]:
    """The variables that name both, and a client of the bucket."""
    import boto3
    from moto.server import ThreadedMotoServer

    binaries = find_binaries()
    if binaries is None:
        pytest.skip(MISSING)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_DEFAULT_REGION": "us-east-1"}
    names = dict(zip(("aws_access_key_id", "aws_secret_access_key", "region_name"), keys.values(), strict=True))
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", **names)
    client.create_bucket(Bucket="lorikeet")
    try:
        with private_postgres(binaries) as catalog, own_cache(tmp_path / "cache"):
            where = {"LORIKEET_CATALOG": catalog, "LORIKEET_BLOBS": "s3://lorikeet/home"}
            yield {**keys, **where, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}, client
    finally:
        client.close()
        server.stop()


def wait(http: httpx.Client, job: str, true: Callable[[dict[str, Any]], bool], seconds: float = 90) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    while not true(found := http.get(f"/api/jobs/{job}").raise_for_status().json()):
        assert time.monotonic() < deadline and found["state"] in ("queued", "running"), found
        time.sleep(0.05)
    return dict(found)


def completed(job: dict[str, Any]) -> bool:
    return bool(job["state"] == "completed")


def evaluation(http: httpx.Client) -> dict[str, Any]:
    deadline = time.monotonic() + 30
    while True:
        found = [one for one in http.get("/api/jobs").json()["items"] if one["kind"] == "eval"]
        if found:
            assert len(found) == 1
            return dict(found[0])
        assert time.monotonic() < deadline, "no evaluation follows"
        time.sleep(0.1)


@pytest.mark.parametrize("judged_again", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_training_and_its_evaluation_outlive_their_server(
    tmp_path: Path, elsewhere: tuple[dict[str, str], Any], judged_again: bool
) -> None:
    """Killed while it trains, and with `judged_again` also while it judges."""
    environment, bucket = elsewhere
    home, port = tmp_path / "home", unused_port()
    with crashing(home, port, HASTY_JOB, environment) as (process, http):
        job = start(http)
        checkpoint = home / "jobs" / job / "checkpoint.safetensors"
        wait(http, job, lambda one: checkpoint.exists() and (one["progress"] or {}).get("step", 0) > 6)
        process.send_signal(signal.SIGKILL)
    with crashing(home, port, HASTY_JOB, environment) as (process, http):
        trained = wait(http, job, completed)
        assert trained["attempts"] == 1 and trained["result"]["steps"] == 6 * EPOCHS  # the end was not its fault
        assert "goes on from step" in http.get(f"/api/jobs/{job}/logs").json()["text"] and not checkpoint.exists()
        steps = [one["step"] for one in http.get(f"/api/jobs/{job}/metrics?limit=1000").json()["items"]]
        assert set(steps) == set(range(1, 6 * EPOCHS + 1)), "no step is left out"
        judging = evaluation(http)["id"]
        wait(http, judging, lambda one: one["state"] in ("running", "completed"))
        if not judged_again:
            check(http, wait(http, judging, completed), bucket)
        process.send_signal(signal.SIGKILL)
    if judged_again:
        with crashing(home, port, HASTY_JOB, environment) as (_, http):
            check(http, wait(http, judging, completed), bucket)
    assert not (home / "catalog.db").exists() and not (home / "blobs").exists()
    catalog = open_catalog(environment["LORIKEET_CATALOG"])
    assert len(catalog.evaluations.find(Actor(), job_id=judging)) == 2  # the base's and the adapter's, once each
    catalog.close()


def start(http: httpx.Client) -> str:
    http.post("/api/repos", json={"name": "colour"}).raise_for_status()
    files = {"file": ("train.jsonl", jsonl(ROWS)), "test": ("test.jsonl", jsonl(TEST_ROWS))}
    http.post("/api/datasets", data={"name": "colours"}, files=files).raise_for_status()
    body = {"repo": "colour", "dataset": "colours", "recipe": RECIPE | {"epochs": EPOCHS}}
    return str(http.post("/api/jobs", json=body).raise_for_status().json()["id"])


def check(http: httpx.Client, judging: dict[str, Any], bucket: Any) -> None:
    """The version and its scores, and the version's files as they lie in the bucket."""
    judged = judging["result"]["results"][0]
    assert judged["n"] == len(TEST_ROWS) and judged["adapter_reference"] == "colour/1"
    (row,) = http.get("/api/leaderboard").json()["tasks"]
    assert row["task"] == "colour" and row["adapters"][0]["score"] == judged["adapter"]
    version = http.get("/api/repos/colour/versions/1").json()
    assert version["state"] == "ready" and len(version["evaluations"]) == 1
    for one in version["files"]:
        sent = http.get(f"/api/repos/colour/versions/1/files/{one['path']}").content
        digest = hashlib.sha256(sent).hexdigest()
        stored = bucket.get_object(Bucket="lorikeet", Key=f"home/{digest[:2]}/{digest}")["Body"].read()
        assert stored == sent
