"""From a prompt to pieces of text: one request of the engine, detokenised, cut at stop strings, counted.

The protocol files build `Job`s and format `Delta`s; neither tokens nor stop strings are their business.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import NamedTuple

from msgspec.structs import replace

from lorikeet.engine.link import EngineClient
from lorikeet.errors import InvalidRequestError, LorikeetError, UnavailableError
from lorikeet.model.tokenizer import StopMatcher, Tokenizer
from lorikeet.server.auth import Principal
from lorikeet.server.metrics import Metrics
from lorikeet.server.models import ServedModel
from lorikeet.types import Event, FinishReason, Request, SamplingParams, TokenLogprob

LOWEST_LOGPROB = -9999.0  # JSON has no infinity


@dataclass(frozen=True, kw_only=True)
class Job:
    """One prompt, one completion, on behalf of `caller`. The seed is drawn already, so that it can be reported and
    replayed."""

    request_id: str
    caller: Principal
    model: ServedModel
    tokens: list[int]
    sampling: SamplingParams
    stop: tuple[str, ...] = ()
    priority: int = 0
    deadline: float | None = None  # seconds since the epoch


class Top(NamedTuple):
    id: int
    logprob: float


class Token(NamedTuple):
    """A generated token. `text` is what it added to the text, `start` where in the completion that begins."""

    id: int
    text: str
    start: int
    logprob: float
    top: list[Top]
    special: bool  # it has no text of its own: an end of sequence, a control token


@dataclass(slots=True)
class Delta:
    """What one event of the engine adds.

    `text` can be shown: no stop string lies in it, and none can begin in it. `shown` are the tokens it is made of,
    `arrived` all tokens of the event, those of a stop string or an end of sequence too.
    """

    text: str = ""
    shown: list[Token] = field(default_factory=list)
    arrived: list[Token] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] | None = None
    finish: FinishReason | None = None
    stop_string: str | None = None  # set with `finish` when a stop string ended the request
    ended_by_token: bool = False  # set with `finish` when an end of sequence did
    cached_tokens: int = 0
    completion_tokens: int = 0  # so far, all tokens that were generated


def make_jobs(
    request_id: str, caller: Principal, model: ServedModel, prompts: Sequence[list[int]], sampling: SamplingParams,
    stop: tuple[str, ...], count: int, priority: int = 0, deadline: float | None = None,
) -> list[Job]:  # fmt: skip
    """`count` completions of every prompt, in the order of the choices; completion i of a prompt has seed + i."""
    assert sampling.seed is not None
    return [
        Job(
            request_id=f"{request_id}-{p * count + i}",
            caller=caller,
            model=model,
            tokens=tokens,
            sampling=replace(sampling, seed=(sampling.seed + i) % 2**63),
            stop=stop,
            priority=priority,
            deadline=deadline,
        )
        for p, tokens in enumerate(prompts)
        for i in range(count)
    ]


def check_length(tokens: Sequence[int], max_tokens: int | None, max_context: int, param: str, limit_param: str) -> None:
    """Raise `InvalidRequestError` (400) with both numbers where the prompt or what it asks for cannot fit.

    `max_tokens` None leaves the length of the answer to the context, which must have room for one token then.
    """
    asked = 1 if max_tokens is None else max_tokens
    if len(tokens) + min(asked, 1) > max_context:
        raise InvalidRequestError(
            f"the prompt has {len(tokens)} tokens; the context holds {max_context}, the answer included",
            hint="shorten the prompt, or serve with a larger --max-context",
            param=param,
            code="context_length_exceeded",
        )
    if len(tokens) + asked > max_context:
        raise InvalidRequestError(
            f"the prompt has {len(tokens)} tokens and {limit_param} asks for {asked} more; the context holds "
            f"{max_context}",
            hint=f"ask for at most {max_context - len(tokens)}",
            param=limit_param,
            code="context_length_exceeded",
        )


async def generate(engine: EngineClient, metrics: Metrics, job: Job) -> AsyncGenerator[Delta]:
    """Deltas until one has `finish`. Errors are raised; leaving early cancels the request in the engine."""
    watch = metrics.start(job.model.label, len(job.tokens), digest=job.model.digest, tenant=job.caller.tenant)
    assembler = Assembler(job)
    outcome = "cancelled"
    revoked: list[LorikeetError] = []

    def revoke(error: LorikeetError) -> None:
        revoked.append(error)
        engine.cancel(job.request_id)  # the stream wakes up for the end of it

    try:
        request = Request(
            request_id=job.request_id, tokens=job.tokens, sampling=job.sampling, adapter=job.model.digest,
            tenant=job.caller.tenant, priority=job.priority, deadline=job.deadline,
        )  # fmt: skip
        stream = await engine.submit(request, job.model.folder)
        try:
            with job.caller.ending(revoke):
                async for event in stream:
                    if revoked:
                        raise revoked[0]
                    watch.tokens(len(event.tokens))
                    delta = assembler.push(event)
                    if delta.finish is not None:
                        outcome = delta.finish
                        stream.close()  # before the text is sent: a stop string leaves the engine at work
                    yield delta
                    if delta.finish is not None:
                        return
        finally:
            stream.close()
    except LorikeetError as error:
        outcome = error.code
        raise
    finally:
        watch.end(outcome)


async def generate_all(engine: EngineClient, metrics: Metrics, jobs: list[Job]) -> AsyncGenerator[tuple[int, Delta]]:
    """The deltas of all jobs as they come, each with its job's index. The first error ends all of them.

    The jobs have one caller, whose quota holds what all of them may take before the first one starts. A prompt counts
    once however many completions it has, and a request that came to nothing counts nothing.
    """
    meter = jobs[0].caller.meter
    prompts = sum({id(job.tokens): len(job.tokens) for job in jobs}.values())
    reserved = prompts + sum(job.sampling.max_tokens for job in jobs)
    generated: dict[int, int] = {}
    if meter is not None:
        meter.reserve(reserved)
    try:
        async with aclosing(_generate_all(engine, metrics, jobs)) as deltas:
            async for index, delta in deltas:
                generated[index] = delta.completion_tokens
                yield index, delta
    finally:
        if meter is not None:
            meter.settle(reserved, prompts + sum(generated.values()) if generated else 0)


async def _generate_all(engine: EngineClient, metrics: Metrics, jobs: list[Job]) -> AsyncGenerator[tuple[int, Delta]]:
    if len(jobs) == 1:
        async with aclosing(generate(engine, metrics, jobs[0])) as deltas:
            async for delta in deltas:
                yield 0, delta
        return
    queue: asyncio.Queue[tuple[int, Delta | BaseException]] = asyncio.Queue()

    async def pump(index: int, job: Job) -> None:
        try:
            async with aclosing(generate(engine, metrics, job)) as deltas:
                async for delta in deltas:
                    queue.put_nowait((index, delta))
        except BaseException as error:
            queue.put_nowait((index, error))
            raise

    tasks = [asyncio.create_task(pump(i, job)) for i, job in enumerate(jobs)]
    try:
        running = len(jobs)
        while running:
            index, item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            running -= item.finish is not None
            yield index, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclass(slots=True)
class Completion:
    """All deltas of one job together."""

    text: str = ""
    shown: list[Token] = field(default_factory=list)
    arrived: list[Token] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] | None = None
    last: Delta = field(default_factory=Delta)

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.shown += delta.shown
        self.arrived += delta.arrived
        self.prompt_logprobs = self.prompt_logprobs or delta.prompt_logprobs
        self.last = delta


async def complete_all(engine: EngineClient, metrics: Metrics, jobs: list[Job]) -> list[Completion]:
    """Every job's completion, in the order of the jobs."""
    completions = [Completion() for _ in jobs]
    async with aclosing(generate_all(engine, metrics, jobs)) as deltas:
        async for index, delta in deltas:
            completions[index].add(delta)
    return completions


