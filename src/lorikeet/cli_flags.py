"""Flags that several commands have, each written once: a class is a group of flags, a field is a flag.

A command takes a group as one parameter and is given its flags by `with_flags`. A new flag of the engine is a field
here, named as the field of `EngineConfig` that it sets, and nothing else: `lorikeet serve` and `lorikeet up` have it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from inspect import Parameter, Signature, signature
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from lorikeet.errors import ConfigError

if TYPE_CHECKING:
    from lorikeet.config import EngineConfig, ServeConfig, SourceConfig

# panels of --help
ENGINE, ADAPTERS, QUEUE, SOURCES, HTTP = "Engine", "Adapters", "Waiting requests", "Adapters from elsewhere", "HTTP"
KINDS = ("hf", "s3", "gs", "az", "https")


def with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with the flags of each group among its parameters in place of the group."""
    groups: dict[str, Any] = {}
    parameters: list[Parameter] = []
    hints = get_type_hints(command, include_extras=True)
    for name, own in signature(command).parameters.items():
        kind = hints[name]
        if isinstance(kind, type) and is_dataclass(kind):
            groups[name] = kind
            parameters += _parameters(kind)
        else:
            parameters.append(own.replace(annotation=kind, kind=Parameter.KEYWORD_ONLY))

    def flat(**given: Any) -> None:
        made = {name: kind(**{one.name: given.pop(one.name) for one in fields(kind)}) for name, kind in groups.items()}
        command(**made, **given)

    flat.__name__, flat.__doc__ = command.__name__, command.__doc__
    flat.__annotations__ = {one.name: one.annotation for one in parameters}
    flat.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return flat


def _parameters(group: type[Any]) -> list[Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        Parameter(
            field.name,
            Parameter.KEYWORD_ONLY,
            annotation=hints[field.name],
            default=Parameter.empty if field.default is MISSING else field.default,
        )
        for field in fields(group)
    ]


# --- groups -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StepFlags:
    """What a step of the engine is made of: `lorikeet bench` measures those."""

    model: Annotated[
        str,
        typer.Option(help="Folder or hub id of the base; without it the embedded base.", rich_help_panel=ENGINE),
    ] = "lorikeet-nano"
    device: Annotated[str, typer.Option(help="cpu | cuda; auto is the CPU for now.", rich_help_panel=ENGINE)] = "auto"
    dtype: Annotated[
        str,
        typer.Option(
            help="auto | float32 | bfloat16; auto is bf16 where the device has it natively.", rich_help_panel=ENGINE
        ),
    ] = "auto"
    quantize: Annotated[
        str,
        typer.Option(
            help="none | int8 | int4 | nf4 (on a GPU) | fp8 (on a GPU): hold the base's linear layers in half or, in "
            "four bits, a good quarter of bf16's bytes.",
            rich_help_panel=ENGINE,
        ),
    ] = "none"
    kv_cache_dtype: Annotated[
        str,
        typer.Option(
            help="auto (as --dtype) | fp8 (on a GPU): keys and values in half the bytes of bf16.",
            rich_help_panel=ENGINE,
        ),
    ] = "auto"
    threads: Annotated[
        int | None,
        typer.Option(help="CPU threads of the engine; default: all cores.", min=1, rich_help_panel=ENGINE),
    ] = None
    max_seqs: Annotated[int, typer.Option(help="Sequences that run at once.", min=1, rich_help_panel=ENGINE)] = 64
    step_tokens: Annotated[
        int, typer.Option(help="Tokens of one step; long prompts run in chunks.", min=16, rich_help_panel=ENGINE)
    ] = 1024

    def engine(self, **more: Any) -> EngineConfig:
        """The engine that these flags ask for; `more` are fields that they do not set. Raises `ConfigError`."""
        from lorikeet.config import EngineConfig

        return EngineConfig(**_read(self), **more)


