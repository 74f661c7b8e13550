"""`lorikeet train`: a recipe -> audited data -> adapters trained together -> PEFT folders with their locks."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
from rich.console import Console

from lorikeet.config import AdapterRecipe, TrainRecipe, chosen, read_recipe, resolve_adapters
from lorikeet.errors import LorikeetError
from lorikeet.kernels.precision import choose_dtype
from lorikeet.model.sources import find_model, identify
from lorikeet.model.tokenizer import Tokenizer
from lorikeet.model.weights import load, load_spec
from lorikeet.train import checkpoint
from lorikeet.train.audit import AdapterData, prepare, print_report, require_clean
from lorikeet.train.heap import keep_freed_memory
from lorikeet.train.joint import JointTrainer
from lorikeet.train.progress import Bars, MetricsFile
from lorikeet.train.trainee import Trainee, make_trainee
from lorikeet.types import BaseIdentity

CHECKPOINT_SECONDS = 60.0


class TrainingError(LorikeetError):
    """Training that could not go on: a loss that is not finite."""

    code = "training_failed"


class AdapterSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One adapter in `summary.json`; losses are token means in nats."""

    steps: int
    tokens: int
    loss: float | None
    validation_loss: float | None
    best_validation_loss: float | None
    stopped: str | None
    train_seconds: float
    adapter_bytes: int


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """`summary.json`: what a run cost. `interrupted`: it ended by a signal and can be resumed."""

    version: int = 1
    base: str
    joint_wall_seconds: float
    tokens: int
    interrupted: bool
    adapters: dict[str, AdapterSummary]


def run_train(
    recipe_path: Path,
    *,
    resume: bool = False,
    dry_run: bool = False,
    only: Collection[str] = (),
    root: Path | None = None,
    output: Path | None = None,
    console: Console | None = None,
) -> Summary | None:
    """Audit the data, train the adapters of a recipe together (`only` some), write them; None after a dry run.

    Paths in the recipe are relative to `root` (the working directory); `output` replaces the recipe's. SIGINT and
    SIGTERM end the run at the next step with checkpoints that `resume` goes on from. Raises ConfigError or DataError
    before any step, TrainingError when an adapter's loss was not finite (the others are trained and written).
    """
    console = console or Console()
    recipe = read_recipe(recipe_path, TrainRecipe)
    root = root or Path.cwd()
    output = output or root / recipe.output
    adapters = chosen(resolve_adapters(recipe), only)
    folder = find_model(recipe.base)
    tokenizer, context = Tokenizer(folder), load_spec(folder).max_context
    data = _read_data(adapters, tokenizer, context, root, console)
    if dry_run:
        return None
    base = identify(folder, recipe.base)
    keep_freed_memory()
    dtype = choose_dtype(recipe.dtype)
    spec, weights = load(folder, dtype)
    trainees = [make_trainee(a, d, spec, base, dtype) for a, d in zip(adapters, data, strict=True)]
    output.mkdir(parents=True, exist_ok=True)
    for one in trainees:
        path = checkpoint.path_of(output, one.run.name)
        if not resume:
            path.unlink(missing_ok=True)
        elif one.restore(path):
            console.print(f"{one.run.name}: goes on from step {one.run.progress.step} of {one.run.total_steps}")
    trainer = JointTrainer(spec, weights, step_tokens=recipe.step_tokens)
    for one in trainees:
        trainer.add(one.run)
    with stop_on_signal() as stopping:
        _train(trainer, trainees, output, console, stopping, resume)
        interrupted = bool(trainer.active)
    summary = _summarise(trainees, output, base, interrupted)
    _report(summary, output, console)
    return summary


def _read_data(
    adapters: Sequence[AdapterRecipe], tokenizer: Tokenizer, context: int, root: Path, console: Console
) -> list[AdapterData]:
    """Every adapter's data. Prints the audit; raises DataError where it found errors."""
    prepared = [prepare(adapter, tokenizer, context, root) for adapter in adapters]
    audits = [audit for _, audit in prepared]
    print_report(audits, console)
    require_clean(audits)
    return [data for data, _ in prepared]


def _train(
    trainer: JointTrainer,
    trainees: Sequence[Trainee],
    output: Path,
    console: Console,
    stopping: Callable[[], bool],
    resume: bool,
) -> None:
    """Steps until every adapter has ended or a signal came; an adapter is written as soon as it has ended."""
    runs = [one.run for one in trainees]
    metrics = MetricsFile(output / "metrics.jsonl", f"{output.name}-{int(time.time())}", runs if resume else ())
    saved = time.perf_counter()
    for one in trainees:
        if one.run.finished:
            _finish(one, output)
    try:
        with Bars(runs, console) as bars:
            while trainer.active and not stopping():
                active = [one for one in trainees if not one.run.finished]
                results = trainer.step()
                for one in active:
                    metrics.write(one.run, results[one.run.name])
                    bars.update(one.run, results[one.run.name])
                    if one.run.finished:
                        _finish(one, output)
                if time.perf_counter() - saved > CHECKPOINT_SECONDS:
                    _save(trainees, output)
                    saved = time.perf_counter()
    finally:
        metrics.close()
        _save(trainees, output)


def _save(trainees: Sequence[Trainee], output: Path) -> None:
    for one in trainees:
        if not one.run.finished:
            one.save(checkpoint.path_of(output, one.run.name))


def _finish(trainee: Trainee, output: Path) -> None:
    """The last checkpoint, then the PEFT folder, unless the adapter failed."""
    if trainee.failed:
        return
    trainee.save(checkpoint.path_of(output, trainee.run.name))
    trainee.run.final_weights()
    trainee.write(output / trainee.run.name)


def _summarise(trainees: Sequence[Trainee], output: Path, base: BaseIdentity, interrupted: bool) -> Summary:
    adapters = {}
    for one in trainees:
        p, weights = one.run.progress, output / one.run.name / "adapter_model.safetensors"
        adapters[one.run.name] = AdapterSummary(
            steps=p.step,
            tokens=p.tokens,
            loss=p.loss,
            validation_loss=p.validation_loss,
            best_validation_loss=p.best_loss,
            stopped=p.stopped,
            train_seconds=p.seconds,
            adapter_bytes=weights.stat().st_size if weights.exists() else 0,
        )
    summary = Summary(
        base=base.name,
        joint_wall_seconds=sum(one.run.progress.seconds for one in trainees),
        tokens=sum(one.run.progress.tokens for one in trainees),
        interrupted=interrupted,
        adapters=adapters,
    )
    (output / "summary.json").write_bytes(msgspec.json.format(msgspec.json.encode(summary), indent=2))
    return summary


def _report(summary: Summary, output: Path, console: Console) -> None:
    speed = summary.tokens / max(summary.joint_wall_seconds, 1e-9)
    console.print(
        f"{len(summary.adapters)} adapters, {summary.tokens:,} tokens in {summary.joint_wall_seconds:.1f} s "
        f"({speed:,.0f} tokens/s), written to {output}"
    )
    failed = [name for name, adapter in summary.adapters.items() if adapter.stopped == "not finite"]
    if failed:
        raise TrainingError(
            f"the loss of {', '.join(failed)} was not finite; not written",
            hint="lower learning_rate, or set clip",
            param="learning_rate",
        )
    if summary.interrupted:
        console.print("interrupted: `--resume` goes on from here")


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Inside, SIGINT and SIGTERM only ask to stop; a second one ends the process as usual."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_signal(number: int, frame: object) -> None:
        asked.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, on_signal)
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
