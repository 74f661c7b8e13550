"""Messages between the HTTP process, the engine process and the loader process: msgpack, tagged by type. No torch."""

from __future__ import annotations

from typing import Literal

import msgspec

from lorikeet.config import EngineConfig
from lorikeet.model.spec import ModelSpec
from lorikeet.types import AdapterAction, AdapterInfo, BaseIdentity, EngineStats, ErrorInfo, Event, MergeSpec, Request


class Message(msgspec.Struct, frozen=True, tag=True):
    """Base of every message; the tag is the class name."""


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a ready engine says of itself. Sizes in bytes."""

    base: BaseIdentity
    family: str
    dtype: str
    device: str
    max_context: int
    vocab_size: int
    parameters: int = 0
    kv_bytes: int = 0
    kv_tokens: int = 0
    slab_bytes: int = 0
    adapter_dtype: str = ""


# HTTP process -> engine


class Start(Message, frozen=True):
    config: EngineConfig


class Submit(Message, frozen=True):
    request: Request


class Cancel(Message, frozen=True):
    request_id: str


class Resolve(Message, frozen=True):
    """Validate and compile the adapter in `folder`, and make it known to the engine."""

    job: int
    folder: str


class Merge(Message, frozen=True):
    """Merge the adapters in the folders that `spec` names, compile the result, and make it known to the engine.

    `digests` are the contents that the folders are expected to have.
    """

    job: int
    spec: MergeSpec
    digests: tuple[str, ...]


class Register(Message, frozen=True):
    """Make known an adapter that was compiled before the engine was restarted."""

    adapter: AdapterInfo


class Manage(Message, frozen=True):
    """What `Engine.manage` says."""

    job: int
    action: AdapterAction
    digest: str


class AskStats(Message, frozen=True):
    job: int


class Stop(Message, frozen=True):
    """Exit now; whoever sends it has drained before."""


ToEngine = Start | Submit | Cancel | Resolve | Merge | Register | Manage | AskStats | Stop


# engine -> HTTP process


class Ready(Message, frozen=True):
    info: EngineInfo


class Failed(Message, frozen=True):
    """The engine could not be built."""

    error: ErrorInfo


class Events(Message, frozen=True):
    """All events of one step."""

    events: list[Event]


class Resolved(Message, frozen=True):
    """The answer to `Resolve` and `Merge`: an adapter or an error."""

    job: int
    adapter: AdapterInfo | None = None
    error: ErrorInfo | None = None


class Managed(Message, frozen=True):
    """The answer to `Manage`."""

    job: int
    error: ErrorInfo | None = None


class Stats(Message, frozen=True):
    job: int
    stats: EngineStats
    loader_pid: int


FromEngine = Ready | Failed | Events | Resolved | Managed | Stats


# engine <-> loader


class LoaderSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What is the same for every adapter that is compiled."""

    spec: ModelSpec
    base: BaseIdentity
    dtype: Literal["float32", "bfloat16"]
    cache: str
    allow_lock_mismatch: bool
    model: str = ""  # the base's folder, for adapters with tokenizers of their own
    checkpoint: tuple[str, ...] = ()  # the base's safetensors files, for adapters that depend on its weights
    disk: int | None = None  # bytes that the compiled files may take together
    ranks: int = 1  # processes that hold the base together


class StartLoader(Message, frozen=True):
    settings: LoaderSettings


class Compile(Message, frozen=True):
    job: int
    folder: str


ToLoader = StartLoader | Compile | Merge
FromLoader = Resolved

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
decode_to_loader = msgspec.msgpack.Decoder(ToLoader).decode
decode_from_loader = msgspec.msgpack.Decoder(FromLoader).decode
