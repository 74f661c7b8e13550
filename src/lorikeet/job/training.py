"""Training jobs in one process: each with its own data, state, checkpoint and end, in shared forward passes."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from lorikeet.config import JobRecipe, job_adapter
from lorikeet.errors import ConfigError, LorikeetError
from lorikeet.job.orders import job_folder
from lorikeet.job.reporter import Reporter, told
from lorikeet.job.usage import Usage
from lorikeet.kernels.precision import choose_dtype
from lorikeet.model.sources import find_model, identify
from lorikeet.model.tokenizer import Tokenizer
from lorikeet.model.weights import load, load_spec
from lorikeet.registry.home import Home
from lorikeet.registry.records import Actor, Dataset, Job, VersionContent
from lorikeet.train.adapter_run import StepResult
from lorikeet.train.audit import Audit, prepare, require_clean
from lorikeet.train.heap import keep_freed_memory
from lorikeet.train.joint import JointTrainer
from lorikeet.train.progress import metrics_lines
from lorikeet.train.trainee import Trainee, make_trainee
from lorikeet.types import ErrorInfo

log = logging.getLogger("lorikeet.job")

CHECKPOINT_SECONDS = 10.0  # what a kill costs at most
STEP_TOKENS = 8192
CHECKPOINT = "checkpoint.safetensors"


@dataclass(slots=True)
class Member:
    """A job of the run. `joined` counts the jobs it was started with, itself among them; `seconds` are those of its
    steps that `Usage` knows."""

    reporter: Reporter
    recipe: JobRecipe
    dataset: Dataset
    trainee: Trainee
    folder: Path
    joined: int = 1
    began: float = 0.0
    tokens_before: int = 0
    seconds: float = 0.0

    @property
    def job(self) -> Job:
        return self.reporter.job

    @property
    def who(self) -> Actor:
        return Actor(tenant=self.job.tenant_id, name=f"job:{self.job.id}")


class TrainingRun:
    """`model` is the base as the server's config names it."""

    def __init__(self, home: Home, model: str, reporters: Sequence[Reporter]) -> None:
        self.home = home
        self._model = model
        self._reporters = reporters
        self._folder = find_model(model)
        self._base = identify(self._folder, None if Path(model).expanduser().is_dir() else model)
        self._usage = Usage(one.job for one in reporters)

    def run(self, asked_to_leave: Callable[[], bool]) -> None:
        """Until every job has ended, or the process is asked to leave: then all go back to the queue."""
        members = self._prepare()
        if not members:
            return
        keep_freed_memory()
        dtype = choose_dtype("auto")
        spec, weights = load(self._folder, dtype)
        trainer = JointTrainer(spec, weights, step_tokens=STEP_TOKENS)
        for member in members:
            member.joined = len(members)
            trainer.add(member.trainee.run)
            self._announce(member)
        self._usage.share({member.job.id: 1.0 for member in members})
        self._train(trainer, members, asked_to_leave)

    # --- before -----------------------------------------------------------------------------------------------------

    def _prepare(self) -> list[Member]:
        """The jobs that can be trained; the others have failed, each for itself."""
        tokenizer, spec = Tokenizer(self._folder), load_spec(self._folder)
        dtype = choose_dtype("auto")
        members = []
        self._usage.share({reporter.job.id: 1.0 for reporter in self._reporters})
        for reporter in self._reporters:
            job = reporter.job
            reporter.stage("preparing", "reading and checking the data")
            data: Path | None = None
            try:
                who = Actor(tenant=job.tenant_id, name=f"job:{job.id}")
                if job.dataset_id is None:
                    raise ConfigError("dataset: missing", param="dataset")
                dataset = self.home.catalog.datasets.by_id(who, job.dataset_id)
                data = self.home.blobs.materialise(dataset.sha256)
                recipe = msgspec.convert(job.spec["recipe"], JobRecipe)
                splits = {split: one.file for split, one in dataset.splits.items()}
                adapter = job_adapter(recipe, job.repository or "adapter", splits)
                rows, audit = prepare(adapter, tokenizer, spec.max_context, data)
                require_clean([audit])
                trainee = make_trainee(adapter, rows, spec, self._base, dtype, origin=self._origin(who, job))
                trainee.run.name = f"{job.repository}/{job.number}"  # two jobs may make versions of one repository
                folder = job_folder(self.home.folder, job.id)
                member = Member(reporter, recipe, dataset, trainee, folder)
                if trainee.restore(folder / CHECKPOINT):
                    reporter.log(f"goes on from step {trainee.run.progress.step}")
                reporter.stage("audited", "; ".join(_plain(data, audit.warnings)), **_findings(audit))
                members.append(member)
            except Exception as error:
                if not isinstance(error, LorikeetError):
                    log.exception("job %s could not be prepared", job.id)
                reporter.fail(told(error, [] if data is None else [data]))
            self._usage.share({job.id: 1.0})
        return members

    def _origin(self, who: Actor, job: Job) -> Path | None:
        """The files of what training goes on from."""
        if job.parent_id is None:
            return None
        version = self.home.catalog.versions.by_id(who, job.parent_id)
        manifest = version.manifest
        if job.parent_step is not None:
            found = self.home.catalog.versions.checkpoints(who, version.repository, version.number)
            manifest = next((one.manifest for one in found if one.step == job.parent_step), None)
        if manifest is None:
            raise ConfigError(f"parent: {version.reference} has no content any more", param="parent")
        return self.home.blobs.materialise(manifest)

    def _announce(self, member: Member) -> None:
        run = member.trainee.run
        member.began, member.tokens_before, member.seconds = time.time(), run.progress.tokens, run.progress.seconds
        beside = member.joined - 1
        beside_said = "" if not beside else f", in one run with {beside} other job" + ("s" if beside > 1 else "")
        member.reporter.stage(
            "training", f"{run.total_steps} steps on {len(run.train)} rows{beside_said}", steps=run.total_steps,
            steps_per_epoch=run.steps_per_epoch, step=run.progress.step, joined=member.joined,
        )  # fmt: skip

    # --- steps ------------------------------------------------------------------------------------------------------

    def _train(self, trainer: JointTrainer, members: list[Member], asked_to_leave: Callable[[], bool]) -> None:
        saved = time.monotonic()
        active = list(members)
        for member in members:
            if member.trainee.run.finished:  # its process ended between the last step and the version
                self._end(member)
        while True:
            active = [one for one in active if self._stays(one, trainer)]
            if not active:
                return
            if asked_to_leave():
                for member in active:
                    self._save(member)
                    member.reporter.release("the server stops; training goes on from here when it is back")
                return
            results = trainer.step()
            self._share_step(active)
            for member in active:
                self._note(member, results[member.trainee.run.name])
                if member.trainee.run.finished:
                    self._end(member)
                else:
                    self._publish_checkpoint(member)
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                for member in active:
                    if not member.trainee.run.finished:
                        self._save(member)
                saved = time.monotonic()

    def _share_step(self, members: Sequence[Member]) -> None:
        """A joint step's CPU time, by the shares of its wall time."""
        weights = {}
        for member in members:
            seconds = member.trainee.run.progress.seconds
            weights[member.job.id], member.seconds = seconds - member.seconds, seconds
        self._usage.share(weights)

    def _save(self, member: Member) -> None:
        """The checkpoint. What was said of the steps before it goes to the catalog first: they are not taken again."""
        member.reporter.flush()
        if not member.reporter.over:
            member.trainee.save(member.folder / CHECKPOINT)

    def _stays(self, member: Member, trainer: JointTrainer) -> bool:
        """False for a job that has ended, was canceled, or is somebody else's now; the others do not notice."""
        reporter, run = member.reporter, member.trainee.run
        if run.finished:
            return False
        if not reporter.stopping and not reporter.over:
            return True
        trainer.remove(run)
        if not reporter.over:
            self._save(member)
            reporter.stopped(f"stopped at step {run.progress.step} of {run.total_steps}; it can be resumed")
        return False

    def _note(self, member: Member, result: StepResult) -> None:
        run = member.trainee.run
        p = run.progress
        seconds = max(time.time() - member.began, 1e-6)
        speed = (p.tokens - member.tokens_before) / seconds
        per_step = p.tokens / max(p.step, 1)
        progress = {
            "step": p.step, "steps": run.total_steps, "steps_per_epoch": run.steps_per_epoch,
            "epoch": p.step / run.steps_per_epoch, "loss": p.loss, "validation_loss": p.validation_loss,
            "tokens": p.tokens, "seconds": round(p.seconds, 3), "core_seconds": self._usage.of(member.job.id),
            "tokens_per_second": round(speed, 1),
            "seconds_left": round((run.total_steps - p.step) * per_step / speed, 1) if speed else None,
        }  # fmt: skip
        member.reporter.note(metrics_lines(member.job.id, run, result), progress)
        if result.validation_loss is not None:
            member.reporter.log(
                f"step {p.step} of {run.total_steps}: loss {result.loss:.4f}, validation {result.validation_loss:.4f}"
            )

    def _publish_checkpoint(self, member: Member) -> None:
        """At the end of an epoch: what training has come to can be served as name/3@step."""
        run, most = member.trainee.run, member.recipe.checkpoints
        step, per_epoch = run.progress.step, run.steps_per_epoch
        ends = (run.total_steps - 1) // per_epoch  # ends of epochs before the last step
        if member.job.version_id is None or not most or step % per_epoch or not ends:
            return
        every = -(-ends // most)
        if (step // per_epoch) % every:
            return
        folder = member.folder / "checkpoint"
        try:
            digest = member.trainee.write(folder)
            metrics = {"step": step, "loss": run.progress.loss, "validation_loss": run.progress.validation_loss}
            content = msgspec.structs.replace(self.home.read_adapter(folder, digest=digest), metrics=metrics)
            self.home.catalog.versions.add_checkpoint(member.who, member.job.version_id, step, content)
        except LorikeetError as error:  # training does not end for want of a copy of its middle
            log.warning("job %s: no checkpoint at step %d: %s", member.job.id, step, error)
            member.reporter.log(f"no checkpoint at step {step}: {error.message}")
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    # --- the end of one ---------------------------------------------------------------------------------------------

    def _end(self, member: Member) -> None:
        reporter, run = member.reporter, member.trainee.run
        if member.trainee.failed:
            reporter.fail(
                ErrorInfo(
                    code="training_failed",
                    message=f"the loss was not finite at step {run.progress.step + 1}",
                    hint="lower learning_rate, or set clip",
                    param="learning_rate",
                )  # fmt: skip
            )
            return
        self._save(member)
        try:
            content = self._content(member)
            done = reporter.finish(content, self._result(member, content))
        except LorikeetError as error:
            log.warning("job %s could not publish its version: %s", reporter.job.id, error)
            reporter.fail(told(error))
            return
        for name in (CHECKPOINT, "adapter") if done else ():
            path = member.folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def _content(self, member: Member) -> VersionContent:
        """The version: files, recipe, hashes and metrics."""
        trainee, folder = member.trainee, member.folder / "adapter"
        member.reporter.stage("publishing", "writing the version")
        trainee.run.final_weights()
        content = self.home.read_adapter(folder, digest=trainee.write(folder))
        p = trainee.run.progress
        self._usage.share({member.job.id: 1.0})
        return msgspec.structs.replace(
            content,
            recipe=msgspec.to_builtins(member.trainee.recipe) | {"dataset": member.dataset.name},
            recipe_sha256=trainee.recipe_sha256,
            dataset_id=member.dataset.id,
            data_sha256=trainee.data_sha256,
            metrics={
                "steps": p.step, "tokens": p.tokens, "loss": p.loss, "validation_loss": p.validation_loss,
                "best_validation_loss": p.best_loss, "best_step": p.best_step or None, "stopped": p.stopped,
                "train_seconds": round(p.seconds, 3), "core_seconds": self._usage.of(member.job.id),
                "rank": trainee.run.settings.rank,
            },
        )  # fmt: skip

    def _result(self, member: Member, content: VersionContent) -> dict[str, Any]:
        weights = next(one.bytes for one in content.manifest.files if one.path.endswith(".safetensors"))
        return {**(content.metrics or {}), "joined": member.joined, "adapter_bytes": weights, "digest": content.digest}


def _findings(audit: Audit) -> dict[str, Any]:
    return {
        "rows": audit.rows, "train": audit.train, "validation": audit.validation, "test": audit.test,
        "tokens": audit.tokens, "learned_tokens": audit.learned_tokens, "limit": audit.limit,
        "lengths": {str(p): n for p, n in audit.lengths.items()}, "labels": len(audit.labels),
        "warnings": len(audit.warnings),
    }  # fmt: skip


def _plain(folder: Path, messages: Sequence[str]) -> list[str]:
    return [message.replace(f"{folder}/", "") for message in messages]
