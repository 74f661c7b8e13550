"""Many clients at once, processes beside each other, and how the database is asked."""

from __future__ import annotations

import multiprocessing
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import event, insert, text
from sqlalchemy.orm import Session
from tests.registry.conftest import NOW
from tests.registry.contents import content

from lorikeet.errors import ConflictError, UnavailableError
from lorikeet.registry import database as database_module
from lorikeet.registry.catalog import Catalog, open_catalog
from lorikeet.registry.records import DEFAULT_TENANT, Actor, JobRequest
from lorikeet.registry.schema import RepositoryRow, VersionRow, new_id

CLIENTS = 200


def all_at_once(count: int, work: Callable[[int], object]) -> None:
    """`work(0)` ... in as many threads, which begin together. Their first error is raised."""
    start = threading.Barrier(count)

    def run(number: int) -> None:
        start.wait(60)
        work(number)

    with ThreadPoolExecutor(count) as pool:
        for done in [pool.submit(run, number) for number in range(count)]:
            done.result(120)


def test_200_clients(catalog: Catalog, who: Actor) -> None:
    """Each adds a version to a shared repository, moves its alias, and reads."""
    filled = content(catalog)
    catalog.repositories.create(who, "shared")
    for _ in range(2):
        catalog.versions.add(who, "shared", filled)

    def client(number: int) -> None:
        catalog.versions.add(who, "shared", filled)
        catalog.aliases.move(who, "shared", "production", number % 2 + 1)
        assert catalog.versions.resolve(who, "shared").number in (1, 2)
        catalog.repositories.page(who, limit=5)

    all_at_once(CLIENTS, client)
    numbers = [one.number for one in catalog.repositories.get(who, "shared").versions]
    assert numbers == list(range(1, CLIENTS + 3))
    moves = catalog.aliases.history(who, "shared", "production")
    assert all(move.previous == before.number for move, before in zip(moves, moves[1:], strict=False))


def test_of_many_creates_of_one_name_one_wins(catalog: Catalog, who: Actor) -> None:
    won: list[int] = []

    def create(number: int) -> None:
        try:
            catalog.repositories.create(who, "contested")
        except ConflictError:
            return
        won.append(number)

    all_at_once(20, create)
    assert len(won) == 1
    all_at_once(20, lambda _: catalog.repositories.create(who, "other", exists_ok=True))
    request = JobRequest(kind="train", spec={}, base="nano", repository="other")
    all_at_once(20, lambda _: catalog.jobs.submit(who, request, idempotency_key="k"))
    assert [one.number for one in catalog.repositories.get(who, "other").versions] == [1]


def _write_many(place: Path | str, name: str, count: int) -> None:
    catalog = open_catalog(place)
    for number in range(count):
        catalog.repositories.create(Actor(), f"{name}-{number}")
    catalog.close()


def test_processes_beside_each_other(nowhere: Path | str) -> None:
    """They open the catalog at once, too: one of them migrates it."""
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_write_many, args=(nowhere, f"p{number}", 10)) for number in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 2
    catalog = open_catalog(nowhere)
    assert catalog.repositories.count(Actor()) == 20
    catalog.close()


def test_a_lock_that_is_held_for_long(
    sqlite: Catalog, who: Actor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = sqlite3.connect(tmp_path / "catalog.db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    monkeypatch.setattr(database_module, "BUSY_SECONDS", 0.3)
    hasty = open_catalog(tmp_path / "catalog.db")
    with pytest.raises(UnavailableError, match="database is locked") as caught:
        hasty.repositories.create(who, "x")
    assert caught.value.retryable
    assert hasty.repositories.page(who).items == []  # reading waits for nobody
    hasty.close()
    done = threading.Thread(target=lambda: sqlite.repositories.create(who, "y"))
    done.start()
    holder.execute("COMMIT")
    holder.close()
    done.join(30)
    assert [one.name for one in sqlite.repositories.page(who).items] == ["y"]


def test_a_generation_is_another_after_every_change(sqlite: Catalog, who: Actor, tmp_path: Path) -> None:
    first = sqlite.database.generation()
    assert sqlite.database.generation() == first
    sqlite.repositories.create(who, "a")
    second = sqlite.database.generation()
    assert second != first
    other = open_catalog(tmp_path / "catalog.db")
    other.repositories.create(who, "b")
    other.close()
    assert sqlite.database.generation() not in (first, second)


# --- 10,000 repositories of 5 versions ----------------------------------------------------------------------------


@pytest.fixture
def large(catalog: Catalog) -> Catalog:
    def fill(session: Session) -> None:
        homes = [
            {"id": new_id(), "tenant_id": DEFAULT_TENANT, "name": f"repository-{number:05d}", "description": "",
             "last_number": 5, "created": NOW, "created_by": "test", "changed": NOW}
            for number in range(10_000)
        ]  # fmt: skip
        session.execute(insert(RepositoryRow), homes)
        versions = [
            {"id": new_id(), "tenant_id": DEFAULT_TENANT, "repository_id": home["id"], "number": number,
             "state": "ready", "description": "", "manifest": "0" * 64, "created": NOW, "created_by": "test"}
            for home in homes for number in range(1, 6)
        ]  # fmt: skip
        session.execute(insert(VersionRow), versions)
        session.execute(text("ANALYZE"))

    catalog.database.write(fill)
    return catalog


@contextmanager
def statements(catalog: Catalog) -> Iterator[list[tuple[str, object]]]:
    seen: list[tuple[str, object]] = []

    def note(connection: object, cursor: object, statement: str, parameters: object, *_: object) -> None:
        if not statement.startswith("BEGIN"):
            seen.append((statement, parameters))

    event.listen(catalog.database.engine, "before_cursor_execute", note)
    yield seen
    event.remove(catalog.database.engine, "before_cursor_execute", note)


@pytest.mark.slow
def test_a_page_of_many_repositories_reads_few_rows(large: Catalog, who: Actor) -> None:
    """Three statements whatever there is, each by an index; benchmarks/registry.py has the times."""
    with statements(large) as seen:
        page = large.repositories.page(who, after="repository-04999", limit=50)
    assert [one.name for one in page.items][::49] == ["repository-05000", "repository-05049"]
    assert all([version.number for version in one.versions] == [1, 2, 3, 4, 5] for one in page.items)
    assert len(seen) == 3
    assert len(large.versions.current(who, limit=1000)) == 1000
    explain = "EXPLAIN QUERY PLAN " if large.database.is_sqlite else "EXPLAIN "
    with large.database.engine.connect() as connection:
        for statement, parameters in seen:
            plan = repr(connection.exec_driver_sql(explain + statement, parameters).all())  # type: ignore[arg-type]
            assert "SCAN repositories" not in plan and "Seq Scan on repositories" not in plan, plan
            assert "SCAN versions" not in plan and "Seq Scan on versions" not in plan, plan
