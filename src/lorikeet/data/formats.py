"""Rows of a dataset from JSONL, CSV, TSV or Parquet, each with the line it stands on; broken ones are reported."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorikeet.errors import ConfigError, DataError

Values = dict[str, Any]
SHOWN = 10  # broken rows that an error message lists


@dataclass(frozen=True, slots=True)
class Row:
    """`line` counts from 1 as an editor does (the header of a CSV is line 1); in Parquet it is the row's number."""

    line: int
    values: Values


@dataclass(frozen=True, slots=True)
class BrokenRow:
    line: int
    reason: str


@dataclass(slots=True)
class Table:
    """A file's readable rows, and the others with what is wrong with them."""

    path: Path
    rows: list[Row] = field(default_factory=list)
    broken: list[BrokenRow] = field(default_factory=list)

    def require_whole(self) -> None:
        """Raises DataError that lists the broken rows as file:line with what is wrong."""
        if self.broken:
            raise DataError(
                f"{len(self.broken)} broken rows:\n" + "\n".join(describe_broken(self.path, self.broken)),
                hint="correct or remove these lines",
                param=str(self.path),
            )


def describe_broken(path: Path, broken: Sequence[BrokenRow], limit: int = SHOWN) -> list[str]:
    """`file:line: what is wrong` of the first `limit` rows, and how many more there are."""
    lines = [f"{path}:{row.line}: {row.reason}" for row in broken[:limit]]
    return [*lines, f"... and {len(broken) - limit} more"] if len(broken) > limit else lines


def read_rows(path: Path, convert: str | None = None) -> list[Values]:
    """The rows of a file that has no broken ones. Raises DataError naming file and lines, ConfigError for the file."""
    table = read_table(path, convert)
    table.require_whole()
    return [row.values for row in table.rows]


def read_table(path: Path, convert: str | None = None) -> Table:
    """Read a file by its suffix: `.jsonl` (`.ndjson`), `.csv`, `.tsv` or `.parquet` (with pyarrow installed).

    `convert="bio"` makes of `tokens` and BIO `tags` the columns `text` and `entities`.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ConfigError(
            f"{path}: format {path.suffix or '(no suffix)'!r} is not read; expected {', '.join(READERS)}",
            param=str(path),
        )
    if convert is not None and convert not in CONVERSIONS:
        raise ConfigError(f"convert: found {convert!r}; expected {', '.join(CONVERSIONS)}", param="convert")
    if not path.is_file():
        raise ConfigError(f"{path.absolute()}: no such file", hint="paths are relative to the working directory")
    table = Table(path)
    for row in reader(path):
        if isinstance(row, Row) and convert is not None:
            row = _converted(row, CONVERSIONS[convert])
        if isinstance(row, Row):
            table.rows.append(row)
        else:
            table.broken.append(row)
    return table


def _converted(row: Row, conversion: Callable[[Values], Values]) -> Row | BrokenRow:
    try:
        return Row(row.line, conversion(row.values))
    except DataError as error:
        return BrokenRow(row.line, error.message)


def _read_jsonl(path: Path) -> Iterator[Row | BrokenRow]:
    """One JSON object a line; blank lines are separators."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            try:
                value = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"), object_pairs_hook=_object)
            except UnicodeDecodeError as error:
                yield BrokenRow(number, f"byte {error.start + 1} of the line is not UTF-8")
            except json.JSONDecodeError as error:
                yield BrokenRow(number, f"not JSON: {error.msg} at character {error.pos + 1}")
            except (ValueError, RecursionError) as error:
                yield BrokenRow(number, f"not JSON: {error}")
            else:
                if isinstance(value, dict):
                    yield Row(number, value)
                else:
                    yield BrokenRow(number, f"expected a JSON object, found {type(value).__name__}")


def _object(pairs: list[tuple[str, Any]]) -> Values:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return value


def _read_csv(path: Path, delimiter: str = ",") -> Iterator[Row | BrokenRow]:
    """Every cell is text. A row with more or fewer cells than the header is broken."""
    with path.open(encoding="utf-8-sig", newline="", errors="surrogateescape") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        header = next(reader, [])
        if not header or len(set(header)) != len(header) or not all(header):
            raise DataError(f"{path}:1: expected a header of different column names, found {header}", param=str(path))
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield BrokenRow(line, f"not CSV: {error}")
                continue
            if not cells:
                continue
            if len(cells) != len(header):
                yield BrokenRow(line, f"expected {len(header)} cells, found {len(cells)}")
            elif any("\udc80" <= character <= "\udcff" for cell in cells for character in cell):
                yield BrokenRow(line, "holds bytes that are not UTF-8")
            else:
                yield Row(line, dict(zip(header, cells, strict=True)))


def _read_tsv(path: Path) -> Iterator[Row | BrokenRow]:
    return _read_csv(path, "\t")


def _read_parquet(path: Path) -> Iterator[Row | BrokenRow]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ConfigError(
            f"{path}: reading Parquet needs pyarrow", hint="pip install pyarrow, or convert the file to JSONL"
        ) from None
    try:
        file = parquet.ParquetFile(path)
        rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
        for number, values in enumerate(rows, 1):
            yield Row(number, values)
    except (ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}", param=str(path)) from error


READERS: dict[str, Callable[[Path], Iterable[Row | BrokenRow]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}


def entities_of_bio(values: Values) -> Values:
    """`tokens` and BIO `tags` -> `text` (tokens joined by a space) and `entities` {type: [text, ...]} in order.

    An `I-` that does not continue an entity of its type begins one, as the CoNLL evaluation reads it.
    """
    tokens, tags = values.get("tokens"), values.get("tags")
    if not isinstance(tokens, list) or not isinstance(tags, list):
        raise DataError("expected the lists `tokens` and `tags`, found columns " + ", ".join(map(repr, values)))
    if len(tokens) != len(tags):
        raise DataError(f"{len(tokens)} tokens with {len(tags)} tags")
    entities: dict[str, list[str]] = {}
    current = ""
    for token, tag in zip(tokens, tags, strict=True):
        mark, _, kind = str(tag).partition("-")
        if tag != "O" and (mark not in ("B", "I") or not kind):
            raise DataError(f"tag {tag!r}; expected O, B-type or I-type")
        if mark == "I" and kind == current:
            entities[kind][-1] += f" {token}"
        elif kind:
            entities.setdefault(kind, []).append(str(token))
        current = kind
    return {**values, "text": " ".join(map(str, tokens)), "entities": entities}


CONVERSIONS: dict[str, Callable[[Values], Values]] = {"bio": entities_of_bio}
