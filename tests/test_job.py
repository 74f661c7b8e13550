"""Training jobs as their process runs them, in this process, on a tiny base: joined, canceled, broken, gone on with."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec import to_builtins

from lorikeet.adapters.files import AdapterFile
from lorikeet.config import EngineConfig, JobRecipe
from lorikeet.data.formats import read_rows
from lorikeet.engine.hosted import HostedEngine
from lorikeet.errors import LeaseLostError
from lorikeet.job import training
from lorikeet.job.evaluation import run_evaluation
from lorikeet.job.orders import Orders, job_folder, log_path, read_orders
from lorikeet.job.reporter import Reporter
from lorikeet.job.training import TrainingRun
from lorikeet.job.usage import Usage
from lorikeet.registry.home import Home, open_home
from lorikeet.registry.records import Actor, Job, JobRequest, Lease
from lorikeet.server.estimate import RUNTIME

WHO = Actor()
ROWS = [{"text": f"the fox {word}", "label": word[0]} for word in ("runs", "sings", "jumps", "looks")] * 4
RECIPE: dict[str, Any] = {
    "prompt": "{text}:", "completion": " {label}", "epochs": 3, "rank": 2, "alpha": 4.0, "batch_rows": 4,
    "learning_rate": 1e-3, "evaluate": False,
}  # fmt: skip


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    opened = open_home(tmp_path / "home")
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    opened.add_dataset(WHO, "rows", {"train": path, "test": path}, read_rows)
    opened.catalog.repositories.create(WHO, "r")
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def model(checkpoint: Callable[..., Path]) -> str:
    return str(checkpoint("llama"))


def submit(home: Home, parent: str | None = None, dataset: str = "rows", **recipe: Any) -> Job:
    dataset_id = home.catalog.datasets.get(WHO, dataset).id
    spec = {"recipe": RECIPE | recipe, "dataset": dataset}
    request = JobRequest(kind="train", spec=spec, base="tiny", repository="r", parent=parent, dataset_id=dataset_id)
    return home.catalog.jobs.submit(WHO, request)


def claim(home: Home, seconds: float = 60, limit: int = 9) -> list[Reporter]:
    leases = home.catalog.jobs.claim("test", seconds, limit=limit)
    return [Reporter(home.catalog, lease, home.folder, seconds) for lease in leases]


def run(home: Home, model: str, leave: Callable[[], bool] = lambda: False) -> None:
    TrainingRun(home, model, claim(home)).run(leave)


def job_of(home: Home, job: Job) -> Job:
    return home.catalog.jobs.get(WHO, job.id)


def losses(home: Home, job: Job) -> dict[int, float | None]:
    return {one.step: one.loss for one in home.catalog.jobs.metrics(WHO, job.id)}


def tensors(home: Home, reference: str) -> dict[Any, Any]:
    with AdapterFile(home.adapter_folder(WHO, reference)[1]) as file:
        return dict(file.load()[0])


def after_steps(count: int, act: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Call `act` once, before step `count` + 1 of the run."""
    step, calls = training.JointTrainer.step, []

    def counted(self: Any) -> Any:
        calls.append(1)
        if len(calls) == count + 1:
            act()
        return step(self)

    monkeypatch.setattr(training.JointTrainer, "step", counted)


def test_joined_jobs_are_as_alone(home: Home, model: str) -> None:
    """Two that share their passes learn what each learns alone; one that breaks, and one with bad rows, end alone."""
    alone = submit(home, seed=7)
    run(home, model)
    same, other = submit(home, seed=7), submit(home, seed=8, rank=4, epochs=2)
    broken = submit(home, learning_rate=1e30, clip=0.0)
    bad = submit(home, completion="{text}{nothing}")
    run(home, model)
    states = [job_of(home, one).state for one in (alone, same, other, broken, bad)]
    assert states == ["completed", "completed", "completed", "errored", "errored"]
    assert losses(home, same) == pytest.approx(losses(home, alone), rel=1e-5)
    assert sorted(losses(home, other)) == list(range(1, 9))
    assert (job_of(home, same).result or {})["joined"] == 3
    assert (job_of(home, broken).error or {})["code"] == "training_failed"
    assert "nothing" in (job_of(home, bad).error or {})["message"]
    assert str(home.folder) not in json.dumps(job_of(home, bad).error)
    first, second = (home.catalog.versions.get(WHO, "r", one.number or 0) for one in (alone, same))
    assert first.lock == second.lock and first.recipe_sha256 == second.recipe_sha256
    assert not list(job_folder(home.folder, alone.id).glob("*.safetensors"))  # nothing to go on from is left


