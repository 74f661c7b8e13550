"""Adapters and datasets in a home."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorikeet.adapters.files import LOCK, AdapterFile, Lock, LockedBase, write_lock
from lorikeet.data.formats import read_rows
from lorikeet.errors import AdapterError, ConfigError, ConflictError, DataError
from lorikeet.registry.difference import compare
from lorikeet.registry.home import Home, left_out, open_home
from lorikeet.registry.records import Actor
from lorikeet.registry.rows import columns_of, split_rows

WHO = Actor()


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    home = open_home(tmp_path / "home")
    yield home
    home.close()


def write(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- adapters -----------------------------------------------------------------------------------------------------


def test_an_adapter_and_its_lock(home: Home, adapters: Callable[..., list[Path]], tmp_path: Path) -> None:
    first, second = adapters("llama", 2)
    made = home.add_adapter(WHO, "r", first, description="one", source="somewhere")
    with AdapterFile(first) as file:
        assert made.digest == file.load()[1]
    assert (made.reference, made.source, made.lock) == ("r/1", "somewhere", None)
    copy = tmp_path / "copy"
    home.blobs.export(str(made.manifest), copy)
    lock = Lock(base=LockedBase("nano", "b" * 64), tokenizer_sha256="t" * 64, stop_ids=(1,), recipe_sha256="r" * 64,
                data_sha256="d" * 64, code_version="9")  # fmt: skip
    write_lock(copy, lock)
    (copy / "training_args.bin").write_bytes(b"pickle")
    assert left_out(copy) == ["training_args.bin"]
    locked = home.add_adapter(WHO, "r", copy, parent="r/1")
    assert (locked.base, locked.base_sha256, locked.recipe_sha256, locked.data_sha256, locked.code_version) == (
        "nano", "b" * 64, "r" * 64, "d" * 64, "9",
    )  # fmt: skip
    assert locked.parent_id == made.id and locked.lock is not None and locked.digest == made.digest
    resolved, folder = home.adapter_folder(WHO, "r/2")
    taken = {"README.md", "adapter_config.json", "adapter_model.safetensors", LOCK}
    assert {path.name for path in folder.iterdir()} == taken
    assert home.adapter_folder(WHO, "r") == (resolved, folder)


def test_what_is_no_adapter(home: Home, adapters: Callable[..., list[Path]], tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="adapter_config.json is missing"):
        home.add_adapter(WHO, "r", tmp_path)
    broken = tmp_path / "broken"
    home.blobs.export(str(home.add_adapter(WHO, "ok", adapters("llama", 1)[0]).manifest), broken)
    (broken / "adapter_model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(AdapterError):
        home.add_adapter(WHO, "r", broken)
    assert [one.name for one in home.catalog.repositories.page(WHO).items] == ["ok"]


def test_differences(home: Home, adapters: Callable[..., list[Path]]) -> None:
    first, second = adapters("llama", 2)
    home.add_adapter(WHO, "r", first, description="one")
    home.add_adapter(WHO, "r", second, description="two")
    same = compare(home, WHO, "r/1", "r/1")
    assert same.fields == [] and same.tensors.same > 0 and same.tensors.changed == []
    other = compare(home, WHO, "r/1", "r")
    assert (other.first, other.second) == ("r/1", "r/2")
    fields = {one.name: (one.first, one.second) for one in other.fields}
    assert fields["description"] == ("one", "two") and fields["config.r"] == (1, 2)
    assert other.tensors.changed and all(share > 0 for _, share in other.tensors.changed)


# --- datasets -----------------------------------------------------------------------------------------------------

ROWS: list[object] = [{"text": f"t{number}", "label": number % 3} for number in range(20)]


def test_a_dataset_of_files(home: Home, tmp_path: Path) -> None:
    files = {"train": write(tmp_path / "a.jsonl", ROWS), "test": write(tmp_path / "b.jsonl", ROWS[:5])}
    made = home.add_dataset(WHO, "rows", files, read_rows, description="some")
    assert {split: one.rows for split, one in made.splits.items()} == {"train": 20, "test": 5}
    assert made.columns == {"text": "text", "label": "int"} and made.format == "jsonl"
    dataset, folder = home.dataset_folder(WHO, "rows")
    assert (folder / dataset.splits["train"].file).read_bytes() == files["train"].read_bytes()
    assert home.add_dataset(WHO, "rows", files, read_rows) == made
    with pytest.raises(ConflictError):
        home.add_dataset(WHO, "rows", {"train": files["train"]}, read_rows)


def test_splits_are_drawn_once(home: Home, tmp_path: Path) -> None:
    files = {"train": write(tmp_path / "a.jsonl", ROWS)}
    drawn = {"validation": 0.1, "test": 0.25}
    made = home.add_dataset(WHO, "rows", files, read_rows, shares=drawn, seed=3)
    assert {split: one.rows for split, one in made.splits.items()} == {"train": 13, "validation": 2, "test": 5}
    _, folder = home.dataset_folder(WHO, "rows")
    parts = [read_rows(folder / one.file) for one in made.splits.values()]
    assert sorted(row["text"] for part in parts for row in part) == sorted(f"t{number}" for number in range(20))
    again = home.add_dataset(WHO, "again", files, read_rows, shares=drawn, seed=3)
    assert again.sha256 == made.sha256


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"a": 1}, {"a": "x"}], "column 'a' is int in one place and text in another"),
        ([{"a": [1]}, {"a": {"b": 1}}], "column 'a' is list"),
        ([], "train: no rows"),
    ],
)
def test_rows_that_do_not_fit(rows: list[object], said: str, home: Home, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        home.add_dataset(WHO, "rows", {"train": write(tmp_path / "a.jsonl", rows)}, read_rows)
    assert home.catalog.datasets.page(WHO).items == []


def test_splits_that_do_not_fit(home: Home, tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "c.csv").write_text("text,label\nx,1\n")
    for files, shares, said in (
        ({"train": train, "test": write(tmp_path / "b.jsonl", [{"text": "x"}])}, {}, r"missing are \['label'\]"),
        ({"train": train, "test": tmp_path / "c.csv"}, {}, "different formats"),
        ({"train": train, "dev": train}, {}, "splits: found train, dev"),
        ({"train": train}, {"dev": 0.1}, "splits: found train, dev"),
        ({"test": train}, {}, "expected train"),
        ({"train": train, "test": train}, {"test": 0.1}, "given both as a file and as a share"),
        ({"train": train}, {"test": 0.001}, "expected at least one row"),
        ({"train": train}, {"test": 1.5}, "found the share 1.5"),
        ({"train": train}, {"test": float("nan")}, "found the share nan"),
        ({"train": train}, {"test": float("inf")}, "found the share inf"),
        ({"train": tmp_path / "none.jsonl"}, {}, "no such file"),
    ):
        with pytest.raises((DataError, ConfigError), match=said):
            home.add_dataset(WHO, "rows", files, read_rows, shares=shares)


@pytest.mark.parametrize("number", ["NaN", "1e999", "-Infinity"])
def test_numbers_that_are_none(home: Home, tmp_path: Path, number: str) -> None:
    """As pandas writes what is missing: a training would learn the word."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(f'{{"text": "a", "x": []}}\n{{"text": "b", "x": [{{"y": {number}}}]}}\n')
    with pytest.raises(DataError, match=r"train: row 2: column 'x' holds (nan|inf|-inf); expected what JSON") as caught:
        home.add_dataset(WHO, "rows", {"train": rows}, read_rows)
    assert "null for what is missing" in str(caught.value.hint)


