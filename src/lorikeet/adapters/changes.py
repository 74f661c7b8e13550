"""What an adapter makes of the tensors of its base, where plain weights can hold it. No torch.

A layer with weight W and bias b under an entry of the normal form becomes one with `gain * (W + s B A)` and
`gain * b + shift`; a pair on the embedding adds `s A^T B` to its rows; an override stands in place of what was there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from lorikeet.adapters.checkpoint import BaseTensors
from lorikeet.adapters.configs import CONFIG, LoraConfig, LoreftConfig, PeftConfig
from lorikeet.adapters.files import AdapterFile, Array
from lorikeet.adapters.foreign import check_not_reordered
from lorikeet.adapters.normal import Entry, compile_entries
from lorikeet.adapters.overrides import Override, compile_overrides, with_own_vocabulary
from lorikeet.adapters.stored import Tensor, Values
from lorikeet.errors import AdapterError
from lorikeet.model.names import EMBED, FINAL_NORM, HEAD, NORMS, checkpoint_shapes, layer_module, module_of
from lorikeet.model.spec import ModelSpec

_TABLE_WEIGHTS = (f"{EMBED}.weight", f"{HEAD}.weight")


@dataclass(frozen=True, slots=True)
class Change:
    """Of one tensor: what stands in its place, then what is done to it."""

    override: Override | None = None
    entry: Entry | None = None
    is_bias: bool = False

    def apply(self, values: Values, rows: slice) -> Values:
        """These rows of the tensor, a vector as [rows, 1], with the adapter in them."""
        if self.override is not None:
            values = _overridden(values, self.override, rows)
        entry = self.entry
        if entry is None:
            return values

        def wide(part: Array) -> Values:
            return part.astype(values.dtype, copy=False)

        if entry.rank and not self.is_bias:
            a, b = (entry.b, entry.a) if entry.site.role == "embed" else (entry.a, entry.b)
            values = values + values.dtype.type(entry.scale) * (wide(b[:, rows].T) @ wide(a))
        if entry.gain is not None:
            values = wide(entry.gain[rows])[:, None] * values
        if entry.shift is not None and self.is_bias:
            values = values + wide(entry.shift[rows])[:, None]
        return values


def _overridden(values: Values, override: Override, rows: slice) -> Values:
    there = override.values
    if override.role not in ("embed", "head"):
        return there[0, rows, None].astype(values.dtype)
    if override.index is None:
        return there[rows].astype(values.dtype)
    values = values.copy()
    for row, new in zip(override.index, there, strict=True):
        if rows.start <= row < rows.stop:
            values[row - rows.start] = new
    return values


def changes_of(adapter: str, file: AdapterFile, spec: ModelSpec, tensors: Mapping[str, Tensor]) -> dict[str, Change]:
    """What the adapter in `file` does to the `tensors` of a checkpoint, by name.

    Raises AdapterError naming what does not fit the base, or what a checkpoint of its family has no place for.
    """
    config, weights = file.config, BaseTensors((), tensors)
    if isinstance(config, LoraConfig) and config.invocation is not None:
        raise AdapterError(
            f"{adapter}: {CONFIG}: alora_invocation_tokens: an activated LoRA acts from its invocation on",
            hint="weights act everywhere; serve it as an adapter",
            param="alora_invocation_tokens",
        )
    if isinstance(config, LoreftConfig):
        raise AdapterError(
            f"{adapter}: {CONFIG}: peft_type: 'LOREFT' changes what layers give at some tokens",
            hint="weights act everywhere; serve it as an adapter",
            param="peft_type",
        )
    if isinstance(config, PeftConfig) and with_own_vocabulary(config, file.shapes, spec) is not spec:
        raise AdapterError(
            f"{adapter}: its embedding and head have not as many rows as the base's, {spec.vocab_size}",
            hint="fusing keeps the base's shapes; serve it as an adapter, or merge it with peft's merge_and_unload",
            param="vocab_size",
        )
    check_not_reordered(file.folder / CONFIG, file.shapes, spec.family)
    loaded, _ = file.load()
    entries = compile_entries(config, loaded, spec, weights)
    overrides = compile_overrides(config, loaded, spec, weights) if isinstance(config, PeftConfig) else []
    changes = {_name_of(override): Change(override) for override in overrides}
    shapes = checkpoint_shapes(spec)
    for entry in entries:
        weight, bias = (f"{module_of(entry.site)}.{part}" for part in ("weight", "bias"))
        changes[weight] = replace(changes.get(weight, Change()), entry=entry)
        if bias in shapes and (entry.gain is not None or entry.shift is not None):
            changes[bias] = Change(entry=entry, is_bias=True)
        elif entry.shift is not None and entry.shift.any():
            raise AdapterError(
                f"{adapter}: {bias}: the adapter has one, this {spec.family} base has no place for it",
                hint="serve it as an adapter",
                param=bias,
            )
    if spec.tie_embeddings and any(name in changes for name in _TABLE_WEIGHTS):
        embed, head = (changes.get(name, Change()) for name in _TABLE_WEIGHTS)
        if not _same_table(embed, head):
            raise AdapterError(
                f"{adapter}: embedding and head change differently, and this base holds them as one tensor",
                hint="serve it as an adapter",
                param=EMBED,
            )
        changes[_TABLE_WEIGHTS[1]] = embed  # older checkpoints store it a second time
    return {name: change for name, change in changes.items() if name in tensors}


def _name_of(override: Override) -> str:
    if override.role in ("embed", "head"):
        return f"{EMBED if override.role == 'embed' else HEAD}.weight"
    if override.layer is None:
        return f"{FINAL_NORM}.weight"
    return f"{layer_module(override.layer, NORMS[override.role])}.weight"


def _same_table(embed: Change, head: Change) -> bool:
    one, two = embed.override, head.override
    if (one is None) != (two is None):
        return False
    if one is not None and two is not None and (one.index != two.index or not np.array_equal(one.values, two.values)):
        return False
    first, second = embed.entry, head.entry
    if first is None or second is None:
        return first is second
    transposed = np.array_equal(first.a, second.b) and np.array_equal(first.b, second.a)
    return transposed and first.scale == second.scale and second.gain is None
