"""Write the demo's data: six tasks and a control, each with training and test rows, from the grammars in `demo_data/`.

Seeded and deterministic: `python scripts/make_demo_data.py` writes the same bytes each time; `--check` writes nothing
and fails if the files on disk differ. Every open pool (names, places, products, codes, numbers, ...) is split once for
all tasks, and every template belongs to one split, so neither an entity nor a template is on both sides. Only the
values of `CLOSED`, the columns of `SHARED_COLUMNS` and the names of functions and record fields may be on both.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import random
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

SEED = 20240607
TEST_ROWS = 150
GRAMMARS = Path(__file__).resolve().parent / "demo_data"
DESTINATION = Path(__file__).resolve().parent.parent / "src" / "lorikeet" / "data" / "demo"
SPLITS = ("train", "test")

CLOSED: dict[str, tuple[str, ...]] = {
    "room": ("kitchen", "bedroom", "living room", "bathroom", "office", "hallway", "garage", "nursery", "dining room",
             "basement", "attic", "studio"),
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "list": ("shopping", "packing", "camping", "office", "party", "holiday", "kitchen", "weekend"),
    "colour": ("red", "blue", "green", "black", "white", "grey", "yellow", "orange", "purple", "brown"),
    "price_band": ("budget", "affordable", "mid-range", "premium"),
    "k": ("3", "5", "10"),
}  # fmt: skip

SHARED_COLUMNS = frozenset({
    "name", "title", "code", "city", "country", "owner", "genre", "brand", "colour", "product", "publisher",
    "customer", "artist", "price", "rating", "age", "height", "weight", "length", "speed", "capacity", "duration",
    "fee", "income", "rank", "origin",
})  # fmt: skip

# Pools whose values are put together from two pools, both halves from the same split.
PAIRS: dict[str, tuple[str, str, str]] = {
    "person": ("first_name", " ", "last_name"),
    "company": ("company_stem", " ", "company_kind"),
    "furniture": ("furniture_a", " ", "furniture_b"),
    "clothing": ("clothing_a", " ", "clothing_b"),
    "electronics": ("electronics_a", " ", "electronics_b"),
    "kitchen": ("kitchen_a", " ", "kitchen_b"),
    "toy": ("toy_a", " ", "toy_b"),
    "cafe_name": ("restaurant_a", " ", "restaurant_b"),
    "title": ("title_a", " ", "title_b"),
    "artist": ("artist_a", " ", "artist_b"),
    "hotel": ("hotel_a", " ", "hotel_b"),
    "event_name": ("event_a", " ", "event_b"),
    "event": ("event_topic", " ", "event_kind"),
    "team_name": ("team_a", " ", "team_b"),
    "zoo": ("zoo_a", " ", "zoo_b"),
    "school": ("school_a", " ", "school_b"),
    "made_message": ("message_a", " ", "message_b"),
}
PRODUCT_GROUPS = ("furniture", "clothing", "electronics", "kitchen", "toy")
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
          "December")  # fmt: skip
ENTITY_KEYS = ("person", "company", "city", "product", "code", "date", "time", "amount")
SLOT = re.compile(r"\{(\w+)\}")
CHOICE = re.compile(r"\[([^\[\]]*)\]")


@dataclass(frozen=True)
class Row:
    """One row of a file, and the slot values that went into it (not written; the tests look at them)."""

    columns: dict[str, Any]
    slots: dict[str, str]


def load(name: str) -> Any:
    return yaml.safe_load((GRAMMARS / f"{name}.yaml").read_text(encoding="utf-8"))


def load_pools() -> dict[str, dict[str, list[str]]]:
    """Each pool as {split: values}; the fourth, eighth, ... value of `pools.yaml` is for the test rows.

    Values of `pools_train.yaml` come after them, all for the training rows, and none of them is a test value.
    """
    pools, more = {}, load("pools_train")
    for name, text in load("pools").items():
        values = [value.strip() for value in re.split(";" if ";" in text else ",", text)]
        added = [value.strip() for value in more.get(name, "").split(",") if value.strip()]
        if len(set(values)) != len(values):
            raise ValueError(f"pool {name} has repeated values: {sorted(v for v in values if values.count(v) > 1)}")
        train = [value for i, value in enumerate(values) if i % 4 != 3]
        pools[name] = {"train": train + [v for v in added if v not in values], "test": values[3::4]}
    return pools


def split_of(value: object) -> str:
    """The split that a number, time, date or code belongs to."""
    return "test" if hashlib.sha256(f"{SEED}:{value}".encode()).digest()[0] % 4 == 0 else "train"


class Values:
    """Draws slot values of one split; `draw` knows the plain pools, `PAIRS`, `CLOSED` and the generated kinds."""

    def __init__(self, split: str, rng: random.Random) -> None:
        self.split, self.rng = split, rng
        self.pools = {name: sides[split] for name, sides in load_pools().items()}
        self.generated: dict[str, Callable[[], str]] = {
            "product": lambda: self.draw(rng.choice(PRODUCT_GROUPS)),
            "product_b": lambda: self.draw("product"),
            "city_b": lambda: self.draw("city"),
            "said": lambda: self.draw("made_message" if rng.random() < 0.5 else "message"),
            "title_of_event": lambda: self.draw("event" if rng.random() < 0.7 else "event_plain"),
            "code": self.code,
            "date": self.date,
            "time": self.time,
            "amount": lambda: self.money(("${}", "${}", "€{}", "£{}", "{} euros", "{} dollars")),
            "plain_price": lambda: self.money(("${}", "{} euros")),
            "year": lambda: str(self.number(1950, 2020)),
            "age": lambda: str(self.number(2, 40)),
            "rooms": lambda: str(self.number(8, 320)),
            "level": lambda: str(self.number(5, 99)),
            "degrees": self.degrees,
        }

    def draw(self, slot: str) -> str:
        if slot in self.generated:
            return self.generated[slot]()
        if slot in CLOSED:
            return self.rng.choice(CLOSED[slot])
        if slot in PAIRS:
            first, glue, second = PAIRS[slot]
            return self.rng.choice(self.pools[first]) + glue + self.rng.choice(self.pools[second])
        return self.rng.choice(self.pools[slot])

    def mine(self, candidates: Callable[[], Any]) -> Any:
        """The first candidate that belongs to this split."""
        for _ in range(10_000):
            value = candidates()
            if split_of(value) == self.split:
                return value
        raise ValueError(f"no candidate for {self.split}, the last was {value!r}; widen its range")

    def number(self, low: int, high: int, step: int = 1) -> int:
        return int(self.mine(lambda: self.rng.randrange(low, high + 1, step)))

    def degrees(self) -> str:
        return str(self.mine(lambda: f"{self.rng.randint(28, 56) / 2:g}"))

    def money(self, forms: tuple[str, ...]) -> str:
        units = self.number(5, 999)
        cents = self.rng.choice(("", "", ".50", ".95", ".20"))
        return self.rng.choice(forms).format(f"{units}{cents}")

    def code(self) -> str:
        letters = "ABCDEFGHJKLMNPRSTUVWXYZ"

        def candidate() -> str:
            head = "".join(self.rng.sample(letters, 2))
            digits = str(self.rng.randint(1000, 99999))
            return self.rng.choice((f"{head}-{digits}", f"{head}{digits}", f"{digits}-{head}"))

        return str(self.mine(candidate))

    def date(self) -> str:
        day, month = self.mine(lambda: (self.rng.randint(1, 28), self.rng.choice(MONTHS)))
        suffix = "th" if day in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
        return str(self.rng.choice((f"{day} {month}", f"{month} {day}", f"{month} {day}{suffix}")))

    def time(self) -> str:
        face = self.mine(lambda: self.rng.randrange(0, 12 * 60, 5))  # 10:15, 10:15 am and 10:15 pm are on one side
        minutes = face + 12 * 60 if face < 6 * 60 or (face < 11 * 60 and self.rng.random() < 0.5) else face
        hour, minute = divmod(minutes, 60)
        half = "am" if hour < 12 else "pm"
        twelve = (hour - 1) % 12 + 1
        short = f"{twelve} {half}" if minute == 0 else f"{twelve}:{minute:02d} {half}"
        return str(self.rng.choice((short, short, f"{hour}:{minute:02d}")))

    def choose(self, template: str) -> str:
        """The template with one wording in place of each `[a|b]`."""
        return CHOICE.sub(lambda match: self.rng.choice(match[1].split("|")), template)

    def fill(self, template: str, given: dict[str, str] | None = None) -> tuple[str, dict[str, str]]:
        """The template as text, and its slot values; `[a|b]` is one of the two, `a {slot}` may become `an`."""
        template = self.choose(template)
        slots = {name: (given or {}).get(name) or self.draw(name) for name in SLOT.findall(template)}
        while slots.get("product_b", "").split(" ")[-1] == slots.get("product", "-").split(" ")[-1]:
            slots["product_b"] = self.draw("product_b")
        while "city_b" in slots and slots["city_b"] == slots.get("city"):
            slots["city_b"] = self.draw("city_b")

        def article(match: re.Match[str]) -> str:
            vowel = re.match(r"(?!e-|uni|eu|one)[aeiou]|8|11\b|18\b", slots[match[2]], re.IGNORECASE)
            return f"{match[1]}{'n' if vowel else ''} {{{match[2]}}}"

        template = re.sub(r"\b([Aa]) \{(\w+)\}", article, template)
        return SLOT.sub(lambda match: slots[match[1]], template), slots


def lines(block: str) -> list[str]:
    return [line.strip() for line in block.splitlines() if line.strip()]


def quota(total: int, parts: int) -> list[int]:
    return [total // parts + (i < total % parts) for i in range(parts)]


def collect(
    count: int, templates: list[str], make: Callable[[int, str], Row], key: str, seen: set[str]
) -> Iterator[Row]:
    """`count` rows from the templates in turn, no input twice; a template that makes no new row is left."""
    turns = list(enumerate(templates))
    made = 0
    while made < count:
        if not turns:
            raise ValueError(f"templates exhausted after {made} of {count} rows, the first is {templates[0]!r}")
        index, template = turns.pop(0)
        for _ in range(20):
            row = make(index, template)
            text = row.columns[key].lower()
            if text not in seen:
                seen.add(text)
                turns.append((index, template))
                made += 1
                yield row
                break


def casual(rng: random.Random, text: str, extras: bool, names: tuple[str, ...] = ()) -> str:
    """Some messages have a greeting or thanks, and some are typed without capitals and full stop."""
    if extras and rng.random() < 0.15:
        if re.match(r"(?!I\b)[A-Z][a-z']*(?=[ ,]|$)", text) and not text.startswith(names):
            text = text[0].lower() + text[1:]
        text = rng.choice(("Hi, ", "Hello, ", "Hey, ", "Good morning, ", "Hi there, ")) + text
    if extras and rng.random() < 0.12:
        text += rng.choice((" Thanks!", " Thank you.", " Please help.", " Thanks in advance."))
    if rng.random() < 0.2:
        text = text.lower().rstrip(".")
    return text


def intent_rows(split: str, rng: random.Random) -> list[Row]:
    values, seen, rows = Values(split, rng), set[str](), []
    grammar = load("intent")
    counts = quota(TEST_ROWS if split == "test" else 66 * len(grammar), len(grammar))
    for count, (label, section) in zip(counts, grammar.items(), strict=True):

        def make(index: int, template: str, label: str = label) -> Row:
            text, slots = values.fill(template)
            name = f"{label}/{split}/{index}"
            text = casual(rng, text, True, tuple(slots.values()))
            return Row({"text": text, "label": label, "template": name}, slots)

        rows += collect(count, lines(section[split]), make, "text", seen)
    return rows


def entities_rows(split: str, rng: random.Random) -> list[Row]:
    values = Values(split, rng)

    def make(index: int, template: str) -> Row:
        text, slots = values.fill(template)
        fields = {key: slots[key] for key in ENTITY_KEYS if key in slots}
        return Row({"text": text, "entities": fields, "template": f"{split}/{index}"}, slots)

    templates = lines(load("entities")[split])
    return list(collect(TEST_ROWS if split == "test" else 4800, templates, make, "text", set()))


def argument(name: str, value: str) -> str | int | float:
    if name == "level":
        return int(value)
    if name == "degrees":
        return float(value) if "." in value else int(value)
    return value


def calls_rows(split: str, rng: random.Random) -> list[Row]:
    values, seen, rows = Values(split, rng), set[str](), []
    slot_of = {"to": "person", "text": "said", "title": "title_of_event"}
    grammar = load("calls")
    counts = quota(TEST_ROWS if split == "test" else 220 * len(grammar), len(grammar))
    for count, (function, section) in zip(counts, grammar.items(), strict=True):

        def make(index: int, template: str, function: str = function, section: Any = section) -> Row:
            template = template.replace("{title}", "{title_of_event}").replace("{message}", "{said}")
            text, slots = values.fill(template)
            arguments = {name: argument(name, slots[slot_of.get(name, name)]) for name in section["arguments"]}
            call = {"name": function, "arguments": arguments}
            return Row({"text": text, "call": call, "template": f"{function}/{split}/{index}"}, slots)

        rows += collect(count, lines(section[split]), make, "text", seen)
    return rows


def orders(fields: dict[str, str], split: str) -> list[tuple[str, ...]]:
    """The orders in which a record's fields are shown: even permutations in training, odd ones in the test."""
    positions = {name: i for i, name in enumerate(fields)}

    def odd(order: tuple[str, ...]) -> bool:
        return sum(positions[a] > positions[b] for a, b in itertools.combinations(order, 2)) % 2 == 1

    return [order for order in itertools.permutations(fields) if odd(order) == (split == "test")]


