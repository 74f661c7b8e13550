"""The home that commands work on, whether a server runs on it or not: its flags, and opening it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lorikeet.registry.home import Home
    from lorikeet.registry.records import Actor

PANEL = "Home"


@dataclass(frozen=True, kw_only=True)
class CatalogFlags:
    """Where the catalog is."""

    home: Annotated[
        str,
        typer.Option(envvar="LORIKEET_HOME", help="Folder of catalog, blobs, jobs and caches.", rich_help_panel=PANEL),
    ] = "~/.lorikeet"
    catalog: Annotated[
        str | None,
        typer.Option(
            envvar="LORIKEET_CATALOG",
            help="postgresql:// URL; default: SQLite in the home folder.",
            rich_help_panel=PANEL,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class HomeFlags(CatalogFlags):
    """Where the files are, too."""

    blobs: Annotated[
        str | None,
        typer.Option(
            envvar="LORIKEET_BLOBS",
            help="URL of an object store, such as s3://bucket/prefix; default: the home folder.",
            rich_help_panel=PANEL,
        ),
    ] = None


@contextmanager
def opened(flags: CatalogFlags) -> Iterator[Home]:
    """Raises `ConfigError`, `UnavailableError`. What is not found says in which home it was looked for."""
    import logging

    from lorikeet.errors import NotFoundError
    from lorikeet.registry.home import open_home

    logging.getLogger("alembic").setLevel(logging.WARNING)
    blobs = flags.blobs if isinstance(flags, HomeFlags) else None
    home = open_home(Path(flags.home), catalog=flags.catalog, blobs=blobs)
    try:
        yield home
    except NotFoundError as error:
        error.hint = error.hint or f"this is the home {home.folder}; `ls` lists what it has, --home names another one"
        raise
    finally:
        home.close()


def local_actor() -> Actor:
    """Whoever can write to the home is its admin."""
    import getpass

    from lorikeet.registry.records import Actor

    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user id without an account
        user = "unknown"
    return Actor(name=f"cli:{user}")
