"""Aliases such as `name@production`: where each points, and where it pointed before."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session, aliased

from lorikeet.errors import ConflictError
from lorikeet.registry.audit import log_change, not_found, to_record
from lorikeet.registry.database import Part, change, query
from lorikeet.registry.records import Actor, Alias, AliasMove
from lorikeet.registry.references import check_alias
from lorikeet.registry.repositories import drop_alias, find_repository
from lorikeet.registry.schema import AliasMoveRow, AliasRow, VersionRow
from lorikeet.registry.versions import numbered


class Aliases(Part):
    @change
    def move(
        self, session: Session, who: Actor, repository: str, alias: str, number: int, *, expected: int | None = None
    ) -> Alias:
        """Let `repository@alias` be version `number` from the next request on.

        With `expected` only if it is that version now (0: there is no such alias); else `ConflictError`.
        """
        home = find_repository(session, who, repository, lock=True)
        version = numbered(session, home, number)
        name = f"{repository}@{check_alias(alias)}"
        if version.state != "ready":
            raise ConflictError(f"{name}: {repository}/{number} is {version.state}, expected ready", param="version")
        row = _find(session, home.id, alias)
        before = None if row is None else session.get_one(VersionRow, row.version_id)
        now = 0 if before is None else before.number
        if expected is not None and expected != now:
            found = f"{repository}/{now}" if now else "not there"
            raise ConflictError(
                f"{name} is {found}, expected {expected or 'none'}", hint="look again", param="expected"
            )
        if row is None:
            row = AliasRow(tenant_id=who.tenant, repository_id=home.id, name=alias)
            session.add(row)
        elif now == number:
            return to_record(Alias, row, number=number)
        row.version_id, row.moved, row.moved_by = version.id, self._now, who.name
        session.add(
            AliasMoveRow(
                tenant_id=who.tenant, repository_id=home.id, name=alias, previous_id=before.id if before else None,
                version_id=version.id, at=self._now, by=who.name,
            )
        )  # fmt: skip
        session.flush()
        log_change(session, who, self._now, "alias.move", row.id, name, previous=now or None, number=number)
        return to_record(Alias, row, number=number)

    @change
    def remove(self, session: Session, who: Actor, repository: str, alias: str) -> None:
        home = find_repository(session, who, repository, lock=True)
        row = _find(session, home.id, alias)
        if row is None:
            raise not_found("alias", f"{repository}@{alias}", param="alias")
        drop_alias(session, who, row, self._now)
        log_change(session, who, self._now, "alias.remove", row.id, f"{repository}@{alias}")

    @query
    def history(self, session: Session, who: Actor, repository: str, alias: str) -> list[AliasMove]:
        """Every move, newest first."""
        home = find_repository(session, who, repository)
        before, after = aliased(VersionRow), aliased(VersionRow)
        rows = session.execute(
            select(AliasMoveRow, before.number, after.number)
            .outerjoin(before, before.id == AliasMoveRow.previous_id)
            .outerjoin(after, after.id == AliasMoveRow.version_id)
            .where(AliasMoveRow.repository_id == home.id, AliasMoveRow.name == alias)
            .order_by(AliasMoveRow.id.desc())
        )
        return [to_record(AliasMove, row, previous=previous, number=number) for row, previous, number in rows]


def _find(session: Session, repository_id: str, alias: str) -> AliasRow | None:
    return session.scalar(select(AliasRow).where(AliasRow.repository_id == repository_id, AliasRow.name == alias))
