"""What the rows of a dataset look like: the columns and their types, the same in every split."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lorikeet.errors import DataError

Values = Mapping[str, Any]
_TYPES = {str: "text", bool: "bool", int: "int", float: "float", list: "list", dict: "object"}


def columns_of(splits: Mapping[str, Iterable[Values]]) -> dict[str, str]:
    """Column -> text, bool, int, float, list or object, with a `?` where some rows have none.

    Raises `DataError` for a column of two types, or one that a split lacks.
    """
    found: dict[str, dict[str, str]] = {split: _columns(split, rows) for split, rows in splits.items()}
    first_split, first = next(iter(found.items()))
    for split, columns in found.items():
        if set(columns) != set(first):
            missing, more = sorted(set(first) - set(columns)), sorted(set(columns) - set(first))
            raise DataError(
                f"{split}: expected the columns of {first_split}; missing are {missing}, and {more} are not there",
                hint="give all splits the same columns",
                param=split,
            )
    merged = {}
    for name in first:
        kinds = [columns[name] for columns in found.values()]
        merged[name] = _merge([kind.rstrip("?") for kind in kinds], name, "the splits")
        merged[name] += "?" if any(kind.endswith("?") for kind in kinds) else ""
    return merged


def _columns(split: str, rows: Iterable[Values]) -> dict[str, str]:
    kinds: dict[str, str] = {}
    seen: dict[str, int] = {}
    count = 0
    for count, row in enumerate(rows, 1):
        for name, value in row.items():
            if value is None:
                kinds.setdefault(name, "")
                continue
            foreign = _foreign([name, value])
            if foreign is not None:
                raise DataError(
                    f"{split}: row {count}: column {name!r} holds {foreign}; expected what JSON has, "
                    "texts, numbers, true and false, lists, objects",
                    hint="write null for what is missing, all else as text", param=split,
                )  # fmt: skip
            kind, before = _TYPES[type(value)], kinds.get(name)
            kinds[name] = kind if not before else _merge([before, kind], name, f"{split}: row {count}")
            seen[name] = seen.get(name, 0) + 1
    if not count:
        raise DataError(f"{split}: no rows", hint="expected at least one", param=split)
    return {name: (kind or "text") + ("?" if seen.get(name, 0) < count else "") for name, kind in kinds.items()}


def _foreign(value: Any) -> str | None:
    """What JSON in UTF-8 has nothing for, in a value or anywhere below it: Parquet has times, bytes, decimals."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, list | dict):
            waiting += [*one, *one.values()] if isinstance(one, dict) else one
        elif one is not None and type(one) not in _TYPES:
            return f"a {type(one).__name__}"
        elif isinstance(one, float) and not math.isfinite(one):
            return str(one)
        elif isinstance(one, str) and not _is_text(one):
            return "half a surrogate pair"
    return None


def _is_text(text: str) -> bool:
    """An escape of JSON can say half a character, which no UTF-8 can."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _merge(kinds: Sequence[str], name: str, where: str) -> str:
    different = sorted(set(kinds))
    if different == ["float", "int"]:
        return "float"
    if len(different) > 1:
        raise DataError(
            f"{where}: column {name!r} is {different[0]} in one place and {different[1]} in another",
            hint="give a column one type",
            param=name,
        )
    return different[0]


def split_rows(rows: Sequence[Any], shares: Mapping[str, float], seed: int = 0) -> dict[str, list[Any]]:
    """The rows in their order, those of `shares` (split -> share of all) drawn by the seed, the others in `train`.

    Raises `DataError` when a split would be empty.
    """
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    drawn: dict[int, str] = {}
    start = 0
    for split, share in shares.items():
        count = round(share * len(rows)) if 0.0 < share < 1.0 else 0
        if count < 1:
            raise DataError(
                f"{split}: found the share {share:g} of {len(rows)} rows; expected at least one row", param=split
            )
        drawn |= dict.fromkeys(order[start : start + count], split)
        start += count
    if start >= len(rows):
        raise DataError(f"train: no rows are left of {len(rows)}", hint="draw smaller shares", param="train")
    parts: dict[str, list[Any]] = {"train": [], **{split: [] for split in shares}}
    for index, row in enumerate(rows):
        parts[drawn.get(index, "train")].append(row)
    return parts
