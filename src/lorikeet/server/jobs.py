"""`/api/jobs`: training and judging as jobs of the queue, and what they say while they run, as streams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response, WebSocket
from pydantic import Field

from lorikeet.errors import UnsupportedFieldError
from lorikeet.job.orders import log_path
from lorikeet.registry.records import JobState
from lorikeet.server.auth import Caller, needs, principal
from lorikeet.server.following import Cursor, describe, follow, read_log, server_sent, speak
from lorikeet.server.listing import Query, page_reply, plain
from lorikeet.server.platform import Platform
from lorikeet.server.replies import EventStreamResponse, json_reply
from lorikeet.server.state import ServerState
from lorikeet.server.submission import submit_evaluation, submit_training
from lorikeet.server.validation import Body, IdempotencyKey

Json = dict[str, Any]
_STATES: tuple[JobState, ...] = ("queued", "running", "stopping", "completed", "errored", "canceled")


class JobBody(Body):
    """A training makes the next version of `repo`; with `create_repo` the repository too, where it is not there.

    An evaluation judges `adapter` (a reference), or the base alone.
    """

    kind: Literal["train", "eval"] = "train"
    dataset: str
    repo: str | None = None
    create_repo: bool = False
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
        extra = ("adapter", "task") if self.kind == "train" else ("repo", "create_repo", "parent", "priority")
        for name in extra:
            if getattr(self, name):
                raise UnsupportedFieldError(f"'{name}': a job of kind {self.kind} has none", param=name)


def routes(state: ServerState, platform: Platform) -> APIRouter:
    router = APIRouter()
    jobs = platform.catalog.jobs

    @router.get("/api/jobs")
    @needs("user")
    async def list_jobs(request: Request, who: Caller) -> Response:
        query = Query(request, "limit", "after", "state", "repo")
        states = query.text("state")
        chosen = None if states is None else [_state(one) for one in states.split(",")]
        page = await platform.run(
            jobs.page, who, states=chosen, repository=query.text("repo"), after=query.text("after"), limit=query.limit
        )
        return page_reply(page, [describe(job) for job in page.items])

    @router.post("/api/jobs")
    @needs("trainer")
    async def create_job(request: Request, who: Caller, key: IdempotencyKey) -> Response:
        body = await state.body(request, JobBody)
        body.check()
        if body.kind == "train":
            assert body.repo is not None
            job = await platform.run_slow(
                submit_training, platform, who, repository=body.repo, dataset=body.dataset, recipe=body.recipe or {},
                description=body.description, parent=body.parent, priority=body.priority,
                create="" if body.create_repo else None, idempotency_key=key,
            )  # fmt: skip
        else:
            job = await platform.run_slow(
                submit_evaluation, platform, who, dataset=body.dataset, adapter=body.adapter, recipe=body.recipe,
                task=body.task, description=body.description, idempotency_key=key,
            )  # fmt: skip
        return json_reply(describe(job), 201)

    @router.get("/api/jobs/{job_id}")
    @needs("user")
    async def get_job(who: Caller, job_id: str) -> Response:
        return json_reply(describe(await platform.run(jobs.get, who, job_id)))

    @router.post("/api/jobs/{job_id}/cancel")
    @needs("trainer")
    async def cancel_job(who: Caller, job_id: str) -> Response:
        """A queued job is canceled; a running one is `stopping` until it has written its checkpoint."""
        return json_reply(describe(await platform.run(jobs.cancel, who, job_id)))

    @router.post("/api/jobs/{job_id}/resume")
    @needs("trainer")
    async def resume_job(who: Caller, job_id: str) -> Response:
        job = await platform.run(jobs.resume, who, job_id)
        platform.supervisor.wake()
        return json_reply(describe(job))

    _add_what_it_says(router, platform)
    return router


def _add_what_it_says(router: APIRouter, platform: Platform) -> None:
    jobs = platform.catalog.jobs

    @router.get("/api/jobs/{job_id}/events")
    @needs("user")
    async def job_events(request: Request, who: Caller, job_id: str) -> Response:
        query = Query(request, "after", "limit")
        found = await platform.run(jobs.events, who, job_id, after=query.number("after", 0), limit=query.limit)
        following = str(found[-1].id) if len(found) == query.limit else None
        return json_reply({"items": [plain(one) for one in found], "next": following})

    @router.get("/api/jobs/{job_id}/metrics")
    @needs("user")
    async def job_metrics(request: Request, who: Caller, job_id: str) -> Response:
        """Lines in the order they came: of a step that was taken again after a resume, the later one counts.

        `?fields=step,loss`: of each line its id and what it has of these.
        """
        query = Query(request, "after", "limit", "fields")
        limit = query.number("limit", 1000, least=1, most=1000)
        named = query.text("fields")
        found = await platform.run(jobs.metrics, who, job_id, after=query.number("after", 0), limit=limit)
        following = str(found[-1].id) if len(found) == limit else None
        lines = [one.data if named is None else _picked(one.data, named.split(",")) for one in found]
        items = [{"id": one.id, **line} for one, line in zip(found, lines, strict=True)]
        return json_reply({"items": items, "next": following})

    @router.get("/api/jobs/{job_id}/logs")
    @needs("user")
    async def job_logs(request: Request, who: Caller, job_id: str) -> Response:
        """`next` is the byte from which on there may be more."""
        after = Query(request, "after").number("after", 0)
        job = await platform.run(jobs.get, who, job_id)
        text, following = await platform.run_slow(read_log, log_path(platform.home.folder, job.id), after, 2**20)
        return json_reply({"text": text, "next": following})

    @router.get("/api/jobs/{job_id}/stream")
    @needs("user")
    async def stream_job(request: Request, who: Caller, job_id: str) -> Response:
        after = Query(request, "after").text("after")
        cursor = Cursor.parse(after or request.headers.get("last-event-id"))
        await platform.run(jobs.get, who, job_id)
        return EventStreamResponse(server_sent(follow(platform, principal(request), job_id, cursor)))

    @router.websocket("/api/jobs/{job_id}/ws")
    @needs("user")
    async def job_socket(socket: WebSocket, who: Caller, job_id: str) -> None:
        cursor = Cursor.parse(socket.query_params.get("after"))
        await platform.run(jobs.get, who, job_id)
        await speak(socket, follow(platform, principal(socket), job_id, cursor))


def _picked(line: Json, names: Sequence[str]) -> Json:
    return {name: line[name] for name in names if name in line}


def _state(text: str) -> JobState:
    for one in _STATES:
        if text == one:
            return one
    raise UnsupportedFieldError(
        f"'state': expected some of {', '.join(_STATES)}, found {text[:80]!r}", param="state", code="invalid_value"
    )
