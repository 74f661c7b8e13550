"""Datasets over HTTP: what is taken, what is refused, and what a recipe makes of the rows."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from datetime import datetime
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.server.hosting import Hosted
from tests.server.platforms import RECIPE, ROWS, TEST_ROWS, jsonl, up


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosted]:
    with up(tmp_path_factory.mktemp("home"), scripted=True, max_upload=2**20) as server:
        server.http.post("/api/datasets", data={"name": "colours"}, files=[
            ("file", ("a.jsonl", jsonl(ROWS))), ("test", ("b.jsonl", jsonl(TEST_ROWS)))
        ]).raise_for_status()  # fmt: skip
        yield server


def send(server: Hosted, name: str, file: str, data: bytes, **fields: str) -> Any:
    return server.http.post("/api/datasets", data={"name": name, **fields}, files={"file": (file, data)})


def test_a_dataset(server: Hosted) -> None:
    found = server.http.get("/api/datasets/colours").json()
    assert found["columns"] == {"thing": "text", "colour": "text"} and found["rows"] == len(ROWS) + len(TEST_ROWS)
    assert {name: one["rows"] for name, one in found["splits"].items()} == {"train": 48, "test": 8}
    assert found["first_rows"] == ROWS[:20] and len(found["sha256"]) == 64
    again = server.http.post("/api/datasets", data={"name": "colours"}, files=[
        ("train", ("x.jsonl", jsonl(ROWS))), ("test", ("y.jsonl", jsonl(TEST_ROWS)))
    ])  # fmt: skip
    assert again.status_code == 201 and again.json()["id"] == found["id"]  # the same content is the same dataset
    assert send(server, "colours", "a.jsonl", jsonl(ROWS[:5])).status_code == 409


def test_drawn_splits_are_fixed(server: Hosted) -> None:
    shares = json.dumps({"test": 0.25, "validation": 0.125})
    made = [send(server, "drawn", "a.csv", b"q,a\n" + b"".join(b"q%d,a\n" % i for i in range(16)), shares=shares)
            for _ in range(2)]  # fmt: skip
    assert [one.status_code for one in made] == [201, 201] and made[0].json() == made[1].json()
    assert {name: one["rows"] for name, one in made[0].json()["splits"].items()} == {
        "train": 10, "validation": 2, "test": 4
    }  # fmt: skip


def test_rows_as_json(server: Hosted) -> None:
    body = {"name": "inline", "rows": [{"a": "x", "n": 1}, {"a": "y", "n": 2.5}], "test": [{"a": "z", "n": 3}]}
    made = server.post("/api/datasets", body)
    assert made.status_code == 201 and made.json()["columns"] == {"a": "text", "n": "float"}
    assert server.http.delete("/api/datasets/inline").status_code == 204
    assert server.http.get("/api/datasets/inline").status_code == 404
    assert server.post("/api/datasets", body).status_code == 201  # the name is free again


@pytest.mark.parametrize(
    ("file", "data", "status", "said"),
    [
        ("a.zip", b"PK", 422, "archives are not unpacked"),
        ("a", b"{}", 422, "without a suffix"),
        ("a.jsonl", b'{"a": 1}\n{"a": \n', 422, "train.jsonl:2: not JSON"),
        ("a.jsonl", b"", 422, "no rows"),
        ("a.jsonl", b'{"a": 1}\n{"a": "x"}\n', 422, "column 'a' is"),
        ("a.csv", b"a,b\n1\n", 422, "expected 2 cells, found 1"),
        ("a.jsonl", b'{"a": "' + b"x" * 2**20 + b'"}', 413, "larger than"),
        ("a.jsonl", b'{"a": 1, "a": 2}\n', 422, "stands twice"),
    ],
)
def test_what_is_no_dataset(server: Hosted, file: str, data: bytes, status: int, said: str) -> None:
    reply = send(server, "wrong", file, data)
    assert reply.status_code == status and said in reply.text, reply.text
    assert "/staging/" not in reply.text and "dataset-" not in reply.text
    assert server.http.get("/api/datasets/wrong").status_code == 404


@settings(max_examples=40, deadline=None)
@given(name=st.text(max_size=40))
def test_no_name_leads_anywhere_else(server: Hosted, name: str) -> None:
    """Whatever the name: it is taken as it is, or refused by name, and the place of the files is not the name's."""
    reply = server.post("/api/datasets", {"name": name, "rows": [{"a": "x"}]})
    if reply.status_code == 201:
        assert reply.json()["name"] == name and name.replace(".", "a").replace("_", "a").replace("-", "a").isalnum()
        assert server.http.delete(f"/api/datasets/{name}").status_code in (204, 404)
    else:
        assert reply.status_code == 400 and reply.json()["error"]["param"] == "name"


def parquet(columns: dict[str, list[Any]]) -> bytes:
    pyarrow = pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    pyarrow.write_table(pytest.importorskip("pyarrow").table(columns), file)
    return file.getvalue()


