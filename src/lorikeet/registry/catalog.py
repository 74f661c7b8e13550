"""The catalog: what there is, whose it is, and what was done to it.

    catalog = open_catalog(home / "catalog.db")
    catalog.repositories.create(who, "intent")
    catalog.versions.resolve(who, "intent@production")

Every method is one transaction; every change leaves one row in the audit log. Methods may be called from any thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from lorikeet.registry.aliases import Aliases
from lorikeet.registry.audit import Audit
from lorikeet.registry.database import Database, sqlite_url
from lorikeet.registry.datasets import Datasets
from lorikeet.registry.evaluations import Evaluations
from lorikeet.registry.jobs import Jobs
from lorikeet.registry.keys import Keys, People
from lorikeet.registry.ledger import Ledger
from lorikeet.registry.migration import migrate
from lorikeet.registry.repositories import Repositories
from lorikeet.registry.uploads import Uploads
from lorikeet.registry.versions import Versions


class Catalog:
    """The parts by subject, over one database."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.people = People(database)
        self.keys = Keys(database)
        self.repositories = Repositories(database)
        self.versions = Versions(database)
        self.aliases = Aliases(database)
        self.datasets = Datasets(database)
        self.jobs = Jobs(database)
        self.evaluations = Evaluations(database)
        self.uploads = Uploads(database)
        self.ledger = Ledger(database)
        self.audit = Audit(database)

    def close(self) -> None:
        self.database.close()


def open_catalog(place: Path | str, clock: Callable[[], float] = time.time) -> Catalog:
    """The catalog in a SQLite file, or behind the URL of a PostgreSQL database; made or brought up to date.

    Raises `ConfigError`, or `UnavailableError` for a database that does not answer.
    """
    if isinstance(place, Path):
        place.parent.mkdir(parents=True, exist_ok=True)
        place = sqlite_url(place.absolute())
    database = Database(place, clock)
    try:
        migrate(database)
    except BaseException:
        database.close()
        raise
    return Catalog(database)