def describe_rows(split: str, rng: random.Random) -> list[Row]:
    values, seen, rows = Values(split, rng), set[str](), []
    grammar = load("describe")
    counts = quota(TEST_ROWS if split == "test" else 200 * len(grammar), len(grammar))
    for count, (kind, section) in zip(counts, grammar.items(), strict=True):
        fields = section["fields"]
        templates = lines(section[split])

        def make(index: int, template: str, kind: str = kind, fields: Any = fields, templates: Any = templates) -> Row:
            record = {name: values.draw(pool) for name, pool in fields.items()}
            order = rng.choice(orders(fields, split))
            facts = " | ".join(f"{name}: {record[name]}" for name in order)
            text = sentence(values, template, record)
            row: dict[str, Any] = {"facts": facts, "text": text}
            if split == "test":
                others = [other for other in templates if other != template]
                row |= {f"text_{i}": sentence(values, other, record) for i, other in enumerate(others, start=2)}
            row["template"] = f"{kind}/{split}/{index}"
            return Row(row, record)

        rows += collect(count, templates, make, "facts", seen)
    return rows


def sentence(values: Values, template: str, record: dict[str, str]) -> str:
    text, _ = values.fill(template, record)
    return text[0].upper() + text[1:]


def joined(first: str, connector: str, second: str) -> str:
    """Two sentences with a connector between them; the second loses its capital unless it starts with a name or `I`."""
    if connector and not re.match(r"(I|\{thing\}|\{person\}|Five stars)\b|\{", second):
        second = second[0].lower() + second[1:]
    return f"{first} {connector} {second}" if connector else f"{first} {second}"