@dataclass(frozen=True, kw_only=True)
class EngineFlags(StepFlags):
    """The engine behind a server."""

    max_context: Annotated[
        int | None,
        typer.Option(help="Longest prompt + answer; default: the model's.", min=1, rich_help_panel=ENGINE),
    ] = None
    tensor_parallel: Annotated[
        int,
        typer.Option(
            help="GPUs that hold the base together: 1, 2, 4 or 8. Budgets of memory are of each.",
            min=1,
            rich_help_panel=ENGINE,
        ),
    ] = 1
    kv_memory: Annotated[
        str | None, typer.Option(help="Budget of keys and values, such as 2GiB.", rich_help_panel=ENGINE)
    ] = None
    chunk_tokens: Annotated[
        int | None,
        typer.Option(
            help="Prompt tokens in a step beside running streams: few keep the streams even, many bring first tokens "
            "sooner. Default: 12 to 24, or half as many as streams; all, once more than two requests wait for each.",
            min=1,
            rich_help_panel=ENGINE,
        ),
    ] = None
    adapter_dtype: Annotated[
        str, typer.Option(help="auto (as --dtype) | float32 | bfloat16", rich_help_panel=ADAPTERS)
    ] = "auto"
    adapter_memory: Annotated[
        str | None, typer.Option(help="Budget of resident adapters, such as 512MiB.", rich_help_panel=ADAPTERS)
    ] = None
    adapter_host_memory: Annotated[
        str | None, typer.Option(help="Budget of pinned host copies; only with a GPU.", rich_help_panel=ADAPTERS)
    ] = None
    adapter_disk: Annotated[
        str | None, typer.Option(help="Budget of compiled adapters on disk.", rich_help_panel=ADAPTERS)
    ] = None
    allow_lock_mismatch: Annotated[
        bool,
        typer.Option(
            "--allow-lock-mismatch",
            help="Serve adapters made for another base or tokenizer.",
            rich_help_panel=ADAPTERS,
        ),
    ] = False
    queue: Annotated[
        int,
        typer.Option(
            help="Requests that may wait; of more, those of who has most get a 429.", min=1, rich_help_panel=QUEUE
        ),
    ] = 1024
    fair: Annotated[
        bool,
        typer.Option(
            help="Adapters take turns by the tokens they were served; else first come, first served.",
            rich_help_panel=QUEUE,
        ),
    ] = True


@dataclass(frozen=True, kw_only=True)
class TenantFlags:
    """How tenants share the engine. Where there is one tenant there is nothing to say."""

    tenant_queue: Annotated[
        int | None,
        typer.Option(
            help="Requests of one tenant that may wait; default: as many as --queue.", min=1, rich_help_panel=QUEUE
        ),
    ] = None
    tenant_weight: Annotated[
        list[str] | None,
        typer.Option(help="A tenant's share under contention, such as acme=2; default: 1.", rich_help_panel=QUEUE),
    ] = None

    def of_engine(self) -> dict[str, Any]:
        """Fields of `EngineConfig`. Raises `ConfigError`."""
        weights = dict(_weight(one) for one in self.tenant_weight or ())
        return {"tenant_queue": self.tenant_queue, "tenant_weights": weights}


