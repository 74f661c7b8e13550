"""The engine in this process, for offline use: texts in, completions out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from msgspec.structs import replace

from lorikeet.adapters.configs import CONFIG
from lorikeet.adapters.files import Signature, read_lock, signature_of
from lorikeet.config import EngineConfig
from lorikeet.engine.compiler import AdapterCompiler
from lorikeet.engine.hosted import HostedEngine
from lorikeet.errors import ConfigError, InvalidRequestError, LorikeetError, NotFoundError
from lorikeet.model.sources import find_model
from lorikeet.model.tokenizer import StopMatcher, StreamDecoder, Tokenizer, Tokenizers
from lorikeet.types import AdapterInfo, EngineStats, Event, FinishReason, Request, SamplingParams, TokenLogprob

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]
T = TypeVar("T")


@dataclass(slots=True)
class Completion:
    """What came of one prompt.

    `tokens` are all generated ids, a stop token or the tokens of a stop string included; `text` shows neither.
    `logprobs` has an entry for each token, `prompt_logprobs` one for each prompt token, where they were asked for.
    `seconds` are those from the engine's taking the request to its last token.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    stop: str | None = None  # the stop string that ended it
    seconds: float = field(default=0.0, compare=False)


class LLM:
    """A base model with adapters, in this process.

    `model` is a folder, a hub id or the embedded base; every PEFT folder below `adapters` is known by its own name.
    `settings` are the fields of `EngineConfig`. One thread may use it at a time.
    """

    def __init__(self, model: str = "lorikeet-nano", *, adapters: str | Path | None = None, **settings: Any) -> None:
        unknown = sorted(set(settings) - set(EngineConfig.__struct_fields__))
        if unknown:
            raise ConfigError(
                f"{unknown[0]}: no such setting; known are {', '.join(EngineConfig.__struct_fields__)}",
                param=unknown[0],
            )
        config = EngineConfig(model=model, **settings)
        if config.chunk_tokens is None:  # nobody watches the tokens come: whole prompts at once are faster
            config = replace(config, chunk_tokens=config.step_tokens)
        self.config = config
        self.engine = HostedEngine.build(self.config)
        self.tokenizer = Tokenizer(find_model(model))
        self._tokenizers = Tokenizers(lambda: self.tokenizer)
        self._compiler = AdapterCompiler(self.engine.loader_settings(), self._tokenizers)
        self._root = None if adapters is None else Path(adapters)
        if self._root is not None and not self._root.is_dir():
            raise ConfigError(f"adapters: {self._root} is not a folder", param="adapters")
        self._submitted = 0
        self._known: dict[Path, _Adapter] = {}  # by folder, as it was then

    # --- text and tokens --------------------------------------------------------------------------------------

    def tokenizer_of(self, adapter: str | None) -> Tokenizer:
        """The tokenizer that an adapter ships, else the base's."""
        return self.tokenizer if adapter is None else self._compiled(self._folder(adapter)).tokenizer

    def encode_plain(self, text: str, adapter: str | None = None) -> list[int]:
        """Token ids of a text that continues another: nothing is put before it."""
        return self.tokenizer_of(adapter).encode(text, add_special_tokens=False)

    def render_chat(self, messages: Messages, adapter: str | None = None) -> list[int]:
        """The prompt of a conversation, in the adapter's own chat template if it ships one, else in the model's."""
        template = None
        if adapter is not None:
            lock = read_lock(self._folder(adapter))
            if lock is not None and lock.template is not None and lock.template.kind == "chat":
                template = lock.template.text
        return self.encode_plain(self.tokenizer_of(adapter).chat(messages, template), adapter)

    # --- generation -------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Prompt],
        adapters: Sequence[str | None] | str | None = None,
        sampling: Sequence[SamplingParams] | SamplingParams | None = None,
        stop: Sequence[str] | Sequence[Sequence[str]] | str | None = None,
        *,
        concurrency: int | None = None,
        progress: bool = False,
        on_done: Callable[[int], None] | None = None,
    ) -> list[Completion]:
        """Completions in the order of the prompts, all run in one mixed batch.

        Each of `adapters`, `sampling` and `stop` is one value for all prompts, or one for each. An adapter is a name
        below the adapters' folder, or a PEFT folder. `concurrency`: so many requests are in the engine at once, None:
        as many as its queue takes. `on_done` hears how many more prompts are finished. The first request that cannot
        be run raises its LorikeetError, and ends the others.
        """
        if concurrency is not None and concurrency < 1:
            raise InvalidRequestError(f"concurrency: found {concurrency}; expected 1 or more", param="concurrency")
        count = len(prompts)
        used = self._register(_each("adapters", adapters, count, (str, type(None))))
        sampling_each = _each("sampling", SamplingParams() if sampling is None else sampling, count, (SamplingParams,))
        jobs = [
            self._job(i, *parts)
            for i, parts in enumerate(zip(prompts, used, sampling_each, _stops(stop, count), strict=True))
        ]
        self._submitted += count
        with _reporting(progress, count) as report:
            for finished in self._run(jobs, min(concurrency or self.config.queue, self.config.queue)):
                report(finished)
                if on_done is not None:
                    on_done(finished)
        return [job.completion for job in jobs]

    def _job(
        self, index: int, prompt: Prompt, adapter: _Adapter | None, params: SamplingParams, stops: Sequence[str]
    ) -> _Job:
        tokenizer = self.tokenizer if adapter is None else adapter.tokenizer
        if tokenizer is not self.tokenizer:
            own = set(tokenizer.stop_ids) - self.engine.stop_ids
            params = replace(params, stop_token_ids=tuple(sorted(own.union(params.stop_token_ids))))
        request = Request(
            request_id=f"llm-{self._submitted + index}",
            tokens=tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt),
            adapter=None if adapter is None else adapter.info.digest,
            sampling=params,
        )
        stop_ids = frozenset(() if params.ignore_eos else self.engine.stop_ids.union(params.stop_token_ids))
        return _Job(request, tokenizer, stops, stop_ids)

    def chat(
        self,
        conversations: Sequence[Messages],
        adapters: Sequence[str | None] | str | None = None,
        sampling: Sequence[SamplingParams] | SamplingParams | None = None,
        stop: Sequence[str] | Sequence[Sequence[str]] | str | None = None,
        *,
        progress: bool = False,
        on_done: Callable[[int], None] | None = None,
    ) -> list[Completion]:
        """The assistant's next message in each conversation; otherwise as `generate`."""
        each = _each("adapters", adapters, len(conversations), (str, type(None)))
        prompts = [self.render_chat(messages, name) for messages, name in zip(conversations, each, strict=True)]
        return self.generate(prompts, each, sampling, stop, progress=progress, on_done=on_done)

    def stats(self) -> EngineStats:
        """The engine's counters and gauges."""
        return self.engine.stats()

    def _run(self, jobs: Sequence[_Job], most: int) -> Iterator[int]:
        """Step until all jobs have ended, at most so many at once; how many did, step by step."""
        by_id: dict[str, _Job] = {}
        todo = iter(jobs)
        following = next(todo, None)
        try:
            while by_id or following is not None:
                while following is not None and len(by_id) < most:
                    following.began = time.perf_counter()
                    self.engine.add(following.request)
                    by_id[following.request.request_id] = following
                    following = next(todo, None)
                finished = 0
                for event in self.engine.step():
                    job = by_id[event.request_id]
                    if job.push(event):
                        self.engine.cancel(event.request_id)
                    if event.finish is not None:
                        job.completion.seconds = time.perf_counter() - job.began
                        del by_id[event.request_id]
                        finished += 1
                if finished:
                    yield finished
        finally:  # an error or an interrupt: nothing may be left behind for the next call
            for request_id in by_id:
                self.engine.cancel(request_id)
            while by_id and self.engine.has_work():
                self.engine.step()

    # --- adapters ---------------------------------------------------------------------------------------------

    def adapters(self) -> dict[str, Path]:
        """The adapters below the adapters' folder as they are on disk now. Raises ConfigError for a name used twice."""
        found: dict[str, Path] = {}
        for config in sorted(self._root.rglob(CONFIG)) if self._root is not None else ():
            folder = config.parent
            if folder.name in found:
                raise ConfigError(f"adapters: {found[folder.name]} and {folder} have the same name", param="adapters")
            found[folder.name] = folder
        return found

    def _folder(self, name: str) -> Path:
        known = self.adapters()
        if name in known:
            return known[name]
        if (Path(name) / CONFIG).is_file():
            return Path(name)
        raise NotFoundError(
            f"adapters: no adapter {name!r}",
            hint=f"known are {', '.join(known) or 'none'}; or name a PEFT folder",
            param="adapters",
        )

    def _register(self, names: Sequence[str | None]) -> list[_Adapter | None]:
        """Compile what is used for the first time, or was written anew since."""
        used = {name: self._compiled(self._folder(name)) for name in dict.fromkeys(names) if name is not None}
        return [None if name is None else used[name] for name in names]

    def _compiled(self, folder: Path) -> _Adapter:
        signature, key = signature_of(folder), folder.resolve()
        if key not in self._known or self._known[key].signature != signature:
            info = self._compiler.compile(folder)
            tokenizer = self._tokenizers.of(folder, shares_vocabulary=info.tokenizer == "settings")
            self.engine.register(info)
            self._known[key] = _Adapter(signature, info, tokenizer or self.tokenizer)
        return self._known[key]


