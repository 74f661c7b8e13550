"""Versions `name/1`, `name/2`, ... and checkpoints `name/3@step` of their training. Neither changes once filled."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import ColumnElement, and_, delete, func, or_, select, true, update
from sqlalchemy.orm import Session, aliased

from lorikeet.errors import ConflictError, InvalidRequestError
from lorikeet.registry.audit import checked_limit, find_made, log_change, not_found, remember_made, to_record
from lorikeet.registry.database import Part, change, query
from lorikeet.registry.ledger import own_blobs
from lorikeet.registry.records import ENDED, Actor, Checkpoint, Page, Resolved, Version, VersionContent
from lorikeet.registry.references import PRODUCTION, RegistryReference, parse_reference
from lorikeet.registry.repositories import find_or_make, find_repository, may_use
from lorikeet.registry.schema import (
    AliasRow,
    CheckpointRow,
    ContentRow,
    DatasetRow,
    JobRow,
    RepositoryRow,
    VersionRow,
)


class Versions(Part):
    @change
    def add(
        self,
        session: Session,
        who: Actor,
        repository: str,
        content: VersionContent,
        *,
        description: str = "",
        parent: str | None = None,
        create: bool = False,
        idempotency_key: str | None = None,
    ) -> Version:
        """The next version of a repository, with content that is in the blob store.

        `create` makes the repository where it is not there. Raises `NotFoundError`, `ConflictError` for blobs that
        are not in the store.
        """
        request = [repository, content, description, parent]
        made = find_made(session, who, "version.create", idempotency_key, request, self._now)
        if made is not None:
            return _version(session, made)
        if create:
            home = find_or_make(session, who, repository, "", self._now)
        else:
            home = find_repository(session, who, repository, lock=True)
        row = reserve(session, who, home, description=description, parent=parent, now=self._now)
        fill(session, who, row, content, self._now)
        remember_made(session, who, "version.create", idempotency_key, request, row.id, self._now)
        log_change(
            session, who, self._now, "version.create", row.id, f"{home.name}/{row.number}",
            manifest=content.manifest.sha256, source=content.source,
        )  # fmt: skip
        return _version(session, row.id)

    @change
    def complete(self, session: Session, who: Actor, version_id: str, content: VersionContent) -> Version:
        """Fill a pending version, once. The same content again changes nothing, another is a `ConflictError`."""
        row = find_version(session, who, version_id, lock=True)
        name = _name_of(session, row)
        if fill(session, who, row, content, self._now):
            log_change(session, who, self._now, "version.complete", row.id, name, manifest=content.manifest.sha256)
        return _version(session, row.id)

    @query
    def get(self, session: Session, who: Actor, repository: str, number: int) -> Version:
        """Pending, ready or errored; not what is deleted. Raises `NotFoundError`."""
        return _version(session, numbered(session, find_repository(session, who, repository), number).id)

    @query
    def by_id(self, session: Session, who: Actor, version_id: str) -> Version:
        """Deleted ones, too: lineage and evaluations name them for ever."""
        return _version(session, find_version(session, who, version_id).id)

    @query
    def page(
        self, session: Session, who: Actor, repository: str, *, before: int | None = None, limit: int = 50
    ) -> Page[Version]:
        """Of one repository, newest first."""
        home = find_repository(session, who, repository)
        wanted = select(VersionRow).where(VersionRow.repository_id == home.id, VersionRow.deleted.is_(None))
        if before is not None:
            wanted = wanted.where(VersionRow.number < before)
        rows = session.scalars(wanted.order_by(VersionRow.number.desc()).limit(checked_limit(limit) + 1)).all()
        items = [to_record(Version, row, repository=home.name) for row in rows[:limit]]
        return Page(items, str(items[-1].number) if len(rows) > limit else None)

    @query
    def lineage(self, session: Session, who: Actor, version_id: str) -> list[Version]:
        """The version, its parent, that one's parent, ...; those the actor may not use end it."""
        found: list[Version] = []
        following: str | None = version_id
        while following is not None:
            row = session.get(VersionRow, following)
            if row is None or row.tenant_id != who.tenant or not may_use(who, row.repository_id):
                break
            found.append(_version(session, row.id))
            following = row.parent_id
        if not found:
            raise not_found("version", version_id)
        return found

    @query
    def children(self, session: Session, who: Actor, version_id: str) -> list[Version]:
        """The versions that were trained on from this one."""
        row = find_version(session, who, version_id)
        rows = session.scalars(
            select(VersionRow.id)
            .where(VersionRow.parent_id == row.id, _of_actor(who), VersionRow.deleted.is_(None))
            .order_by(VersionRow.created, VersionRow.id)
        )
        return [_version(session, one) for one in rows]

    @change
    def archive(self, session: Session, who: Actor, repository: str, number: int, archived: bool = True) -> Version:
        """An archived version is served under its number, but no longer as the newest one. False takes it back."""
        row = numbered(session, find_repository(session, who, repository, lock=True), number)
        if (row.archived is not None) != archived:
            row.archived = self._now if archived else None
            action = "version.archive" if archived else "version.unarchive"
            log_change(session, who, self._now, action, row.id, f"{repository}/{number}")
        return _version(session, row.id)

    @change
    def delete(self, session: Session, who: Actor, repository: str, number: int) -> None:
        """A tombstone; the files go once it is collected. Raises `ConflictError` for what an alias or a job needs."""
        row = numbered(session, find_repository(session, who, repository, lock=True), number)
        alias = session.scalar(select(AliasRow.name).where(AliasRow.version_id == row.id).limit(1))
        if alias is not None:
            raise ConflictError(
                f"{repository}@{alias} is {repository}/{number}", hint="move or remove the alias first", param="version"
            )
        needs = (JobRow.version_id == row.id) | (JobRow.parent_id == row.id)
        job = session.scalar(select(JobRow.id).where(needs, JobRow.state.not_in(ENDED)).limit(1))
        if job is not None:
            raise ConflictError(
                f"the job {job} needs {repository}/{number}", hint="wait for it, or cancel it", param="version"
            )
        row.deleted = self._now
        log_change(session, who, self._now, "version.delete", row.id, f"{repository}/{number}")

    # --- checkpoints ------------------------------------------------------------------------------------------------

    @change
    def add_checkpoint(
        self, session: Session, who: Actor, version_id: str, step: int, content: VersionContent
    ) -> Checkpoint:
        """`name/3@step`. The same again changes nothing; a step that was trained anew after a resume replaces it.

        Raises `ConflictError` when the version is no longer pending.
        """
        row = find_version(session, who, version_id, lock=True)
        name = f"{_name_of(session, row)}@{step}"
        if step < 1:
            raise InvalidRequestError(f"step: found {step}; expected 1 or more", param="step")
        old = session.scalar(
            select(CheckpointRow).where(CheckpointRow.version_id == row.id, CheckpointRow.step == step)
        )
        if old is not None and old.deleted is None and old.manifest == content.manifest.sha256:
            return to_record(Checkpoint, old)
        if row.state != "pending":
            raise ConflictError(f"{name}: the version is {row.state}, its checkpoints are fixed", param="step")
        if old is not None:
            session.execute(delete(ContentRow).where(ContentRow.owner == old.id))
            session.delete(old)
            session.flush()
        made = CheckpointRow(
            tenant_id=who.tenant, version_id=row.id, step=step, manifest=content.manifest.sha256,
            digest=content.digest, bytes=content.manifest.bytes, metrics=content.metrics, created=self._now,
        )  # fmt: skip
        session.add(made)
        session.flush()
        own_blobs(session, made.id, content.manifest, self._now)
        log_change(session, who, self._now, "checkpoint.create", made.id, name, manifest=made.manifest)
        return to_record(Checkpoint, made)

    @query
    def checkpoints(self, session: Session, who: Actor, repository: str, number: int) -> list[Checkpoint]:
        """By step."""
        row = numbered(session, find_repository(session, who, repository), number)
        alive = (CheckpointRow.version_id == row.id, CheckpointRow.deleted.is_(None))
        rows = session.scalars(select(CheckpointRow).where(*alive).order_by(CheckpointRow.step))
        return [to_record(Checkpoint, one) for one in rows]

    @change
    def delete_checkpoint(self, session: Session, who: Actor, repository: str, number: int, step: int) -> None:
        row = numbered(session, find_repository(session, who, repository, lock=True), number)
        found = _checkpoint(session, row, step)
        if found is None:
            raise not_found("checkpoint", f"{repository}/{number}@{step}", param="version")
        found.deleted = self._now
        log_change(session, who, self._now, "checkpoint.delete", found.id, f"{repository}/{number}@{step}")

    # --- resolving --------------------------------------------------------------------------------------------------

    @query
    def resolve(self, session: Session, who: Actor, reference: str) -> Resolved:
        """What `name`, `name/3`, `name/3@step` or `name@alias` is at this moment.

        Raises `NotFoundError` (also for what the actor may not use), `InvalidRequestError` for what is no reference,
        `ConflictError` for a version without content.
        """
        return resolve(session, who, parse_reference(reference))

    @query
    def current(self, session: Session, who: Actor, *, limit: int = 1000) -> list[tuple[str, str]]:
        """(name, manifest) of what the bare names of repositories stand for, by name; those of nothing are left out."""
        granted = true() if who.repositories is None else RepositoryRow.id.in_(sorted(who.repositories))
        homes = and_(RepositoryRow.tenant_id == who.tenant, RepositoryRow.deleted.is_(None), granted)
        one = aliased(VersionRow)
        ready = and_(one.repository_id == RepositoryRow.id, one.state == "ready", one.deleted.is_(None))
        newest = select(func.max(one.number)).where(ready, one.archived.is_(None)).scalar_subquery()
        promoted = (
            select(AliasRow.version_id)
            .where(AliasRow.repository_id == RepositoryRow.id, AliasRow.name == PRODUCTION)
            .scalar_subquery()
        )
        other = and_(promoted.is_(None), VersionRow.number == newest)
        joined = select(RepositoryRow.name, VersionRow.manifest).join(
            VersionRow, and_(VersionRow.repository_id == RepositoryRow.id, or_(VersionRow.id == promoted, other))
        )
        rows = session.execute(joined.where(homes).order_by(RepositoryRow.name).limit(checked_limit(limit)))
        return [(name, manifest) for name, manifest in rows if manifest is not None]

    # --- collecting -------------------------------------------------------------------------------------------------

    @change
    def collect(self, session: Session, before: float) -> int:
        """Let go of the files of versions, checkpoints and datasets deleted before that time; how many there were.

        The blobs that nothing needs any more are removed by `BlobStore.collect`.
        """
        old = VersionRow.deleted < before
        versions = list(session.scalars(select(VersionRow.id).where(old, VersionRow.collected.is_(None))))
        datasets = list(
            session.scalars(select(DatasetRow.id).where(DatasetRow.deleted < before, DatasetRow.collected.is_(None)))
        )
        gone = CheckpointRow.version_id.in_(select(VersionRow.id).where(old)) | (CheckpointRow.deleted < before)
        owned = select(ContentRow.owner)
        checkpoints = list(session.scalars(select(CheckpointRow.id).where(gone, CheckpointRow.id.in_(owned))))
        for owners in _in_batches([*versions, *datasets, *checkpoints]):
            session.execute(delete(ContentRow).where(ContentRow.owner.in_(owners)))
            session.execute(update(VersionRow).where(VersionRow.id.in_(owners)).values(collected=self._now))
            session.execute(update(DatasetRow).where(DatasetRow.id.in_(owners)).values(collected=self._now))
        count = len(versions) + len(datasets) + len(checkpoints)
        if count:
            system = Actor(name="system")
            log_change(session, system, self._now, "collect", "", "", versions=len(versions), datasets=len(datasets),
                       checkpoints=len(checkpoints))  # fmt: skip
        return count


