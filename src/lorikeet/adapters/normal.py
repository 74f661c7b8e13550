"""The normal form: every adapter kind compiles to entries, one a site. No torch.

    y = gain * (base(x) + scale * B (A x)) + shift

A new kind is one function here and one parity test; kernels, memory and scheduler know only entries.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from lorikeet.adapters.checkpoint import BaseTensors
from lorikeet.adapters.configs import CONFIG, AdapterConfig, Ia3Config, LoraConfig, LoreftConfig, PeftConfig, VeraConfig
from lorikeet.adapters.files import WEIGHTS, Array, Part, stored_name
from lorikeet.adapters.overrides import check_overrides, parameter_of, with_own_vocabulary
from lorikeet.errors import AdapterError
from lorikeet.model.names import EMBED, FUSED, HEAD, TARGETS, module_names, module_of, sites_of
from lorikeet.model.spec import ModelSpec
from lorikeet.types import ROLES, Site

Shapes = Mapping[tuple[str, Part], tuple[int, ...]]
Tensors = Mapping[tuple[str, Part], Array]
Targeted = dict[str, tuple[Site, ...]]  # modules that an adapter acts on, with their sites


@dataclass(frozen=True, slots=True)
class Entry:
    """What an adapter does at one site: `a` [r, d_in], `b` [r, d_out] fp32 and `scale`, which is not folded in.

    `gain` and `shift` are [d_out] fp32, None where there is none; r is 0 where there is nothing else.
    """

    site: Site
    a: Array
    b: Array
    scale: float
    gain: Array | None = None
    shift: Array | None = None

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])


def compile_entries(config: AdapterConfig, tensors: Tensors, spec: ModelSpec, base: BaseTensors) -> list[Entry]:
    """An adapter's entries, in the order of their sites.

    `tensors` as `AdapterFile.load` gives them. Raises AdapterError as `check_adapter` does.
    """
    shapes = {key: value.shape for key, value in tensors.items()}
    targeted = check_adapter(config, shapes, spec)
    if isinstance(config, LoreftConfig):
        return list(_loreft(tensors, targeted))
    if isinstance(config, Ia3Config):
        entries = list(_ia3(config, tensors, targeted, spec))
    elif isinstance(config, VeraConfig):
        entries = list(_vera(tensors, targeted))
    else:
        entries = list(_lora(config, tensors, targeted, with_own_vocabulary(config, shapes, spec), base))
    return sorted(entries, key=lambda entry: entry.site.index)


# --- kinds ----------------------------------------------------------------------------------------------------------


def _lora(
    config: LoraConfig, tensors: Tensors, targeted: Targeted, spec: ModelSpec, base: BaseTensors
) -> Iterator[Entry]:
    """LoRA (Hu et al. 2021), rsLoRA (Kalajdzievski 2023), DoRA (Liu et al. 2024), trained biases of B and of the base.

    DoRA multiplies what W and the pair give, and not the base's bias b: g (W x + s B A x) + b. So its shift is
    (1 - g) b. A trained bias b' of the base stands in place of b.
    """
    for module, sites in targeted.items():
        scale = config.scale_of(module)
        if sites[0].role == "embed":
            yield Entry(sites[0], tensors[module, "embedding_A"], tensors[module, "embedding_B"].T, scale)
            continue
        a, b = tensors[module, "A"], tensors[module, "B"]
        gain = None
        if config.use_dora:
            if sites[0].role == "head":
                weight = parameter_of(HEAD, config, tensors, spec, base)
            else:
                weight = np.concatenate([base.weight(module_of(site)) for site in sites])
            gain = tensors[module, "magnitude"] / row_norms(weight, a, b, scale)
        shift = _bias_shift(tensors.get((module, "bias")), gain, [base.bias(module_of(site)) for site in sites], sites)
        if config.lora_bias:
            added = scale * tensors[module, "B.bias"]
            shift = added if shift is None else shift + added
        for site, rows in _rows_of(sites):
            yield Entry(site, a, b[rows].T, scale, _part(gain, rows), _part(shift, rows))
    for (module, part), trained in tensors.items():
        if part == "bias" and module not in targeted:
            sites = sites_of(module, spec)
            shift = _bias_shift(trained, None, [base.bias(module_of(site)) for site in sites], sites)
            for site, rows in _rows_of(sites):
                yield _without_pair(site, shift=_part(shift, rows))


def _bias_shift(
    trained: Array | None, gain: Array | None, base: list[Array | None], sites: tuple[Site, ...]
) -> Array | None:
    """What is added after the gain, so that the bias [d_out] comes out as it should: b' - g b."""
    if trained is None and (gain is None or all(one is None for one in base)):
        return None
    bias = np.concatenate(
        [np.zeros(site.d_out, np.float32) if one is None else one for site, one in zip(sites, base, strict=True)]
    )
    shift: Array = (bias if trained is None else trained) - (bias if gain is None else gain * bias)
    return shift