class Assembler:
    """Events of one request in, deltas out."""

    def __init__(self, job: Job) -> None:
        self._tokenizer: Tokenizer = job.model.tokenizer
        self._decoder = self._tokenizer.stream()
        self._matcher = StopMatcher(job.stop) if job.stop else None
        self._stop_ids = frozenset(job.sampling.stop_token_ids) | frozenset(self._tokenizer.stop_ids)
        self._ignore_eos = job.sampling.ignore_eos
        self._length = 0  # characters decoded
        self._shown = 0  # characters given out
        self._held: deque[Token] = deque()  # tokens whose text is not given out yet
        self._count = 0
        self._cached = 0

    def push(self, event: Event) -> Delta:
        if event.error is not None:
            raise LorikeetError.from_info(event.error)
        if event.finish == "cancelled":
            raise UnavailableError("the request was cancelled in the engine", retry_after=1.0)
        self._cached = max(self._cached, event.cached_tokens)
        delta = Delta(prompt_logprobs=event.prompt_logprobs, finish=event.finish)
        delta.ended_by_token = (
            event.finish == "stop"
            and bool(event.tokens)
            and not self._ignore_eos
            and event.tokens[-1] in self._stop_ids
        )
        last = len(event.tokens) - 1 if delta.ended_by_token else -1
        pieces = []
        for i, token in enumerate(event.tokens):
            pieces.append(self._take(token, event.logprobs[i] if event.logprobs else None, delta, ends=i == last))
            if self._matcher is not None and self._matcher.matched is not None:
                break
        self._finish_text(delta, pieces)
        self._release(delta)
        delta.cached_tokens, delta.completion_tokens = self._cached, self._count
        return delta

    def _take(self, token: int, logprob: TokenLogprob | None, delta: Delta, ends: bool) -> str:
        """Count one token; the text that can be shown after it."""
        self._count += 1
        special = ends or token in self._tokenizer.special_ids
        text = "" if ends else self._decoder.push((token,))
        entry = Token(
            token,
            text,
            self._length,
            LOWEST_LOGPROB if logprob is None else finite(logprob.logprob),
            [] if logprob is None else [Top(one, finite(value)) for one, value in logprob.top],
            special,
        )
        self._length += len(text)
        delta.arrived.append(entry)
        if not ends:
            self._held.append(entry)
        return text if self._matcher is None else self._matcher.push(text)

    def _finish_text(self, delta: Delta, pieces: list[str]) -> None:
        """At the end: what decoder and matcher held back, unless a stop string is complete."""
        matcher = self._matcher
        if delta.finish is not None and (matcher is None or matcher.matched is None):
            tail = self._decoder.finish()
            self._length += len(tail)
            pieces.append(tail if matcher is None else matcher.push(tail) + matcher.finish())
        if matcher is not None and matcher.matched is not None:
            delta.finish, delta.stop_string, delta.ended_by_token = "stop", matcher.matched, False
        delta.text = "".join(pieces)

    def _release(self, delta: Delta) -> None:
        """Tokens whose text lies in what was given out; at the end also those without any text."""
        self._shown += len(delta.text)
        while self._held:
            token = self._held[0]
            if token.start >= self._shown and not (delta.finish and delta.stop_string is None):
                break
            delta.shown.append(self._held.popleft())


def finite(logprob: float) -> float:
    return logprob if logprob > LOWEST_LOGPROB else LOWEST_LOGPROB
