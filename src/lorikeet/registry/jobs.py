"""The queue of jobs: who may run what, and what became of it. It survives whoever runs them.

A job is claimed for a time, as one of its attempts; heartbeats extend that. A lease that ran out puts the job back into
the queue, so that it goes on from its checkpoint, and whoever held it finds `LeaseLostError` at the next word it says.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from sqlalchemy import ColumnElement, and_, or_, select, true
from sqlalchemy.orm import Session

from lorikeet.errors import ConflictError, InvalidRequestError, LeaseLostError
from lorikeet.registry.audit import checked_limit, find_made, log_change, not_found, remember_made, to_record
from lorikeet.registry.database import Part, change, query
from lorikeet.registry.records import (
    Actor,
    Job,
    JobEvent,
    JobMetric,
    JobRequest,
    JobState,
    Lease,
    Page,
    VersionContent,
)
from lorikeet.registry.references import parse_reference
from lorikeet.registry.repositories import find_or_make, find_repository
from lorikeet.registry.schema import (
    DatasetRow,
    JobEventRow,
    JobMetricRow,
    JobRow,
    RepositoryRow,
    VersionRow,
    new_id,
)
from lorikeet.registry.versions import fill, reserve, resolve
from lorikeet.types import ErrorInfo

_ACTIVE: tuple[JobState, ...] = ("running", "stopping")
_END_EVENTS = {"completed": "completed", "errored": "failed", "canceled": "canceled"}


class Jobs(Part):
    # --- for those who want something done --------------------------------------------------------------------------

    @change
    def submit(
        self,
        session: Session,
        who: Actor,
        request: JobRequest,
        *,
        create: str | None = None,
        idempotency_key: str | None = None,
    ) -> Job:
        """Queue a job; a training's version is reserved. Raises `NotFoundError`, `ConflictError`.

        `create` makes the repository where it is not there, with this description.
        """
        made = find_made(session, who, "job.create", idempotency_key, request, self._now)
        if made is not None:
            return _job(session, _find(session, who, made))
        if request.memory < 0 or request.max_attempts < 1:
            raise InvalidRequestError(
                f"expected memory >= 0 and max_attempts >= 1, found {request.memory} and {request.max_attempts}",
                param="memory" if request.memory < 0 else "max_attempts",
            )
        if request.dataset_id is not None:
            data = session.get(DatasetRow, request.dataset_id)
            if data is None or data.tenant_id != who.tenant or data.deleted is not None:
                raise not_found("dataset", request.dataset_id, param="dataset")
        origin = None if request.parent is None else resolve(session, who, parse_reference(request.parent, "parent"))
        row = JobRow(
            tenant_id=who.tenant, state="queued", stage="", attempts=0, created=self._now, created_by=who.name,
            parent_id=None if origin is None else origin.version_id,
            parent_step=None if origin is None else origin.step,
            **{name: getattr(request, name) for name in _TAKEN},
        )  # fmt: skip
        session.add(row)
        session.flush()
        if request.repository is not None:
            if create is None:
                home = find_repository(session, who, request.repository, lock=True)
            else:
                home = find_or_make(session, who, request.repository, create, self._now)
            row.repository_id = home.id
            if request.kind == "train":
                row.version_id = reserve(
                    session, who, home, now=self._now, description=request.description, parent=request.parent,
                    job_id=row.id,
                ).id  # fmt: skip
        _tell(session, row, self._now, "queued", "waiting for its turn")
        remember_made(session, who, "job.create", idempotency_key, request, row.id, self._now)
        log_change(session, who, self._now, "job.create", row.id, request.kind, repository=request.repository)
        return _job(session, row)

    @query
    def get(self, session: Session, who: Actor, job_id: str) -> Job:
        return _job(session, _find(session, who, job_id))

    @query
    def page(
        self,
        session: Session,
        who: Actor,
        *,
        states: Iterable[JobState] | None = None,
        repository: str | None = None,
        after: str | None = None,
        limit: int = 50,
    ) -> Page[Job]:
        """Newest first. `after`: the `next` of the page before."""
        wanted = select(JobRow).where(_of_actor(who)).order_by(JobRow.created.desc(), JobRow.id.desc())
        if states is not None:
            wanted = wanted.where(JobRow.state.in_(sorted(states)))
        if repository is not None:
            wanted = wanted.where(JobRow.repository_id == find_repository(session, who, repository).id)
        if after is not None:
            last = session.get(JobRow, after)
            if last is None or last.tenant_id != who.tenant:
                raise InvalidRequestError(f"after: found {after[:80]!r}; expected the `next` of a page", param="after")
            older = and_(JobRow.created == last.created, JobRow.id < last.id)
            wanted = wanted.where(or_(JobRow.created < last.created, older))
        rows = session.scalars(wanted.limit(checked_limit(limit) + 1)).all()
        return Page(_jobs(session, rows[:limit]), rows[limit - 1].id if len(rows) > limit else None)

    @change
    def cancel(self, session: Session, who: Actor, job_id: str) -> Job:
        """A queued job is canceled at once; a running one is `stopping` until whoever runs it has stopped.

        One that is over stays as it is.
        """
        row = _find(session, who, job_id, lock=True)
        if row.state == "queued":
            _end(session, row, "canceled", self._now, message="canceled before it ran")
        elif row.state == "running":
            row.state = "stopping"
            _tell(session, row, self._now, "stopping", "asked to stop")
        else:
            return _job(session, row)
        log_change(session, who, self._now, "job.cancel", row.id, row.kind)
        return _job(session, row)

    @change
    def resume(self, session: Session, who: Actor, job_id: str) -> Job:
        """Queue a job again that failed or was canceled; it goes on from its last checkpoint. Else `ConflictError`."""
        row = _find(session, who, job_id, lock=True)
        if row.state not in ("errored", "canceled"):
            raise ConflictError(f"the job is {row.state}, expected errored or canceled", param="job")
        version = None if row.version_id is None else session.get_one(VersionRow, row.version_id)
        if version is not None and version.deleted is not None:
            raise ConflictError("the version that the job was to make is deleted", hint="start a new job", param="job")
        if version is not None and version.state == "errored":
            version.state = "pending"
        row.state, row.stage, row.attempts = "queued", "", 0
        row.error = row.finished = None
        _tell(session, row, self._now, "queued", "resumed")
        log_change(session, who, self._now, "job.resume", row.id, row.kind)
        return _job(session, row)

    @query
    def events(self, session: Session, who: Actor, job_id: str, *, after: int = 0, limit: int = 1000) -> list[JobEvent]:
        """The timeline from the event after number `after` on."""
        _find(session, who, job_id)
        return _events(session, job_id, after, limit)

    @query
    def metrics(
        self, session: Session, who: Actor, job_id: str, *, after: int = 0, limit: int = 1000
    ) -> list[JobMetric]:
        """Metrics lines from the one after number `after` on."""
        _find(session, who, job_id)
        return _metrics(session, job_id, after, limit)

    @query
    def news(
        self, session: Session, who: Actor, job_id: str, *, event: int = 0, metric: int = 0, limit: int = 1000
    ) -> tuple[Job, list[JobEvent], list[JobMetric]]:
        """The job at one moment, and what it had said by then after these numbers, at most `limit` of each."""
        job = _job(session, _find(session, who, job_id))
        return job, _events(session, job_id, event, limit), _metrics(session, job_id, metric, limit)

    # --- for whoever runs them: of all tenants ----------------------------------------------------------------------

    @change
    def claim(
        self,
        session: Session,
        owner: str,
        seconds: float,
        *,
        memory: int | None = None,
        kinds: Sequence[str] | None = None,
        join_key: str | None = None,
        limit: int = 1,
    ) -> list[Lease]:
        """Take the next queued jobs, those of high priority and the oldest first, at most `limit` of them.

        Together they need no more than `memory` bytes; one that needs more is passed over. `join_key`: only jobs that
        can run as one with those of this key, and were not tried before: one that broke its process runs alone.
        """
        wanted = select(JobRow).where(JobRow.state == "queued")
        if kinds is not None:
            wanted = wanted.where(JobRow.kind.in_(kinds))
        if join_key is not None:
            wanted = wanted.where(JobRow.join_key == join_key, JobRow.attempts == 0)
        left = memory
        leases: list[Lease] = []
        while len(leases) < limit:
            fits = true() if left is None else JobRow.memory <= left
            row = session.scalar(
                wanted.where(fits)
                .order_by(JobRow.priority.desc(), JobRow.created, JobRow.id)
                .limit(1)
                .with_for_update(skip_locked=True)
            )
            if row is None:
                break
            row.state, row.stage, row.attempts = "running", "starting", row.attempts + 1
            row.owner, row.lease, row.lease_until = owner, new_id(), self._now + seconds
            row.started = row.started if row.started is not None else self._now
            left = None if left is None else left - row.memory
            _tell(session, row, self._now, "started", f"attempt {row.attempts}", owner=owner)
            session.flush()
            leases.append(Lease(_job(session, row), owner, row.lease))
        return leases

    @change
    def heartbeat(self, session: Session, lease: Lease, seconds: float) -> JobState:
        """Extend the lease. `stopping`: somebody wants the job canceled. Raises `LeaseLostError`."""
        row = _held(session, lease)
        row.lease_until = self._now + seconds
        return _state(row)

    @change
    def report(
        self,
        session: Session,
        lease: Lease,
        *,
        stage: str | None = None,
        message: str = "",
        data: dict[str, Any] | None = None,
        progress: dict[str, Any] | None = None,
        metrics: Sequence[dict[str, Any]] = (),
    ) -> JobState:
        """What a running job has come to, in one transaction: a new stage (an event), progress, metrics lines.

        Raises `LeaseLostError`.
        """
        row = _held(session, lease)
        if stage is not None:
            row.stage = stage
            _tell(session, row, self._now, stage, message, **(data or {}))
        if progress is not None:
            row.progress = progress
        for line in metrics:
            loss = line.get("loss")
            session.add(
                JobMetricRow(
                    job_id=row.id, at=line.get("t", self._now), step=line.get("step", 0),
                    split=line.get("split", "train"), data=line,
                    loss=loss if isinstance(loss, int | float) and loss - loss == 0 else None,
                )
            )  # fmt: skip
        return _state(row)

    @change
    def finish(
        self,
        session: Session,
        lease: Lease,
        *,
        content: VersionContent | None = None,
        result: dict[str, Any] | None = None,
    ) -> Job:
        """The job is done: its version gets its content in the same transaction. Raises `LeaseLostError`."""
        row = _held(session, lease)
        who = _system(row)
        if row.version_id is not None:
            if content is None:
                raise InvalidRequestError("content: expected what the job's version is to hold", param="content")
            fill(session, who, session.get_one(VersionRow, row.version_id), content, self._now)
        row.result = result
        _end(session, row, "completed", self._now)
        log_change(session, who, self._now, "job.complete", row.id, row.kind, version=row.version_id)
        return _job(session, row)

    @change
    def fail(self, session: Session, lease: Lease, error: ErrorInfo) -> Job:
        """It failed. One whose error is retryable is queued again while it has attempts left."""
        row = _held(session, lease)
        _fail(session, row, error, self._now)
        return _job(session, row)

    @change
    def stopped(self, session: Session, lease: Lease, message: str = "") -> Job:
        """Whoever ran a job that was `stopping` has stopped it."""
        row = _held(session, lease)
        _end(session, row, "canceled", self._now, message=message)
        log_change(session, _system(row), self._now, "job.canceled", row.id, row.kind)
        return _job(session, row)

    @change
    def release(self, session: Session, lease: Lease, message: str = "") -> Job:
        """Give it back unfinished, with the attempt not counted: the runner shuts down."""
        row = _held(session, lease)
        row.attempts -= 1
        _requeue(session, row, self._now, message or "given back")
        return _job(session, row)

    @change
    def expire(self, session: Session) -> list[Job]:
        """Take jobs from those whose lease ran out: queued again, or over when they have no attempt left."""
        rows = session.scalars(
            select(JobRow)
            .where(JobRow.state.in_(_ACTIVE), JobRow.lease_until < self._now)
            .with_for_update(skip_locked=True)
        ).all()
        for row in rows:
            gone = f"whoever ran it was not heard of any more (attempt {row.attempts} of {row.max_attempts})"
            _fail(session, row, ErrorInfo(code="job_lost", message=gone, retryable=True), self._now)
        return _jobs(session, rows)

    @query
    def running(self, session: Session) -> list[Job]:
        """Of all tenants, with who runs them."""
        rows = session.scalars(select(JobRow).where(JobRow.state.in_(_ACTIVE)).order_by(JobRow.created, JobRow.id))
        return _jobs(session, rows.all())

    @query
    def waiting(self, session: Session) -> int:
        """How many are queued, of all tenants."""
        return len(session.scalars(select(JobRow.id).where(JobRow.state == "queued")).all())


_TAKEN = ("kind", "spec", "base", "dataset_id", "description", "join_key", "priority", "memory", "max_attempts")


def _find(session: Session, who: Actor, job_id: str, *, lock: bool = False) -> JobRow:
    wanted = select(JobRow).where(JobRow.id == job_id, _of_actor(who))
    row = session.scalar(wanted.with_for_update() if lock else wanted)
    if row is None:
        raise not_found("job", job_id, param="job")
    return row


def _of_actor(who: Actor) -> ColumnElement[bool]:
    granted: ColumnElement[bool] = true()
    if who.repositories is not None:
        granted = or_(JobRow.repository_id.is_(None), JobRow.repository_id.in_(sorted(who.repositories)))
    return and_(JobRow.tenant_id == who.tenant, granted)


def _held(session: Session, lease: Lease) -> JobRow:
    """The job, locked, if this lease still holds it. One that ran out holds until somebody took the job away."""
    row = session.scalar(select(JobRow).where(JobRow.id == lease.job.id).with_for_update())
    if row is None or row.state not in _ACTIVE or row.lease != lease.token:
        now = "gone" if row is None else f"{row.state}, attempt {row.attempts}"
        raise LeaseLostError(
            f"job {lease.job.id}: attempt {lease.job.attempts} of {lease.owner} no longer holds it, it is {now}",
            hint="stop working on it",
        )
    return row


def _fail(session: Session, row: JobRow, error: ErrorInfo, now: float) -> None:
    told = msgspec.to_builtins(error)
    if row.state == "stopping":
        _end(session, row, "canceled", now, message=error.message)
    elif error.retryable and row.attempts < row.max_attempts:
        _tell(session, row, now, "retrying", error.message, error=told)
        _requeue(session, row, now, f"waiting for attempt {row.attempts + 1} of {row.max_attempts}")
    else:
        row.error = told
        _end(session, row, "errored", now, message=error.message)
        log_change(session, _system(row), now, "job.fail", row.id, row.kind, code=error.code)


def _requeue(session: Session, row: JobRow, now: float, message: str) -> None:
    """One that was to stop has stopped."""
    if row.state == "stopping":
        _end(session, row, "canceled", now, message=message)
        return
    row.state, row.stage = "queued", ""
    row.owner = row.lease = row.lease_until = None
    _tell(session, row, now, "queued", message)


def _end(session: Session, row: JobRow, state: JobState, now: float, message: str = "") -> None:
    row.state, row.stage, row.finished = state, "", now
    row.owner = row.lease = row.lease_until = None
    if state != "completed" and row.version_id is not None:
        version = session.get_one(VersionRow, row.version_id)
        if version.state == "pending":
            version.state = "errored"
    _tell(session, row, now, _END_EVENTS[state], message)


def _tell(session: Session, row: JobRow, now: float, kind: str, message: str, **data: Any) -> None:
    session.add(JobEventRow(job_id=row.id, at=now, kind=kind, message=message, data=data or None))


def _events(session: Session, job_id: str, after: int, limit: int) -> list[JobEvent]:
    rows = select(JobEventRow).where(JobEventRow.job_id == job_id, JobEventRow.id > after).order_by(JobEventRow.id)
    return [to_record(JobEvent, row) for row in session.scalars(rows.limit(checked_limit(limit)))]


def _metrics(session: Session, job_id: str, after: int, limit: int) -> list[JobMetric]:
    rows = select(JobMetricRow).where(JobMetricRow.job_id == job_id, JobMetricRow.id > after).order_by(JobMetricRow.id)
    return [to_record(JobMetric, row) for row in session.scalars(rows.limit(checked_limit(limit)))]


def _state(row: JobRow) -> JobState:
    state: JobState = msgspec.convert(row.state, JobState)
    return state


def _system(row: JobRow) -> Actor:
    return Actor(tenant=row.tenant_id, name=f"job:{row.id}")


def _job(session: Session, row: JobRow) -> Job:
    return _jobs(session, [row])[0]


def _jobs(session: Session, rows: Sequence[JobRow]) -> list[Job]:
    """With the names of the versions they make, in two queries for all of them."""
    session.flush()
    homes = {row.repository_id for row in rows if row.repository_id is not None}
    names = dict(session.execute(select(RepositoryRow.id, RepositoryRow.name).where(RepositoryRow.id.in_(homes))).all())
    made = {row.version_id for row in rows if row.version_id is not None}
    numbers = dict(session.execute(select(VersionRow.id, VersionRow.number).where(VersionRow.id.in_(made))).all())
    return [
        to_record(Job, row, repository=names.get(row.repository_id or ""), number=numbers.get(row.version_id or ""))
        for row in rows
    ]
