"""Results of evaluations, by version and by task."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, Select, func, or_, select, true
from sqlalchemy.orm import Session

from lorikeet.registry.audit import checked_limit, log_change, not_found, to_record
from lorikeet.registry.database import Part, change, query
from lorikeet.registry.records import Actor, Evaluation, Standing
from lorikeet.registry.schema import DatasetRow, EvaluationRow, JobRow, RepositoryRow, VersionRow
from lorikeet.registry.versions import find_version


class Evaluations(Part):
    @change
    def add(
        self,
        session: Session,
        who: Actor,
        *,
        base: str,
        task: str,
        metric: str,
        n: int,
        score: float,
        interval: tuple[float, float] | None = None,
        version_id: str | None = None,
        dataset_id: str | None = None,
        job_id: str | None = None,
        result: dict[str, Any] | None = None,
    ) -> Evaluation:
        """One result: of a version, or of the base alone. The same of the same job again is the one that is there."""
        if version_id is not None:
            find_version(session, who, version_id)
        if dataset_id is not None:
            data = session.get(DatasetRow, dataset_id)
            if data is None or data.tenant_id != who.tenant:
                raise not_found("dataset", dataset_id)
        if job_id is not None:
            same = (EvaluationRow.job_id == job_id, EvaluationRow.task == task, EvaluationRow.metric == metric)
            of_it = EvaluationRow.version_id.is_(None) if version_id is None else EvaluationRow.version_id == version_id
            there = session.scalar(select(EvaluationRow).where(EvaluationRow.tenant_id == who.tenant, of_it, *same))
            if there is not None:
                return to_record(Evaluation, there)
        low, high = interval or (None, None)
        row = EvaluationRow(
            tenant_id=who.tenant, version_id=version_id, job_id=job_id, dataset_id=dataset_id, base=base, task=task,
            metric=metric, n=n, score=score, low=low, high=high, result=result or {}, created=self._now,
            created_by=who.name,
        )  # fmt: skip
        session.add(row)
        session.flush()
        log_change(session, who, self._now, "evaluation.add", row.id, task, version=version_id, score=score)
        return to_record(Evaluation, row)

    @query
    def find(
        self,
        session: Session,
        who: Actor,
        *,
        version_id: str | None = None,
        task: str | None = None,
        job_id: str | None = None,
        limit: int = 1000,
    ) -> list[Evaluation]:
        """Newest first; those of living versions and of bases, as far as the actor may use them."""
        wanted = _usable(select(EvaluationRow), who).order_by(EvaluationRow.created.desc(), EvaluationRow.id)
        for column, value in (
            (EvaluationRow.version_id, version_id), (EvaluationRow.task, task), (EvaluationRow.job_id, job_id),
        ):  # fmt: skip
            if value is not None:
                wanted = wanted.where(column == value)
        return [to_record(Evaluation, row) for row in session.scalars(wanted.limit(checked_limit(limit)))]

    @query
    def standings(self, session: Session, who: Actor, *, task: str | None = None) -> list[Standing]:
        """Of each task and metric the newest result of every living version and of the base, the best first.

        Those that the actor may use, however many there are.
        """
        of_one = (EvaluationRow.task, EvaluationRow.metric, EvaluationRow.version_id)
        newest = (EvaluationRow.created.desc(), EvaluationRow.id)
        turn = func.row_number().over(partition_by=of_one, order_by=newest).label("turn")
        wanted = _usable(select(EvaluationRow.id, turn), who)
        if task is not None:
            wanted = wanted.where(EvaluationRow.task == task)
        ranked = wanted.subquery()
        rows = session.execute(
            select(EvaluationRow, VersionRow.number, VersionRow.bytes, RepositoryRow.name)
            .join(ranked, ranked.c.id == EvaluationRow.id)
            .outerjoin(VersionRow, VersionRow.id == EvaluationRow.version_id)
            .outerjoin(RepositoryRow, RepositoryRow.id == VersionRow.repository_id)
            .where(ranked.c.turn == 1)
            .order_by(EvaluationRow.task, EvaluationRow.metric, EvaluationRow.score.desc(), EvaluationRow.id)
        )
        return [
            Standing(
                evaluation=to_record(Evaluation, row), reference=None if number is None else f"{name}/{number}",
                bytes=size,
            )
            for row, number, size, name in rows
        ]  # fmt: skip


def _usable(wanted: Select[Any], who: Actor) -> Select[Any]:
    """Of evaluations those of living versions and of bases, as far as the actor may use them."""
    alive = EvaluationRow.version_id.is_(None) | VersionRow.deleted.is_(None)
    return (
        wanted.outerjoin(VersionRow, VersionRow.id == EvaluationRow.version_id)
        .outerjoin(JobRow, JobRow.id == EvaluationRow.job_id)
        .where(EvaluationRow.tenant_id == who.tenant, alive, _granted(who))
    )


def _granted(who: Actor) -> ColumnElement[bool]:
    """A result belongs to the repository of its version, one of the base to that of the job that judged both."""
    if who.repositories is None:
        return true()
    mine = sorted(who.repositories)
    of_base = or_(JobRow.repository_id.is_(None), JobRow.repository_id.in_(mine))
    return or_(VersionRow.repository_id.in_(mine), EvaluationRow.version_id.is_(None) & of_base)
