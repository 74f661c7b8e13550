"""Evaluation jobs belong to the repository of the version that they judge."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"

JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")


def upgrade() -> None:
    jobs = sa.table("jobs", sa.column("id"), sa.column("kind"), sa.column("spec", JSON), sa.column("repository_id"))
    versions = sa.table("versions", sa.column("id"), sa.column("repository_id"))
    connection = op.get_bind()
    judged = connection.execute(
        sa.select(jobs.c.id, jobs.c.spec).where(jobs.c.kind == "evaluate", jobs.c.repository_id.is_(None))
    ).all()
    for job_id, spec in judged:
        home = sa.select(versions.c.repository_id).where(versions.c.id == spec.get("version")).scalar_subquery()
        connection.execute(jobs.update().where(jobs.c.id == job_id).values(repository_id=home))
