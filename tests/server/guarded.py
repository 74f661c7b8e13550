"""A platform with two tenants: one has something of everything, all of it marked; the other must not see any."""

from __future__ import annotations

import io
import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec
from tests.server.doors import Caller, Door, caller, doors
from tests.server.hosting import Hosted, hosted

from lorikeet.config import PlatformConfig
from lorikeet.data.formats import read_rows
from lorikeet.job.orders import log_path
from lorikeet.registry.catalog import Catalog
from lorikeet.registry.records import Actor, JobRequest
from lorikeet.server.logs import FORMAT, LineFormatter
from lorikeet.server.platform import Platform

MARK = "for-the-victims-eyes-only"  # in everything of the victim's that can be read, and in nothing else
NAME = "victim"  # of all that has a name
MAX_BODY, MAX_UPLOAD = 64 * 2**10, 512 * 2**10


@dataclass
class Guarded:
    server: Hosted
    home: Path
    doors: list[Door]
    log: io.StringIO
    victim: Actor
    names: dict[str, str]  # what stands in paths for the victim's things
    admin: Caller  # the victim's three, in order of their rank
    trainer: Caller
    user: Caller
    confined: Caller  # one of the victim's, for another repository
    expired: Caller
    revoked: Caller
    stranger: Caller  # the other tenant's admin
    root: Caller  # the default tenant's admin

    @property
    def platform(self) -> Platform:
        assert self.server.state.platform is not None
        return self.server.state.platform

    @property
    def catalog(self) -> Catalog:
        return self.platform.catalog

    def send(self, method: str, target: str, who: Caller | None = None, **more: Any) -> httpx.Response:
        """`target` goes over the wire as it is. Of a reply that does not end only the beginning is read."""
        headers = more.pop("headers", {}) | ({} if who is None else who.headers)
        raw = {"target": target.encode("utf-8", "surrogateescape")}
        body = b""
        http = self.server.http
        with http.stream(
            method, "/", headers=headers, extensions=raw, timeout=httpx.Timeout(30, read=5), **more
        ) as reply:
            if target.split("?")[0].endswith("/stream") and reply.status_code == 200:
                body = next(reply.iter_bytes(), b"")
            else:
                body = reply.read()
        return httpx.Response(reply.status_code, headers=_plain(reply.headers), content=body)

    def snapshot(self) -> str:
        """All of the victim's, as JSON, but for what time and use change."""
        who, catalog = self.victim, self.catalog
        everything = {
            "repositories": catalog.repositories.page(who, limit=1000).items,
            "versions": catalog.versions.page(who, NAME, limit=1000).items,
            "history": catalog.aliases.history(who, NAME, "production"),
            "datasets": catalog.datasets.page(who, limit=1000).items,
            "jobs": catalog.jobs.page(who, limit=1000).items,
            "users": catalog.people.users(who),
            "keys": [msgspec.structs.replace(one, last_used=None) for one in catalog.keys.all(who)],
            "audit": catalog.audit.page(who, limit=1000).items,
            "tenants": [one for one in catalog.people.tenants() if one.id == who.tenant],
        }
        return json.dumps(msgspec.to_builtins(everything), sort_keys=True, indent=1)


def _plain(headers: httpx.Headers) -> list[tuple[str, str]]:
    return [(name, value) for name, value in headers.multi_items() if name.lower() != "content-encoding"]


@contextmanager
def guarded_platform(model: Path, adapter: Path, home: Path) -> Iterator[Guarded]:
    platform = PlatformConfig(home=str(home), max_upload=MAX_UPLOAD)
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    handler.setFormatter(LineFormatter(FORMAT))
    logging.getLogger().addHandler(handler)
    try:
        settings = {"platform": platform, "max_body": MAX_BODY}
        with hosted(model, scripted=True, serve_settings=settings) as server:
            yield _settled(server, home, log, adapter)
    finally:
        logging.getLogger().removeHandler(handler)


def _settled(server: Hosted, home: Path, log: io.StringIO, adapter: Path) -> Guarded:
    assert server.state.platform is not None
    platform = server.state.platform
    catalog = platform.catalog
    tenant = catalog.people.create_tenant(Actor(), "victims").id
    other = catalog.people.create_tenant(Actor(), "strangers").id
    victim = Actor(tenant=tenant, name=MARK)
    names = _furnish(platform, victim, adapter, home)
    catalog.repositories.create(Actor(tenant=other), "own")
    expired = caller(catalog, "expired", "admin", tenant, expires=time.time() + 0.2)
    revoked = caller(catalog, "revoked", "admin", tenant)
    catalog.keys.revoke(victim, revoked.key.id)
    found = Guarded(
        server, home, doors(server.state), log, victim, names,
        admin=caller(catalog, "admin", "admin", tenant), trainer=caller(catalog, "trainer", "trainer", tenant),
        user=caller(catalog, "user", "user", tenant),
        confined=caller(catalog, "confined", "trainer", tenant, repositories=["spare"]),
        expired=expired, revoked=revoked, stranger=caller(catalog, "stranger", "admin", other),
        root=caller(catalog, "root", "admin"),
    )  # fmt: skip
    server.state.access.keys_changed()
    time.sleep(0.25)  # until it has expired
    return found


def _furnish(platform: Platform, victim: Actor, adapter: Path, home: Path) -> dict[str, str]:
    """Something of everything; the names that paths have for it."""
    catalog = platform.catalog
    for name in (NAME, "spare"):
        catalog.repositories.create(victim, name, MARK)
    marked = home.parent / "marked"
    shutil.copytree(adapter, marked)
    (marked / "README.md").write_text(MARK)
    for _ in range(2):
        platform.home.add_adapter(victim, NAME, marked, description=MARK)
    catalog.aliases.move(victim, NAME, "production", 1)
    rows = home.parent / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": MARK, "label": str(i % 2)}) + "\n" for i in range(20)))
    dataset = platform.home.add_dataset(victim, NAME, {"train": rows}, read_rows, description=MARK)
    request = JobRequest(
        kind="train", spec={"note": MARK}, base="llama", repository=NAME, dataset_id=dataset.id, description=MARK,
        memory=2**60,  # so much that nobody ever runs it
    )  # fmt: skip
    job = catalog.jobs.submit(victim, request)
    judging = msgspec.structs.replace(request, kind="evaluate")
    judged = catalog.jobs.submit(victim, judging)
    for one in (job, judged):
        log_path(home, one.id).parent.mkdir(parents=True)
        log_path(home, one.id).write_text(f"{MARK}\n")
    catalog.people.create_user(victim, NAME, "user", f"{MARK}@example.com")
    version = catalog.versions.get(victim, NAME, 1)
    for judged_version in (version.id, None):
        catalog.evaluations.add(
            victim, base="llama", task=MARK, metric="accuracy", n=10, score=0.5, version_id=judged_version,
            job_id=judged.id,
        )  # fmt: skip
    key = catalog.keys.all(victim)
    assert not key
    return {
        "repo": NAME, "name": NAME, "dataset": NAME, "alias": "production", "number": "1", "other": "2", "tag": "1",
        "path": "README.md", "job_id": job.id, "job": job.id, "tenant": victim.tenant, "deployment": "llama",
        "action": "load", "key_id": caller(catalog, NAME, "user", victim.tenant).key.id, "task": "x",
        "evaluation": judged.id,
    }  # fmt: skip
