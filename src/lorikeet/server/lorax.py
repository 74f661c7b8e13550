"""The LoRAX protocol: POST `/generate`, `/generate_stream` and `/`, with the adapter named in the parameters.

Beyond it: `inputs` may be an object of columns, which the adapter's own prompt template turns into the prompt.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field

from lorikeet import __version__
from lorikeet.errors import InvalidRequestError, LorikeetError, UnsupportedFieldError
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
)
from lorikeet.server.models import ServedModel
from lorikeet.server.openai_bodies import draw_seed
from lorikeet.server.replies import EventStreamResponse, event, json_reply, started, unless_gone
from lorikeet.server.state import ServerState
from lorikeet.server.validation import (
    ApiToken,
    Body,
    FalseOnly,
    OneOnly,
    Stop,
    Temperature,
    TextFormatOnly,
    ZeroOnly,
    parse,
    read_body,
    stops,
    supported,
)
from lorikeet.types import MergeSpec, SamplingParams, TokenLogprob

Json = dict[str, Any]
SOURCES = {"hub": "hf", "s3": "s3", "gs": "gs", "az": "az", "https": "https"}  # by `adapter_source`
PATHS = {"/", "/generate", "/generate_stream", "/info", "/ping"}
_ERROR_TYPES = {400: "validation", 413: "validation", 422: "validation", 404: "not_found", 409: "lock_mismatch",
                401: "authentication", 429: "overloaded", 503: "unavailable"}  # fmt: skip


def error_body(error: LorikeetError) -> Json:
    """The protocol's error object: `error` in words, `error_type` for the client, and whether to try again."""
    kind = _ERROR_TYPES.get(error.status, "generation")
    return {"error": str(error), "error_type": kind, "retryable": error.retryable}


class MergedAdapters(Body):
    ids: Annotated[list[str], Field(min_length=1, max_length=32)]
    weights: list[float]
    merge_strategy: Literal["linear", "ties", "dare_linear", "dare_ties"] | None = None
    density: Annotated[float, Field(ge=0, le=1)] | None = None
    majority_sign_method: Literal["total", "frequency"] | None = None


