"""Many ways to lay out a task on the page: one question and answer, several examples, or a chat."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lorikeet.data.synthesize.grammar import Writer

USER, ASSISTANT, END = "<|user|>\n", "<|assistant|>\n", "<|end|>"

_ARROWS = (" -> ", " => ", " = ", ": ", " | ", "\t", " --> ", " means ", " ~ ", " :: ")


@dataclass(frozen=True)
class Task:
    """Examples of one task. ``inputs`` and ``outputs`` are the names that a page may give the two sides."""

    instructions: Sequence[str]
    pairs: Sequence[tuple[str, str]]
    inputs: Sequence[str] = ("Input", "Text", "Message", "Sentence")
    outputs: Sequence[str] = ("Output", "Answer", "Result")


def render(w: Writer, task: Task) -> str:
    return w.pick(_LAYOUTS)(w, task)


def chat(w: Writer, task: Task) -> str:
    """One chat: the instruction stands in the first turn, later turns give further inputs."""
    instruction = w.say(w.pick(task.instructions))
    turns = []
    for index, (given, answer) in enumerate(task.pairs):
        if index and w.chance(0.7):
            question = given
        elif w.chance(0.15):
            question = f"{given}\n\n{instruction}"
        else:
            question = instruction + w.pick(("\n", " ", "\n\n", "\n")) + given
        turns.append(f"{USER}{question}\n{ASSISTANT}{answer}{END}")
    return "\n".join(turns)


def _case(w: Writer) -> Callable[[str], str]:
    cases: Sequence[Callable[[str], str]] = (str, str, str, str.lower, str.upper)
    return w.pick(cases)


def _named(w: Writer, task: Task) -> str:
    case = _case(w)
    left, right = case(w.pick(task.inputs)), case(w.pick(task.outputs))
    colon, between, gap = (
        w.pick((": ", ": ", ":\n", " - ", ":")),
        w.pick(("\n", "\n", "\n\n", " ")),
        w.pick(("\n\n", "\n", "\n---\n")),
    )
    blocks = [f"{left}{colon}{given}{between}{right}{colon}{answer}" for given, answer in task.pairs]
    if w.chance(0.5):
        blocks.insert(0, w.say(w.pick(task.instructions)))
    return gap.join(blocks)


def _arrows(w: Writer, task: Task) -> str:
    arrow = w.pick(_ARROWS)
    lines = [f"{given}{arrow}{answer}" for given, answer in task.pairs]
    if w.chance(0.5):
        lines.insert(0, w.say(w.pick(task.instructions)) + w.pick(("", ":", "\n")))
    return "\n".join(lines)


def _headings(w: Writer, task: Task) -> str:
    mark = w.pick(("### ", "## ", "# ", "** ", "[[", "== "))
    close = {"[[": "]]", "== ": " ==", "** ": " **"}.get(mark, w.pick(("", ":")))
    left, right = w.pick(task.inputs), w.pick(task.outputs)
    parts = [f"{mark}{w.pick(('Instruction', 'Task', 'Question'))}{close}\n{w.say(w.pick(task.instructions))}"]
    parts += [f"{mark}{left}{close}\n{given}\n\n{mark}{right}{close}\n{answer}" for given, answer in task.pairs]
    return "\n\n".join(parts)


def _tags(w: Writer, task: Task) -> str:
    left, right = w.pick(task.inputs).lower().replace(" ", "_"), w.pick(task.outputs).lower().replace(" ", "_")
    gap = w.pick(("", "\n", " "))
    blocks = [f"<{left}>{given}</{left}>{gap}<{right}>{answer}</{right}>" for given, answer in task.pairs]
    return "\n".join(blocks)


def _questions(w: Writer, task: Task) -> str:
    instruction = w.say(w.pick(task.instructions))
    blocks = []
    for index, (given, answer) in enumerate(task.pairs):
        asked = f"{instruction} {given}" if index == 0 or w.chance(0.3) else given
        blocks.append(f"Q: {asked}\nA: {answer}")
    return w.pick(("\n\n", "\n")).join(blocks)


def _quoted(w: Writer, task: Task) -> str:
    left, right = w.pick(task.inputs).lower(), w.pick(task.outputs).lower()
    return "\n".join(
        [
            w.pick(
                (
                    f'For the {left} "{given}" the {right} is {answer}',
                    f'The {right} of "{given}" is {answer}',
                    f'"{given}"\n{right}: {answer}',
                )
            )
            for given, answer in task.pairs
        ]
    )


def _lines_of_json(w: Writer, task: Task) -> str:
    left, right = w.pick(task.inputs).lower().replace(" ", "_"), w.pick(task.outputs).lower().replace(" ", "_")
    return "\n".join([json.dumps({left: given, right: answer}, ensure_ascii=False) for given, answer in task.pairs])


_LAYOUTS: Sequence[Callable[[Writer, Task], str]] = (
    _named,
    _named,
    _named,
    _named,
    _arrows,
    _headings,
    _tags,
    _questions,
    _quoted,
    _lines_of_json,
    chat,
    chat,
    chat,
)


def object_text(w: Writer, value: object) -> str:
    """JSON in one of the usual spacings; always valid."""
    kind = w.random()
    if kind < 0.6:
        return json.dumps(value, ensure_ascii=False)
    if kind < 0.8:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return json.dumps(value, ensure_ascii=False, indent=2)


def informal(w: Writer, text: str) -> str:
    """The same text as a hurried customer may type it: lower case, no stop, a typo now and then."""
    kind = w.random()
    if kind < 0.55:
        return text[:1].upper() + text[1:] + ("" if text[-1:] in "?!." or w.chance(0.4) else ".")
    if kind < 0.75:
        return text.lower()
    if kind < 0.85:
        return text.rstrip("?.")
    if kind < 0.95:
        return _typo(w, text)
    return text[:1].upper() + text[1:] + w.pick(("!", "!!", "??", " ...", "!?"))


def _typo(w: Writer, text: str) -> str:
    if len(text) < 8:
        return text
    at = w.between(2, len(text) - 3)
    kind = w.between(0, 2)
    if kind == 0:
        return text[:at] + text[at + 1 :]
    if kind == 1:
        return text[:at] + text[at + 1] + text[at] + text[at + 2 :]
    return text[:at] + text[at] + text[at:]
