"""The OpenAI protocol: `/v1/models`, `/v1/completions`, `/v1/chat/completions`; beside them the tokenizer's routes."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response

from lorikeet.errors import InvalidRequestError, LorikeetError
from lorikeet.model.tokenizer import Tokenizer
from lorikeet.server.auth import Principal, needs, principal
from lorikeet.server.generation import (
    Completion,
    Delta,
    Job,
    Token,
    check_length,
    complete_all,
    finite,
    generate_all,
    make_jobs,
)
from lorikeet.server.models import ServedModel
from lorikeet.server.openai_bodies import (
    DEFAULT_MAX_TOKENS,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    GenerationBody,
    TokenizeBody,
)
from lorikeet.server.replies import DONE, EventStreamResponse, event, json_reply, started, unless_gone
from lorikeet.server.state import ServerState
from lorikeet.server.validation import parse, read_body, stops
from lorikeet.types import TokenLogprob

Json = dict[str, Any]
_ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def error_body(error: LorikeetError) -> Json:
    """The protocol's error object, with `hint` and `retryable` beside its own fields."""
    kind = _ERROR_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {
        "error": {
            "message": error.message,
            "type": kind,
            "param": error.param,
            "code": error.code,
            "hint": error.hint,
            "retryable": error.retryable,
        }
    }


def routes(state: ServerState) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/models")
    @needs("user")
    async def list_models(request: Request) -> Response:
        adapters, refusals = await state.models.listing(principal(request).actor)
        models = [_model_object(state, state.models.base), *(_model_object(state, one) for one in adapters)]
        refused = [{"id": one.name, "reason": one.reason} for one in refusals]
        return json_reply({"object": "list", "data": models, "refused": refused})

    @router.get("/v1/models/{name:path}")
    @needs("user")
    async def get_model(request: Request, name: str) -> Response:
        return json_reply(_model_object(state, await state.models.get(name, principal(request).actor)))

    @router.post("/v1/completions")
    @needs("user")
    async def completions(request: Request) -> Response:
        body = parse(CompletionBody, await read_body(request, state.config.max_body))
        body.check()
        return await _answer(request, state, await _completion_call(state, principal(request), body))

    @router.post("/v1/chat/completions")
    @needs("user")
    async def chat_completions(request: Request) -> Response:
        body = parse(ChatBody, await read_body(request, state.config.max_body))
        body.check()
        return await _answer(request, state, await _chat_call(state, principal(request), body))

    @router.post("/v1/embeddings")
    @needs("user")
    async def embeddings() -> Response:
        raise InvalidRequestError(
            "embeddings are not supported: the models here generate text",
            hint="use a server of an embedding model",
            code="unsupported_call",
        )

    @router.get("/tokenizer_info")
    @needs("user")
    async def tokenizer_info() -> Response:
        tokenizer = state.models.base.tokenizer
        named = {name: tokenizer.special_tokens.get(name) for name in ("bos_token", "eos_token", "pad_token")}
        return json_reply({**named, "chat_template": tokenizer.chat_template, "vocab_size": tokenizer.vocab_size})

    @router.post("/tokenize")
    @needs("user")
    async def tokenize(request: Request) -> Response:
        body = parse(TokenizeBody, await read_body(request, state.config.max_body))
        model = await state.models.get(body.model, principal(request).actor)
        special = True if body.add_special_tokens is None else body.add_special_tokens
        tokens = await model.encode(body.prompt, add_special_tokens=special)
        return json_reply({"tokens": tokens, "count": len(tokens), "max_model_len": state.info.max_context})

    @router.post("/detokenize")
    @needs("user")
    async def detokenize(request: Request) -> Response:
        body = parse(DetokenizeBody, await read_body(request, state.config.max_body))
        model = await state.models.get(body.model, principal(request).actor)
        _check_ids(body.tokens, model.vocab_size(state.info.vocab_size), "tokens")
        return json_reply({"prompt": model.tokenizer.decode(body.tokens, skip_special_tokens=False)})

    return router


