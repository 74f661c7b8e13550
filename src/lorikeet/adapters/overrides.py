"""What an adapter puts in place of parts of the base: tables, rows of them, weights of norms. No torch.

A stored table is the adapter's own copy where `modules_to_save` names its module. Otherwise it is the base's own
parameter as it was when the adapter was saved: PEFT writes these where the vocabulary was resized, or when told to
(`save_embedding_layers`). On a tied base that parameter is embedding and head at once. Trained token rows stand in
place of rows of either. Of a table that differs from the base's in few rows, those alone are kept.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lorikeet.adapters.checkpoint import BaseTensors
from lorikeet.adapters.configs import CONFIG, LoraConfig, PeftConfig
from lorikeet.adapters.files import WEIGHTS, Array, Part, stored_name
from lorikeet.errors import AdapterError
from lorikeet.model.names import EMBED, HEAD, norm_of
from lorikeet.model.spec import ModelSpec

Key = tuple[str, Part]
Shapes = Mapping[Key, tuple[int, ...]]
Tensors = Mapping[Key, Array]
_TABLES = {EMBED: "embed", HEAD: "head"}
_OTHER = {EMBED: HEAD, HEAD: EMBED}
# Which axis of these tensors counts tokens.
_TOKENS: dict[Key, int] = {
    (EMBED, "weight"): 0, (EMBED, "original"): 0, (EMBED, "embedding_A"): 1,
    (HEAD, "weight"): 0, (HEAD, "original"): 0, (HEAD, "B"): 0,
}  # fmt: skip
_BLOCK = 4096  # rows compared at a time


@dataclass(frozen=True, slots=True)
class Override:
    """`values` [n, d] fp32 in place of the base's `embed` or `head` (rows `index`, ascending, or all where it is None),
    or [1, d] in place of the weight of a norm: `attn_norm` or `mlp_norm` of a layer, or `norm` after the last one.

    Rows beyond the base's are those of tokens that the adapter adds.
    """

    role: str
    layer: int | None
    values: Array
    index: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class _Stored:
    """Where an adapter's file (`keys`) has the tables that stand in place of the base's, by PEFT's rules."""

    config: PeftConfig
    keys: Collection[Key]
    tied: bool

    def parameters(self, module: str) -> list[Key]:
        """The base's own parameter of a table, under every name that it is stored under."""
        modules = (module, _OTHER[module]) if self.tied else (module,)
        names: list[Key] = [(one, "original") for one in modules]
        names += [(one, "weight") for one in modules if not self._own_copy(one)]
        return [key for key in names if key in self.keys]

    def whole(self, module: str) -> Key | None:
        """The table of a module, None: the base's."""
        copies: list[Key] = [(one, "weight") for one in self._trained_with(module) if self._own_copy(module)]
        return next((key for key in (*copies, *self.parameters(module)) if key in self.keys), None)

    def rows(self, module: str) -> Key | None:
        """The trained rows of a table. A tied head has the embedding's unless the config has others for it."""
        own, embeds = token_rows(self.config, module), token_rows(self.config, EMBED)
        follows = self.tied and module == HEAD and embeds is not None and own in (None, embeds)
        if follows and not self._own_copy(HEAD):
            return (EMBED, "rows")
        return None if own is None else (module, "rows")

    def _own_copy(self, module: str) -> bool:
        return any(self.config.saves_whole(one) for one in self._trained_with(module))

    def _trained_with(self, module: str) -> tuple[str, ...]:
        return (module, _OTHER[module]) if self.tied and self.config.ties_weights else (module,)


