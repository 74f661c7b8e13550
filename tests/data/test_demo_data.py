"""The demo's data keeps training and test apart, and is what the generator writes.

Every rule is a function that returns complaints: empty for the data that ships, and not empty for data broken on
purpose in just that way.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import sqlite3
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorikeet.config import EvalRecipe, TrainRecipe, read_recipe, resolve_adapters, resolve_tasks
from lorikeet.evals.baseline import tfidf
from lorikeet.template import Template

ROOT = Path(__file__).parents[2]
DATA = ROOT / "src" / "lorikeet" / "data" / "demo"
TASKS = ("intent", "entities", "calls", "describe", "sentiment", "sql")
TRAIN_ROWS = {"intent": 1650, "entities": 4800, "calls": 1760, "describe": 1600, "sentiment": 3000, "sql": 1920}
INPUTS = {"describe": ("facts",), "sql": ("schema", "question")}
Rows = list[dict[str, Any]]


def load_generator() -> Any:
    spec = importlib.util.spec_from_file_location("make_demo_data", ROOT / "scripts" / "make_demo_data.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


generator = load_generator()
CLOSED = {value.lower() for values in generator.CLOSED.values() for value in values}


def read(task: str, split: str) -> Rows:
    return [json.loads(line) for line in (DATA / task / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


DATASETS = {task: (read(task, "train"), read(task, "test")) for task in TASKS}


def shown(task: str, row: dict[str, Any]) -> str:
    """What the model is asked."""
    return " ".join(row[column] for column in INPUTS.get(task, ("text",)))


def whole(row: dict[str, Any]) -> str:
    """Everything that is written in the row apart from its template's name, field names included."""
    return " ".join(json.dumps(value, ensure_ascii=False) for name, value in row.items() if name != "template")


def words(text: str) -> list[str]:
    return re.findall(r"[$€£]?[\w'-]+(?:[.:]\d+)*", text.lower())


def grams(text: str, size: int = 5) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[i : i + size]) for i in range(max(1, len(found) - size + 1))}


def similarity(a: set[tuple[str, ...]], b: set[tuple[str, ...]]) -> float:
    return len(a & b) / len(a | b)


# --- the rules ----------------------------------------------------------------------------------------------------


def repeated_rows(task: str, train: Rows, test: Rows) -> list[str]:
    counts = Counter(shown(task, row).lower() for row in (*train, *test))
    return [text for text, count in counts.items() if count > 1]


def shared_templates(task: str, train: Rows, test: Rows) -> list[str]:
    """Template ids name the split; a review has one id for each of its sentences, and shares none of them either."""

    def parts(rows: Rows) -> set[str]:
        return {part for row in rows for part in row["template"].split("+")}

    return sorted(parts(train) & parts(test))


def similar_rows(task: str, train: Rows, test: Rows, limit: float = 0.5) -> list[str]:
    """By word 5-grams of the whole row (answers too), and of what is asked alone."""
    complaints = []
    for text_of in (whole, lambda row: shown(task, row)):
        known = [(grams(text_of(row)), row) for row in train]
        for row in test:
            mine = grams(text_of(row))
            complaints += [f"{text_of(row)} ~ {text_of(o)}" for other, o in known if similarity(mine, other) >= limit]
    return complaints


def copied_values(task: str, row: dict[str, Any]) -> set[str]:
    """The values that an answer copies or that name things, read from the row alone."""
    if task == "entities":
        found = list(row["entities"].values())
    elif task == "calls":
        found = list(row["call"]["arguments"].values())
    elif task == "describe":
        found = [fact.split(": ", 1)[1] for fact in row["facts"].split(" | ")]
    elif task == "sql":
        found = re.findall(r"'([^']*)'|[<>] (\d+)", row["query"])
        found = ["".join(groups) for groups in found] + [row["schema"].split("(")[0]]
    else:
        found = []
    return {str(value).lower() for value in found} - CLOSED


def shared_entities(task: str, train: Rows, test: Rows) -> list[str]:
    """Values that both splits copy, and values of one split that stand anywhere in a text of the other."""
    sides = [(train, test), (test, train)]
    complaints = []
    for mine, theirs in sides:
        values = set().union(*(copied_values(task, row) for row in mine))
        complaints += sorted(values & set().union(*(copied_values(task, row) for row in theirs)))
        named = {tuple(words(value)) for value in values if not value.replace(".", "").isdigit()}
        longest = max(map(len, named), default=0)
        for row in theirs:
            found = words(shown(task, row))
            spans = {tuple(found[i : i + n]) for n in range(1, longest + 1) for i in range(len(found) - n + 1)}
            complaints += [f"{' '.join(span)!r} in {shown(task, row)!r}" for span in named & spans]
    return complaints


