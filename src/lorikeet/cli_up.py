"""`lorikeet up`: everything in one process, below one home folder."""

from __future__ import annotations

import math
from typing import Annotated

import typer

from lorikeet.cli_flags import one_of
from lorikeet.errors import ConfigError

EPILOG = (
    "[bold]Examples[/]\n\nlorikeet up\n\n"
    "lorikeet up --home /srv/lorikeet --model ./Qwen2.5-0.5B --job-memory 8GiB\n\n"
    "lorikeet up --catalog postgresql://lorikeet@db/lorikeet --blobs s3://bucket/lorikeet"
)


def up(
    home: Annotated[
        str, typer.Option(envvar="LORIKEET_HOME", help="Catalog, blobs, jobs and caches go below this folder.")
    ] = "~/.lorikeet",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = 8000,
    model: Annotated[
        str, typer.Option(help="Folder or hub id of the base; without it the embedded base.")
    ] = "lorikeet-nano",
    device: Annotated[str, typer.Option(help="auto | cpu | cuda")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto | float32 | bfloat16, as for serve.")] = "auto",
    quantize: Annotated[str, typer.Option(help="none | int8, as for serve.")] = "none",
    adapter_memory: Annotated[str | None, typer.Option(help="Budget of resident adapters, such as 512MiB.")] = None,
    kv_memory: Annotated[str | None, typer.Option(help="Budget of keys and values, such as 2GiB.")] = None,
    max_seqs: Annotated[int, typer.Option(help="Sequences that run at once.", min=1)] = 64,
    max_context: Annotated[int | None, typer.Option(help="Longest prompt + answer; default: the model's.")] = None,
    queue: Annotated[int, typer.Option(help="Requests that may wait.", min=1)] = 1024,
    threads: Annotated[int | None, typer.Option(help="CPU threads of the engine; default: all cores.", min=1)] = None,
    drain_seconds: Annotated[float, typer.Option(help="After SIGTERM, how long running requests may take.")] = 30.0,
    catalog: Annotated[
        str | None,
        typer.Option(envvar="LORIKEET_CATALOG", help="postgresql:// URL; default: SQLite in the home folder."),
    ] = None,
    blobs: Annotated[
        str | None, typer.Option(help="URL of an object store, such as s3://bucket/prefix; default: the home folder.")
    ] = None,
    adapter_sources: Annotated[
        str, typer.Option(help="Where adapters may be fetched from, such as hf,s3,https; default: none.")
    ] = "",
    job_concurrency: Annotated[int, typer.Option(help="Training and evaluation processes at once.", min=1)] = 1,
    job_memory: Annotated[
        str | None, typer.Option(help="Memory of all jobs that run, such as 8GiB; default: half of the machine's.")
    ] = None,
    job_threads: Annotated[
        int | None, typer.Option(help="CPU threads of a job; default: all cores, at a low priority.", min=1)
    ] = None,
    join: Annotated[int, typer.Option(help="Queued trainings that may run as one joint run; 1: none.", min=1)] = 8,
    max_upload: Annotated[str, typer.Option(help="Largest upload.")] = "2GiB",
    tenant_queue: Annotated[
        int | None, typer.Option(help="Requests of one tenant that may wait; default: as many as --queue.", min=1)
    ] = None,
    tenant_weight: Annotated[
        list[str] | None, typer.Option(help="A tenant's share under contention, such as acme=2; default: 1.")
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="A site whose pages may use the server, such as https://app.example.com.")
    ] = None,
    allowed_host: Annotated[
        list[str] | None, typer.Option(help="A name by which a server on loopback without a key may be reached.")
    ] = None,
) -> None:
    """Serve one base, and keep, train, judge and promote its adapters: catalog, jobs, keys and the page."""
    from lorikeet.config import EngineConfig, PlatformConfig, ServeConfig, parse_size
    from lorikeet.server.serve import run_up

    def size(text: str | None, flag: str) -> int | None:
        return None if text is None else parse_size(text, flag)

    engine = EngineConfig(
        model=model,
        device=one_of(device, "--device", "auto", "cpu", "cuda"),
        dtype=one_of(dtype, "--dtype", "auto", "float32", "bfloat16"),
        quantize=one_of(quantize, "--quantize", "none", "int8"),
        adapter_memory=size(adapter_memory, "--adapter-memory"),
        kv_memory=size(kv_memory, "--kv-memory"),
        max_seqs=max_seqs,
        max_context=max_context,
        queue=queue,
        tenant_queue=tenant_queue,
        tenant_weights=dict(_weight(one) for one in tenant_weight or ()),
        threads=threads,
    )
    platform = PlatformConfig(
        home=home,
        catalog=catalog,
        blobs=blobs,
        job_concurrency=job_concurrency,
        job_memory=size(job_memory, "--job-memory"),
        job_threads=job_threads,
        join=join,
        max_upload=parse_size(max_upload, "--max-upload"),
    )
    kinds = [kind for kind in adapter_sources.split(",") if kind]
    run_up(
        ServeConfig(
            engine=engine,
            adapter_sources=tuple(one_of(kind, "--adapter-sources", "hf", "s3", "gs", "az", "https") for kind in kinds),
            host=host,
            port=port,
            drain_seconds=drain_seconds,
            cors_origins=tuple(cors_origin or ()),
            allowed_hosts=tuple(allowed_host or ()),
            platform=platform,
        )
    )


def _weight(text: str) -> tuple[str, float]:
    """`acme=2` as a name and a number above 0. Raises `ConfigError`."""
    name, _, number = text.partition("=")
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not name or not 0 < weight < math.inf:
        raise ConfigError(f"--tenant-weight: found {text!r}; expected such as acme=2", param="--tenant-weight")
    return name, weight
