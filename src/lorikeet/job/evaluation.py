"""Evaluation jobs: an adapter and its base judged on a split of a dataset, in an engine of the job's own."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from lorikeet.config import EvalData, EvalRecipe, EvalTask, JudgeRecipe, Message
from lorikeet.data.formats import read_rows
from lorikeet.errors import ConfigError, LorikeetError
from lorikeet.evals.harness import Result, judge, prepare
from lorikeet.job.orders import job_folder
from lorikeet.job.reporter import Reporter, told
from lorikeet.job.usage import FIELD, Usage
from lorikeet.judge import AT_ONCE, through_engine
from lorikeet.kernels.precision import choose_dtype
from lorikeet.model.families import load_spec
from lorikeet.model.sources import find_model
from lorikeet.registry.home import Home
from lorikeet.registry.records import Actor, Dataset, Version
from lorikeet.server.judging import engine_memory
from lorikeet.template import Template

log = logging.getLogger("lorikeet.job")

ADAPTER = "judged"  # the name of the adapter inside the job


class LeavingError(Exception):
    """The job is to stop, or is somebody else's now."""


def run_evaluation(home: Home, model: str, reporter: Reporter, asked_to_leave: Callable[[], bool]) -> None:
    """Judge, store the results with their intervals, and end the job, whatever happens."""
    folder = job_folder(home.folder, reporter.job.id) / "adapters"
    data: list[Path] = []
    usage = Usage([reporter.job])
    try:
        results = _judge(home, model, reporter, asked_to_leave, folder, data, usage)
        usage.share({reporter.job.id: 1.0})
        reporter.finish(None, {"results": results, FIELD: usage.of(reporter.job.id)})
    except LeavingError:
        if reporter.stopping:
            reporter.stopped("stopped while it judged")
        else:
            reporter.release("the server stops; judging begins again when it is back")
    except Exception as error:
        if not isinstance(error, LorikeetError):
            log.exception("job %s failed", reporter.job.id)
        reporter.fail(told(error, data))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _judge(
    home: Home,
    model: str,
    reporter: Reporter,
    asked_to_leave: Callable[[], bool],
    folder: Path,
    data: list[Path],
    usage: Usage,
) -> list[dict[str, Any]]:
    job = reporter.job
    who = Actor(tenant=job.tenant_id, name=f"job:{job.id}")
    reporter.stage("preparing", "reading the data")
    if job.dataset_id is None:
        raise ConfigError("dataset: missing", param="dataset")
    dataset = home.catalog.datasets.by_id(who, job.dataset_id)
    place = home.blobs.materialise(dataset.sha256)
    data.append(place)
    version = None if job.spec.get("version") is None else home.catalog.versions.by_id(who, job.spec["version"])
    if version is not None:
        if version.manifest is None:
            raise ConfigError(f"adapter: {version.reference} is {version.state}, it has no content", param="adapter")
        shutil.rmtree(folder, ignore_errors=True)
        home.blobs.export(version.manifest, folder / ADAPTER)
    recipe = EvalRecipe(version=1, base=model, tasks=[_task(job.spec, version, dataset, place)])
    recipe = replace(recipe, seed=msgspec.convert(job.spec["recipe"], JudgeRecipe).seed)
    prepared = prepare(recipe, place, read_rows)
    total = sum(len(one.prompts) for one in prepared) * (1 if version is None else 2)
    done = 0

    def on_done(count: int) -> None:
        nonlocal done
        done += count
        usage.share({job.id: 1.0})
        reporter.note([], {"done": done, "total": total, FIELD: usage.of(job.id)})
        if reporter.stopping or reporter.over or asked_to_leave():
            raise LeavingError

    reporter.stage("judging", f"{total} answers", total=total)
    adapters = None if version is None else folder
    settings = _engine_settings(model, job.memory, 0 if version is None else version.bytes or 0)
    results = judge(recipe, prepared, through_engine(recipe, adapters, on_done, **settings))
    return [_store(home, who, reporter, one, version, dataset) for one in results]