def _model_object(state: ServerState, model: ServedModel) -> Json:
    base = state.models.base
    described = {
        "id": model.name,
        "object": "model",
        "created": int(state.started),
        "owned_by": "lorikeet",
        "root": base.name,
        "parent": None,
        "max_model_len": state.engine.info.max_context if state.engine.info is not None else None,
    }
    if model is not base:
        template = model.lock.template.kind if model.lock is not None and model.lock.template is not None else None
        lock = "locked" if model.lock is not None else "unlocked"
        described |= {"parent": base.name, "lock": lock, "template": template}
    return described


# --- one call, whatever the route ---------------------------------------------------------------------------------


class Call:
    """What a request asks for, and the form of its answer: a subclass for each route."""

    prefix: str
    object: str
    chunk_object: str

    def __init__(self, state: ServerState, model: ServedModel, body: GenerationBody, prompts: list[list[int]]) -> None:
        self.model = model
        self.body = body
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.prompts = prompts
        self.jobs: list[Job] = []
        self.fingerprint = f"fp_{state.info.base.sha256[:12]}"

    def choice(self, index: int, completion: Completion) -> Json:
        raise NotImplementedError

    def first_chunks(self) -> list[Json]:
        """Choices to send before anything was generated."""
        return []

    def chunk(self, index: int, delta: Delta) -> Json:
        raise NotImplementedError

    def envelope(self, kind: str, choices: list[Json], **more: Any) -> Json:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model.name,
            "choices": choices,
            "system_fingerprint": self.fingerprint,
            **more,
        }

    def usage(self, last: list[Delta]) -> Json:
        """A prompt counts once however many completions it has; `last` is the final delta of each job."""
        prompt = sum(map(len, self.prompts))
        completion = sum(delta.completion_tokens for delta in last)
        cached = sum(delta.cached_tokens for delta in last[:: self.body.count])
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


async def _answer(request: Request, state: ServerState, call: Call) -> Response:
    if not call.body.stream:
        completions = await unless_gone(request, complete_all(state.engine, state.metrics, call.jobs))
        choices = [call.choice(i, completion) for i, completion in enumerate(completions)]
        usage = call.usage([completion.last for completion in completions])
        return json_reply(call.envelope(call.object, choices, usage=usage))
    deltas = await started(request, generate_all(state.engine, state.metrics, call.jobs))
    return EventStreamResponse(_events(call, deltas))


async def _events(call: Call, deltas: AsyncIterator[tuple[int, Delta]]) -> AsyncGenerator[bytes]:
    """Chunks, then usage where asked for, then `[DONE]`; or one last event with the error that ended them."""
    last = [Delta() for _ in call.jobs]
    no_usage = {"usage": None} if call.body.include_usage else {}
    assert isinstance(deltas, AsyncGenerator)
    async with aclosing(deltas):
        try:
            for choice in call.first_chunks():
                yield event(call.envelope(call.chunk_object, [choice], **no_usage))
            async for index, delta in deltas:
                last[index] = delta
                if delta.text or delta.shown or delta.finish:
                    yield event(call.envelope(call.chunk_object, [call.chunk(index, delta)], **no_usage))
        except LorikeetError as error:
            yield event(error_body(error))
            return
    if call.body.include_usage:
        yield event(call.envelope(call.chunk_object, [], usage=call.usage(last)))
    yield DONE


