"""Rows with line numbers from every format; broken ones are named, never dropped in silence."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorikeet.data.formats import entities_of_bio, read_rows, read_table
from lorikeet.errors import ConfigError, DataError


def test_jsonl_broken_rows_have_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n{"a": \n[1]\n{"a": "\xff"}\n{"a": 1, "a": 2}\n{"a": "\xc3\xa9"}\n"x"')
    table = read_table(path)
    assert [(row.line, row.values) for row in table.rows] == [(1, {"a": 1}), (7, {"a": "é"})]
    assert [row.line for row in table.broken] == [3, 4, 5, 6, 8]
    reasons = [row.reason for row in table.broken]
    assert "not JSON" in reasons[0] and "found list" in reasons[1] and "UTF-8" in reasons[2] and "'a'" in reasons[3]
    with pytest.raises(DataError, match=r"rows\.jsonl:3: not JSON(.|\n)*rows\.jsonl:8: expected a JSON object"):
        read_rows(path)


def test_csv_broken_rows_have_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b'a,b\n1,"two\nlines"\n1\n1,2,3\nx,\xff\nlast,row\n')
    table = read_table(path)
    assert [(row.line, row.values) for row in table.rows] == [
        (2, {"a": "1", "b": "two\nlines"}),
        (7, {"a": "last", "b": "row"}),
    ]
    assert [(row.line, row.reason) for row in table.broken] == [
        (4, "expected 2 cells, found 1"),
        (5, "expected 2 cells, found 3"),
        (6, "holds bytes that are not UTF-8"),
    ]


@pytest.mark.parametrize("header", ["", "a,a\n1,2\n", "a,\n1,2\n"])
def test_csv_needs_a_header(tmp_path: Path, header: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(header)
    with pytest.raises(DataError, match="header"):
        read_rows(path)


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=20)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(st.lists(st.lists(texts, min_size=2, max_size=2), max_size=5))
def test_round_trips(tmp_path: Path, cells: list[list[str]]) -> None:
    """What json and csv write is read back as it was."""
    rows = [dict(zip(("a", "b"), row, strict=True)) for row in cells]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_rows(tmp_path / "x.jsonl") == rows
    for suffix, delimiter in ((".csv", ","), (".tsv", "\t")):
        out = io.StringIO()
        csv.writer(out, delimiter=delimiter).writerows([["a", "b"], *cells])
        (tmp_path / f"x{suffix}").write_text(out.getvalue(), newline="")
        assert read_rows(tmp_path / f"x{suffix}") == rows


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"text": "a", "slots": {"x": 1}}, {"text": "b", "slots": {"x": 2}}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    assert read_rows(tmp_path / "x.parquet") == rows
    (tmp_path / "bad.parquet").write_bytes(b"no")
    with pytest.raises(DataError, match="Parquet"):
        read_rows(tmp_path / "bad.parquet")


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "x.parquet").write_bytes(b"")
    with pytest.raises(ConfigError, match="pyarrow"):
        read_rows(tmp_path / "x.parquet")


def test_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'\.xlsx' is not read; expected \.jsonl"):
        read_rows(tmp_path / "x.xlsx")
    with pytest.raises(ConfigError, match="no such file"):
        read_rows(tmp_path / "x.jsonl")
    with pytest.raises(ConfigError, match="'iob3'"):
        read_rows(tmp_path / "x.jsonl", "iob3")


def bio(tokens: Any, tags: Any) -> dict[str, Any]:
    return entities_of_bio({"tokens": tokens, "tags": tags})


def test_bio() -> None:
    row = bio(
        ["in", "New", "York", "York", "saw", "Bob", "Ann"], ["O", "B-loc", "I-loc", "B-loc", "O", "I-per", "I-loc"]
    )
    assert row["text"] == "in New York York saw Bob Ann"
    assert row["entities"] == {"loc": ["New York", "York", "Ann"], "per": ["Bob"]}
    assert bio(["a"], ["O"])["entities"] == {}
    for tokens, tags, message in [
        (["a"], [], "1 tokens with 0 tags"),
        (["a"], ["X-y"], "'X-y'"),
        ("a", ["O"], "lists"),
    ]:
        with pytest.raises(DataError, match=message):
            bio(tokens, tags)


def test_bio_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"tokens": ["a"], "tags": ["B-x"]}\n{"tokens": ["a"], "tags": []}\n')
    table = read_table(path, "bio")
    assert table.rows[0].values["entities"] == {"x": ["a"]}
    assert [(row.line, row.reason) for row in table.broken] == [(2, "1 tokens with 0 tags")]
