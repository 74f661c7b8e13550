"""Prompt and completion templates: columns by name, the same function for training, serving and judging.

`{text}` is a column, `{slots | json}` the column as JSON (keys in their own order, non-ASCII kept), `{{` and `}}` are
literal braces. Nothing else is special.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from lorikeet.errors import ConfigError, DataError

_PART = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_FIELD = re.compile(r"\s*([^\s|{}]+)\s*(?:\|\s*(\w+)\s*)?")
FILTERS = {"json": lambda value: json.dumps(value, ensure_ascii=False)}


class Template:
    """A parsed template. Raises `ConfigError` where the text is malformed, `DataError` where a row lacks a column."""

    def __init__(self, text: str, where: str = "template") -> None:
        self.text = text
        self.where = where
        self._parts: list[str | tuple[str, str | None]] = []
        at = 0
        for match in _PART.finditer(text):
            self._parts.append(text[at : match.start()])
            at = match.end()
            self._parts.append(self._parse(match))
        self._parts.append(text[at:])

    def _parse(self, match: re.Match[str]) -> str | tuple[str, str | None]:
        found = match[0]
        if found in ("{{", "}}"):
            return found[0]
        field = _FIELD.fullmatch(match[1] or "")
        if field is None:
            raise ConfigError(
                f"{self.where}: {found!r} at character {match.start()} is no column",
                hint="write a literal brace as {{ or }}, a column as {name} or {name | json}",
                param=self.where,
            )
        if field[2] is not None and field[2] not in FILTERS:
            raise ConfigError(
                f"{self.where}: unknown filter {field[2]!r} in {found!r}; known: {', '.join(FILTERS)}", param=self.where
            )
        return field[1], field[2]

    @property
    def columns(self) -> list[str]:
        """Columns in order of first use."""
        return list(dict.fromkeys(part[0] for part in self._parts if isinstance(part, tuple)))

    def render(self, row: Mapping[str, Any]) -> str:
        """The text for one row. A column that is missing, null, or not a scalar (without `| json`) is an error."""
        out = []
        for part in self._parts:
            if isinstance(part, str):
                out.append(part)
                continue
            name, filter_name = part
            if name not in row:
                raise DataError(
                    f"{self.where}: column {name!r} is not in the row; it has {', '.join(map(repr, row))}", param=name
                )
            value = row[name]
            if filter_name is not None:
                out.append(FILTERS[filter_name](value))
            elif isinstance(value, str | int | float):
                out.append(str(value))
            else:
                raise DataError(
                    f"{self.where}: column {name!r} holds {type(value).__name__}, expected text or a number",
                    hint=f"write {{{name} | json}} to put it in as JSON",
                    param=name,
                )
        return "".join(out)
