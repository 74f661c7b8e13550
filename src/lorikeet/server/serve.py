"""`lorikeet serve`: the HTTP process from start to the end of its draining."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import uvicorn
from msgspec.structs import replace
from rich.console import Console
from rich.table import Table

from lorikeet.config import PlatformConfig, ServeConfig
from lorikeet.engine.link import EngineClient
from lorikeet.errors import ConfigError
from lorikeet.model.sources import cache_folder, find_model
from lorikeet.registry.catalog import Catalog
from lorikeet.registry.records import Actor
from lorikeet.server.app import create_app
from lorikeet.server.catalogue import Catalogue, Refusal
from lorikeet.server.fetcher import Fetcher
from lorikeet.server.logs import start_logging
from lorikeet.server.models import Models, ServedModel, base_model
from lorikeet.server.platform import Platform
from lorikeet.server.registry import RegistryAdapters
from lorikeet.server.state import ServerState

log = logging.getLogger("lorikeet.server")

GOODBYE_SECONDS = 5  # for the last bytes of answers, after the engine has ended them
KEEP_ALIVE_SECONDS = 75  # longer than load balancers keep theirs (60): who closes first resets what the other just sent
LISTED = 40  # adapters that the start-up table names


class Server(uvicorn.Server):
    """Signals are `serve`'s: uvicorn's own would close the listener before the requests have ended."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def run_serve(config: ServeConfig) -> None:
    """Serve until SIGTERM or Ctrl-C, drain, return. Raises what makes serving impossible."""
    start_logging()
    asyncio.run(serve(config, listen(config.host, config.port)))


def run_up(config: ServeConfig) -> None:
    """`run_serve` with the platform. Raises `ConfigError` for a config that has none."""
    if config.platform is None:
        raise ConfigError("platform: missing; `lorikeet up` needs a home folder", param="platform")
    keep_caches_in(Path(config.platform.home).expanduser())
    run_serve(config)


def keep_caches_in(home: Path) -> None:
    """What this process and its children derive from others' files lies in `home`, unless somebody said where.

    Compiled kernels do not: they belong to the machine, and take half a minute to make.
    """
    usual = cache_folder()
    os.environ.setdefault("NUMBA_CACHE_DIR", str(usual / "numba"))
    os.environ.setdefault("LORIKEET_CACHE", str(home.absolute() / "derived"))


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, before anything slow starts. Raises `ConfigError`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sets TCP_NODELAY only where the protocol is named: without it every reply waits 40 ms for an ACK
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror}", hint="choose another --port", param="port"
        ) from None
    return listener


def make_state(config: ServeConfig, engine: EngineClient | None = None) -> ServerState:
    """Tokenizer, catalogue and the (not yet started) engine. Raises `ModelError`, `ConfigError`."""
    folder = find_model(config.engine.model)
    base = base_model(folder, base_name(config, folder))
    catalogue = Catalogue(None if config.adapters is None else Path(config.adapters), base.name)
    platform = None if config.platform is None else Platform(config.platform, config.engine.model)
    if platform is not None:
        config = _with_tenants(config, platform.catalog)
    engine = engine or EngineClient(config.engine)
    fetcher = Fetcher(config.adapter_sources, cache_folder() / "downloads", config.sources)
    models = Models(base, catalogue, engine, fetcher)
    if platform is not None:
        models.registry = RegistryAdapters(platform.home)
    return ServerState(config=config, engine=engine, models=models, platform=platform)


def _with_tenants(config: ServeConfig, catalog: Catalog) -> ServeConfig:
    """The weights of tenants by id, as the engine knows them, not by name. Raises `NotFoundError`."""
    weights = {catalog.people.tenant(name).id: weight for name, weight in config.engine.tenant_weights.items()}
    return replace(config, engine=replace(config.engine, tenant_weights=weights))


def base_name(config: ServeConfig, folder: Path) -> str:
    """The base's name in `model`: as chosen, else a hub id as it is, else the folder's own name."""
    if config.served_name:
        return config.served_name
    return folder.name if Path(config.engine.model).expanduser().is_dir() else config.engine.model