def test_one_leaves_and_comes_back(home: Home, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = submit(home, seed=3)
    run(home, model)
    leaver, other = submit(home, seed=3), submit(home, seed=4)
    reporters = claim(home)
    mine = next(one for one in reporters if one.job.id == leaver.id)

    def leave() -> None:
        home.catalog.jobs.cancel(WHO, leaver.id)
        mine._beat = 0.0
        mine.flush()

    after_steps(5, leave, monkeypatch)
    TrainingRun(home, model, reporters).run(lambda: False)
    assert job_of(home, leaver).state == "canceled" and job_of(home, other).state == "completed"
    assert max(losses(home, leaver)) == 6  # the step that was under way
    home.catalog.jobs.resume(WHO, leaver.id)
    run(home, model)
    assert job_of(home, leaver).state == "completed"
    assert losses(home, leaver) == pytest.approx(losses(home, whole), rel=1e-5)
    assert "goes on from step 6" in log_path(home.folder, leaver.id).read_text()


def test_told_to_leave(home: Home, model: str) -> None:
    """SIGTERM: back to the queue with a checkpoint, the attempt not counted."""
    job, calls = submit(home), []

    def leave() -> bool:
        calls.append(1)
        return len(calls) > 4

    run(home, model, leave)
    found = job_of(home, job)
    assert (found.state, found.attempts) == ("queued", 0) and max(losses(home, job)) == 4
    run(home, model)
    assert job_of(home, job).state == "completed" and sorted(losses(home, job)) == list(range(1, 13))


def test_core_seconds_are_those_of_all_attempts(home: Home, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock finds one more second; jobs that run together have each second once."""

    def ticking(jobs: Any) -> Usage:
        ticks = iter(range(1, 1000))
        return Usage(jobs, lambda: float(next(ticks)))

    monkeypatch.setattr(training, "Usage", ticking)
    job = submit(home)
    run(home, model, iter([False] * 4 + [True]).__next__)
    started, prepared, loaded, steps, published = 1, 1, 1, 12, 1
    assert (job_of(home, job).progress or {})["core_seconds"] == started + prepared + loaded + 4
    run(home, model)
    found = job_of(home, job).result or {}
    assert found["core_seconds"] == 2 * (started + prepared + loaded) + steps + published
    assert (home.catalog.versions.get(WHO, "r", 1).metrics or {})["core_seconds"] == found["core_seconds"]
    pair = [submit(home, epochs=1), submit(home, epochs=1)]
    run(home, model)
    both = sum((job_of(home, one).result or {})["core_seconds"] for one in pair)
    assert both == started + 2 * prepared + loaded + 4 + 2 * published


def test_no_checkpoint_is_ahead_of_what_was_said(home: Home, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed right after one leaves no step out."""
    job, saved = submit(home), []
    save = training.Trainee.save

    def checked(self: Any, path: Path) -> None:
        saved.append(self.run.progress.step)
        assert sorted(losses(home, job)) == list(range(1, saved[-1] + 1))
        save(self, path)

    monkeypatch.setattr(training.Trainee, "save", checked)
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    run(home, model)
    assert job_of(home, job).state == "completed" and saved == list(range(1, 13))


def test_a_lease_that_was_lost(home: Home, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else has the job: nothing more is said, and its checkpoint stays as it was."""
    job = submit(home)
    reporters = claim(home, seconds=1e-6)

    def lose() -> None:
        assert [one.id for one in home.catalog.jobs.expire()] == [job.id]
        reporters[0].flush()

    after_steps(3, lose, monkeypatch)
    TrainingRun(home, model, reporters).run(lambda: False)
    assert job_of(home, job).state == "queued" and reporters[0].over
    with pytest.raises(LeaseLostError):
        home.catalog.jobs.heartbeat(reporters[0]._lease, 1.0)


def test_goes_on_from_a_version_and_from_a_checkpoint(home: Home, model: str) -> None:
    parent = submit(home, learning_rate=0.05)
    run(home, model)
    steps = [one.step for one in home.catalog.versions.checkpoints(WHO, "r", 1)]
    assert steps == [4, 8]
    still = {"learning_rate": 1e-12, "epochs": 0.25, "warmup": 0.0}
    child, grandchild = submit(home, parent="r/1", **still), submit(home, parent="r/1@4", **still)
    run(home, model)
    assert [job_of(home, one).state for one in (child, grandchild)] == ["completed"] * 2
    for reference, of in (("r/2", "r/1"), ("r/3", "r/1@4")):
        one, other = tensors(home, reference), tensors(home, of)
        assert all(abs(one[key] - other[key]).max() < 1e-6 for key in other)
    assert [one.reference for one in home.catalog.versions.lineage(WHO, child.version_id or "")] == ["r/2", "r/1"]
    wrong = submit(home, parent="r/1", rank=4)
    run(home, model)
    assert (job_of(home, wrong).error or {})["param"] in ("rank", "alpha")
    assert job_of(home, parent).state == "completed"


def test_what_was_just_written_is_not_read_again(home: Home, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The catalog knows versions and checkpoints by the hash of the tensors as they were written."""
    with monkeypatch.context() as patch:
        patch.setattr("lorikeet.registry.home.AdapterFile", None)
        job = submit(home, epochs=2)
        run(home, model)
    assert job_of(home, job).state == "completed", job_of(home, job).error
    for reference in ("r/1", "r/1@4"):
        resolved, folder = home.adapter_folder(WHO, reference)
        with AdapterFile(folder) as file:
            assert resolved.digest == file.load()[1]


def test_judging(home: Home, model: str) -> None:
    submit(home, epochs=1)
    run(home, model)
    version = home.catalog.versions.get(WHO, "r", 1)
    data = home.catalog.datasets.get(WHO, "rows")
    spec = {"recipe": {"baseline": "tfidf"}, "dataset": "rows", "task": "letters", "version": version.id}
    request = JobRequest(kind="evaluate", spec=spec, base="tiny", dataset_id=data.id, memory=2**30)
    job = home.catalog.jobs.submit(WHO, request)
    (reporter,) = claim(home)
    run_evaluation(home, model, reporter, lambda: False)
    found = job_of(home, job)
    assert found.state == "completed", found.error
    base, adapter = sorted(home.catalog.evaluations.find(WHO, job_id=job.id), key=lambda one: one.version_id or "")
    assert base.version_id is None and adapter.version_id == version.id
    assert adapter.metric == "accuracy" and adapter.n == 16 and adapter.low is not None
    assert adapter.result["baseline"] == 1.0  # the test rows are the training rows
    assert adapter.result["baseline_ci"] == [1.0, 1.0]
    assert 0 < adapter.result["p50_ms"] <= adapter.result["p95_ms"] and adapter.result["core_seconds"] > 0


def test_judging_stays_within_its_memory(home: Home, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its engine is told what it may take; where that is too little, the job says so."""
    told: list[EngineConfig] = []
    build = HostedEngine.build
    monkeypatch.setattr(HostedEngine, "build", lambda config: [told.append(config), build(config)][1])
    data = home.catalog.datasets.get(WHO, "rows")
    spec = {"recipe": {"prompt": "{text}", "reference": "{label}", "limit": 2}, "dataset": "rows", "version": None}
    for memory in (2**30, 2**29):
        request = JobRequest(kind="evaluate", spec=spec, base="tiny", dataset_id=data.id, memory=memory)
        home.catalog.jobs.submit(WHO, request)
    enough, little = claim(home)
    for reporter in (enough, little):
        run_evaluation(home, model, reporter, lambda: False)
    assert job_of(home, enough.job).state == "completed"
    (config,) = told
    assert config.max_seqs == 32 and 0 < (config.kv_memory or 0) + (config.adapter_memory or 0) < 2**30 - RUNTIME
    error = job_of(home, little.job).error or {}
    assert error["param"] == "memory" and "the job may hold 0.5 GiB" in error["message"]


def test_orders_are_private(home: Home, tmp_path: Path) -> None:
    submit(home)
    leases: list[Lease] = home.catalog.jobs.claim("test", 60)
    orders = Orders(
        home="h", catalog="postgresql://u:secret@db/x", blobs=None, model="m", lease_seconds=1.0, threads=1,
        leases=leases,
    )  # fmt: skip
    orders.write(tmp_path / "deep" / "orders.json")
    assert (tmp_path / "deep" / "orders.json").stat().st_mode & 0o777 == 0o600
    assert to_builtins(read_orders(tmp_path / "deep" / "orders.json")) == to_builtins(orders)


def test_log_lines_cannot_be_forged(home: Home) -> None:
    job = submit(home)
    (reporter,) = claim(home)
    reporter.log("a\n2026-01-01T00:00:00Z completed\x1b[2J")
    assert len(log_path(home.folder, job.id).read_text().splitlines()) == 1
    assert "\x1b" not in log_path(home.folder, job.id).read_text()


def test_recipes_of_jobs_have_the_fields_of_recipes() -> None:
    assert set(RECIPE) <= set(JobRecipe.__struct_fields__)
