"""References to adapters of the registry: `name`, `name/3`, `name/3@200` (a checkpoint), `name@production`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lorikeet.errors import InvalidRequestError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
PRODUCTION = "production"  # what a bare name stands for, where there is such an alias
EXPECTED = "expected name, name/3, name/3@step or name@alias"
_MOST = 2**31 - 1


@dataclass(frozen=True, slots=True)
class RegistryReference:
    """`number` with or without a `step`, or an `alias`, or neither: the production alias, else the newest version."""

    repository: str
    number: int | None = None
    step: int | None = None
    alias: str | None = None

    def __str__(self) -> str:
        number = "" if self.number is None else f"/{self.number}"
        after = self.step if self.step is not None else self.alias
        return f"{self.repository}{number}" + ("" if after is None else f"@{after}")


def parse_reference(text: str, param: str = "model") -> RegistryReference:
    """Raises `InvalidRequestError` (its code `invalid_reference`) for what is none."""
    name, slash, version = text.partition("/")
    if slash:
        number, mark, step = version.partition("@")
        check_name(name, param)
        if not _is_count(number) or (mark and not _is_count(step)):
            raise InvalidRequestError(
                f"{param}: found {shown(text)}; {EXPECTED}", param=param, code="invalid_reference"
            )
        return RegistryReference(name, int(number), int(step) if mark else None)
    name, mark, alias = text.partition("@")
    check_name(name, param)
    if mark:
        check_alias(alias, param)
    return RegistryReference(name, alias=alias if mark else None)


def check_name(name: str, param: str = "name") -> str:
    """The name, if it can be one of a repository or dataset. Raises `InvalidRequestError`."""
    if not NAME.fullmatch(name):
        raise InvalidRequestError(
            f"{param}: found {shown(name)}; expected a name of letters, digits, '.', '_' and '-', at most 128 of them, "
            "that begins with a letter or digit",
            param=param,
            code="invalid_reference",
        )
    return name


def check_alias(alias: str, param: str = "alias") -> str:
    """As `check_name`; what looks like a number is none, `name@3` would be too easily taken for `name/3`."""
    if alias.isdecimal():
        raise InvalidRequestError(
            f"{param}: found the alias {shown(alias)}; an alias has letters, a version is written name/3",
            param=param,
            code="invalid_reference",
        )
    return check_name(alias, param)


def shown(text: str) -> str:
    """Quoted for a message, cut where it is long."""
    return repr(text if len(text) <= 80 else text[:80] + "...")


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdecimal() and not text.startswith("0") and int(text[:11]) <= _MOST
