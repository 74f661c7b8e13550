"""The tables of the catalog. What a row means is said here once; `records` are what leaves the room.

Times are seconds since the epoch, sizes bytes, hashes sha256 in hexadecimal. Every row that belongs to a tenant says
which. Rows of repositories, versions and datasets stay when they are deleted: `deleted` is when.
"""

from __future__ import annotations

import uuid
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    String,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

Json = JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")
Serial = BigInteger().with_variant(Integer(), "sqlite")  # SQLite counts only INTEGER PRIMARY KEY by itself


class Rows(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {
        str: String(),
        float: Double(),
        int: BigInteger(),
        dict[str, Any]: Json,
        list[Any]: Json,
    }


def new_id() -> str:
    return str(uuid.uuid4())


def _id() -> Mapped[str]:
    return mapped_column(primary_key=True, default=new_id)


def _of(table: str) -> Any:
    return mapped_column(ForeignKey(f"{table}.id"))


def _living(name: str, *columns: str) -> Index:
    """Unique among what is not deleted."""
    alive = text("deleted IS NULL")
    return Index(name, *columns, unique=True, sqlite_where=alive, postgresql_where=alive)


# --- people -------------------------------------------------------------------------------------------------------


class TenantRow(Rows):
    __tablename__ = "tenants"
    id: Mapped[str] = _id()
    name: Mapped[str] = mapped_column(unique=True)
    created: Mapped[float]


class UserRow(Rows):
    __tablename__ = "users"
    __table_args__ = (UniqueConstraint("tenant_id", "name"),)
    id: Mapped[str] = _id()
    tenant_id: Mapped[str] = _of("tenants")
    name: Mapped[str]
    email: Mapped[str | None]
    role: Mapped[str]  # admin | trainer | user
    created: Mapped[float]
    disabled: Mapped[float | None]


class KeyRow(Rows):
    """The key itself is never stored: `hash` finds it, `prefix` is what a page may show."""

    __tablename__ = "keys"
    __table_args__ = (Index(None, "tenant_id", "created"),)
    id: Mapped[str] = _id()
    tenant_id: Mapped[str] = _of("tenants")
    user_id: Mapped[str | None] = _of("users")
    name: Mapped[str]
    hash: Mapped[str] = mapped_column(unique=True)
    prefix: Mapped[str]
    role: Mapped[str]
    every_repository: Mapped[bool]  # False: only those with a grant
    requests_per_minute: Mapped[int | None]
    tokens_per_day: Mapped[int | None]
    created: Mapped[float]
    created_by: Mapped[str]
    expires: Mapped[float | None]
    last_used: Mapped[float | None]
    revoked: Mapped[float | None]


class GrantRow(Rows):
    __tablename__ = "grants"
    __table_args__ = (PrimaryKeyConstraint("key_id", "repository_id"),)
    key_id: Mapped[str] = _of("keys")
    repository_id: Mapped[str] = _of("repositories")
    created: Mapped[float]


class UsageRow(Rows):
    """What a key used on a day (days since the epoch, UTC)."""

    __tablename__ = "usage"
    __table_args__ = (PrimaryKeyConstraint("key_id", "day"),)
    key_id: Mapped[str] = _of("keys")
    day: Mapped[int]
    requests: Mapped[int]
    tokens: Mapped[int]


# --- adapters -----------------------------------------------------------------------------------------------------


class RepositoryRow(Rows):
    __tablename__ = "repositories"
    __table_args__ = (_living("uq_repositories_living_name", "tenant_id", "name"),)
    id: Mapped[str] = _id()
    tenant_id: Mapped[str] = _of("tenants")
    name: Mapped[str]
    description: Mapped[str]
    last_number: Mapped[int]  # the highest number ever given to a version; none is given twice
    created: Mapped[float]
    created_by: Mapped[str]
    changed: Mapped[float]
    deleted: Mapped[float | None]


class VersionRow(Rows):
    """`pending` while its job runs, then `ready` with its content, or `errored`. A ready one never changes again: a
    trigger holds every column but `archived`, `deleted` and `collected`."""

    __tablename__ = "versions"
    __table_args__ = (UniqueConstraint("repository_id", "number"), Index(None, "tenant_id", "created"))
    id: Mapped[str] = _id()
    tenant_id: Mapped[str] = _of("tenants")
    repository_id: Mapped[str] = _of("repositories")
    number: Mapped[int]
    state: Mapped[str]
    description: Mapped[str]
    base: Mapped[str | None]
    base_sha256: Mapped[str | None]
    manifest: Mapped[str | None]  # sha256 of the manifest of its files: what it is, as bytes
    digest: Mapped[str | None]  # content hash of the adapter: what it is, as the engine knows it
    bytes: Mapped[int | None]
    parent_id: Mapped[str | None] = _of("versions")  # it was trained on from that one
    parent_step: Mapped[int | None]
    job_id: Mapped[str | None]
    recipe: Mapped[dict[str, Any] | None]
    recipe_sha256: Mapped[str | None]
    dataset_id: Mapped[str | None] = _of("datasets")
    data_sha256: Mapped[str | None]
    code_version: Mapped[str | None]
    metrics: Mapped[dict[str, Any] | None]
    lock: Mapped[dict[str, Any] | None]  # its lorikeet.json
    source: Mapped[str | None]  # the reference it was imported from
    created: Mapped[float]
    created_by: Mapped[str]
    completed: Mapped[float | None]
    archived: Mapped[float | None]
    deleted: Mapped[float | None]
    collected: Mapped[float | None]  # since when its files may be gone


class CheckpointRow(Rows):
    """`name/3@step`."""

    __tablename__ = "checkpoints"
    __table_args__ = (UniqueConstraint("version_id", "step"),)
    id: Mapped[str] = _id()
    tenant_id: Mapped[str] = _of("tenants")
    version_id: Mapped[str] = _of("versions")
    step: Mapped[int]
    manifest: Mapped[str]
    digest: Mapped[str | None]
    bytes: Mapped[int]
    metrics: Mapped[dict[str, Any] | None]
    created: Mapped[float]
    deleted: Mapped[float | None]


class AliasRow(Rows):
    __tablename__ = "aliases"
    __table_args__ = (UniqueConstraint("repository_id", "name"), Index(None, "version_id"))
    id: Mapped[str] = _id()
    tenant_id: Mapped[str] = _of("tenants")
    repository_id: Mapped[str] = _of("repositories")
    name: Mapped[str]
    version_id: Mapped[str] = _of("versions")
    moved: Mapped[float]
    moved_by: Mapped[str]


class AliasMoveRow(Rows):
    """`version_id` None: the alias was removed."""

    __tablename__ = "alias_moves"
    __table_args__ = (Index(None, "repository_id", "name", "id"),)
    id: Mapped[int] = mapped_column(Serial, primary_key=True)
    tenant_id: Mapped[str] = _of("tenants")
    repository_id: Mapped[str] = _of("repositories")
    name: Mapped[str]
    previous_id: Mapped[str | None] = _of("versions")
    version_id: Mapped[str | None] = _of("versions")
    at: Mapped[float]
    by: Mapped[str]


class DatasetRow(Rows):
    """`splits`: name -> {file, sha256, rows, bytes}; `columns`: name -> type, the same in all splits."""

    __tablename__ = "datasets"
    __table_args__ = (_living("uq_datasets_living_name", "tenant_id", "name"), Index(None, "tenant_id", "sha256"))
    id: Mapped[str] = _id()
    tenant_id: Mapped[str] = _of("tenants")
    name: Mapped[str]
    description: Mapped[str]
    sha256: Mapped[str]  # of the manifest of its files
    format: Mapped[str]  # jsonl | csv | tsv | parquet
    columns: Mapped[dict[str, Any]]
    splits: Mapped[dict[str, Any]]
    rows: Mapped[int]
    bytes: Mapped[int]
    created: Mapped[float]
    created_by: Mapped[str]
    deleted: Mapped[float | None]
    collected: Mapped[float | None]


class EvaluationRow(Rows):
    """One line of results; `version_id` None is the base alone. `result` is the line as eval wrote it."""

    __tablename__ = "evaluations"
    __table_args__ = (Index(None, "tenant_id", "task", "created"), Index(None, "version_id", "created"))
    id: Mapped[str] = _id()
    tenant_id: Mapped[str] = _of("tenants")
    version_id: Mapped[str | None] = _of("versions")
    job_id: Mapped[str | None]
    dataset_id: Mapped[str | None] = _of("datasets")
    base: Mapped[str]
    task: Mapped[str]
    metric: Mapped[str]
    n: Mapped[int]
    score: Mapped[float]
    low: Mapped[float | None]
    high: Mapped[float | None]
    result: Mapped[dict[str, Any]]
    created: Mapped[float]
    created_by: Mapped[str]


# --- jobs ---------------------------------------------------------------------------------------------------------


class JobRow(Rows):
    """States: queued -> running -> completed | errored | canceled, by `stopping` when somebody cancels a running one.

    Who runs it, `owner`, holds a lease until `lease_until`; each attempt has another one.
    """

    __tablename__ = "jobs"
    __table_args__ = (
        Index("ix_jobs_queue", "state", "priority", "created", "id"),
        Index(None, "tenant_id", "created", "id"),
        Index(None, "version_id"),
    )
    id: Mapped[str] = _id()
    tenant_id: Mapped[str] = _of("tenants")
    kind: Mapped[str]  # train | evaluate
    state: Mapped[str]
    stage: Mapped[str]  # what a running one is at, such as training
    description: Mapped[str]
    spec: Mapped[dict[str, Any]]
    base: Mapped[str]
    join_key: Mapped[str | None]  # queued jobs with the same one may run as one
    repository_id: Mapped[str | None] = _of("repositories")
    version_id: Mapped[str | None] = _of("versions")
    parent_id: Mapped[str | None] = _of("versions")
    parent_step: Mapped[int | None]
    dataset_id: Mapped[str | None] = _of("datasets")
    priority: Mapped[int]  # higher runs first
    memory: Mapped[int]
    attempts: Mapped[int]
    max_attempts: Mapped[int]
    owner: Mapped[str | None]
    lease: Mapped[str | None]
    lease_until: Mapped[float | None]
    progress: Mapped[dict[str, Any] | None]
    result: Mapped[dict[str, Any] | None]
    error: Mapped[dict[str, Any] | None]
    created: Mapped[float]
    created_by: Mapped[str]
    started: Mapped[float | None]  # of the first attempt
    finished: Mapped[float | None]


class JobEventRow(Rows):
    __tablename__ = "job_events"
    __table_args__ = (Index(None, "job_id", "id"),)
    id: Mapped[int] = mapped_column(Serial, primary_key=True)
    job_id: Mapped[str] = _of("jobs")
    at: Mapped[float]
    kind: Mapped[str]
    message: Mapped[str]
    data: Mapped[dict[str, Any] | None]


class JobMetricRow(Rows):
    """One metrics line. After a resume the same step may be there again: the later row counts."""

    __tablename__ = "job_metrics"
    __table_args__ = (Index(None, "job_id", "id"),)
    id: Mapped[int] = mapped_column(Serial, primary_key=True)
    job_id: Mapped[str] = _of("jobs")
    at: Mapped[float]
    step: Mapped[int]
    split: Mapped[str]
    loss: Mapped[float | None]
    data: Mapped[dict[str, Any]]


# --- bytes --------------------------------------------------------------------------------------------------------


class BlobRow(Rows):
    """What the store holds. `used` is when somebody last put it; a `doomed` one is about to be removed."""

    __tablename__ = "blobs"
    __table_args__ = (Index(None, "used"),)
    sha256: Mapped[str] = mapped_column(primary_key=True)
    bytes: Mapped[int]
    used: Mapped[float]
    doomed: Mapped[float | None]


class ContentRow(Rows):
    """`owner` (a version, checkpoint or dataset) needs this blob: its manifest and every file in it."""

    __tablename__ = "contents"
    __table_args__ = (PrimaryKeyConstraint("sha256", "owner"), Index(None, "owner"))
    sha256: Mapped[str] = mapped_column(ForeignKey("blobs.sha256"))
    owner: Mapped[str]


class UploadRow(Rows):
    """A promise to take a file, which a client redeems without its key: `hash` is that of the token it was given."""

    __tablename__ = "uploads"
    __table_args__ = (Index(None, "expires"),)
    id: Mapped[str] = _id()
    tenant_id: Mapped[str] = _of("tenants")
    hash: Mapped[str] = mapped_column(unique=True)
    kind: Mapped[str]  # dataset | adapter
    spec: Mapped[dict[str, Any]]
    files: Mapped[dict[str, Any]]  # name -> {sha256, bytes} of what has come
    result: Mapped[str | None]  # the id of what became of it
    created: Mapped[float]
    created_by: Mapped[str]
    expires: Mapped[float]


# --- changes ------------------------------------------------------------------------------------------------------


class IdempotencyRow(Rows):
    """What a create with this key of the client's made, so that a retry finds it."""

    __tablename__ = "idempotency"
    __table_args__ = (PrimaryKeyConstraint("tenant_id", "action", "key"),)
    tenant_id: Mapped[str] = _of("tenants")
    action: Mapped[str]
    key: Mapped[str]
    request_sha256: Mapped[str]
    subject_id: Mapped[str]
    created: Mapped[float]


class AuditRow(Rows):
    """One row a change; triggers refuse to change or delete any."""

    __tablename__ = "audit"
    __table_args__ = (Index(None, "tenant_id", "id"), Index(None, "subject_id", "id"))
    id: Mapped[int] = mapped_column(Serial, primary_key=True)
    tenant_id: Mapped[str] = _of("tenants")
    at: Mapped[float]
    actor: Mapped[str]
    action: Mapped[str]  # such as version.create
    subject_id: Mapped[str]
    subject: Mapped[str]  # its name then
    details: Mapped[dict[str, Any] | None]
