"""Pretraining a small base model on a CPU: one loop that can be stopped, resumed and ended by its decay at any time."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer
from torch import Tensor

from lorikeet.data.synthesize import documents
from lorikeet.errors import ConfigError, DataError
from lorikeet.model.decoder import DecoderWeights, forward
from lorikeet.model.spec import ModelSpec
from lorikeet.train.corpus import (
    Corpus,
    Documents,
    Mixture,
    digest,
    documents_digest,
    file_digest,
    held_out_rows,
    read_records,
    tokenised,
    tokenizer_texts,
    within,
)
from lorikeet.train.heap import keep_freed_memory
from lorikeet.train.optim import AdamW, Muon, TrapezoidalSchedule, global_norm
from lorikeet.train.pretrain_export import RunFacts, export_model
from lorikeet.train.pretrain_ops import EMBED, PretrainOps, WorkingCopy, causal_batch, causal_loss, initial_masters
from lorikeet.train.pretrain_recipe import Recipe, SyntheticSource, TextSource, load_recipe
from lorikeet.train.tokenizer import token_bytes, train_tokenizer

CHECKPOINT = "checkpoint.pt"


def run_pretrain(
    recipe_path: Path,
    documents: Documents = documents,
    *,
    resume: bool = False,
    until: int | None = None,
    minutes: float | None = None,
    decay: int | None = None,
    export: Path | None = None,
    console: Console | None = None,
) -> None:
    """Train the base model of a recipe, or export it from its last checkpoint.

    documents: what sources of kind `synthetic` are made of, by seed; the project's own text.
    resume: go on from the checkpoint in the recipe's state folder; without it, one that exists is an error.
    until: stop after this many tokens in all, with a checkpoint. minutes: the same after this time.
    decay: end the run from here: the learning rate falls to zero over this many tokens.
    export: only write the model as it stands in the last checkpoint to this folder.
    Raises ConfigError for a recipe that cannot be run, DataError for sources that cannot be read.
    """
    console = console or Console()
    recipe = load_recipe(recipe_path)
    torch.set_num_threads(recipe.threads)
    keep_freed_memory()
    state = recipe.state_folder()
    exists = (state / CHECKPOINT).exists()
    if exists and not (resume or export):
        raise ConfigError(
            f"{state / CHECKPOINT} exists already",
            hint="go on with --resume, or remove that folder to begin anew",
            param="state",
        )
    if not exists and (resume or export):
        raise ConfigError(f"{state / CHECKPOINT} does not exist", hint="begin without --resume", param="state")
    sources = _Sources(recipe, documents)
    run = PretrainRun(recipe, sources.tokenizer(state), console)
    if exists:
        run.load(torch.load(state / CHECKPOINT, weights_only=True, map_location="cpu"))
    if export is not None:
        run.export(export)
        return
    run.attach(sources.corpora(run.tokenizer, state / "corpus", console))
    if decay is not None:
        run.end_with_decay(decay)
    run.train(until, minutes)
    if run.finished:
        run.export(Path(recipe.export))


class _Sources:
    """Opens the sources of a recipe."""

    def __init__(self, recipe: Recipe, documents: Documents) -> None:
        self.recipe, self.documents = recipe, documents
        for source in recipe.sources:
            if isinstance(source, TextSource) and not Path(source.path).is_file():
                raise DataError(
                    f"source {source.name}: {source.path} is not a file",
                    hint="paths are relative to the folder the command runs in",
                    param="path",
                )

    def _records(self, source: TextSource | SyntheticSource) -> Iterator[str]:
        if isinstance(source, TextSource):
            return read_records(Path(source.path))
        return within(self._generator(source)(source.seed), source.characters)

    def _content(self, source: TextSource | SyntheticSource) -> str:
        if isinstance(source, TextSource):
            return file_digest(Path(source.path))
        return documents_digest(self._generator(source), source.seed, source.characters)

    def _generator(self, source: SyntheticSource) -> Documents:
        return self.documents if source.families is None else partial(self.documents, families=source.families)

    def tokenizer(self, state: Path) -> Tokenizer:
        """The run's tokenizer: trained at its first start, fixed from then on."""
        path = state / "tokenizer.json"
        if not path.exists():
            wanted = self.recipe.tokenizer.characters
            streams = [
                within(self._pieces_of(source), wanted[source.name])
                for source in self.recipe.sources
                if source.name in wanted
            ]
            trained = train_tokenizer((text for stream in streams for text in stream), self.recipe.model.vocab_size)
            state.mkdir(parents=True, exist_ok=True)
            trained.save(str(path))
        tokenizer = Tokenizer.from_file(str(path))
        if tokenizer.get_vocab_size() != self.recipe.model.vocab_size:
            raise ConfigError(
                f"vocab_size is {self.recipe.model.vocab_size}, but {path} has {tokenizer.get_vocab_size()} tokens",
                hint="correct the recipe, or remove that folder to begin anew",
                param="model.vocab_size",
            )
        return tokenizer

    def _pieces_of(self, source: TextSource | SyntheticSource) -> Iterator[str]:
        return tokenizer_texts(self._records(source))

    def corpora(self, tokenizer: Tokenizer, cache: Path, console: Console) -> list[Corpus]:
        found = []
        for source in self.recipe.sources:
            began = time.monotonic()
            records = partial(self._records, source)
            corpus = tokenised(source.name, records, self._content(source), tokenizer, cache)
            console.print(
                f"{source.name}: {len(corpus.tokens):,} tokens, {len(corpus.held_out):,} held out, "
                f"{time.monotonic() - began:.0f} s"
            )
            found.append(corpus)
        return found


