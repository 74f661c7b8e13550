"""Records of the catalog in the words of the protocol."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from lorikeet.registry.records import Dataset, Job, JobEvent, Repository, Version

Json = dict[str, Any]
CONNECTION = "file_uploads"  # the one connection there is: files that were uploaded
SPLITS = {"train": "train", "evaluation": "validation", "validation": "validation", "test": "test"}
STATUS = {
    "queued": "queued",
    "running": "training",
    "stopping": "stopping",
    "completed": "completed",
    "errored": "errored",
    "canceled": "canceled",
}


def moment(seconds: float | None) -> str | None:
    """RFC 3339 in UTC."""
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def repository(one: Repository, base: str) -> Json:
    """`base` stands where a version does not say yet what it is for."""
    return {
        "uuid": one.id,
        "name": one.name,
        "description": one.description,
        "createdAt": moment(one.created),
        "versions": [
            {
                "tag": version.number,
                "createdAt": moment(version.created),
                "createdBy": version.created_by,
                "baseModel": version.base or base,
                "archived": version.archived is not None,
            }
            for version in one.versions
        ],
    }


def adapter(version: Version, job: Job | None, base: str, step: int | None = None) -> Json:
    """A version, or its checkpoint of `step`; `job` made it, where one did."""
    ready = version.state == "ready" or step is not None
    status = "completed" if ready else "errored" if job is None else STATUS[job.state]
    described: Json = {
        "uuid": version.id,
        "repo": version.repository,
        "tag": version.number,
        "checkpoint": step,
        "archived": version.archived is not None,
        "baseModel": version.base or base,
        "description": version.description or None,
        "adapterPath": (version.reference if step is None else f"{version.reference}@{step}") if ready else None,
        "status": status,
        "createdAt": moment(version.created),
        "createdBy": version.created_by,
    }
    if job is not None:
        described["finetuningJob"] = {"uuid": job.id, "error": error_of(job)}
    return described


def dataset(one: Dataset) -> Json:
    return {
        "uuid": one.id,
        "name": one.name,
        "connection": {"type": "file", "name": CONNECTION},
        "status": "connected",
        "columns": list(one.columns),
        "rows": one.rows,
        "createdAt": moment(one.created),
    }


def finetuning_job(job: Job, device: str) -> Json:
    return {
        "uuid": job.id,
        "baseModel": job.base,
        "datasetName": job.spec.get("dataset", ""),
        "description": job.description or None,
        "targetRepoName": job.repository or "",
        "targetVersionTag": job.number or 0,
        "accelerator": {"id": device},
        "status": STATUS[job.state],
        "params": notes(job).get("params", {}),
        "error": error_of(job),
        "createdAt": moment(job.created),
        "startedAt": moment(job.started),
        "finishedAt": moment(job.finished),
    }


def notes(job: Job) -> Json:
    """What this protocol keeps in the spec of a job: `params` and `request`, and `labels` of a classification."""
    found = job.spec.get("notes")
    return found if isinstance(found, dict) else {}


def error_of(job: Job) -> str | None:
    if job.state == "canceled":
        return "the job was canceled"
    return None if job.error is None else str(job.error.get("message", "the job failed"))


def timeline(job: Job, events: list[JobEvent]) -> Json:
    """Since when, and until when, a job was in each status."""
    told: Json = {"queued": {"startedAt": moment(job.created), "endedAt": moment(job.started or job.finished)}}
    if job.started is not None:
        told["training"] = {"startedAt": moment(job.started), "endedAt": moment(job.finished)}
    if job.finished is not None:
        told[STATUS[job.state]] = {"startedAt": moment(job.finished), "endedAt": moment(job.finished)}
    told["events"] = [{"at": moment(one.at), "kind": one.kind, "message": one.message} for one in events]
    return told
