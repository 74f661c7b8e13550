"""Run by Alembic for `lorikeet.registry.migration`, inside a transaction that is open already."""

from __future__ import annotations

from alembic import context

from lorikeet.registry.schema import Rows

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Rows.metadata,
    transactional_ddl=True,  # SQLite's is, too, as long as nobody commits in between
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
