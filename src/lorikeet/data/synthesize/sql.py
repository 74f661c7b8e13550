"""A schema, a question in words and the query for it; every query runs on its schema in SQLite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lorikeet.data.synthesize.grammar import Writer
from lorikeet.data.synthesize.layouts import Task, chat, render
from lorikeet.data.synthesize.lexicon import list_pairs

TEXT, NUMBER = "TEXT", "INTEGER"


@dataclass(frozen=True)
class Column:
    name: str
    type: str
    slot: str


@dataclass(frozen=True)
class Table:
    name: str
    columns: tuple[Column, ...]

    def of(self, type_: str) -> list[Column]:
        return [column for column in self.columns if column.type == type_]


def _columns(fields: str) -> tuple[Column, ...]:
    split = [field.partition("=") for field in fields.split(", ")]
    return tuple(Column(name, TEXT if slot else NUMBER, slot or "number") for name, _, slot in split)


_TABLES = {name: _columns(fields) for name, fields in list_pairs("tables")}
_ALL = tuple(dict.fromkeys(column for columns in _TABLES.values() for column in columns))
_TEXTS = tuple({column.name: column for column in _ALL if column.type == TEXT}.values())
_NUMBERS = tuple({column.name: column for column in _ALL if column.type == NUMBER}.values())

# Words for more, less, most and least of a column; the others use the plain words of _condition and _order.
_WORDS = {
    "age": ("older than", "younger than", "oldest", "youngest"),
    "price": ("more expensive than", "cheaper than", "most expensive", "cheapest"),
    "cost": ("more expensive than", "cheaper than", "most expensive", "cheapest"),
    "year": ("after", "before", "newest", "oldest"),
    "founded": ("founded after", "founded before", "newest", "oldest"),
    "opened": ("opened after", "opened before", "newest", "oldest"),
    "hire_year": ("hired after", "hired before", "most recently hired", "longest serving"),
    "salary": ("earning more than", "earning less than", "best paid", "worst paid"),
    "height": ("taller than", "shorter than", "tallest", "shortest"),
    "length": ("longer than", "shorter than", "longest", "shortest"),
    "duration": ("longer than", "shorter than", "longest", "shortest"),
    "weight": ("heavier than", "lighter than", "heaviest", "lightest"),
    "rating": ("rated above", "rated below", "best rated", "worst rated"),
    "stars": ("with over this many stars:", "with under this many stars:", "best", "worst"),
    "amount": ("over", "under", "largest", "smallest"),
    "size": ("bigger than", "smaller than", "biggest", "smallest"),
    "population": ("with more people than", "with fewer people than", "most populous", "least populous"),
    "budget": ("with a budget over", "with a budget under", "highest budget", "lowest budget"),
}


def table(w: Writer, name: str | None = None) -> Table:
    """A table that makes sense, some of its columns left out; or now and then one put together at random."""
    if name is None and w.chance(0.8):
        name = w.pick(tuple(_TABLES))
        texts = [column for column in _TABLES[name] if column.type == TEXT]
        numbers = [column for column in _TABLES[name] if column.type == NUMBER]
    else:
        name = name or w.slot("word") + "s"
        texts, numbers = list(_TEXTS), list(_NUMBERS)
    chosen = w.sample(texts, w.between(1, 3)) + w.sample(numbers, w.between(1, 3))
    return Table(name, (Column("id", NUMBER, "number"), *w.shuffled(chosen)))


def schema_text(w: Writer, tables: Sequence[Table], style: int) -> str:
    if style == 0:
        return "\n".join(
            f"CREATE TABLE {t.name} ({', '.join(f'{c.name} {c.type}' for c in t.columns)});" for t in tables
        )
    if style == 1:
        return "\n".join(f"{t.name}({', '.join(c.name for c in t.columns)})" for t in tables)
    if style == 2:
        return "\n".join(f"Table {t.name}: {', '.join(c.name for c in t.columns)}" for t in tables)
    return "\n".join(f"{t.name} | {' | '.join(f'{c.name} {c.type.lower()}' for c in t.columns)}" for t in tables)


def _value(w: Writer, column: Column) -> tuple[str, str]:
    """A value as words and as an SQL literal."""
    if column.type == NUMBER:
        if "year" in column.name or column.name in ("founded", "opened"):
            number = str(w.between(1950, 2030))
            return number, number
        number = str(w.pick((w.between(1, 20), w.between(10, 100), w.between(1900, 2030), 100 * w.between(1, 50))))
        return number, number
    value = w.slot(column.slot)
    return value, "'" + value.replace("'", "''") + "'"


def _condition(w: Writer, t: Table) -> tuple[str, str]:
    column = w.pick(t.columns[1:])
    words, literal = _value(w, column)
    if column.type == TEXT:
        if w.chance(0.12):
            asked = w.pick((f"with a {column.name} other than {words}", f"where the {column.name} is not {words}"))
            return asked, f"{column.name} != {literal}"
        if w.chance(0.1):
            letter = words[0].upper().replace("'", "A")
            return f"whose {column.name} starts with {letter}", f"{column.name} LIKE '{letter}%'"
        return w.pick(
            (
                f"with {column.name} {words}",
                f"whose {column.name} is {words}",
                f"where the {column.name} is {words}",
                f"that have {words} as {column.name}",
            )
        ), f"{column.name} = {literal}"
    if column.name in _WORDS and w.chance(0.5):
        at = w.between(0, 1)
        return f"{_WORDS[column.name][at]} {words}", f"{column.name} {'><'[at]} {literal}"
    sign, phrases = w.pick(
        (
            (">", ("more than", "over", "greater than", "above")),
            ("<", ("less than", "under", "below", "smaller than")),
            (">=", ("at least", "no less than")),
            ("<=", ("at most", "up to", "no more than")),
            ("=", ("equal to", "exactly")),
        )
    )
    phrase = w.pick(phrases)
    return w.pick(
        (
            f"with {phrase} {words} {column.name}",
            f"whose {column.name} is {phrase} {words}",
            f"with a {column.name} {phrase} {words}",
            f"where {column.name} is {phrase} {words}",
        )
    ), f"{column.name} {sign} {literal}"


def _where(w: Writer, t: Table) -> tuple[str, str]:
    words, sql = _condition(w, t)
    if w.chance(0.25):
        link = w.pick(("and", "and", "or"))
        more, other = _condition(w, t)
        return f"{words} {link} {more}", f"{sql} {link.upper()} {other}"
    return words, sql


def _select(w: Writer, t: Table) -> tuple[str, str]:
    words, sql = _where(w, t) if w.chance(0.85) else ("", "")
    tail = f" WHERE {sql}" if sql else ""
    if w.chance(0.35):
        return w.say(
            "(Show|List|Get|Give me|Find|Display|Return) [me ]all"
        ) + f" {t.name} {words}".rstrip(), f"SELECT * FROM {t.name}{tail}"
    chosen = w.sample(t.columns[1:], w.pick((1, 1, 2)))
    names = " and ".join(c.name for c in chosen)
    asked = w.pick(
        (
            f"What is the {names} of {t.name} {words}?",
            f"Show the {names} of all {t.name} {words}",
            f"List {names} for {t.name} {words}",
            f"Which {names} do the {t.name} {words} have?",
            f"Find the {names} of the {t.name} {words}",
        )
    )
    distinct = ""
    if len(chosen) == 1 and w.chance(0.15):
        distinct, asked = "DISTINCT ", f"List the different {names} values of {t.name} {words}"
    return asked.replace(
        " ?", "?"
    ).rstrip(), f"SELECT {distinct}{', '.join(c.name for c in chosen)} FROM {t.name}{tail}"


def _count(w: Writer, t: Table) -> tuple[str, str]:
    words, sql = _where(w, t) if w.chance(0.8) else ("", "")
    asked = w.pick(
        (
            f"How many {t.name} are there {words}?",
            f"Count the {t.name} {words}",
            f"What is the number of {t.name} {words}?",
            f"Give the number of {t.name} {words}",
            f"How many {t.name} do we have {words}?",
        )
    )
    return asked.replace(" ?", "?").rstrip(), f"SELECT COUNT(*) FROM {t.name}" + (f" WHERE {sql}" if sql else "")


def _aggregate(w: Writer, t: Table) -> tuple[str, str]:
    column = w.pick(t.of(NUMBER)[1:]).name
    function, phrases = w.pick(
        (
            ("AVG", ("average", "mean")),
            ("SUM", ("total", "sum of the")),
            ("MAX", ("highest", "maximum", "largest")),
            ("MIN", ("lowest", "minimum", "smallest")),
        )
    )
    words, sql = _where(w, t) if w.chance(0.6) else ("", "")
    asked = w.pick(
        (
            f"What is the {w.pick(phrases)} {column} of {t.name} {words}?",
            f"Find the {w.pick(phrases)} {column} of all {t.name} {words}",
            f"Give me the {w.pick(phrases)} {column} for {t.name} {words}",
            f"{w.pick(phrases).capitalize()} {column} of the {t.name} {words}",
        )
    )
    return asked.replace(" ?", "?").rstrip(), f"SELECT {function}({column}) FROM {t.name}" + (
        f" WHERE {sql}" if sql else ""
    )


def _order(w: Writer, t: Table) -> tuple[str, str]:
    column, shown = w.pick(t.of(NUMBER)[1:]).name, w.pick(t.of(TEXT)).name
    down = w.chance(0.6)
    direction = "DESC" if down else "ASC"
    if column in _WORDS and w.chance(0.5):
        superlative = _WORDS[column][2 if down else 3]
        count = w.pick((1, w.between(2, 10)))
        few = "" if count == 1 else f"{count} "
        asked = w.pick(
            (
                f"What is the {shown} of the {few}{superlative} {t.name}?",
                f"Show the {shown} of the {few}{superlative} {t.name}",
                f"Find the {few}{superlative} {t.name}, only the {shown}",
            )
        )
        return asked, f"SELECT {shown} FROM {t.name} ORDER BY {column} {direction} LIMIT {count}"
    if w.chance(0.5):
        count = w.between(1, 10)
        adjective = w.pick(("highest", "largest", "biggest") if down else ("lowest", "smallest"))
        asked = w.pick(
            (
                f"Show the {shown} of the {count} {t.name} with the {adjective} {column}",
                f"Which {count} {t.name} have the {adjective} {column}? Give the {shown}.",
                f"{'Top' if down else 'Bottom'} {count} {t.name} by {column}, {shown} only",
            )
        )
        return asked, f"SELECT {shown} FROM {t.name} ORDER BY {column} {direction} LIMIT {count}"
    words, sql = _where(w, t) if w.chance(0.5) else ("", "")
    way = w.pick(
        ("from high to low", "descending", "highest first", "largest first")
        if down
        else ("from low to high", "ascending", "lowest first", "smallest first")
    )
    asked = w.pick(
        (
            f"List the {shown} of {t.name} {words} sorted by {column} {way}",
            f"Show {t.name} {words} by {column}, {way}, only the {shown}",
            f"{shown.capitalize()} of all {t.name} {words} ordered by {column} {way}",
        )
    )
    return asked, f"SELECT {shown} FROM {t.name}" + (f" WHERE {sql}" if sql else "") + f" ORDER BY {column} {direction}"


def _group(w: Writer, t: Table) -> tuple[str, str]:
    by = w.pick(t.of(TEXT)).name
    if w.chance(0.5):
        asked = w.pick(
            (
                f"How many {t.name} are there for each {by}?",
                f"Count the {t.name} per {by}",
                f"Number of {t.name} by {by}",
            )
        )
        query = f"SELECT {by}, COUNT(*) FROM {t.name} GROUP BY {by}"
    else:
        column = w.pick(t.of(NUMBER)[1:]).name
        function, phrase = w.pick((("AVG", "average"), ("SUM", "total"), ("MAX", "highest"), ("MIN", "lowest")))
        asked = w.pick(
            (
                f"What is the {phrase} {column} of {t.name} for each {by}?",
                f"{phrase.capitalize()} {column} per {by} of the {t.name}",
                f"For every {by}, show the {phrase} {column} of {t.name}",
            )
        )
        query = f"SELECT {by}, {function}({column}) FROM {t.name} GROUP BY {by}"
    if w.chance(0.2):
        count = w.between(1, 20)
        return asked.rstrip("?") + f", only where there are more than {count} {t.name}" + (
            "?" if asked.endswith("?") else ""
        ), f"{query} HAVING COUNT(*) > {count}"
    return asked, query


_PLAIN = (_select, _select, _select, _count, _count, _aggregate, _order, _order, _group)


def _joined(w: Writer) -> tuple[list[Table], str, str]:
    first, second = table(w), table(w)
    while second.name == first.name:
        second = table(w)
    key = Column(f"{first.name.rstrip('s')}_id", NUMBER, "number")
    second = Table(second.name, (*second.columns, key))
    shown, filtered = w.pick(first.of(TEXT)), w.pick(second.of(TEXT))
    words, literal = _value(w, filtered)
    join = f"FROM {first.name} JOIN {second.name} ON {first.name}.id = {second.name}.{key.name}"
    if w.chance(0.3):
        asked = w.pick(
            (
                f"How many {second.name} does each of the {first.name} have? Show the {shown.name}.",
                f"For every {shown.name} of the {first.name}, count the {second.name}",
            )
        )
        return (
            [first, second],
            asked,
            f"SELECT {first.name}.{shown.name}, COUNT(*) {join} GROUP BY {first.name}.{shown.name}",
        )
    asked = w.pick(
        (
            f"Which {shown.name} do the {first.name} have that belong to {second.name} with {filtered.name} {words}?",
            f"Show the {shown.name} of {first.name} with {second.name} whose {filtered.name} is {words}",
            f"List the {first.name} ({shown.name}) of the {second.name} with {filtered.name} {words}",
        )
    )
    return (
        [first, second],
        asked,
        f"SELECT {first.name}.{shown.name} {join} WHERE {second.name}.{filtered.name} = {literal}",
    )


_QUESTIONS = (
    "(Write|Give) (an SQL|the SQL) query[ for the question].",
    "(Translate|Turn) the question into SQL.",
    "(Answer|Solve it) with (an SQL query|SQL).",
    "Text to SQL.",
)


def text_to_sql(w: Writer) -> str:
    style = w.pick((0, 0, 0, 1, 2, 3))
    semicolon = w.pick(("", ";"))
    change: Callable[[str], str] = _lower_keywords if w.chance(0.25) else str
    if w.chance(0.2):
        tables, asked, query = _joined(w)
        pairs = [(asked, change(query) + semicolon)]
    else:
        tables = [table(w)]
        if w.chance(0.2):
            tables.append(table(w, w.slot("word") + "s"))
        pairs = []
        for _ in range(w.between(1, 4)):
            asked, query = w.pick(_PLAIN)(w, w.pick(tables) if w.chance(0.3) else tables[0])
            pairs.append(
                (asked if w.chance(0.8) else asked.lower() if "'" not in query else asked, change(query) + semicolon)
            )
    schema = schema_text(w, tables, style)
    pairs = [(_spaced(asked, tables), query) for asked, query in pairs]
    head = w.pick(("", "", "Schema:\n", "Database:\n", "-- tables\n", "Given the tables\n"))
    task = Task(
        _QUESTIONS, pairs, ("Question", "Question", "Request", "Input", "User"), ("SQL", "SQL", "Query", "Answer")
    )
    if w.chance(0.3):
        first, *rest = pairs
        return chat(w, Task(_QUESTIONS, [(f"{head}{schema}\n{w.pick(('', 'Question: '))}{first[0]}", first[1]), *rest]))
    return f"{head}{schema}\n\n{render(w, task)}"


def _spaced(asked: str, tables: Sequence[Table]) -> str:
    """People write "hire year" where the column is ``hire_year``."""
    for t in tables:
        for name in (t.name, *(column.name for column in t.columns)):
            if "_" in name:
                asked = asked.replace(name, name.replace("_", " "))
    return asked


def _lower_keywords(query: str) -> str:
    parts = query.split("'")
    for index in range(0, len(parts), 2):
        words = parts[index].split(" ")
        parts[index] = " ".join(word.lower() if word.isupper() else word for word in words)
    return "'".join(parts)
