"""Bodies of the OpenAI routes, and how they become sampling parameters.

Beyond the protocol: `top_k`, `min_p`, `ignore_eos`, `guided_choice` (the answer is exactly one of these strings),
`api_token` (what the source of a `model` such as `hf://org/name` asks for), `priority` (among requests on the same
model the lowest is next), `deadline_seconds` (after which the request ends with a 504).
"""

from __future__ import annotations

import secrets
import time
from typing import Annotated, Any, Literal

from pydantic import Field

from lorikeet.errors import UnsupportedFieldError
from lorikeet.server.models import ServedModel
from lorikeet.server.validation import (
    ApiToken,
    Body,
    Count,
    DeadlineSeconds,
    EmptyListOnly,
    EmptyObjectOnly,
    EmptyTextOnly,
    FalseOnly,
    GuidedChoice,
    LogprobCount,
    MaxTokens,
    MinP,
    Priority,
    Prompt,
    Seed,
    Stop,
    Temperature,
    TextFormatOnly,
    TopK,
    TopP,
    Unsupported,
    ZeroOnly,
    supported,
)
from lorikeet.types import SamplingParams

DEFAULT_MAX_TOKENS = 16  # of /v1/completions, the protocol's; a chat goes on to the end of the context


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: FalseOnly = None


class GenerationBody(Body):
    """What both routes take. Metadata that asks for no effect (`user`) is taken; what would have one is refused."""

    model: str | None = None  # absent, or empty as the `predibase` SDK sends it: the base
    api_token: ApiToken = None
    max_tokens: MaxTokens | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    n: Count | None = None
    seed: Seed | None = None
    stop: Stop = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    guided_choice: GuidedChoice = None
    priority: Priority | None = None
    deadline_seconds: DeadlineSeconds | None = None
    user: str | None = None
    frequency_penalty: ZeroOnly = None
    presence_penalty: ZeroOnly = None
    logit_bias: EmptyObjectOnly = None

    @property
    def count(self) -> int:
        return self.n or 1

    @property
    def deadline(self) -> float | None:
        """In seconds since the epoch."""
        return None if self.deadline_seconds is None else time.time() + self.deadline_seconds

    def check_stream_options(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise UnsupportedFieldError(
                "'stream_options' is only for 'stream': true", param="stream_options", code="invalid_value"
            )

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling(
        self, model: ServedModel, *, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None = None
    ) -> SamplingParams:
        """Protocol defaults filled in, a seed drawn where none is given."""
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=max(self.top_k or 0, 0),
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=self.min_p or 0.0,
            seed=draw_seed() if self.seed is None else self.seed % 2**63,
            stop_token_ids=model.stop_ids,
            ignore_eos=bool(self.ignore_eos),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            choices=self.choices(model),
        )

    def choices(self, model: ServedModel) -> tuple[tuple[int, ...], ...] | None:
        if self.guided_choice is None:
            return None
        encoded = model.tokenizer.encode_batch(list(dict.fromkeys(self.guided_choice)), add_special_tokens=False)
        return tuple(tuple(one) for one in encoded)


class CompletionBody(GenerationBody):
    """POST /v1/completions"""

    prompt: Prompt = None
    echo: bool | None = None
    logprobs: LogprobCount | None = None
    suffix: EmptyTextOnly = None
    best_of: Count | None = None

    def check(self) -> None:
        """What no single field shows."""
        self.check_stream_options()
        if self.prompt is None:
            raise UnsupportedFieldError("field 'prompt' is missing", param="prompt", code="invalid_value")
        if self.best_of is not None and self.best_of != self.count:
            raise UnsupportedFieldError(
                f"'best_of' is not supported unless it equals 'n' ({self.count}), found {self.best_of}", param="best_of"
            )


class TextPart(Body):
    type: Literal["text"]
    text: str


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str | list[TextPart], Field(union_mode="left_to_right")] | None = None
    name: str | None = None
    refusal: Unsupported = None
    audio: Unsupported = None
    function_call: Unsupported = None
    tool_calls: EmptyListOnly = None

    def plain(self) -> dict[str, str]:
        """As chat templates read it: text parts joined; `developer` is the protocol's newer name for `system`."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        message = {"role": "system" if self.role == "developer" else self.role, "content": text}
        return message if self.name is None else {**message, "name": self.name}


class ChatBody(GenerationBody):
    """POST /v1/chat/completions"""

    messages: list[ChatMessage] | None = None
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: LogprobCount | None = None
    response_format: TextFormatOnly = None
    tools: EmptyListOnly = None
    tool_choice: Annotated[Any, supported("none", "auto")] = None
    parallel_tool_calls: Annotated[Any, supported(False, True)] = None
    functions: EmptyListOnly = None
    function_call: Annotated[Any, supported("none", "auto")] = None
    modalities: Annotated[Any, supported(["text"])] = None
    audio: Unsupported = None
    prediction: Unsupported = None
    reasoning_effort: Unsupported = None
    verbosity: Unsupported = None
    web_search_options: Unsupported = None
    service_tier: Annotated[Any, supported("auto", "default")] = None
    store: FalseOnly = None
    metadata: EmptyObjectOnly = None

    def check(self) -> None:
        """What no single field shows."""
        self.check_stream_options()
        if not self.messages:
            said = "is missing" if self.messages is None else "must hold at least one message"
            raise UnsupportedFieldError(f"field 'messages' {said}", param="messages", code="invalid_value")
        for i, message in enumerate(self.messages):
            if message.content is None:
                where = f"messages.{i}.content"
                raise UnsupportedFieldError(f"field '{where}' is missing", param=where, code="invalid_value")
        if self.top_logprobs is not None and not self.logprobs:
            raise UnsupportedFieldError(
                "'top_logprobs' is only for 'logprobs': true", param="top_logprobs", code="invalid_value"
            )
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise UnsupportedFieldError(
                "'max_tokens' and 'max_completion_tokens' are two names of one limit; send one of them",
                param="max_tokens",
                code="invalid_value",
            )

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens


class TokenizeBody(Body):
    """POST /tokenize"""

    prompt: str
    model: str | None = None
    add_special_tokens: bool | None = None


class DetokenizeBody(Body):
    """POST /detokenize"""

    tokens: list[int]
    model: str | None = None


def draw_seed() -> int:
    return secrets.randbits(53)  # as many bits as every JSON reader keeps