def test_parquet(server: Hosted) -> None:
    """Columns, nulls and nesting as they are; a look at the rows; splits drawn from them."""
    columns = {
        "text": [f"thing {i} 😀" for i in range(8)], "n": [*range(8)], "share": [0.5] * 7 + [None],
        "facts": [{"colour": "red", "sizes": [i, None]} for i in range(8)],
    }  # fmt: skip
    made = send(server, "columnar", "rows.PARQUET", parquet(columns), shares=json.dumps({"test": 0.25}))
    assert made.status_code == 201, made.text
    found = server.http.get("/api/datasets/columnar").json()
    assert found["columns"] == {"text": "text", "n": "int", "share": "float?", "facts": "object"}
    assert {name: one["rows"] for name, one in found["splits"].items()} == {"train": 6, "test": 2}
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    assert len(found["first_rows"]) == 6 and all(row in rows for row in found["first_rows"])
    recipe = {"prompt": "{text}", "completion": " {facts | json}", "batch_rows": 2}
    pieces = server.post("/api/datasets/columnar/preview", recipe).json()["rows"][0]["pieces"]
    said = "".join(one["text"] for one in pieces)
    assert "😀" in said and '"sizes"' in said and "\ufffd" not in said  # the character is several tokens


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"at": [datetime(2026, 1, 1)]}, "column 'at' holds a datetime; expected what JSON has"),
        ({"raw": [b"x"]}, "column 'raw' holds a bytes"),
        ({"deep": [{"list": [b"x"]}]}, "column 'deep' holds a bytes"),
        ({"price": [Decimal("1.5")]}, "column 'price' holds a Decimal"),
        ({"text": []}, "no rows"),
    ],
)
def test_what_of_parquet_is_refused(server: Hosted, columns: dict[str, list[Any]], said: str) -> None:
    reply = send(server, "wrong", "a.parquet", parquet(columns))
    assert reply.status_code == 422 and said in reply.text, reply.text
    assert server.http.get("/api/datasets/wrong").status_code == 404


def test_parquet_that_is_none_or_cannot_be_read(server: Hosted, monkeypatch: pytest.MonkeyPatch) -> None:
    file = parquet({"text": ["x" * 1000] * 1000})
    broken = send(server, "wrong", "a.parquet", file[: len(file) // 2])
    assert broken.status_code == 422 and "not a readable Parquet file" in broken.text
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    missing = send(server, "wrong", "a.parquet", file)
    assert missing.status_code == 400 and "reading Parquet needs pyarrow" in missing.text, missing.text
    assert "pip install" in missing.text and "/staging/" not in missing.text


def test_refused_fields(server: Hosted) -> None:
    assert send(server, "x", "a.jsonl", b'{"a": 1}\n', more="1").status_code == 422
    assert send(server, "x", "a.jsonl", b'{"a": 1}\n', shares="x").status_code == 422
    assert send(server, "x", "a.jsonl", b'{"a": 1}\n', seed="-1").status_code == 422
    assert send(server, "../x", "a.jsonl", b'{"a": 1}\n').status_code == 400
    twice = [("file", ("a.jsonl", b"{}")), ("train", ("b.jsonl", b"{}"))]
    assert server.http.post("/api/datasets", data={"name": "x"}, files=twice).status_code == 422
    assert server.post("/api/datasets", {"name": "x", "rows": []}).status_code == 422
    infinite = server.http.post("/api/datasets", content=b'{"name": "x", "rows": [{"a": [1e999]}]}')
    assert infinite.status_code == 422 and "column 'a' holds inf" in infinite.text
    assert server.post("/api/datasets", {"name": "x", "rows": [{"a": 1}], "more": 1}).status_code == 422


def test_preview(server: Hosted) -> None:
    reply = server.post("/api/datasets/colours/preview", RECIPE)
    assert reply.status_code == 200, reply.text
    shown = reply.json()
    pieces = shown["rows"][0]["pieces"]
    learned = "".join(one["text"] for one in pieces if one["learned"])
    given_ = "".join(one["text"] for one in pieces if not one["learned"])
    assert "red" in learned and "Colour:" in given_ and "red" not in given_
    assert shown["tokens"]["train_rows"] == 48 and shown["tokens"]["test_rows"] == 8 and shown["steps"] == 12
    assert shown["labels"] == {"red": 12, "blue": 12, "green": 12, "white": 12} and shown["audit"] == []


def test_preview_of_what_would_fail(server: Hosted) -> None:
    long = server.post("/api/datasets/colours/preview", RECIPE | {"max_length": 3}).json()
    assert long["audit"][0]["level"] == "error" and "longer than 3 tokens (train.jsonl:" in long["audit"][0]["message"]
    missing = server.post("/api/datasets/colours/preview", RECIPE | {"prompt": "{x}"})
    assert missing.status_code == 400 and "'x'" in missing.json()["error"]["message"]
    assert "/tmp" not in missing.text
    assert server.post("/api/datasets/colours/preview", {"epoch": 1}).status_code == 400
    assert server.http.post("/api/datasets/colours/preview", content=b"{").status_code == 400
    assert server.post("/api/datasets/nothing/preview", RECIPE).status_code == 404
