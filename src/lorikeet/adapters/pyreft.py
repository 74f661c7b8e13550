"""LoReFT adapters of pyreft: the folder that its `ReftModel.save` writes, made into one of ours.

pyreft (Wu et al. 2024, https://github.com/stanfordnlp/pyreft) saves, through pyvene, a `config.json` and a pickled
state dict for each intervention, `intkey_layer_3_comp_block_output_unit_pos_nunit_1#0.bin`, of `weight` [r, d] and
`bias` [r] (the learned source W, b) and `rotate_layer` [d, r] (R). Checkpoints of its trainer hold the same state
dicts in `intervenable_model`, without a config.

Pickles are read here and nowhere else, by torch's loader of weights alone; what is served is the safetensors file.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save

from lorikeet.adapters.configs import CONFIG
from lorikeet.adapters.files import WEIGHTS, Array, write_folder
from lorikeet.errors import AdapterError, ConfigError

_PARTS = {"weight": "weight", "bias": "bias", "rotate_layer": "rotate"}  # pyreft's name -> ours
_INTERVENTIONS = ("LoreftIntervention", "LoreftIntervention_IdentityInit")
# The key of an intervention: at a layer, or at a module named by path, whose dots became underscores.
_KEY = re.compile(
    r"(?:layer_(?P<layer>\d+)_comp_block_output|comp_model_layers\[(?P<path>\d+)\]_output)"
    r"_unit_(?P<unit>\w+?)_nunit_(?P<count>\d+)(?:#\d+)?"
)
_COMPONENT = re.compile(r"block_output|model\.layers\[\d+\]\.output")
_NEUTRAL = ("subspace_partition", "group_key", "moe_key", "source_representation", "hidden_source_representation")
# Fields of a representation, which are stored as a list.
_FIELDS = (
    "layer", "component", "unit", "max_number_of_units", "low_rank_dimension", "intervention_type", "intervention",
    "subspace_partition", "group_key", "intervention_link_key", "moe_key", "source_representation",
    "hidden_source_representation",
)  # fmt: skip
_MAX_JSON = 4 * 2**20
_MAX_FILE = 2**30


def parse_positions(text: str) -> tuple[int, int]:
    """pyreft's `f7+l7`, `f1` or `l2`: the first and the last tokens. Raises ConfigError."""
    match = re.fullmatch(r"f(\d{1,6})(?:\+l(\d{1,6}))?|l(\d{1,6})", text)
    counts = (int(match[1] or 0), int(match[2] or match[3] or 0)) if match else (0, 0)
    if not any(counts):
        raise ConfigError(f"--positions: found {text!r}; expected such as f7+l7, f1 or l2", param="positions")
    return counts


def import_pyreft(
    folder: Path, output: Path, *, positions: str | None = None, last_offset: int = 0, force: bool = False
) -> dict[int, int]:
    """Write the LoReFT adapter that pyreft saved in `folder` to the folder `output`; the rank by layer.

    `positions` as pyreft writes them; None: those of the `args.json` that its training script leaves beside. Raises
    ConfigError for these and for what is in the way of `output`, AdapterError naming what of `folder` is not LoReFT
    with a linear activation on the residual stream, the same for first and last tokens.
    """
    _check_output(output, force)
    beside = folder if any(folder.glob("intkey_*.bin")) else folder / "intervenable_model"
    names = sorted(path.name for path in beside.glob("intkey_*.bin"))
    if not names:
        hint = "expected intkey_*.bin of ReftModel.save, or a checkpoint of its trainer"
        raise AdapterError(f"{folder}: no interventions of pyreft", hint=hint, param="folder")
    first, last = _positions(folder, positions)
    if (beside / "config.json").exists():
        _check_config(beside / "config.json", names)
    _check_model(beside)
    layers: dict[int, dict[str, Array]] = {}
    for name in names:
        layer, tensors = _layer_of(name), _read(beside / name)
        if layer in layers and any(not np.array_equal(tensors[part], layers[layer][part]) for part in tensors):
            raise AdapterError(
                f"{name}: layer {layer} has other weights for the last tokens than for the first",
                hint="train it with share_weights=True",
                param="share_weights",
            )
        layers[layer] = tensors
    ranks = {layer: len(tensors["bias"]) for layer, tensors in sorted(layers.items())}
    if len(set(ranks.values())) > 1:
        raise AdapterError(f"{folder}: low_rank_dimension: expected one rank for all layers, found {ranks}")
    config = {
        "peft_type": "LOREFT",
        "r": next(iter(ranks.values())),
        "layers": list(ranks),
        "first_positions": first,
        "last_positions": last,
        "last_offset": last_offset,
    }
    stored = {f"reft.layers.{n}.{part}": values for n, tensors in layers.items() for part, values in tensors.items()}
    write_folder(output, {CONFIG: json.dumps(config, indent=2).encode(), WEIGHTS: save(stored)})
    return ranks


def _check_output(output: Path, force: bool) -> None:
    if not (output.exists() or output.is_symlink()):
        return
    if not (output / CONFIG).exists() or output.is_symlink():
        raise ConfigError(f"{output} exists and is not an adapter's folder", param="output")
    if not force:
        raise ConfigError(f"{output} exists", hint="--force replaces it", param="output")