class PretrainRun:
    """The state of a run: weights, optimizers, data cursor, clock. Randomness is a function of seed and cursor."""

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer, console: Console) -> None:
        self.recipe, self.tokenizer, self.console = recipe, tokenizer, console
        self.spec = recipe.model.spec()
        self.device = _device(recipe.device)
        self.masters = {name: p.to(self.device) for name, p in initial_masters(self.spec, recipe.seed).items()}
        self.working = WorkingCopy(self.spec, self.masters, getattr(torch, recipe.dtype))
        matrices = {n: p for n, p in self.masters.items() if p.dim() == 2 and n != EMBED}
        others = {n: p for n, p in self.masters.items() if n not in matrices}
        plan = recipe.optimization
        self.muon = Muon(matrices, momentum=plan.momentum, weight_decay=plan.weight_decay)
        self.adamw = AdamW(others)
        self.schedule = TrapezoidalSchedule(warmup=plan.warmup_tokens, total=plan.tokens, decay=plan.decay_tokens)
        self.step, self.tokens, self.core_seconds = 0, 0, 0.0
        self.corpora: list[Corpus] = []
        self.taken: dict[str, int] = {}
        self.mixture: Mixture | None = None
        self.validation: dict[str, float] = {}
        self.byte_lengths = torch.tensor(token_bytes(tokenizer), device=self.device)
        self.loss = _compiled(self.spec, recipe)
        self.stopping = False

    @property
    def finished(self) -> bool:
        return self.tokens >= self.schedule.total

    def attach(self, corpora: list[Corpus]) -> None:
        """Give the run its text, from where its cursor stands."""
        self.corpora = corpora
        self.mixture = Mixture(corpora, {s.name: s.share for s in self.recipe.sources}, self.recipe.seed)
        self.mixture.taken.update({name: n for name, n in self.taken.items() if name in self.mixture.taken})
        self.taken = self.mixture.taken

    def end_with_decay(self, tokens: int) -> None:
        """Let the learning rate fall to zero over the next `tokens` tokens, and the run end there."""
        self.schedule = TrapezoidalSchedule(warmup=self.schedule.warmup, total=self.tokens + tokens, decay=tokens)

    def train(self, until: int | None = None, minutes: float | None = None) -> None:
        """Train until the schedule's end, `until` tokens in all, `minutes` from now, or SIGTERM; then checkpoint."""
        goal = min(self.schedule.total, until or self.schedule.total)
        began = saved = time.monotonic()
        with self._progress(goal) as show, _on_sigterm(self._stop):
            while self.tokens < goal and not self.stopping:
                self._logged_step(show)
                now = time.monotonic()
                if now - saved > self.recipe.checkpoint_minutes * 60:
                    self.save()
                    saved = now
                if minutes is not None and now - began > minutes * 60:
                    break
            if self.finished:
                self._validate()
        self.save()

    def _stop(self) -> None:
        self.stopping = True

    def _logged_step(self, show: Callable[[float, float], None]) -> None:
        began, cpu_began = time.monotonic(), time.process_time()
        loss, norm = self.train_step()
        took = time.monotonic() - began
        self.core_seconds += time.process_time() - cpu_began
        if not math.isfinite(loss):
            raise DataError(
                f"the loss is {loss} at step {self.step}",
                hint="lower the learning rates and resume from the last checkpoint",
                param="loss",
            )
        show(loss, self.recipe.optimization.batch_tokens / took)
        if self.step % self.recipe.log_steps == 0:
            self._record("train", loss=loss, grad_norm=norm, seconds=took)
        if self.step % self.recipe.validation_steps == 0:
            self._validate()

    def train_step(self) -> tuple[float, float]:
        """One optimizer step: (mean loss in nats a token, norm of the gradient)."""
        assert self.mixture is not None, "attach() the text first"
        plan = self.recipe.optimization
        length = plan.length if self.tokens < plan.long_from else self.spec.max_context
        total = 0.0
        for _ in range(plan.micro_batches):
            rows = self.mixture.rows(plan.micro_tokens // length, length + 1).to(self.device)
            loss = self.loss(self.working.weights, rows)
            (loss / plan.micro_batches).backward()
            total += loss.item() / plan.micro_batches
        grads = self.working.grads()
        factor = self.schedule(self.tokens)
        self.muon.step(grads, factor * plan.muon_lr)
        self.adamw.step(grads, factor * plan.adamw_lr)
        norm = global_norm(list(grads.values())).item()
        self.working.refresh()
        self.step += 1
        self.tokens += plan.batch_tokens
        return total, norm

    def _validate(self) -> None:
        for corpus in self.corpora:
            rows = held_out_rows(corpus, self.recipe.optimization.length, self.recipe.validation_rows)
            loss, bits = bits_per_byte(self.spec, self.working.weights, rows.to(self.device), self.byte_lengths)
            self.validation[corpus.name] = bits
            self._record("validation", loss=loss, source=corpus.name, bits_per_byte=bits)
        text = ", ".join(f"{name} {bits:.3f}" for name, bits in self.validation.items())
        self.console.print(f"step {self.step}, {self.tokens / 1e6:.2f} M tokens: bits per byte {text}")

    def _record(self, split: str, **values: Any) -> None:
        line = {"v": 1, "t": time.time(), "run": self.recipe.name, "adapter": None, "step": self.step, "split": split}
        line |= {"tokens": self.tokens, "lr": self.schedule(self.tokens) * self.recipe.optimization.muon_lr} | values
        folder = self.recipe.state_folder()
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    @contextmanager
    def _progress(self, goal: int) -> Iterator[Callable[[float, float], None]]:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.1f}%"))
        with Progress(*columns, TimeRemainingColumn(), console=self.console) as progress:
            task = progress.add_task(self.recipe.name, total=goal, completed=self.tokens)

            def show(loss: float, speed: float) -> None:
                bits = "".join(f" {name} {value:.3f}" for name, value in self.validation.items())
                text = f"step {self.step} loss {loss:.3f} {speed:,.0f} tokens/s bits/byte{bits or ' -'}"
                progress.update(task, completed=self.tokens, description=text)
                if not self.console.is_terminal and self.step % self.recipe.log_steps == 0:
                    self.console.print(text)

            yield show

    def save(self) -> None:
        """Write the checkpoint by atomic rename."""
        folder = self.recipe.state_folder()
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.state_dict(), folder / "checkpoint.partial")
        os.replace(folder / "checkpoint.partial", folder / CHECKPOINT)

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": digest(repr(self.spec)),
            "masters": self.masters,
            "muon": self.muon.state_dict(),
            "adamw": self.adamw.state_dict(),
            "taken": dict(self.taken),
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.core_seconds,
            "schedule": [self.schedule.total, self.schedule.decay],
            "validation": dict(self.validation),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint; ConfigError when it is of another shape."""
        if state["model"] != digest(repr(self.spec)):
            raise ConfigError(
                "the checkpoint is of another model shape than the recipe's `model`",
                hint="undo the change of the recipe, or remove the state folder to begin anew",
                param="model",
            )
        for name, master in self.masters.items():
            master.copy_(state["masters"][name])
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])
        self.working.refresh()
        self.taken = dict(state["taken"])
        self.step, self.tokens, self.core_seconds = state["step"], state["tokens"], state["seconds"]
        total, decay = state["schedule"]
        self.schedule = TrapezoidalSchedule(warmup=self.schedule.warmup, total=total, decay=decay)
        self.validation = dict(state["validation"])

    def export(self, folder: Path) -> None:
        """Write the model as it stands in the layout of a Hugging Face Llama."""
        facts = RunFacts(
            step=self.step,
            tokens=self.tokens,
            core_hours=self.core_seconds / 3600,
            finished=self.finished,
            bits_per_byte=self.validation,
            rows=self.taken,
        )
        export_model(folder, self.recipe, self.spec, self.masters, self.tokenizer, facts)
        self.console.print(f"step {self.step} exported to {folder}")


def bits_per_byte(spec: ModelSpec, weights: DecoderWeights, rows: Tensor, byte_lengths: Tensor) -> tuple[float, float]:
    """(nats a token, bits a byte of text) over rows [n, length + 1], each token from those before it in its row."""
    nats, text = 0.0, 0
    with torch.inference_mode():
        for part in rows.split(max(1, 4096 // rows.shape[1])):
            targets = part[:, 1:].flatten()
            logits = forward(spec, weights, causal_batch(part), PretrainOps(part.shape[1] - 1))
            nats += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
            text += int(byte_lengths[targets].sum())
    return nats / rows[:, 1:].numel(), nats / math.log(2) / max(text, 1)


def _compiled(spec: ModelSpec, recipe: Recipe) -> Callable[[DecoderWeights, Tensor], Tensor]:
    """The loss as one compiled graph where a C++ compiler is found, else eagerly: the same numbers, slower."""
    _ = spec.groups, spec.sites  # cached now: a compiler cannot trace a cached property being filled

    def loss(weights: DecoderWeights, rows: Tensor) -> Tensor:
        return causal_loss(spec, weights, rows)

    if recipe.compile == "never" or not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")):
        return loss
    return cast(Callable[[DecoderWeights, Tensor], Tensor], torch.compile(loss, dynamic=False))


def _device(wanted: str) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch finds no CUDA device", hint="use auto or cpu", param="device")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


@contextmanager
def _on_sigterm(act: Callable[[], None]) -> Iterator[None]:
    """Call `act` instead of dying while the block runs (a second SIGTERM is no different)."""
    try:
        before = signal.signal(signal.SIGTERM, lambda *_: act())
    except ValueError:  # not the main thread: signals are somebody else's there
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