@pytest.mark.parametrize("row", [r'{"text": "\ud800"}', r'{"text": {"x": ["\ud800 a"]}}', r'{"a\udfff": 1}'])
def test_texts_that_are_none(home: Home, tmp_path: Path, row: str) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(f"{row}\n")
    with pytest.raises(DataError, match=r"train: row 1: column '.*' holds half a surrogate pair"):
        home.add_dataset(WHO, "rows", {"train": rows}, read_rows)
    rows.write_text(r'{"text": "\ud83d\ude00 ä"}')
    assert home.add_dataset(WHO, "rows", {"train": rows}, read_rows).columns == {"text": "text"}


def test_columns() -> None:
    rows = [{"a": 1, "b": "x", "c": None}, {"a": 2.5, "d": True}]
    assert columns_of({"train": rows}) == {"a": "float", "b": "text?", "c": "text?", "d": "bool?"}


@given(st.integers(2, 200), st.floats(0.01, 0.5), st.integers(0, 5))
def test_any_split(count: int, share: float, seed: int) -> None:
    try:
        parts = split_rows(range(count), {"test": share}, seed)
    except DataError:
        assert round(share * count) < 1 or round(share * count) >= count
        return
    assert sorted(parts["train"] + parts["test"]) == list(range(count))
    assert len(parts["test"]) == round(share * count)
    assert parts["train"] == sorted(parts["train"])
    assert parts == split_rows(range(count), {"test": share}, seed)
