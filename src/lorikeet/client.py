"""The Python SDK: a Lorikeet server over HTTP, sync and async.

    from lorikeet import Client

    client = Client("http://127.0.0.1:8000")
    print(client.complete("Customer: where is my parcel?\\nIntent:", model="intent", temperature=0).text)
    for piece in client.stream_chat([{"role": "user", "content": "Hello"}]):
        print(piece, end="")

Fields of a request are the OpenAI protocol's (and Lorikeet's extensions: `top_k`, `min_p`, `guided_choice`, ...); the
server refuses what it does not know by name. Errors are `LorikeetError`s with the server's code, status and hint.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import httpx

from lorikeet.errors import ConfigError, LorikeetError, UnavailableError
from lorikeet.types import ErrorInfo

Fields = Mapping[str, Any]
Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer. `raw` is the server's whole reply; `seconds` from sending to the last byte."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    raw: dict[str, Any]


def _completion(reply: httpx.Response, started: float) -> Completion:
    body = _checked(reply)
    choice, usage = body["choices"][0], body["usage"]
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    return Completion(
        text=text,
        finish_reason=choice["finish_reason"],
        prompt_tokens=usage["prompt_tokens"],
        completion_tokens=usage["completion_tokens"],
        seconds=time.perf_counter() - started,
        raw=body,
    )


def _checked(reply: httpx.Response) -> Any:
    if reply.is_success:
        return reply.json()
    try:
        error = reply.json()["error"]
    except (ValueError, KeyError, TypeError):
        error = {"message": reply.text[:500] or reply.reason_phrase}
    raise _error(error, reply.status_code, reply.headers.get("retry-after"))


def _error(error: Any, status: int, retry_after: str | None = None) -> LorikeetError:
    """The server's error object as an exception."""
    if not isinstance(error, dict):
        error = {"message": str(error)}
    return LorikeetError.from_info(
        ErrorInfo(
            code=str(error.get("code") or error.get("type") or "error"),
            message=str(error.get("message", "the server gave no message")),
            status=status,
            hint=error.get("hint"),
            retryable=bool(error.get("retryable", status in (429, 503))),
            retry_after=float(retry_after) if retry_after else None,
            param=error.get("param"),
        )
    )


def _checked_url(url: str) -> str:
    """Raise `ConfigError` for what is no address of a server."""
    with suppress(httpx.InvalidURL):
        parsed = httpx.URL(url)
        if parsed.scheme in ("http", "https") and parsed.host:
            return url
    raise ConfigError(f"url: found {url!r}; expected such as http://127.0.0.1:8000", param="url")


@contextmanager
def _reaching(http: httpx.Client | httpx.AsyncClient) -> Iterator[None]:
    """What goes wrong on the way to the server and back, in our words."""
    try:
        yield
    except httpx.TransportError as error:
        raise _nobody(http, error) from None


def _nobody(http: httpx.Client | httpx.AsyncClient, error: httpx.TransportError) -> UnavailableError:
    said = str(error) or type(error).__name__
    if not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return UnavailableError(f"the connection to {http.base_url} broke: {said}", hint="try again")
    return UnavailableError(
        f"no server answers at {http.base_url}: {said}",
        hint="start one with `lorikeet serve` or `lorikeet up`, or name its address",
    )


def _delta(line: str) -> str | None:
    """The text of one SSE line; None where it carries none. An error in the stream is raised."""
    if not line.startswith("data:"):
        return None
    data = line[5:].strip()
    if data == "[DONE]":
        return None
    event = json.loads(data)
    if "error" in event:
        raise _error(event["error"], 200)
    if not event["choices"]:
        return None
    choice = event["choices"][0]
    text = choice["text"] if "text" in choice else choice["delta"].get("content")
    return text or None


def _body(key: str, value: object, model: str | None, fields: Fields) -> dict[str, Any]:
    return {key: value, **({} if model is None else {"model": model}), **fields}


