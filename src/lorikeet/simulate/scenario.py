"""What a simulation is told: a YAML file, read strictly. Times in seconds, sizes in bytes or as `512MiB`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from lorikeet.config import parse_size, read_recipe
from lorikeet.errors import ConfigError

Count = Annotated[int, Meta(gt=0)]
Whole = Annotated[int, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
Size = int | str
Routing = Literal["least_loaded", "adapter_hash", "adapter_affinity"]


# --- arrivals, by `kind` -------------------------------------------------------------------------------------------


class Steady(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="steady"):
    """One request every 1 / `rate` seconds."""

    rate: Positive


class Poisson(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="poisson"):
    """`rate` requests a second, independent of each other."""

    rate: Positive


class Gamma(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="gamma"):
    """`rate` requests a second with gamma distributed gaps: bursty where their `variation` (standard deviation / mean)
    is above 1, which is Poisson."""

    rate: Positive
    variation: Positive


class OnOff(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="on_off"):
    """Poisson at `rate` for exponential times of mean `on_seconds`, then nothing for `off_seconds`."""

    rate: Positive
    on_seconds: Positive
    off_seconds: Positive


Arrivals = Steady | Poisson | Gamma | OnOff


# --- lengths in tokens, by `kind` ----------------------------------------------------------------------------------


class FixedLength(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="fixed"):
    tokens: Count

    @property
    def longest(self) -> int:
        return self.tokens


class UniformLength(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="uniform"
):
    """Every number from `min` to `max`, both among them."""

    min: Count
    max: Count

    @property
    def longest(self) -> int:
        return self.max


class LogNormalLength(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="lognormal"
):
    """exp(normal(log `median`, `sigma`)), rounded, and what lies beyond `min` or `max` moved there."""

    median: Positive
    sigma: NotNegative
    min: Count = 1
    max: Count

    @property
    def longest(self) -> int:
        return self.max


Length = FixedLength | UniformLength | LogNormalLength


# --- who asks for what ---------------------------------------------------------------------------------------------


class ZipfDraw(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="zipf"):
    """Of the adapters `first`, `first` + 1, ... the k-th in proportion to k ** -`exponent`; `base_share` of all
    requests go to the base. `count` is by default all that are left."""

    exponent: NotNegative = 1.0
    first: Whole = 0
    count: Count | None = None
    base_share: Share = 0.0


class UniformDraw(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="uniform"
):
    """Every one of the adapters `first`, `first` + 1, ... alike, otherwise as zipf."""

    first: Whole = 0
    count: Count | None = None
    base_share: Share = 0.0


AdapterDraw = ZipfDraw | UniformDraw


class Stream(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The requests of one tenant. `shared_prefix` tokens at the start of each prompt are the same for all requests of
    one adapter, as a system prompt is; `deadline` is counted from the arrival."""

    tenant: Annotated[str, Meta(min_length=1)]
    arrivals: Arrivals
    prompt: Length
    output: Length
    adapters: AdapterDraw | None = None  # None: the base alone
    shared_prefix: Whole = 0
    deadline: Positive | None = None


class Adapters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`count` adapters; the sizes in `bytes` are dealt out in turn. `compiled`: every replica has all of them on its
    disk from the start; otherwise the first request on a replica waits until its loader has fetched and compiled it."""

    count: Whole = 0
    bytes: Annotated[list[Size], Meta(min_length=1)] = msgspec.field(default_factory=lambda: ["16MiB"])
    compiled: bool = False


# --- what serves them ----------------------------------------------------------------------------------------------


class Replicas(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`count` engines behind one router. `bound` is for adapter_affinity: no replica gets more than so many times the
    average of requests in flight."""

    count: Count = 1
    routing: Routing = "least_loaded"
    bound: Annotated[float, Meta(gt=1)] = 1.25


class EngineLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of each replica, as the flags of `lorikeet serve`; `kv_tokens` is what the key-value cache holds."""

    kv_tokens: Count
    adapter_memory: Size = "2GiB"
    block_size: Count = 16
    max_seqs: Count = 64
    step_tokens: Count = 1024
    chunk_tokens: Count | None = None
    queue: Count = 1024
    prefix_cache: bool = True


class GivenCost(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="given"):
    """A device by its data sheet. A step takes `fixed` + `sequence` for each sequence + `adapter` for each distinct
    adapter + copied bytes / `copy_bandwidth` + the longer of its memory traffic / `bandwidth` (weights, keys and
    values of the contexts, distinct adapters) and its arithmetic / `flops` (2 a parameter and token,
    `attention_flops` a pair of query and key, one a token and adapter byte, as adapters are bf16).
    """

    fixed: Positive
    sequence: NotNegative = 0.0
    adapter: NotNegative = 0.0
    weights: Size
    parameters: Positive
    kv_token_bytes: Size
    attention_flops: NotNegative = 0.0
    bandwidth: Positive
    flops: Positive
    copy_bandwidth: Positive
    cold: NotNegative = 0.0  # until a new adapter is compiled on a replica's disk, whatever its size ...
    cold_bandwidth: Positive | None = None  # ... and bytes a second of fetching and compiling
    request: NotNegative = 0.0  # from a request's arrival until the engine has it: HTTP, tokenizer, the way there


class FittedCost(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="fitted"):
    """A machine by its measured steps: `file` is the output of `lorikeet bench`, relative to the working directory.
    `cold` and `cold_bandwidth` are measured too unless they are given."""

    file: str
    cold: NotNegative | None = None
    cold_bandwidth: Positive | None = None
    request: NotNegative = 0.0


Cost = GivenCost | FittedCost


class Scenario(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole simulation: the first `requests` requests of all streams together."""

    version: Literal[1]
    seed: Whole = 0
    requests: Count
    traffic: Annotated[list[Stream], Meta(min_length=1)]
    adapters: Adapters = Adapters()
    replicas: Replicas = Replicas()
    engine: EngineLimits
    cost: Cost

    @property
    def adapter_bytes(self) -> list[int]:
        """The sizes that are dealt out in turn."""
        return [parse_size(size, "adapters.bytes") for size in self.adapters.bytes]


def read_scenario(path: Path) -> Scenario:
    """Read and check a scenario. Raises ConfigError naming field, found and expected."""
    try:
        scenario = read_recipe(path, Scenario)
    except ConfigError as error:
        if "Expected `float`, got `str`" in error.message:
            error.hint = "YAML takes 8e9 for a text: write 8.0e+9"
        raise
    check_scenario(scenario)
    return scenario


def check_scenario(scenario: Scenario) -> None:
    """What no type says. Raises ConfigError naming field, found and expected."""
    engine = scenario.engine
    if engine.step_tokens < engine.max_seqs:
        _refuse("$.engine.step_tokens", engine.step_tokens, f"at least max_seqs ({engine.max_seqs})")
    if engine.kv_tokens < 2 * engine.block_size:
        _refuse("$.engine.kv_tokens", engine.kv_tokens, f"two blocks of {engine.block_size} tokens or more")
    memory = parse_size(engine.adapter_memory, "$.engine.adapter_memory")
    for size in scenario.adapter_bytes if scenario.adapters.count else ():
        if size > memory:
            _refuse("$.adapters.bytes", size, f"at most engine.adapter_memory ({memory})")
    for i, stream in enumerate(scenario.traffic):
        _check_stream(f"$.traffic[{i}]", stream, scenario)


def _check_stream(where: str, stream: Stream, scenario: Scenario) -> None:
    for name, length in (("prompt", stream.prompt), ("output", stream.output)):
        if not isinstance(length, FixedLength) and length.min > length.max:
            _refuse(f"{where}.{name}.min", length.min, f"at most max ({length.max})")
    room = scenario.engine.kv_tokens // scenario.engine.block_size * scenario.engine.block_size
    longest = stream.prompt.longest + stream.output.longest
    if longest > room:
        _refuse(
            f"{where}.prompt",
            f"{longest} tokens of prompt and output",
            f"at most engine.kv_tokens ({room}) at the longest",
        )
    if stream.adapters is None:
        return
    count = scenario.adapters.count
    if count == 0:
        _refuse(f"{where}.adapters", "a draw", "adapters.count above 0, or no draw")
    last = stream.adapters.first + (stream.adapters.count or 1)
    if last > count:
        _refuse(f"{where}.adapters", f"adapters up to number {last}", f"at most adapters.count ({count})")


def _refuse(where: str, found: object, expected: str) -> None:
    raise ConfigError(f"{where}: found {found}; expected {expected}", param=where.removeprefix("$."))
