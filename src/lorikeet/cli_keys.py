"""`lorikeet keys`: make, list, change and revoke keys in the home folder, whether a server runs on it or not."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorikeet.cli_flags import one_of, with_flags
from lorikeet.cli_home import CatalogFlags, local_actor, opened
from lorikeet.errors import ConfigError, NotFoundError

if TYPE_CHECKING:
    from lorikeet.registry.catalog import Catalog
    from lorikeet.registry.records import Actor, Key

keys_app = typer.Typer(
    help="Make, list, change, confine and revoke the keys of a home.", no_args_is_help=True, rich_markup_mode="rich"
)

TenantOption = Annotated[str | None, typer.Option(help="The tenant whose keys they are; default: the first one.")]

SHOWN = 8  # characters of an id in a table
SECONDS = {"m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}


@keys_app.command(
    name="create",
    epilog="[bold]Examples[/]\n\nlorikeet keys create --role admin me\n\n"
    "lorikeet keys create ci --role trainer --repository intent --expires-in 90d\n\n"
    "export LORIKEET_API_KEY=$(lorikeet keys create app --requests-per-minute 600 --tokens-per-day 2000000)",
)
@with_flags
def create_key(
    name: Annotated[str, typer.Argument(help="What the key is for.")],
    role: Annotated[
        str, typer.Option(help="admin | trainer | user: manage keys; train and promote; read and generate.")
    ] = "user",
    repository: Annotated[
        list[str] | None, typer.Option(help="Confine it to this repository; give it again for more.")
    ] = None,
    expires_in: Annotated[str | None, typer.Option(help="Such as 12h, 90d or 8w; default: never.")] = None,
    requests_per_minute: Annotated[int | None, typer.Option(help="Default: no limit.", min=1)] = None,
    tokens_per_day: Annotated[
        int | None, typer.Option(help="Of prompts and answers, by UTC days; default: no limit.", min=1)
    ] = None,
    user: Annotated[str | None, typer.Option(help="Whose key it is: it ends when that user is disabled.")] = None,
    tenant: TenantOption = None,
    *,
    home: CatalogFlags,
) -> None:
    """Make a key. It is printed this once, on standard output; the home keeps a hash of it."""
    chosen = one_of(role, "--role", "admin", "trainer", "user")
    with _opened(home, tenant) as (catalog, who):
        key, secret = catalog.keys.create(
            who, name, chosen, user=user, repositories=repository or None,
            expires=None if expires_in is None else time.time() + _seconds(expires_in),
            requests_per_minute=requests_per_minute, tokens_per_day=tokens_per_day,
        )  # fmt: skip
        manages = any(one.role == "admin" and _opens(one) for one in catalog.keys.all(who))
    if not manages:
        typer.echo("every request needs a key from now on, and no key here is an admin's: make one, too", err=True)
    typer.echo(f"{key.name} ({key.role}, {key.id}); keep it, it is not shown again:", err=True)
    typer.echo(secret)


@keys_app.command(name="ls", epilog="[bold]Examples[/]\n\nlorikeet keys ls\n\nlorikeet keys ls --tenant acme --json")
@with_flags
def list_keys(
    as_json: Annotated[bool, typer.Option("--json", help="Print them as JSON.")] = False,
    tenant: TenantOption = None,
    *,
    home: CatalogFlags,
) -> None:
    """List keys, newest first: what each may do, what it used today, and whether it still opens anything."""
    import msgspec
    from rich.console import Console
    from rich.table import Table

    with _opened(home, tenant) as (catalog, who):
        keys = catalog.keys.all(who)
        grants = {key.id: catalog.keys.grants(who, key.id) for key in keys}
        used = {key.id: sum(day.tokens for day in catalog.keys.usage(key.id)) for key in keys}
    if as_json:
        listed = [
            msgspec.to_builtins(key) | {"repositories": grants[key.id], "tokens_today": used[key.id]} for key in keys
        ]
        typer.echo(msgspec.json.encode(listed).decode())
        return
    table = Table("key", "name", "role", "repositories", "tokens today", "requests/min", "state", "id")
    for key in keys:
        names, quota = grants[key.id], key.tokens_per_day
        table.add_row(
            f"{key.prefix}...", key.name, key.role, "all" if names is None else ", ".join(names) or "none",
            str(used[key.id]) + ("" if quota is None else f" of {quota}"),
            "-" if key.requests_per_minute is None else str(key.requests_per_minute), _state(key), key.id[:SHOWN],
        )  # fmt: skip
    Console().print(table)


@keys_app.command(
    name="change",
    epilog="[bold]Examples[/]\n\nlorikeet keys change ci --role trainer\n\n"
    "lorikeet keys change app --requests-per-minute 1200 --tokens-per-day none",
)
@with_flags
def change_key(
    key: Annotated[str, typer.Argument(help="Its id as listed, or its name.")],
    role: Annotated[str | None, typer.Option(help="admin | trainer | user.")] = None,
    requests_per_minute: Annotated[str | None, typer.Option(help="A number from 1 on, or none.")] = None,
    tokens_per_day: Annotated[str | None, typer.Option(help="A number from 1 on, or none.")] = None,
    tenant: TenantOption = None,
    *,
    home: CatalogFlags,
) -> None:
    """Change a key's role or limits, from the next request on. What it may use: `lorikeet keys grant`."""
    from lorikeet.registry.records import KeyChange

    asked: dict[str, Any] = {}
    if role is not None:
        asked["role"] = one_of(role, "--role", "admin", "trainer", "user")
    for name, given in (("requests_per_minute", requests_per_minute), ("tokens_per_day", tokens_per_day)):
        if given is not None:
            asked[name] = _limit(given, f"--{name.replace('_', '-')}")
    if not asked:
        raise ConfigError("nothing to change: expected --role, --requests-per-minute or --tokens-per-day", param="role")
    with _opened(home, tenant) as (catalog, who):
        changed = catalog.keys.alter(who, _find(catalog, who, key).id, KeyChange(**asked))
    said = ", ".join(f"{name.replace('_', ' ')} {'none' if to is None else to}" for name, to in asked.items())
    typer.echo(f"{changed.name} ({changed.id}): {said}")