def _headers(api_key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


class Client:
    """A server, synchronously. Use it as a context manager, or `close()` it."""

    def __init__(self, url: str = "http://127.0.0.1:8000", *, api_key: str | None = None, timeout: float = 600.0):
        self._http = httpx.Client(base_url=_checked_url(url), headers=_headers(api_key), timeout=timeout)

    def models(self) -> list[dict[str, Any]]:
        """The base and every adapter, as `/v1/models` lists them."""
        with _reaching(self._http):
            models: list[dict[str, Any]] = _checked(self._http.get("/v1/models"))["data"]
        return models

    def complete(self, prompt: str | Sequence[int], *, model: str | None = None, **fields: Any) -> Completion:
        started = time.perf_counter()
        return _completion(self._http.post("/v1/completions", json=_body("prompt", prompt, model, fields)), started)

    def chat(self, messages: Messages, *, model: str | None = None, **fields: Any) -> Completion:
        started = time.perf_counter()
        reply = self._http.post("/v1/chat/completions", json=_body("messages", messages, model, fields))
        return _completion(reply, started)

    def stream(self, prompt: str | Sequence[int], *, model: str | None = None, **fields: Any) -> Iterator[str]:
        """Pieces of text as they come."""
        yield from self._stream("/v1/completions", _body("prompt", prompt, model, fields))

    def stream_chat(self, messages: Messages, *, model: str | None = None, **fields: Any) -> Iterator[str]:
        yield from self._stream("/v1/chat/completions", _body("messages", messages, model, fields))

    def _stream(self, path: str, body: dict[str, Any]) -> Iterator[str]:
        with self._http.stream("POST", path, json={**body, "stream": True}) as reply:
            if not reply.is_success:
                reply.read()
                _checked(reply)
            for line in reply.iter_lines():
                if (text := _delta(line)) is not None:
                    yield text

    def api(self, method: str, path: str, body: Fields | None = None, **query: Any) -> Any:
        """A call of the platform's API, such as `api("GET", "/api/jobs", limit=5)`; None where it answers nothing."""
        chosen = {name: value for name, value in query.items() if value is not None}
        with _reaching(self._http):
            reply = self._http.request(method, path, json=body, params=chosen or None)
        return None if reply.status_code == 204 else _checked(reply)

    def events(self, path: str, **query: Any) -> Iterator[dict[str, Any]]:
        """The JSON of each server-sent event, such as `events("/api/jobs/ID/stream")`, until the server ends them.

        Raises `LorikeetError` where it ends them early, such as when the key was revoked.
        """
        timeout = httpx.Timeout(600.0, read=60.0)
        with _reaching(self._http), self._http.stream("GET", path, params=query or None, timeout=timeout) as reply:
            if not reply.is_success:
                reply.read()
                _checked(reply)
            for line in reply.iter_lines():
                if line.startswith("data:"):
                    message = json.loads(line[5:])
                    if message.get("type") == "error":
                        raise _error(message["error"], 200)
                    yield message

    def ready(self) -> bool:
        """True when the server takes requests; False while it starts, drains or cannot be reached."""
        try:
            return self._http.get("/health/ready").is_success
        except httpx.TransportError:
            return False

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class AsyncClient:
    """A server, asynchronously."""

    def __init__(self, url: str = "http://127.0.0.1:8000", *, api_key: str | None = None, timeout: float = 600.0):
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        self._http = httpx.AsyncClient(
            base_url=_checked_url(url), headers=_headers(api_key), timeout=timeout, limits=limits
        )

    async def models(self) -> list[dict[str, Any]]:
        with _reaching(self._http):
            models: list[dict[str, Any]] = _checked(await self._http.get("/v1/models"))["data"]
        return models

    async def complete(self, prompt: str | Sequence[int], *, model: str | None = None, **fields: Any) -> Completion:
        started = time.perf_counter()
        reply = await self._http.post("/v1/completions", json=_body("prompt", prompt, model, fields))
        return _completion(reply, started)

    async def chat(self, messages: Messages, *, model: str | None = None, **fields: Any) -> Completion:
        started = time.perf_counter()
        reply = await self._http.post("/v1/chat/completions", json=_body("messages", messages, model, fields))
        return _completion(reply, started)

    async def stream(
        self, prompt: str | Sequence[int], *, model: str | None = None, **fields: Any
    ) -> AsyncIterator[str]:
        body = {**_body("prompt", prompt, model, fields), "stream": True}
        async with self._http.stream("POST", "/v1/completions", json=body) as reply:
            if not reply.is_success:
                await reply.aread()
                _checked(reply)
            async for line in reply.aiter_lines():
                if (text := _delta(line)) is not None:
                    yield text

    async def many(
        self,
        bodies: Sequence[Fields],
        *,
        concurrency: int = 32,
        patience: float = 60.0,
        on_done: Callable[[int], None] | None = None,
    ) -> list[Completion]:
        """Send every body (`prompt` or `messages` among its fields), `concurrency` at a time, in order of the list.

        A reply that says "try again" (429, 503) is tried again for up to `patience` seconds; any other error is
        raised. `on_done` is told the index of each body as it ends.
        """
        gate = asyncio.Semaphore(concurrency)

        async def one(index: int, body: Fields) -> Completion:
            path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
            async with gate:
                until = time.monotonic() + patience
                while True:
                    started = time.perf_counter()
                    try:
                        completion = _completion(await self._http.post(path, json=body), started)
                    except LorikeetError as error:
                        if not error.retryable or time.monotonic() > until:
                            raise
                        await asyncio.sleep(error.retry_after or 1.0)
                    except httpx.ConnectError as error:
                        raise _nobody(self._http, error) from None
                    else:
                        if on_done is not None:
                            on_done(index)
                        return completion

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(i, body)) for i, body in enumerate(bodies)]
        return [task.result() for task in tasks]

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()
