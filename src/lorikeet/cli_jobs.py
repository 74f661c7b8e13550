"""`lorikeet jobs`: what a running `lorikeet up` trains and judges, over its HTTP API."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorikeet.errors import ConfigError, LorikeetError

if TYPE_CHECKING:
    from lorikeet.client import Client

jobs_app = typer.Typer(
    help="Submit, watch, cancel and resume the jobs of a running `lorikeet up`.", no_args_is_help=True,
    rich_markup_mode="rich",
)  # fmt: skip

Json = dict[str, Any]
UrlOption = Annotated[str, typer.Option(envvar="LORIKEET_URL", help="Address of the server.")]
KeyOption = Annotated[str | None, typer.Option(envvar="LORIKEET_API_KEY", help="Key of the server.")]
JobArgument = Annotated[str, typer.Argument(help="The job's id, or how it begins.")]

URL = "http://127.0.0.1:8000"
SHOWN = 8  # characters of an id in a table
COLOURS = {"completed": "green", "errored": "red", "canceled": "yellow", "stopping": "yellow", "running": "cyan"}


@jobs_app.command(name="ls", epilog="[bold]Examples[/]\n\nlorikeet jobs ls\n\nlorikeet jobs ls --state running,queued")
def list_jobs(
    state: Annotated[
        str | None, typer.Option(help="Such as queued,running; all are queued, running, stopping, completed, ...")
    ] = None,
    repo: Annotated[str | None, typer.Option(help="Of this repository alone.")] = None,
    limit: Annotated[int, typer.Option(help="How many, newest first.", min=1, max=1000)] = 20,
    url: UrlOption = URL,
    api_key: KeyOption = None,
) -> None:
    """List jobs, newest first."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("job", "kind", "makes", "dataset", "state", "progress", "loss", "age")
    with _client(url, api_key) as client:
        for job in client.api("GET", "/api/jobs", state=state, repo=repo, limit=limit)["items"]:
            table.add_row(
                job["id"][:SHOWN], job["kind"], escape(_makes(job)), escape(job["dataset"] or "-"), _state(job),
                _progress(job), _loss(job), _age(job["created"]),
            )  # fmt: skip
    Console().print(table)


@jobs_app.command(
    epilog="[bold]Examples[/]\n\n"
    "lorikeet jobs submit intent --dataset intent --prompt $'Customer: {text}\\nIntent:' --completion ' {label}'\n\n"
    "lorikeet jobs submit intent --dataset intent --recipe recipe.yaml --set epochs=5 --follow\n\n"
    "lorikeet jobs submit intent --dataset more-intent --parent intent/3"
)
def submit(
    repo: Annotated[str, typer.Argument(help="The repository that gets the version; made if it is not there.")],
    dataset: Annotated[str, typer.Option(help="Name of a dataset of the server.")],
    recipe: Annotated[Path | None, typer.Option(help="YAML with the fields of a job's recipe.")] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="Template of the prompt, with columns as {name}; a line break is $'...\\n...' in a shell."),
    ] = None,
    completion: Annotated[str | None, typer.Option(help="Template of what is learned.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="A field of the recipe, such as rank=32; give it again for more.")
    ] = None,
    parent: Annotated[str | None, typer.Option(help="Go on from this version, such as intent/3.")] = None,
    description: Annotated[str, typer.Option(help="What it is for.")] = "",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Watch it until it has ended.")] = False,
    url: UrlOption = URL,
    api_key: KeyOption = None,
) -> None:
    """Queue a training."""
    fields = _recipe(recipe, set_ or [])
    for flag, template in (("--prompt", prompt), ("--completion", completion)):
        if template is not None and "\\n" in template:
            typer.echo(f"{flag} has a backslash and an n where $'...\\n...' would have a line break", err=True)
    fields |= {name: value for name, value in (("prompt", prompt), ("completion", completion)) if value is not None}
    body = {
        "repo": repo, "create_repo": True, "dataset": dataset, "recipe": fields, "parent": parent,
        "description": description,
    }  # fmt: skip
    with _client(url, api_key) as client:
        job = client.api("POST", "/api/jobs", body)
        typer.echo(f"{job['id']}  makes {job['repo']}/{job['version']}")
        if follow:
            _follow(client, job["id"])