class Parameters(Body):
    adapter_id: str | None = None
    adapter_source: Annotated[Any, supported("local", "", "pbase", *SOURCES)] = None
    merged_adapters: MergedAdapters | None = None
    api_token: ApiToken = None
    best_of: OneOnly = None
    temperature: Temperature | None = None
    repetition_penalty: OneOnly = None
    frequency_penalty: ZeroOnly = None
    presence_penalty: ZeroOnly = None
    top_k: Annotated[int, Field(ge=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    typical_p: OneOnly = None
    do_sample: bool | None = None
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    ignore_eos_token: bool | None = None
    return_full_text: bool | None = None
    stop: Stop = None
    truncate: Annotated[int, Field(ge=1)] | None = None
    watermark: FalseOnly = None
    details: bool | None = None
    decoder_input_details: bool | None = None
    return_k_alternatives: Annotated[int, Field(ge=1, le=20)] | None = None
    apply_chat_template: bool | None = None
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None
    response_format: TextFormatOnly = None


class GenerateBody(Body):
    inputs: str | dict[str, Any] | None = None
    parameters: Parameters | None = None


class CompatBody(GenerateBody):
    """POST `/`, where the body says whether to stream."""

    stream: bool | None = None


def routes(state: ServerState) -> APIRouter:
    router = APIRouter()

    @router.post("/generate")
    @needs("user")
    async def generate(request: Request) -> Response:
        body = parse(GenerateBody, await read_body(request, state.config.max_body))
        return await _whole(request, state, await _call(state, principal(request), body), listed=False)

    @router.post("/generate_stream")
    @needs("user")
    async def generate_stream(request: Request) -> Response:
        body = parse(GenerateBody, await read_body(request, state.config.max_body))
        return await _stream(request, state, await _call(state, principal(request), body, streams=True))

    @router.post("/")
    @needs("user")
    async def compat(request: Request) -> Response:
        body = parse(CompatBody, await read_body(request, state.config.max_body))
        if body.stream:
            return await _stream(request, state, await _call(state, principal(request), body, streams=True))
        return await _whole(request, state, await _call(state, principal(request), body), listed=True)

    @router.get("/info")
    @needs("user")
    async def info() -> Response:
        about = state.info
        return json_reply(
            {
                "model_id": state.models.base.name,
                "model_sha": about.base.sha256,
                "model_dtype": f"torch.{about.dtype}",
                "model_device_type": about.device,
                "model_pipeline_tag": "text-generation",
                "max_concurrent_requests": state.config.engine.queue,
                "max_best_of": 1,
                "max_input_length": about.max_context - 1,
                "max_total_tokens": about.max_context,
                "version": __version__,
            }
        )

    return router


class LoraxCall:
    """One generation in the form of this protocol."""

    def __init__(self, state: ServerState, model: ServedModel, prompt: str, parameters: Parameters, job: Job) -> None:
        self.state = state
        self.model = model
        self.parameters = parameters
        self.job = job
        self.prompt = prompt if parameters.return_full_text else ""
        self.samples = job.sampling.temperature > 0
        self.started = time.perf_counter()

    def details(self, last: Delta) -> Json:
        """What streamed and whole answers both say at the end."""
        if last.stop_string is not None:
            reason = "stop_sequence"
        else:
            reason = "length" if last.finish == "length" else "eos_token"
        return {
            "finish_reason": reason,
            "prompt_tokens": len(self.job.tokens),
            "generated_tokens": last.completion_tokens,
            "skipped_tokens": 0,
            "seed": self.job.sampling.seed if self.samples else None,
        }

    def text(self, shown: str, last: Delta) -> str:
        """In this protocol a stop sequence is part of the answer."""
        return self.prompt + shown + (last.stop_string or "")

    def token(self, token: Token) -> Json:
        tokenizer = self.model.tokenizer
        named = {
            "id": token.id,
            "text": tokenizer.token_text(token.id) if token.special else token.text,
            "logprob": token.logprob,
            "special": token.special,
            "skipped": False,
        }
        if self.parameters.return_k_alternatives is not None:
            named["alternative_tokens"] = [
                {"id": one.id, "text": tokenizer.token_text(one.id), "logprob": one.logprob} for one in token.top
            ]
        return named

    def prefill(self, logprobs: list[TokenLogprob | None] | None) -> list[Json]:
        if not self.parameters.decoder_input_details:
            return []
        entries = logprobs or [None] * len(self.job.tokens)
        return [
            {
                "id": token,
                "text": self.model.tokenizer.token_text(token),
                "logprob": None if entry is None else finite(entry.logprob),
            }
            for token, entry in zip(self.job.tokens, entries, strict=True)
        ]

    def headers(self, last: Delta | None = None) -> dict[str, str]:
        headers = {
            "x-compute-type": self.state.info.device,
            "x-prompt-tokens": str(len(self.job.tokens)),
            "x-model-id": self.state.models.base.name,
        }
        if self.model.adapter is not None:
            headers |= {"x-adapter-id": self.model.name, "x-adapter-source": self.model.source}
        if last is not None:
            total = len(self.job.tokens) + last.completion_tokens
            headers |= {
                "x-total-time": str(round((time.perf_counter() - self.started) * 1000)),
                "x-generated-tokens": str(last.completion_tokens),
                "x-total-tokens": str(total),
            }
        return headers


async def _call(state: ServerState, caller: Principal, body: GenerateBody, *, streams: bool = False) -> LoraxCall:
    parameters = body.parameters or Parameters()
    if not body.inputs:
        raise UnsupportedFieldError("field 'inputs' is missing or empty", param="inputs", code="invalid_value")
    if streams and parameters.decoder_input_details:
        raise UnsupportedFieldError(
            "'parameters.decoder_input_details' is not supported when streaming, found True",
            param="parameters.decoder_input_details",
        )
    model = await _model(state, caller, parameters)
    prompt, tokens = await _prompt(model, body.inputs, bool(parameters.apply_chat_template))
    info = state.info
    if parameters.truncate is not None:
        tokens = tokens[-parameters.truncate :]
    check_length(tokens, parameters.max_new_tokens, info.max_context, "inputs", "parameters.max_new_tokens")
    job = Job(
        request_id=f"lorax-{uuid.uuid4().hex}",
        caller=caller,
        model=model,
        tokens=tokens,
        sampling=_sampling(parameters, info.max_context - len(tokens), model.stop_ids),
        stop=stops(parameters.stop),
    )
    return LoraxCall(state, model, prompt, parameters, job)


async def _model(state: ServerState, caller: Principal, parameters: Parameters) -> ServedModel:
    source, token = SOURCES.get(parameters.adapter_source), parameters.api_token
    merged = parameters.merged_adapters
    if merged is None:
        return await state.models.get(parameters.adapter_id or None, caller.actor, source=source, token=token)
    if parameters.adapter_id:
        raise UnsupportedFieldError(
            f"'parameters.adapter_id': expected null with merged_adapters, found {parameters.adapter_id!r}",
            param="parameters.adapter_id",
            code="invalid_value",
        )
    method = merged.merge_strategy or "linear"
    if len(merged.weights) != len(merged.ids):
        raise _merge_error(f"expected one for each of {len(merged.ids)} ids", len(merged.weights), "weights")
    if method != "linear" and not merged.density:
        raise _merge_error(f"expected a number above 0 with {method}", merged.density, "density")
    if "ties" not in method and merged.majority_sign_method is not None:
        raise _merge_error(f"expected null with {method}", merged.majority_sign_method, "majority_sign_method")
    spec = MergeSpec(
        adapters=tuple(merged.ids),
        weights=tuple(merged.weights),
        method=method,
        density=None if method == "linear" else merged.density,  # the protocol's client always sends one
        majority_sign_method=merged.majority_sign_method,
    )
    return await state.models.merged(spec, caller.actor, source=source, token=token)


def _merge_error(expected: str, found: object, field: str) -> UnsupportedFieldError:
    path = f"parameters.merged_adapters.{field}"
    return UnsupportedFieldError(f"'{path}': {expected}, found {found!r}", param=path, code="invalid_value")


async def _prompt(model: ServedModel, inputs: str | dict[str, Any], chat: bool) -> tuple[str, list[int]]:
    """The prompt's text and tokens. Raises `InvalidRequestError`."""
    text = inputs if isinstance(inputs, str) else model.render_columns(inputs)
    if chat:
        text = model.chat_prompt([{"role": "user", "content": text}])
    tokens = await model.encode(text, add_special_tokens=not chat)
    if not tokens:
        raise InvalidRequestError("the prompt is empty: no token at all", param="inputs")
    return text, tokens


def _sampling(parameters: Parameters, room: int, stop_ids: tuple[int, ...]) -> SamplingParams:
    """Greedy unless sampling is asked for, by `do_sample` or by a parameter that only has a meaning with it."""
    asked = (parameters.top_k, parameters.top_p, parameters.temperature)
    samples = parameters.do_sample or any(value is not None for value in asked)
    temperature = 1.0 if parameters.temperature is None else parameters.temperature
    return SamplingParams(
        max_tokens=room if parameters.max_new_tokens is None else parameters.max_new_tokens,
        temperature=temperature if samples else 0.0,
        top_k=parameters.top_k or 0,
        top_p=1.0 if parameters.top_p is None else parameters.top_p,
        seed=draw_seed() if parameters.seed is None else parameters.seed,
        stop_token_ids=stop_ids,
        ignore_eos=bool(parameters.ignore_eos_token),
        logprobs=parameters.return_k_alternatives or 0,
        prompt_logprobs=0 if parameters.decoder_input_details else None,
    )


async def _whole(request: Request, state: ServerState, call: LoraxCall, *, listed: bool) -> Response:
    (completion,) = await unless_gone(request, complete_all(state.engine, state.metrics, [call.job]))
    body: Json = {"generated_text": call.text(completion.text, completion.last)}
    if call.parameters.details:
        body["details"] = call.details(completion.last) | {
            "prefill": call.prefill(completion.prompt_logprobs),
            "tokens": [call.token(token) for token in completion.arrived],
        }
    return json_reply([body] if listed else body, headers=call.headers(completion.last))


async def _stream(request: Request, state: ServerState, call: LoraxCall) -> Response:
    deltas = await started(request, generate_all(state.engine, state.metrics, [call.job]))
    response = EventStreamResponse(_events(call, deltas))
    response.headers.update(call.headers())
    return response


async def _events(call: LoraxCall, deltas: AsyncIterator[tuple[int, Delta]]) -> AsyncGenerator[bytes]:
    """One event a token, the last with text and details. No `[DONE]`: this protocol's clients fail on it."""
    completion = Completion()
    waiting: Token | None = None  # the newest token, kept back because the last one carries the end
    assert isinstance(deltas, AsyncGenerator)
    async with aclosing(deltas):
        try:
            async for _, delta in deltas:
                completion.add(delta)
                for token in delta.arrived:
                    if waiting is not None:
                        yield _event(call, waiting)
                    waiting = token
                if waiting is not None and delta.finish is None:
                    yield _event(call, waiting)
                    waiting = None
        except LorikeetError as error:
            yield event(error_body(error), space=False)
            return
    last = completion.last
    if waiting is None:  # the end came in an event of its own; the protocol wants a token with it
        waiting = Token(call.model.tokenizer.eos_id or 0, "", 0, 0.0, [], True)
    details = call.details(last) if call.parameters.details else None
    yield _event(call, waiting, call.text(completion.text, last), details)


def _event(call: LoraxCall, token: Token, text: str | None = None, details: Json | None = None) -> bytes:
    body = {"token": call.token(token), "generated_text": text, "details": details}
    return event(body, space=False)
