"""Tensor parallelism: what each of several processes holds of one model. No torch.

Layers that read the residual stream (q, k, v, gate, up) are divided by outputs, those that write to it (o, down) by
inputs: attention and MLP need nothing of the other processes, and one sum after `o` and one after `down` make the
stream whole again (Megatron-LM, Shoeybi et al. 2019). A low-rank pair is divided as its layer is: B by outputs, or A by
inputs, and the partial result of B (A x) is part of the sum. Rank and scale stay what they are.

The embedding is whole everywhere: a lookup takes no time, and a sum would. The head is divided by tokens: it is as
large as several layers, and a step reads all of it. Adapters' own tables and norms are whole everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from lorikeet.errors import ConfigError
from lorikeet.model.spec import ModelSpec

BY_OUTPUTS = ("q", "k", "v", "gate", "up")
BY_INPUTS = ("o", "down")
WHOLE = slice(None)


@dataclass(frozen=True)
class Shard:
    """What rank `rank` of `ranks` holds of the model `whole`. Raises ConfigError where the model does not divide."""

    whole: ModelSpec
    rank: int = 0
    ranks: int = 1

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.ranks
        spec, ranks = self.whole, self.ranks
        for field, value in (("attention heads", spec.num_heads), ("intermediate size", spec.intermediate_size)):
            if value % ranks:
                raise _indivisible(ranks, f"a divisor of the model's {field}, {value}")
        if spec.num_kv_heads % ranks and ranks % spec.num_kv_heads:
            raise _indivisible(ranks, f"a divisor or a multiple of the model's key-value heads, {spec.num_kv_heads}")
        if spec.vocab_size < ranks:
            raise _indivisible(ranks, f"at most the model's vocabulary, {spec.vocab_size}")

    @cached_property
    def local(self) -> ModelSpec:
        """The model as this rank computes it: with its heads and its part of the MLP, and the whole vocabulary.

        Where there are fewer key-value heads than ranks, several ranks hold the same one.
        """
        spec = self.whole
        if self.ranks == 1:
            return spec
        return replace(
            spec,
            num_heads=spec.num_heads // self.ranks,
            num_kv_heads=max(spec.num_kv_heads // self.ranks, 1),
            intermediate_size=spec.intermediate_size // self.ranks,
        )

    def outputs(self, role: str) -> slice:
        """Which outputs of the whole model's site of this role are computed here."""
        return self._part(role) if role in BY_OUTPUTS else WHOLE

    def inputs(self, role: str) -> slice:
        """Which inputs of the whole model's site of this role are read here."""
        return self._part("q" if role == "o" else "up") if role in BY_INPUTS else WHOLE

    @property
    def head(self) -> slice:
        """The tokens whose logits are computed here; parts differ by one where they cannot be equal."""
        tokens = self.whole.vocab_size
        return slice(tokens * self.rank // self.ranks, tokens * (self.rank + 1) // self.ranks)

    def _part(self, role: str) -> slice:
        if self.ranks == 1:
            return WHOLE
        if role in ("k", "v"):
            first = self.rank * self.whole.num_kv_heads // self.ranks * self.whole.head_dim
            return slice(first, first + self.local.kv_size)
        width = self.local.q_size if role == "q" else self.local.intermediate_size
        return slice(self.rank * width, (self.rank + 1) * width)


def _indivisible(ranks: int, expected: str) -> ConfigError:
    return ConfigError(
        f"tensor_parallel: found {ranks}; expected {expected}",
        hint="lower --tensor-parallel",
        param="tensor_parallel",
    )
