"""Datasets: rows by content, with the columns they have and splits that never change."""

from __future__ import annotations

import msgspec
from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

from lorikeet.errors import ConflictError, InvalidRequestError
from lorikeet.registry.audit import checked_limit, log_change, not_found, to_record
from lorikeet.registry.database import Part, change, query
from lorikeet.registry.ledger import own_blobs
from lorikeet.registry.records import ENDED, Actor, Dataset, DatasetContent, Page
from lorikeet.registry.references import check_name
from lorikeet.registry.schema import DatasetRow, JobRow


class Datasets(Part):
    @change
    def create(
        self, session: Session, who: Actor, name: str, content: DatasetContent, description: str = ""
    ) -> Dataset:
        """A dataset whose files are in the blob store. The same content under the same name is the one that is there.

        Raises `ConflictError` when the name has other content, `InvalidRequestError` for a name or splits that cannot
        be.
        """
        check_name(name)
        if not content.splits or any(one.rows < 1 for one in content.splits.values()):
            raise InvalidRequestError("splits: expected at least one row in each split", param="splits")
        row = session.scalar(_living(who).where(DatasetRow.name == name).with_for_update())
        if row is not None and row.sha256 == content.manifest.sha256:
            return to_record(Dataset, row)
        if row is not None:
            raise ConflictError(
                f"a dataset {name!r} with other content is there already", hint="choose another name, or delete it",
                param="name", code="dataset_exists",
            )  # fmt: skip
        row = DatasetRow(
            tenant_id=who.tenant, name=name, description=description, sha256=content.manifest.sha256,
            format=content.format, columns=content.columns, rows=sum(one.rows for one in content.splits.values()),
            splits={split: msgspec.to_builtins(one) for split, one in content.splits.items()},
            bytes=content.manifest.bytes, created=self._now, created_by=who.name,
        )  # fmt: skip
        session.add(row)
        session.flush()
        own_blobs(session, row.id, content.manifest, self._now)
        log_change(session, who, self._now, "dataset.create", row.id, name, sha256=row.sha256, rows=row.rows)
        return to_record(Dataset, row)

    @query
    def get(self, session: Session, who: Actor, name: str) -> Dataset:
        row = session.scalar(_living(who).where(DatasetRow.name == name))
        if row is None:
            raise not_found("dataset", name, param="dataset")
        return to_record(Dataset, row)

    @query
    def by_id(self, session: Session, who: Actor, dataset_id: str) -> Dataset:
        """Deleted ones, too."""
        row = session.get(DatasetRow, dataset_id)
        if row is None or row.tenant_id != who.tenant:
            raise not_found("dataset", dataset_id, param="dataset")
        return to_record(Dataset, row)

    @query
    def page(
        self, session: Session, who: Actor, *, after: str | None = None, limit: int = 50, contains: str | None = None
    ) -> Page[Dataset]:
        """By name."""
        wanted = _living(who).order_by(DatasetRow.name)
        if after is not None:
            wanted = wanted.where(DatasetRow.name > after)
        if contains:
            wanted = wanted.where(func.lower(DatasetRow.name).contains(contains.lower(), autoescape=True))
        rows = session.scalars(wanted.limit(checked_limit(limit) + 1)).all()
        items = [to_record(Dataset, row) for row in rows[:limit]]
        return Page(items, items[-1].name if len(rows) > limit else None)

    @change
    def delete(self, session: Session, who: Actor, name: str) -> None:
        """A tombstone; the files go once it is collected. Raises `ConflictError` while a job needs it."""
        row = session.scalar(_living(who).where(DatasetRow.name == name).with_for_update())
        if row is None:
            raise not_found("dataset", name, param="dataset")
        job = session.scalar(select(JobRow.id).where(JobRow.dataset_id == row.id, JobRow.state.not_in(ENDED)).limit(1))
        if job is not None:
            raise ConflictError(f"the job {job} needs {name!r}", hint="wait for it, or cancel it", param="dataset")
        row.deleted = self._now
        log_change(session, who, self._now, "dataset.delete", row.id, name)


def _living(who: Actor) -> Select[DatasetRow]:
    return select(DatasetRow).where(DatasetRow.tenant_id == who.tenant, DatasetRow.deleted.is_(None))