def row_norms(weight: Array, a: Array, b: Array, scale: float) -> Array:
    """||W + s B A|| of each row [d_out] fp32, without that matrix: W [d_out, d_in], A [r, d_in], B [d_out, r].

    ||W||^2 + 2 s rowsum((W A^T) * B) + s^2 rowsum((B A A^T) * B), summed in fp64.
    """
    squares = np.einsum("oi,oi->o", weight, weight, dtype=np.float64)
    crossed = np.einsum("or,or->o", weight @ a.T, b, dtype=np.float64)
    added = np.einsum("or,or->o", b @ (a @ a.T), b, dtype=np.float64)
    norms: Array = np.sqrt(np.maximum(squares + 2 * scale * crossed + scale**2 * added, 0)).astype(np.float32)
    return norms


def _ia3(config: Ia3Config, tensors: Tensors, targeted: Targeted, spec: ModelSpec) -> Iterator[Entry]:
    """IA3 (Liu et al. 2022). What it multiplies at the input of `down` is the output of `up`, times the gate's."""
    gains: dict[Site, Array] = {}
    for module, sites in targeted.items():
        values = tensors[module, "ia3"].reshape(-1)
        if config.is_feedforward(module):
            sites = (spec.site(sites[0].layer, "up"),)
        for site, rows in _rows_of(sites):
            gains[site] = gains[site] * values[rows] if site in gains else values[rows]
    for site, gain in gains.items():
        yield _without_pair(site, gain=gain)


def _vera(tensors: Tensors, targeted: Targeted) -> Iterator[Entry]:
    """VeRA (Kopiczko et al. 2024): y + b * (B (d * (A x))), with A and B cut from what all modules share."""
    shared_a, shared_b = tensors["", "shared_A"], tensors["", "shared_B"]
    for module, sites in targeted.items():
        outer, inner = tensors[module, "lambda_b"], tensors[module, "lambda_d"]
        a = inner[:, None] * shared_a[:, : sites[0].d_in]
        b = outer[:, None] * shared_b[: len(outer)]
        for site, rows in _rows_of(sites):
            yield Entry(site, a, b[rows].T, 1.0)


def _loreft(tensors: Tensors, targeted: Targeted) -> Iterator[Entry]:
    """h + R (W h + b - R^T h): the pair (W - R^T, R) and the shift R b."""
    for module, (site,) in targeted.items():
        rotate = tensors[module, "reft.rotate"]
        shift: Array = rotate @ tensors[module, "reft.bias"]
        yield Entry(site, tensors[module, "reft.weight"] - rotate.T, rotate.T, 1.0, shift=shift)


def _without_pair(site: Site, gain: Array | None = None, shift: Array | None = None) -> Entry:
    nothing = (np.zeros((0, site.d_in), np.float32), np.zeros((0, site.d_out), np.float32))
    return Entry(site, *nothing, 1.0, gain, shift)


def _rows_of(sites: tuple[Site, ...]) -> Iterator[tuple[Site, slice]]:
    """The rows of a module's outputs that belong to each of its sites."""
    at = 0
    for site in sites:
        yield site, slice(at, at + site.d_out)
        at += site.d_out


def _part(values: Array | None, rows: slice) -> Array | None:
    return None if values is None else values[rows]


# --- what fits ------------------------------------------------------------------------------------------------------


