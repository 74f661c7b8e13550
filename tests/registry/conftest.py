"""Catalogs in both databases, empty ones for each test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import insert, text
from tests.registry.postgres import MISSING, find_binaries, private_postgres

from lorikeet.registry.catalog import Catalog, open_catalog
from lorikeet.registry.database import Database
from lorikeet.registry.migration import migrate
from lorikeet.registry.records import DEFAULT_TENANT, Actor
from lorikeet.registry.schema import Rows, TenantRow

NOW = 1_800_000_000.0
Reset = Callable[..., str]


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="session")
def postgres() -> Iterator[Reset]:
    """Empties the catalog of the one database of a private server, and gives its URL."""
    binaries = find_binaries()
    if binaries is None:
        pytest.skip(MISSING)
    with private_postgres(binaries) as url:
        migrated = Database(url)
        migrate(migrated)
        head = "SELECT version_num FROM alembic_version"
        with migrated.engine.connect() as connection:
            version = connection.execute(text(head)).scalar_one()
        tables = ", ".join(f'"{name}"' for name in Rows.metadata.tables)

        def reset(*, tables_too: bool = False) -> str:
            with migrated.engine.begin() as connection:
                if tables_too:
                    connection.execute(text("DROP SCHEMA public CASCADE; CREATE SCHEMA public"))
                else:
                    connection.execute(text(f"TRUNCATE {tables} RESTART IDENTITY CASCADE"))
                    connection.execute(insert(TenantRow).values(id=DEFAULT_TENANT, name="default", created=NOW))
                    connection.execute(text(f"UPDATE alembic_version SET version_num = '{version}'"))
            return url

        yield reset
        migrated.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path | str:
    """Where an empty catalog may be."""
    if request.param == "sqlite":
        return tmp_path / "catalog.db"
    reset: Reset = request.getfixturevalue("postgres")
    return reset()


@pytest.fixture(params=["sqlite", "postgresql"])
def nowhere(request: pytest.FixtureRequest, tmp_path: Path) -> Path | str:
    """Where there is no catalog yet."""
    if request.param == "sqlite":
        return tmp_path / "catalog.db"
    reset: Reset = request.getfixturevalue("postgres")
    return reset(tables_too=True)


@pytest.fixture
def catalog(place: Path | str, clock: Clock) -> Iterator[Catalog]:
    catalog = open_catalog(place, clock)
    yield catalog
    catalog.close()


@pytest.fixture
def sqlite(tmp_path: Path, clock: Clock) -> Iterator[Catalog]:
    catalog = open_catalog(tmp_path / "catalog.db", clock)
    yield catalog
    catalog.close()


@pytest.fixture
def who() -> Actor:
    return Actor()


@pytest.fixture
def other(catalog: Catalog) -> Actor:
    """An admin of another tenant."""
    tenant = catalog.people.create_tenant(Actor(), "other")
    return Actor(tenant=tenant.id, name="stranger")