@keys_app.command(name="revoke", epilog="[bold]Examples[/]\n\nlorikeet keys revoke ci\n\nlorikeet keys revoke 3f2a91c0")
@with_flags
def revoke_key(
    key: Annotated[str, typer.Argument(help="Its id as listed, or its name.")],
    tenant: TenantOption = None,
    *,
    home: CatalogFlags,
) -> None:
    """Let a key open nothing any more, from the next request on."""
    with _opened(home, tenant) as (catalog, who):
        revoked = catalog.keys.revoke(who, _find(catalog, who, key).id)
    typer.echo(f"{revoked.name} ({revoked.id}) is revoked")


@keys_app.command(
    name="grant", epilog="[bold]Examples[/]\n\nlorikeet keys grant ci intent slots\n\nlorikeet keys grant ci --all"
)
@with_flags
def grant_repositories(
    key: Annotated[str, typer.Argument(help="Its id as listed, or its name.")],
    repositories: Annotated[list[str] | None, typer.Argument(help="Exactly those it may use from now on.")] = None,
    every: Annotated[bool, typer.Option("--all", help="All repositories, later ones too.")] = False,
    tenant: TenantOption = None,
    *,
    home: CatalogFlags,
) -> None:
    """Say which repositories a key may use."""
    if every == bool(repositories):
        raise ConfigError("expected either names of repositories or --all", param="repositories")
    from lorikeet.registry.records import KeyChange

    with _opened(home, tenant) as (catalog, who):
        change = KeyChange(repositories=None if every else repositories)
        granted = catalog.keys.alter(who, _find(catalog, who, key).id, change)
    typer.echo(f"{granted.name} ({granted.id}) may use " + ("all" if every else ", ".join(sorted(repositories or ()))))


@contextmanager
def _opened(home: CatalogFlags, tenant: str | None) -> Iterator[tuple[Catalog, Actor]]:
    """The catalog, and an actor of that tenant."""
    from dataclasses import replace

    with opened(home) as there:
        who, catalog = local_actor(), there.catalog
        yield catalog, who if tenant is None else replace(who, tenant=catalog.people.tenant(tenant).id)


def _find(catalog: Catalog, who: Actor, wanted: str) -> Key:
    """The key of this id, or of an id that begins so; else the only living one of this name."""
    keys = catalog.keys.all(who)
    by_id = [key for key in keys if len(wanted) >= SHOWN and key.id.startswith(wanted)]
    found = by_id or [key for key in keys if key.name == wanted and key.revoked is None]
    if len(found) > 1:
        raise ConfigError(
            f"{len(found)} keys are called {wanted!r}", hint="give an id, see lorikeet keys ls", param="key"
        )
    if not found:
        raise NotFoundError(
            f"there is no key {wanted!r}", hint="see lorikeet keys ls", param="key", code="key_not_found"
        )
    return found[0]


def _opens(key: Key) -> bool:
    return key.revoked is None and (key.expires is None or key.expires > time.time())


def _state(key: Key) -> str:
    if key.revoked is not None:
        return "revoked"
    if key.expires is None:
        return "open"
    day = time.strftime("%Y-%m-%d", time.gmtime(key.expires))
    return f"until {day}" if _opens(key) else f"expired {day}"


def _limit(text: str, flag: str) -> int | None:
    if text == "none":
        return None
    if not re.fullmatch(r"[1-9]\d{0,14}", text):
        raise ConfigError(f"{flag}: found {text!r}; expected a whole number from 1 on, or none", param=flag)
    return int(text)


def _seconds(text: str) -> float:
    match = re.fullmatch(r"([1-9]\d{0,5})([mhdw])", text)
    if match is None:
        raise ConfigError(f"--expires-in: found {text!r}; expected such as 30m, 12h, 90d or 8w", param="--expires-in")
    return int(match[1]) * float(SECONDS[match[2]])
