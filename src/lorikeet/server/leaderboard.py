"""`/api/leaderboard`: tasks by adapters, from the evaluations of the catalog; `/api/info`: what this server is."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from lorikeet import __version__
from lorikeet.errors import NotFoundError
from lorikeet.registry.records import Actor, Evaluation
from lorikeet.server.auth import needs, principal
from lorikeet.server.listing import Query
from lorikeet.server.platform import Platform
from lorikeet.server.replies import json_reply
from lorikeet.server.state import ServerState

Json = dict[str, Any]
EVALUATIONS = 1000  # the newest
COSTS = ("train_seconds", "core_seconds", "p50_ms", "p95_ms")  # of a result, where they were measured


def routes(state: ServerState, platform: Platform) -> APIRouter:
    router = APIRouter()

    @router.get("/api/leaderboard")
    @needs("user")
    async def leaderboard(request: Request) -> Response:
        """Of each task and metric the newest result of the base and of every version that was judged."""
        task = Query(request, "task").text("task")
        return json_reply({"tasks": await platform.run_slow(_tasks, platform, principal(request).actor, task)})

    @router.get("/api/info")
    @needs("user")
    async def info(request: Request) -> Response:
        engine = state.info
        return json_reply(
            {
                "version": __version__,
                "base": {"name": state.models.base.name, "parameters": engine.parameters,
                         "context": engine.max_context},
                "device": engine.device, "dtype": engine.dtype,
                "home": str(platform.home.folder) if principal(request).role == "admin" else None,
                "jobs": {"concurrency": platform.config.job_concurrency, "memory": platform.job_memory},
            }
        )  # fmt: skip

    return router


def _tasks(platform: Platform, who: Actor, task: str | None) -> list[Json]:
    catalog = platform.catalog
    groups: dict[tuple[str, str], list[Evaluation]] = {}
    for one in catalog.evaluations.find(who, task=task, limit=EVALUATIONS):
        groups.setdefault((one.task, one.metric), []).append(one)
    return [_task(platform, who, name, metric, found) for (name, metric), found in sorted(groups.items())]


def _task(platform: Platform, who: Actor, task: str, metric: str, found: list[Evaluation]) -> Json:
    """`found` newest first."""
    base = next((one for one in found if one.version_id is None), None)
    baseline = next((one.result for one in found if one.result.get("baseline") is not None), None)
    newest: dict[str, Evaluation] = {}
    for one in found:
        if one.version_id is not None:
            newest.setdefault(one.version_id, one)
    adapters = [row for one in newest.values() if (row := _adapter(platform, who, one)) is not None]
    adapters.sort(key=lambda row: -row["score"])
    return {
        "task": task, "metric": metric, "n": found[0].n,
        "base": None if base is None else {"score": base.score, "ci": _interval(base)},
        "baseline": None if baseline is None else {"score": baseline["baseline"], "ci": baseline.get("baseline_ci")},
        "adapters": adapters,
    }  # fmt: skip


def _adapter(platform: Platform, who: Actor, one: Evaluation) -> Json | None:
    """None for a version that is deleted."""
    assert one.version_id is not None
    try:
        version = platform.catalog.versions.by_id(who, one.version_id)
    except NotFoundError:
        return None
    if version.deleted is not None:
        return None
    return {
        "ref": version.reference, "score": one.score, "ci": _interval(one), "n": one.n,
        **{name: one.result.get(name) for name in COSTS}, "adapter_bytes": version.bytes, "evaluation": one.id,
        "job": one.job_id, "at": one.created,
    }  # fmt: skip


def _interval(one: Evaluation) -> list[float] | None:
    return None if one.low is None or one.high is None else [one.low, one.high]