async def serve(
    config: ServeConfig,
    listener: socket.socket,
    *,
    engine: EngineClient | None = None,
    on_ready: Callable[[ServerState], None] | None = None,
    stop: asyncio.Event | None = None,
) -> None:
    """Serve on `listener` until `stop` is set or a signal comes; then drain.

    The listener answers from the start: `/health/live` is 200 and `/health/ready` 503 while the engine loads.
    """
    _allow_connections()
    state = make_state(config, engine)
    stop = stop or asyncio.Event()
    at_once = asyncio.Event()
    _handle_signals(stop, at_once)
    server = Server(
        uvicorn.Config(
            create_app(state), log_config=None, log_level="warning", access_log=False,
            timeout_graceful_shutdown=GOODBYE_SECONDS, timeout_keep_alive=KEEP_ALIVE_SECONDS, lifespan="off",
            backlog=4096,
        )
    )  # fmt: skip
    serving = asyncio.create_task(server.serve([listener]))
    leaving: asyncio.Task[None] | None = None
    try:
        if await _start_engine(state, stop):
            if state.platform is not None:
                await state.platform.start()
            await show_start(state, listener.getsockname()[1])
            if on_ready is not None:
                on_ready(state)
            await _first(stop.wait(), asyncio.shield(serving))
            log.info("draining: %d requests in flight, up to %g s", state.engine.in_flight, config.drain_seconds)
            if state.platform is not None:
                leaving = asyncio.create_task(state.platform.stop())
            await _first(state.engine.drain(config.drain_seconds), at_once.wait())
    finally:
        if state.platform is not None:
            await (leaving or state.platform.stop())
        await state.engine.stop()
        server.should_exit = True
        await serving
        await state.access.close()
        if state.platform is not None:
            state.platform.close()
        listener.close()


def _allow_connections() -> None:
    """As many open files as the system lets this process have: each connection is one, and shells allow only 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # macOS names a hard limit that it does not grant
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _start_engine(state: ServerState, stop: asyncio.Event) -> bool:
    """False when told to stop before it was ready; its error is raised."""
    starting = asyncio.create_task(state.engine.start())
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait({starting, stopped}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not starting.done():
        starting.cancel()
        await asyncio.wait({starting})
        return False
    starting.result()
    return True


async def _first(*waits: Awaitable[object]) -> None:
    """Wait for the first of several and cancel the others; shield what must live on."""
    tasks = [asyncio.ensure_future(one) for one in waits]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()


def _handle_signals(stop: asyncio.Event, at_once: asyncio.Event) -> None:
    """SIGTERM and Ctrl-C drain; a second one ends at once."""

    def handle() -> None:
        (at_once if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for one in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(RuntimeError, ValueError, NotImplementedError):  # only the main thread may
            loop.add_signal_handler(one, handle)


# --- what is printed at the start ---------------------------------------------------------------------------------


async def show_start(state: ServerState, port: int) -> None:
    """A table of what is served, and a line to try it with."""
    adapters, refusals = await state.models.listing(Actor())
    console = Console(stderr=True)
    console.print(_engine_table(state))
    if adapters or refusals:
        console.print(_adapter_table(adapters, refusals))
    host = "127.0.0.1" if state.config.host in ("0.0.0.0", "::") else state.config.host
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    model = adapters[0].name if adapters else state.models.base.name
    needs_key = await state.access.needs_key()
    key = ' -H "authorization: Bearer $LORIKEET_API_KEY"' if needs_key else ""
    console.print(f"ready at {url}{'' if state.platform is None else ', the page too'}", highlight=False)
    if state.platform is not None and not needs_key:
        console.print(
            "no key is asked for: whoever is on this machine is admin, until there is one (`lorikeet keys create "
            f"--role admin{_home_flag(state.platform.config)} NAME`)", highlight=False, soft_wrap=True, markup=False,
        )  # fmt: skip
    line = f"""curl {url}/v1/completions{key} -H 'content-type: application/json' -d '{{"model": "{model}", """
    console.print(line + """"prompt": "Hello", "max_tokens": 32}'""", highlight=False, soft_wrap=True, markup=False)


def _home_flag(config: PlatformConfig) -> str:
    """What a command on the catalog of this server needs to find it."""
    catalog = "" if config.catalog is None else " --catalog ..."  # the URL may hold a password
    return f" --home {config.home}{catalog}"


def _engine_table(state: ServerState) -> Table:
    info = state.info
    table = Table(title="Lorikeet", show_header=False)
    rows = {
        "base": f"{state.models.base.name} ({info.family}, {info.parameters / 1e6:.1f} M parameters)",
        "numbers": f"{info.dtype} on {info.device}, adapters in {info.adapter_dtype or info.dtype}"
        + ("" if state.config.engine.quantize == "none" else f", weights in {state.config.engine.quantize}"),
        "context": f"{info.max_context} tokens",
        "cache": f"{info.kv_tokens} tokens in {info.kv_bytes / 2**20:.0f} MiB",
        "adapters": f"up to {info.slab_bytes / 2**20:.0f} MiB resident",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _adapter_table(adapters: list[ServedModel], refusals: list[Refusal]) -> Table:
    table = Table("adapter", "lock", "template")
    for model in adapters[:LISTED]:
        template = model.lock.template.kind if model.lock is not None and model.lock.template is not None else "-"
        table.add_row(model.name, "locked" if model.lock is not None else "unlocked", template)
    if len(adapters) > LISTED:
        table.add_row(f"and {len(adapters) - LISTED} more", "", "")
    for refusal in refusals:
        table.add_row(f"[red]{refusal.name}[/]", "[red]not served[/]", refusal.reason)
    return table
