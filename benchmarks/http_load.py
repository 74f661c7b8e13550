"""The clients of an OpenAI-compatible server, in a process of their own: streams are timed and hardly parsed.

python http_load.py http://127.0.0.1:8000     then one JSON object a line, see `worker.py`
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from typing import Any

import httpx

from load import Json, Trace, summarise
from worker import answer

EMPTY = (b'"text":""', b'"text": ""')


class HttpClients:
    """`extra` goes into every body: the model's name, or what a server takes in its place."""

    def __init__(self, url: str) -> None:
        key = os.environ.get("LORIKEET_API_KEY")
        headers = {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {})}
        # A new connection for each request: llama.cpp's server closes one after each stream and does not say so.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self._runner = asyncio.Runner()
        self._http = httpx.AsyncClient(base_url=url, timeout=600, limits=limits, headers=headers)

    def close(self) -> None:
        self._runner.run(self._http.aclose())
        self._runner.close()

    def models(self) -> Json:
        """Names that the server lists, or why it does not."""

        async def get() -> httpx.Response:
            return await self._http.get("/v1/models")

        try:
            return {"names": [model["id"] for model in self._runner.run(get()).raise_for_status().json()["data"]]}
        except httpx.HTTPError as error:
            return {"error": str(error)}

    def run(self, clients: list[list[tuple[list[int], Json]]], new: int) -> Json:
        """A closed loop: each client sends its next request when the one before has ended."""

        async def client(asks: list[tuple[list[int], Json]]) -> list[Trace]:
            return [await self.stream(Trace(0.0), prompt, extra, new) for prompt, extra in asks]

        async def together() -> list[list[Trace]]:
            return await asyncio.gather(*map(client, clients))

        return summarise(self._runner.run(together()), len(clients[0][0][0]))

    def open_loop(self, arrivals: list[tuple[float, list[int], Json]], new: int) -> Json:
        """Each request at its own time (seconds from the start), whatever has become of those before it.

        Lists, one value a request: seconds to the first token and to the last (None where it failed), how late it was
        sent, and what the server said of those that failed.
        """

        async def one(began: float, at: float, prompt: list[int], extra: Json) -> tuple[Trace, float, str | None]:
            await asyncio.sleep(max(began + at - time.perf_counter(), 0))
            trace = Trace(0.0)
            try:
                await self.stream(trace, prompt, extra, new)
            except (RuntimeError, httpx.HTTPError) as error:
                return trace, trace.sent - began - at, str(error) or type(error).__name__
            return trace, trace.sent - began - at, None

        async def play() -> list[tuple[Trace, float, str | None]]:
            began = time.perf_counter()
            return await asyncio.gather(*(one(began, *arrival) for arrival in arrivals))

        ended = self._runner.run(play())
        return {
            "first": [None if error else trace.times[0] - trace.sent for trace, _, error in ended],
            "last": [None if error else trace.times[-1] - trace.sent for trace, _, error in ended],
            "late": [late for _, late, _ in ended],
            "errors": [error for _, _, error in ended if error],
        }

    def interfere(self, streams: list[tuple[list[int], Json]], arrivals: list[tuple[list[int], Json]],
                  room: int, quiet: int) -> Json:  # fmt: skip
        """Gaps between the tokens of running streams, before and while `arrivals` come in and get their first tokens.

        A stream has `room` tokens to go. The arrivals are sent when each has had about `quiet` of them.
        """

        async def play() -> tuple[list[Trace], float, float, list[Trace]]:
            traces = [Trace(0.0) for _ in streams]
            running = [
                asyncio.ensure_future(self.stream(trace, prompt, extra, room))
                for trace, (prompt, extra) in zip(traces, streams, strict=True)
            ]
            while min(len(trace.times) for trace in traces) < quiet + 2:
                await asyncio.sleep(0.002)
                _raise_errors(running)
            began = time.perf_counter()
            new = await asyncio.gather(*(self.stream(Trace(0.0), *ask, 1) for ask in arrivals))
            ended = time.perf_counter()
            if any(one.done() for one in running):
                raise RuntimeError("a stream ended before the new prompts had their first tokens")
            for one in running:
                one.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            return traces, began, ended, list(new)

        traces, began, ended, new = self._runner.run(play())
        settled = max(trace.times[0] for trace in traces)
        ends = [(b, b - a) for trace in traces for a, b in zip(trace.times, trace.times[1:], strict=False)]
        return {
            "quiet": [gap for at, gap in ends if settled < at - gap and at <= began],
            "disturbed": [gap for at, gap in ends if began < at <= ended],
            "arrival_ttft": [trace.times[0] - trace.sent for trace in new],
        }

    async def stream(self, trace: Trace, prompt: list[int], extra: Json, new: int) -> Trace:
        """One request; pieces with text are timed, the tokens are those of the server's own account."""
        body = {
            "prompt": prompt, "max_tokens": new, "temperature": 0, "ignore_eos": True, "stream": True,
            "stream_options": {"include_usage": True}, **extra,
        }  # fmt: skip
        content = json.dumps(body).encode()
        trace.sent = time.perf_counter()
        rest = b""
        async with self._http.stream("POST", "/v1/completions", content=content) as reply:
            if not reply.is_success:
                raise RuntimeError(f"{reply.status_code}: {(await reply.aread()).decode()[:500]}")
            async for piece in reply.aiter_raw():
                now = time.perf_counter()
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    if line.startswith(b"data: {"):
                        _take(trace, line, now)
        if not trace.tokens:  # a server without `include_usage`
            trace.tokens = len(trace.times)
        if trace.tokens != new or not trace.times:
            raise RuntimeError(f"expected {new} tokens, found {trace.tokens} in {len(trace.times)} pieces; {extra}")
        return trace


def _take(trace: Trace, line: bytes, now: float) -> None:
    if line.startswith(b'data: {"error"'):
        raise RuntimeError(line.decode()[:500])
    if b'"text"' in line and not any(empty in line for empty in EMPTY):
        trace.times.append(now)
    if b'"completion_tokens"' in line:
        trace.tokens = json.loads(line[6:])["usage"]["completion_tokens"]


def _raise_errors(running: list[asyncio.Future[Any]]) -> None:
    for one in running:
        if one.done():
            one.result()


if __name__ == "__main__":
    played = HttpClients(sys.argv[1])
    answer(models=played.models, run=played.run, open_loop=played.open_loop, interfere=played.interfere)
