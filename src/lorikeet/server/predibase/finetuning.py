"""`pb.finetuning.jobs`: create, get, list, cancel, and what `watch` reads: status, timeline, stream of metrics."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response, WebSocket

from lorikeet.data.formats import read_rows
from lorikeet.errors import DataError, UnsupportedFieldError
from lorikeet.registry.records import Actor, Dataset, Job, JobMetric
from lorikeet.server.auth import Principal, needs, principal
from lorikeet.server.following import Cursor, looks, speak
from lorikeet.server.listing import Query
from lorikeet.server.platform import Platform
from lorikeet.server.predibase import records
from lorikeet.server.predibase.classify import MAX_LABELS
from lorikeet.server.predibase.config import FinetuningConfig, parse_config, recipe_of
from lorikeet.server.predibase.repeats import Intentions, fingerprint
from lorikeet.server.replies import json_reply
from lorikeet.server.state import ServerState
from lorikeet.server.submission import submit_training
from lorikeet.server.validation import Body, EmptyObjectOnly, parse, read_body


class CostBody(Body):
    """What the SDK knows of a job before it creates it. Nothing depends on it but whom the question is about."""

    baseModel: Any = None
    datasetName: Any = None
    taskType: Any = None
    adapterType: Any = None
    epochs: Any = None
    trainSteps: Any = None
    numGenerations: Any = None
    maxTokens: Any = None


class CreateBody(Body):
    params: dict[str, Any]
    dataset: str
    repo: str
    continueFromVersion: str | None = None
    description: str | None = None
    computeSpec: EmptyObjectOnly = None


def routes(state: ServerState, platform: Platform) -> APIRouter:
    router = APIRouter()
    catalog = platform.catalog
    intentions = Intentions()
    creating = asyncio.Lock()

    def described(job: Job) -> dict[str, Any]:
        return records.finetuning_job(job, state.info.device)

    @router.get("/v2/finetuning/jobs/cost-estimate")
    @needs("user")
    async def cost(request: Request) -> Response:
        """Nothing is billed; that somebody asks is remembered, see `Intentions`."""
        who = principal(request).actor
        asked = parse(CostBody, await read_body(request, state.config.max_body))
        intentions.asked(who.tenant, who.name, *_about(asked.datasetName, asked.baseModel))
        return json_reply({})

    @router.post("/v2/finetuning/jobs")
    @needs("trainer")
    async def create(request: Request) -> Response:
        who = principal(request).actor
        body = parse(CreateBody, await read_body(request, state.config.max_body))
        config = parse_config(body.params)
        since = intentions.since(who.tenant, who.name, *_about(body.dataset, body.params.get("base_model")))
        async with creating:  # a repeat may come while the first is still at work
            job = await platform.run_slow(_create, platform, state.models.base.name, who, body, config, since)
        return json_reply(described(job))

    @router.get("/v2/finetuning/jobs")
    @needs("user")
    async def listing(request: Request) -> Response:
        page = await platform.run(catalog.jobs.page, principal(request).actor, limit=Query(request, "limit").limit)
        return json_reply({"data": {"jobs": [described(one) for one in page.items if one.kind == "train"]}})

    @router.get("/v2/finetuning/jobs/{job}")
    @needs("user")
    async def get(request: Request, job: str) -> Response:
        return json_reply(described(await platform.run(catalog.jobs.get, principal(request).actor, job)))

    @router.post("/v2/finetuning/jobs/{job}/cancel")
    @needs("trainer")
    async def cancel(request: Request, job: str) -> Response:
        return json_reply(described(await platform.run(catalog.jobs.cancel, principal(request).actor, job)))

    @router.get("/v2/finetuning/jobs/{job}/timeline")
    @needs("user")
    async def timeline(request: Request, job: str) -> Response:
        who = principal(request).actor
        found = await platform.run(catalog.jobs.get, who, job)
        return json_reply(records.timeline(found, await platform.run(catalog.jobs.events, who, job)))

    @router.websocket("/v2/finetuning/jobs/{job}/metrics/stream")
    @needs("user")
    async def stream(socket: WebSocket, job: str) -> None:
        caller = principal(socket)
        await platform.run(catalog.jobs.get, caller.actor, job)
        await speak(socket, _told(platform, caller, job), word=None)

    return router


def _about(dataset: Any, base: Any) -> tuple[str, str]:
    return str(dataset or "").rpartition("/")[2], str(base or "")


# --- create -------------------------------------------------------------------------------------------------------


def _create(platform: Platform, base: str, who: Actor, body: CreateBody, config: FinetuningConfig, since: float) -> Job:
    """The job, or that which this very request made before."""
    request = fingerprint(msgspec.to_builtins(body.model_dump()))
    for one in platform.catalog.jobs.page(who, repository=body.repo).items:
        if one.created > since and one.created_by == who.name and records.notes(one).get("request") == request:
            return one
    if config.base_model not in (base, base.rpartition("/")[2]) and (config.base_model or not body.continueFromVersion):
        raise UnsupportedFieldError(
            f"'base_model': expected {base!r}, the base that is served, found {config.base_model!r}",
            hint="leave it out only when a version is continued", param="base_model", code="invalid_value",
        )  # fmt: skip
    dataset = platform.catalog.datasets.get(who, body.dataset.rpartition("/")[2])
    recipe = recipe_of(config, dataset, continued=body.continueFromVersion is not None)
    notes: dict[str, Any] = {"params": body.params, "request": request}
    if config.task == "classification":
        notes["labels"] = _labels(platform, who, dataset)
    return submit_training(
        platform, who, repository=body.repo, dataset=dataset.name, recipe=recipe, parent=body.continueFromVersion,
        description=body.description or "", notes=notes,
    )  # fmt: skip


def _labels(platform: Platform, who: Actor, dataset: Dataset) -> list[str]:
    """The labels of the rows to train on, sorted. Raises `DataError`."""
    _, folder = platform.home.dataset_folder(who, dataset.name)
    rows = read_rows(Path(folder) / dataset.splits["train"].file)
    found = sorted({str(row["label"]) for row in rows if row.get("label") is not None})
    if not 2 <= len(found) <= MAX_LABELS:
        raise DataError(f"label: expected 2 to {MAX_LABELS} different ones, found {len(found)}", param="label")
    return found


# --- watch --------------------------------------------------------------------------------------------------------


async def _told(platform: Platform, caller: Principal, job_id: str) -> AsyncGenerator[dict[str, Any] | None]:
    """From the first line on, so that a client that connects again misses nothing, to the end of the job."""
    progress, job = Progress(), None
    async with aclosing(looks(platform, caller, job_id, Cursor())) as found:
        async for look in found:
            job = look.job
            for line in look.metrics:
                if progress.add(line, job):
                    yield progress.message(job, checkpoint=True)
            yield progress.message(job) if look.metrics else None
    if job is not None:
        yield progress.message(job, completed=True)


class Progress:
    """What the lines of a job amount to so far."""

    def __init__(self) -> None:
        self._latest: dict[str, JobMetric] = {}
        self._best: JobMetric | None = None
        self._tokens = 0

    def add(self, line: JobMetric, job: Job) -> bool:
        """Whether a row is to be shown: at a validation, or where there is none, at the end of an epoch."""
        self._latest[line.split] = line
        if line.split == "validation":
            if line.loss is not None and (self._best is None or self._best.loss is None or line.loss < self._best.loss):
                self._best = line
            return True
        self._tokens += int(line.data.get("tokens") or 0)
        known = job.progress or {}
        per_epoch = int(known.get("steps_per_epoch") or 0)
        return known.get("validation_loss") is None and per_epoch > 0 and line.step % per_epoch == 0

    def message(self, job: Job, *, checkpoint: bool = False, completed: bool = False) -> dict[str, Any]:
        """A message of the stream. `checkpoint`: the SDK shows a row; the number is that of `name/1@number`."""
        train, validation = self._latest.get("train"), self._latest.get("validation")
        known = job.progress or {}
        step = train.step if train is not None else int(known.get("step") or 0)
        data = {
            "steps": step,
            "checkpoint_number": step if checkpoint else 0,
            "learning_rate": None if train is None else train.data.get("lr"),
            "total_tokens_used": self._tokens,
            "train_metrics_loss": None if train is None else train.loss,
            "validation_metrics_loss": None if validation is None else validation.loss,
            "best_validation_metrics_loss": None if self._best is None else self._best.loss,
            "best_eval_metric_steps": None if self._best is None else self._best.step,
        }
        meta = {
            "is_completed": completed,
            "model_uuid": job.id,
            "run_id": job.id,
            "steps": step,
            "steps_per_epoch": int(known.get("steps_per_epoch") or 0),
            "total_steps": int(known.get("steps") or 0),
        }
        return {"data": data, "meta": meta}
