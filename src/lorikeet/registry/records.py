"""What the catalog takes and gives: plain records, which know nothing of the database.

Times are seconds since the epoch, sizes bytes, hashes sha256 in hexadecimal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

DEFAULT_TENANT = "00000000-0000-4000-8000-000000000000"  # of a server without keys

Role = Literal["admin", "trainer", "user"]
RANKS: dict[Role, int] = {"user": 0, "trainer": 1, "admin": 2}  # a higher one may all that a lower one may
VersionState = Literal["pending", "ready", "errored"]
JobKind = Literal["train", "evaluate"]
JobState = Literal["queued", "running", "stopping", "completed", "errored", "canceled"]
ENDED: tuple[JobState, ...] = ("completed", "errored", "canceled")
UploadKind = Literal["dataset", "adapter"]

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Actor:
    """On whose behalf something is asked. Every query is confined to `tenant`; `name` goes to the audit log.

    `repositories` are the ids of those it may use; None is all of the tenant's.
    """

    tenant: str = DEFAULT_TENANT
    name: str = "local"
    role: Role = "admin"
    key_id: str | None = None
    user_id: str | None = None
    repositories: frozenset[str] | None = None


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """Base of the records."""


class Page(msgspec.Struct, Generic[Item], frozen=True):
    """`next` is the cursor of the page after this one; None: there is none."""

    items: list[Item]
    next: str | None = None


# --- people -------------------------------------------------------------------------------------------------------


class Tenant(Record, frozen=True, kw_only=True):
    id: str
    name: str
    created: float


class User(Record, frozen=True, kw_only=True):
    id: str
    tenant_id: str
    name: str
    email: str | None
    role: Role
    created: float
    disabled: float | None


class Key(Record, frozen=True, kw_only=True):
    """`prefix` is the part of the key that may be shown. `every_repository` False: only those granted to it."""

    id: str
    tenant_id: str
    user_id: str | None
    name: str
    prefix: str
    role: Role
    every_repository: bool
    requests_per_minute: int | None
    tokens_per_day: int | None
    created: float
    created_by: str
    expires: float | None
    last_used: float | None
    revoked: float | None


class KeyChange(msgspec.Struct, frozen=True, kw_only=True):
    """What of a key is to change; what is UNSET stays. None: no limit, and all repositories, which are named here."""

    role: Role | UnsetType = UNSET
    repositories: list[str] | None | UnsetType = UNSET
    requests_per_minute: int | None | UnsetType = UNSET
    tokens_per_day: int | None | UnsetType = UNSET


class Usage(Record, frozen=True, kw_only=True):
    key_id: str
    day: int  # since the epoch, UTC
    requests: int
    tokens: int


# --- adapters -----------------------------------------------------------------------------------------------------


class ManifestFile(Record, frozen=True, kw_only=True):
    path: str  # relative, with slashes
    sha256: str
    bytes: int


class Manifest(Record, frozen=True, kw_only=True):
    """A folder by content. `sha256` is that of the blob that holds the list of files."""

    sha256: str
    files: tuple[ManifestFile, ...]

    @property
    def bytes(self) -> int:
        return sum(one.bytes for one in self.files)

    @property
    def blobs(self) -> frozenset[str]:
        return frozenset(one.sha256 for one in self.files) | {self.sha256}


class VersionContent(Record, frozen=True, kw_only=True):
    """What fills a version: its files, which are in the blob store, and where it comes from."""

    manifest: Manifest
    digest: str | None = None  # content hash of the adapter, see `adapters.files.content_hash`
    base: str | None = None
    base_sha256: str | None = None
    recipe: dict[str, Any] | None = None
    recipe_sha256: str | None = None
    dataset_id: str | None = None
    data_sha256: str | None = None
    code_version: str | None = None
    metrics: dict[str, Any] | None = None
    lock: dict[str, Any] | None = None  # its lorikeet.json
    source: str | None = None  # the reference it was imported from


class Version(Record, frozen=True, kw_only=True):
    id: str
    tenant_id: str
    repository_id: str
    repository: str  # its name
    number: int
    state: VersionState
    description: str
    base: str | None
    base_sha256: str | None
    manifest: str | None  # sha256 of its manifest
    digest: str | None
    bytes: int | None
    parent_id: str | None
    parent_step: int | None
    job_id: str | None
    recipe: dict[str, Any] | None
    recipe_sha256: str | None
    dataset_id: str | None
    data_sha256: str | None
    code_version: str | None
    metrics: dict[str, Any] | None
    lock: dict[str, Any] | None
    source: str | None
    created: float
    created_by: str
    completed: float | None
    archived: float | None
    deleted: float | None
    collected: float | None

    @property
    def reference(self) -> str:
        return f"{self.repository}/{self.number}"


class VersionBrief(Record, frozen=True, kw_only=True):
    """A version in a listing of repositories."""

    id: str
    repository_id: str
    number: int
    state: VersionState
    base: str | None
    bytes: int | None
    job_id: str | None
    created: float
    created_by: str
    archived: float | None


class Alias(Record, frozen=True, kw_only=True):
    repository_id: str
    name: str
    version_id: str
    number: int
    moved: float
    moved_by: str


class AliasMove(Record, frozen=True, kw_only=True):
    """`number` None: the alias was removed."""

    id: int
    name: str
    previous: int | None
    number: int | None
    at: float
    by: str


class Repository(Record, frozen=True, kw_only=True):
    """`versions` and `aliases` in the order of their numbers and names, without what is deleted."""

    id: str
    tenant_id: str
    name: str
    description: str
    created: float
    created_by: str
    changed: float
    deleted: float | None
    versions: list[VersionBrief] = []
    aliases: list[Alias] = []


class Checkpoint(Record, frozen=True, kw_only=True):
    id: str
    version_id: str
    step: int
    manifest: str
    digest: str | None
    bytes: int
    metrics: dict[str, Any] | None
    created: float
    deleted: float | None


class Resolved(Record, frozen=True, kw_only=True):
    """What a reference stands for at this moment: a version, or one of its checkpoints (`step`)."""

    reference: str  # exact: name/3 or name/3@step
    repository_id: str
    version_id: str
    number: int
    step: int | None
    manifest: str
    digest: str | None
    base: str | None


# --- data ---------------------------------------------------------------------------------------------------------


class Split(Record, frozen=True, kw_only=True):
    file: str
    sha256: str
    rows: int
    bytes: int


class DatasetContent(Record, frozen=True, kw_only=True):
    """`columns`: name -> type, the same in all splits. `splits` hold train, and validation and test where there are."""

    manifest: Manifest
    format: Literal["jsonl", "csv", "tsv", "parquet"]
    columns: dict[str, str]
    splits: dict[str, Split]


class Dataset(Record, frozen=True, kw_only=True):
    id: str
    tenant_id: str
    name: str
    description: str
    sha256: str  # of its manifest
    format: str
    columns: dict[str, str]
    splits: dict[str, Split]
    rows: int
    bytes: int
    created: float
    created_by: str
    deleted: float | None
    collected: float | None


class Evaluation(Record, frozen=True, kw_only=True):
    """`version_id` None: the base alone. `result` is the line of results, see formats."""

    id: str
    tenant_id: str
    version_id: str | None
    job_id: str | None
    dataset_id: str | None
    base: str
    task: str
    metric: str
    n: int
    score: float
    low: float | None
    high: float | None
    result: dict[str, Any]
    created: float
    created_by: str


class Standing(Record, frozen=True, kw_only=True):
    """A version's newest result of a task and metric; `reference` and `bytes` are the version's, None: the base."""

    evaluation: Evaluation
    reference: str | None
    bytes: int | None


# --- jobs ---------------------------------------------------------------------------------------------------------


class JobRequest(Record, frozen=True, kw_only=True):
    """A job to be queued, which whoever may use its `repository` may see; without one, all of the tenant.

    A training reserves a version of its repository, pending until the job fills it. An evaluation belongs to the
    repository of what it judges.

    `parent` (a reference) is what training goes on from. `join_key`: queued jobs with the same one may run as one.
    """

    kind: JobKind
    spec: dict[str, Any]
    base: str
    repository: str | None = None
    parent: str | None = None
    dataset_id: str | None = None
    description: str = ""
    join_key: str | None = None
    priority: int = 0
    memory: int = 0
    max_attempts: int = 3


class Job(Record, frozen=True, kw_only=True):
    """`repository` and `number` name the version it makes; `number` None: it judges one of the repository's."""

    id: str
    tenant_id: str
    kind: JobKind
    state: JobState
    stage: str
    description: str
    spec: dict[str, Any]
    base: str
    join_key: str | None
    repository_id: str | None
    repository: str | None
    version_id: str | None
    number: int | None
    parent_id: str | None
    parent_step: int | None
    dataset_id: str | None
    priority: int
    memory: int
    attempts: int
    max_attempts: int
    owner: str | None
    lease_until: float | None
    progress: dict[str, Any] | None
    result: dict[str, Any] | None
    error: dict[str, Any] | None
    created: float
    created_by: str
    started: float | None
    finished: float | None

    @property
    def ended(self) -> bool:
        return self.state in ENDED


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to run a job until it expires; heartbeats extend it. `job` is as it was when it was claimed."""

    job: Job
    owner: str
    token: str


class JobEvent(Record, frozen=True, kw_only=True):
    """`id` grows over time: it is where a stream of events goes on."""

    id: int
    job_id: str
    at: float
    kind: str
    message: str
    data: dict[str, Any] | None


class JobMetric(Record, frozen=True, kw_only=True):
    """`data` is the metrics line, see formats."""

    id: int
    job_id: str
    at: float
    step: int
    split: str
    loss: float | None
    data: dict[str, Any]


# --- bytes and changes --------------------------------------------------------------------------------------------


class Upload(Record, frozen=True, kw_only=True):
    """`files`: name -> {sha256, bytes} of what has come. `result`: the id of what became of it."""

    id: str
    tenant_id: str
    kind: UploadKind
    spec: dict[str, Any]
    files: dict[str, Any]
    result: str | None
    created: float
    created_by: str
    expires: float


class AuditEntry(Record, frozen=True, kw_only=True):
    id: int
    tenant_id: str
    at: float
    actor: str
    action: str
    subject_id: str
    subject: str
    details: dict[str, Any] | None
