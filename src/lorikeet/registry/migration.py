"""Brings the database to the tables of this code, in one transaction: a killed migration leaves no trace.

Whoever comes first holds the lock (SQLite's write lock, an advisory lock of PostgreSQL); others wait and find it done.
"""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from lorikeet.errors import ConfigError, UnavailableError
from lorikeet.registry.database import BUSY_SECONDS, Database, is_busy

_SCRIPTS = Path(__file__).parent / "migrations"
_LOCK = 0x6C6F72696B656574  # any number that is the same in all processes


def migrate(database: Database, target: str = "head") -> None:
    """Apply what is missing up to the revision `target`. Raises `ConfigError` for a catalog of newer code."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            if database.is_sqlite:
                _use_wal(database)
            if target == "head" and _is_current(database):
                return
            with database.engine.connect().execution_options(lorikeet_write=True) as connection, connection.begin():
                if not database.is_sqlite:
                    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
                _upgrade(connection, target)
            return
        except CommandError as error:
            raise ConfigError(
                f"the catalog at {database.url} was written by a newer version of Lorikeet: {error}",
                hint="install that version, or use another --home",
                param="catalog",
            ) from error
        except (DBAPIError, sqlite3.Error) as error:  # those of new connections come as they are
            if not is_busy(error) or time.monotonic() > deadline:
                reason = str(getattr(error, "orig", error)).strip().splitlines()[0]
                raise UnavailableError(f"the catalog at {database.url} cannot be opened: {reason}") from error
        time.sleep(0.02)


def _use_wal(database: Database) -> None:
    """The mode stays with the file. Switching needs the file alone, and SQLite does not wait for that by itself."""
    connection = database.engine.raw_connection()
    try:
        cursor = connection.cursor()
        mode = cursor.execute("PRAGMA journal_mode=WAL").fetchone()
        cursor.close()
    finally:
        connection.close()
    if mode is None or mode[0] not in ("wal", "memory"):
        raise ConfigError(
            f"{database.url} cannot be used in WAL mode, its file system does not share memory",
            hint="put the home on a local disk, or use PostgreSQL",
            param="catalog",
        )


def _is_current(database: Database) -> bool:
    with database.engine.connect() as connection:
        return MigrationContext.configure(connection).get_current_revision() == _scripts().get_current_head()


def _upgrade(connection: Connection, target: str) -> None:
    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, target)


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(_SCRIPTS).replace("%", "%%"))
    return config


def _scripts() -> ScriptDirectory:
    return ScriptDirectory.from_config(_config())