def _engine_settings(model: str, memory: int, adapter: int) -> dict[str, int]:
    """Those of `EngineConfig` with which the process stays within the job's memory: left to itself, an engine takes
    its share of what the machine has free."""
    spec = load_spec(find_model(model))
    keys, slab = engine_memory(memory, spec, choose_dtype("auto").itemsize, adapter)
    return {"kv_memory": keys, "adapter_memory": slab, "max_seqs": AT_ONCE}


def _task(spec: dict[str, Any], version: Version | None, dataset: Dataset, place: Path) -> EvalTask:
    """What is judged: as the job says, else as the adapter was trained."""
    recipe = msgspec.convert(spec["recipe"], JudgeRecipe)
    trained = (version.recipe if version is not None else None) or {}
    prompt, messages, reference = recipe.prompt, recipe.messages, recipe.reference
    if prompt is None and messages is None:
        prompt = trained.get("prompt")
        if prompt is None and trained.get("messages"):
            messages = msgspec.convert(trained["messages"][:-1], list[Message])
    if reference is None:
        reference = trained.get("completion")
        if reference is None and trained.get("messages"):
            reference = trained["messages"][-1]["content"]
    if prompt is None and messages is None:
        raise ConfigError("prompt: missing, and the adapter's recipe does not say it", param="prompt")
    if reference is None:
        raise ConfigError("reference: missing, and the adapter's recipe does not say it", param="reference")
    if recipe.split not in dataset.splits:
        raise ConfigError(f"split: {dataset.name} has {', '.join(dataset.splits)}, not {recipe.split}", param="split")
    convert = (trained.get("data") or {}).get("convert")
    train = dataset.splits.get("train")
    file = dataset.splits[recipe.split].file
    choices = recipe.choices
    metric: str | None = recipe.metric
    if metric is None:
        metric, found = _metric(place / file, convert, reference)
        choices = choices or found
    return EvalTask(
        name=str(spec.get("task") or dataset.name), metric=metric, choices=choices, prompt=prompt, messages=messages,
        reference=reference, adapter=None if version is None else ADAPTER, max_tokens=recipe.max_tokens,
        stop=recipe.stop, baseline=recipe.baseline, input=recipe.input,
        data=EvalData(
            test=file, train=None if train is None else train.file, limit=recipe.limit, group_by=recipe.group_by,
            convert=convert,
        ),
    )  # fmt: skip


def _metric(path: Path, convert: str | None, reference: str | list[str]) -> tuple[str, Any]:
    """What suits the answers: labels that repeat, JSON, or free text."""
    template = Template(reference if isinstance(reference, str) else reference[0], "reference")
    answers = [template.render(row).strip() for row in read_rows(path, convert)]
    if 2 * len(set(answers)) <= len(answers) and len(set(answers)) <= 512:
        return "accuracy", "from-data"
    try:
        if all(isinstance(json.loads(answer), dict | list) for answer in answers):
            return "json_exact", None
    except ValueError:
        pass
    return "rouge_l", None


def _store(
    home: Home, who: Actor, reporter: Reporter, result: Result, version: Version | None, dataset: Dataset
) -> dict[str, Any]:
    """A row for the base, and one for the adapter: the same of this job again is the one that is there."""
    metrics = {} if version is None else version.metrics or {}
    if version is not None:
        result.train_seconds, result.core_seconds = metrics.get("train_seconds"), metrics.get("core_seconds")
        result.adapter_bytes = version.bytes
    line: dict[str, Any] = msgspec.to_builtins(result)
    shared: dict[str, Any] = {
        "base": str(version.base if version is not None and version.base else reporter.job.base),
        "task": result.task, "metric": result.metric, "n": result.n, "dataset_id": dataset.id,
        "job_id": reporter.job.id, "result": line,
    }  # fmt: skip
    add = home.catalog.evaluations.add
    add(who, score=result.base, interval=result.base_ci, **shared)
    if version is not None and result.adapter is not None:
        add(who, score=result.adapter, interval=result.adapter_ci, version_id=version.id, **shared)
    return line | {"adapter_reference": None if version is None else version.reference}
