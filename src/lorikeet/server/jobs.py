"""`/api/jobs`: training and judging as jobs of the queue, and what they say while they run, as streams."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Request, Response, WebSocket, WebSocketDisconnect
from pydantic import Field

from lorikeet.errors import UnsupportedFieldError
from lorikeet.job.orders import log_path
from lorikeet.registry.records import Actor, Job, JobState
from lorikeet.server.auth import needs, principal
from lorikeet.server.listing import Query, page_reply, plain
from lorikeet.server.platform import Platform
from lorikeet.server.replies import EventStreamResponse, event, json_reply
from lorikeet.server.state import ServerState
from lorikeet.server.submission import submit_evaluation, submit_training
from lorikeet.server.validation import Body, parse, read_body

Json = dict[str, Any]
POLL_SECONDS = 0.5
QUIET_SECONDS = 15.0  # after which a stream says that it is still there
BATCH = 500  # events or metrics lines of one look
LOG_BYTES = 64 * 2**10  # of the log in one look
_STATES: tuple[JobState, ...] = ("queued", "running", "stopping", "completed", "errored", "canceled")
_CURSOR = re.compile(r"(\d{1,15})\.(\d{1,15})\.(\d{1,15})")


class JobBody(Body):
    """A training makes the next version of `repo`; an evaluation judges `adapter` (a reference), or the base alone."""

    kind: Literal["train", "eval"] = "train"
    dataset: str
    repo: str | None = None
    adapter: str | None = None
    parent: str | None = None
    task: Annotated[str, Field(max_length=128)] | None = None
    recipe: dict[str, Any] | None = None
    description: Annotated[str, Field(max_length=4000)] = ""
    priority: Annotated[int, Field(ge=-100, le=100)] = 0

    def check(self) -> None:
        """Raise `UnsupportedFieldError` for a field that the kind does not have."""
        if self.kind == "train" and self.repo is None:
            raise UnsupportedFieldError("field 'repo' is missing", param="repo", code="invalid_value")
        extra = ("adapter", "task") if self.kind == "train" else ("repo", "parent", "priority")
        for name in extra:
            if getattr(self, name):
                raise UnsupportedFieldError(f"'{name}': a job of kind {self.kind} has none", param=name)


def routes(state: ServerState, platform: Platform) -> APIRouter:
    router = APIRouter()
    jobs = platform.catalog.jobs

    @router.get("/api/jobs")
    @needs("user")
    async def list_jobs(request: Request) -> Response:
        query = Query(request, "limit", "after", "state", "repo")
        states = query.text("state")
        chosen = None if states is None else [_state(one) for one in states.split(",")]
        page = await platform.run(
            jobs.page, principal(request).actor, states=chosen, repository=query.text("repo"),
            after=query.text("after"), limit=query.limit,
        )  # fmt: skip
        return page_reply(page, [describe(job) for job in page.items])

    @router.post("/api/jobs")
    @needs("trainer")
    async def create_job(request: Request) -> Response:
        body = parse(JobBody, await read_body(request, state.config.max_body))
        body.check()
        who, key = principal(request).actor, request.headers.get("idempotency-key")
        if body.kind == "train":
            assert body.repo is not None
            job = await platform.run_slow(
                submit_training, platform, who, repository=body.repo, dataset=body.dataset, recipe=body.recipe or {},
                description=body.description, parent=body.parent, priority=body.priority, idempotency_key=key,
            )  # fmt: skip
        else:
            job = await platform.run_slow(
                submit_evaluation, platform, who, dataset=body.dataset, adapter=body.adapter, recipe=body.recipe,
                task=body.task, description=body.description, idempotency_key=key,
            )  # fmt: skip
        return json_reply(describe(job), 201)

    @router.get("/api/jobs/{job_id}")
    @needs("user")
    async def get_job(request: Request, job_id: str) -> Response:
        return json_reply(describe(await platform.run(jobs.get, principal(request).actor, job_id)))

    @router.post("/api/jobs/{job_id}/cancel")
    @needs("trainer")
    async def cancel_job(request: Request, job_id: str) -> Response:
        """A queued job is canceled; a running one is `stopping` until it has written its checkpoint."""
        return json_reply(describe(await platform.run(jobs.cancel, principal(request).actor, job_id)))

    @router.post("/api/jobs/{job_id}/resume")
    @needs("trainer")
    async def resume_job(request: Request, job_id: str) -> Response:
        job = await platform.run(jobs.resume, principal(request).actor, job_id)
        platform.supervisor.wake()
        return json_reply(describe(job))

    _add_what_it_says(router, platform)
    return router


def _add_what_it_says(router: APIRouter, platform: Platform) -> None:
    jobs = platform.catalog.jobs

    @router.get("/api/jobs/{job_id}/events")
    @needs("user")
    async def job_events(request: Request, job_id: str) -> Response:
        query = Query(request, "after", "limit")
        found = await platform.run(
            jobs.events, principal(request).actor, job_id, after=query.number("after", 0), limit=query.limit
        )
        following = str(found[-1].id) if len(found) == query.limit else None
        return json_reply({"items": [plain(one) for one in found], "next": following})

    @router.get("/api/jobs/{job_id}/metrics")
    @needs("user")
    async def job_metrics(request: Request, job_id: str) -> Response:
        """Lines in the order they came: of a step that was taken again after a resume, the later one counts."""
        query = Query(request, "after", "limit")
        limit = query.number("limit", 1000, least=1, most=1000)
        found = await platform.run(
            jobs.metrics, principal(request).actor, job_id, after=query.number("after", 0), limit=limit
        )
        following = str(found[-1].id) if len(found) == limit else None
        return json_reply({"items": [{"id": one.id, **one.data} for one in found], "next": following})

    @router.get("/api/jobs/{job_id}/logs")
    @needs("user")
    async def job_logs(request: Request, job_id: str) -> Response:
        """`next` is the byte from which on there may be more."""
        after = Query(request, "after").number("after", 0)
        job = await platform.run(jobs.get, principal(request).actor, job_id)
        text, following = await platform.run_slow(read_log, log_path(platform.home.folder, job.id), after, 2**20)
        return json_reply({"text": text, "next": following})

    @router.get("/api/jobs/{job_id}/stream")
    @needs("user")
    async def stream_job(request: Request, job_id: str) -> Response:
        who, after = principal(request).actor, Query(request, "after").text("after")
        cursor = Cursor.parse(after or request.headers.get("last-event-id"))
        await platform.run(jobs.get, who, job_id)
        return EventStreamResponse(_server_sent(follow(platform, who, job_id, cursor)))

    @router.websocket("/api/jobs/{job_id}/ws")
    @needs("user")
    async def job_socket(socket: WebSocket, job_id: str) -> None:
        who = principal(socket).actor
        cursor = Cursor.parse(socket.query_params.get("after"))
        await platform.run(jobs.get, who, job_id)
        await socket.accept()
        leaving = asyncio.create_task(_until_left(socket))
        try:
            async with aclosing(follow(platform, who, job_id, cursor)) as messages:
                async for message in messages:
                    if leaving.done():
                        return
                    if message is not None:
                        await socket.send_text(msgspec.json.encode(message).decode())
            await socket.close()
        except (WebSocketDisconnect, RuntimeError):
            pass  # the client is gone
        finally:
            leaving.cancel()
            await asyncio.wait([leaving])


async def _until_left(socket: WebSocket) -> None:
    with suppress(WebSocketDisconnect, RuntimeError):
        while True:
            await socket.receive_text()


# --- what a job says ----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Cursor:
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


async def follow(platform: Platform, who: Actor, job_id: str, cursor: Cursor) -> AsyncGenerator[Json | None]:
    """Messages of a job until it has ended and all is said; None where there was nothing to say for a while."""
    quiet, last = 0.0, None
    while True:
        job, messages = await platform.run(_look, platform, who, job_id, cursor)
        described = describe(job)
        if described != last:
            last = described
            messages.append({"type": "state", "job": described, "cursor": str(cursor)})
        for message in messages:
            yield message
        if job.ended and len(messages) <= 1:  # nothing came since it ended
            return
        quiet = 0.0 if messages else quiet + POLL_SECONDS
        if quiet >= QUIET_SECONDS:
            quiet = 0.0
            yield None
        if not job.ended:
            await asyncio.sleep(POLL_SECONDS)


def _look(platform: Platform, who: Actor, job_id: str, cursor: Cursor) -> tuple[Job, list[Json]]:
    """The job, and what it said since the cursor, which moves on. The job comes first: it says no more once over."""
    jobs = platform.catalog.jobs
    job = jobs.get(who, job_id)
    messages: list[Json] = []
    for one in jobs.events(who, job_id, after=cursor.event, limit=BATCH):
        cursor.event = one.id
        messages.append({"type": "event", **plain(one), "cursor": str(cursor)})
    for line in jobs.metrics(who, job_id, after=cursor.metric, limit=BATCH):
        cursor.metric = line.id
        messages.append({"type": "metric", "id": line.id, **line.data, "cursor": str(cursor)})
    text, following = read_log(log_path(platform.home.folder, job.id), cursor.log, LOG_BYTES)
    if text:
        cursor.log = following
        messages.append({"type": "log", "text": text, "cursor": str(cursor)})
    return job, messages


async def _server_sent(messages: AsyncGenerator[Json | None]) -> AsyncGenerator[bytes]:
    async with aclosing(messages):
        async for message in messages:
            yield b": still here\n\n" if message is None else b"id: %s\n" % message["cursor"].encode() + event(message)


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


def _state(text: str) -> JobState:
    for one in _STATES:
        if text == one:
            return one
    raise UnsupportedFieldError(
        f"'state': expected some of {', '.join(_STATES)}, found {text[:80]!r}", param="state", code="invalid_value"
    )
