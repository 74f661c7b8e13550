"""`lorikeet eval`: the harness of `evals` joined to what generates, a running server or the offline engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lorikeet.config import EvalRecipe, chosen, read_recipe
from lorikeet.data.formats import read_rows
from lorikeet.errors import ConfigError, NotFoundError
from lorikeet.evals import report
from lorikeet.evals.harness import Answer, Generate, Job, Result, judge, prepare

if TYPE_CHECKING:
    from lorikeet.client import AsyncClient

AT_ONCE = 32  # questions under way


def run_eval(
    recipe_path: Path,
    *,
    url: str | None = None,
    only: Collection[str] = (),
    adapters: Path | None = None,
    output: Path | None = None,
    concurrency: int = AT_ONCE,
    api_key: str | None = None,
    root: Path | None = None,
    console: Console | None = None,
) -> list[Result]:
    """Judge the tasks of a recipe (`only` some), print the table and write the results file.

    `url` names a running server; without it the offline engine loads the recipe's base and `adapters` (else the
    recipe's `output`). Paths in the recipe are relative to `root` (the working directory). A `summary.json` beside
    the adapters adds what their training cost.
    """
    console = console or Console()
    recipe = read_recipe(recipe_path, EvalRecipe)
    recipe = replace(recipe, tasks=chosen(recipe.tasks, only))
    root = root or Path.cwd()
    folder = adapters or (root / recipe.output if recipe.output is not None else None)
    prepared = prepare(recipe, root, read_rows)
    questions = sum(len(item.prompts) * (2 if item.task.adapter else 1) for item in prepared)
    with _progress(console) as progress:
        bar = progress.add_task("judging", total=questions)

        def on_done(_: int) -> None:
            progress.advance(bar)

        generate: Generate
        if url is not None:
            generate = _through_server(url, api_key, concurrency, on_done)
        else:
            generate = through_engine(recipe, folder, on_done, concurrency)
        results = judge(recipe, prepared, generate)
    summary = folder / "summary.json" if folder is not None else None
    if summary is not None and summary.exists():
        report.add_training(
            results, {task.name: task.adapter for task in recipe.tasks}, json.loads(summary.read_text(encoding="utf-8"))
        )
    console.print(report.table(results))
    target = output or (root / recipe.results if recipe.results is not None else None)
    if target is not None:
        report.write(results, target)
        console.print(f"results written to {target}")
    return results


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def _through_server(url: str, api_key: str | None, concurrency: int, on_done: Callable[[int], None]) -> Generate:
    from lorikeet.client import AsyncClient

    async def run(jobs: Sequence[Job]) -> list[Answer]:
        async with AsyncClient(url, api_key=api_key) as client:
            base = await _check_models(client, jobs)
            bodies = [_body(job, base) for job in jobs]
            completions = await client.many(bodies, concurrency=concurrency, on_done=on_done)
        return [Answer(c.text, c.seconds * 1000) for c in completions]

    return lambda jobs: asyncio.run(run(jobs))


async def _check_models(client: AsyncClient, jobs: Sequence[Job]) -> str:
    """The base's name; raises `NotFoundError` naming every adapter that the server does not list."""
    models = await client.models()
    names = {model["id"] for model in models}
    missing = sorted({job.adapter for job in jobs if job.adapter is not None} - names)
    if missing:
        raise NotFoundError(
            f"the server does not serve {', '.join(missing)}",
            hint=f"it serves {', '.join(sorted(names))}; start it with --adapters DIR holding the missing ones",
        )
    return next(str(model["id"]) for model in models if model.get("parent") is None)


def _body(job: Job, base: str) -> Mapping[str, Any]:
    body: dict[str, Any] = {"model": job.adapter or base, "max_tokens": job.max_tokens, "temperature": 0}
    body |= {"messages": job.messages} if job.messages is not None else {"prompt": job.prompt}
    if job.stop:
        body["stop"] = list(job.stop)
    if job.choices is not None:
        body["guided_choice"] = list(job.choices)
    return body


def through_engine(
    recipe: EvalRecipe,
    adapters: Path | None,
    on_done: Callable[[int], None],
    concurrency: int = AT_ONCE,
    **settings: Any,
) -> Generate:
    """An engine of this process, with so many questions in it at once: latencies are of that load.

    `settings` are fields of `EngineConfig`.
    """
    if recipe.base is None:
        raise ConfigError(
            "$.base: missing; the offline engine needs it", hint="name a base, or a server with --url", param="$.base"
        )
    base = recipe.base

    def run(jobs: Sequence[Job]) -> list[Answer]:
        from lorikeet.engine.llm import LLM
        from lorikeet.types import SamplingParams

        llm = LLM(base, adapters=None if adapters is None else str(adapters), **settings)
        prompts = [
            llm.render_chat(job.messages, adapter=job.adapter) if job.messages is not None else job.prompt or ""
            for job in jobs
        ]
        tokenizers = {adapter: llm.tokenizer_of(adapter) for adapter in {job.adapter for job in jobs}}

        def encoded(job: Job) -> tuple[tuple[int, ...], ...] | None:
            if job.choices is None:
                return None
            tokenizer = tokenizers[job.adapter]
            return tuple(tuple(tokenizer.encode(one, add_special_tokens=False)) for one in job.choices)

        sampling = [
            SamplingParams(
                max_tokens=job.max_tokens,
                temperature=0.0,
                choices=encoded(job),
            )
            for job in jobs
        ]
        completions = llm.generate(
            prompts,
            adapters=[job.adapter for job in jobs],
            sampling=sampling,
            stop=[list(job.stop) for job in jobs],
            concurrency=concurrency,
            on_done=on_done,
        )
        return [Answer(completion.text, completion.seconds * 1000) for completion in completions]

    return run