def sentiment_rows(split: str, rng: random.Random) -> list[Row]:
    values, seen, rows = Values(split, rng), set[str](), []
    grammar = load("sentiment")
    openings, connectors = lines(grammar["opening"][split]), lines(grammar["connector"][split])
    labels = ("positive", "negative", "mixed")

    def make(_: int, name: str) -> Row:
        label, domain = name.split("/")
        section = grammar["domains"][domain]
        sides = {
            side: [
                (f"{source}/{side}/{split}/{index}", line)
                for source, block in ((domain, section), ("any", grammar["any"]))
                for index, line in enumerate(lines(block[side][split]))
            ]
            for side in labels[:2]
        }
        if label == "mixed":
            picked = [rng.choice(sides[side]) for side in rng.sample(labels[:2], 2)]
            connector = rng.choice(connectors) if rng.random() < 0.7 else ""
            text = joined(values.choose(picked[0][1]), connector, values.choose(picked[1][1]))
        else:
            picked = rng.sample(sides[label], rng.choice((1, 2, 2, 2, 3)))
            text = " ".join(template for _, template in picked)
        names = [name for name, _ in picked]
        if rng.random() < 0.2:
            index = rng.randrange(len(openings))
            text, names = f"{openings[index]} {text}", [f"opening/{split}/{index}", *names]
        text, slots = values.fill(text.replace("{thing}", f"{{{section['thing']}}}"))
        return Row({"text": casual(rng, text, False), "label": label, "template": "+".join(names)}, slots)

    for label, count in zip(labels, quota(TEST_ROWS if split == "test" else 3000, 3), strict=True):
        rows += collect(count, [f"{label}/{domain}" for domain in grammar["domains"]], make, "text", seen)
    return rows


