"""What differs between two versions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from lorikeet.adapters.configs import CONFIG
from lorikeet.adapters.files import AdapterFile, stored_name
from lorikeet.registry.home import Home
from lorikeet.registry.records import Actor, Resolved

_FIELDS = ("base", "base_sha256", "recipe_sha256", "data_sha256", "code_version", "source", "bytes", "description")


class FieldDifference(msgspec.Struct, frozen=True):
    name: str
    first: Any
    second: Any


class TensorDifference(msgspec.Struct, frozen=True):
    """`changed`: (tensor, |second - first| / |first|), the most changed first; one of another shape by infinity."""

    same: int
    changed: list[tuple[str, float]]
    removed: list[str]
    added: list[str]


class Difference(msgspec.Struct, frozen=True):
    """`first` and `second` are exact references; `fields` are what is not the same."""

    first: str
    second: str
    fields: list[FieldDifference]
    tensors: TensorDifference


def compare(home: Home, who: Actor, first: str, second: str) -> Difference:
    """Two references, of one repository or of two. Raises as `Versions.resolve`, and for damaged files."""
    sides = [home.adapter_folder(who, reference) for reference in (first, second)]
    told = [_fields(home, who, resolved, folder) for resolved, folder in sides]
    names = [*told[0], *(name for name in told[1] if name not in told[0])]
    fields = [
        FieldDifference(name, told[0].get(name), told[1].get(name))
        for name in names
        if told[0].get(name) != told[1].get(name)
    ]
    one, other = (folder for _, folder in sides)
    return Difference(sides[0][0].reference, sides[1][0].reference, fields, _compare_tensors(one, other))


def _fields(home: Home, who: Actor, resolved: Resolved, folder: Path) -> dict[str, Any]:
    version = home.catalog.versions.by_id(who, resolved.version_id)
    fields = {name: getattr(version, name) for name in _FIELDS}
    fields |= {f"metrics.{name}": value for name, value in (version.metrics or {}).items()}
    fields |= {f"recipe.{name}": value for name, value in (version.recipe or {}).items()}
    config: dict[str, Any] = json.loads((folder / CONFIG).read_bytes())
    return fields | {f"config.{name}": value for name, value in sorted(config.items())}


def _compare_tensors(first: Path, second: Path) -> TensorDifference:
    with AdapterFile(first) as one, AdapterFile(second) as other:
        before, after = one.load()[0], other.load()[0]
    same, changed = 0, []
    for key in sorted(before.keys() & after.keys()):
        if before[key].shape != after[key].shape:
            changed.append((stored_name(*key), float("inf")))
        elif np.array_equal(before[key], after[key]):
            same += 1
        else:
            norm = float(np.linalg.norm(before[key]))
            step = float(np.linalg.norm(after[key] - before[key]))
            changed.append((stored_name(*key), step / norm if norm else float("inf")))
    changed.sort(key=lambda item: -item[1])
    removed, added = (sorted(stored_name(*key) for key in keys) for keys in (before.keys() - after.keys(),
                                                                           after.keys() - before.keys()))  # fmt: skip
    return TensorDifference(same, changed, removed, added)
