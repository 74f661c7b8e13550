"""Short news and stories made of unseen names, with questions whose answers stand in the text."""

from __future__ import annotations

import json
import re
from functools import cache

from lorikeet.data.synthesize.grammar import Writer
from lorikeet.data.synthesize.layouts import ASSISTANT, END, USER, object_text
from lorikeet.data.synthesize.lexicon import sections

Passage = tuple[str, str, tuple[tuple[str, str], ...]]

_FIELD = re.compile(r"\{(\w+):(\w+)\}")


@cache
def _passages() -> tuple[Passage, ...]:
    """Kind, text and (question, answer) templates of ``lists/passages.txt``."""
    found = []
    for kind, lines in sections("lists", "passages"):
        text = " ".join(line for line in lines if not line.startswith("? "))
        asked = [line[2:].partition(" => ") for line in lines if line.startswith("? ")]
        found.append((kind, text, tuple((question, answer) for question, _, answer in asked)))
    return tuple(found)


def _told(w: Writer) -> tuple[Passage, str]:
    passage = w.pick(_passages())
    w.bound.clear()
    text = w.say(passage[1])
    return passage, text[:1].upper() + text[1:]


def passages(w: Writer) -> str:
    return w.pick((_questions, _questions, _questions, _chat, _facts, _two_texts, _headline))(w)


def _asked(w: Writer, passage: Passage, count: int) -> list[tuple[str, str]]:
    return [(w.say(question), w.say(answer)) for question, answer in w.sample(passage[2], count)]


def _questions(w: Writer) -> str:
    passage, text = _told(w)
    left, right = w.pick(
        (("Q: ", "A: "), ("Question: ", "Answer: "), ("", ""), ("- ", " "), ("> ", ""), ("Ask: ", "Reply: "))
    )
    gap = w.pick(("\n", "\n", " "))
    lines = [f"{left}{question}{gap}{right}{answer}" for question, answer in _asked(w, passage, w.between(1, 5))]
    head = w.pick(("", "", "", "Text: ", "Read this.\n", f"{passage[0].capitalize()}\n", "Context: "))
    return f"{head}{text}\n\n" + "\n".join(lines)


def _chat(w: Writer) -> str:
    passage, text = _told(w)
    (first, answer), *rest = _asked(w, passage, w.between(1, 4))
    opening = w.pick((f"{text}\n\n{first}", f"{first}\n\n{text}", f'Text: "{text}"\n{first}'))
    turns = [(opening, answer), *rest]
    return "\n".join([f"{USER}{question}\n{ASSISTANT}{reply}{END}" for question, reply in turns])


def _facts(w: Writer) -> str:
    """The text, and the values in it as a JSON object or a list, keyed by the kind of value."""
    passage, text = _told(w)
    data: dict[str, str] = {}
    for key, slot in _FIELD.findall(passage[1]):
        if key in w.bound:
            name = slot if slot not in data else f"{slot}_2"
            data[name] = w.bound[key]
    chosen = dict(w.sample(list(data.items()), w.between(2, len(data)))) if w.chance(0.5) else data
    ask = w.say("(Extract|Give me|List|Find) (these fields|the following|as JSON): ") + " " + ", ".join(chosen)
    shown = object_text(w, chosen) if w.chance(0.7) else "\n".join([f"{key}: {value}" for key, value in chosen.items()])
    if w.chance(0.4):
        return f"{USER}{text}\n{ask}\n{ASSISTANT}{shown}{END}"
    return f"{text}\n\n{ask}\n{shown}"


def _two_texts(w: Writer) -> str:
    lines, asked = [], []
    for _ in range(2):
        passage, text = _told(w)
        lines.append(text)
        asked += _asked(w, passage, 2)
    tail = [f"{question} {answer}" for question, answer in w.shuffled(asked)]
    return "\n".join(lines) + "\n\n" + "\n".join(tail)


def _headline(w: Writer) -> str:
    passage, text = _told(w)
    first = text.split(". ")[0].rstrip(".")
    tags = w.sample(list(w.bound.values()), 3)
    return (
        f"{text}\n\n{w.pick(('Headline', 'Summary', 'Short'))}: {first}.\n{w.pick(('Names', 'Tags', 'Keywords'))}: "
        + (", ".join(tags) if w.chance(0.6) else json.dumps(tags, ensure_ascii=False))
    )
