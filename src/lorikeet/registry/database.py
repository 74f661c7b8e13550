"""The catalog's database and its transactions: SQLite in WAL mode by default, PostgreSQL by URL.

A write takes SQLite's one write lock at its beginning, never in the middle, so it cannot find itself behind another
one; threads of this process queue for it in front of the database, other processes in its busy handler. What passes by
itself (a lock, a deadlock, a race for a unique name) is tried again as a whole transaction and reaches nobody.
"""

from __future__ import annotations

import contextlib
import random
import sqlite3
import threading
import time
from collections.abc import Callable
from functools import update_wrapper
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import msgspec
from sqlalchemy import Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, StatementError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session

from lorikeet.errors import ConfigError, InvalidRequestError, LorikeetError, UnavailableError

BUSY_SECONDS = 60.0  # how long a write waits for its turn
RACES = 3  # attempts of a write that meets another one for the same unique name
_PASSING_STATES = {"40001", "40P01", "55P03"}  # PostgreSQL: serialization failure, deadlock, lock not available
_REFUSED_VALUES = (OverflowError, UnicodeEncodeError)

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")
Self = TypeVar("Self", bound="Part")


class Database:
    """Engine and transactions. `clock` gives seconds since the epoch."""

    def __init__(self, url: str, clock: Callable[[], float] = time.time) -> None:
        self.engine = _engine(url)
        self.clock = clock
        self.is_sqlite = self.engine.dialect.name == "sqlite"
        self._writing = threading.Lock()
        self._watching = threading.Lock()
        self._watch: sqlite3.Connection | None = None

    @property
    def url(self) -> str:
        """For messages: without its password."""
        return self.engine.url.render_as_string(hide_password=True)

    def close(self) -> None:
        with self._watching:
            if self._watch is not None:
                self._watch.close()
                self._watch = None
        self.engine.dispose()

    def generation(self) -> int | None:
        """A number that is another one after every commit of whomever; None where only asking tells.

        SQLite counts the commits of all other connections for each one, so this one never writes.
        """
        if not self.is_sqlite:
            return None
        with self._watching:
            if self._watch is None:
                path = self.engine.url.database
                self._watch = sqlite3.connect(str(path), timeout=BUSY_SECONDS, check_same_thread=False)
            version: int = self._watch.execute("PRAGMA data_version").fetchone()[0]
            return version

    def read(self, work: Callable[[Session], Result]) -> Result:
        """`work` on one snapshot. Raises `UnavailableError` where the database does not answer."""
        options: dict[str, Any] = {} if self.is_sqlite else {
            "isolation_level": "REPEATABLE READ", "postgresql_readonly": True
        }  # fmt: skip
        try:
            return self._run(work, options)
        except (DBAPIError, PoolTimeoutError) as error:
            raise self._told(error) from error

    def write(self, work: Callable[[Session], Result]) -> Result:
        """`work` in one transaction, wholly done or not at all. It may run again, so it changes nothing else.

        Raises `UnavailableError` where the database does not answer, `InvalidRequestError` for values it cannot hold.
        """
        deadline = time.monotonic() + BUSY_SECONDS
        races = 0
        while True:
            try:
                with self._turn(deadline):
                    return self._run(work, {"lorikeet_write": True})
            except IntegrityError as error:
                races += 1
                if races >= RACES:
                    raise self._told(error) from error
            except (DataError, *_REFUSED_VALUES) as error:
                raise _refused(error) from error
            except StatementError as error:
                if isinstance(error.orig, _REFUSED_VALUES):
                    raise _refused(error.orig) from error
                if not _is_passing(error) or time.monotonic() > deadline:
                    raise self._told(error) from error
            except PoolTimeoutError as error:
                raise self._told(error) from error
            time.sleep(random.uniform(0.001, 0.02))

    @contextlib.contextmanager
    def _turn(self, deadline: float) -> Any:
        """Of the threads of this process one writes to SQLite at a time."""
        if not self.is_sqlite:
            yield
        elif not self._writing.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise UnavailableError("the catalog is busy with other changes", hint="try again", retry_after=1.0)
        else:
            try:
                yield
            finally:
                self._writing.release()

    def _run(self, work: Callable[[Session], Result], options: dict[str, Any]) -> Result:
        with self.engine.connect() as connection:
            connection = connection.execution_options(**options)
            with Session(connection, expire_on_commit=False) as session, session.begin():
                return work(session)

    def _told(self, error: Exception) -> LorikeetError:
        """Without the statement and its values, which may be secret."""
        reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        said = f"the catalog at {self.url} does not answer: {reason}"
        return UnavailableError(said, hint="try again", retry_after=1.0)


