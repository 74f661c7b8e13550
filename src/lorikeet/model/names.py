"""The one map between published module names and roles, for checkpoints and adapters both. No torch."""

from __future__ import annotations

import re

from lorikeet.model.spec import ModelSpec
from lorikeet.types import ROLES, Site

MODULES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
# What some trainers call products that read the same input, and the roles whose rows they hold one below the other.
FUSED = {"self_attn.qkv_proj": ("q", "k", "v"), "mlp.gate_up_proj": ("gate", "up")}
NORMS = {
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
}
EMBED, HEAD, FINAL_NORM = "model.embed_tokens", "lm_head", "model.norm"
TARGETS = tuple(name.rsplit(".", 1)[1] for name in MODULES.values())  # what PEFT's target_modules calls them

_ROLE_OF = {name: role for role, name in MODULES.items()} | {EMBED: "embed", HEAD: "head"}
_IN_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def layer_module(layer: int, name: str) -> str:
    """`layer_module(3, MODULES["q"])` is `model.layers.3.self_attn.q_proj`."""
    return f"model.layers.{layer}.{name}"


def module_of(site: Site) -> str:
    """Published name of the module at a site, without `.weight`."""
    if site.layer is None:
        return EMBED if site.role == "embed" else HEAD
    return layer_module(site.layer, MODULES[site.role])


def site_of(module: str, spec: ModelSpec) -> Site | None:
    """The site of a published module name, or None where the model has no such place."""
    match = _IN_LAYER.fullmatch(module)
    layer, name = (int(match[1]), match[2]) if match else (None, module)
    role = _ROLE_OF.get(name)
    if role is None or (role in ROLES) != (layer is not None) or (layer is not None and layer >= spec.num_layers):
        return None
    return spec.site(layer, role)


def sites_of(module: str, spec: ModelSpec) -> tuple[Site, ...]:
    """The sites of a published or fused module name, in the order of its rows; none where there is no such place."""
    match = _IN_LAYER.fullmatch(module)
    if match is not None and match[2] in FUSED and int(match[1]) < spec.num_layers:
        return tuple(spec.site(int(match[1]), role) for role in FUSED[match[2]])
    site = site_of(module, spec)
    return () if site is None else (site,)


def norm_of(module: str, spec: ModelSpec) -> tuple[str, int | None] | None:
    """(role, layer) of a norm over the residual stream: `attn_norm`, `mlp_norm`, or `norm` after the last layer."""
    if module == FINAL_NORM:
        return "norm", None
    match = _IN_LAYER.fullmatch(module)
    role = next((role for role in ("attn_norm", "mlp_norm") if match and match[2] == NORMS[role]), None)
    return (role, int(match[1])) if match and role and int(match[1]) < spec.num_layers else None


def module_names(spec: ModelSpec) -> list[str]:
    """Every module that an adapter may name: those of the sites, and the fused ones."""
    fused = [layer_module(layer, name) for layer in range(spec.num_layers) for name in FUSED]
    return [*map(module_of, spec.sites), *fused]


def checkpoint_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of this spec holds, by published name, with its shape.

    A tied head is not among them: the embedding is the head.
    """
    shapes: dict[str, tuple[int, ...]] = {f"{EMBED}.weight": (spec.vocab_size, spec.hidden_size)}
    biased = dict.fromkeys(("q", "k", "v"), spec.qkv_bias) | {"o": spec.o_bias}
    for site in spec.sites:
        if site.layer is None:
            continue
        module = module_of(site)
        shapes[f"{module}.weight"] = (site.d_out, site.d_in)
        if biased.get(site.role, spec.mlp_bias):
            shapes[f"{module}.bias"] = (site.d_out,)
    sizes = {"attn_norm": spec.hidden_size, "mlp_norm": spec.hidden_size}
    if spec.qk_norm:
        sizes |= {"q_norm": spec.head_dim, "k_norm": spec.head_dim}
    for layer in range(spec.num_layers):
        for norm, size in sizes.items():
            shapes[f"{layer_module(layer, NORMS[norm])}.weight"] = (size,)
    shapes[f"{FINAL_NORM}.weight"] = (spec.hidden_size,)
    if not spec.tie_embeddings:
        shapes[f"{HEAD}.weight"] = (spec.vocab_size, spec.hidden_size)
    return shapes