def check_adapter(config: AdapterConfig, shapes: Shapes, spec: ModelSpec) -> Targeted:
    """The modules that an adapter acts on, with their sites, in order of site.

    Raises AdapterError naming tensor, expected and found where the adapter does not fit the base, where a tensor is
    there that the config does not target, or where one is missing that it does. The sites of embedding and head have
    as many tokens as the adapter's tables (`with_own_vocabulary`).
    """
    base_tokens = spec.vocab_size
    if isinstance(config, LoreftConfig):
        targeted = _intervened(config, spec)
    else:
        spec = with_own_vocabulary(config, shapes, spec)
        targeted = _targeted(config, spec, {module for module, _ in shapes})
    expected = {key: shape for module, sites in targeted.items() for key, shape in _shapes(config, module, sites)}
    if isinstance(config, VeraConfig):
        for part, side in (("shared_A", 1), ("shared_B", 0)):
            _check_shared(shapes, part, side, config.r, targeted)  # type: ignore[arg-type]
    beside = shapes.keys() - expected.keys()
    if isinstance(config, PeftConfig):
        beside -= check_overrides(config, shapes, spec, base_tokens)
    for module, part in sorted(beside):
        if part not in ("shared_A", "shared_B") or not isinstance(config, VeraConfig):
            _check_beside(module, part, shapes[module, part], config, targeted, spec)
    for (module, part), shape in expected.items():
        found, name = shapes.get((module, part)), stored_name(module, part)
        if found is None:
            raise AdapterError(f"{WEIGHTS}: {name} is missing, but {CONFIG} targets it")
        if found != shape:
            sites = targeted[module]
            raise AdapterError(
                f"{WEIGHTS}: {name}: expected {list(shape)}, found {list(found)}",
                hint=f"a layer of {sites[0].d_in} inputs and {sum(s.d_out for s in sites)} outputs",
                param=module,
            )
    return targeted


def _shapes(
    config: AdapterConfig, module: str, sites: tuple[Site, ...]
) -> Iterator[tuple[tuple[str, Part], tuple[int, ...]]]:
    """The tensors that a targeted module must have."""
    d_in, d_out = sites[0].d_in, sum(site.d_out for site in sites)
    if isinstance(config, LoreftConfig):
        yield (module, "reft.rotate"), (d_out, config.r)
        yield (module, "reft.weight"), (config.r, d_in)
        yield (module, "reft.bias"), (config.r,)
    elif isinstance(config, Ia3Config):
        yield (module, "ia3"), (1, d_in) if config.is_feedforward(module) else (d_out, 1)
    elif isinstance(config, VeraConfig):
        yield (module, "lambda_b"), (d_out,)
        yield (module, "lambda_d"), (config.r,)
    else:
        rank = config.rank_of(module)
        if sites[0].role == "embed":
            yield (module, "embedding_A"), (rank, d_in)
            yield (module, "embedding_B"), (d_out, rank)
            return
        yield (module, "A"), (rank, d_in)
        yield (module, "B"), (d_out, rank)
        if config.lora_bias:
            yield (module, "B.bias"), (d_out,)
        if config.use_dora:
            yield (module, "magnitude"), (d_out,)


def _intervened(config: LoreftConfig, spec: ModelSpec) -> Targeted:
    for layer in config.layers:
        if not 0 <= layer < spec.num_layers:
            raise AdapterError(
                f"{CONFIG}: layers: expected numbers below {spec.num_layers}, found {layer}", param="layers"
            )
    return {f"model.layers.{layer}": (spec.residual_sites[layer],) for layer in sorted(set(config.layers))}


def _check_shared(shapes: Shapes, part: Part, side: int, rank: int, targeted: Targeted) -> None:
    """VeRA's shared projections: [r, inputs] and [outputs, r], as large as the largest layer or larger."""
    found, name = shapes.get(("", part)), stored_name("", part)
    if found is None:
        raise AdapterError(f"{WEIGHTS}: {name} is missing", hint="save the adapter with save_projection=True")
    sizes = [sites[0].d_in if side else sum(site.d_out for site in sites) for sites in targeted.values()]
    if len(found) != 2 or found[1 - side] != rank or found[side] < max(sizes):
        expected = [rank, max(sizes)] if side else [max(sizes), rank]
        raise AdapterError(f"{WEIGHTS}: {name}: expected {expected} or more of the larger, found {list(found)}")