@dataclass(frozen=True, kw_only=True)
class SourceFlags:
    """From where requests may fetch adapters, and how."""

    adapter_sources: Annotated[
        str,
        typer.Option(
            help="Where requests may fetch adapters from, such as hf,s3,https; also gs and az. Default: none.",
            rich_help_panel=SOURCES,
        ),
    ] = ""
    allow_private_sources: Annotated[
        bool,
        typer.Option(
            "--allow-private-sources",
            help="Fetch from private addresses and over http, too.",
            rich_help_panel=SOURCES,
        ),
    ] = False
    source_proxy: Annotated[
        bool,
        typer.Option(
            "--source-proxy",
            help="Fetch from the hub and https through the proxy of HTTPS_PROXY, but for hosts in NO_PROXY.",
            rich_help_panel=SOURCES,
        ),
    ] = False
    s3_endpoint: Annotated[
        str | None, typer.Option(help="URL of an S3-compatible store; default: AWS.", rich_help_panel=SOURCES)
    ] = None
    max_adapter_bytes: Annotated[
        str, typer.Option(help="Largest adapter that is fetched.", rich_help_panel=SOURCES)
    ] = "4GiB"
    download_disk: Annotated[str, typer.Option(help="Budget of fetched adapters on disk.", rich_help_panel=SOURCES)] = (
        "20GiB"
    )
    fetch_seconds: Annotated[
        float, typer.Option(help="How long a request waits for its adapter.", min=1, rich_help_panel=SOURCES)
    ] = 120.0

    def kinds(self) -> tuple[Any, ...]:
        """Raises `ConfigError`."""
        named = [kind.strip() for kind in self.adapter_sources.split(",")]
        return tuple(one_of(kind, "--adapter-sources", *KINDS) for kind in named if kind)

    def sources(self) -> SourceConfig:
        """Raises `ConfigError`."""
        from lorikeet.config import SourceConfig, parse_size

        return SourceConfig(
            allow_private=self.allow_private_sources,
            use_proxy=self.source_proxy,
            s3_endpoint=self.s3_endpoint,
            max_bytes=parse_size(self.max_adapter_bytes, "--max-adapter-bytes"),
            cache_bytes=parse_size(self.download_disk, "--download-disk"),
            total_seconds=self.fetch_seconds,
        )


@dataclass(frozen=True, kw_only=True)
class HttpFlags:
    """The door of a server."""

    host: Annotated[str, typer.Option(help="Address to listen on.", rich_help_panel=HTTP)] = "127.0.0.1"
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535, rich_help_panel=HTTP)] = 8000
    drain_seconds: Annotated[
        float,
        typer.Option(help="After SIGTERM, how long running requests may take.", min=0, rich_help_panel=HTTP),
    ] = 30.0
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="A site whose pages may use the server, such as https://app.example.com.", rich_help_panel=HTTP
        ),
    ] = None
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(help="A name by which a server on loopback without a key may be reached.", rich_help_panel=HTTP),
    ] = None

    def serving(self, engine: EngineConfig, fetching: SourceFlags, **more: Any) -> ServeConfig:
        """A server of that engine; `more` are fields of the command's own. Raises `ConfigError`."""
        from lorikeet.config import ServeConfig

        return ServeConfig(
            engine=engine,
            adapter_sources=fetching.kinds(),
            sources=fetching.sources(),
            host=self.host,
            port=self.port,
            drain_seconds=self.drain_seconds,
            cors_origins=tuple(self.cors_origin or ()),
            allowed_hosts=tuple(self.allowed_host or ()),
            **more,
        )


# --- values -------------------------------------------------------------------------------------------------------

# flags of the engine whose text is not the value of the field
CHOICES = {
    "device": ("auto", "cpu", "cuda"),
    "dtype": ("auto", "float32", "bfloat16"),
    "quantize": ("none", "int8", "int4", "nf4", "fp8"),
    "kv_cache_dtype": ("auto", "fp8"),
    "adapter_dtype": ("auto", "float32", "bfloat16"),
}
SIZES = ("kv_memory", "adapter_memory", "adapter_host_memory", "adapter_disk")


def _read(flags: StepFlags) -> dict[str, Any]:
    """Fields of `EngineConfig`. Raises `ConfigError`."""
    values = {field.name: getattr(flags, field.name) for field in fields(flags)}
    for name, allowed in CHOICES.items():
        if name in values:
            values[name] = one_of(values[name], _flag(name), *allowed)
    for name in SIZES:
        if name in values:
            values[name] = size(values[name], _flag(name))
    return values


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def one_of(value: str, flag: str, *allowed: str) -> Any:
    """`value`, which is one of `allowed`. Raises `ConfigError`."""
    if value not in allowed:
        raise ConfigError(f"{flag}: found {value!r}; expected {' | '.join(allowed)}", param=flag)
    return value


def size(text: str | None, flag: str) -> int | None:
    """Bytes, where the flag was given. Raises `ConfigError`."""
    from lorikeet.config import parse_size

    return None if text is None else parse_size(text, flag)


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
