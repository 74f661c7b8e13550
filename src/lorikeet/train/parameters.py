"""The trained parameters of one adapter: one flat master buffer, its gradient, and what the kernels multiply with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorikeet.model.spec import ModelSpec
from lorikeet.types import Site, SiteGroup


@dataclass(slots=True)
class GroupPair:
    """All trained pairs of one site group, stacked: the group costs two products, whatever sites are trained.

    `a` is [R, d_in]; `b` is [R, d_out], block diagonal over the group's sites, so that `h @ b` adds each site's
    low-rank part to its own columns. Both in compute dtype. `blocks` holds for each site its rows of R, its columns
    of d_out, and the views of B and of B's gradient in the master buffers.
    """

    a: Tensor
    b: Tensor
    grad_a: Tensor
    blocks: list[tuple[slice, slice, Tensor, Tensor]]


class AdapterParameters:
    """LoRA pairs A [r, d_in], B [r, d_out] at the chosen sites, as views of one flat buffer.

    `data` and `grad` are flat, in `dtype` (fp32, or fp64 for tests), first every A, then every B: clipping and the
    optimizer are a handful of operations whatever the number of sites. After `data` has changed, `refresh()` brings
    the copies that kernels multiply with up to date. `scale` is the s of `y + s B A x`.
    """

    def __init__(
        self,
        spec: ModelSpec,
        roles: Sequence[str],
        rank: int,
        scale: float,
        *,
        compute_dtype: torch.dtype = torch.float32,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.rank, self.scale, self.roles = rank, scale, tuple(roles)
        groups = [(group, _trained_sites(group, roles)) for layer in spec.groups for group in layer.values()]
        groups = [(group, sites) for group, sites in groups if sites]
        self.sites = [site for _, sites in groups for site, _ in sites]
        size_a = rank * sum(site.d_in for site in self.sites)
        self.data = torch.zeros(size_a + rank * sum(site.d_out for site in self.sites), dtype=dtype)
        self.grad = torch.zeros_like(self.data)
        self.anchor = torch.zeros((), requires_grad=True)  # what autograd sees in place of the parameters
        self.pairs: dict[int, tuple[Tensor, Tensor]] = {}  # site index -> views of A and B in `data`
        self._master_a = self.data[:size_a]
        self._compute_a = self._master_a if compute_dtype == dtype else self._master_a.to(compute_dtype)
        self._groups: dict[int, GroupPair] = {}
        at_a, at_b = 0, size_a
        for group, sites in groups:
            rows = rank * len(sites)
            stop_a = at_a + rows * group.d_in
            blocks = []
            for i, (site, offset) in enumerate(sites):
                in_b = slice(at_b, at_b + rank * site.d_out)
                at_b = in_b.stop
                a = self.data[at_a + i * rank * site.d_in : at_a + (i + 1) * rank * site.d_in].view(rank, site.d_in)
                b, grad_b = self.data[in_b].view(rank, -1), self.grad[in_b].view(rank, -1)
                self.pairs[site.index] = (a, b)
                blocks.append((slice(i * rank, (i + 1) * rank), slice(offset, offset + site.d_out), b, grad_b))
            self._groups[group.sites[0].index] = GroupPair(
                a=self._compute_a[at_a:stop_a].view(rows, group.d_in),
                b=torch.zeros(rows, group.d_out, dtype=compute_dtype),
                grad_a=self.grad[at_a:stop_a].view(rows, group.d_in),
                blocks=blocks,
            )
            at_a = stop_a

    def group(self, group: SiteGroup) -> GroupPair | None:
        """The trained pairs of a group, or None where the adapter does not touch it."""
        return self._groups.get(group.sites[0].index)

    def initialise(self, seed: int) -> None:
        """A uniform in +-1/sqrt(d_in) (Kaiming with a = sqrt 5), B zero, as LoRA starts; drawn from `seed` alone."""
        generator = torch.Generator().manual_seed(seed)
        self.data.zero_()
        for a, _ in self.pairs.values():
            bound = 1 / math.sqrt(a.shape[1])
            a.copy_(torch.rand(a.shape, generator=generator).mul_(2 * bound).sub_(bound))
        self.refresh()

    def refresh(self) -> None:
        """Bring the compute copies up to date with `data`."""
        if self._compute_a is not self._master_a:
            self._compute_a.copy_(self._master_a)
        for group in self._groups.values():
            for rows, columns, b, _ in group.blocks:
                group.b[rows, columns].copy_(b)

    def named_pairs(self) -> Iterator[tuple[Site, Tensor, Tensor]]:
        """(site, A [r, d_in], B [r, d_out]) of every trained site, as views of `data`."""
        for site in self.sites:
            yield (site, *self.pairs[site.index])


def _trained_sites(group: SiteGroup, roles: Sequence[str]) -> list[tuple[Site, int]]:
    """The group's trained sites with the first output column of each."""
    return [(s, offset) for s, offset in zip(group.sites, group.offsets, strict=True) if s.role in roles]