def _check_beside(
    module: str, part: Part, shape: tuple[int, ...], config: AdapterConfig, targeted: Targeted, spec: ModelSpec
) -> None:
    """A tensor that no targeted module must have: a trained bias of the base, or an error."""
    sites = sites_of(module, spec)
    outputs = sum(site.d_out for site in sites)
    if part == "bias" and sites and isinstance(config, LoraConfig) and config.bias != "none":
        if config.bias == "lora_only" and module not in targeted:
            raise AdapterError(f"{WEIGHTS}: {module}.bias: not among the modules that {CONFIG} targets", param=module)
        if shape != (outputs,):
            raise AdapterError(f"{WEIGHTS}: {module}.bias: expected {[outputs]}, found {list(shape)}", param=module)
        return
    if module in targeted or not module or part.startswith("reft."):
        hint = None
        if part == "magnitude":
            hint = 'torchtune leaves "use_dora": true out of the config of a DoRA; put it there'
        raise AdapterError(
            f"{WEIGHTS}: {stored_name(module, part)}: {CONFIG} says nothing of it", hint=hint, param=module
        )
    if not sites:
        reason = f"this base ({spec.family}, {spec.num_layers} layers) has no such module"
    else:
        reason = f"not among the modules that {CONFIG} targets"
    raise AdapterError(f"{WEIGHTS}: {module}: {reason}", param=module)


def _targeted(config: Ia3Config | LoraConfig | VeraConfig, spec: ModelSpec, present: set[str]) -> Targeted:
    """Modules of the base that the config targets; names that match nothing, embedding and head are refused.

    A fused module counts where it is named, or where a pattern matches and its tensors are `present`: then a pattern
    that matches its parts too does not mean them.
    """
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        linear = tuple(module_of(site) for site in spec.sites if site.role in ROLES)
        config = replace(config, target_modules=linear)
    names = module_names(spec)
    everything = {name: sites_of(name, spec) for name in names if config.targets(name)}
    if isinstance(config.target_modules, str):
        fused = {name: sites for name, sites in everything.items() if len(sites) > 1 and name in present}
        covered = {site for sites in fused.values() for site in sites}
        single = {n: s for n, s in everything.items() if len(s) == 1 and (n in present or s[0] not in covered)}
        everything = single | fused
    everything = dict(sorted(everything.items(), key=lambda item: item[1][0].index))
    if isinstance(config, LoraConfig) and config.ties_weights and spec.tie_embeddings:
        tables = {name for name in (EMBED, HEAD) if name in present}
        if tables & everything.keys():
            everything |= {name: sites_of(name, spec) for name in tables}
    _check_embedding(config, everything)
    _check_overlap(everything)
    _check_names(config, everything, spec)
    if isinstance(config, Ia3Config):
        _check_inputs(config, everything)
    return everything


def _check_names(config: AdapterConfig, everything: Targeted, spec: ModelSpec) -> None:
    """Every name and pattern of the config means something."""
    names, joined = module_names(spec), ", ".join(name.rsplit(".", 1)[1] for name in FUSED)
    for name in () if isinstance(config.target_modules, str) else config.target_modules:
        if not any(module == name or module.endswith(f".{name}") for module in names):
            raise AdapterError(
                f"{CONFIG}: target_modules: {name!r} matches no module of this base ({spec.family})",
                hint=f"supported modules: {', '.join(TARGETS)}, {joined}",
                param="target_modules",
            )
    if not everything:
        raise AdapterError(f"{CONFIG}: target_modules matches no module of this base", param="target_modules")
    if isinstance(config, LoraConfig):
        for field, keys in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
            for key in keys:
                if not any(re.match(rf"(.*\.)?({key})$", module) for module in everything):
                    raise AdapterError(f"{CONFIG}: {field}: {key!r} matches no targeted module", param=field)


def _check_embedding(config: AdapterConfig, everything: Targeted) -> None:
    if EMBED not in everything:
        return
    if not isinstance(config, LoraConfig):
        reason = f"{config.kind} of the embedding has no normal form"
    elif config.use_dora:
        reason = "DoRA of the embedding is not supported"
    else:
        return
    raise AdapterError(f"{CONFIG}: target_modules names {EMBED}: {reason}", param="target_modules")


def _check_overlap(everything: Targeted) -> None:
    seen: dict[Site, str] = {}
    for module, sites in everything.items():
        for site in sites:
            if site in seen:
                raise AdapterError(
                    f"{CONFIG}: target_modules names {module} and {seen[site]}, which hold the same weights",
                    param="target_modules",
                )
            seen[site] = module


def _check_inputs(config: Ia3Config, everything: Targeted) -> None:
    for module, sites in everything.items():
        if config.is_feedforward(module) and sites[0].role != "down":
            raise AdapterError(
                f"{CONFIG}: feedforward_modules names {module}: a vector on its input has no normal form",
                hint="only down_proj, whose input is up times gate, can be there",
                param="feedforward_modules",
            )
