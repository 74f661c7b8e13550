"""From what somebody asks for to a job in the queue: checked as far as that goes without starting anything."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec.structs import replace

from lorikeet.config import AdapterRecipe, JobRecipe, JudgeRecipe, job_adapter, read_fields
from lorikeet.errors import ConfigError, InvalidRequestError, OverloadedError
from lorikeet.model.families import load_spec
from lorikeet.model.sources import find_model
from lorikeet.registry.catalog import Catalog
from lorikeet.registry.records import Actor, Dataset, Job, JobRequest
from lorikeet.registry.references import parse_reference
from lorikeet.server.estimate import gains_from_company, training_memory
from lorikeet.server.job_memory import gib
from lorikeet.template import Template

if TYPE_CHECKING:
    from lorikeet.server.platform import Platform

MOST_WAITING = 1000  # queued jobs of all tenants together
INHERITED = ("rank", "alpha", "rslora", "targets")  # from what training goes on from: its shape
JUDGED_ALONE = "evaluate-"  # begins the idempotency key of the evaluation that follows a training


def submit_training(
    platform: Platform,
    who: Actor,
    *,
    repository: str,
    dataset: str,
    recipe: dict[str, Any],
    description: str = "",
    parent: str | None = None,
    priority: int = 0,
    create: str | None = None,
    idempotency_key: str | None = None,
    notes: Mapping[str, Any] | None = None,
) -> Job:
    """Queue a training. `recipe` has the fields of `JobRecipe`; `parent` is a reference to go on from.

    `create` makes the repository where it is not there, with this description; of a training that is refused nothing
    stays. `notes` are kept in the job's spec for whoever submits it.

    Raises `ConfigError` naming the field, `DataError`, `NotFoundError`, and `ConflictError`.
    """
    catalog = platform.catalog
    wanted = read_fields(recipe, JobRecipe, "recipe")
    data = catalog.datasets.get(who, dataset)
    if parent is not None:
        wanted = _inherited(catalog, who, wanted, parent)
    adapter = job_adapter(wanted, repository, {split: one.file for split, one in data.splits.items()})
    _check_columns(adapter, data, wanted.convert)
    folder = find_model(platform.model)
    train = data.splits["train"]
    memory = training_memory(folder, load_spec(folder), adapter, train.rows, train.bytes)
    if memory.total > platform.job_memory:
        raise ConfigError(
            f"memory: this training needs about {gib(memory.total)}, and jobs may use {gib(platform.job_memory)}",
            hint="lower batch_rows or rank, or start the server with a larger --job-memory", param="batch_rows",
        )  # fmt: skip
    assert adapter.batch_rows is not None
    joins = gains_from_company(train.rows, train.bytes, adapter.batch_rows)
    spec: dict[str, Any] = {
        "recipe": msgspec.to_builtins(wanted), "dataset": data.name, "shared_memory": memory.shared,
    }  # fmt: skip
    if notes is not None:
        spec["notes"] = dict(notes)
    request = JobRequest(
        kind="train", spec=spec, base=platform.base.name, repository=repository, parent=parent, dataset_id=data.id,
        description=description, join_key=_join_key(who, platform.base.sha256) if joins else None, priority=priority,
        memory=memory.total,
    )  # fmt: skip
    return _submit(platform, who, request, idempotency_key, create)


def submit_evaluation(
    platform: Platform,
    who: Actor,
    *,
    dataset: str,
    adapter: str | None,
    recipe: dict[str, Any] | None = None,
    task: str | None = None,
    description: str = "",
    idempotency_key: str | None = None,
) -> Job:
    """Queue the judging of `adapter` (a reference) and of its base; None: of the base alone. Raises as training."""
    catalog = platform.catalog
    wanted = read_fields(recipe or {}, JudgeRecipe, "recipe")
    data = catalog.datasets.get(who, dataset)
    if wanted.split not in data.splits:
        raise ConfigError(
            f"recipe.split: {data.name} has {', '.join(data.splits)}, found {wanted.split}", param="recipe.split"
        )
    resolved = None if adapter is None else catalog.versions.resolve(who, adapter)
    if resolved is not None and resolved.step is not None:
        raise InvalidRequestError(f"adapter: {adapter} is a checkpoint; versions are judged", param="adapter")
    if resolved is None and (wanted.reference is None or (wanted.prompt is None and wanted.messages is None)):
        raise ConfigError("recipe: the base alone needs prompt (or messages) and reference", param="recipe.prompt")
    spec = {
        "recipe": msgspec.to_builtins(wanted), "dataset": data.name, "task": task or data.name,
        "version": None if resolved is None else resolved.version_id,
        "adapter": None if resolved is None else resolved.reference,
    }  # fmt: skip
    request = JobRequest(
        kind="evaluate", spec=spec, base=platform.base.name, dataset_id=data.id, description=description,
        repository=None if resolved is None else parse_reference(resolved.reference).repository,
        memory=min(platform.judging_memory, platform.job_memory),
    )  # fmt: skip
    return _submit(platform, who, request, idempotency_key)


def follow_up(platform: Platform, job: Job) -> Job | None:
    """The evaluation that a finished training asked for, queued once however often this is called."""
    if job.kind != "train" or job.state != "completed" or job.dataset_id is None:
        return None
    who = Actor(tenant=job.tenant_id, name=job.created_by)
    recipe = msgspec.convert(job.spec["recipe"], JobRecipe)
    asked = recipe.evaluate
    dataset = platform.catalog.datasets.by_id(who, job.dataset_id)
    split = asked.split if isinstance(asked, JudgeRecipe) else "test"
    if asked is False or split not in dataset.splits or dataset.deleted is not None:
        return None
    return submit_evaluation(
        platform, who, dataset=dataset.name, adapter=f"{job.repository}/{job.number}",
        recipe=msgspec.to_builtins(asked) if isinstance(asked, JudgeRecipe) else {}, task=job.repository,
        description=f"after the training of {job.repository}/{job.number}", idempotency_key=f"{JUDGED_ALONE}{job.id}",
    )  # fmt: skip


def _submit(
    platform: Platform, who: Actor, request: JobRequest, idempotency_key: str | None, create: str | None = None
) -> Job:
    if platform.catalog.jobs.waiting() >= MOST_WAITING:
        raise OverloadedError(f"{MOST_WAITING} jobs wait already", hint="try again later", retry_after=60.0)
    job = platform.catalog.jobs.submit(who, request, create=create, idempotency_key=idempotency_key)
    platform.supervisor.wake()
    return job


def _inherited(catalog: Catalog, who: Actor, recipe: JobRecipe, parent: str) -> JobRecipe:
    """With the parent's shape where the recipe leaves it open. Raises `ConfigError` where they differ."""
    version = catalog.versions.by_id(who, catalog.versions.resolve(who, parent).version_id)
    trained = version.recipe or {}
    for field in INHERITED:
        theirs, ours = trained.get(field), getattr(recipe, field)
        if theirs is None:
            continue
        if ours is not None and ours != theirs:
            raise ConfigError(
                f"recipe.{field}: {version.reference} has {theirs}, found {ours}", param=f"recipe.{field}",
                hint="training goes on with the same shape; leave it out",
            )  # fmt: skip
        recipe = replace(recipe, **{field: theirs})
    if recipe.prompt is None and recipe.messages is None and trained:
        kept = {name: trained.get(name) for name in ("prompt", "completion", "messages")}
        return msgspec.convert(msgspec.to_builtins(recipe) | kept, JobRecipe)
    return recipe


def _check_columns(adapter: AdapterRecipe, data: Dataset, convert: str | None) -> None:
    if convert is not None:
        return  # the columns come from the conversion
    texts = [adapter.prompt, adapter.completion, *(one.content for one in adapter.messages or [])]
    for where, text in zip(("prompt", "completion", *["messages"] * len(texts)), texts, strict=False):
        for column in [] if text is None else Template(text, f"recipe.{where}").columns:
            if column not in data.columns:
                raise ConfigError(
                    f"recipe.{where}: uses the column {column!r}, which {data.name} has not",
                    hint=f"its columns are {', '.join(data.columns)}", param=f"recipe.{where}",
                )  # fmt: skip


def _join_key(who: Actor, base_sha256: str) -> str:
    """Low-rank trainings of one tenant on one base can share their forward passes, whatever their settings."""
    return hashlib.sha256(f"lora:{who.tenant}:{base_sha256}".encode()).hexdigest()[:32]
