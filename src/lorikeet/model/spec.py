"""What distinguishes one decoder family from another, as flags of one dataclass. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from lorikeet.types import ROLES, Site, SiteGroup


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Long-context scaling of the rotary frequencies: `linear` or `llama3` (the only kinds that we compute)."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A pre-norm decoder with rotary positions, grouped-query attention and a gated MLP."""

    family: str  # llama | mistral | qwen2 | qwen3
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head of q and k, before rope (Qwen3)
    windows: tuple[int | None, ...] = ()  # attention window of each layer; empty: full attention everywhere
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """Every site of the model; `sites[i].index == i`."""
        h, m, q, kv = self.hidden_size, self.intermediate_size, self.q_size, self.kv_size
        shapes = {"q": (h, q), "k": (h, kv), "v": (h, kv), "o": (q, h), "gate": (h, m), "up": (h, m), "down": (m, h)}
        keys: list[tuple[int | None, str, int, int]] = [
            (layer, role, *shapes[role]) for layer in range(self.num_layers) for role in ROLES
        ]
        keys += [(None, "embed", self.vocab_size, h), (None, "head", h, self.vocab_size)]
        return tuple(Site(i, *key) for i, key in enumerate(keys))

    @cached_property
    def residual_sites(self) -> tuple[Site, ...]:
        """The residual stream after each layer; their indices follow those of `sites`."""
        first, h = len(self.sites), self.hidden_size
        return tuple(Site(first + layer, layer, "residual", h, h) for layer in range(self.num_layers))

    def site(self, layer: int | None, role: str) -> Site:
        """The site of `role` in `layer` (None for embed and head)."""
        if layer is None:
            return self.sites[self.num_layers * len(ROLES) + ("embed", "head").index(role)]
        return self.sites[layer * len(ROLES) + ROLES.index(role)]

    @cached_property
    def groups(self) -> tuple[dict[str, SiteGroup], ...]:
        """For each layer the four products `qkv`, `o`, `gate_up`, `down`."""

        def group(layer: int, *roles: str) -> SiteGroup:
            sites = tuple(self.site(layer, role) for role in roles)
            offsets = tuple(sum(s.d_out for s in sites[:i]) for i in range(len(sites)))
            return SiteGroup(sites, offsets)

        return tuple(
            {
                "qkv": group(layer, "q", "k", "v"),
                "o": group(layer, "o"),
                "gate_up": group(layer, "gate", "up"),
                "down": group(layer, "down"),
            }
            for layer in range(self.num_layers)
        )
