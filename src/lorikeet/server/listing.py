"""Pages of lists, and parameters of queries, read as strictly as bodies are."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import Request, Response

from lorikeet.errors import UnsupportedFieldError
from lorikeet.registry.records import Page
from lorikeet.server.replies import json_reply
from lorikeet.server.validation import shown

LIMIT, MOST = 50, 1000


class Query:
    """The parameters of a request's query. Raises `UnsupportedFieldError` for one that is not in `known`."""

    def __init__(self, request: Request, *known: str) -> None:
        self._values: dict[str, str] = {}
        for name, value in request.query_params.multi_items():
            if name not in known:
                hint = "known parameters: " + ", ".join(known) if known else "this route takes none"
                raise UnsupportedFieldError(
                    f"unknown parameter {name!r}", param=name, code="unknown_field", hint=hint
                )  # fmt: skip
            if name in self._values:
                raise UnsupportedFieldError(f"{name} stands twice", param=name, code="invalid_value")
            self._values[name] = value

    def text(self, name: str) -> str | None:
        return self._values.get(name) or None

    def number(self, name: str, default: int, *, least: int = 0, most: int = 2**53) -> int:
        value = self._values.get(name)
        if not value:
            return default
        if not (value.isascii() and value.isdecimal() and len(value) < 18 and least <= int(value) <= most):
            raise UnsupportedFieldError(
                f"'{name}': expected a whole number from {least} to {most}, found {shown(value)}", param=name,
                code="invalid_value",
            )  # fmt: skip
        return int(value)

    @property
    def limit(self) -> int:
        return self.number("limit", LIMIT, least=1, most=MOST)


def page_reply(page: Page[Any], items: list[Any] | None = None) -> Response:
    """`{"items": [...], "next": cursor or null}`."""
    return json_reply({"items": [plain(one) for one in page.items] if items is None else items, "next": page.next})


def plain(record: msgspec.Struct) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.to_builtins(record)
    return found
