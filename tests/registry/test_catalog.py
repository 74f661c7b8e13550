"""Repositories, versions, aliases, datasets and evaluations, in SQLite and PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text
from sqlalchemy.orm import Session
from tests.registry.conftest import NOW, Clock
from tests.registry.contents import announced, content, sha256

from lorikeet.errors import (
    ConfigError,
    ConflictError,
    ForbiddenError,
    InvalidRequestError,
    LorikeetError,
    NotFoundError,
    UnavailableError,
)
from lorikeet.registry.catalog import Catalog, open_catalog
from lorikeet.registry.records import (
    Actor,
    DatasetContent,
    JobRequest,
    KeyChange,
    Manifest,
    ManifestFile,
    Split,
    VersionContent,
)
from lorikeet.registry.references import NAME, RegistryReference, parse_reference
from lorikeet.registry.schema import Rows

# --- references ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("intent", RegistryReference("intent")),
        ("intent/3", RegistryReference("intent", 3)),
        ("intent/3@200", RegistryReference("intent", 3, 200)),
        ("intent@production", RegistryReference("intent", alias="production")),
        ("a.b-c_D9@x.y", RegistryReference("a.b-c_D9", alias="x.y")),
    ],
)
def test_references(text: str, expected: RegistryReference) -> None:
    assert parse_reference(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize(
    "text",
    ["", "/", "a/", "a/0", "a/01", "a/-1", "a/x", "a/1/2", "a@", "a@3", "a/1@", "a/1@x", "../a", ".a", "a/1@0", "a b",
     "a/٣", "a\n", "x" * 129, "a@" + "x" * 129, "a/99999999999", "hf://a/b", "a@b@c"],
)  # fmt: skip
def test_what_is_no_reference(text: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_reference(text)
    assert caught.value.code == "invalid_reference"


@given(st.text(max_size=20) | st.from_regex(r"\A[a-c./@0-2-]{0,8}\Z"))
def test_every_text_is_a_reference_or_refused(text: str) -> None:
    try:
        reference = parse_reference(text)
    except InvalidRequestError:
        return
    assert str(reference) == text
    assert NAME.fullmatch(reference.repository)


# --- repositories -------------------------------------------------------------------------------------------------


def test_repositories(catalog: Catalog, who: Actor, other: Actor) -> None:
    made = catalog.repositories.create(who, "intent", "What a customer wants")
    assert (made.name, made.description, made.created, made.versions) == ("intent", "What a customer wants", NOW, [])
    assert catalog.repositories.get(who, "intent") == made
    with pytest.raises(ConflictError, match="'intent' is there already"):
        catalog.repositories.create(who, "intent")
    assert catalog.repositories.create(who, "intent", "else", exists_ok=True) == made
    with pytest.raises(InvalidRequestError, match="expected a name of letters"):
        catalog.repositories.create(who, "../intent")
    assert catalog.repositories.create(other, "intent").id != made.id  # a name belongs to a tenant
    assert catalog.repositories.describe(who, "intent", "better").description == "better"
    assert catalog.repositories.get(other, "intent").description == ""


def test_a_deleted_name_is_free_again(catalog: Catalog, who: Actor) -> None:
    first = catalog.repositories.create(who, "intent")
    catalog.versions.add(who, "intent", content(catalog))
    catalog.aliases.move(who, "intent", "production", 1)
    catalog.repositories.delete(who, "intent")
    with pytest.raises(NotFoundError):
        catalog.repositories.get(who, "intent")
    second = catalog.repositories.create(who, "intent")
    assert second.id != first.id
    assert (second.versions, second.aliases) == ([], [])
    assert catalog.versions.add(who, "intent", content(catalog)).number == 1


def test_pages_go_through_all(catalog: Catalog, who: Actor) -> None:
    names = sorted(f"r{number:02d}" for number in range(23))
    for name in reversed(names):
        catalog.repositories.create(who, name)
        catalog.versions.add(who, name, content(catalog))
    found, after = [], None
    for _ in range(10):
        page = catalog.repositories.page(who, after=after, limit=5)
        found += [one.name for one in page.items]
        assert all([version.number for version in one.versions] == [1] for one in page.items)
        after = page.next
        if after is None:
            break
    assert found == names
    assert catalog.repositories.count(who) == 23
    assert [one.name for one in catalog.repositories.page(who, contains="R1").items] == names[10:20]
    assert catalog.repositories.page(who, contains="%").items == []
    with pytest.raises(InvalidRequestError, match="limit: found 0; expected 1 to 1000"):
        catalog.repositories.page(who, limit=0)


# --- versions -----------------------------------------------------------------------------------------------------


def test_versions_count_and_know_where_they_come_from(catalog: Catalog, who: Actor) -> None:
    catalog.repositories.create(who, "intent")
    first = catalog.versions.add(
        who, "intent",
        content(catalog, "one", digest="d" * 64, base="nano", recipe={"rank": 8}, data_sha256=sha256("data"),
                code_version="1.2", metrics={"loss": 0.5}, lock={"version": 1}, source="hf://org/one"),
        description="the first",
    )  # fmt: skip
    assert (first.number, first.state, first.reference, first.bytes) == (1, "ready", "intent/1", 3)
    assert (first.recipe, first.code_version, first.metrics) == ({"rank": 8}, "1.2", {"loss": 0.5})
    second = catalog.versions.add(who, "intent", content(catalog, "two"), parent="intent/1")
    third = catalog.versions.add(who, "intent", content(catalog, "three"), parent="intent/2")
    assert [one.number for one in catalog.versions.lineage(who, third.id)] == [3, 2, 1]
    assert [one.id for one in catalog.versions.children(who, first.id)] == [second.id]
    assert catalog.versions.get(who, "intent", 1) == first
    page = catalog.versions.page(who, "intent", limit=2)
    assert ([one.number for one in page.items], page.next) == ([3, 2], "2")
    assert [one.number for one in catalog.versions.page(who, "intent", before=2).items] == [1]
    with pytest.raises(NotFoundError, match="there is no version 'intent/9'"):
        catalog.versions.get(who, "intent", 9)


def test_no_number_is_given_twice(catalog: Catalog, who: Actor) -> None:
    catalog.repositories.create(who, "intent")
    catalog.versions.add(who, "intent", content(catalog))
    catalog.versions.delete(who, "intent", 1)
    assert catalog.versions.add(who, "intent", content(catalog)).number == 2
    with pytest.raises(NotFoundError, match="intent/1.*deleted"):
        catalog.versions.get(who, "intent", 1)


@pytest.mark.parametrize(
    "change",
    [
        "bytes = 1",
        "manifest = 'x'",
        "number = 7",
        "state = 'pending'",
        "recipe = NULL",
        "metrics = NULL",
        "digest = NULL",
    ],
)
def test_a_ready_version_does_not_change(change: str, catalog: Catalog, who: Actor) -> None:
    catalog.repositories.create(who, "intent")
    made = catalog.versions.add(who, "intent", content(catalog, digest="d", recipe={"r": 1}, metrics={"loss": 1}))
    for statement in (f"UPDATE versions SET {change}", "DELETE FROM versions"):
        with pytest.raises(UnavailableError, match="does not change|tombstone"):
            run(catalog, statement)
    for statement in ("UPDATE audit SET actor = 'nobody'", "DELETE FROM audit"):
        with pytest.raises(UnavailableError, match="only added to"):
            run(catalog, statement)
    assert catalog.versions.get(who, "intent", 1) == made


def run(catalog: Catalog, statement: str) -> None:
    def work(session: Session) -> None:
        session.execute(text(statement))

    catalog.database.write(work)


def test_a_version_is_filled_once(catalog: Catalog, who: Actor) -> None:
    catalog.repositories.create(who, "intent")
    job = catalog.jobs.submit(who, JobRequest(kind="train", spec={}, base="nano", repository="intent"))
    assert job.version_id is not None
    with pytest.raises(ConflictError, match="intent/1 is pending"):
        catalog.versions.resolve(who, "intent/1")
    with pytest.raises(NotFoundError, match="no version 'intent'"):
        catalog.versions.resolve(who, "intent")
    filled = catalog.versions.complete(who, job.version_id, content(catalog, "one"))
    assert catalog.versions.complete(who, job.version_id, content(catalog, "one")) == filled
    with pytest.raises(ConflictError, match="versions do not change"):
        catalog.versions.complete(who, job.version_id, content(catalog, "two"))


def test_content_must_be_in_the_store(catalog: Catalog, who: Actor) -> None:
    catalog.repositories.create(who, "intent")
    absent = ManifestFile(path="a", sha256=sha256("absent"), bytes=1)
    with pytest.raises(ConflictError, match=f"does not hold the blob {absent.sha256}"):
        catalog.versions.add(who, "intent", VersionContent(manifest=Manifest(sha256=sha256("absent"), files=(absent,))))
    assert catalog.repositories.get(who, "intent").versions == []  # its number went back with the transaction
    assert catalog.versions.add(who, "intent", content(catalog)).number == 1


def test_checkpoints(catalog: Catalog, who: Actor) -> None:
    catalog.repositories.create(who, "intent")
    job = catalog.jobs.submit(who, JobRequest(kind="train", spec={}, base="nano", repository="intent"))
    assert job.version_id is not None
    first = catalog.versions.add_checkpoint(who, job.version_id, 100, content(catalog, "a", metrics={"loss": 1.0}))
    assert catalog.versions.add_checkpoint(who, job.version_id, 100, content(catalog, "a")) == first
    catalog.versions.add_checkpoint(who, job.version_id, 200, content(catalog, "b"))
    again = catalog.versions.add_checkpoint(who, job.version_id, 200, content(catalog, "c"))
    assert [one.step for one in catalog.versions.checkpoints(who, "intent", 1)] == [100, 200]
    resolved = catalog.versions.resolve(who, "intent/1@200")
    assert (resolved.reference, resolved.manifest) == ("intent/1@200", again.manifest)
    catalog.versions.complete(who, job.version_id, content(catalog, "final"))
    with pytest.raises(ConflictError, match="the version is ready"):
        catalog.versions.add_checkpoint(who, job.version_id, 300, content(catalog, "d"))
    child = catalog.versions.add(who, "intent", content(catalog, "child"), parent="intent/1@100")
    assert (child.parent_id, child.parent_step) == (job.version_id, 100)
    catalog.versions.delete_checkpoint(who, "intent", 1, 100)
    with pytest.raises(NotFoundError, match="no checkpoint 'intent/1@100'"):
        catalog.versions.resolve(who, "intent/1@100")


def test_creates_are_idempotent(catalog: Catalog, who: Actor, clock: Clock) -> None:
    catalog.repositories.create(who, "intent")
    filled = content(catalog)
    made = catalog.versions.add(who, "intent", filled, idempotency_key="k1")
    assert catalog.versions.add(who, "intent", filled, idempotency_key="k1") == made
    with pytest.raises(ConflictError, match="'k1' was used for another version.create"):
        catalog.versions.add(who, "intent", filled, description="else", idempotency_key="k1")
    assert catalog.versions.add(who, "intent", filled, idempotency_key="k2").number == 2
    one = catalog.repositories.create(who, "other", idempotency_key="k1")  # keys are of a kind of create
    assert catalog.repositories.create(who, "other", idempotency_key="k1").id == one.id
    clock.now += 8 * 86_400
    assert catalog.versions.add(who, "intent", filled, idempotency_key="k1").number == 3


# --- aliases ------------------------------------------------------------------------------------------------------


def test_resolving(catalog: Catalog, who: Actor, other: Actor) -> None:
    catalog.repositories.create(who, "intent")
    for name in ("one", "two", "three"):
        catalog.versions.add(who, "intent", content(catalog, name))

    def number(reference: str) -> int:
        return catalog.versions.resolve(who, reference).number

    assert (number("intent"), number("intent/2")) == (3, 2)
    catalog.versions.archive(who, "intent", 3)
    assert (number("intent"), number("intent/3")) == (2, 3)
    catalog.aliases.move(who, "intent", "production", 1)
    assert (number("intent"), number("intent@production")) == (1, 1)
    catalog.aliases.move(who, "intent", "production", 3)
    assert number("intent") == 3
    catalog.aliases.remove(who, "intent", "production")
    assert number("intent") == 2
    catalog.versions.archive(who, "intent", 3, archived=False)
    assert number("intent") == 3
    for missing in ("intent@production", "intent/9", "intent/1@5", "other"):
        with pytest.raises(NotFoundError):
            number(missing)
    with pytest.raises(NotFoundError, match="there is no repository 'intent'"):
        catalog.versions.resolve(other, "intent/1")
    catalog.repositories.create(who, "empty")
    for place in (1, 3, None):
        if place is not None:
            catalog.aliases.move(who, "intent", "production", place)
        else:
            catalog.aliases.remove(who, "intent", "production")
        assert catalog.versions.current(who) == [("intent", catalog.versions.resolve(who, "intent").manifest)]
    assert catalog.versions.current(other) == []
    moves = catalog.aliases.history(who, "intent", "production")
    assert [(one.previous, one.number) for one in moves] == [(3, None), (1, 3), (None, 1)] * 2


def test_an_alias_moves_only_from_where_it_is_expected(catalog: Catalog, who: Actor) -> None:
    catalog.repositories.create(who, "intent")
    for name in ("one", "two"):
        catalog.versions.add(who, "intent", content(catalog, name))
    catalog.aliases.move(who, "intent", "canary", 1, expected=0)
    with pytest.raises(ConflictError, match="intent@canary is intent/1, expected none"):
        catalog.aliases.move(who, "intent", "canary", 2, expected=0)
    assert catalog.aliases.move(who, "intent", "canary", 2, expected=1).number == 2
    assert catalog.aliases.move(who, "intent", "canary", 2).number == 2
    assert len(catalog.aliases.history(who, "intent", "canary")) == 2
    with pytest.raises(ConflictError, match="intent@canary is intent/2"):
        catalog.versions.delete(who, "intent", 2)
    with pytest.raises(InvalidRequestError, match="an alias has letters"):
        catalog.aliases.move(who, "intent", "3", 1)


# --- tenants ------------------------------------------------------------------------------------------------------


def test_another_tenant_finds_nothing(catalog: Catalog, who: Actor, other: Actor) -> None:
    catalog.repositories.create(who, "intent")
    version = catalog.versions.add(who, "intent", content(catalog))
    catalog.aliases.move(who, "intent", "production", 1)
    job = catalog.jobs.submit(who, JobRequest(kind="train", spec={}, base="nano", repository="intent"))
    dataset = catalog.datasets.create(who, "rows", rows(catalog))
    key, _ = catalog.keys.create(who, "key")
    evaluation = {"base": "nano", "task": "t", "metric": "accuracy", "n": 5, "score": 0.5}
    catalog.evaluations.add(who, version_id=version.id, **evaluation)  # type: ignore[arg-type]
    upload, _ = catalog.uploads.begin(who, "dataset", {})
    catalog.people.create_user(who, "ann")
    asked: list[Callable[[], object]] = [
        lambda: catalog.repositories.get(other, "intent"),
        lambda: catalog.repositories.describe(other, "intent", ""),
        lambda: catalog.repositories.delete(other, "intent"),
        lambda: catalog.versions.get(other, "intent", 1),
        lambda: catalog.versions.by_id(other, version.id),
        lambda: catalog.versions.lineage(other, version.id),
        lambda: catalog.versions.children(other, version.id),
        lambda: catalog.versions.page(other, "intent"),
        lambda: catalog.versions.resolve(other, "intent"),
        lambda: catalog.versions.archive(other, "intent", 1),
        lambda: catalog.versions.delete(other, "intent", 1),
        lambda: catalog.versions.checkpoints(other, "intent", 1),
        lambda: catalog.versions.complete(other, str(job.version_id), content(catalog)),
        lambda: catalog.versions.add_checkpoint(other, str(job.version_id), 1, content(catalog)),
        lambda: catalog.aliases.move(other, "intent", "production", 1),
        lambda: catalog.aliases.remove(other, "intent", "production"),
        lambda: catalog.aliases.history(other, "intent", "production"),
        lambda: catalog.jobs.get(other, job.id),
        lambda: catalog.jobs.cancel(other, job.id),
        lambda: catalog.jobs.resume(other, job.id),
        lambda: catalog.jobs.events(other, job.id),
        lambda: catalog.jobs.metrics(other, job.id),
        lambda: catalog.jobs.submit(other, JobRequest(kind="evaluate", spec={}, base="nano", dataset_id=dataset.id)),
        lambda: catalog.datasets.get(other, "rows"),
        lambda: catalog.datasets.by_id(other, dataset.id),
        lambda: catalog.datasets.delete(other, "rows"),
        lambda: catalog.evaluations.add(other, version_id=version.id, **evaluation),  # type: ignore[arg-type]
        lambda: catalog.keys.revoke(other, key.id),
        lambda: catalog.keys.alter(other, key.id, KeyChange(repositories=None)),
        lambda: catalog.keys.grants(other, key.id),
        lambda: catalog.uploads.complete(other, upload.id, "x"),
        lambda: catalog.people.user(other, "ann"),
        lambda: catalog.people.disable_user(other, "ann"),
    ]
    for ask in asked:
        with pytest.raises(NotFoundError):
            ask()
    assert catalog.repositories.page(other).items == []
    assert catalog.repositories.count(other) == 0
    assert catalog.jobs.page(other).items == []
    assert catalog.datasets.page(other).items == []
    assert catalog.evaluations.find(other) == []
    assert catalog.keys.all(other) == []
    assert catalog.people.users(other) == []
    assert catalog.audit.page(other).items == []


def test_grants_confine_a_key(catalog: Catalog, who: Actor) -> None:
    for name in ("mine", "theirs"):
        catalog.repositories.create(who, name)
        catalog.versions.add(who, name, content(catalog, name))
    hidden = catalog.versions.get(who, "theirs", 1)
    _, secret = catalog.keys.create(who, "key", repositories=["mine"])
    found = catalog.keys.authenticate(secret)
    assert found is not None
    confined = found[0]
    assert [one.name for one in catalog.repositories.page(confined).items] == ["mine"]
    assert catalog.versions.resolve(confined, "mine").number == 1
    for ask in (
        lambda: catalog.versions.resolve(confined, "theirs"),
        lambda: catalog.versions.by_id(confined, hidden.id),
        lambda: catalog.repositories.get(confined, "theirs"),
        lambda: catalog.aliases.move(confined, "theirs", "production", 1),
    ):
        with pytest.raises(NotFoundError):
            ask()
    for name in ("theirs", "new"):  # whether the name is taken is not said; a new one would not be the key's
        with pytest.raises(ForbiddenError, match="confined to some repositories, and a new one is none of them"):
            catalog.repositories.create(confined, name, exists_ok=True)
    assert catalog.repositories.create(confined, "mine", exists_ok=True).name == "mine"
    with pytest.raises(ConflictError):
        catalog.repositories.create(confined, "mine")
    assert catalog.repositories.count(who) == 2


# --- datasets, evaluations ----------------------------------------------------------------------------------------


def rows(catalog: Catalog, *names: str) -> DatasetContent:
    manifest = announced(catalog, *(names or ("rows",)))
    return DatasetContent(
        manifest=manifest, format="jsonl", columns={"text": "text", "label": "text?"},
        splits={"train": Split(file="train.jsonl", sha256=manifest.files[0].sha256, rows=7, bytes=70)},
    )  # fmt: skip


def test_datasets(catalog: Catalog, who: Actor) -> None:
    made = catalog.datasets.create(who, "rows", rows(catalog))
    assert (made.rows, made.columns, made.splits["train"].rows) == (7, {"text": "text", "label": "text?"}, 7)
    assert catalog.datasets.create(who, "rows", rows(catalog)) == made
    with pytest.raises(ConflictError, match="with other content is there already"):
        catalog.datasets.create(who, "rows", rows(catalog, "more"))
    job = catalog.jobs.submit(who, JobRequest(kind="evaluate", spec={}, base="nano", dataset_id=made.id))
    with pytest.raises(ConflictError, match=f"the job {job.id} needs 'rows'"):
        catalog.datasets.delete(who, "rows")
    catalog.jobs.cancel(who, job.id)
    catalog.datasets.delete(who, "rows")
    with pytest.raises(NotFoundError):
        catalog.datasets.get(who, "rows")
    assert catalog.datasets.by_id(who, made.id).deleted == NOW
    assert catalog.datasets.create(who, "rows", rows(catalog, "more")).id != made.id


def test_evaluations(catalog: Catalog, who: Actor) -> None:
    catalog.repositories.create(who, "intent")
    version = catalog.versions.add(who, "intent", content(catalog))
    one = catalog.evaluations.add(
        who, base="nano", task="banking77", metric="accuracy", n=100, score=0.9, interval=(0.85, 0.94),
        version_id=version.id, job_id="j", result={"seed": 0},
    )  # fmt: skip
    catalog.evaluations.add(who, base="nano", task="banking77", metric="accuracy", n=100, score=0.1)
    again = catalog.evaluations.add(
        who, base="nano", task="banking77", metric="accuracy", n=100, score=0.9, version_id=version.id, job_id="j"
    )
    assert again == one
    assert [each.score for each in catalog.evaluations.find(who, version_id=version.id)] == [0.9]
    assert len(catalog.evaluations.find(who, task="banking77")) == 2
    catalog.versions.delete(who, "intent", 1)
    assert [each.score for each in catalog.evaluations.find(who)] == [0.1]


def test_standings(catalog: Catalog, who: Actor, clock: Clock) -> None:
    """Of each task and metric the newest of every living version and of the base, however many there are."""
    catalog.repositories.create(who, "intent")
    versions = [catalog.versions.add(who, "intent", content(catalog)) for _ in range(3)]

    def add(score: float, version: int | None, task: str = "t", metric: str = "accuracy", by: Actor = who) -> None:
        clock.now += 1
        of = None if version is None else versions[version - 1].id
        catalog.evaluations.add(by, base="nano", task=task, metric=metric, n=9, score=score, version_id=of)

    for score, version in ((0.9, 1), (0.2, None), (0.5, 1), (0.7, 2), (0.99, 3), (0.3, None)):
        add(score, version)
    add(0.4, 2, metric="f1")
    add(0.6, 1, task="u")
    catalog.versions.delete(who, "intent", 3)

    def told(by: Actor, **fields: Any) -> list[tuple[str, str, str | None, float]]:
        found = catalog.evaluations.standings(by, **fields)
        return [(one.evaluation.task, one.evaluation.metric, one.reference, one.evaluation.score) for one in found]

    first = [("t", "accuracy", "intent/2", 0.7), ("t", "accuracy", "intent/1", 0.5), ("t", "accuracy", None, 0.3)]
    assert told(who) == [*first, ("t", "f1", "intent/2", 0.4), ("u", "accuracy", "intent/1", 0.6)]
    assert told(who, task="u") == [("u", "accuracy", "intent/1", 0.6)]
    assert told(Actor(tenant=who.tenant, repositories=frozenset())) == [first[-1]]
    assert told(Actor(tenant="another")) == []
    assert {one.bytes for one in catalog.evaluations.standings(who)} == {None, versions[0].bytes}


# --- the whole ----------------------------------------------------------------------------------------------------


def test_one_audit_row_a_change(catalog: Catalog, who: Actor) -> None:
    catalog.repositories.create(who, "intent")
    catalog.versions.add(who, "intent", content(catalog))
    catalog.versions.archive(who, "intent", 1)
    catalog.versions.archive(who, "intent", 1)  # nothing changes
    catalog.versions.archive(who, "intent", 1, archived=False)
    catalog.aliases.move(who, "intent", "production", 1)
    catalog.aliases.remove(who, "intent", "production")
    catalog.versions.delete(who, "intent", 1)
    key, secret = catalog.keys.create(who, "key")
    catalog.keys.revoke(who, key.id)
    page = catalog.audit.page(who)
    assert [one.action for one in reversed(page.items)] == [
        "repository.create", "version.create", "version.archive", "version.unarchive", "alias.move", "alias.remove",
        "version.delete", "key.create", "key.revoke",
    ]  # fmt: skip
    assert secret not in repr(page)
    assert all(one.actor == "local" and one.at == NOW for one in page.items)
    assert len(catalog.audit.page(who, limit=4).items) == 4
    assert [one.action for one in catalog.audit.page(who, subject_id=key.id).items] == ["key.revoke", "key.create"]


@pytest.mark.parametrize("bad", ["\x00", "\ud800", 2**70])
def test_values_a_database_cannot_hold(bad: object, catalog: Catalog, who: Actor) -> None:
    if isinstance(bad, str):
        if not (bad == "\x00" and catalog.database.is_sqlite):  # which holds it
            with pytest.raises(InvalidRequestError, match="cannot hold a value"):
                catalog.repositories.create(who, "intent", bad)
    else:
        with pytest.raises(InvalidRequestError, match="cannot hold a value"):
            catalog.jobs.submit(who, JobRequest(kind="train", spec={}, base="n", priority=bad))  # type: ignore[arg-type]
    assert catalog.jobs.page(who).items == []


def test_the_migrations_make_the_tables_of_the_code(catalog: Catalog) -> None:
    with catalog.database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Rows.metadata) == []


def test_a_catalog_of_newer_code_is_refused(place: Path | str, catalog: Catalog) -> None:
    run(catalog, "UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(ConfigError, match="written by a newer version"):
        open_catalog(place)


def test_what_is_no_catalog(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected sqlite:.* or postgresql:"):
        open_catalog("mysql://host/db")
    (tmp_path / "catalog.db").write_bytes(b"this is no database at all" * 100)
    with pytest.raises(UnavailableError, match="cannot be opened: file is not a database"):
        open_catalog(tmp_path / "catalog.db")
    with pytest.raises(UnavailableError) as caught:
        open_catalog("postgresql://u:hunter2@127.0.0.1:1/db")
    assert "hunter2" not in str(caught.value)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.tuples(st.sampled_from("adnkrup"), st.integers(1, 4)), max_size=12))
def test_any_order_of_changes(steps: list[tuple[str, int]], sqlite: Catalog) -> None:
    """A model in plain Python says what a bare name, the production alias and each number are."""
    who = Actor(tenant=sqlite.people.create_tenant(Actor(), f"t{len(sqlite.people.tenants())}").id)
    sqlite.repositories.create(who, "r")
    count, alive, archived, production = 0, set[int](), set[int](), None
    for step, number in steps:
        try:
            if step == "a":
                sqlite.versions.add(who, "r", content(sqlite))
                count += 1
                alive.add(count)
            elif step == "d":
                sqlite.versions.delete(who, "r", number)
                alive.remove(number)
            elif step in "nk":
                sqlite.versions.archive(who, "r", number, archived=step == "n")
                (archived.add if step == "n" else archived.discard)(number)
            elif step == "p":
                sqlite.aliases.move(who, "r", "production", number)
                production = number
            elif step == "u":
                sqlite.aliases.remove(who, "r", "production")
                production = None
        except LorikeetError as error:
            refused = number not in alive if step in "dnkp" else production is None
            assert refused or (step == "d" and production == number), error
        newest = max(alive - archived, default=None)
        expected = production if production is not None else newest
        try:
            found: int | None = sqlite.versions.resolve(who, "r").number
        except NotFoundError:
            found = None
        assert found == expected
    assert {one.number for one in sqlite.repositories.get(who, "r").versions} == alive
