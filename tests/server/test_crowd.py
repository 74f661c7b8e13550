"""Two hundred clients at once on SQLite, while a job's process writes to it too: nobody hears of a lock."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import httpx
from tests.server.hosting import Hosted
from tests.server.platforms import make, train, up, wait_for_step

CLIENTS = 200


async def crowd(url: str) -> Counter[int]:
    limits = httpx.Limits(max_connections=CLIENTS)
    answers: Counter[int] = Counter()

    async def one(http: httpx.AsyncClient, number: int) -> None:
        name = f"crowd-{number}"
        for method, path, body in (
            ("POST", "/api/repos", {"name": name}),
            ("GET", f"/api/repos/{name}", None),
            ("PATCH", f"/api/repos/{name}", {"description": "mine"}),
            ("GET", "/api/jobs", None),
            ("DELETE", f"/api/repos/{name}", None),
        ):
            reply = await http.request(method, path, json=body)
            answers[reply.status_code] += 1
            assert reply.status_code < 300, reply.text

    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http, asyncio.TaskGroup() as group:
        for number in range(CLIENTS):
            group.create_task(one(http, number))
    return answers


def test_two_hundred_clients(tmp_path: Path) -> None:
    with up(tmp_path, scripted=True) as server:
        make(server, "r", test=False)
        job = train(server, "r", epochs=100_000)
        before = wait_for_step(server, job["id"], 1)["progress"]["step"]
        answers = asyncio.run(crowd(server.url))
        assert sum(answers.values()) == 5 * CLIENTS
        assert wait_for_step(server, job["id"], before + 1)["attempts"] == 1  # it kept its lease
        assert_no_lock(server)


def assert_no_lock(server: Hosted) -> None:
    job = server.http.get("/api/jobs").json()["items"][0]
    said = server.http.get(f"/api/jobs/{job['id']}/logs").json()["text"]
    assert "locked" not in said
