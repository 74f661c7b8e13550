"""`/api/leaderboard`: tasks by adapters, from the evaluations of the catalog; `/api/info`: what this server is."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from lorikeet import __version__
from lorikeet.registry.records import Actor, Evaluation, Standing
from lorikeet.server.auth import needs, principal
from lorikeet.server.listing import Query
from lorikeet.server.platform import Platform
from lorikeet.server.replies import json_reply
from lorikeet.server.state import ServerState

Json = dict[str, Any]
COSTS = ("train_seconds", "core_seconds", "p50_ms", "p95_ms")  # of a result, where they were measured


def routes(state: ServerState, platform: Platform) -> APIRouter:
    router = APIRouter()

    @router.get("/api/leaderboard")
    @needs("user")
    async def leaderboard(request: Request) -> Response:
        """Of each task and metric the newest result of the base and of every version that was judged.

        `?adapters=10`: of the best ten; `judged` is how many there are.
        """
        query = Query(request, "task", "adapters")
        most = query.number("adapters", 0, least=1) or None
        who, task = principal(request).actor, query.text("task")
        return json_reply({"tasks": await platform.run_slow(_tasks, platform, who, task, most)})

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


def _tasks(platform: Platform, who: Actor, task: str | None, most: int | None) -> list[Json]:
    groups: dict[tuple[str, str], list[Standing]] = {}
    for one in platform.catalog.evaluations.standings(who, task=task):
        groups.setdefault((one.evaluation.task, one.evaluation.metric), []).append(one)
    return [_task(found, most) for found in groups.values()]


def _task(found: list[Standing], most: int | None) -> Json:
    """`found`: the best first; `most` adapters are told of."""
    newest = sorted((one.evaluation for one in found), key=lambda one: -one.created)
    base = next((one for one in newest if one.version_id is None), None)
    baseline = next((one.result for one in newest if one.result.get("baseline") is not None), None)
    adapters = [one for one in found if one.reference is not None]
    return {
        "task": newest[0].task, "metric": newest[0].metric, "n": newest[0].n, "judged": len(adapters),
        "base": None if base is None else {"score": base.score, "ci": _interval(base)},
        "baseline": None if baseline is None else {"score": baseline["baseline"], "ci": baseline.get("baseline_ci")},
        "adapters": [_adapter(one) for one in adapters[:most]],
    }  # fmt: skip


def _adapter(one: Standing) -> Json:
    judged = one.evaluation
    return {
        "ref": one.reference, "score": judged.score, "ci": _interval(judged), "n": judged.n,
        **{name: judged.result.get(name) for name in COSTS}, "adapter_bytes": one.bytes, "evaluation": judged.id,
        "job": judged.job_id, "at": judged.created,
    }  # fmt: skip


def _interval(one: Evaluation) -> list[float] | None:
    return None if one.low is None or one.high is None else [one.low, one.high]
