"""Everything that crosses a wall between rooms or a border between processes. Plain data, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec

Task = Literal["generate", "score", "embed", "classify"]
FinishReason = Literal["stop", "length", "cancelled", "error"]
MergeMethod = Literal[
    "linear",
    "cat",
    "svd",
    "ties",
    "dare_linear",
    "dare_ties",
    "magnitude_prune",
    "ties_svd",
    "dare_linear_svd",
    "dare_ties_svd",
    "magnitude_prune_svd",
]
SignMethod = Literal["total", "frequency"]

ROLES = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True, slots=True)
class Site:
    """A place in the model where an adapter may act: one linear layer, the embedding or the head.

    `index` counts sites over the whole model (layer-major, in the order of `ROLES`, then embed, then head) and is
    the second axis of the adapter table that kernels read.
    """

    index: int
    layer: int | None
    role: str
    d_in: int
    d_out: int


@dataclass(frozen=True, slots=True)
class SiteGroup:
    """Sites computed by one product because they read the same input: `q k v` and `gate up`.

    `offsets[i]` is the first output column of `sites[i]`.
    """

    sites: tuple[Site, ...]
    offsets: tuple[int, ...]

    @property
    def d_in(self) -> int:
        return self.sites[0].d_in

    @property
    def d_out(self) -> int:
        return sum(site.d_out for site in self.sites)


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the next token is picked and when a request ends. The engine knows token ids only.

    Stop strings are text, so they live with the detokeniser in front of the engine, which cancels the request.
    """

    max_tokens: int = 16
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 keeps every token
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None  # None: drawn by whoever submits the request, so that a replay is exact
    stop_token_ids: tuple[int, ...] = ()  # ends the request; the token itself is reported, never shown
    ignore_eos: bool = False  # when set, stop_token_ids do not end the request
    logprobs: int | None = None  # None: none; k >= 0: the chosen token's and the k most likely ones'
    prompt_logprobs: int | None = None  # the same over the prompt
    choices: tuple[tuple[int, ...], ...] | None = None  # the completion is exactly one of these token sequences


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One unit of work for the engine."""

    request_id: str
    tokens: list[int]
    sampling: SamplingParams = SamplingParams()
    adapter: str | None = None  # content hash of a resolved adapter; None is the base
    task: Task = "generate"
    tenant: str = ""
    priority: int = 0  # among the requests of its tenant on its adapter the lowest is next
    deadline: float | None = None  # seconds since the epoch
    trace_parent: str | None = None


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """`top` holds (token, logprob), most likely first."""

    token: int
    logprob: float
    top: list[tuple[int, float]] = []


class ErrorInfo(msgspec.Struct, frozen=True, kw_only=True):
    """An error on the wire; `errors.LorikeetError` in a process."""

    code: str
    message: str
    status: int = 500
    hint: str | None = None
    retryable: bool = False
    retry_after: float | None = None
    param: str | None = None


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine says of a request. `finish` is set on exactly one event per accepted request, the last."""

    request_id: str
    tokens: list[int] = []
    logprobs: list[TokenLogprob] | None = None  # one per entry of `tokens`
    prompt_logprobs: list[TokenLogprob | None] | None = None  # one per prompt token, the first is None
    cached_tokens: int = 0  # prompt tokens whose keys and values came from the prefix cache
    finish: FinishReason | None = None
    error: ErrorInfo | None = None


@dataclass(slots=True)
class ScheduledSequence:
    """`count` tokens of the sequence in `slot`, from position `start`, run in this step."""

    slot: int
    start: int
    count: int
    samples: bool  # the last of these tokens yields the next token
    score_start: int = 0  # positions score_start:score_stop are among these tokens, and each one's next token
    score_stop: int = 0  # (a token of the prompt) gets its logprob


class AdapterCopy(msgspec.Struct, tag=True):
    """Bring the compiled adapter `digest` into the slab under `handle` at byte `offset`.

    Of its `nbytes` this step copies `count`, from byte `start` on; the adapter is usable when all are there.
    """

    digest: str
    path: str
    handle: int
    offset: int
    nbytes: int
    start: int
    count: int


# An adapter's folder ships nothing of a tokenizer; other templates or stop ids for the base's; or one of its own.
TokenizerKind = Literal["base", "settings", "own"]


class AdapterInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A compiled adapter as the loader process reports it."""

    digest: str  # content hash, see design "identity is content"
    path: str  # the compiled file
    nbytes: int  # bytes it takes in the slab
    max_rank: int
    sites: int
    kind: str = "lora"
    invocation: tuple[int, ...] | None = None  # token ids from whose last occurrence in a prompt on it acts; None: all
    # How many first and last tokens of a prompt it acts on, and how many at the end it leaves out; None: all.
    positions: tuple[int, int, int] | None = None
    vocab_size: int | None = None  # tokens that its own embedding and head have; None: as many as the base's
    tokenizer: TokenizerKind = "base"  # of the folder it came from: not part of the content


AdapterAction = Literal["load", "unload", "pin", "unpin"]


class MergeSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which adapters, by name, and how they become one.

    `density` is the share of the values that pruning keeps, `majority_sign_method` whether adapters vote by value
    (`total`) or by head (`frequency`), `seed` that of random pruning. `adapters.merge` says what the methods mean and
    checks that the fields make sense together.
    """

    adapters: tuple[str, ...]
    weights: tuple[float, ...]
    method: MergeMethod = "linear"
    density: float | None = None
    majority_sign_method: SignMethod | None = None  # None: total, where there is a vote
    seed: int = 0
    svd_rank: int | None = None

    @property
    def prunes(self) -> bool:
        return self.method not in ("linear", "cat", "svd")

    @property
    def votes(self) -> bool:
        return "ties" in self.method

    @property
    def draws(self) -> bool:
        return self.method.startswith("dare")


class BaseIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """What a base model is, by content; an adapter's lock file is compared with it."""

    name: str
    sha256: str  # over the tensors and the spec
    tokenizer_sha256: str
    stop_ids: tuple[int, ...]  # ascending


class AdapterStats(msgspec.Struct, frozen=True, kw_only=True):
    """`last_used` in seconds since the epoch, 0 is never; `running` sequences use it now."""

    digest: str
    resident: bool
    bytes: int
    hits: int
    last_used: float
    max_rank: int
    running: int
    kind: str = "lora"
    sites: int = 0
    pinned: bool = False
    loading: bool = False  # on its way into the slab


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """Counters since the start and gauges of now. Sizes in bytes, `blocks_*` in blocks of the key-value cache."""

    running: int
    waiting: int
    blocks_total: int
    blocks_free: int  # those that are cached among them
    blocks_cached: int
    block_size: int
    kv_bytes: int
    slab_used: int
    slab_total: int
    prefix_hit_tokens: int
    preemptions: int
    steps: int
    prefill_tokens: int
    decode_tokens: int
    finished: int
    adapters: list[AdapterStats] = []
