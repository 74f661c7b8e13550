"""Voice commands with their slots, entity marking, and function calls."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache

from lorikeet.data.synthesize.grammar import Writer
from lorikeet.data.synthesize.layouts import ASSISTANT, END, USER, Task, informal, object_text, render
from lorikeet.data.synthesize.lexicon import sections

# "on Friday" is said, "Friday" is the value.
_PREPOSITION = re.compile(r"^(on|for|at) ")


class Command:
    """A thing to ask for: names of it, and patterns whose bound slots are its arguments."""

    def __init__(self, names: Sequence[str], patterns: Sequence[str]) -> None:
        self.names, self.patterns = names, patterns
        self.arguments = list(dict.fromkeys(key for pattern in patterns for key in re.findall(r"\{(\w+):", pattern)))


@cache
def commands() -> dict[str, tuple[Command, ...]]:
    """The patterns of ``patterns/*.txt``; per file: ``# name | name`` and then one pattern a line."""
    return {
        file: tuple(Command(heading.split(" | "), lines) for heading, lines in sections("patterns", file))
        for file in ("voice", "mentions")
    }


def _uttered(w: Writer, command: Command) -> tuple[str, dict[str, str]]:
    """A sentence and the arguments that really stand in it, in their order there."""
    w.bound.clear()
    text = w.say(w.pick(command.patterns))
    kind = w.random()
    if kind < 0.45:
        text = text[:1].upper() + text[1:]
    if kind < 0.3 and text[-1:] not in "?!.":
        text += w.pick((".", "!", "."))
    found = {key: _PREPOSITION.sub("", value) for key, value in w.bound.items() if value in text}
    return text, dict(sorted(found.items(), key=lambda item: text.index(item[1])))


def _styled(w: Writer, name: str, style: int) -> str:
    if style == 0:
        return "".join(part.capitalize() for part in name.split())
    if style in (1, 2):
        return name.replace(" ", "_")
    if style == 3:
        first, *rest = name.split()
        return first + "".join(part.capitalize() for part in rest)
    return name


def voice(w: Writer) -> str:
    """Commands with intent and slots, in many notations."""
    known = commands()["voice"]
    style, notation = w.between(0, 4), w.between(0, 6)
    chosen = w.sample(known, w.between(1, 5))
    names = {id(c): _styled(w, c.names[0] if w.chance(0.7) else w.pick(c.names), style) for c in chosen}
    pairs = []
    for command in chosen:
        text, slots = _uttered(w, command)
        pairs.append((text, _answer(w, names[id(command)], slots, notation)))
    instructions = (
        "(Find|Extract|List) the (slots|arguments|details)[ and the intent].",
        "(Parse|Understand|Analyse) the command.",
        "What does the user want?",
        "Turn the (request|command) into data.",
    )
    if notation == 0:
        instructions = (
            "What is the intent?",
            "Classify the (request|command).",
            "Which (skill|action|intent) fits?",
            "Name the (action|intent).",
        )
    inputs = ("Command", "Utterance", "User", "Request", "Text", "Voice command")
    outputs = (
        ("Intent", "Action", "Skill")
        if notation == 0
        else ("Slots", "Parse", "Output", "Result", "Arguments", "JSON")
        if notation < 6
        else ("Details", "Slots")
    )
    return render(w, Task(instructions, pairs, inputs, outputs))


def _answer(w: Writer, name: str, slots: dict[str, str], notation: int) -> str:
    if notation == 0:
        return name
    if notation == 1:
        return object_text(w, {"intent": name, "slots": slots})
    if notation == 2:
        return json.dumps(slots, ensure_ascii=False)
    if notation == 3:
        return f"{name}({', '.join(f'{key}={json.dumps(value, ensure_ascii=False)}' for key, value in slots.items())})"
    if notation == 4:
        return "; ".join([name, *(f"{key}: {value}" for key, value in slots.items())])
    if notation == 5:
        return object_text(w, {"name": name, "arguments": slots})
    return ", ".join(f"{key}[{value}]" for key, value in slots.items()) or name


def function_calls(w: Writer) -> str:
    """Tools, a request, and the call as JSON; sometimes the result and a reply from it."""
    known = commands()["voice"]
    command = w.pick(known)
    text, slots = _uttered(w, command)
    offered = w.shuffled([command, *w.sample([c for c in known if c is not command], w.between(0, 4))])
    style = w.pick((1, 1, 3))
    tools = [_tool(w, c, style) for c in offered]
    name = _styled(w, command.names[0], style)
    key = w.pick(("arguments", "arguments", "parameters", "args"))
    head = w.pick(("name", "name", "function", "tool"))
    typed = _numbers(slots) if w.chance(0.5) else slots
    call = object_text(w, {head: name, key: typed})
    intro = w.say("(Available|You can use these|Known) (tools|functions)[ (one a line|below)]:|Tools:|Functions:")
    body = f"{intro}\n" + "\n".join(tools)
    if w.chance(0.5):
        page = (
            f"{USER}{body}\n\n{text}\n{ASSISTANT}{call}{END}"
            if w.chance(0.7)
            else f"{USER}{text}\n{ASSISTANT}{call}{END}"
        )
    else:
        left, right = w.pick((("User", "Call"), ("Request", "Function call"), ("Input", "Output"), ("Q", "A")))
        page = f"{body}\n\n{left}: {text}\n{right}: {call}"
    if w.chance(0.25) and slots:
        done = w.pick(list(slots.values()))
        page += w.pick(("\n", "\n\n")) + w.pick(
            (
                f"Result: ok\nReply: Done, {done}.",
                f'Result: {{"status": "ok"}}\nReply: I have taken care of "{done}".',
                f"Result: error, {done} was not found\nReply: Sorry, I could not find {done}.",
            )
        )
    return page


def _numbers(slots: dict[str, str]) -> dict[str, str | int]:
    """Whole numbers become JSON numbers, as a typed function wants them."""
    return {key: int(value) if value.isdecimal() and value[0] != "0" else value for key, value in slots.items()}


def _tool(w: Writer, command: Command, style: int) -> str:
    name = _styled(w, command.names[0], style)
    if w.chance(0.6):
        return f"- {name}({', '.join(command.arguments)})"
    return json.dumps({"name": name, "description": command.names[-1], "parameters": command.arguments})


_TYPE_NAMES = {
    "person": ("person", "PER", "name"),
    "place": ("location", "LOC", "place"),
    "company": ("corporation", "ORG", "company"),
    "title": ("creative-work", "WORK", "title"),
    "product": ("product", "PROD", "product"),
    "group": ("group", "GRP", "team or band"),
    "date": ("date", "DATE", "date"),
    "amount": ("money", "AMT", "amount"),
}


def entities(w: Writer) -> str:
    """Sentences with their names marked: tags inline, BIO, lists, JSON."""
    style, column = w.between(0, 7), w.pick((0, 0, 1, 2))
    pairs = []
    for _ in range(w.between(1, 4)):
        command = w.pick(commands()["mentions"])
        text, raw = _uttered(w, command)
        text = text if w.chance(0.8) else informal(w, text)
        found = [(value, _TYPE_NAMES[key.rstrip("0123456789")][column]) for key, value in raw.items() if value in text]
        pairs.append((text, _marked(w, text, found, style)))
    return render(
        w,
        Task(
            (
                "(Find|Mark|List|Extract|Tag) (all |the )[named ](entities|names).",
                "Which (people, places and things|names|entities) are mentioned?",
                "Named entity recognition.",
                "(Extract|Pull out) the (entities|names) as data.",
            ),
            pairs,
            ("Text", "Sentence", "Post", "Tweet", "Input", "Message"),
            ("Entities", "Names", "Output", "Tags", "Marked"),
        ),
    )


def _marked(w: Writer, text: str, found: list[tuple[str, str]], style: int) -> str:
    if style == 0:
        return json.dumps([{"text": value, "type": kind} for value, kind in found], ensure_ascii=False)
    if style == 1:
        return object_text(w, {kind: [v for v, k in found if k == kind] for kind in dict.fromkeys(k for _, k in found)})
    if style == 2:
        return "\n".join(f"{value} ({kind})" for value, kind in found) or "none"
    if style == 3:
        return "; ".join(f"{kind}: {value}" for value, kind in found) or "none"
    if style == 4:
        for value, kind in found:
            text = text.replace(value, f"[{value}]({kind})", 1)
        return text
    if style == 5:
        for value, kind in found:
            text = text.replace(value, f"<{kind}>{value}</{kind}>", 1)
        return text
    if style == 6:
        return ", ".join(value for value, _ in found) or "none"
    return _bio(text, found)


def _bio(text: str, found: list[tuple[str, str]]) -> str:
    words = re.findall(r"[\w@#'’.&-]*[\w]|[^\w\s]", text)
    tags = ["O"] * len(words)
    for value, kind in found:
        parts = re.findall(r"[\w@#'’.&-]*[\w]|[^\w\s]", value)
        for at in range(len(words) - len(parts) + 1):
            if words[at : at + len(parts)] == parts and tags[at] == "O":
                tags[at : at + len(parts)] = [f"B-{kind}"] + [f"I-{kind}"] * (len(parts) - 1)
                break
    return " ".join(f"{word}/{tag}" for word, tag in zip(words, tags, strict=True))
