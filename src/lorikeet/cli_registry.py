"""`lorikeet adapters ls | show | import | ...` and `lorikeet datasets ...`: the registry in a home folder."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorikeet.cli_flags import with_flags
from lorikeet.cli_home import HomeFlags, local_actor, opened
from lorikeet.cli_progress import adapter_folder, progress
from lorikeet.errors import ConfigError, InvalidRequestError

if TYPE_CHECKING:
    from rich.table import Table

    from lorikeet.registry.home import Home
    from lorikeet.registry.records import Page, Repository, Version

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
YesOption = Annotated[bool, typer.Option("--yes", help="Do not ask.")]

datasets_app = typer.Typer(
    help="Keep datasets: checked, with fixed splits, by content.", no_args_is_help=True, rich_markup_mode="rich"
)


def examples(*lines: str) -> str:
    return "\n\n".join(("[bold]Examples[/]", *lines))


def add_commands(app: typer.Typer, adapters: typer.Typer) -> None:
    """The commands of this file: those of `adapters` beside what is there already."""
    app.add_typer(datasets_app, name="datasets")
    for name, command, lines in (
        ("ls", list_adapters, ("lorikeet adapters ls", "lorikeet adapters ls intent     its versions")),
        ("show", show_adapter, ("lorikeet adapters show intent", "lorikeet adapters show intent/3 --json")),
        (
            "import",
            import_adapter,
            (
                "lorikeet adapters import runs/demo/intent intent",
                "lorikeet adapters import hf://org/name@main support --alias production",
                "lorikeet adapters import s3://bucket/path support --description 'from the old cluster'",
            ),
        ),
        ("export", export_adapter, ("lorikeet adapters export intent@production ./intent",)),
        ("diff", diff_adapters, ("lorikeet adapters diff intent/2 intent/3",)),
        (
            "rm",
            remove_adapter,
            ("lorikeet adapters rm intent/2", "lorikeet adapters rm intent     the repository with all versions"),
        ),
        (
            "alias",
            alias_adapter,
            (
                "lorikeet adapters alias intent/3 production",
                "lorikeet adapters alias intent production --remove",
                "lorikeet adapters alias intent     its aliases, and where they pointed",
            ),
        ),
        ("collect", collect_files, ("lorikeet adapters collect", "lorikeet adapters collect --days 0")),
    ):
        adapters.command(name=name, epilog=examples(*lines))(with_flags(command))


# --- adapters -----------------------------------------------------------------------------------------------------


def list_adapters(
    name: Annotated[str | None, typer.Argument(help="A repository: its versions; without it all repositories.")] = None,
    contains: Annotated[str | None, typer.Option(help="Only names with this part.")] = None,
    limit: Annotated[int, typer.Option(help="How many at most.", min=1, max=1000)] = 100,
    after: Annotated[str | None, typer.Option(help="Go on after this name, or below this number.")] = None,
    as_json: JsonOption = False,
    *,
    home: HomeFlags,
) -> None:
    """List the repositories, or the versions of one."""
    with opened(home) as there:
        catalog, who = there.catalog, local_actor()
        if name is not None:
            before = None if after is None else _count(after, "--after")
            versions = catalog.versions.page(who, name, before=before, limit=limit)
            _print_page(versions, as_json, lambda: _version_table(name, versions.items))
            return
        page = catalog.repositories.page(who, after=after, limit=limit, contains=contains)
        _print_page(page, as_json, lambda: _repository_table(page.items))


def show_adapter(
    reference: Annotated[str, typer.Argument(help="name, name/3 or name@alias.")],
    as_json: JsonOption = False,
    *,
    home: HomeFlags,
) -> None:
    """Everything the registry knows of a version: files, lineage, recipe, metrics, evaluations."""
    with opened(home) as there:
        catalog, who = there.catalog, local_actor()
        resolved = catalog.versions.resolve(who, reference)
        version = catalog.versions.by_id(who, resolved.version_id)
        lineage = catalog.versions.lineage(who, version.id)
        evaluations = catalog.evaluations.find(who, version_id=version.id)
        files = there.blobs.manifest(resolved.manifest).files
        aliases = [one.name for one in catalog.repositories.get(who, version.repository).aliases
                   if one.version_id == version.id]  # fmt: skip
    if as_json:
        _print_json({"reference": resolved.reference, "version": version, "aliases": aliases, "files": files,
                     "lineage": [one.reference for one in lineage], "evaluations": evaluations})  # fmt: skip
        return
    rows: dict[str, Any] = {
        "version": resolved.reference, "aliases": ", ".join(aliases), "description": version.description,
        "base": version.base, "created": f"{_when(version.created)} by {version.created_by}",
        "lineage": " < ".join(one.reference for one in lineage), "from": version.source,
        "digest": version.digest, "data": version.data_sha256, "recipe": version.recipe_sha256,
        "code": version.code_version, "metrics": _compact(version.metrics), "archived": _when(version.archived),
    }  # fmt: skip
    table = _table("", "", title=resolved.reference, header=False)
    for key, value in rows.items():
        if value:
            table.add_row(key, _plain(value))
    for file in files:
        table.add_row("file", _plain(f"{file.path}  {_size(file.bytes)}  {file.sha256[:12]}"))
    for one in evaluations:
        interval = "" if one.low is None or one.high is None else f" [{one.low:.3f}, {one.high:.3f}]"
        table.add_row("evaluation", _plain(f"{one.task}: {one.metric} {one.score:.3f}{interval} of {one.n}"))
    _print(table)


def import_adapter(
    place: Annotated[str, typer.Argument(help="A PEFT folder, or hf://, s3://, gs://, az://, https://.")],
    name: Annotated[str, typer.Argument(help="The repository; it is made where it is not there.")],
    description: Annotated[str, typer.Option(help="What this version is.")] = "",
    parent: Annotated[str | None, typer.Option(help="The version it was trained on from, such as intent/2.")] = None,
    alias: Annotated[str | None, typer.Option(help="Let this alias point to it, such as production.")] = None,
    *,
    home: HomeFlags,
) -> None:
    """Take an adapter into the registry as the next version of a repository."""
    from lorikeet.registry.home import left_out
    from lorikeet.registry.references import check_alias, check_name

    check_name(name, "NAME")
    if alias is not None:
        check_alias(alias, "--alias")
    folder = adapter_folder(place)
    source = place if "://" in place else str(folder.absolute())
    with opened(home) as there, progress("storing", sizes=True) as report:
        version = there.add_adapter(
            local_actor(), name, folder, description=description, parent=parent, source=source, report=report
        )
        if alias is not None:
            there.catalog.aliases.move(local_actor(), name, alias, version.number)
    other = left_out(folder)
    if other:
        typer.echo(f"not taken, as it is not part of an adapter: {', '.join(other)}", err=True)
    typer.echo(version.reference)


def export_adapter(
    reference: Annotated[str, typer.Argument(help="name, name/3, name/3@step or name@alias.")],
    output: Annotated[Path, typer.Argument(help="The PEFT folder to write; a new one.")],
    *,
    home: HomeFlags,
) -> None:
    """Write a version as a PEFT folder."""
    with opened(home) as there, progress("writing", sizes=True) as report:
        resolved = there.catalog.versions.resolve(local_actor(), reference)
        there.blobs.export(resolved.manifest, output, report)
    typer.echo(f"{output}: {resolved.reference}")


def diff_adapters(
    first: Annotated[str, typer.Argument(help="name, name/3, name/3@step or name@alias.")],
    second: Annotated[str, typer.Argument(help="What it is compared with.")],
    as_json: JsonOption = False,
    *,
    home: HomeFlags,
) -> None:
    """What differs between two versions: fields, config, metrics, and by how much the tensors do."""
    from lorikeet.registry.difference import compare

    with opened(home) as there:
        found = compare(there, local_actor(), first, second)
    if as_json:
        _print_json(found)
        return
    table = _table("", found.first, found.second, title="differences")
    for one in found.fields:
        table.add_row(one.name, _plain(_compact(one.first)), _plain(_compact(one.second)))
    _print(table)
    weights = found.tensors
    typer.echo(
        f"tensors: {weights.same} the same, {len(weights.changed)} changed, "
        f"{len(weights.removed)} only in {found.first}, {len(weights.added)} only in {found.second}"
    )
    for tensor, share in weights.changed[:10]:
        typer.echo(f"  {tensor}: changed by {share:.1%} of its norm")


def remove_adapter(
    reference: Annotated[str, typer.Argument(help="name/3, or name for a repository with all its versions.")],
    yes: YesOption = False,
    *,
    home: HomeFlags,
) -> None:
    """Delete a version, or a repository. The files go when they are collected."""
    from lorikeet.registry.references import parse_reference

    parsed = parse_reference(reference, "REFERENCE")
    if parsed.alias is not None:
        raise InvalidRequestError(
            f"{reference} is an alias", hint=f"lorikeet adapters alias {parsed.repository} {parsed.alias} --remove"
        )
    with opened(home) as there:
        catalog, who = there.catalog, local_actor()
        if parsed.number is None:
            count = len(catalog.repositories.get(who, parsed.repository).versions)
            _confirm(f"Delete {parsed.repository} with {count} versions?", yes)
            catalog.repositories.delete(who, parsed.repository)
        elif parsed.step is not None:
            _confirm(f"Delete the checkpoint {reference}?", yes)
            catalog.versions.delete_checkpoint(who, parsed.repository, parsed.number, parsed.step)
        else:
            catalog.versions.get(who, parsed.repository, parsed.number)
            _confirm(f"Delete {reference}?", yes)
            catalog.versions.delete(who, parsed.repository, parsed.number)
    typer.echo(f"deleted {reference}")


def alias_adapter(
    reference: Annotated[str, typer.Argument(help="The version, such as intent/3; or a repository.")],
    alias: Annotated[str | None, typer.Argument(help="The alias, such as production.")] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Remove the alias.")] = False,
    *,
    home: HomeFlags,
) -> None:
    """Let an alias point to a version, from the next request on; or show where aliases point."""
    from lorikeet.registry.references import parse_reference

    parsed = parse_reference(reference, "REFERENCE")
    with opened(home) as there:
        catalog, who = there.catalog, local_actor()
        if alias is None:
            _print(_alias_table(there, parsed.repository))
        elif remove:
            catalog.aliases.remove(who, parsed.repository, alias)
            typer.echo(f"removed {parsed.repository}@{alias}")
        else:
            resolved = catalog.versions.resolve(who, reference)
            if resolved.step is not None:
                raise InvalidRequestError(f"{reference} is a checkpoint; expected a version, such as name/3")
            catalog.aliases.move(who, parsed.repository, alias, resolved.number)
            typer.echo(f"{parsed.repository}@{alias} is {resolved.reference}")


def collect_files(
    days: Annotated[float, typer.Option(help="What was deleted so many days ago, or longer.", min=0)] = 7.0,
    *,
    home: HomeFlags,
) -> None:
    """Remove the files of what was deleted. `lorikeet up` does it by itself."""
    with opened(home) as there:
        before = there.catalog.ledger.totals()[1]
        count = there.collect(days * 86_400.0)
        after = there.catalog.ledger.totals()[1]
    typer.echo(f"removed {count} files, {_size(before - after)}")


# --- datasets -----------------------------------------------------------------------------------------------------


@datasets_app.command(
    name="add",
    epilog=examples(
        "lorikeet datasets add tickets train.jsonl --test test.jsonl",
        "lorikeet datasets add tickets rows.csv --validation 0.05 --test 0.1 --seed 1",
    ),
)
@with_flags
def add_dataset(
    name: Annotated[str, typer.Argument(help="Its name.")],
    train: Annotated[Path, typer.Argument(help="The rows to learn from: JSONL, CSV, TSV or Parquet.")],
    validation: Annotated[str | None, typer.Option(help="A file, or a share of the rows such as 0.05.")] = None,
    test: Annotated[str | None, typer.Option(help="A file, or a share of the rows.")] = None,
    seed: Annotated[int, typer.Option(help="Of the rows that shares draw.")] = 0,
    description: Annotated[str, typer.Option(help="What it is.")] = "",
    *,
    home: HomeFlags,
) -> None:
    """Take files into the registry as a dataset. Its splits are fixed from then on."""
    from lorikeet.data.formats import read_rows

    files, shares = {"train": train}, dict[str, float]()
    for split, given in (("validation", validation), ("test", test)):
        if given is None:
            continue
        try:
            shares[split] = float(given)
        except ValueError:
            files[split] = Path(given)
    with opened(home) as there, progress("storing", sizes=True) as report:
        made = there.add_dataset(
            local_actor(), name, files, read_rows, shares=shares, seed=seed, description=description, report=report
        )
    rows = ", ".join(f"{one.rows} {split}" for split, one in made.splits.items())
    typer.echo(f"{name}: {rows} rows; columns {', '.join(f'{key} ({kind})' for key, kind in made.columns.items())}")


@datasets_app.command(name="ls", epilog=examples("lorikeet datasets ls", "lorikeet datasets ls --contains tick"))
@with_flags
def list_datasets(
    contains: Annotated[str | None, typer.Option(help="Only names with this part.")] = None,
    limit: Annotated[int, typer.Option(help="How many at most.", min=1, max=1000)] = 100,
    after: Annotated[str | None, typer.Option(help="Go on after this name.")] = None,
    as_json: JsonOption = False,
    *,
    home: HomeFlags,
) -> None:
    """List the datasets."""
    with opened(home) as there:
        page = there.catalog.datasets.page(local_actor(), after=after, limit=limit, contains=contains)

    def table() -> Table:
        made = _table("name", "rows", "bytes", "columns", "created", "description")
        for one in page.items:
            rows = ", ".join(f"{part.rows} {split}" for split, part in one.splits.items())
            columns = ", ".join(one.columns)
            made.add_row(one.name, rows, _size(one.bytes), _plain(columns), _when(one.created), _plain(one.description))
        return made

    _print_page(page, as_json, table)


@datasets_app.command(name="show", epilog=examples("lorikeet datasets show tickets --rows 3"))
@with_flags
def show_dataset(
    name: Annotated[str, typer.Argument(help="Its name.")],
    rows: Annotated[int, typer.Option(help="How many rows to show.", min=0)] = 5,
    as_json: JsonOption = False,
    *,
    home: HomeFlags,
) -> None:
    """Columns, splits and the first rows of a dataset."""
    from lorikeet.data.formats import read_rows

    with opened(home) as there:
        dataset, folder = there.dataset_folder(local_actor(), name)
    first = read_rows(folder / dataset.splits["train"].file)[:rows]
    if as_json:
        _print_json({"dataset": dataset, "rows": first})
        return
    table = _table("", "", title=name, header=False)
    table.add_row("created", _plain(f"{_when(dataset.created)} by {dataset.created_by}"))
    table.add_row("content", dataset.sha256)
    for split, one in dataset.splits.items():
        table.add_row(split, f"{one.rows} rows, {_size(one.bytes)}")
    for column, kind in dataset.columns.items():
        table.add_row("column", _plain(f"{column} ({kind})"))
    _print(table)
    for row in first:
        typer.echo(json.dumps(row, ensure_ascii=False, default=str))


@datasets_app.command(name="rm", epilog=examples("lorikeet datasets rm tickets --yes"))
@with_flags
def remove_dataset(
    name: Annotated[str, typer.Argument(help="Its name.")], yes: YesOption = False, *, home: HomeFlags
) -> None:
    """Delete a dataset. Its files go when they are collected."""
    with opened(home) as there:
        there.catalog.datasets.get(local_actor(), name)
        _confirm(f"Delete the dataset {name}?", yes)
        there.catalog.datasets.delete(local_actor(), name)
    typer.echo(f"deleted {name}")


# --- what they show -----------------------------------------------------------------------------------------------


def _repository_table(items: list[Repository]) -> Table:
    table = _table("name", "versions", "aliases", "base", "bytes", "changed", "description")
    for one in items:
        newest = one.versions[-1] if one.versions else None
        table.add_row(
            one.name,
            str(len(one.versions)) + (f" (newest {newest.number}, {newest.state})" if newest else ""),
            ", ".join(f"{alias.name} is {alias.number}" for alias in one.aliases),
            _plain(newest.base or "") if newest else "",
            _size(sum(version.bytes or 0 for version in one.versions)),
            _when(one.changed),
            _plain(one.description),
        )
    return table


def _version_table(name: str, items: list[Version]) -> Table:
    table = _table("version", "state", "base", "bytes", "created", "from", "description", title=name)
    for one in items:
        origin = one.source or (f"job {one.job_id}" if one.job_id else "")
        state = one.state + (", archived" if one.archived else "")
        table.add_row(one.reference, state, _plain(one.base or ""), _size(one.bytes or 0), _when(one.created),
                      _plain(origin), _plain(one.description))  # fmt: skip
    return table


def _alias_table(home: Home, name: str) -> Table:
    catalog, who = home.catalog, local_actor()
    table = _table("alias", "version", "since", "by", "before", title=name)
    for one in catalog.repositories.get(who, name).aliases:
        history = catalog.aliases.history(who, name, one.name)
        before = ", ".join("-" if move.number is None else str(move.number) for move in history[1:6])
        table.add_row(one.name, f"{name}/{one.number}", _when(one.moved), _plain(one.moved_by), before)
    return table


def _table(*columns: str, title: str | None = None, header: bool = True) -> Table:
    from rich.table import Table

    return Table(*columns, title=title, show_header=header, title_justify="left")


def _print(table: Table) -> None:
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 200).print(table)


def _print_page(page: Page[Any], as_json: bool, table: Any) -> None:
    if as_json:
        _print_json(page)
        return
    _print(table())
    if page.next is not None:
        typer.echo(f"there are more: --after {page.next}")


def _print_json(value: object) -> None:
    import msgspec

    typer.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def _plain(text: object) -> str:
    """Text of a user as it is: no markup, no control characters, which terminals obey."""
    from rich.markup import escape

    return escape("".join(one if one.isprintable() else " " for one in str(text)))


def _compact(value: object) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False, default=str)


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError


def _when(at: float | None) -> str:
    return "" if at is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(at))


def _count(text: str, flag: str) -> int:
    if not text.isdecimal():
        raise ConfigError(f"{flag}: found {text!r}; expected the number of a version", param=flag)
    return int(text)


def _confirm(question: str, yes: bool) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        raise ConfigError(f"{question} Nobody can be asked here", hint="--yes says yes", param="yes")
    typer.confirm(question, abort=True)