@jobs_app.command(
    epilog="[bold]Examples[/]\n\nlorikeet jobs judge intent/3 --dataset intent --follow\n\n"
    "lorikeet jobs judge intent@production --dataset new-tickets --set split=train\n\n"
    "lorikeet jobs judge --dataset intent --recipe judge.yaml     the base alone: prompt and reference in the recipe"
)
def judge(
    dataset: Annotated[str, typer.Option(help="Name of a dataset of the server.")],
    adapter: Annotated[
        str | None, typer.Argument(help="A version, such as intent/3 or intent@production; without it the base alone.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML with the fields of an evaluation's recipe.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="A field of the recipe, such as split=validation; give it again for more."),
    ] = None,
    task: Annotated[str | None, typer.Option(help="Its name on the leaderboard; default: the dataset's.")] = None,
    description: Annotated[str, typer.Option(help="What it is for.")] = "",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Watch it until it has ended.")] = False,
    url: UrlOption = URL,
    api_key: KeyOption = None,
) -> None:
    """Queue an evaluation: the adapter beside its base, on rows that it has not seen."""
    body = {
        "kind": "eval", "adapter": adapter, "dataset": dataset,
        "recipe": _recipe(recipe, set_ or []), "task": task, "description": description,
    }  # fmt: skip
    with _client(url, api_key) as client:
        job = client.api("POST", "/api/jobs", body)
        typer.echo(f"{job['id']}  {_makes(job)}")
        if follow:
            _follow(client, job["id"])


@jobs_app.command(
    epilog="[bold]Examples[/]\n\nlorikeet jobs logs 1f3a\n\nlorikeet jobs logs -f 1f3a     with its progress"
)
def logs(
    job: JobArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until it has ended.")] = False,
    url: UrlOption = URL,
    api_key: KeyOption = None,
) -> None:
    """Print what a job said."""
    with _client(url, api_key) as client:
        job_id = _find(client, job)
        if follow:
            _follow(client, job_id)
            return
        after = 0
        while (part := client.api("GET", f"/api/jobs/{job_id}/logs", after=after))["text"]:
            typer.echo(part["text"], nl=False)
            after = part["next"]


@jobs_app.command(epilog="[bold]Examples[/]\n\nlorikeet jobs cancel 1f3a")
def cancel(job: JobArgument, url: UrlOption = URL, api_key: KeyOption = None) -> None:
    """Stop a job; it writes a checkpoint, from which `resume` goes on."""
    with _client(url, api_key) as client:
        found = client.api("POST", f"/api/jobs/{_find(client, job)}/cancel")
        typer.echo(f"{found['id']} is {found['state']}")


@jobs_app.command(epilog="[bold]Examples[/]\n\nlorikeet jobs resume 1f3a")
def resume(job: JobArgument, url: UrlOption = URL, api_key: KeyOption = None) -> None:
    """Queue a job again that failed or was canceled; it goes on from its last checkpoint."""
    with _client(url, api_key) as client:
        found = client.api("POST", f"/api/jobs/{_find(client, job)}/resume")
        typer.echo(f"{found['id']} is {found['state']}")


# --- watching -----------------------------------------------------------------------------------------------------


def _follow(client: Client, job_id: str) -> None:
    """Its log, with a bar below it on a terminal. Raises `LorikeetError` when it fails."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"),
               TimeRemainingColumn())  # fmt: skip
    job: Json = {}
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("waiting", total=None, loss="")
        for message in client.events(f"/api/jobs/{job_id}/stream"):
            if message["type"] == "log":
                for line in message["text"].splitlines():
                    bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
            elif message["type"] == "metric":
                bar.update(
                    task, completed=message["step"], loss=f"loss {message['loss']:.3f}" if message["loss"] else ""
                )
            elif message["type"] == "state":
                job = message["job"]
                done = job["progress"] or {}
                bar.update(task, description=job["stage"] or job["state"], total=done.get("steps") or done.get("total"))
                if done:
                    bar.update(task, completed=done.get("step") or done.get("done") or 0)
    if job.get("error"):
        raise LorikeetError(job["error"]["message"], code=job["error"]["code"], hint=job["error"]["hint"])
    for line in _outcome(job):
        console.print(line, highlight=False)


def _outcome(job: Json) -> Iterator[str]:
    result = job.get("result") or {}
    if job.get("kind") == "train" and job["state"] == "completed":
        yield f"{job['repo']}/{job['version']}: {result['steps']} steps in {result['train_seconds']:.1f} s"
    for line in result.get("results", []):
        adapter = "" if line["adapter"] is None else f", {line['adapter_reference']} {100 * line['adapter']:.1f}"
        yield f"{line['task']} ({line['metric']}, {line['n']} rows): base {100 * line['base']:.1f}{adapter}"
    if job.get("state") == "canceled":
        yield "canceled; `lorikeet jobs resume` goes on from its checkpoint"


# --- words --------------------------------------------------------------------------------------------------------


@contextmanager
def _client(url: str, api_key: str | None) -> Iterator[Client]:
    from lorikeet.client import Client

    with Client(url, api_key=api_key) as client:
        try:
            yield client
        except LorikeetError as error:
            if error.code == "invalid_api_key":  # the server's hint is for programs
                error.hint = "give one with --api-key or LORIKEET_API_KEY; `lorikeet keys create` makes one"
            raise


def _find(client: Client, prefix: str) -> str:
    """The id of the job that begins so, among the newest thousand."""
    if len(prefix) >= 36:
        return prefix
    if not prefix:
        raise ConfigError("job: expected an id, or how it begins", hint="`lorikeet jobs ls` lists them", param="job")
    found = [job["id"] for job in client.api("GET", "/api/jobs", limit=1000)["items"] if job["id"].startswith(prefix)]
    if len(found) != 1:
        said = "none" if not found else f"{len(found)}: {', '.join(found[:3])}"
        hint = "give more of its id" if found else "`lorikeet jobs ls` lists them"
        raise ConfigError(f"job: found {said} that begin with {prefix!r}", hint=hint, param="job")
    return str(found[0])


def _recipe(path: Path | None, changes: list[str]) -> Json:
    import yaml

    from lorikeet.config import load_yaml

    fields: Json = {}
    if path is not None:
        try:
            fields = load_yaml(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"--recipe: {path} cannot be read: {error}", param="--recipe") from None
        if not isinstance(fields, dict):
            raise ConfigError(f"--recipe: {path}: expected a mapping, found {type(fields).__name__}", param="--recipe")
    for change in changes:
        name, _, value = change.partition("=")
        if not name.strip() or not value.strip():
            raise ConfigError(f"--set: found {change!r}; expected a field such as rank=32", param="--set")
        try:
            fields[name.strip()] = load_yaml(value)
        except yaml.YAMLError as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"--set: {change!r} is not YAML: {reason}", param="--set") from None
    return fields


def _makes(job: Json) -> str:
    if job["kind"] == "eval":
        return f"judges {job['adapter'] or job['base']}"
    return f"{job['repo']}/{job['version']}"


def _state(job: Json) -> str:
    colour = COLOURS.get(job["state"], "white")
    stage = f" ({job['stage']})" if job["stage"] else ""
    return f"[{colour}]{job['state']}{stage}[/]"


def _progress(job: Json) -> str:
    progress = job["progress"] or {}
    done, total = progress.get("step", progress.get("done")), progress.get("steps", progress.get("total"))
    return "-" if done is None else f"{done} of {total}"


def _loss(job: Json) -> str:
    loss = (job["progress"] or {}).get("loss")
    return "-" if loss is None else f"{loss:.3f}"


def _age(since: float) -> str:
    seconds = max(0.0, time.time() - since)
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
