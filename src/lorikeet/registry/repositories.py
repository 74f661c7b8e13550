"""Repositories: named places of the versions of one adapter."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from sqlalchemy import ColumnElement, and_, func, select, true
from sqlalchemy.orm import Session

from lorikeet.errors import ConflictError, ForbiddenError
from lorikeet.registry.audit import checked_limit, find_made, log_change, not_found, remember_made, to_record
from lorikeet.registry.database import Part, change, query
from lorikeet.registry.records import ENDED, Actor, Alias, Page, Repository, VersionBrief
from lorikeet.registry.references import check_name
from lorikeet.registry.schema import AliasMoveRow, AliasRow, JobRow, RepositoryRow, VersionRow


class Repositories(Part):
    @change
    def create(
        self,
        session: Session,
        who: Actor,
        name: str,
        description: str = "",
        *,
        exists_ok: bool = False,
        idempotency_key: str | None = None,
    ) -> Repository:
        """A new repository; with `exists_ok` the one that is there.

        Raises `ConflictError` when the name is taken, `ForbiddenError` for a key that could not use what it makes.
        """
        check_name(name)
        request = [name, description]
        made = find_made(session, who, "repository.create", idempotency_key, request, self._now)
        row = session.get(RepositoryRow, made) if made else None
        if row is None:
            row = session.scalar(select(RepositoryRow).where(is_named(who, name)))
            if who.repositories is not None and (row is None or not may_use(who, row.id)):
                raise ForbiddenError(
                    "this key is confined to some repositories, and a new one is none of them",
                    hint="have an admin make it and let the key use it", param="name", code="confined_key",
                )  # fmt: skip
            if row is not None and not (exists_ok and may_use(who, row.id)):
                raise ConflictError(
                    f"a repository {name!r} is there already", hint="choose another name", param="name",
                    code="repository_exists",
                )  # fmt: skip
        if row is None:
            row = new_repository(session, who, name, description, self._now)
            remember_made(session, who, "repository.create", idempotency_key, request, row.id, self._now)
        return _with_content(session, [row])[0]

    @query
    def get(self, session: Session, who: Actor, name: str) -> Repository:
        """With its versions and aliases. Raises `NotFoundError`."""
        return _with_content(session, [find_repository(session, who, name)])[0]

    @query
    def page(
        self, session: Session, who: Actor, *, after: str | None = None, limit: int = 50, contains: str | None = None
    ) -> Page[Repository]:
        """Repositories with their versions and aliases, by name; `contains` is a part of the name."""
        wanted = select(RepositoryRow).where(_living_of(who)).order_by(RepositoryRow.name)
        if after is not None:
            wanted = wanted.where(RepositoryRow.name > after)
        if contains:
            wanted = wanted.where(func.lower(RepositoryRow.name).contains(contains.lower(), autoescape=True))
        rows = session.scalars(wanted.limit(checked_limit(limit) + 1)).all()
        return Page(_with_content(session, rows[:limit]), rows[limit - 1].name if len(rows) > limit else None)

    @query
    def count(self, session: Session, who: Actor) -> int:
        return session.scalar(select(func.count()).select_from(RepositoryRow).where(_living_of(who))) or 0

    @change
    def describe(self, session: Session, who: Actor, name: str, description: str) -> Repository:
        """Change its description."""
        row = find_repository(session, who, name, lock=True)
        if row.description != description:
            row.description, row.changed = description, self._now
            log_change(session, who, self._now, "repository.describe", row.id, name, description=description)
        return _with_content(session, [row])[0]

    @change
    def delete(self, session: Session, who: Actor, name: str) -> None:
        """Its versions go with it, their files once they are collected. Raises `ConflictError` while a job runs."""
        row = find_repository(session, who, name, lock=True)
        active = select(JobRow.id).where(JobRow.repository_id == row.id, JobRow.state.not_in(ENDED)).limit(1)
        job = session.scalar(active)
        if job is not None:
            raise ConflictError(f"the job {job} works on {name!r}", hint="cancel it first", param="name")
        row.deleted = row.changed = self._now
        for alias in session.scalars(select(AliasRow).where(AliasRow.repository_id == row.id)):
            drop_alias(session, who, alias, self._now)
        alive = select(VersionRow).where(VersionRow.repository_id == row.id, VersionRow.deleted.is_(None))
        versions = session.scalars(alive).all()
        for version in versions:
            version.deleted = self._now
        log_change(session, who, self._now, "repository.delete", row.id, name, versions=len(versions))


# --- for the other parts ------------------------------------------------------------------------------------------


def new_repository(session: Session, who: Actor, name: str, description: str, now: float) -> RepositoryRow:
    row = RepositoryRow(
        tenant_id=who.tenant, name=name, description=description, last_number=0, created=now, created_by=who.name,
        changed=now,
    )  # fmt: skip
    session.add(row)
    session.flush()
    log_change(session, who, now, "repository.create", row.id, name)
    return row


def find_repository(session: Session, who: Actor, name: str, *, lock: bool = False) -> RepositoryRow:
    """`lock`: nobody else changes it, or gives a number to a version of it, until this transaction ends."""
    wanted = select(RepositoryRow).where(is_named(who, name))
    row = session.scalar(wanted.with_for_update() if lock else wanted)
    if row is None or not may_use(who, row.id):
        raise not_found("repository", name, param="repo")
    return row


def find_or_make(session: Session, who: Actor, name: str, description: str, now: float) -> RepositoryRow:
    """The repository, locked; a new one where there is none. Raises `NotFoundError` for one that is not for `who`."""
    if session.scalar(select(RepositoryRow.id).where(is_named(who, name))) is None:
        new_repository(session, who, check_name(name, "repo"), description, now)
    return find_repository(session, who, name, lock=True)


def drop_alias(session: Session, who: Actor, alias: AliasRow, now: float) -> None:
    session.add(
        AliasMoveRow(
            tenant_id=who.tenant, repository_id=alias.repository_id, name=alias.name, previous_id=alias.version_id,
            version_id=None, at=now, by=who.name,
        )
    )  # fmt: skip
    session.delete(alias)


def may_use(who: Actor, repository_id: str) -> bool:
    return who.repositories is None or repository_id in who.repositories


def is_named(who: Actor, name: str) -> ColumnElement[bool]:
    """The tenant's living repository of this name, whoever may use it."""
    return and_(RepositoryRow.tenant_id == who.tenant, RepositoryRow.name == name, RepositoryRow.deleted.is_(None))


