"""kill -9 of `lorikeet up` while it brings a catalog of an older revision, with data, to its own tables.

After each kill all is as it was or all is done; after the last the server serves what was there.
"""

from __future__ import annotations

import random
import shutil
import signal
import sqlite3
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import httpx
import pytest
from sqlalchemy import Connection, insert, inspect, select, text
from tests.registry.postgres import MISSING, find_binaries, private_postgres
from tests.server.hosting import own_cache
from tests.server.killable import started, unused_port, wait_until_ready

from lorikeet.registry.database import Database, sqlite_url
from lorikeet.registry.migration import migrate
from lorikeet.registry.records import DEFAULT_TENANT
from lorikeet.registry.schema import JobRow, RepositoryRow, Rows, VersionRow, new_id

OLD = "0001"
REPOSITORIES, JOBS = 20, 4000  # evaluations, which a later revision gives to the repositories of what they judge
STATE = select(JobRow.id, JobRow.repository_id, JobRow.spec, JobRow.created).order_by(JobRow.id)


class Place(Protocol):
    """Where a catalog is, for as often as it is put back to what it was before."""

    environment: dict[str, str]

    def reset(self) -> None: ...
    def is_migrating(self) -> bool: ...
    def open(self) -> Database: ...


class SqlitePlace:
    def __init__(self, home: Path) -> None:
        home.mkdir()
        self.environment: dict[str, str] = {}
        self._path, self._kept = home / "catalog.db", home.parent / "old.db"
        with closing_database(sqlite_url(self._kept)) as database:
            fill(database)

    def reset(self) -> None:
        for old in self._path.parent.glob("catalog.db*"):
            old.unlink()
        shutil.copy(self._kept, self._path)

    def is_migrating(self) -> bool:
        """The write lock is taken at the beginning."""
        with closing(sqlite3.connect(self._path, timeout=0, isolation_level=None)) as connection:
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                return True
            connection.execute("ROLLBACK")
            return False

    def open(self) -> Database:
        with closing(sqlite3.connect(self._path)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return Database(sqlite_url(self._path))


class PostgresPlace:
    def __init__(self, url: str) -> None:
        self.environment = {"LORIKEET_CATALOG": url}
        self._url = url
        self._watch = Database(url)

    def reset(self) -> None:
        with self._watch.engine.begin() as connection:
            connection.execute(text("DROP SCHEMA public CASCADE; CREATE SCHEMA public"))
        with closing_database(self._url) as database:
            fill(database)

    def is_migrating(self) -> bool:
        with self._watch.engine.connect() as connection:
            locks = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted"
            return bool(connection.execute(text(locks)).scalar_one())

    def open(self) -> Database:
        deadline = time.monotonic() + 20
        while self.is_migrating():  # the server of the database ends what a dead client had begun
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return Database(self._url)

    def close(self) -> None:
        self._watch.close()


def closing_database(url: str) -> closing[Database]:
    return closing(Database(url))


def fill(database: Database) -> None:
    """The tables of the old revision, with rows."""
    migrate(database, OLD)
    owned = {"tenant_id": DEFAULT_TENANT, "created": 1.0, "created_by": "somebody"}
    homes = [
        {"id": new_id(), "name": f"r{i}", "description": "", "last_number": 1, "changed": 1.0, **owned}
        for i in range(REPOSITORIES)
    ]
    versions = [
        {"id": new_id(), "repository_id": home["id"], "number": 1, "state": "ready", "description": "",
         "manifest": "0" * 64, **owned}
        for home in homes
    ]  # fmt: skip
    jobs = [
        {"id": f"job-{i:05d}", "kind": "evaluate", "state": "completed", "stage": "", "attempts": 1, "max_attempts": 3,
         "spec": {"version": versions[i % REPOSITORIES]["id"], "n": i}, "base": "nano", "priority": 0, "memory": 0,
         "description": "", **owned}
        for i in range(JOBS)
    ]  # fmt: skip

    def write(session: Any) -> None:
        for kind, rows in ((RepositoryRow, homes), (VersionRow, versions), (JobRow, jobs)):
            session.execute(insert(kind), rows)

    database.write(write)


def revision(connection: Connection) -> str:
    return str(connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one())


def check(place: Place) -> bool:
    """All of it is old or all of it is new; whether it is new."""
    with closing(place.open()) as database, database.engine.connect() as connection:
        new = revision(connection) != OLD
        assert set(inspect(connection).get_table_names()) == {*Rows.metadata.tables, "alembic_version"}
        homes = dict(connection.execute(select(VersionRow.id, VersionRow.repository_id)).all())
        assert len(homes) == REPOSITORIES
        jobs = connection.execute(STATE).all()
        assert [one.spec["n"] for one in jobs] == list(range(JOBS))
        for one in jobs:
            assert one.repository_id == (homes[one.spec["version"]] if new else None), one
        return new


def up(home: Path, port: int) -> list[str]:
    return [sys.executable, "-m", "lorikeet", "up", "--home", str(home), "--port", str(port)]


def run_until_it_migrates(place: Place, home: Path, port: int, kill_after: float) -> float:
    """Kill the server so long after it has begun to migrate; how long it migrated, if it came to an end of that."""
    with started(up(home, port), home, place.environment) as process:
        deadline = time.monotonic() + 60
        while not place.is_migrating():
            assert process.poll() is None and time.monotonic() < deadline, "it did not migrate"
            time.sleep(0.001)
        began = time.monotonic()
        while time.monotonic() - began < kill_after and place.is_migrating():
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        return time.monotonic() - began


def kill_again_and_again(place: Place, home: Path, kills: int) -> None:
    port, whole = unused_port(), 0.3
    place.reset()
    for number in range(kills):
        lasted = run_until_it_migrates(place, home, port, random.uniform(0.0, 0.9 * whole) if number else 0.0)
        if check(place):  # the kill came too late
            assert number, "it was done as soon as it had begun"
            whole = lasted
            place.reset()
    with (
        started(up(home, port), home, place.environment) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as http,
    ):
        wait_until_ready(process, http, home)
        assert check(place)
        assert len(http.get("/api/repos").json()["items"]) == REPOSITORIES
        assert len(http.get("/api/jobs?repo=r3&limit=1000").json()["items"]) == JOBS // REPOSITORIES


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    with own_cache(tmp_path / "cache"):
        if request.param == "sqlite":
            yield SqlitePlace(tmp_path / "home")
            return
        binaries = find_binaries()
        if binaries is None:
            pytest.skip(MISSING)
        with private_postgres(binaries) as url, closing(PostgresPlace(url)) as found:
            yield found


def test_killed_while_it_migrates(place: Place, tmp_path: Path) -> None:
    kill_again_and_again(place, tmp_path / "home", 2)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_fifty_moments_while_it_migrates(place: Place, tmp_path: Path) -> None:
    kill_again_and_again(place, tmp_path / "home", 50)
