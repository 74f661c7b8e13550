"""Runs of words and strings without any sense, said again: only what came before tells what comes next.

Such text makes a small model learn to copy early (in-context repetition, Olsson et al. 2022, "In-context Learning and
Induction Heads"): in sensible text, knowing the language explains most of each next token and copying little.
"""

from __future__ import annotations

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
