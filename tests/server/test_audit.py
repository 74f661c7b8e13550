"""Every route that changes what the catalog holds leaves a row in the audit log, with who did it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from tests.server.doors import Door, caller, doors
from tests.server.hosting import Hosted, own_cache
from tests.server.platforms import up

from lorikeet.registry.records import Actor
from lorikeet.server.auth import demand_of

# Routes that change nothing in the catalog: they generate, render or estimate, or move an adapter between tiers.
PASSING = {
    "POST /", "POST /generate", "POST /generate_stream", "POST /v1/completions", "POST /v1/chat/completions",
    "POST /v1/embeddings", "POST /tokenize", "POST /detokenize", "POST /v1/adapters/{name}/{action}",
    "POST /api/datasets/{name}/preview",
}  # fmt: skip
ROWS = [{"prompt": f"p{i}", "completion": "c", "text": "t", "label": str(i % 2)} for i in range(24)]
TRAIN = {"prompt": "{prompt}", "completion": "{completion}", "epochs": 1000}  # naps, see scripted_job


class Scenario:
    """Requests that succeed, each looked up in the audit log."""

    def __init__(self, server: Hosted, tenant: str) -> None:
        assert server.state.platform is not None
        self.server, self.catalog = server, server.state.platform.catalog
        self.actor = Actor(tenant=tenant)
        self.admin = caller(self.catalog, "boss", "admin", tenant)
        self.root = caller(self.catalog, "root", "admin")
        self.silent: list[str] = []
        self.done: set[str] = set()
        server.state.access.keys_changed()

    def do(self, door: str, body: Any = None, /, *, by: Any = None, **more: Any) -> Any:
        """`door` is a route; its parameters and the request's own arguments are in `more`."""
        method, path = door.split(" ")
        who = by or self.admin
        actor = self.actor if who is self.admin else Actor()
        parameters = {key: more.pop(key) for key in list(more) if f"{{{key}}}" in path}
        before = self.rows(actor)
        if body is not None:
            more["json"] = body
        reply = self.server.http.request(method, path.format(**parameters), headers=who.headers, **more)
        assert reply.status_code < 300, (door, reply.status_code, reply.text)
        fresh = [one for one in self.rows(actor) if one not in before]
        if not any(one.actor == f"key:{who.key.name}" for one in fresh):
            self.silent.append(f"{door}: {[(one.actor, one.action) for one in fresh]}")
        self.done.add(door)
        return reply.json() if reply.content else None

    def rows(self, actor: Actor) -> list[Any]:
        return self.catalog.audit.page(actor, limit=1000).items

    def ended(self, job: str) -> None:
        until = time.monotonic() + 60
        while not self.catalog.jobs.get(self.actor, job).ended:
            assert time.monotonic() < until, self.catalog.jobs.get(self.actor, job)
            time.sleep(0.05)


@pytest.fixture(scope="module")
def scenario(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scenario]:
    place = tmp_path_factory.mktemp("audited")
    with own_cache(place / "cache"), up(place / "home", str(checkpoint("llama")), scripted=True) as server:
        assert server.state.platform is not None
        tenant = server.state.platform.catalog.people.create_tenant(Actor(), "acme")
        yield Scenario(server, tenant.id)


def test_every_change_is_in_the_log(scenario: Scenario, adapters: Callable[..., list[Path]]) -> None:
    files = adapters("llama", 1)[0]
    _people(scenario)
    _repositories(scenario, files)
    _datasets_and_jobs(scenario)
    _predibase(scenario, files)
    assert not scenario.silent
    changing = {
        door.name for door in doors(scenario.server.state) if door.method in ("POST", "PUT", "PATCH", "DELETE")
        and not demand_of(door.endpoint).public and not _passes(scenario, door)
    }  # fmt: skip
    assert changing - scenario.done == set(), "try these here, or say in PASSING why they change nothing"


def _passes(scenario: Scenario, door: Door) -> bool:
    if door.name in PASSING or "/deployments/v2/llms/" in door.path:
        return True
    reply = scenario.server.http.request(door.method, door.filled(), headers=scenario.root.headers)
    return "is not supported" in reply.text  # a call of the protocol that is answered with what to do instead