def _living_of(who: Actor) -> ColumnElement[bool]:
    granted = true() if who.repositories is None else RepositoryRow.id.in_(sorted(who.repositories))
    return and_(RepositoryRow.tenant_id == who.tenant, RepositoryRow.deleted.is_(None), granted)


def _with_content(session: Session, rows: Sequence[RepositoryRow]) -> list[Repository]:
    """The rows with their living versions and aliases, in two queries for all of them."""
    ids = [row.id for row in rows]
    versions: defaultdict[str, list[VersionBrief]] = defaultdict(list)
    brief = [getattr(VersionRow, name) for name in VersionBrief.__struct_fields__]
    alive = (VersionRow.repository_id.in_(ids), VersionRow.deleted.is_(None))
    for one in session.execute(select(*brief).where(*alive).order_by(VersionRow.number)):
        versions[one.repository_id].append(VersionBrief(**one._mapping))
    aliases: defaultdict[str, list[Alias]] = defaultdict(list)
    moved = select(AliasRow, VersionRow.number).join(VersionRow, VersionRow.id == AliasRow.version_id)
    for alias, number in session.execute(moved.where(AliasRow.repository_id.in_(ids)).order_by(AliasRow.name)):
        aliases[alias.repository_id].append(to_record(Alias, alias, number=number))
    return [to_record(Repository, row, versions=versions[row.id], aliases=aliases[row.id]) for row in rows]