class Part:
    """A subject of the catalog. Methods marked `query` and `change` are each one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @property
    def _now(self) -> float:
        return self._database.clock()


def query(
    method: Callable[Concatenate[Self, Session, Arguments], Result],
) -> Callable[Concatenate[Self, Arguments], Result]:
    """A method that reads: its callers leave out the session."""

    def run(self: Self, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        return self._database.read(lambda session: method(self, session, *args, **kwargs))

    return update_wrapper(run, method)


def change(
    method: Callable[Concatenate[Self, Session, Arguments], Result],
) -> Callable[Concatenate[Self, Arguments], Result]:
    """A method that writes, in one transaction: its callers leave out the session."""

    def run(self: Self, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        return self._database.write(lambda session: method(self, session, *args, **kwargs))

    return update_wrapper(run, method)


# --- engines ------------------------------------------------------------------------------------------------------


def sqlite_url(path: Path) -> str:
    return f"sqlite:///{path}"


def _engine(url: str) -> Engine:
    scheme, mark, rest = url.partition("://")
    if not mark or scheme.partition("+")[0] not in ("sqlite", "postgresql", "postgres"):
        expected = "expected sqlite:////path/to/catalog.db or postgresql://user@host/database"
        raise ConfigError(f"catalog: found a URL that begins with {scheme[:20]!r}; {expected}", param="catalog")
    json: dict[str, Any] = {"json_serializer": _to_json, "json_deserializer": msgspec.json.decode}
    if scheme.startswith("sqlite"):
        engine = create_engine(
            url, pool_size=8, max_overflow=24, pool_timeout=BUSY_SECONDS,
            connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False}, **json,
        )  # fmt: skip
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    try:
        return create_engine(
            make_url(f"postgresql+psycopg://{rest}"), pool_size=8, max_overflow=24, pool_timeout=BUSY_SECONDS,
            pool_pre_ping=True, connect_args={"connect_timeout": 10}, **json,
        )  # fmt: skip
    except ImportError:
        raise ConfigError(
            "a catalog in PostgreSQL needs psycopg", hint="pip install 'lorikeet-llm[postgres]'", param="catalog"
        ) from None


def _to_json(value: object) -> str:
    """NaN and infinities become null: JSON has neither."""
    return msgspec.json.encode(value).decode()


def _prepare_sqlite(connection: Any, _: object) -> None:
    connection.isolation_level = None  # begin and commit are SQLAlchemy's, see `_begin_sqlite`
    for pragma in ("foreign_keys=ON", "synchronous=FULL", "journal_size_limit=67108864"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    write = connection.get_execution_options().get("lorikeet_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def is_busy(error: BaseException) -> bool:
    """Whether SQLite says that somebody else holds a lock."""
    said = str(getattr(error, "orig", error))
    return "database is locked" in said or "database table is locked" in said or "database schema is locked" in said


def _is_passing(error: StatementError) -> bool:
    return is_busy(error) or getattr(error.orig, "sqlstate", None) in _PASSING_STATES


def _refused(error: BaseException) -> InvalidRequestError:
    reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
    return InvalidRequestError(
        f"the catalog cannot hold a value: {reason}", hint="text is UTF-8 without NUL, whole numbers have 64 bits"
    )