def broken_answers(task: str, train: Rows, test: Rows) -> list[str]:
    """Answers are regular: values stand in the text word for word, keys and functions are always the same."""
    complaints = []
    signatures: dict[str, set[tuple[str, ...]]] = {}
    for row in (*train, *test):
        if task == "entities":
            values, order = row["entities"], generator.ENTITY_KEYS
            if list(values) != [key for key in order if key in values] or not 1 <= len(values) <= 4:
                complaints.append(f"keys {list(values)} of {row['text']!r}")
        elif task == "calls":
            values = row["call"]["arguments"]
            signatures.setdefault(row["call"]["name"], set()).add(tuple(values))
            if list(row["call"]) != ["name", "arguments"]:
                complaints.append(f"keys {list(row['call'])}")
        else:
            continue
        complaints += [
            f"{value!r} not in {row['text']!r}" for value in values.values() if str(value) not in row["text"]
        ]
        if json.loads(json.dumps(values, ensure_ascii=False)) != values:
            complaints.append(f"not JSON: {values}")
    return complaints + [f"{name} has {found}" for name, found in signatures.items() if len(found) != 1]


def failing_queries(task: str, train: Rows, test: Rows) -> list[str]:
    complaints = []
    for row in (*train, *test):
        with sqlite3.connect(":memory:") as database:
            try:
                database.execute(f"CREATE TABLE {row['schema']}")
                database.execute(row["query"])
            except sqlite3.Error as error:
                complaints.append(f"{error}: {row['schema']} {row['query']}")
        database.close()
    return complaints


RULES: dict[str, tuple[Callable[[str, Rows, Rows], list[str]], tuple[str, ...]]] = {
    "repeated": (repeated_rows, TASKS),
    "templates": (shared_templates, TASKS),
    "similar": (similar_rows, TASKS),
    "entities": (shared_entities, ("entities", "calls", "describe", "sql")),
    "answers": (broken_answers, ("entities", "calls")),
    "queries": (failing_queries, ("sql",)),
}


@pytest.mark.parametrize(("rule", "task"), [(rule, task) for rule, (_, tasks) in RULES.items() for task in tasks])
def test_rules_hold(rule: str, task: str) -> None:
    assert RULES[rule][0](task, *DATASETS[task]) == []


def with_row(task: str, **changes: Any) -> tuple[str, Rows, Rows]:
    train, test = DATASETS[task]
    return task, train, [*test[1:], test[0] | changes]


def borrowed(task: str, column: str) -> tuple[str, Rows, Rows]:
    return with_row(task, **{column: DATASETS[task][0][0][column]})


BROKEN: list[tuple[str, Callable[[], tuple[str, Rows, Rows]]]] = [
    ("repeated", lambda: borrowed("intent", "text")),
    ("repeated", lambda: with_row("calls", text=DATASETS["calls"][1][1]["text"].upper())),
    ("templates", lambda: borrowed("describe", "template")),
    ("templates", lambda: with_row("sentiment", template="x/0+" + DATASETS["sentiment"][0][0]["template"])),
    ("similar", lambda: with_row("sentiment", text="Well. " + DATASETS["sentiment"][0][0]["text"] + " Right.")),
    ("similar", lambda: borrowed("describe", "facts")),
    ("entities", lambda: borrowed("entities", "entities")),
    ("entities", lambda: borrowed("calls", "call")),
    ("entities", lambda: borrowed("describe", "facts")),
    ("entities", lambda: borrowed("sql", "schema")),
    ("entities", lambda: with_row("entities", text=f"Say {DATASETS['entities'][0][0]['text']}")),
    ("answers", lambda: with_row("entities", entities={"city": "Atlantis"})),
    ("answers", lambda: with_row("calls", call={"name": "set_alarm", "arguments": {"day": "Monday"}})),
    ("queries", lambda: with_row("sql", query="SELECT nothing FROM nowhere")),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "broken"), BROKEN)
def test_rules_can_fail(rule: str, broken: Callable[[], tuple[str, Rows, Rows]]) -> None:
    assert RULES[rule][0](*broken()) != []


# --- what the generator knows -------------------------------------------------------------------------------------


def test_files_are_what_the_generator_writes() -> None:
    for name, text in generator.files().items():
        assert (DATA / name).read_text(encoding="utf-8") == text, f"{name} differs; run scripts/make_demo_data.py"


@pytest.mark.parametrize("task", TASKS)
def test_slot_values_are_on_one_side(task: str) -> None:
    """Also the names and products of tasks whose answers copy nothing, such as intent and sentiment."""
    values = {}
    for split in generator.SPLITS:
        rows = generator.build(task, split)
        values[split] = {value.lower() for row in rows for value in row.slots.values()} - CLOSED
    assert values["train"] & values["test"] == set()
    assert len(values["test"]) > 60


def test_pools_are_split_without_overlap() -> None:
    """Each half of a two-part name (first and last name, adjective and noun) is on one side too."""
    for name, sides in generator.load_pools().items():
        train, test = ({value.lower() for value in sides[split]} for split in generator.SPLITS)
        assert len(test) >= 1, name
        assert train & test == set(), name


