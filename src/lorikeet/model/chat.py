"""Chat templates: sandboxed jinja2 with the environment that published templates expect. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lorikeet.errors import InvalidRequestError


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's text for training; rendering ignores the mark."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


@lru_cache(maxsize=256)
def _compiled(template: str) -> jinja2.Template:
    return _environment().from_string(template)


def render(template: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
    """The prompt text for a conversation.

    Raises InvalidRequestError with the template's own words where it does not accept the messages.
    """
    try:
        return _compiled(template).render(messages=list(messages), **variables)
    except jinja2.TemplateSyntaxError as error:
        raise InvalidRequestError(
            f"the chat template is not valid, line {error.lineno}: {error.message}", param="chat_template"
        ) from error
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, OverflowError) as error:
        raise InvalidRequestError(f"the chat template refuses these messages: {error}", param="messages") from error
