"""`/api/demo`: the demo's tasks, each trained by one click on data that ships with the project."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from lorikeet.config import (
    AdapterRecipe,
    AdapterSettings,
    EvalTask,
    JobRecipe,
    JudgeRecipe,
    Recipe,
    job_adapter,
    read_fields,
    read_recipe,
)
from lorikeet.data.formats import read_rows
from lorikeet.errors import NotFoundError
from lorikeet.registry.records import Actor, Job
from lorikeet.server.auth import needs, principal
from lorikeet.server.following import describe
from lorikeet.server.platform import Platform
from lorikeet.server.replies import json_reply
from lorikeet.server.state import ServerState
from lorikeet.server.submission import submit_training
from lorikeet.server.validation import Body, parse, read_body

DATA = Path(str(resources.files("lorikeet"))) / "data" / "demo"
LISTED = 500


class DemoBody(Body):
    """`recipe` has fields of a job's recipe to use instead of the demo's."""

    recipe: dict[str, Any] | None = None


def routes(state: ServerState, platform: Platform) -> APIRouter:
    router = APIRouter()

    @router.get("/api/demo")
    @needs("user")
    async def list_demo(request: Request) -> Response:
        """The tasks, and of each the repository where it has been trained."""
        recipe = _recipe()
        page = await platform.run(platform.catalog.repositories.page, principal(request).actor, limit=LISTED)
        there = {one.name for one in page.items}
        judged = {task.adapter: task for task in recipe.tasks}
        items = [
            {
                "task": one.name, "prompt": one.prompt, "completion": one.completion,
                "metric": judged[one.name].metric, "repo": one.name if one.name in there else None,
                "example": _example(one),
            }
            for one in recipe.adapters
        ]  # fmt: skip
        return json_reply({"items": items, "next": None})

    @router.post("/api/demo/{task}/train")
    @needs("trainer")
    async def train_demo(request: Request, task: str) -> Response:
        """A training of this task in the repository of its name, with a dataset `demo-NAME`; both are made."""
        raw = await read_body(request, state.config.max_body)
        body = parse(DemoBody, raw) if raw.strip() else DemoBody()
        key = request.headers.get("idempotency-key")
        job = await platform.run_slow(_train, platform, principal(request).actor, task, body.recipe or {}, key)
        return json_reply(describe(job), 201)

    return router


def _recipe() -> Recipe:
    return read_recipe(DATA / "recipe.yaml", Recipe)


def _example(adapter: AdapterRecipe) -> dict[str, Any]:
    path = DATA / (adapter.data.test or adapter.data.train)
    with path.open(encoding="utf-8") as file:
        found: dict[str, Any] = msgspec.json.decode(file.readline())
    return found


def _train(platform: Platform, who: Actor, task: str, changes: dict[str, Any], key: str | None) -> Job:
    recipe = _recipe()
    adapter = next((one for one in recipe.adapters if one.name == task), None)
    if adapter is None:
        known = ", ".join(one.name for one in recipe.adapters)
        raise NotFoundError(f"the demo has no task {task[:80]!r}", hint=f"it has {known}", code="task_not_found")
    files = {"train": DATA / adapter.data.train} | (
        {} if adapter.data.test is None else {"test": DATA / adapter.data.test}
    )
    judge = next((one for one in recipe.tasks if one.adapter == task), None)
    fields = (
        _settings(recipe.defaults) | _settings(adapter) | {"prompt": adapter.prompt, "completion": adapter.completion}
    )
    if judge is not None:
        fields["evaluate"] = _judging(judge)
    fields |= changes
    job_adapter(read_fields(fields, JobRecipe, "recipe"), task, {split: path.name for split, path in files.items()})
    columns = dict.fromkeys(column for path in files.values() for row in read_rows(path) for column in row)

    def read(path: Path) -> list[dict[str, Any]]:
        """Test rows may have more references than training rows have answers: those are null there."""
        return [dict.fromkeys(columns) | row for row in read_rows(path)]

    dataset = platform.home.add_dataset(
        who, f"demo-{task}", files, read, description="synthetic rows that ship with Lorikeet"
    )
    return submit_training(
        platform, who, repository=task, dataset=dataset.name, recipe=fields, description=f"demo: {task}",
        create=f"the demo's {task}", idempotency_key=key,
    )  # fmt: skip


def _settings(settings: AdapterSettings) -> dict[str, Any]:
    values = {name: getattr(settings, name) for name in AdapterSettings.__struct_fields__}
    return {name: msgspec.to_builtins(value) for name, value in values.items() if value is not None}


def _judging(task: EvalTask) -> dict[str, Any]:
    names = [name for name in JudgeRecipe.__struct_fields__ if name in EvalTask.__struct_fields__]
    values = {name: msgspec.to_builtins(getattr(task, name)) for name in names}
    return {name: value for name, value in values.items() if value is not None} | {"limit": 500}