def with_own_vocabulary(config: PeftConfig, shapes: Shapes, spec: ModelSpec) -> ModelSpec:
    """The base's `spec` with as many tokens as the adapter's tables have: more where it was trained on a model whose
    vocabulary was resized (`resize_token_embeddings`), or fewer where that cut off the padding of the base's tables.

    Raises AdapterError where its tensors do not have the same number of tokens.
    """
    sizes = {key: shapes[key][axis] for key, axis in _TOKENS.items() if len(shapes.get(key, ())) == 2}
    counts = set(sizes.values())
    if len(counts) > 1 or 0 in counts:
        found = ", ".join(f"{stored_name(*key)} {size}" for key, size in sizes.items())
        raise AdapterError(
            f"{WEIGHTS}: expected tables of the same number of tokens, found {found}",
            hint="save embedding and head of one resized model: both in modules_to_save, or save_embedding_layers=True",
            param=next(iter(sizes))[0],
        )
    if not counts:
        rows = [token_rows(config, module) or () for module in _TABLES if (module, "rows") in shapes]
        counts = {max((spec.vocab_size, *(row + 1 for index in rows for row in index)))}
    (count,) = counts
    return spec if count == spec.vocab_size else replace(spec, vocab_size=count)


def compile_overrides(config: PeftConfig, tensors: Tensors, spec: ModelSpec, base: BaseTensors) -> list[Override]:
    """`modules_to_save`, `trainable_token_indices`, and tables that were saved beside what was trained.

    `spec` is the base's. What is equal to the base is left out. Raises AdapterError for tensors that are one on this
    base and have different values, and for an activated LoRA with overrides.
    """
    stored = _Stored(config, tensors.keys(), spec.tie_embeddings)
    found: list[Override] = []
    for module in _TABLES:
        _check_equal(stored.parameters(module), tensors)
        one = _table(module, stored, tensors, base)
        if one is not None:
            found.append(one)
    if stored.rows(HEAD) == (EMBED, "rows"):
        _check_equal([(EMBED, "rows"), (HEAD, "rows")], tensors)
    for (module, part), values in tensors.items():
        if part == "weight" and module not in _TABLES:
            place = norm_of(module, spec)
            assert place is not None
            found.append(Override(*place, values[None]))
    if found and isinstance(config, LoraConfig) and config.invocation is not None:
        raise AdapterError(
            f"{CONFIG}: alora_invocation_tokens: expected nothing trained but pairs, found {found[0].role}",
            hint="tables and norms act on the whole prompt; train pairs alone, or a LoRA without invocation",
            param="alora_invocation_tokens",
        )
    return found


def parameter_of(module: str, config: PeftConfig, tensors: Tensors, spec: ModelSpec, base: BaseTensors) -> Array:
    """The base's own parameter of embedding or head, [V, d], as the adapter was trained on it; `spec` with its V."""
    stored = next(iter(_Stored(config, tensors.keys(), spec.tie_embeddings).parameters(module)), None)
    if stored is not None:
        return tensors[stored]
    return base.weight(EMBED if spec.tie_embeddings else module)[: spec.vocab_size]


def _table(module: str, stored: _Stored, tensors: Tensors, base: BaseTensors) -> Override | None:
    role, whole, rows = _TABLES[module], stored.whole(module), stored.rows(module)
    index = np.array([] if rows is None else token_rows(stored.config, rows[0]), np.int64)
    if whole is None:
        if rows is None:
            return None
        order = np.argsort(index)
        return Override(role, None, tensors[rows][order], tuple(index[order].tolist()))
    values = tensors[whole]
    if rows is not None:
        values = values.copy()
        values[index] = tensors[rows]
    changed = _changed(values, base.weight(EMBED if stored.tied else module))
    if 2 * len(changed) > len(values):
        return Override(role, None, values)
    return Override(role, None, values[changed], tuple(changed.tolist())) if len(changed) else None


def _changed(values: Array, base: Array) -> NDArray[np.int64]:
    """Rows of a table that are not those of the base's table, ascending."""
    differs = np.ones(len(values), np.bool_)
    for start in range(0, min(len(values), len(base)), _BLOCK):
        stop = min(start + _BLOCK, len(values), len(base))
        differs[start:stop] = (values[start:stop] != base[start:stop]).any(axis=1)
    return np.flatnonzero(differs)


def _check_equal(keys: list[Key], tensors: Tensors) -> None:
    there = [key for key in keys if key in tensors]
    for other in there[1:]:
        if not np.array_equal(tensors[there[0]], tensors[other]):
            raise AdapterError(
                f"{WEIGHTS}: {stored_name(*there[0])} and {stored_name(*other)} have different values, "
                "but on this base they are one tensor",
                hint="train the adapter on this base, whose embedding and head are tied",
                param=other[0],
            )


