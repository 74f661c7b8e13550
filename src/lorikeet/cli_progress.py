"""What several commands show while they wait, and where they find an adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from lorikeet.errors import ConfigError


@contextmanager
def progress(what: str, *, sizes: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A bar on the terminal; call what it yields with (done, in all). `sizes`: these are bytes."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()) if sizes else ()
    with Progress(*columns or Progress.get_default_columns(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def adapter_folder(place: str) -> Path:
    """A folder of this machine, or what is fetched from elsewhere into the cache, with the server's own credentials.

    Raises `ConfigError` for a folder that is not there, and what fetching raises.
    """
    if "://" not in place:
        folder = Path(place)
        if not folder.is_dir():
            raise ConfigError(
                f"{folder.absolute()}: no such folder", hint="expected a PEFT folder, or such as hf://org/name"
            )
        return folder
    from lorikeet.adapters.proxy import in_environment
    from lorikeet.adapters.sources import fetch
    from lorikeet.config import SourceConfig
    from lorikeet.model.sources import cache_folder

    with progress(place, sizes=True) as report:
        config = SourceConfig(total_seconds=3600.0, use_proxy=in_environment())
        folder = fetch(place, cache_folder() / "downloads", config=config, report=report)
    typer.echo(f"{place}: {folder}", err=True)
    return folder