def skeleton(template: str) -> set[tuple[str, ...]]:
    return grams(re.sub(r"\[([^|\]]*)[^\]]*\]", r"\1", template), 4)


def blocks(grammar: Any) -> list[dict[str, str]]:
    """Every {train, test} pair of template blocks in a grammar file."""
    if not isinstance(grammar, dict):
        return []
    here = [grammar] if isinstance(grammar.get("train"), str) else []
    return here + [block for value in grammar.values() for block in blocks(value)]


@pytest.mark.parametrize("task", TASKS)
def test_templates_differ_in_wording(task: str) -> None:
    """No test template is a training template of the file with a word or two changed."""
    found = blocks(generator.load(task))
    train = [line for block in found for line in generator.lines(block["train"])]
    test = [line for block in found for line in generator.lines(block["test"])]
    assert len(train) >= 90
    assert len(set(train)) == len(train) and len(set(test)) == len(test)
    close = [
        (a, b)
        for a, b in itertools.product(test, train)
        if a == b or (len(words(a)) > 3 and similarity(skeleton(a), skeleton(b)) >= 0.6)
    ]
    assert [pair for pair in close if pair[0] not in ("But", "However,")] == []


def test_tables_and_columns() -> None:
    tables: dict[str, set[str]] = {}
    columns: dict[str, set[str]] = {}
    for split, rows in zip(("train", "test"), DATASETS["sql"], strict=True):
        parts = [words(row["schema"]) for row in rows]
        tables[split] = {table for table, *_ in parts}
        columns[split] = {column for _, *rest in parts for column in rest}
    assert tables["train"] & tables["test"] == set()
    assert columns["train"] & columns["test"] <= generator.SHARED_COLUMNS


def test_field_orders_of_records_are_on_one_side() -> None:
    orders = [{tuple(re.findall(r"(\w+): ", row["facts"])) for row in rows} for rows in DATASETS["describe"]]
    assert orders[0] & orders[1] == set()


# --- sizes, balance, difficulty -----------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_sizes(task: str) -> None:
    train, test = DATASETS[task]
    assert len(train) == TRAIN_ROWS[task]
    assert len(test) == 150
    assert max(len(words(shown(task, row))) for row in (*train, *test)) <= 45


@pytest.mark.parametrize(("task", "key"), [("intent", "label"), ("sentiment", "label"), ("calls", "call")])
def test_balance(task: str, key: str) -> None:
    for rows in DATASETS[task]:
        counts = Counter(row[key]["name"] if key == "call" else row[key] for row in rows)
        assert max(counts.values()) <= 1.1 * min(counts.values()) + 1
        assert all(1 <= len(label.split()) <= 3 for label in counts)
    assert {str(row[key]) for row in DATASETS[task][1]} <= {str(row[key]) for row in DATASETS[task][0]} or key == "call"


@pytest.mark.parametrize("task", ["intent", "sentiment"])
def test_classical_baseline_finds_it_neither_trivial_nor_hopeless(task: str) -> None:
    train, test = DATASETS[task]
    guesses = tfidf([r["text"] for r in train], [r["label"] for r in train], [r["text"] for r in test], seed=0)
    score = sum(guess == row["label"] for guess, row in zip(guesses, test, strict=True)) / len(test)
    assert 0.75 <= score <= 0.92


def test_control_has_the_intent_rows_with_shuffled_labels() -> None:
    intent, control = DATASETS["intent"][0], read("control", "train")
    assert [row["text"] for row in control] == [row["text"] for row in intent]
    assert Counter(row["label"] for row in control) == Counter(row["label"] for row in intent)
    agreeing = sum(a["label"] == b["label"] for a, b in zip(control, intent, strict=True)) / len(intent)
    assert agreeing < 0.1


# --- recipes ------------------------------------------------------------------------------------------------------


def test_the_recipe_fits_the_data() -> None:
    """Every prompt, completion and reference renders on every row."""
    adapters = {a.name: a for a in resolve_adapters(read_recipe(DATA / "recipe.yaml", TrainRecipe))}
    tasks = resolve_tasks(read_recipe(DATA / "recipe.yaml", EvalRecipe))
    assert set(adapters) == {*TASKS, "control"} == {task.adapter for task in tasks}
    for task in tasks:
        adapter = adapters[task.name]
        assert adapter.prompt is not None and adapter.completion is not None
        assert task.prompt == adapter.prompt and task.reference is not None
        assert adapter.data.test == task.data.test
        references = [task.reference] if isinstance(task.reference, str) else task.reference
        for path, texts in (
            (adapter.data.train, [adapter.prompt, adapter.completion]),
            (task.data.test, [adapter.prompt, *references]),
        ):
            rows = [json.loads(line) for line in (DATA / path).read_text(encoding="utf-8").splitlines()]
            assert all(Template(text).render(row).strip() for text in texts for row in rows)