def token_rows(config: PeftConfig, module: str) -> tuple[int, ...] | None:
    """The rows of a table that were trained, None where the config names none."""
    return next((rows for name, rows in config.token_rows.items() if f".{module}".endswith(f".{name}")), None)


# --- what fits ------------------------------------------------------------------------------------------------------


def check_overrides(config: PeftConfig, shapes: Shapes, spec: ModelSpec, base_tokens: int) -> set[Key]:
    """The tensors of `shapes` that override something. Raises AdapterError naming those that do not fit.

    `spec` has the adapter's own vocabulary, `base_tokens` is the size of the base's.
    """
    stored = _Stored(config, shapes.keys(), spec.tie_embeddings)
    _check_named(stored)
    taken: set[Key] = set()
    for (module, part), shape in shapes.items():
        if part not in ("weight", "original", "rows"):
            continue
        expected = _rows_shape(module, stored, spec) if part == "rows" else _whole_shape(module, part, config, spec)
        if shape != expected:
            raise AdapterError(
                f"{WEIGHTS}: {stored_name(module, part)}: expected {list(expected)}, found {list(shape)}", param=module
            )
        taken.add((module, part))
    if spec.vocab_size > base_tokens:
        for module in _TABLES:
            _check_added(module, stored, spec.vocab_size, base_tokens)
    return taken


def _check_named(stored: _Stored) -> None:
    """What the config says was trained is there."""
    for name in stored.config.modules_to_save:
        if not any(part == "weight" and module.endswith(name) for module, part in stored.keys):
            raise AdapterError(
                f"{WEIGHTS}: no module ends with {name!r}, which {CONFIG} names in modules_to_save",
                param="modules_to_save",
            )
    for name in stored.config.token_rows:
        named = [module for module in _TABLES if f".{module}".endswith(f".{name}")]
        if not any(stored.rows(module) in stored.keys for module in named):
            raise AdapterError(
                f"{WEIGHTS}: rows of {name} are missing, which {CONFIG} names in trainable_token_indices",
                param="trainable_token_indices",
            )


def _check_added(module: str, stored: _Stored, tokens: int, base_tokens: int) -> None:
    """Every row beyond the base's table has values."""
    if stored.whole(module) is not None:
        return
    rows = stored.rows(module)
    index = () if rows is None else token_rows(stored.config, rows[0]) or ()
    added = sorted(row for row in index if row >= base_tokens)
    if len(added) < tokens - base_tokens:
        first = next((i for i, row in enumerate(added, base_tokens) if row != i), base_tokens + len(added))
        raise AdapterError(
            f"{WEIGHTS}: {module}: expected rows for {tokens} tokens, the base has {base_tokens}; "
            f"{tokens - base_tokens - len(added)} rows are missing, the first is {first}",
            hint="save them with save_embedding_layers=True, or name embed_tokens and lm_head in modules_to_save",
            param=module,
        )


def _rows_shape(module: str, stored: _Stored, spec: ModelSpec) -> tuple[int, ...]:
    key = stored.rows(module) if module in _TABLES else None
    rows = None if key is None else token_rows(stored.config, key[0])
    if rows is None:
        raise AdapterError(f"{WEIGHTS}: {stored_name(module, 'rows')}: {CONFIG} says nothing of it", param=module)
    if max(rows, default=0) >= spec.vocab_size:
        raise AdapterError(f"{CONFIG}: trainable_token_indices: {max(rows)} is beyond {spec.vocab_size} tokens")
    return (len(rows), spec.hidden_size)


def _whole_shape(module: str, part: Part, config: PeftConfig, spec: ModelSpec) -> tuple[int, ...]:
    if module in _TABLES:
        return (spec.vocab_size, spec.hidden_size)
    if part == "weight" and norm_of(module, spec) is not None and config.saves_whole(module):
        return (spec.hidden_size,)
    reason = "only embed_tokens, lm_head and the norms of the residual stream can be trained as a whole"
    raise AdapterError(f"{WEIGHTS}: {stored_name(module, part)}: {reason}", param=module)