# --- for the other parts ------------------------------------------------------------------------------------------


def reserve(
    session: Session,
    who: Actor,
    home: RepositoryRow,
    *,
    now: float,
    description: str = "",
    parent: str | None = None,
    job_id: str | None = None,
) -> VersionRow:
    """A pending version with the next number; the repository must be locked."""
    origin = None if parent is None else resolve(session, who, parse_reference(parent, "parent"))
    home.last_number += 1
    home.changed = now
    row = VersionRow(
        tenant_id=who.tenant, repository_id=home.id, number=home.last_number, state="pending",
        description=description, job_id=job_id, created=now, created_by=who.name,
        parent_id=None if origin is None else origin.version_id, parent_step=None if origin is None else origin.step,
    )  # fmt: skip
    session.add(row)
    session.flush()
    return row


def fill(session: Session, who: Actor, row: VersionRow, content: VersionContent, now: float) -> bool:
    """Make a pending version ready; False when it has this content already."""
    if row.state == "ready" and row.manifest == content.manifest.sha256:
        return False
    if row.state == "ready":
        raise ConflictError(
            f"{_name_of(session, row)} is there with other content, and versions do not change", param="version"
        )
    if row.deleted is not None:
        raise not_found("version", _name_of(session, row))
    if content.dataset_id is not None:
        data = session.get(DatasetRow, content.dataset_id)
        if data is None or data.tenant_id != who.tenant:
            raise not_found("dataset", content.dataset_id)
    own_blobs(session, row.id, content.manifest, now)
    for name in VersionContent.__struct_fields__:
        if name != "manifest":
            setattr(row, name, getattr(content, name))
    row.manifest, row.bytes = content.manifest.sha256, content.manifest.bytes
    row.state, row.completed = "ready", now
    session.flush()
    return True


