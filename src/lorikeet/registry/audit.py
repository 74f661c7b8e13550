"""The log of changes, creates that may be repeated, and how rows become records."""

from __future__ import annotations

import hashlib
from typing import Any, TypeVar

import msgspec
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from lorikeet.errors import ConflictError, InvalidRequestError, NotFoundError
from lorikeet.registry.database import Part, query
from lorikeet.registry.records import Actor, AuditEntry, Page
from lorikeet.registry.schema import AuditRow, IdempotencyRow, Rows

MOST = 1000  # items of a page
REMEMBERED_SECONDS = 7 * 86_400.0  # for which a client's idempotency key is known
_LONGEST_KEY = 255

Record = TypeVar("Record", bound=msgspec.Struct)


class Audit(Part):
    @query
    def page(
        self,
        session: Session,
        who: Actor,
        *,
        subject_id: str | None = None,
        action: str | None = None,
        before: int | None = None,
        limit: int = 100,
    ) -> Page[AuditEntry]:
        """The tenant's changes, newest first; of one subject or of one kind such as `alias.move`."""
        wanted = select(AuditRow).where(AuditRow.tenant_id == who.tenant).order_by(AuditRow.id.desc())
        if subject_id is not None:
            wanted = wanted.where(AuditRow.subject_id == subject_id)
        if action is not None:
            wanted = wanted.where(AuditRow.action == action)
        if before is not None:
            wanted = wanted.where(AuditRow.id < before)
        rows = session.scalars(wanted.limit(checked_limit(limit) + 1)).all()
        return Page(
            [to_record(AuditEntry, row) for row in rows[:limit]], str(rows[limit - 1].id) if len(rows) > limit else None
        )


def log_change(
    session: Session, who: Actor, at: float, action: str, subject_id: str, subject: str, **details: Any
) -> None:
    """The audit row of a change, in its transaction. `details` hold no secrets."""
    said = {name: value for name, value in details.items() if value is not None}
    session.add(
        AuditRow(
            tenant_id=who.tenant, at=at, actor=who.name, action=action, subject_id=subject_id, subject=subject,
            details=said or None,
        )
    )  # fmt: skip


def find_made(session: Session, who: Actor, action: str, key: str | None, request: object, now: float) -> str | None:
    """The id of what this very create made before. Raises `ConflictError` when the key came with another request."""
    if key is None:
        return None
    if not 0 < len(key) <= _LONGEST_KEY or not key.isprintable():
        raise InvalidRequestError(
            f"idempotency_key: expected 1 to {_LONGEST_KEY} printable characters, found {len(key)}",
            param="idempotency_key",
        )
    row = session.get(IdempotencyRow, (who.tenant, action, key))
    if row is None:
        return None
    if now - row.created > REMEMBERED_SECONDS:
        session.delete(row)
        session.flush()
        return None
    if row.request_sha256 != _fingerprint(request):
        raise ConflictError(
            f"idempotency_key: {key!r} was used for another {action}", hint="use a new key for a new request",
            param="idempotency_key",
        )  # fmt: skip
    return row.subject_id


def remember_made(
    session: Session, who: Actor, action: str, key: str | None, request: object, subject_id: str, now: float
) -> None:
    if key is not None:
        session.add(
            IdempotencyRow(
                tenant_id=who.tenant, action=action, key=key, request_sha256=_fingerprint(request),
                subject_id=subject_id, created=now,
            )
        )  # fmt: skip


def forget_made(session: Session, now: float) -> None:
    """Drop the keys that are too old to be known."""
    session.execute(delete(IdempotencyRow).where(IdempotencyRow.created < now - REMEMBERED_SECONDS))


def _fingerprint(request: object) -> str:
    return hashlib.sha256(msgspec.json.encode(request, order="sorted")).hexdigest()


def to_record(kind: type[Record], row: Rows, **others: Any) -> Record:
    """The row as a record; `others` are fields that are no columns of it."""
    values = {name: others[name] if name in others else getattr(row, name) for name in _taken(kind, row, others)}
    return msgspec.convert(values, kind)


def _taken(kind: type[msgspec.Struct], row: Rows, others: dict[str, Any]) -> list[str]:
    """The fields of a record that the row or `others` have; the rest has defaults, or the conversion says so."""
    return [name for name in kind.__struct_fields__ if name in others or hasattr(row, name)]


def checked_limit(limit: int) -> int:
    if not 1 <= limit <= MOST:
        raise InvalidRequestError(f"limit: found {limit}; expected 1 to {MOST}", param="limit")
    return limit


def not_found(what: str, name: str, hint: str | None = None, param: str | None = None) -> NotFoundError:
    """The same words for what is not there and for what is not for this actor."""
    return NotFoundError(f"there is no {what} {name!r}", hint=hint, param=param, code=f"{what}_not_found")
