"""Which blobs the store holds and who needs them: what makes removing them safe while others put them."""

from __future__ import annotations

from sqlalchemy import delete, exists, func, or_, select, update
from sqlalchemy.orm import Session

from lorikeet.errors import ConflictError
from lorikeet.registry.database import Part, change, query
from lorikeet.registry.records import Manifest
from lorikeet.registry.schema import BlobRow, ContentRow

DOOMED_SECONDS = 30.0  # after which a collector that doomed a blob has given it up
_BATCH = 50


class Ledger(Part):
    """A blob is put in three steps: `announce`, store the bytes, and (in the catalog) become the content of something.

    It is removed in three: `doom`, remove the bytes, `forget`. Whoever announces a doomed one has to wait.
    """

    @change
    def announce(self, session: Session, sha256: str, size: int) -> bool:
        """From now on and for the grace period this blob is not removed; False while it is being removed."""
        row = session.scalar(select(BlobRow).where(BlobRow.sha256 == sha256).with_for_update())
        if row is None:
            session.add(BlobRow(sha256=sha256, bytes=size, used=self._now))
        elif row.doomed is not None and self._now - row.doomed < DOOMED_SECONDS:
            return False
        else:
            row.used, row.doomed = self._now, None
        return True

    @change
    def doom(self, session: Session, before: float, limit: int = _BATCH) -> list[str]:
        """Blobs that nothing needs and nobody put since `before`; the caller removes their bytes and forgets them."""
        needed = exists().where(ContentRow.sha256 == BlobRow.sha256)
        free = or_(BlobRow.doomed.is_(None), BlobRow.doomed < self._now - DOOMED_SECONDS)
        unneeded = (BlobRow.used < before, free, ~needed)
        candidates = list(session.scalars(select(BlobRow.sha256).where(*unneeded).limit(limit)))
        doomed = update(BlobRow).where(BlobRow.sha256.in_(candidates), *unneeded).values(doomed=self._now)
        return sorted(session.scalars(doomed.returning(BlobRow.sha256)))

    @change
    def forget(self, session: Session, sha256: str) -> None:
        """The bytes of a doomed blob are gone."""
        session.execute(delete(BlobRow).where(BlobRow.sha256 == sha256, BlobRow.doomed.is_not(None)))

    @query
    def totals(self, session: Session) -> tuple[int, int]:
        """(blobs, bytes) in the store."""
        count, size = session.execute(select(func.count(), func.coalesce(func.sum(BlobRow.bytes), 0))).one()
        return int(count), int(size)


def own_blobs(session: Session, owner: str, manifest: Manifest, now: float) -> None:
    """Note that `owner` needs the blobs of a manifest. Raises `ConflictError` for those the store does not hold."""
    blobs = sorted(manifest.blobs)  # in one order everywhere: two transactions do not wait for each other
    for sha256 in blobs:
        held = update(BlobRow).where(BlobRow.sha256 == sha256, BlobRow.doomed.is_(None)).values(used=now)
        if session.execute(held.returning(BlobRow.sha256)).first() is None:
            raise ConflictError(f"the store does not hold the blob {sha256}", hint="upload the files again")
    session.add_all(ContentRow(sha256=sha256, owner=owner) for sha256 in blobs)
    session.flush()
