"""A base model's tensors: safetensors on disk -> `DecoderWeights` in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorikeet.adapters.safefile import SafeFile
from lorikeet.adapters.stored import Tensor as Stored
from lorikeet.adapters.stored import is_quantised, open_tensors
from lorikeet.errors import ModelError
from lorikeet.kernels.weight import DenseWeight, Table, Weight
from lorikeet.model.cache_scales import of_checkpoint, stored_names
from lorikeet.model.decoder import DecoderWeights, LayerWeights
from lorikeet.model.families import load_spec
from lorikeet.model.names import EMBED, FINAL_NORM, HEAD, MODULES, NORMS, checkpoint_shapes, layer_module
from lorikeet.model.shard import WHOLE, Shard
from lorikeet.model.sources import checkpoint_files
from lorikeet.model.spec import ModelSpec

__all__ = ["MakeTable", "MakeWeight", "load", "load_spec", "rope_tables"]

MakeWeight = Callable[[Tensor, Tensor | None], Weight]
MakeTable = Callable[[Tensor], Table]
_DTYPES = ("F32", "BF16", "F16", "F64")
_DEQUANTISED = 2**22  # values of a checkpoint that is stored quantised, at a time
_MAX_HEADER = 100 * 2**20  # what safetensors itself allows


def load(
    folder: Path,
    dtype: torch.dtype,
    make_weight: MakeWeight = DenseWeight,
    device: torch.device | str = "cpu",
    rank: int = 0,
    ranks: int = 1,
    make_table: MakeTable = DenseWeight,
) -> tuple[ModelSpec, DecoderWeights]:
    """The checkpoint in `folder`, every tensor in `dtype` on `device`: of `ranks` processes' parts that of `rank`.

    q/k/v and gate/up are joined into one `Weight` each while they are read, so that no weight is held twice. Nor is a
    head that is tied to the embedding, unless each process has a part of it: both are what `make_table` makes. The spec
    is the whole model's; `Shard.local` is what the weights are those of. Raises ModelError naming what is missing,
    misshapen, unexpected or unreadable, and ConfigError for a model that does not divide into so many parts.
    """
    spec = load_spec(folder)
    shard = Shard(spec, rank, ranks)
    with torch.no_grad():
        source = _Checkpoint(folder, spec, dtype, torch.device(device))
        table = source.tensor(f"{EMBED}.weight")
        layers = [_load_layer(source, shard, layer, make_weight) for layer in range(spec.num_layers)]
        if spec.tie_embeddings and ranks == 1:
            embed = head = make_table(table)
        else:
            part = table[shard.head] if spec.tie_embeddings else source.joined([f"{HEAD}.weight"], [shard.head])
            embed, head = DenseWeight(table), make_table(part)
        cos, sin = rope_tables(spec, dtype, device)
        norm = source.tensor(f"{FINAL_NORM}.weight")
        scales = of_checkpoint(source.names, source.as_it_lies, shard)
        return spec, DecoderWeights(embed, layers, norm, head, cos, sin, scales)


def rope_tables(
    spec: ModelSpec, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """cos and sin [max_context, head_dim / 2], fp32 (fp64 for fp64 weights).

    Angles are computed in fp32, as the models were trained. The `llama3` scaling keeps short wavelengths, divides
    long ones by `factor`, and interpolates between (Llama 3.1, `low_freq_factor`, `high_freq_factor`).
    """
    inverse = 1.0 / spec.rope_theta ** (torch.arange(0, spec.head_dim, 2).float() / spec.head_dim)
    scaling = spec.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        inverse = inverse / scaling.factor
    elif scaling is not None and scaling.kind == "llama3":
        turns = scaling.original_max_position * inverse / (2 * math.pi)  # rotations within the original context
        keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        keep = keep.clamp(0.0, 1.0)
        inverse = (1 - keep) * inverse / scaling.factor + keep * inverse
    elif scaling is not None:
        raise ModelError(f"rope scaling {scaling.kind!r} is not computed, expected linear or llama3")
    angles = torch.outer(torch.arange(spec.max_context).float(), inverse)
    wide = torch.promote_types(dtype, torch.float32)
    return angles.cos().to(device, wide), angles.sin().to(device, wide)


def _load_layer(source: _Checkpoint, shard: Shard, layer: int, make_weight: MakeWeight) -> LayerWeights:
    spec = shard.whole

    def norm(name: str) -> Tensor:
        return source.tensor(f"{layer_module(layer, NORMS[name])}.weight")

    def product(name: str) -> Weight:
        roles = [site.role for site in spec.groups[layer][name].sites]
        modules = [layer_module(layer, MODULES[role]) for role in roles]
        outputs, inputs = [shard.outputs(role) for role in roles], shard.inputs(roles[0])
        wide = getattr(make_weight, "wide", False)
        weight = source.joined([f"{module}.weight" for module in modules], outputs, inputs, wide)
        if f"{modules[0]}.bias" not in source.shapes or (inputs != WHOLE and shard.rank > 0):
            return make_weight(weight, None)  # what is summed over the ranks has its bias on one of them
        return make_weight(weight, source.joined([f"{module}.bias" for module in modules], outputs))

    return LayerWeights(
        attn_norm=norm("attn_norm"),
        qkv=product("qkv"),
        o=product("o"),
        mlp_norm=norm("mlp_norm"),
        gate_up=product("gate_up"),
        down=product("down"),
        q_norm=norm("q_norm") if spec.qk_norm else None,
        k_norm=norm("k_norm") if spec.qk_norm else None,
    )


class _Checkpoint:
    """The safetensors files of a folder, checked against the spec before anything is read."""

    def __init__(self, folder: Path, spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.shapes = checkpoint_shapes(spec)
        self._scales = {name for pair in stored_names(spec) for name in pair}
        self._files: dict[str, safe_open] = {}
        opened = {path: self._open(path) for path in checkpoint_files(folder)}
        self._stored = _open_quantised(opened) if is_quantised(self._files) else None
        for path, file in opened.items():
            self._check(path, file)
        missing = sorted(set(self.shapes) - set(self._files))
        if missing:
            raise ModelError(f"{folder}: tensor {missing[0]} is missing ({len(missing)} in all)")
        self._check_tied_head(folder, spec)

    @property
    def names(self) -> Collection[str]:
        return self._files.keys()

    def as_it_lies(self, name: str) -> Tensor:
        stored: Tensor = self._files[name].get_tensor(name)
        return stored

    def tensor(self, name: str) -> Tensor:
        return self.joined([name])

    def joined(
        self, names: list[str], rows: Sequence[slice] = (), columns: slice = WHOLE, wide: bool = False
    ) -> Tensor:
        """The named tensors, or these rows and columns of them, one below the other, each read straight into its
        place; in fp32 where they are `wide` and one of them is stored quantised."""
        places = [
            range(*part.indices(self.shapes[name][0]))
            for name, part in zip(names, rows or [WHOLE] * len(names), strict=True)
        ]
        width = [len(range(*columns.indices(size))) for size in self.shapes[names[0]][1:]]
        dtype = torch.float32 if wide and any(map(self._quantised, names)) else self.dtype
        out = torch.empty((sum(map(len, places)), *width), dtype=dtype, device=self.device)
        for name, place, into in zip(names, places, out.split([len(place) for place in places]), strict=True):
            self._read(name, place, columns, into)
        return out

    def _read(self, name: str, rows: range, columns: slice, into: Tensor) -> None:
        if (quantised := self._quantised(name)) is None:
            part = self._files[name].get_tensor(name)[rows.start : rows.stop]  # mapped: only what is copied is read
            into.copy_(part if columns == WHOLE else part[:, columns])
            return
        step = max(1, _DEQUANTISED // max(math.prod(quantised.shape[1:]), 1))
        for start in range(rows.start, rows.stop, step):
            values = torch.from_numpy(quantised.rows(start, min(start + step, rows.stop)))
            into[start - rows.start : start - rows.start + len(values)].copy_(values[:, columns])

    def _quantised(self, name: str) -> Stored | None:
        """The named tensor, where it is stored quantised."""
        stored = None if self._stored is None else self._stored[name]
        return None if stored is None or stored.raw is not None else stored

    def _open(self, path: Path) -> safe_open:
        try:
            file = safe_open(path, framework="pt")
            self._files.update(dict.fromkeys(file.keys(), file))
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path}: not a readable safetensors file: {error}") from error
        return file

    def _check(self, path: Path, file: safe_open) -> None:
        for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            if self._stored is not None and name not in self._stored:
                continue  # a part of a quantised tensor, found to fit
            if (quantised := self._quantised(name)) is None:
                entry = file.get_slice(name)
                shape, dtype = tuple(entry.get_shape()), entry.get_dtype()
            else:
                shape, dtype = quantised.shape, quantised.dtype
            expected = self.shapes.get(name)
            if expected is None:
                # Older checkpoints carry the rotary frequencies, which follow from the config.
                if name == f"{HEAD}.weight" or name.endswith("rotary_emb.inv_freq") or name in self._scales:
                    continue
                raise ModelError(f"{path}: unexpected tensor {name} {list(shape)}", param=name)
            if shape != expected:
                raise ModelError(f"{path}: {name}: expected {list(expected)}, found {list(shape)}", param=name)
            if dtype not in _DTYPES:
                raise ModelError(f"{path}: {name}: expected {' or '.join(_DTYPES)}, found {dtype}", param=name)

    def _check_tied_head(self, folder: Path, spec: ModelSpec) -> None:
        """A tied checkpoint may carry its head too; then it must be the embedding."""
        head, embed = f"{HEAD}.weight", f"{EMBED}.weight"
        if spec.tie_embeddings and head in self._files:
            stored, table = self._files[head].get_tensor(head), self._files[embed].get_tensor(embed)
            if not torch.equal(stored, table):
                raise ModelError(
                    f"{folder}: {head} differs from {embed} but tie_word_embeddings is true",
                    hint="set tie_word_embeddings to false in config.json if the head is its own",
                    param=head,
                )


def _open_quantised(paths: Iterable[Path]) -> dict[str, Stored]:
    """The tensors of files some of whose are quantised; their parts are no tensors of their own."""
    with ExitStack() as stack:
        opened = (SafeFile(path, error=ModelError, max_header=_MAX_HEADER) for path in paths)
        return open_tensors([stack.enter_context(file) for file in opened])
