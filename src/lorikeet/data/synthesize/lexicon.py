"""Reads the word lists and the topics that lie beside the code, once per process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from lorikeet.data.synthesize.grammar import Slot, word_slot
from lorikeet.data.synthesize.names import SLOTS


@dataclass(frozen=True)
class Topic:
    """One thing that people write about. All texts are templates; ``asks`` all mean nearly the same."""

    domain: str
    titles: tuple[str, ...]
    gists: tuple[str, ...]
    asks: tuple[str, ...]
    answers: tuple[str, ...]


Section = tuple[str, tuple[str, ...]]


@cache
def _texts(folder: str) -> Mapping[str, str]:
    root = files("lorikeet.data.synthesize") / folder
    entries = sorted((entry for entry in root.iterdir() if entry.name.endswith(".txt")), key=lambda entry: entry.name)
    return {entry.name.removesuffix(".txt"): entry.read_text(encoding="utf-8") for entry in entries}


@cache
def sections(folder: str, file: str) -> tuple[Section, ...]:
    """The sections of ``folder/file.txt``: what follows ``# `` in the heading line, and the lines below it."""
    blocks = ("\n" + _texts(folder)[file]).split("\n# ")[1:]
    parts = [[line.strip() for line in block.splitlines() if line.strip()] for block in blocks]
    return tuple((heading, tuple(lines)) for heading, *lines in parts)


def list_pairs(file: str) -> tuple[tuple[str, str], ...]:
    """The lines ``left: right`` of ``lists/file.txt``."""
    split = [line.partition(": ") for _, lines in sections("lists", file) for line in lines]
    return tuple((left, right) for left, _, right in split)


def word_lists() -> Iterator[list[str]]:
    """The values of every list in ``words/*.txt``."""
    for text in _texts("words").values():
        for line in text.splitlines():
            if line and not line.startswith("#"):
                yield [value.strip() for value in line.partition(": ")[2].split(",")]


@cache
def lexicon() -> Mapping[str, Slot]:
    """All slots: composed names and the word lists of ``words/*.txt`` (lines ``name: a, b, c``)."""
    slots: dict[str, Slot] = dict(SLOTS)
    for file, text in _texts("words").items():
        for line in text.splitlines():
            if not line or line.startswith("#"):
                continue
            name, colon, values = line.partition(": ")
            if not colon or name in slots:
                raise ValueError(f"words/{file}.txt: {line[:40]!r}: expected a new 'name: value, value'")
            slots[name] = word_slot([value.strip() for value in values.split(",")], slots)
    return slots


@cache
def topics() -> tuple[Topic, ...]:
    """All topics of ``topics/*.txt``; the file's name is the domain.

    A topic starts with ``# title | title``, then one line ``> gist | gist``, lines ``- what somebody asks or says``,
    and lines ``+ what the answer says``.
    """
    return tuple(
        _topic(domain, heading, lines) for domain in _texts("topics") for heading, lines in sections("topics", domain)
    )


def _topic(domain: str, heading: str, lines: Sequence[str]) -> Topic:
    marked: dict[str, list[str]] = {">": [], "-": [], "+": []}
    for line in lines:
        mark, _, text = line.partition(" ")
        if mark not in marked or not text:
            raise ValueError(f"topics/{domain}.txt, topic {heading!r}: {line!r} starts with none of '> ', '- ', '+ '")
        marked[mark].append(text.strip())
    topic = Topic(
        domain=domain,
        titles=tuple(part.strip() for part in heading.split("|")),
        gists=tuple(part.strip() for line in marked[">"] for part in line.split(" | ")),
        asks=tuple(marked["-"]),
        answers=tuple(marked["+"]),
    )
    if not (topic.gists and len(topic.asks) >= 3 and topic.answers):
        raise ValueError(f"topics/{domain}.txt, topic {heading!r}: needs a '>' line, three '-' lines and a '+' line")
    return topic
