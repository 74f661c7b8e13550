"""What a job says while it runs, from whatever point on: looked up twice a second until it has ended.

Streams end with a last word of their own when the key that opened them opens nothing any more, see `revocation`.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from fastapi import WebSocket, WebSocketDisconnect
from starlette.status import WS_1008_POLICY_VIOLATION as WS_POLICY_VIOLATION
from starlette.status import WS_1011_INTERNAL_ERROR as WS_INTERNAL_ERROR

from lorikeet.errors import LorikeetError, UnsupportedFieldError
from lorikeet.job.orders import log_path
from lorikeet.registry.records import Actor, Job, JobEvent, JobMetric
from lorikeet.server.auth import Principal
from lorikeet.server.listing import plain
from lorikeet.server.platform import Platform
from lorikeet.server.replies import event, last_word

Json = dict[str, Any]
POLL_SECONDS = 0.5
QUIET_SECONDS = 15.0  # after which a stream says that it is still there
BATCH = 500  # events or metrics lines of one look
LOG_BYTES = 64 * 2**10  # of the log in one look
_CURSOR = re.compile(r"(\d{1,15})\.(\d{1,15})\.(\d{1,15})")


class Cursor(NamedTuple):
    """How far a stream has come: the last event, the last metrics line, and the bytes of the log."""

    event: int = 0
    metric: int = 0
    log: int = 0

    @staticmethod
    def parse(text: str | None) -> Cursor:
        if not text:
            return Cursor()
        found = _CURSOR.fullmatch(text)
        if found is None:
            raise UnsupportedFieldError(
                f"'after': expected the cursor of a message such as 3.120.800, found {text[:80]!r}", param="after",
                code="invalid_value",
            )  # fmt: skip
        return Cursor(*map(int, found.groups()))

    def __str__(self) -> str:
        return f"{self.event}.{self.metric}.{self.log}"


@dataclass(frozen=True, slots=True)
class Look:
    """The job at a moment, and what it had said by then since the look before; `cursor` stands behind all of it."""

    job: Job
    events: list[JobEvent]
    metrics: list[JobMetric]
    log: str
    cursor: Cursor

    @property
    def is_empty(self) -> bool:
        return not (self.events or self.metrics or self.log)

    @property
    def is_full(self) -> bool:
        """There is more already."""
        return BATCH in (len(self.events), len(self.metrics))


async def looks(platform: Platform, caller: Principal, job_id: str, cursor: Cursor) -> AsyncGenerator[Look]:
    """A look each `POLL_SECONDS`, also when there is nothing new, until the job has ended and all is said.

    Raises `NotFoundError`, and `KeyRevokedError` once the caller's key opens nothing any more.
    """
    revoked: list[LorikeetError] = []
    with caller.ending(revoked.append):
        while True:
            look = await platform.run(_look, platform, caller.actor, job_id, cursor)
            if revoked:
                raise revoked[0]
            yield look
            cursor = look.cursor
            if look.job.ended and look.is_empty:
                return
            if not look.job.ended and not look.is_full:
                await asyncio.sleep(POLL_SECONDS)


def _look(platform: Platform, who: Actor, job_id: str, cursor: Cursor) -> Look:
    """The log comes last: by the time the catalog says that a job is over, its log says so, too."""
    job, events, metrics = platform.catalog.jobs.news(
        who, job_id, event=cursor.event, metric=cursor.metric, limit=BATCH
    )
    text, following = read_log(log_path(platform.home.folder, job.id), cursor.log, LOG_BYTES)
    cursor = Cursor(events[-1].id if events else cursor.event, metrics[-1].id if metrics else cursor.metric, following)
    return Look(job, events, metrics, text, cursor)


async def follow(platform: Platform, caller: Principal, job_id: str, cursor: Cursor) -> AsyncGenerator[Json | None]:
    """The messages of `looks`; None for a look that found nothing new."""
    last: Json | None = None
    async with aclosing(looks(platform, caller, job_id, cursor)) as found:
        async for look in found:
            said = False
            for message in _messages(look, cursor):
                said = True
                yield message
            cursor, described = look.cursor, describe(look.job)
            if described != last:
                last, said = described, True
                yield {"type": "state", "job": described, "cursor": str(cursor)}
            if not said:
                yield None


def _messages(look: Look, cursor: Cursor) -> list[Json]:
    """Each with the cursor to go on from behind it."""
    messages: list[Json] = []
    for one in look.events:
        cursor = cursor._replace(event=one.id)
        messages.append({"type": "event", **plain(one), "cursor": str(cursor)})
    for line in look.metrics:
        cursor = cursor._replace(metric=line.id)
        messages.append({"type": "metric", "id": line.id, **line.data, "cursor": str(cursor)})
    if look.log:
        messages.append({"type": "log", "text": look.log, "cursor": str(look.cursor)})
    return messages


async def server_sent(messages: AsyncGenerator[Json | None]) -> AsyncGenerator[bytes]:
    """Server-sent events; a comment now and then while there are none."""
    quiet = 0.0
    async with aclosing(messages):
        try:
            async for message in messages:
                if message is not None:
                    quiet = 0.0
                    yield b"id: %s\n" % message["cursor"].encode() + event(message)
                    continue
                quiet += POLL_SECONDS
                if quiet >= QUIET_SECONDS:
                    quiet = 0.0
                    yield b": still here\n\n"
        except LorikeetError as error:
            yield event(last_word(error))


async def speak(
    socket: WebSocket, messages: AsyncGenerator[Json | None], word: Callable[[LorikeetError], Json] | None = last_word
) -> None:
    """Accept the socket and send messages until they end or the client leaves; None sends nothing.

    An error ends them with a message of `word`, where there is one, and closes the socket with its code as reason.
    """
    await socket.accept()
    leaving = asyncio.create_task(_until_left(socket))
    try:
        async with aclosing(messages):
            try:
                async for message in messages:
                    if leaving.done():
                        return
                    if message is not None:
                        await _send(socket, message)
            except LorikeetError as error:
                if word is not None:
                    await _send(socket, word(error))
                await socket.close(WS_POLICY_VIOLATION if error.status < 500 else WS_INTERNAL_ERROR, error.code)
                return
        await socket.close()
    except (WebSocketDisconnect, RuntimeError):
        pass  # the client is gone
    finally:
        leaving.cancel()
        await asyncio.wait([leaving])


async def _send(socket: WebSocket, message: Json) -> None:
    await socket.send_text(msgspec.json.encode(message).decode())


async def _until_left(socket: WebSocket) -> None:
    with suppress(RuntimeError):
        while (await socket.receive())["type"] != "websocket.disconnect":
            pass


def read_log(path: Path, start: int, limit: int) -> tuple[str, int]:
    """Whole lines of the log from byte `start` on, and where the next begins."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(limit)
    except FileNotFoundError:
        return "", start
    end = data.rfind(b"\n") + 1
    if not end and len(data) == limit:
        end = limit  # a line longer than that
    return data[:end].decode("utf-8", "replace"), start + end


def describe(job: Job) -> Json:
    """A job as the API shows it."""
    spec = job.spec
    return {
        "id": job.id, "kind": "eval" if job.kind == "evaluate" else "train", "state": job.state, "stage": job.stage,
        "description": job.description, "base": job.base, "repo": job.repository, "version": job.number,
        "dataset": spec.get("dataset"), "adapter": spec.get("adapter"), "task": spec.get("task"),
        "recipe": spec.get("recipe"), "parent_id": job.parent_id, "parent_step": job.parent_step,
        "progress": job.progress, "result": job.result, "error": job.error, "priority": job.priority,
        "memory": job.memory, "attempts": job.attempts, "max_attempts": job.max_attempts,
        "created": job.created, "created_by": job.created_by, "started": job.started, "finished": job.finished,
    }  # fmt: skip
