"""A small template language and the seeded writer that expands it.

Template syntax:

* ``(a|b|c)``   one of the alternatives, each again a template;
* ``[a]``       the text or nothing, with equal chance;
* ``{slot}``    a word list or a function of the writer, looked up in the lexicon;
* ``{x:slot}``  the same, and remembered as ``x``; a later ``{=x}`` repeats it.

Everything else stands for itself.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")
Slot = Callable[["Writer"], str]
Node = str | Slot

_SPECIAL = re.compile(r"[()\[\]{}|]")
_SPACES = re.compile(r"  +")
_LOOSE = re.compile(r" +([?!.,;:])")
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeioAEIO]|u[^ns]|hour|un[^i])(?!one\b|eu|once)")


class Writer:
    """A source of seeded choices with a lexicon. One writer makes one stream of documents."""

    def __init__(self, seed: int, lexicon: Mapping[str, Slot]) -> None:
        self.random = random.Random(seed).random
        self.lexicon = lexicon
        self.bound: dict[str, str] = {}
        self._compiled: dict[str, Node] = {}

    def pick(self, items: Sequence[T]) -> T:
        return items[int(self.random() * len(items))]

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def between(self, low: int, high: int) -> int:
        """An integer from ``low`` to ``high``, both included."""
        return low + int(self.random() * (high - low + 1))

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """``count`` different items (fewer where there are fewer), in random order."""
        pool = list(items)
        picked = []
        for _ in range(min(count, len(pool))):
            at = int(self.random() * len(pool))
            picked.append(pool[at])
            pool[at] = pool[-1]
            pool.pop()
        return picked

    def shuffled(self, items: Sequence[T]) -> list[T]:
        return self.sample(items, len(items))

    def several(self, slot: str, count: int) -> list[str]:
        """``count`` different values of one slot."""
        values: dict[str, None] = {}
        for _ in range(count * 8):
            values[self.slot(slot)] = None
            if len(values) == count:
                break
        return list(values)

    def slot(self, name: str) -> str:
        return self.lexicon[name](self)

    def say(self, template: str) -> str:
        """Expands a template; spaces left by empty parts and the article "a" are put right."""
        node = self._compiled.get(template)
        if node is None:
            node = self._compiled[template] = _compile(template, self.lexicon)
        if isinstance(node, str):
            return node
        text = node(self)
        if "  " in text:
            text = _SPACES.sub(" ", text)
        if " ?" in text or " ." in text or " ," in text or " !" in text:
            text = _LOOSE.sub(r"\1", text)
        return _ARTICLE.sub(r"\1n ", text).strip()

    def sentence(self, template: str) -> str:
        """``say`` with a capital at the start and a stop at the end."""
        text = self.say(template)
        text = text[:1].upper() + text[1:]
        return text if text[-1:] in '.?!"' else text + "."


def _compile(template: str, lexicon: Mapping[str, Slot]) -> Node:
    node, at = _alternatives(template, 0, "", lexicon)
    if at != len(template):
        raise ValueError(f"template {template!r}: unexpected {template[at]!r} at column {at}")
    return node


def _alternatives(text: str, at: int, close: str, lexicon: Mapping[str, Slot]) -> tuple[Node, int]:
    """Parses up to ``close`` (or the end), and returns the node and the position behind it."""
    options: list[Node] = []
    parts: list[Node] = []
    while True:
        found = _SPECIAL.search(text, at)
        if found is None:
            if close:
                raise ValueError(f"template {text!r}: {close!r} is missing")
            parts.append(text[at:])
            options.append(_sequence(parts))
            return _choice(options), len(text)
        parts.append(text[at : found.start()])
        mark, at = found.group(), found.end()
        if mark == "|":
            options.append(_sequence(parts))
            parts = []
        elif mark == close:
            options.append(_sequence(parts))
            return _choice(options), at
        elif mark == "(":
            node, at = _alternatives(text, at, ")", lexicon)
            parts.append(node)
        elif mark == "[":
            node, at = _alternatives(text, at, "]", lexicon)
            parts.append(_choice([node, ""]))
        elif mark == "{":
            end = text.index("}", at)
            parts.append(_reference(text[at:end], lexicon))
            at = end + 1
        else:
            raise ValueError(f"template {text!r}: unexpected {mark!r} at column {found.start()}")


def _sequence(parts: Sequence[Node]) -> Node:
    merged: list[Node] = []
    for part in parts:
        if part == "":
            continue
        if isinstance(part, str) and merged and isinstance(merged[-1], str):
            merged[-1] = merged[-1] + part
        else:
            merged.append(part)
    if not merged:
        return ""
    if len(merged) == 1:
        return merged[0]
    nodes = tuple(merged)
    return lambda w: "".join([n if isinstance(n, str) else n(w) for n in nodes])


def _choice(options: Sequence[Node]) -> Node:
    if len(options) == 1:
        return options[0]
    nodes, count = tuple(options), len(options)

    def choose(w: Writer) -> str:
        node = nodes[int(w.random() * count)]
        return node if isinstance(node, str) else node(w)

    return choose


def _reference(name: str, lexicon: Mapping[str, Slot]) -> Slot:
    if name.startswith("="):
        key = name[1:]
        return lambda w: w.bound[key]
    key, _, slot = name.rpartition(":")
    if slot not in lexicon:
        raise ValueError(f"slot {slot!r}: unknown to the lexicon; known are word lists in words/ and names.SLOTS")
    if not key:
        return lexicon[slot]

    def bind(w: Writer) -> str:
        value = w.bound[key] = lexicon[slot](w)
        return value

    return bind


def word_slot(values: Sequence[str], lexicon: Mapping[str, Slot]) -> Slot:
    """A slot over a fixed list; values that hold template marks are expanded when drawn."""
    words, count = tuple(values), len(values)
    if any(_SPECIAL.search(word) for word in words):
        return lambda w: w.say(words[int(w.random() * count)])
    return lambda w: words[int(w.random() * count)]
