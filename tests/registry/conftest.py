"""Catalogs in both databases, empty ones for each test."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from tests.registry.postgres import MISSING, find_binaries, private_postgres

from lorikeet.registry.catalog import Catalog, open_catalog
from lorikeet.registry.database import Database
from lorikeet.registry.migration import migrate
from lorikeet.registry.records import Actor

NOW = 1_800_000_000.0
MakeUrl = Callable[[], str]


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="session")
def postgres() -> Iterator[MakeUrl]:
    """Makes databases with the catalog's tables: copies of one that was migrated."""
    binaries = find_binaries()
    if binaries is None:
        pytest.skip(MISSING)
    with private_postgres(binaries) as url:
        admin = create_engine(url.replace("postgresql://", "postgresql+psycopg://"), isolation_level="AUTOCOMMIT")
        with admin.connect() as connection:
            connection.execute(text("CREATE DATABASE migrated"))
        template = Database(url.replace("/postgres?", "/migrated?"))
        migrate(template)
        template.close()
        count = itertools.count()

        def make() -> str:
            name = f"test_{next(count)}"
            with admin.connect() as connection:
                connection.execute(text(f"CREATE DATABASE {name} TEMPLATE migrated"))
            return url.replace("/postgres?", f"/{name}?")

        yield make
        admin.dispose()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path | str:
    """Where an empty catalog may be."""
    if request.param == "sqlite":
        return tmp_path / "catalog.db"
    make: MakeUrl = request.getfixturevalue("postgres")
    return make()


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
