"""`lorikeet up`: everything in one process, below one home folder."""

from __future__ import annotations

from typing import Annotated

import typer

from lorikeet.cli_flags import HTTP, EngineFlags, HttpFlags, SourceFlags, TenantFlags, size, with_flags
from lorikeet.cli_home import HomeFlags

EPILOG = (
    "[bold]Examples[/]\n\nlorikeet up\n\n"
    "lorikeet up --home /srv/lorikeet --model ./Qwen2.5-0.5B --job-memory 8GiB\n\n"
    "lorikeet up --catalog postgresql://lorikeet@db/lorikeet --blobs s3://bucket/lorikeet"
)
JOBS = "Jobs"


@with_flags
def up(
    job_concurrency: Annotated[
        int, typer.Option(help="Training and evaluation processes at once.", min=1, rich_help_panel=JOBS)
    ] = 1,
    job_memory: Annotated[
        str | None,
        typer.Option(
            help="Memory of all jobs that run, such as 8GiB; default: half of the machine's.", rich_help_panel=JOBS
        ),
    ] = None,
    job_threads: Annotated[
        int | None,
        typer.Option(help="CPU threads of a job; default: all cores, at a low priority.", min=1, rich_help_panel=JOBS),
    ] = None,
    join: Annotated[
        int,
        typer.Option(help="Queued trainings that may run as one joint run; 1: none.", min=1, rich_help_panel=JOBS),
    ] = 8,
    max_upload: Annotated[str, typer.Option(help="Largest upload.", rich_help_panel=HTTP)] = "2GiB",
    *,
    home: HomeFlags,
    engine: EngineFlags,
    tenants: TenantFlags,
    sources: SourceFlags,
    http: HttpFlags,
) -> None:
    """Serve one base, and keep, train, judge and promote its adapters: catalog, jobs, keys and the page."""
    from lorikeet.config import PlatformConfig, parse_size
    from lorikeet.server.serve import run_up

    platform = PlatformConfig(
        home=home.home,
        catalog=home.catalog,
        blobs=home.blobs,
        job_concurrency=job_concurrency,
        job_memory=size(job_memory, "--job-memory"),
        job_threads=job_threads,
        join=join,
        max_upload=parse_size(max_upload, "--max-upload"),
    )
    run_up(http.serving(engine.engine(**tenants.of_engine()), sources, platform=platform))
