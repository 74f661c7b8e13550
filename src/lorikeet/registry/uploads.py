"""Uploads: a token that takes a file without a key, until it expires."""

from __future__ import annotations

import hashlib
import secrets
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from lorikeet.errors import ConflictError
from lorikeet.registry.audit import log_change, not_found, to_record
from lorikeet.registry.database import Part, change, query
from lorikeet.registry.records import Actor, Upload, UploadKind
from lorikeet.registry.schema import UploadRow

UPLOAD_SECONDS = 86_400.0


class Uploads(Part):
    @change
    def begin(
        self, session: Session, who: Actor, kind: UploadKind, spec: dict[str, Any], *, seconds: float = UPLOAD_SECONDS
    ) -> tuple[Upload, str]:
        """A new upload and its token, which is shown this once and opens nothing else."""
        token = secrets.token_urlsafe(32)
        row = UploadRow(
            tenant_id=who.tenant, hash=_hash(token), kind=kind, spec=spec, files={}, created=self._now,
            created_by=who.name, expires=self._now + seconds,
        )  # fmt: skip
        session.add(row)
        session.flush()
        log_change(session, who, self._now, "upload.begin", row.id, kind)
        return to_record(Upload, row), token

    @query
    def find(self, session: Session, token: str) -> Upload:
        """By its token alone. Raises `NotFoundError`, also for one that has expired."""
        row = session.scalar(select(UploadRow).where(UploadRow.hash == _hash(token)))
        if row is None or row.expires <= self._now:
            raise not_found("upload", "(this token)", "it expired, or never was; begin another upload")
        return to_record(Upload, row)

    @change
    def add_file(self, session: Session, upload_id: str, name: str, sha256: str, size: int) -> Upload:
        """A file of the upload is in the blob store. The last one of a name counts."""
        row = _locked(session, upload_id)
        if row.result is not None:
            raise ConflictError("the upload is complete", hint="begin another upload")
        row.files = {**row.files, name: {"sha256": sha256, "bytes": size}}
        return to_record(Upload, row)

    @change
    def complete(self, session: Session, who: Actor, upload_id: str, result: str) -> Upload:
        """What became of it, by id. The same again changes nothing."""
        row = _locked(session, upload_id)
        if row.tenant_id != who.tenant:
            raise not_found("upload", upload_id)
        if row.result is not None and row.result != result:
            raise ConflictError("the upload is complete", hint="begin another upload")
        if row.result is None:
            row.result = result
            log_change(session, who, self._now, "upload.complete", row.id, row.kind, result=result)
        return to_record(Upload, row)

    @change
    def forget_expired(self, session: Session) -> list[str]:
        """Remove uploads that expired; their ids."""
        gone = delete(UploadRow).where(UploadRow.expires <= self._now).returning(UploadRow.id)
        return list(session.scalars(gone))


def _locked(session: Session, upload_id: str) -> UploadRow:
    row = session.scalar(select(UploadRow).where(UploadRow.id == upload_id).with_for_update())
    if row is None:
        raise not_found("upload", upload_id)
    return row


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
