"""A request's life inside the engine. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from msgspec.structs import replace

from lorikeet.engine.grammar import Choices
from lorikeet.errors import InvalidRequestError, UnsupportedFieldError
from lorikeet.types import Request, SamplingParams, TokenLogprob

MAX_LOGPROBS = 128
Stretch = tuple[int, int]  # positions, the second excluded
ENDLESS = 2**62
NOWHERE: Stretch = (0, 0)
EVERYWHERE: tuple[Stretch, Stretch] = ((0, ENDLESS), NOWHERE)
_NONE = range(0)


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """A request with what has become of it.

    `tokens` is the prompt and what was generated; the first `computed` of them have keys and values in `blocks`.
    After a preemption `computed` is 0 again and everything in `tokens` is recomputed.
    """

    request: Request
    arrival: int
    seed: int
    limit: int  # the sequence ends when it has this many tokens
    stop_ids: frozenset[int]
    root: bytes  # of its chain of block keys
    tokens: list[int] = field(default_factory=list)
    status: Status = Status.WAITING
    slot: int = -1
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)  # of the full blocks of `tokens`, as far as known
    published: int = 0  # blocks offered to the prefix cache
    cached_tokens: int = 0
    admissions: int = 0
    began: int = -1  # the latest arrival when its first token came
    found_room: bool = False  # there was a place for it when it came
    queued: int = 0  # the step in which it began to wait
    scored: int = 0  # prompt positions whose next token's logprob is known
    scores: list[TokenLogprob | None] = field(default_factory=lambda: [None])
    choices: Choices | None = None
    acts: tuple[Stretch, Stretch] = EVERYWHERE  # where the adapter acts
    unsent: int = 0  # tokens at the end that were not sampled, so that the runner does not know them

    # of the request, which does not change: the scheduler asks for them several times a step
    adapter: str | None = field(init=False)
    sampling: SamplingParams = field(init=False)
    prompt_length: int = field(init=False)
    scores_prompt: bool = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = list(self.request.tokens)
        self.adapter, self.sampling = self.request.adapter, self.request.sampling
        self.prompt_length = len(self.tokens)
        self.scores_prompt = self.sampling.prompt_logprobs is not None

    @property
    def pending(self) -> int:
        """Tokens that have no keys and values yet."""
        return len(self.tokens) - self.computed

    @property
    def decodes(self) -> bool:
        """The prompt is behind it, or all but its last token."""
        return self.computed >= self.prompt_length or self.pending == 1

    @property
    def generates(self) -> bool:
        return self.limit > self.prompt_length

    @property
    def unscored(self) -> range:
        """Prompt positions whose rows are still needed for `prompt_logprobs`."""
        return range(self.scored, self.prompt_length - 1) if self.scores_prompt else _NONE


def effective_sampling(request: Request) -> SamplingParams:
    """The request's sampling, with what its task implies. Raises InvalidRequestError or UnsupportedFieldError."""
    if request.task not in ("generate", "score"):
        raise UnsupportedFieldError(
            f"task: {request.task!r} is not supported by this engine; expected generate or score", param="task"
        )
    sampling = request.sampling
    if request.task == "score":
        scores = 0 if sampling.prompt_logprobs is None else sampling.prompt_logprobs
        sampling = replace(sampling, max_tokens=0, prompt_logprobs=scores, choices=None)
    return sampling


def check_sampling(sampling: SamplingParams, vocab_size: int) -> None:
    """Raises InvalidRequestError naming the first value that makes no sense, what was found and what is expected."""
    s = sampling
    expected = {
        "max_tokens": (s.max_tokens >= 0, "0 or more"),
        "temperature": (0.0 <= s.temperature < float("inf"), "0 (greedy) or more"),
        "top_k": (s.top_k >= 0, "0 (off) or more"),
        "top_p": (0.0 < s.top_p <= 1.0, "above 0 and at most 1"),
        "min_p": (0.0 <= s.min_p <= 1.0, "between 0 and 1"),
        "seed": (s.seed is None or -(2**63) <= s.seed < 2**64, "a 64-bit integer"),
        "logprobs": (s.logprobs is None or 0 <= s.logprobs <= MAX_LOGPROBS, f"between 0 and {MAX_LOGPROBS}"),
        "prompt_logprobs": (
            s.prompt_logprobs is None or 0 <= s.prompt_logprobs <= MAX_LOGPROBS,
            f"between 0 and {MAX_LOGPROBS}",
        ),
        "stop_token_ids": (
            all(0 <= token < vocab_size for token in s.stop_token_ids),
            f"token ids below the vocabulary's size {vocab_size}",
        ),
    }
    for name, (fine, wanted) in expected.items():
        if not fine:
            raise InvalidRequestError(f"{name}: found {getattr(s, name)!r}; expected {wanted}", param=name)
    if s.choices is not None:
        _check_choices(s, vocab_size)


def _check_choices(sampling: SamplingParams, vocab_size: int) -> None:
    choices = sampling.choices or ()
    if not choices or any(not choice for choice in choices):
        raise InvalidRequestError("choices: expected at least one, each of at least one token", param="choices")
    for choice in choices:
        if not all(0 <= token < vocab_size for token in choice):
            raise InvalidRequestError(
                f"choices: found {list(choice)}; expected token ids below the vocabulary's size {vocab_size}",
                param="choices",
            )
    longest = max(map(len, choices))
    if longest > sampling.max_tokens:
        raise InvalidRequestError(
            f"choices: the longest has {longest} tokens, max_tokens is {sampling.max_tokens}",
            hint=f"set max_tokens to {longest} or more",
            param="max_tokens",
        )


def check_prompt(tokens: list[int], vocab_size: int, max_context: int, generates: bool) -> None:
    """Raises InvalidRequestError for an empty prompt, one that leaves no room, or ids outside the vocabulary."""
    if not tokens:
        raise InvalidRequestError("prompt: found no token; expected at least one", param="prompt")
    room = max_context - 1 if generates else max_context
    if len(tokens) > room:
        raise InvalidRequestError(
            f"prompt: {len(tokens)} tokens; the longest that fits is {room} (context of {max_context} tokens)",
            hint="shorten the prompt or serve with a larger --max-context",
            param="prompt",
            code="context_length_exceeded",
        )
    if min(tokens) < 0 or max(tokens) >= vocab_size:
        bad = next(token for token in tokens if not 0 <= token < vocab_size)
        raise InvalidRequestError(
            f"prompt: found token id {bad}; expected ids below the vocabulary's size {vocab_size}", param="prompt"
        )