def _people(scenario: Scenario) -> None:
    key = scenario.do("POST /api/keys", {"name": "k"})["id"]
    scenario.do("PATCH /api/keys/{key_id}", {"repositories": []}, key_id=key)
    scenario.do("DELETE /api/keys/{key_id}", key_id=key)
    scenario.do("POST /api/users", {"name": "ann"})
    scenario.do("PATCH /api/users/{name}", {"disabled": True}, name="ann")
    scenario.do("POST /api/tenants", {"name": "another"}, by=scenario.root)


def _folder(files: Path) -> list[tuple[str, tuple[str, bytes]]]:
    return [
        ("files", (one, (files / one).read_bytes())) for one in ("adapter_config.json", "adapter_model.safetensors")
    ]


def _repositories(scenario: Scenario, files: Path) -> None:
    scenario.do("POST /api/repos", {"name": "r"})
    scenario.do("PATCH /api/repos/{repo}", {"description": "d"}, repo="r")
    for _ in range(2):
        scenario.do("POST /api/repos/{repo}/versions", repo="r", files=_folder(files))
    scenario.do("PATCH /api/repos/{repo}/versions/{number}", {"archived": True}, repo="r", number=2)
    scenario.do("PUT /api/repos/{repo}/aliases/{alias}", {"version": 1}, repo="r", alias="production")
    scenario.do("DELETE /api/repos/{repo}/aliases/{alias}", repo="r", alias="production")
    scenario.do("DELETE /api/repos/{repo}/versions/{number}", repo="r", number=2)


def _datasets_and_jobs(scenario: Scenario) -> None:
    scenario.do("POST /api/datasets", {"name": "d", "rows": ROWS})
    job = scenario.do("POST /api/jobs", {"repo": "r", "dataset": "d", "recipe": TRAIN})["id"]
    scenario.do("POST /api/jobs/{job_id}/cancel", job_id=job)
    scenario.ended(job)
    scenario.do("POST /api/jobs/{job_id}/resume", job_id=job)
    scenario.do("POST /api/jobs/{job_id}/cancel", job_id=job)
    scenario.ended(job)
    scenario.do("DELETE /api/datasets/{name}", name="d")
    task = scenario.server.http.get("/api/demo", headers=scenario.admin.headers).json()["items"][0]["task"]
    job = scenario.do("POST /api/demo/{task}/train", {"recipe": {"epochs": 1000}}, task=task)["id"]
    scenario.do("POST /api/jobs/{job_id}/cancel", job_id=job)
    scenario.ended(job)
    scenario.do("DELETE /api/repos/{repo}", repo="r")


def _put(scenario: Scenario, address: str, data: bytes) -> None:
    assert scenario.server.http.put(urlsplit(address).path, content=data).status_code == 200


def _predibase(scenario: Scenario, files: Path) -> None:
    scenario.do("POST /v2/repos", {"name": "p"})
    begun = scenario.do("POST /v2/datasets/upload", {"fileName": "rows.csv"})
    rows = "prompt,completion\n" + "".join(f"{row['prompt']},{row['completion']}\n" for row in ROWS)
    _put(scenario, begun["presignedUrl"], rows.encode())
    scenario.do("PUT /v2/datasets/upload", {"name": "d2", "uploadToken": begun["uploadToken"]})
    for path in ("/v2/adapters/upload", "/v2/adapters/upload/"):
        begun = scenario.do("POST /v2/adapters/upload", {"repo": "p"})
        for _, (name, data) in _folder(files):
            _put(scenario, begun["presignedUrls"][name], data)
        scenario.do(f"PUT {path}", {"uploadToken": begun["uploadToken"]})
    body = {
        "params": {"base_model": scenario.server.state.models.base.name, "epochs": 1000},
        "dataset": "d2",
        "repo": "p",
    }
    job = scenario.do("POST /v2/finetuning/jobs", body)["uuid"]
    scenario.do("POST /v2/finetuning/jobs/{job}/cancel", {}, job=job)
    scenario.ended(job)
    scenario.do("PUT /v2/repos/{repo}/version/{tag}", {"archived": True}, repo="p", tag="1")
    scenario.do("DELETE /v2/repos/{repo}/version/{tag}", repo="p", tag="1")
    scenario.do("DELETE /v2/repos/{repo}", repo="p")