def find_version(session: Session, who: Actor, version_id: str, *, lock: bool = False) -> VersionRow:
    wanted = select(VersionRow).where(VersionRow.id == version_id, _of_actor(who))
    row = session.scalar(wanted.with_for_update() if lock else wanted)
    if row is None:
        raise not_found("version", version_id)
    return row


def numbered(session: Session, home: RepositoryRow, number: int) -> VersionRow:
    wanted = select(VersionRow).where(VersionRow.repository_id == home.id, VersionRow.number == number)
    row = session.scalar(wanted)
    if row is None or row.deleted is not None:
        raise not_found("version", f"{home.name}/{number}", "it was deleted" if row is not None else None, "version")
    return row


def resolve(session: Session, who: Actor, reference: RegistryReference) -> Resolved:
    home = find_repository(session, who, reference.repository)
    row = _referred(session, home, reference)
    exact = f"{home.name}/{row.number}"
    manifest, digest = row.manifest, row.digest
    if reference.step is not None:
        checkpoint = _checkpoint(session, row, reference.step)
        if checkpoint is None:
            raise not_found("checkpoint", str(reference), param="model")
        manifest, digest, exact = checkpoint.manifest, checkpoint.digest, f"{exact}@{reference.step}"
    if manifest is None:
        raise ConflictError(
            f"{exact} is {row.state}, it has no content", param="model", code="version_not_ready",
            hint="wait until its job has ended" if row.state == "pending" else "see the events of its job",
        )  # fmt: skip
    return Resolved(
        reference=exact, repository_id=home.id, version_id=row.id, number=row.number, step=reference.step,
        manifest=manifest, digest=digest, base=row.base,
    )  # fmt: skip