@dataclass(frozen=True)
class Table:
    singular: str
    plural: str
    texts: dict[str, str]
    numbers: dict[str, tuple[int, int]]

    @classmethod
    def parse(cls, line: str) -> Table:
        words, texts, numbers = (part.split() for part in line.split("|"))
        ranges = {name: tuple(map(int, bounds.split("-"))) for name, bounds in (one.split(":") for one in numbers)}
        return cls(words[0], words[1], dict(one.split(":") for one in texts), ranges)  # type: ignore[arg-type]


def threshold(values: Values, low: int, high: int) -> int:
    """A number inside the column's range, round where the range is wide; the ends are left out."""
    step = next(step for limit, step in ((120, 1), (1000, 10), (10_000, 100), (10**9, 1000)) if high <= limit)
    step = 1 if high <= 2020 and low >= 1500 else step
    first = low + 1 if step == 1 else max(step, -(-low // step) * step)
    return values.number(first, high - 1, step)


def sql_rows(split: str, rng: random.Random) -> list[Row]:
    values, seen, rows = Values(split, rng), set[str](), []
    grammar = load("sql")
    tables = [Table.parse(line) for line in lines(grammar["tables"][split])]
    counts = quota(TEST_ROWS if split == "test" else 160 * len(grammar["patterns"]), len(grammar["patterns"]))
    for count, (pattern, section) in zip(counts, grammar["patterns"].items(), strict=True):

        def make(index: int, template: str, pattern: str = pattern, section: Any = section) -> Row:
            table = rng.choice(tables)
            key, *others = table.texts
            cat, num = rng.choice(others), rng.choice(list(table.numbers))
            given = {"s": table.singular, "p": table.plural, "key": key, "cat": cat, "num": num,
                     "val": values.draw(table.texts[cat]), "keyval": values.draw(table.texts[key]),
                     "n": str(threshold(values, *table.numbers[num]))}  # fmt: skip
            question, slots = values.fill(template, given)
            query, used = values.fill(section["query"], given | slots)
            extra = rng.choice([name for name in (*others, *table.numbers) if name not in (cat, num)])
            columns = [key, *rng.sample([cat, num, extra], 3)]
            schema = f"{table.plural}({', '.join(columns)})"
            shown = {name: slots[name] for name in ("val", "keyval", "n") if name in used}
            return Row({"schema": schema, "question": question[0].upper() + question[1:], "query": query,
                        "template": f"{pattern}/{split}/{index}"}, shown)  # fmt: skip

        rows += collect(count, lines(section[split]), make, "question", seen)
    return rows


TASKS: dict[str, Callable[[str, random.Random], list[Row]]] = {
    "intent": intent_rows,
    "entities": entities_rows,
    "calls": calls_rows,
    "describe": describe_rows,
    "sentiment": sentiment_rows,
    "sql": sql_rows,
}


def build(task: str, split: str) -> list[Row]:
    """The rows of one file, in their order there. `control` has only a training split: intent with shuffled labels."""
    if task == "control":
        rows = build("intent", "train")
        labels = [row.columns["label"] for row in rows]
        random.Random(f"{SEED}/control").shuffle(labels)
        return [Row(row.columns | {"label": label}, row.slots) for row, label in zip(rows, labels, strict=True)]
    rng = random.Random(f"{SEED}/{task}/{split}")
    rows = TASKS[task](split, rng)
    rng.shuffle(rows)
    return rows


def files() -> dict[str, str]:
    """Every file below the destination, by relative path."""
    wanted = [(task, split) for task in TASKS for split in SPLITS] + [("control", "train")]
    return {
        f"{task}/{split}.jsonl": "".join(
            json.dumps(row.columns, ensure_ascii=False) + "\n" for row in build(task, split)
        )
        for task, split in wanted
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=DESTINATION, help="folder to write to (default: the package's)")
    parser.add_argument("--check", action="store_true", help="write nothing, fail if a file differs")
    arguments = parser.parse_args()
    stale = []
    for name, text in files().items():
        path = arguments.out / name
        if arguments.check:
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                stale.append(name)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"{name}: {text.count(chr(10))} rows")
    if stale:
        print(f"differs from the grammars: {', '.join(stale)}; run scripts/make_demo_data.py", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
