"""The normal form: every adapter kind compiles to entries `y = base(x) + s * B (A x)`, one a site. No torch.

A new kind is one function here and one parity test; kernels, memory and scheduler know only entries.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from lorikeet.adapters.files import CONFIG, WEIGHTS, Array, LoraConfig, Side
from lorikeet.errors import AdapterError
from lorikeet.model.names import TARGETS, module_of, site_of
from lorikeet.model.spec import ModelSpec
from lorikeet.types import ROLES, Site

Shapes = Mapping[tuple[str, Side], tuple[int, ...]]
Tensors = Mapping[tuple[str, Side], Array]


@dataclass(frozen=True, slots=True)
class Entry:
    """A low-rank pair at one site: `a` [r, d_in], `b` [r, d_out] fp32, and the scalar `scale`, not folded in."""

    site: Site
    a: Array
    b: Array
    scale: float

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])


def compile_lora(config: LoraConfig, tensors: Tensors, spec: ModelSpec) -> list[Entry]:
    """LoRA (Hu et al. 2021) and rsLoRA (Kalajdzievski 2023) -> entries in the order of their sites.

    `tensors` as `AdapterFile.load` gives them. Raises AdapterError as `check_lora` does.
    """
    sites = check_lora(config, {key: value.shape for key, value in tensors.items()}, spec)
    return [
        Entry(site, tensors[module, "A"], tensors[module, "B"].T, config.scale_of(module))
        for module, site in sites.items()
    ]


def check_lora(config: LoraConfig, shapes: Shapes, spec: ModelSpec) -> dict[str, Site]:
    """The modules that an adapter acts on, with their sites, in order of site.

    Raises AdapterError naming tensor, expected and found where the adapter does not fit the base, where a tensor is
    there that the config does not target, or where one is missing that it does.
    """
    targeted = _targeted(config, spec)
    modules = {module for module, _ in shapes}
    for module in sorted(modules - targeted.keys()):
        site = site_of(module, spec)
        if site is None:
            reason = f"this base ({spec.family}, {spec.num_layers} layers) has no such module"
        elif site.role not in ROLES:
            reason = "adapters of embedding and head are not supported"
        else:
            reason = f"not among the modules that {CONFIG} targets"
        raise AdapterError(f"{WEIGHTS}: {module}: {reason}", param=module)
    for module, site in targeted.items():
        rank = config.rank_of(module)
        expected: dict[Side, tuple[int, int]] = {"A": (rank, site.d_in), "B": (site.d_out, rank)}
        for side, shape in expected.items():
            found = shapes.get((module, side))
            if found is None:
                raise AdapterError(f"{WEIGHTS}: {module}.lora_{side}.weight is missing, but {CONFIG} targets it")
            if found != shape:
                raise AdapterError(
                    f"{WEIGHTS}: {module}.lora_{side}.weight: expected {list(shape)}, found {list(found)}",
                    hint=f"rank {rank} on a layer of {site.d_in} inputs and {site.d_out} outputs",
                    param=module,
                )
    return targeted


def _targeted(config: LoraConfig, spec: ModelSpec) -> dict[str, Site]:
    """Modules of the base that the config targets; names that match nothing, embedding and head are refused."""
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        linear = tuple(module_of(site) for site in spec.sites if site.role in ROLES)
        config = replace(config, target_modules=linear)
    everything = {module_of(site): site for site in spec.sites if config.targets(module_of(site))}
    for module, site in everything.items():
        if site.role not in ROLES:
            raise AdapterError(
                f"{CONFIG}: target_modules names {module}: adapters of embedding and head are not supported",
                hint=f"supported modules: {', '.join(TARGETS)}",
                param="target_modules",
            )
    if not isinstance(config.target_modules, str):
        modules = [module_of(site) for site in spec.sites]
        for name in config.target_modules:
            if not any(module == name or module.endswith(f".{name}") for module in modules):
                raise AdapterError(
                    f"{CONFIG}: target_modules: {name!r} matches no module of this base ({spec.family})",
                    hint=f"supported modules: {', '.join(TARGETS)}",
                    param="target_modules",
                )
    if not everything:
        raise AdapterError(f"{CONFIG}: target_modules matches no module of this base", param="target_modules")
    for name, keys in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for key in keys:
            if not any(re.match(rf"(.*\.)?({key})$", module) for module in everything):
                raise AdapterError(f"{CONFIG}: {name}: {key!r} matches no targeted module", param=name)
    return everything
