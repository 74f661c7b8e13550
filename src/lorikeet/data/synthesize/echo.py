"""Runs of words and strings without any sense, said again: only what came before tells what comes next.

Such text makes a small model learn to copy early (in-context repetition, Olsson et al. 2022, "In-context Learning and
Induction Heads"): in sensible text, knowing the language explains most of each next token and copying little.
"""

from __future__ import annotations

import json
from functools import cache

from lorikeet.data.synthesize.grammar import Writer
from lorikeet.data.synthesize.lexicon import word_lists

_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
_MARKS = (",", ".", ";", ":", "-", "|", '"', "(", ")", "{", "}", "=", "/", "#")


@cache
def _words() -> tuple[str, ...]:
    words = {word for values in word_lists() for value in values for word in value.split()}
    return tuple(sorted(word for word in words if "{" not in word))  # what refers to another list is no word


def _item(w: Writer) -> str:
    kind = w.random()
    if kind < 0.6:
        return w.pick(_words())
    if kind < 0.8:
        return "".join(w.pick(_LETTERS) for _ in range(w.between(1, 7)))
    if kind < 0.92:
        return str(int(10 ** (w.random() * 5)))
    return w.pick(_MARKS)


def _run(w: Writer, items: int, space: str) -> str:
    return space.join(_item(w) for _ in range(items))


def echo(w: Writer) -> str:
    """A run of items, whole or in part, two to five times; or several runs called up again in another order."""
    space = w.pick((" ", " ", " ", ", ", "\n"))
    if w.chance(0.5):
        run = _run(w, w.between(5, 40), space)
        return w.pick(("\n", " ", "\n\n", " -> ", "\nAgain: ")).join([run] * w.between(2, 5))
    runs = [_run(w, w.between(2, 9), " ") for _ in range(w.between(3, 8))]
    order = [w.pick(runs) for _ in range(w.between(6, 18))]
    return w.pick(("\n", "; ", " | ")).join(runs + order)


_SLOTS = ("given", "person", "company", "town", "city", "product", "date", "clock", "amount", "code", "restaurant")


def respelled(w: Writer) -> str:
    """Lines of names, words and codes, each said again in another notation.

    After a quote or a bracket a word is cut into other tokens than after a space, so copying it across notations has
    to be learned as spelling.
    """
    notation = w.pick(_NOTATIONS)
    lines = []
    for _ in range(w.between(3, 10)):
        values = [_value(w) for _ in range(w.between(1, 5))]
        plain, other = w.pick((" ", ", ", " and ", " / ", " | ")).join(values), notation(w, values)
        arrow = w.pick((" -> ", "\n", " = ", ": "))
        lines.append(f"{plain}{arrow}{other}" if w.chance(0.8) else f"{other}{arrow}{plain}")
    return "\n".join(lines)


def _value(w: Writer) -> str:
    if w.chance(0.45):
        return w.slot(w.pick(_SLOTS))
    words = [_item(w) for _ in range(w.between(1, 3))]
    text = " ".join(words)
    return text.title() if w.chance(0.3) else text


def _array(w: Writer, values: list[str]) -> str:
    return json.dumps(values, ensure_ascii=False)


def _object(w: Writer, values: list[str]) -> str:
    keys = [w.pick(_words()).split(" ")[0] for _ in values]
    return json.dumps(dict(zip(keys, values, strict=True)), ensure_ascii=False)


def _quoted(w: Writer, values: list[str]) -> str:
    return " AND ".join(f"{w.pick(_words())} = '{value}'" for value in values)


def _tagged(w: Writer, values: list[str]) -> str:
    return "".join(f"<{index}>{value}</{index}>" for index, value in enumerate(values, start=1))


def _bracketed(w: Writer, values: list[str]) -> str:
    return "".join(f"[{value}]" for value in w.shuffled(values))


_NOTATIONS = (_array, _array, _object, _object, _object, _quoted, _tagged, _bracketed)
