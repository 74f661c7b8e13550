"""Documents whose second half repeats values of the first: forms, tables, look-ups, logs, lists, conversions."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from lorikeet.data.synthesize.grammar import Writer
from lorikeet.data.synthesize.layouts import Task, chat, object_text, render
from lorikeet.data.synthesize.lexicon import list_pairs

Record = dict[str, str]

_SCHEMAS = [
    (kind, [(key, slot) for key, _, slot in (field.partition("=") for field in fields.split(", "))])
    for kind, fields in list_pairs("records")
]


def record(w: Writer, low: int = 2, high: int = 7) -> tuple[str, Record]:
    kind, fields = w.pick(_SCHEMAS)
    chosen = w.sample(fields, w.between(low, high))
    if w.chance(0.6):
        chosen = [field for field in fields if field in chosen]
    return kind, {key: w.slot(slot) for key, slot in chosen}


def rows(w: Writer, count: int) -> tuple[str, list[Record]]:
    kind, fields = w.pick(_SCHEMAS)
    chosen = [field for field in fields if w.chance(0.55)] or list(fields[:2])
    chosen = chosen if len(chosen) > 1 else list(fields[:2])
    return kind, [{key: w.slot(slot) for key, slot in chosen[:5]} for _ in range(count)]


def _keys(w: Writer, data: Record) -> Record:
    style = w.between(0, 3)
    if style == 0:
        return data
    change: Callable[[str], str] = (
        lambda k: k.replace(" ", "_"),
        lambda k: k.title(),
        lambda k: "".join([p.capitalize() if i else p for i, p in enumerate(k.split())]),
    )[style - 1]
    return {change(key): value for key, value in data.items()}


def as_form(w: Writer, data: Record) -> str:
    colon, gap = w.pick((": ", ": ", " = ", ":", " - ", "\t", " .... ")), w.pick(("\n", "\n", "\n", "; ", ", ", " | "))
    return gap.join([f"{key}{colon}{value}" for key, value in data.items()])


def as_brackets(w: Writer, data: Record) -> str:
    return ", ".join([f"{key}[{value}]" for key, value in data.items()])


def as_yaml(w: Writer, data: Record) -> str:
    lines = []
    for key, value in data.items():
        quoted = json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ":#@") else value
        lines.append(f"{key.replace(' ', '_')}: {quoted}")
    return "\n".join(lines)


def as_xml(w: Writer, data: Record) -> str:
    return "".join([f"<{key.replace(' ', '_')}>{value}</{key.replace(' ', '_')}>" for key, value in data.items()])


def as_sentences(w: Writer, data: Record) -> str:
    parts = []
    for key, value in data.items():
        parts.append(
            w.pick(
                (
                    f"The {key} is {value}.",
                    f"Its {key} is {value}.",
                    f"{value} is the {key}.",
                    f"For {key} we have {value}.",
                    f"The {key} was given as {value}.",
                    f"As {key}, {value} was noted.",
                )
            )
        )
    return " ".join(parts)


def as_json(w: Writer, data: Record) -> str:
    return object_text(w, _keys(w, data))


_FORMS = (as_form, as_form, as_brackets, as_yaml, as_xml, as_sentences, as_json, as_json)
_FORM_NAMES = {
    as_form: "form",
    as_brackets: "brackets",
    as_yaml: "YAML",
    as_xml: "XML",
    as_sentences: "sentences",
    as_json: "JSON",
}


def records(w: Writer) -> str:
    return w.pick((_converted, _converted, _asked, _asked, _changed, _nested))(w)


def _converted(w: Writer) -> str:
    source, target = w.pick(_FORMS), w.pick((as_json, as_json, as_json, *_FORMS))
    pairs = []
    kind = ""
    for _ in range(w.between(1, 3)):
        kind, data = record(w)
        shown = dict(w.shuffled(list(data.items()))) if w.chance(0.3) else data
        pairs.append((source(w, shown), target(w, data)))
    name = _FORM_NAMES[target]
    return render(
        w,
        Task(
            (
                f"(Convert|Turn|Change|Rewrite) (this|the {kind}|the record) (to|into|as) {name}.",
                f"(Write|Give|Show) (it|the {kind}) as {name}.",
                f"{name}, please.",
            ),
            pairs,
            ("Input", "Record", kind.capitalize(), "Data", "Form"),
            (name, "Output", "Result"),
        ),
    )


def _asked(w: Writer) -> str:
    kind, data = record(w, 3, 7)
    asked = w.sample(list(data.items()), w.between(1, 3))
    text = w.pick(_FORMS)(w, data)
    pairs = [
        (
            w.pick(
                (
                    f"What is the {key}?",
                    f"{key}?",
                    f"Which {key} is given?",
                    f"Tell me the {key}.",
                    f"The {key} of the {kind}?",
                )
            ),
            w.pick((value, value, f"The {key} is {value}.", f"{value}.")),
        )
        for key, value in asked
    ]
    if w.chance(0.3):
        return chat(
            w,
            Task(
                (f"{'Here is' if w.chance(0.5) else 'Look at'} the {kind}.",),
                [(f"{text}\n{pairs[0][0]}", pairs[0][1]), *pairs[1:]],
            ),
        )
    left, right = w.pick((("Q: ", "A: "), ("Question: ", "Answer: "), ("", ""), ("- ", "  "), ("> ", "")))
    return f"{text}\n\n" + "\n".join([f"{left}{question}\n{right}{value}" for question, value in pairs])


def _changed(w: Writer) -> str:
    kind, data = record(w, 3, 6)
    key = w.pick(list(data))
    new = w.slot(dict(dict(_SCHEMAS)[kind])[key])
    form = w.pick((object_text, as_form, as_yaml))
    change = w.pick(
        (
            f"Change the {key} to {new}.",
            f"The {key} should be {new}.",
            f"Set {key} to {new}.",
            f"Please replace {data[key]} by {new}.",
            f"New {key}: {new}",
        )
    )
    before, after = form(w, data), form(w, {**data, key: new})
    given = w.pick((f"{before}\n{change}", f"{change}\n{before}", f"{before}\n\n{change}"))
    task = Task(_CHANGES, [(given, after)], ("Before", "Record", "Old", "Input"), ("After", "Updated", "New", "Output"))
    return render(w, task)


_CHANGES = (
    "(Make|Apply|Do) the change.",
    "(Update|Correct|Edit) the (record|data).",
    "What does it look like after the change?",
)


def _nested(w: Writer) -> str:
    kind, data = record(w, 2, 5)
    other, extra = rows(w, w.between(1, 3))
    value = {kind: data, w.pick((other + "s", "items", "list", "entries")): extra}
    first = next(iter(extra[0]))
    asked = w.pick(
        (
            f"{first} of the first {other}: {extra[0][first]}",
            f"Number of {other}s: {len(extra)}",
            f"All {first}s: {', '.join(row[first] for row in extra)}",
            f"{next(iter(data))} of the {kind}: {next(iter(data.values()))}",
        )
    )
    return f"{object_text(w, value)}\n\n{asked}"


def tables(w: Writer) -> str:
    """A table in CSV, Markdown, TSV or JSON lines, then questions about it or another form of it."""
    kind, data = rows(w, w.between(2, 7))
    text = w.pick((csv_text, markdown_text, markdown_text, pipe_text, json_lines))(data)
    keys = list(data[0])
    lines = []
    for _ in range(w.between(1, 4)):
        row = w.pick(data)
        key, asked = w.sample(keys, 2)
        lines.append(
            w.pick(
                (
                    f"The {asked} of {row[key]} is {row[asked]}.",
                    f"{row[key]}: {row[asked]}",
                    f"Q: Which {asked} belongs to {row[key]}?\nA: {row[asked]}",
                    f"Where {key} is {row[key]}, {asked} is {row[asked]}.",
                    f"{key} = {row[key]} -> {asked} = {row[asked]}",
                )
            )
        )
    if w.chance(0.3):
        lines = [w.pick((csv_text, markdown_text, json_lines))(w.shuffled(data) if w.chance(0.3) else data)]
    elif w.chance(0.3):
        row = w.pick(data)
        lines.append(json.dumps(row, ensure_ascii=False))
    head = w.pick(("", f"{kind.capitalize()}s\n", f"Table: {kind}s\n", f"## {kind.capitalize()} list\n\n"))
    return f"{head}{text}\n\n" + "\n".join(lines)


def csv_text(data: Sequence[Record]) -> str:
    def cell(value: str) -> str:
        return f'"{value}"' if "," in value else value

    return "\n".join([",".join(data[0]), *(",".join([cell(value) for value in row.values()]) for row in data)])


def markdown_text(data: Sequence[Record]) -> str:
    keys = list(data[0])
    return "\n".join(
        [f"| {' | '.join(keys)} |", "|" + "---|" * len(keys), *(f"| {' | '.join(row.values())} |" for row in data)]
    )


def pipe_text(data: Sequence[Record]) -> str:
    return "\n".join([" | ".join(data[0]), *(" | ".join(row.values()) for row in data)])


def json_lines(data: Sequence[Record]) -> str:
    return "\n".join([json.dumps(row, ensure_ascii=False) for row in data])


_VALUES = (
    "person",
    "code",
    "town",
    "company",
    "word",
    "title",
    "number",
    "email",
    "phone",
    "invented",
    "product",
    "date",
    "artist",
    "restaurant",
    "clock",
    "amount",
    "username",
    "animal",
    "colour",
    "dish",
)


def copying(w: Writer) -> str:
    """Pure induction: keys and values, lists in another order, quotes, logs."""
    return w.pick((_lookup, _lookup, _reordered, _repeated, _log, _quotes, _memory, _swapped))(w)


def _lookup(w: Writer) -> str:
    left, right = w.sample(_VALUES, 2)
    keys = w.several(left, w.between(3, 9))
    pairs = [(key, w.slot(right)) for key in keys]
    mark = w.pick((": ", " -> ", " = ", " is ", " has ", ", ", " - ", "\t", " => "))
    asked = w.shuffled(pairs)[: w.between(2, len(pairs))]
    again = w.pick((mark, mark, ": ", " = "))
    head = w.pick(("", "", "Look up:\n", "Again:\n", "Now in another order:\n", "Check:\n", "Questions:\n"))
    return (
        "\n".join([f"{key}{mark}{value}" for key, value in pairs])
        + "\n\n"
        + head
        + "\n".join([f"{key}{again}{value}" for key, value in asked])
    )


def _reordered(w: Writer) -> str:
    items = w.several(w.pick(_VALUES), w.between(3, 8))
    comma = w.pick((", ", "; ", "\n", " | "))
    kind, order = w.pick(
        (
            ("Sorted", sorted(items)),
            ("Reversed", items[::-1]),
            ("Longest first", sorted(items, key=len, reverse=True)),
            ("Same again", items),
            ("The first three", items[:3]),
            ("Last", items[-1:]),
            ("As JSON", [json.dumps(items, ensure_ascii=False)]),
            ("Without the first", items[1:]),
        )
    )
    lines = [f"{w.pick(('List', 'Items', 'Given', 'Names', 'Entries'))}: {comma.join(items)}"]
    if w.chance(0.6):
        lines.append(f"{w.pick(('Count', 'Number of items'))}: {len(items)}")
    lines.append(f"{kind}: {comma.join(order)}")
    if w.chance(0.4):
        lines += [f"{index}. {item}" for index, item in enumerate(items, 1)]
    return "\n".join(lines)


def _repeated(w: Writer) -> str:
    value = w.slot(w.pick(_VALUES))
    frames = w.sample(
        (
            "Please write down {v}.",
            "Repeat after me: {v}",
            "{v}",
            "You said {v}.",
            "So it is {v}, correct?",
            'The word is "{v}".',
            "Yes, {v}.",
            "I repeat: {v}",
            "Copy: {v}",
            "Once more, {v}.",
            "In quotes: '{v}'",
            "Upper case: {V}",
            "Spelled: {s}",
        ),
        w.between(3, 6),
    )
    return w.pick(("\n", " ")).join(
        [
            frame.replace("{v}", value).replace("{V}", value.upper()).replace("{s}", "-".join(value.replace(" ", "")))
            for frame in frames
        ]
    )


def _log(w: Writer) -> str:
    users, things = w.several("username", w.between(2, 3)), w.several("code", w.between(2, 3))
    day = w.slot("iso_date")
    actions = ("opened", "closed", "updated", "deleted", "created", "sent", "approved", "rejected", "viewed", "paid")
    events = [(w.pick(users), w.pick(actions), w.pick(things)) for _ in range(w.between(4, 9))]
    second = w.between(0, 3000)
    lines = []
    for user, action, thing in events:
        second += w.between(1, 900)
        stamp = f"{day} {8 + second // 3600:02d}:{second // 60 % 60:02d}:{second % 60:02d}"
        lines.append(
            w.pick(
                (
                    f"{stamp} {user} {action} {thing}",
                    f"{stamp} {user} {action} {thing}",
                    f"[{stamp}] INFO user={user} action={action} id={thing}",
                )
            )
        )
    user, action, thing = events[-1]
    counts = {name: sum(name == event[0] for event in events) for name in users}
    lines.append(
        w.pick(
            (
                f"Last event: {user} {action} {thing}.",
                f"Events by {users[0]}: {counts[users[0]]}",
                f"Users: {', '.join(sorted({event[0] for event in events}))}",
                f"{thing} was {action} by {user}.",
            )
        )
    )
    return "\n".join(lines)


_SAYINGS = (
    "I (love|hate|like|need|want|sold|bought|lost) (a|the|my) {product}",
    "we are (going|moving|flying) to {place} [{when}]",
    "{company} is (too expensive|the best|closing)",
    "my {relation} (lives in|comes from|works in) {town}",
    "my favourite (song|book|film) is {title}",
    "I work (as a {job}|at {company})",
    "the (code|number|password) is {code}",
    "you can (call|reach) me (on|at) {phone}",
    "{given} and {given} (met|saw us|are) in {town}",
    "it costs {amount}",
)


def _quotes(w: Writer) -> str:
    speakers = w.several("person", w.between(2, 3))
    said = {name: w.sentence(w.pick(_SAYINGS)) for name in speakers}
    lines = [
        w.pick((f'{name} said: "{text}"', f'"{text}" said {name}.', f"{name}: {text}")) for name, text in said.items()
    ]
    asked = w.sample(list(said.items()), w.between(1, 3))
    lines += [
        w.pick((f'Who said "{text}"? {name}.', f"What did {name} say? {text}", f'{name} told us: "{text}"'))
        for name, text in asked
    ]
    return "\n".join(lines)


def _memory(w: Writer) -> str:
    people = w.several("given", w.between(3, 5))
    slot, verb = w.pick(
        (
            ("town", "lives in"),
            ("dish", "likes"),
            ("product", "bought a"),
            ("company", "works for"),
            ("sport", "plays"),
            ("colour", "wears"),
            ("code", "has the number"),
            ("drink", "drinks"),
            ("animal", "has a"),
            ("instrument", "plays the"),
            ("title", "is reading"),
        )
    )
    facts = [(name, w.slot(slot)) for name in people]
    lines = [f"{name} {verb} {value}." for name, value in facts]
    name, value = w.pick(facts)
    question = w.pick(
        (
            f"Who {verb} {value}? {name}",
            f"{name} {verb}... {value}",
            f"And {name}? {name} {verb} {value}.",
            f"True: {name} {verb} {value}.",
        )
    )
    return " ".join(lines) + w.pick(("\n", " ", "\n\n")) + question


def _swapped(w: Writer) -> str:
    left, right = w.sample(_VALUES, 2)
    pairs = [(w.slot(left), w.slot(right)) for _ in range(w.between(2, 6))]
    return (
        "\n".join([f"{a} {mark} {b}" for mark in (w.pick(("|", "<->", "/", "=", "and")),) for a, b in pairs])
        + "\n\n"
        + w.pick(("Swapped:", "The other way round:", "Reverse:"))
        + "\n"
        + "\n".join([f"{b} / {a}" for a, b in pairs])
    )