def _positions(folder: Path, positions: str | None) -> tuple[int, int]:
    """As asked for, or as the training script wrote down; its other arguments are checked."""
    path = folder / "args.json"
    known = _read_json(path) if path.exists() else {}
    if known.get("act_fn") not in (None, "linear"):
        raise AdapterError(
            f"args.json: act_fn: expected null or 'linear', found {known['act_fn']!r}",
            hint="an activation between W and R has no low-rank form",
            param="act_fn",
        )
    said = known.get("position")
    if positions is None and not isinstance(said, str):
        hint = "pyreft's files do not say which tokens were trained; give it as it was for the training"
        raise ConfigError("--positions: expected such as f7+l7, found none", hint=hint, param="positions")
    if positions is not None and isinstance(said, str) and parse_positions(positions) != parse_positions(said):
        raise ConfigError(f"--positions: found {positions}, but args.json says {said}", param="positions")
    return parse_positions(positions if positions is not None else str(said))


def _layer_of(name: str) -> int:
    key = name.removeprefix("intkey_").removesuffix(".bin")
    match = _KEY.fullmatch(key)
    if match is None:
        hint = "only the residual stream after a layer (block_output) can be changed"
        raise AdapterError(f"{name}: not an intervention on the output of a layer", hint=hint, param="component")
    if match["unit"] != "pos" or match["count"] != "1":
        raise AdapterError(f"{name}: expected unit pos and 1 of them, found {match['unit']} and {match['count']}")
    return int(match["layer"] or match["path"])


def _check_config(path: Path, names: list[str]) -> None:
    """What pyvene's config.json says beyond the names of the files. AdapterError names the field."""
    config = _read_json(path)

    def expect(field: str, expected: str, found: Any, fine: bool) -> None:
        if not fine:
            raise AdapterError(f"config.json: {field}: expected {expected}, found {str(found)[:200]!r}", param=field)

    kinds = config.get("intervention_types")
    classes = [str(kind).removesuffix("'>").rsplit(".", 1)[-1] for kind in kinds] if isinstance(kinds, list) else []
    expect("intervention_types", "LoreftIntervention", kinds, bool(classes) and set(classes) <= set(_INTERVENTIONS))
    expect("mode", "'parallel'", config.get("mode"), config.get("mode") in (None, "parallel"))
    keys = config.get("sorted_keys")
    expected = {f"intkey_{key}.bin" for key in keys} if isinstance(keys, list) else set(names)
    expect("sorted_keys", f"those of {', '.join(names)}", keys, expected == set(names))
    representations = config.get("representations")
    expect("representations", "a list", representations, isinstance(representations, list))
    for one in representations or ():
        fields = dict(zip(_FIELDS, one, strict=False)) if isinstance(one, list) else one
        expect("representations", "lists or objects", one, isinstance(fields, Mapping))
        component, unit = fields.get("component", "block_output"), fields.get("unit", "pos")
        expect("component", "block_output", component, _COMPONENT.fullmatch(str(component)) is not None)
        expect("unit", "'pos'", unit, unit == "pos")
        for field in _NEUTRAL:
            expect(field, "null", fields.get(field), fields.get(field) is None)


def _check_model(folder: Path) -> None:
    """pyreft's trainer saves the base's own trained parameters beside, of which there must be none."""
    path = folder / "pytorch_model.bin"
    if path.exists() and (trained := sorted(_load(path))):
        raise AdapterError(
            f"pytorch_model.bin: {trained[0]}: parameters of the base were trained too",
            hint="only interventions can be imported",
            param="pytorch_model.bin",
        )


def _read(path: Path) -> dict[str, Array]:
    """The tensors of an intervention by our names, fp32, with shapes that fit each other."""
    state = _load(path)
    if state.keys() != _PARTS.keys():
        found = ", ".join(sorted(map(str, state))[:8])
        raise AdapterError(
            f"{path.name}: expected {', '.join(sorted(_PARTS))}, found {found}",
            hint="only LoReFT is supported: no NoReFT, DiReFT, ConsReFT, ...",
            param="intervention_types",
        )
    tensors = {}
    for name, value in state.items():
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            raise AdapterError(f"{path.name}: {name}: expected a tensor of floating-point numbers")
        values: Array = value.detach().float().contiguous().numpy()
        if not np.isfinite(values).all():
            raise AdapterError(f"{path.name}: {name}: some values are NaN or infinite")
        tensors[_PARTS[name]] = values
    hidden, rank = tensors["rotate"].shape if tensors["rotate"].ndim == 2 else (0, 0)
    for name, shape in (("rotate", (hidden, rank)), ("weight", (rank, hidden)), ("bias", (rank,))):
        if tensors[name].shape != shape or not rank:
            raise AdapterError(
                f"{path.name}: {name}: expected {list(shape)} beside a rotation of {list(tensors['rotate'].shape)}, "
                f"found {list(tensors[name].shape)}"
            )
    return tensors


def _load(path: Path) -> dict[Any, Any]:
    """A pickled dict of tensors. Nothing but tensors and plain containers is made, and nothing is unpacked."""
    if path.stat().st_size > _MAX_FILE:
        raise AdapterError(f"{path.name}: {path.stat().st_size} bytes, expected at most {_MAX_FILE}")
    try:
        with zipfile.ZipFile(path) as archive:
            if any(one.compress_type != zipfile.ZIP_STORED for one in archive.infolist()):
                raise AdapterError(f"{path.name}: its parts are compressed, which torch.save does not do")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except zipfile.BadZipFile as error:
        raise AdapterError(f"{path.name}: not a file of torch.save: {error}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, TypeError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise AdapterError(f"{path.name}: holds more than tensors, or is damaged: {reason[:200]}") from error
    if not isinstance(state, dict):
        raise AdapterError(f"{path.name}: expected a dict of tensors, found {type(state).__name__}")
    return state


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_JSON:
            raise AdapterError(f"{path.name}: {path.stat().st_size} bytes, expected at most {_MAX_JSON}")
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path.name}: cannot be read as JSON: {error}", hint=f"the file is {path}") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{path.name}: expected a JSON object, found {type(value).__name__}")
    return value
