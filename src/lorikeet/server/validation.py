"""Bodies of requests: read within a limit, parsed strictly, every objection naming its field.

`null` means absent everywhere; an unknown field, or a known one whose value is not supported, is a 422.
"""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from lorikeet.errors import InvalidRequestError, LorikeetError, UnsupportedFieldError

MAX_LOGPROBS = 20
MAX_CHOICES = 128  # `n`
SHOWN = 80  # characters of an offending value that an error repeats
LISTED = 5  # objections that one reply lists
LINGER = 10.0  # seconds that a client may go on sending a body that is too large


class Body(BaseModel):
    """Base of every body: unknown fields refused, no conversion between types, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class BodyTooLargeError(LorikeetError):
    code = "body_too_large"
    status = 413


AnyBody = TypeVar("AnyBody", bound=Body)


async def _idempotency_key(request: Request) -> str | None:
    return request.headers.get("idempotency-key")


IdempotencyKey = Annotated[str | None, Depends(_idempotency_key)]


async def read_body(request: Request, limit: int) -> bytes:
    """The raw body; `BodyTooLargeError` when it exceeds `limit` bytes, of which no more than that were ever held.

    The rest is taken in and thrown away, for LINGER seconds at most: a connection closed on a client that still
    writes is reset, and the reset would overtake the reply that says what was wrong. A client that asks first
    ("Expect: 100-continue") is told at once.
    """
    too_large = BodyTooLargeError(
        f"the body is larger than {limit} bytes", hint="send fewer prompts in one request, or raise the server's limit"
    )
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        if request.headers.get("expect", "").lower() != "100-continue":
            await _discard(request)
        raise too_large
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            chunks.clear()
            await _discard(request)
            raise too_large
        chunks.append(chunk)
    return b"".join(chunks)


async def _discard(request: Request) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER):
            while (await request.receive()).get("more_body"):
                pass


def parse(kind: type[AnyBody], data: bytes) -> AnyBody:
    """`data` as a body of `kind`. Raises a 400 for what is not JSON, a 422 that names field, value and expectation."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise objection(kind, error.errors(include_url=False)) from None


def objection(kind: type[BaseModel], details: list[ErrorDetails]) -> LorikeetError:
    """Pydantic's findings as one error in our words."""
    first = details[0]
    if first["type"] == "json_invalid":
        return InvalidRequestError(f"the body is not valid JSON: {first['ctx']['error']}", code="malformed_json")
    found = [_one(detail) for detail in details[:LISTED]]
    rest = f" (and {len(details) - LISTED} more)" if len(details) > LISTED else ""
    unknown = first["type"] == "extra_forbidden"
    return UnsupportedFieldError(
        "; ".join(found) + rest,
        param=_path(first) or None,
        code="unknown_field" if unknown else "invalid_value",
        hint=_similar(kind, first) if unknown else None,
    )


def _one(detail: ErrorDetails) -> str:
    path = _path(detail)
    if detail["type"] == "extra_forbidden":
        return f"unknown field '{path}'"
    if detail["type"] == "missing":
        return f"field '{path}' is missing"
    if not path:
        return f"the body must be a JSON object, found {type(detail['input']).__name__}"
    said = detail["msg"].removeprefix("Value error, ").removeprefix("Input ")
    found = "a value that is not repeated here" if path.endswith("api_token") else shown(detail["input"])
    return f"'{path}' {said[:1].lower()}{said[1:]}, found {found}"


def _path(detail: ErrorDetails) -> str:
    return ".".join(str(part) for part in detail["loc"])


def _similar(kind: type[BaseModel], detail: ErrorDetails) -> str | None:
    if len(detail["loc"]) != 1:
        return None
    near = difflib.get_close_matches(str(detail["loc"][0]), kind.model_fields, n=1)
    return f"did you mean '{near[0]}'?" if near else "known fields: " + ", ".join(kind.model_fields)


def shown(value: object) -> str:
    """A value as an error repeats it: short."""
    text = repr(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


# --- fields that several protocols share --------------------------------------------------------------------------


def supported(*values: object) -> BeforeValidator:
    """A field of the protocol of which only `values` (and null) mean something here: those that change nothing."""

    def check(value: object) -> object:
        if value is None or any(value == v and type(value) in (type(v), int, float) for v in values):
            return value
        allowed = " or ".join(map(repr, values))
        raise ValueError("is not supported" + (f"; leave it out or send {allowed}" if values else "; leave it out"))

    return BeforeValidator(check)


def _checked(check: Callable[[Any], None]) -> BeforeValidator:
    def run(value: Any) -> Any:
        if value is not None:
            check(value)
        return value

    return BeforeValidator(run)


def _check_prompt(value: object) -> None:
    fine = isinstance(value, str)
    if isinstance(value, list) and value:
        fine = _texts(value) or _token_ids(value) or all(isinstance(v, list) and _token_ids(v) for v in value)
    if not fine:
        raise ValueError("must be a string, a list of strings, a list of token ids or a list of such lists")


def _texts(values: list[Any]) -> bool:
    return all(type(value) is str for value in values)


def _token_ids(values: list[Any]) -> bool:
    return all(type(value) is int for value in values)


def _check_stop(value: object) -> None:
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list) or not _texts(listed) or "" in listed or len(listed) > 64:
        raise ValueError("must be a non-empty string or a list of at most 64 such strings")


def _check_choices(value: object) -> None:
    if not isinstance(value, list) or not value or not _texts(value) or "" in value:
        raise ValueError("must be a list of non-empty strings")


Unsupported = Annotated[Any, supported()]
ZeroOnly = Annotated[Any, supported(0)]
OneOnly = Annotated[Any, supported(1)]
FalseOnly = Annotated[Any, supported(False)]
EmptyListOnly = Annotated[Any, supported([])]
EmptyObjectOnly = Annotated[Any, supported({})]
EmptyTextOnly = Annotated[Any, supported("")]
TextFormatOnly = Annotated[Any, supported({"type": "text"})]

ApiToken = Annotated[str | None, Field(repr=False, min_length=1, max_length=4096)]
Prompt = Annotated[Any, _checked(_check_prompt)]
Stop = Annotated[Any, _checked(_check_stop)]
GuidedChoice = Annotated[Any, _checked(_check_choices)]
MaxTokens = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1, le=MAX_CHOICES)]
Temperature = Annotated[float, Field(ge=0, le=100)]
TopP = Annotated[float, Field(gt=0, le=1)]
MinP = Annotated[float, Field(ge=0, le=1)]
TopK = Annotated[int, Field(ge=-1)]
Priority = Annotated[int, Field(ge=-(2**31), lt=2**31)]
DeadlineSeconds = Annotated[float, Field(gt=0, le=86_400)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
LogprobCount = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]


def stops(value: str | list[str] | None) -> tuple[str, ...]:
    return () if value is None else (value,) if isinstance(value, str) else tuple(value)