def _check_ids(tokens: list[int], vocab_size: int, param: str) -> None:
    wrong = next((token for token in tokens if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise InvalidRequestError(
            f"'{param}' holds the token id {wrong}; this model has ids 0 to {vocab_size - 1}", param=param
        )


# --- completions --------------------------------------------------------------------------------------------------


async def _completion_call(state: ServerState, caller: Principal, body: CompletionBody) -> CompletionCall:
    model = await state.models.get(body.model or None, caller.actor, token=body.api_token)
    texts, prompts = await _prompts(model, body.prompt)
    info = state.info
    for tokens in prompts:
        if not tokens:
            raise InvalidRequestError("the prompt is empty: no token at all", param="prompt")
        _check_ids(tokens, model.vocab_size(info.vocab_size), "prompt")
        check_length(tokens, body.max_tokens, info.max_context, "prompt", "max_tokens")
    longest = max(map(len, prompts))
    max_tokens = body.max_tokens
    if max_tokens is None:
        wanted = max(map(len, body.choices(model) or ())) if body.guided_choice else DEFAULT_MAX_TOKENS
        max_tokens = min(wanted, info.max_context - longest)
    prompt_logprobs = body.logprobs if body.echo else None
    sampling = body.sampling(model, max_tokens=max_tokens, logprobs=body.logprobs, prompt_logprobs=prompt_logprobs)
    call = CompletionCall(state, model, body, prompts, texts)
    call.jobs = make_jobs(
        call.id, caller, model, prompts, sampling, stops(body.stop), body.count, body.priority or 0, body.deadline
    )
    return call


async def _prompts(model: ServedModel, prompt: Any) -> tuple[list[str | None], list[list[int]]]:
    """Every prompt as text (None where it came as token ids) and as token ids."""
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        prompt = [prompt]
    texts = [one if isinstance(one, str) else None for one in prompt]
    tokens = [await model.encode(one) if isinstance(one, str) else one for one in prompt]
    return texts, tokens


class CompletionCall(Call):
    """POST /v1/completions. `texts` are the prompts as text, None where one came as token ids."""

    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"
    body: CompletionBody

    def __init__(
        self, state: ServerState, model: ServedModel, body: CompletionBody, prompts: list[list[int]],
        texts: list[str | None],
    ) -> None:  # fmt: skip
        super().__init__(state, model, body, prompts)
        echoes = [Echo(model.tokenizer, *both) for both in zip(prompts, texts, strict=True)] if body.echo else []
        self._echoes = [echo for echo in echoes for _ in range(body.count)]
        self._begun: set[int] = set()  # choices whose prompt was echoed

    def choice(self, index: int, completion: Completion) -> Json:
        return self._choice(index, completion, completion.last)

    def chunk(self, index: int, delta: Delta) -> Json:
        return self._choice(index, delta, delta)

    def _choice(self, index: int, part: Completion | Delta, last: Delta) -> Json:
        echo = self._echoes[index] if self._echoes else None
        first = index not in self._begun
        self._begun.add(index)
        logprobs = None
        if self.body.logprobs is not None:
            logprobs = Logprobs(self.model.tokenizer)
            if echo is not None and first:
                logprobs.add_prompt(echo, part.prompt_logprobs)
            logprobs.add(part.shown, 0 if echo is None else len(echo.text))
        return {
            "index": index,
            "text": echo.text + part.text if echo is not None and first else part.text,
            "logprobs": None if logprobs is None else logprobs.body(),
            "finish_reason": last.finish,
        }


class Echo:
    """A prompt as it stands before its completion, and where in it each of its tokens begins."""

    def __init__(self, tokenizer: Tokenizer, tokens: list[int], text: str | None) -> None:
        decoder = tokenizer.stream(skip_special_tokens=text is not None)
        self.tokens = tokens
        self.offsets: list[int] = []
        pieces, at = [], 0
        for token in tokens:
            self.offsets.append(at)
            pieces.append(decoder.push((token,)))
            at += len(pieces[-1])
        self.text = "".join([*pieces, decoder.finish()]) if text is None else text


class Logprobs:
    """The `logprobs` object of a completion choice."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[str] = []
        self._logprobs: list[float | None] = []
        self._top: list[dict[str, float] | None] = []
        self._offsets: list[int] = []

    def add_prompt(self, echo: Echo, logprobs: list[TokenLogprob | None] | None) -> None:
        for token, offset, entry in zip(echo.tokens, echo.offsets, logprobs or [None] * len(echo.tokens), strict=True):
            if entry is None:  # nothing comes before the first token
                self._add(token, offset, None, None)
            else:
                self._add(token, offset, finite(entry.logprob), [(one, finite(value)) for one, value in entry.top])

    def add(self, tokens: list[Token], offset: int) -> None:
        for token in tokens:
            self._add(token.id, offset + token.start, token.logprob, [(one.id, one.logprob) for one in token.top])

    def _add(self, token: int, offset: int, logprob: float | None, top: list[tuple[int, float]] | None) -> None:
        name = token_name(self._tokenizer, token)
        self._tokens.append(name)
        self._logprobs.append(logprob)
        self._offsets.append(offset)
        if top is None or logprob is None:
            self._top.append(None)
            return
        named: dict[str, float] = {}
        for one, value in top:  # most likely first: of two tokens with one spelling the likelier stays
            named.setdefault(token_name(self._tokenizer, one), value)
        if all(one != token for one, _ in top):
            named.setdefault(name, logprob)
        self._top.append(named)

    def body(self) -> Json:
        return {
            "tokens": self._tokens,
            "token_logprobs": self._logprobs,
            "top_logprobs": self._top,
            "text_offset": self._offsets,
        }


def token_name(tokenizer: Tokenizer, token: int) -> str:
    """A token as text, or in the protocol's spelling `bytes:\\xe2\\x80` where it is no whole character."""
    raw = tokenizer.token_bytes(token)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


# --- chat ---------------------------------------------------------------------------------------------------------


async def _chat_call(state: ServerState, caller: Principal, body: ChatBody) -> ChatCall:
    model = await state.models.get(body.model or None, caller.actor, token=body.api_token)
    text = model.chat_prompt([message.plain() for message in body.messages or []])
    tokens = await model.encode(text, add_special_tokens=False)
    info = state.info
    name = "max_tokens" if body.max_tokens is not None else "max_completion_tokens"
    check_length(tokens, body.limit, info.max_context, "messages", name)
    limit = info.max_context - len(tokens) if body.limit is None else body.limit
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    call = ChatCall(state, model, body, [tokens])
    sampling = body.sampling(model, max_tokens=limit, logprobs=logprobs)
    call.jobs = make_jobs(
        call.id, caller, model, [tokens], sampling, stops(body.stop), body.count, body.priority or 0, body.deadline
    )
    return call


class ChatCall(Call):
    """POST /v1/chat/completions"""

    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"
    body: ChatBody

    def choice(self, index: int, completion: Completion) -> Json:
        message = {"role": "assistant", "content": completion.text, "refusal": None}
        return self._finished(index, completion.shown, completion.last) | {"message": message}

    def first_chunks(self) -> list[Json]:
        delta = {"role": "assistant", "content": ""}
        return [{"index": i, "delta": delta, "logprobs": None, "finish_reason": None} for i in range(len(self.jobs))]

    def chunk(self, index: int, delta: Delta) -> Json:
        return self._finished(index, delta.shown, delta) | {"delta": {"content": delta.text} if delta.text else {}}

    def _finished(self, index: int, shown: list[Token], last: Delta) -> Json:
        logprobs = (
            {"content": [self._logprob(token) for token in shown], "refusal": None} if self.body.logprobs else None
        )
        return {"index": index, "logprobs": logprobs, "finish_reason": last.finish}

    def _logprob(self, token: Token) -> Json:
        return self._named(token.id, token.logprob) | {"top_logprobs": [self._named(*top) for top in token.top]}

    def _named(self, token: int, logprob: float) -> Json:
        raw = self.model.tokenizer.token_bytes(token)
        return {"token": raw.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(raw)}
