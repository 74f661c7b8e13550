"""What an adapter puts in place of parts of the base: a table, some of its rows, or the weight of a norm. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from lorikeet.adapters.checkpoint import BaseTensors
from lorikeet.adapters.configs import CONFIG, LoraConfig
from lorikeet.adapters.files import WEIGHTS, Array, Part, stored_name
from lorikeet.errors import AdapterError
from lorikeet.model.names import EMBED, HEAD, norm_of
from lorikeet.model.spec import ModelSpec

Shapes = Mapping[tuple[str, Part], tuple[int, ...]]
Tensors = Mapping[tuple[str, Part], Array]
_TABLES = {EMBED: "embed", HEAD: "head"}


@dataclass(frozen=True, slots=True)
class Override:
    """`values` [n, d] fp32 in place of the base's `embed` or `head` (rows `index`, or all where it is None), or [1, d]
    in place of the weight of a norm: `attn_norm` or `mlp_norm` of a layer, or `norm` after the last one."""

    role: str
    layer: int | None
    values: Array
    index: tuple[int, ...] | None = None


def compile_overrides(config: LoraConfig, tensors: Tensors, spec: ModelSpec, base: BaseTensors) -> list[Override]:
    """`modules_to_save` and `trainable_token_indices`.

    PEFT saves the tables beside pairs on them, also where they are the base's own: these are left out. On a tied base
    trained rows of the embedding are rows of the head too; whole tables are where `ensure_weight_tying` says so.
    """
    found: list[Override] = []
    for (module, part), values in tensors.items():
        if part == "rows":
            found.append(Override(_TABLES[module], None, values, token_rows(config, module)))
        elif part == "weight" and module in _TABLES:
            stored = EMBED if spec.tie_embeddings else module
            if not np.array_equal(values, base.weight(stored)):
                found.append(Override(_TABLES[module], None, values))
        elif part == "weight":
            place = norm_of(module, spec)
            assert place is not None
            found.append(Override(*place, values[None]))
    if spec.tie_embeddings:
        found += _tied(found, config.ties_weights)
    return found


def _tied(found: list[Override], whole_tables: bool) -> Iterator[Override]:
    there = {one.role for one in found}
    for one in found:
        other = {"embed": "head", "head": "embed"}.get(one.role)
        follows = whole_tables or (one.index is not None and one.role == "embed")
        if other is not None and other not in there and follows:
            yield replace(one, role=other)


def token_rows(config: LoraConfig, module: str) -> tuple[int, ...] | None:
    """The rows of a table that were trained, None where the config names none."""
    return next((rows for name, rows in config.token_rows.items() if f".{module}".endswith(f".{name}")), None)


def check_overrides(config: LoraConfig, shapes: Shapes, spec: ModelSpec) -> set[tuple[str, Part]]:
    """The tensors of `shapes` that override something. Raises AdapterError naming those that do not fit."""
    _check_named(config, shapes)
    taken: set[tuple[str, Part]] = set()
    for (module, part), shape in shapes.items():
        if part not in ("weight", "rows"):
            continue
        expected = _rows_shape(config, module, spec) if part == "rows" else _whole_shape(config, module, spec)
        if shape != expected:
            hint = "added tokens are not supported; train rows that are there, with trainable_token_indices"
            raise AdapterError(
                f"{WEIGHTS}: {stored_name(module, part)}: expected {list(expected)}, found {list(shape)}",
                hint=hint if module in _TABLES and part == "weight" else None,
                param=module,
            )
        taken.add((module, part))
    return taken


def _check_named(config: LoraConfig, shapes: Shapes) -> None:
    """What the config says was trained is there."""
    for name in config.modules_to_save:
        if not any(part == "weight" and module.endswith(name) for module, part in shapes):
            raise AdapterError(
                f"{WEIGHTS}: no module ends with {name!r}, which {CONFIG} names in modules_to_save",
                param="modules_to_save",
            )
    for name in config.token_rows:
        if not any(part == "rows" and f".{module}".endswith(f".{name}") for module, part in shapes):
            raise AdapterError(
                f"{WEIGHTS}: rows of {name} are missing, which {CONFIG} names in trainable_token_indices",
                param="trainable_token_indices",
            )


def _rows_shape(config: LoraConfig, module: str, spec: ModelSpec) -> tuple[int, ...]:
    rows = token_rows(config, module) if module in _TABLES else None
    if rows is None:
        raise AdapterError(f"{WEIGHTS}: {stored_name(module, 'rows')}: {CONFIG} says nothing of it", param=module)
    if max(rows) >= spec.vocab_size:
        raise AdapterError(f"{CONFIG}: trainable_token_indices: {max(rows)} is beyond {spec.vocab_size} tokens")
    return (len(rows), spec.hidden_size)


def _whole_shape(config: LoraConfig, module: str, spec: ModelSpec) -> tuple[int, ...]:
    if module in _TABLES:
        return (spec.vocab_size, spec.hidden_size)
    if norm_of(module, spec) is not None and any(module.endswith(one) for one in config.modules_to_save):
        return (spec.hidden_size,)
    reason = "only embed_tokens, lm_head and the norms of the residual stream can be trained as a whole"
    raise AdapterError(f"{WEIGHTS}: {stored_name(module, 'weight')}: {reason}", param=module)