@dataclass(frozen=True, slots=True)
class _Adapter:
    """What was found in a folder as it was at `signature`."""

    signature: Signature | None
    info: AdapterInfo
    tokenizer: Tokenizer


class _Job:
    """One request and the completion that grows out of its events."""

    def __init__(self, request: Request, tokenizer: Tokenizer, stops: Sequence[str], stop_ids: frozenset[int]) -> None:
        self.request = request
        self.began = 0.0
        self.completion = Completion(prompt_tokens=len(request.tokens))
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._stream: StreamDecoder | None = tokenizer.stream() if stops else None
        self._matcher = StopMatcher(stops)

    def push(self, event: Event) -> bool:
        """Take in an event; True when a stop string is complete and the request should be cancelled."""
        if event.error is not None:
            raise LorikeetError.from_info(event.error)
        done = self.completion
        if done.stop is not None:  # the engine's last word on what we have ended
            return False
        done.tokens += event.tokens
        done.cached_tokens = event.cached_tokens
        if event.logprobs is not None:
            done.logprobs = (done.logprobs or []) + event.logprobs
        if event.prompt_logprobs is not None:
            done.prompt_logprobs = event.prompt_logprobs
        done.finish_reason = event.finish
        if self._stream is None:
            if event.finish is not None:
                done.text = self._tokenizer.decode(self._visible(done.tokens, event.finish))
            return False
        done.text += self._matcher.push(self._stream.push(self._visible(event.tokens, event.finish)))
        if event.finish is not None and self._matcher.matched is None:
            done.text += self._matcher.push(self._stream.finish()) + self._matcher.finish()
        if self._matcher.matched is not None:
            done.finish_reason, done.stop = "stop", self._matcher.matched
            return event.finish is None
        return False

    def _visible(self, tokens: list[int], finish: FinishReason | None) -> list[int]:
        return tokens[:-1] if finish == "stop" and tokens[-1:] and tokens[-1] in self._stop_ids else tokens


def _each(name: str, given: Any, count: int, single: tuple[type, ...]) -> list[Any]:
    """One value for each prompt. Raises InvalidRequestError where the numbers differ."""
    if isinstance(given, single):
        return [given] * count
    if len(given) != count:
        raise InvalidRequestError(
            f"{name}: found {len(given)} for {count} prompts; expected one or {count}", param=name
        )
    return list(given)


def _stops(given: Sequence[str] | Sequence[Sequence[str]] | str | None, count: int) -> list[Sequence[str]]:
    """Stop strings of each prompt; a flat list of strings is for all of them."""
    if given is None or isinstance(given, str):
        return [[given] if given else []] * count
    if all(isinstance(one, str) for one in given):
        return [[str(one) for one in given]] * count
    return _each("stop", given, count, (str,))


@contextmanager
def _reporting(shown: bool, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on the terminal's error stream, or nothing."""
    if not shown:
        yield lambda finished: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("generating"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)
        yield lambda finished: bar.advance(task, finished)