def _referred(session: Session, home: RepositoryRow, reference: RegistryReference) -> VersionRow:
    if reference.number is not None:
        return numbered(session, home, reference.number)
    by_alias = select(VersionRow).join(AliasRow, AliasRow.version_id == VersionRow.id)
    alias = reference.alias or PRODUCTION
    row = session.scalar(by_alias.where(AliasRow.repository_id == home.id, AliasRow.name == alias))
    if row is None and reference.alias is None:
        ready = (VersionRow.state == "ready", VersionRow.deleted.is_(None), VersionRow.archived.is_(None))
        newest = select(VersionRow).where(VersionRow.repository_id == home.id, *ready)
        row = session.scalar(newest.order_by(VersionRow.number.desc()).limit(1))
        if row is None:
            raise not_found("version", home.name, "the repository has no version that is ready", "model")
    if row is None:
        raise not_found("alias", str(reference), param="model")
    return row


def _checkpoint(session: Session, row: VersionRow, step: int) -> CheckpointRow | None:
    alive = (CheckpointRow.version_id == row.id, CheckpointRow.step == step, CheckpointRow.deleted.is_(None))
    return session.scalar(select(CheckpointRow).where(*alive))


def _of_actor(who: Actor) -> ColumnElement[bool]:
    granted = true() if who.repositories is None else VersionRow.repository_id.in_(sorted(who.repositories))
    return and_(VersionRow.tenant_id == who.tenant, granted)


def _name_of(session: Session, row: VersionRow) -> str:
    home = session.get_one(RepositoryRow, row.repository_id)
    return f"{home.name}/{row.number}"


def _version(session: Session, version_id: str) -> Version:
    home = aliased(RepositoryRow)
    joined = select(VersionRow, home.name).join(home, home.id == VersionRow.repository_id)
    row, name = session.execute(joined.where(VersionRow.id == version_id)).one()
    return to_record(Version, row, repository=name)


def _in_batches(ids: list[str], size: int = 500) -> Iterable[list[str]]:
    return (ids[start : start + size] for start in range(0, len(ids), size))
