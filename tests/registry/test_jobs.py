"""The queue: claims, leases, attempts, cancelling, resuming, in SQLite and PostgreSQL."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from sqlalchemy import text
from tests.registry.conftest import NOW, Clock
from tests.registry.contents import content

from lorikeet.errors import ConflictError, InvalidRequestError, LeaseLostError, NotFoundError
from lorikeet.registry.catalog import Catalog
from lorikeet.registry.migration import migrate
from lorikeet.registry.records import Actor, Job, JobRequest
from lorikeet.types import ErrorInfo

LOST = ErrorInfo(code="oom", message="out of memory")
PASSING = ErrorInfo(code="crash", message="it crashed", retryable=True)


@pytest.fixture(autouse=True)
def repository(catalog: Catalog, who: Actor) -> None:
    catalog.repositories.create(who, "intent")


def submit(catalog: Catalog, who: Actor, *, create: str | None = None, **fields: Any) -> Job:
    request = JobRequest(**{"kind": "train", "spec": {"epochs": 1}, "base": "nano", **fields})
    return catalog.jobs.submit(who, request, create=create)


def kinds(catalog: Catalog, who: Actor, job: Job) -> list[str]:
    return [one.kind for one in catalog.jobs.events(who, job.id)]


def test_a_job_from_queue_to_version(catalog: Catalog, who: Actor, clock: Clock) -> None:
    job = submit(catalog, who, repository="intent", description="first")
    assert (job.state, job.repository, job.number, job.spec) == ("queued", "intent", 1, {"epochs": 1})
    assert catalog.versions.get(who, "intent", 1).state == "pending"
    [lease] = catalog.jobs.claim("runner", 30)
    assert (lease.job.id, lease.job.state, lease.job.attempts) == (job.id, "running", 1)
    assert catalog.jobs.claim("runner", 30) == []
    clock.now += 10
    assert catalog.jobs.heartbeat(lease, 30) == "running"
    lines = [{"t": NOW, "step": step, "split": "train", "loss": 1.0 / step} for step in (1, 2)]
    lines.append({"t": NOW, "step": 2, "split": "validation", "loss": float("nan")})
    catalog.jobs.report(lease, stage="training", message="step 2", progress={"step": 2}, metrics=lines)
    done = catalog.jobs.finish(lease, content=content(catalog), result={})
    assert (done.state, done.finished, done.owner, done.progress) == ("completed", NOW + 10, None, {"step": 2})
    assert catalog.versions.resolve(who, "intent").number == 1
    assert kinds(catalog, who, job) == ["queued", "started", "training", "completed"]
    metrics = catalog.jobs.metrics(who, job.id)
    assert [(one.step, one.split, one.loss) for one in metrics] == [
        (1, "train", 1.0), (2, "train", 0.5), (2, "validation", None),
    ]  # fmt: skip
    assert catalog.jobs.metrics(who, job.id, after=metrics[1].id) == metrics[2:]
    with pytest.raises(LeaseLostError, match="it is completed"):
        catalog.jobs.heartbeat(lease, 30)


def test_a_job_makes_its_repository_or_nothing(catalog: Catalog, who: Actor) -> None:
    job = submit(catalog, who, repository="fresh", create="what for")
    assert (job.repository, job.number) == ("fresh", 1)
    assert catalog.repositories.get(who, "fresh").description == "what for"
    assert submit(catalog, who, repository="fresh", create="something else").number == 2
    assert catalog.repositories.get(who, "fresh").description == "what for"
    with pytest.raises(NotFoundError):  # found out after the repository was made
        submit(catalog, who, repository="unmade", create="", parent="unmade/1")
    confined = Actor(tenant=who.tenant, role="trainer", key_id="k", repositories=frozenset())
    for name in ("unmade", "fresh"):
        with pytest.raises(NotFoundError, match="there is no repository"):
            submit(catalog, confined, repository=name, create="")
    assert [one.name for one in catalog.repositories.page(who).items if one.name != "intent"] == ["fresh"]


def test_order_memory_and_joining(catalog: Catalog, who: Actor, clock: Clock) -> None:
    made = {}
    for name, fields in {
        "old": {}, "large": {"memory": 100}, "urgent": {"priority": 5}, "a": {"join_key": "nano", "memory": 2},
        "b": {"join_key": "nano", "memory": 2}, "c": {"join_key": "nano", "memory": 2},
    }.items():  # fmt: skip
        clock.now += 1
        made[submit(catalog, who, description=name, **fields).id] = name

    def claim(**fields: Any) -> list[str]:
        return [made[lease.job.id] for lease in catalog.jobs.claim("runner", 30, **fields)]

    assert claim() == ["urgent"]
    assert claim(kinds=["evaluate"]) == []
    assert claim(memory=50) == ["old"]
    assert claim(join_key="nano", limit=5, memory=5) == ["a", "b"]
    assert claim(limit=5) == ["large", "c"]
    assert catalog.jobs.waiting() == 0 and len(catalog.jobs.running()) == 6


def test_no_job_is_claimed_twice(catalog: Catalog, who: Actor) -> None:
    jobs = {submit(catalog, who).id for _ in range(20)}
    claimed: list[str] = []

    def work(owner: str) -> None:
        while leases := catalog.jobs.claim(owner, 30):
            claimed.extend(lease.job.id for lease in leases)

    threads = [threading.Thread(target=work, args=(f"runner-{number}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(claimed) == sorted(jobs)


def test_a_dead_runner_loses_its_job(catalog: Catalog, who: Actor, clock: Clock) -> None:
    job = submit(catalog, who, repository="intent", max_attempts=2)
    [first] = catalog.jobs.claim("one", 30)
    clock.now += 31
    assert catalog.jobs.heartbeat(first, 30) == "running"  # late, and nobody else has it
    clock.now += 31
    assert [one.state for one in catalog.jobs.expire()] == ["queued"]
    [second] = catalog.jobs.claim("two", 30)
    assert second.job.attempts == 2
    for late in (
        lambda: catalog.jobs.heartbeat(first, 30),
        lambda: catalog.jobs.report(first, stage="training"),
        lambda: catalog.jobs.finish(first, content=content(catalog)),
        lambda: catalog.jobs.fail(first, LOST),
        lambda: catalog.jobs.stopped(first),
        lambda: catalog.jobs.release(first),
    ):
        with pytest.raises(LeaseLostError, match="no longer holds it"):
            late()
    clock.now += 31
    [over] = catalog.jobs.expire()
    assert (over.state, (over.error or {})["code"]) == ("errored", "job_lost")
    assert catalog.versions.get(who, "intent", 1).state == "errored"
    assert catalog.jobs.expire() == []
    assert kinds(catalog, who, job) == ["queued", "started", "retrying", "queued", "started", "failed"]


def test_failing_and_resuming(catalog: Catalog, who: Actor) -> None:
    job = submit(catalog, who, repository="intent")
    [lease] = catalog.jobs.claim("one", 30)
    assert catalog.jobs.fail(lease, PASSING).state == "queued"
    [lease] = catalog.jobs.claim("one", 30)
    failed = catalog.jobs.fail(lease, LOST)
    assert (failed.state, (failed.error or {})["message"]) == ("errored", "out of memory")
    with pytest.raises(ConflictError, match="intent/1 is errored"):
        catalog.versions.resolve(who, "intent/1")
    assert catalog.jobs.resume(who, job.id).state == "queued"
    with pytest.raises(ConflictError, match="the job is queued, expected errored or canceled"):
        catalog.jobs.resume(who, job.id)
    [lease] = catalog.jobs.claim("one", 30)
    assert catalog.jobs.finish(lease, content=content(catalog)).state == "completed"
    assert catalog.versions.resolve(who, "intent").number == 1


def test_cancelling(catalog: Catalog, who: Actor, clock: Clock) -> None:
    waiting = submit(catalog, who, repository="intent")
    assert catalog.jobs.cancel(who, waiting.id).state == "canceled"
    assert catalog.jobs.cancel(who, waiting.id).state == "canceled"
    job = submit(catalog, who)
    [lease] = catalog.jobs.claim("one", 30)
    assert catalog.jobs.cancel(who, job.id).state == "stopping"
    assert catalog.jobs.heartbeat(lease, 30) == "stopping"
    assert catalog.jobs.stopped(lease, "at step 3").state == "canceled"
    dying = submit(catalog, who)
    catalog.jobs.claim("one", 30)
    catalog.jobs.cancel(who, dying.id)
    clock.now += 31
    assert [one.state for one in catalog.jobs.expire()] == ["canceled"]


def test_a_runner_that_shuts_down_gives_back(catalog: Catalog, who: Actor) -> None:
    submit(catalog, who)
    [lease] = catalog.jobs.claim("one", 30)
    given = catalog.jobs.release(lease, "shutting down")
    assert (given.state, given.attempts, given.owner) == ("queued", 0, None)
    [again] = catalog.jobs.claim("one", 30)
    with pytest.raises(LeaseLostError):  # the same owner, the same attempt, another lease
        catalog.jobs.heartbeat(lease, 30)
    assert catalog.jobs.heartbeat(again, 30) == "running"


def test_submitting_again_is_the_same_job(catalog: Catalog, who: Actor) -> None:
    request = JobRequest(kind="train", spec={}, base="nano", repository="intent")
    first = catalog.jobs.submit(who, request, idempotency_key="k")
    assert catalog.jobs.submit(who, request, idempotency_key="k") == first
    assert [one.number for one in catalog.repositories.get(who, "intent").versions] == [1]
    with pytest.raises(ConflictError):
        catalog.jobs.submit(who, JobRequest(kind="train", spec={"x": 1}, base="nano"), idempotency_key="k")


def test_a_parent_is_kept_while_its_child_trains(catalog: Catalog, who: Actor) -> None:
    catalog.versions.add(who, "intent", content(catalog))
    job = submit(catalog, who, repository="intent", parent="intent/1")
    assert catalog.versions.get(who, "intent", 2).parent_id == job.parent_id
    for number in (1, 2):
        with pytest.raises(ConflictError, match=f"the job {job.id} needs intent/{number}"):
            catalog.versions.delete(who, "intent", number)
    with pytest.raises(ConflictError, match="works on 'intent'"):
        catalog.repositories.delete(who, "intent")
    with pytest.raises(NotFoundError):
        submit(catalog, who, repository="intent", parent="intent/9")
    assert len(catalog.repositories.get(who, "intent").versions) == 2  # no number for what was refused


def test_pages_and_filters(catalog: Catalog, who: Actor, clock: Clock) -> None:
    jobs = []
    for number in range(7):
        clock.now += number % 2  # several at the same time
        jobs.append(submit(catalog, who, repository="intent" if number % 2 else None).id)
    catalog.jobs.cancel(who, jobs[0])
    found, after = [], None
    while True:
        page = catalog.jobs.page(who, limit=2, after=after)
        found += [one.id for one in page.items]
        after = page.next
        if after is None:
            break
    assert sorted(found) == sorted(jobs) and len(set(found)) == 7
    assert [one.id for one in catalog.jobs.page(who, states=["canceled"]).items] == [jobs[0]]
    assert len(catalog.jobs.page(who, repository="intent").items) == 3
    with pytest.raises(InvalidRequestError, match="expected the `next` of a page"):
        catalog.jobs.page(who, after="nonsense")


def test_an_evaluation_is_seen_by_whoever_may_use_what_it_judges(catalog: Catalog, who: Actor) -> None:
    job = submit(catalog, who, kind="evaluate", repository="intent")
    assert (job.repository, job.number) == ("intent", None) and catalog.repositories.get(who, "intent").versions == []
    alone = submit(catalog, who, kind="evaluate")
    shared = {"base": "nano", "metric": "accuracy", "n": 1, "score": 1.0}
    for task, made in (("intent", job), ("base alone", alone)):
        catalog.evaluations.add(who, task=task, job_id=made.id, **shared)
    confined = Actor(repositories=frozenset({catalog.repositories.create(who, "spare").id}))
    assert [one.id for one in catalog.jobs.page(confined).items] == [alone.id]
    assert [one.task for one in catalog.evaluations.find(confined)] == ["base alone"]
    jobs = catalog.jobs
    for look in (jobs.get, jobs.events, jobs.metrics, jobs.cancel, jobs.resume):
        with pytest.raises(NotFoundError):
            look(confined, job.id)
    granted = Actor(repositories=frozenset({catalog.repositories.get(who, "intent").id}))
    assert jobs.get(granted, job.id) == job and len(catalog.evaluations.find(granted)) == 2


def test_a_repeated_create_shows_no_job_of_another_repository(catalog: Catalog, who: Actor) -> None:
    request = JobRequest(kind="train", spec={}, base="nano", repository="intent")
    catalog.jobs.submit(who, request, idempotency_key="k")
    with pytest.raises(NotFoundError):
        catalog.jobs.submit(Actor(repositories=frozenset()), request, idempotency_key="k")


def test_evaluations_of_older_catalogs_get_their_repository(catalog: Catalog, who: Actor) -> None:
    version = catalog.versions.by_id(who, submit(catalog, who, repository="intent").version_id or "")
    judged, of_base, gone = (
        submit(catalog, who, kind="evaluate", spec={"version": one}) for one in (version.id, None, "no such")
    )
    with catalog.database.engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '0001'"))
    migrate(catalog.database)
    found = [catalog.jobs.get(who, one.id).repository for one in (judged, of_base, gone)]
    assert found == ["intent", None, None]
