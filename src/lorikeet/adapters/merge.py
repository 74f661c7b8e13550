"""Merging LoRA adapters into one, with the meaning of PEFT's `add_weighted_adapter`.

An adapter i changes a layer by `s_i B_i A_i`; it has a weight `w_i`. The methods, and where they come from:

    cat               sum of w_i s_i B_i A_i, exact: the pairs side by side, ranks add up
    svd               the same sum, its best approximation of rank `svd_rank`
    linear            A = sum of sqrt(w_i s_i) A_i, B likewise (with cross terms: B_i A_j); ranks stay
    magnitude_prune   linear, after each tensor lost all but its largest values
    dare_linear       linear, after each tensor lost random values and was rescaled (Yu et al. 2024, "DARE")
    ties              as magnitude_prune, but a value counts only where it has the sign that the majority of adapters
                      has there, and what counts is averaged (Yadav et al. 2023, "TIES-Merging")
    dare_ties         ties, with the pruning of dare
    <method>_svd      the last four on the whole change `s_i B_i A_i` instead of on A and B; then as `svd`

What PEFT leaves open or gets wrong, and what happens here:

- Ranks that differ. A method that works on A and B element by element has no meaning then, and PEFT refuses. Here, as
  soon as the ranks of one module differ, the whole merge works on the changes: `linear` gives the exact sum (`cat`, or
  `svd` where `svd_rank` says so), another method what its `_svd` form gives, each module at rank `svd_rank` or, without
  it, the sum of its adapters' ranks.
- Adapters on different modules: a module takes what the adapters that have it say; the others count as zero, and in
  `ties` they have no vote (as in PEFT).
- Negative weights subtract (as in PEFT): the sign goes to A.
- Scales (rsLoRA, `rank_pattern`, `alpha_pattern`) go into the tensors, so that the result has scale 1 everywhere. PEFT
  copies `use_rslora` from the first adapter, which multiplies a merged adapter by the square root of its rank.
- One adapter alone is merged by the method asked for; PEFT takes `linear` whatever is asked.
- Without `svd_rank` the `svd` forms keep the largest rank that any adapter has on any module (PEFT: that its config
  has). A rank is never larger than the change can have; PEFT fills up with zeros.

Random pruning draws from one generator, seeded by `seed`, in PEFT's order: module after module as the model has them,
in each first A of every adapter, then B (for `_svd` forms the change). So the same inputs and seed give the same
result everywhere, and what PEFT computes when its global generator is seeded just before it begins to draw.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from lorikeet import __version__
from lorikeet.adapters.configs import CONFIG, LoraConfig
from lorikeet.adapters.files import WEIGHTS, AdapterFile, Array, Lock, Part, read_lock, stored_name, write_peft
from lorikeet.errors import AdapterError, ConfigError, LockMismatchError
from lorikeet.model.names import FUSED, MODULES
from lorikeet.types import MergeMethod, MergeSpec, SignMethod

if TYPE_CHECKING:
    from torch import Generator

METHODS: tuple[MergeMethod, ...] = get_args(MergeMethod)
SIGN_METHODS: tuple[SignMethod, ...] = get_args(SignMethod)
VERSION = 2  # part of the key: raise it when a method changes its results

# Of the search for eigenvectors: columns beside twice those wanted, rounds before all are computed, and what may be
# left over of a vector, as a share of the largest eigenvalue.
_SPARE, _ROUNDS, _LEFT_OVER = 8, 24, 1e-11
_AT_ONCE = 2**15  # values of a tensor that are combined at a time: what is made of them stays in the cache
_IN_LAYER = re.compile(r"(?:.*?\.)?(\d+)\.(.+)")
_ORDER = {name: place for place, name in enumerate(MODULES.values())}


def check_spec(spec: MergeSpec) -> None:
    """Raise ConfigError naming the first field that makes no sense, alone or with the others."""
    if not spec.adapters:
        raise _field("adapters", "at least one", "none")
    if len(spec.weights) != len(spec.adapters):
        raise _field("weights", f"one for each of {len(spec.adapters)} adapters", len(spec.weights))
    for weight in spec.weights:
        if not math.isfinite(weight):
            raise _field("weights", "finite numbers", weight)
    if spec.method not in METHODS:
        raise _field("method", " | ".join(METHODS), spec.method)
    _check_density(spec)
    _check_sign_method(spec)
    if not 0 <= spec.seed < 2**63:
        raise _field("seed", "an integer from 0 to 2^63 - 1", spec.seed)
    if spec.svd_rank is not None and spec.svd_rank < 1:
        raise _field("svd_rank", "a positive integer", spec.svd_rank)
    if spec.svd_rank is not None and spec.method == "cat":
        raise _field("svd_rank", "none with method cat, which keeps all ranks", spec.svd_rank)


def _check_density(spec: MergeSpec) -> None:
    if spec.prunes and (spec.density is None or not 0 < spec.density <= 1):
        raise _field("density", f"a number above 0 and up to 1 with method {spec.method}", spec.density)
    if not spec.prunes and spec.density is not None:
        raise _field("density", f"none with method {spec.method}, which prunes nothing", spec.density)


def _check_sign_method(spec: MergeSpec) -> None:
    if spec.majority_sign_method not in (None, *SIGN_METHODS):
        raise _field("majority_sign_method", " | ".join(SIGN_METHODS), spec.majority_sign_method)
    if not spec.votes and spec.majority_sign_method is not None:
        expected = f"none with method {spec.method}, which elects no sign"
        raise _field("majority_sign_method", expected, spec.majority_sign_method)


def _field(name: str, expected: str, found: object) -> ConfigError:
    return ConfigError(f"merge: {name}: expected {expected}, found {found}", param=name)


def merge_key(spec: MergeSpec, digests: Sequence[str]) -> str:
    """sha256 that names the result: what merges the same contents the same way has the same key.

    `digests` are the content hashes of the adapters, in the order of `spec.adapters`; their names do not count.
    """
    sign = (spec.majority_sign_method or "total") if spec.votes else None
    seed = spec.seed if spec.draws else None
    parts = [VERSION, list(digests), list(spec.weights), spec.method, spec.density, sign, seed, spec.svd_rank]
    return hashlib.sha256(msgspec.msgpack.encode(parts)).hexdigest()


@dataclass(frozen=True, slots=True)
class Pair:
    """What one adapter has on a module: A [r, d_in], B [d_out, r] fp32, its scale s and its weight in the merge."""

    a: Array
    b: Array
    scale: float
    weight: float

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    def change(self) -> Array:
        """s B A, [d_out, d_in]."""
        product: Array = (self.b @ self.a) * np.float32(self.scale)
        return product


@dataclass(frozen=True)
class Source:
    """An adapter to be merged: its name for messages, its config, tensors as `AdapterFile.load` gives them."""

    name: str
    config: LoraConfig
    tensors: dict[tuple[str, Part], Array]
    digest: str


@dataclass(frozen=True)
class Merged:
    """A plain LoRA of scale 1: `pairs` maps modules to (A [r, d_in], B [r, d_out]), as `write_peft` takes them."""

    config: LoraConfig
    pairs: dict[str, tuple[Array, Array]]


def read_source(folder: Path) -> Source:
    """The adapter in `folder`. AdapterError, naming the kind, where it is more than A, B and a scale."""
    with AdapterFile(folder) as file:
        if not isinstance(file.config, LoraConfig) or not file.config.is_plain:
            raise AdapterError(
                f"{folder.name}: {CONFIG}: expected plain LoRA, found {file.config.kind}",
                hint="only plain LoRA (rsLoRA and patterns included) can be merged",
            )
        tensors, digest = file.load()
        return Source(folder.name, file.config, tensors, digest)


def merge(spec: MergeSpec, sources: Sequence[Source], report: Callable[[int, int], None] | None = None) -> Merged:
    """One LoRA of several; `sources` in the order of `spec.adapters`. `report` hears of (modules done, modules).

    Raises ConfigError for a spec that makes no sense, AdapterError for adapters that do not fit each other.
    """
    check_spec(spec)
    pairs = _collect(spec, sources)
    unequal = any(len({pair.rank for pair in found}) > 1 for found in pairs.values())
    if spec.svd_rank is not None and not (unequal or spec.method.endswith("svd")):
        hint = "use the method's svd form" if spec.prunes else "use svd"
        raise ConfigError(
            f"merge: svd_rank: found {spec.svd_rank}, but the ranks are equal and method {spec.method} keeps them",
            hint=hint,
            param="svd_rank",
        )
    rule = _Rule(spec, unequal, largest=max(pair.rank for found in pairs.values() for pair in found))
    merged: dict[str, tuple[Array, Array]] = {}
    for done, (module, found) in enumerate(pairs.items()):
        if report is not None:
            report(done, len(pairs))
        with np.errstate(over="ignore", invalid="ignore"):
            a, b = rule.apply(found)
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise AdapterError(f"merge: {module}: the result is too large for fp32", hint="use smaller weights")
        merged[module] = (np.ascontiguousarray(a, np.float32), np.ascontiguousarray(b.T, np.float32))
    if report is not None:
        report(len(pairs), len(pairs))
    return Merged(_result_config(sources, {module: len(a) for module, (a, _) in merged.items()}), merged)


def _collect(spec: MergeSpec, sources: Sequence[Source]) -> dict[str, list[Pair]]:
    """The pairs of every module, in the order of modules in the model; shapes and targets are checked."""
    pairs: dict[str, list[Pair]] = {}
    for source, weight in zip(sources, spec.weights, strict=True):
        _check_parts(source)
        for module in dict.fromkeys(module for module, _ in source.tensors):
            pair = _pair(source, module, weight)
            others = pairs.setdefault(module, [])
            if others and (others[0].a.shape[1], others[0].b.shape[0]) != (pair.a.shape[1], pair.b.shape[0]):
                raise AdapterError(
                    f"{source.name}: {module}: expected {others[0].a.shape[1]} inputs and {others[0].b.shape[0]} "
                    f"outputs as in the adapters before it, found {pair.a.shape[1]} and {pair.b.shape[0]}",
                    hint="merge adapters of one base",
                    param=module,
                )
            others.append(pair)
    _check_fused(pairs)
    return {module: pairs[module] for module in sorted(pairs, key=_place)}


def _check_parts(source: Source) -> None:
    for module, part in source.tensors:
        if part not in ("A", "B"):
            raise AdapterError(
                f"{source.name}: {WEIGHTS}: {stored_name(module, part)}: only pairs on linear layers can be merged",
                hint="a table that peft saved beside them is left out with save_embedding_layers=False",
                param=module,
            )


def _check_fused(pairs: Mapping[str, Any]) -> None:
    """One adapter on a fused module and another on one of its parts would be two adapters of the same weights."""
    for module in pairs:
        for fused, roles in FUSED.items():
            stem = module.removesuffix(fused)
            both = [stem + MODULES[role] for role in roles if stem != module and stem + MODULES[role] in pairs]
            if both:
                message = f"merge: an adapter is on {module} and another on {both[0]}, which hold the same weights"
                raise AdapterError(message, hint="save both with the same module names", param=module)


def _pair(source: Source, module: str, weight: float) -> Pair:
    try:
        a, b = source.tensors[module, "A"], source.tensors[module, "B"]
    except KeyError as error:
        missing = f"{source.name}: {WEIGHTS}: {module}.lora_{error.args[0][1]}.weight is missing"
        raise AdapterError(missing, param=module) from None
    rank = source.config.rank_of(module)
    if a.shape[0] != rank or b.shape[1] != rank:
        raise AdapterError(
            f"{source.name}: {WEIGHTS}: {module}: expected rank {rank} as {CONFIG} says, found lora_A {list(a.shape)} "
            f"and lora_B {list(b.shape)}",
            param=module,
        )
    if not (_all_linear(source.config) or source.config.targets(module)):
        raise AdapterError(
            f"{source.name}: {WEIGHTS}: {module}: not among the modules that {CONFIG} targets", param=module
        )
    return Pair(a, b, source.config.scale_of(module), weight)


def _all_linear(config: LoraConfig) -> bool:
    return isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"


def _place(module: str) -> tuple[int, int, str]:
    """Layer by layer, in a layer as the model has its modules; what stands outside of the layers comes last."""
    match = _IN_LAYER.fullmatch(module)
    if match is None:
        return (2**31, 0, module)
    return (int(match[1]), _ORDER.get(match[2], len(_ORDER)), module)


# --- the methods --------------------------------------------------------------------------------------------------


class _Rule:
    """A method, ready to be applied to module after module: what is random goes on from one to the next."""

    def __init__(self, spec: MergeSpec, unequal: bool, largest: int) -> None:
        self._kind = spec.method.removesuffix("_svd")  # what to do with tensors: as in `_combined`, or cat, svd
        self._on_changes = unequal or spec.method.endswith("_svd")
        if unequal and self._kind == "linear":
            self._kind = "cat" if spec.svd_rank is None else "svd"
        by_sum = unequal and not spec.method.endswith("svd")
        self._rank = spec.svd_rank or (None if by_sum else largest)
        self._density = spec.density or 1.0
        self._by_value = spec.majority_sign_method != "frequency"
        self._generator = _generator(spec.seed) if spec.draws else None

    def apply(self, pairs: Sequence[Pair]) -> tuple[Array, Array]:
        """A [r, d_in] and B [d_out, r] of the merged module."""
        total = sum(pair.rank for pair in pairs)
        rank = total if self._rank is None else self._rank
        if self._kind in ("cat", "svd"):
            a = np.concatenate([pair.a * np.float32(pair.weight) * np.float32(pair.scale) for pair in pairs])
            b = np.concatenate([pair.b for pair in pairs], axis=1)
            return (a, b) if self._kind == "cat" else _shortened(a, b, rank)
        if self._on_changes:
            changes = [pair.change() for pair in pairs]
            return _factored(self._combined(changes, [pair.weight for pair in pairs]), rank)
        products = [pair.weight * pair.scale for pair in pairs]
        roots = [math.sqrt(abs(product)) for product in products]
        signed = [math.copysign(root, product) for root, product in zip(roots, products, strict=True)]
        a = self._combined([pair.a for pair in pairs], signed)
        b = self._combined([pair.b for pair in pairs], roots)
        return a, b

    def _combined(self, tensors: Sequence[Array], weights: Sequence[float]) -> Array:
        """Tensors of one shape -> one of that shape: prune, then the weighted sum or what wins the vote."""
        pruned = [self._pruned(tensor) for tensor in tensors]
        combined = np.empty_like(pruned[0])
        rows = max(1, _AT_ONCE // combined.shape[1])
        for start in range(0, len(combined), rows):
            part = slice(start, start + rows)
            combined[part] = self._voted(np.stack([tensor[part] for tensor in pruned]), weights)
        return combined

    def _voted(self, stacked: Array, weights: Sequence[float]) -> Array:
        weighted = stacked * np.array(weights, np.float32).reshape(-1, 1, 1)
        if not self._kind.endswith("ties"):
            summed: Array = weighted.sum(axis=0)
            return summed
        signs = np.sign(stacked)
        majority = np.where((stacked if self._by_value else signs).sum(axis=0) >= 0, np.float32(1), np.float32(-1))
        winners = signs == majority
        mean: Array = (weighted * winners).sum(axis=0) / np.maximum(winners.sum(axis=0), 1).astype(np.float32)
        return mean

    def _pruned(self, tensor: Array) -> Array:
        if self._kind == "linear" or self._density >= 1:
            return tensor
        if self._generator is not None:
            return tensor * _drawn(tensor.shape, self._density, self._generator) / np.float32(self._density)
        return tensor * _largest(tensor, self._density)


def _factored(change: Array, rank: int) -> tuple[Array, Array]:
    """The best approximation B A of `change` [d_out, d_in] of this rank (Eckart and Young), A's rows of length one.

    The eigenvectors of the smaller Gram matrix, in fp64, span what an SVD finds, in a fraction of its time and closer
    to the truth than one in fp32, PEFT's, which is off by some 1e-5 where singular values lie close.
    """
    wide = change if change.shape[0] <= change.shape[1] else change.T
    square = wide.astype(np.float64)
    kept = _leading(square @ square.T, rank)
    rest = kept.T @ square
    length = np.maximum(np.linalg.norm(rest, axis=1), np.finfo(np.float64).tiny)
    a, b = (rest / length[:, None], kept * length) if wide is change else (kept.T, rest.T)
    return a.astype(np.float32), b.astype(np.float32)


def _leading(gram: NDArray[np.float64], rank: int) -> NDArray[np.float64]:
    """Eigenvectors [n, rank] of the largest eigenvalues of a symmetric [n, n], the largest first.

    Subspace iteration from random columns, always the same (Halko, Martinsson and Tropp 2011), until nothing is left
    over that fp64 could tell from rounding. Where the eigenvalues lie so close that it does not come to that, and
    where most of the vectors are wanted, all are computed.
    """
    columns = 2 * rank + _SPARE
    if 4 * columns < len(gram):
        basis = np.random.default_rng(0).standard_normal((len(gram), columns))
        for _ in range(_ROUNDS):
            basis, _ = np.linalg.qr(gram @ basis)
            image = gram @ basis
            values, turned = np.linalg.eigh(basis.T @ image)  # ascending
            values, turned = values[::-1][:rank], turned[:, ::-1][:, :rank]
            vectors: NDArray[np.float64] = basis @ turned
            left = np.linalg.norm(image @ turned - vectors * values, axis=0)
            if left.max() <= _LEFT_OVER * values[0]:
                return vectors
            basis = image
    return np.linalg.eigh(gram)[1][:, ::-1][:, :rank]


def _shortened(a: Array, b: Array, rank: int) -> tuple[Array, Array]:
    """The best approximation of B A of this rank (Eckart and Young), singular values in B.

    A [R, d_in] and B [d_out, R] are thin, so their product is never formed.
    """
    q_b, r_b = np.linalg.qr(b.astype(np.float64))
    q_a, r_a = np.linalg.qr(a.T.astype(np.float64))
    u, s, vh = np.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return (vh[:rank] @ q_a.T).astype(np.float32), (q_b @ (u[:, :rank] * s[:rank])).astype(np.float32)


# Which values pruning keeps is decided by torch, as in PEFT: by its random numbers, and by its choice among values of
# equal magnitude (bf16 adapters have many). Imported here, because the rest of a merge does without.


def _generator(seed: int) -> Generator:
    import torch

    return torch.Generator().manual_seed(seed)


def _drawn(shape: tuple[int, ...], density: float, generator: Generator) -> Array:
    """1 with probability `density`, else 0."""
    import torch

    mask: Array = torch.bernoulli(torch.full(shape, density), generator=generator).numpy()
    return mask


def _largest(tensor: Array, density: float) -> NDArray[np.float32]:
    """1 at the largest magnitudes, a share of `density` of all (rounded down), else 0."""
    magnitudes = np.abs(tensor).reshape(-1)
    count = int(density * tensor.size)
    if count == 0:
        return np.zeros(tensor.shape, np.float32)
    smallest = np.partition(magnitudes, tensor.size - count)[tensor.size - count]
    mask = magnitudes >= smallest
    if np.count_nonzero(mask) > count:  # of those equal to it not all are kept
        import torch

        mask = np.zeros(tensor.size, np.bool_)
        mask[torch.topk(torch.from_numpy(magnitudes), k=count).indices.numpy()] = True
    kept: Array = mask.reshape(tensor.shape).astype(np.float32)
    return kept


# --- the result ---------------------------------------------------------------------------------------------------


def _result_config(sources: Sequence[Source], ranks: dict[str, int]) -> LoraConfig:
    """Scale 1 on every module (alpha = rank), whose ranks are `ranks`."""
    common = Counter(ranks.values()).most_common(1)[0][0]
    by_name: dict[str, set[int]] = {}
    for module, rank in ranks.items():
        by_name.setdefault(module.rsplit(".", 1)[-1], set()).add(rank)
    pattern: dict[str, int] = {}
    for module, rank in ranks.items():
        name = module.rsplit(".", 1)[-1]
        if by_name[name] != {common}:
            pattern[name if len(by_name[name]) == 1 else module] = rank
    return LoraConfig(
        r=common,
        alpha=common,
        rank_pattern=pattern,
        alpha_pattern={name: float(rank) for name, rank in pattern.items()},
        **_result_targets([source.config for source in sources], ranks),
    )


def _result_targets(configs: Sequence[LoraConfig], modules: dict[str, int]) -> dict[str, Any]:
    """What the adapters target together, in their own words where these can be put together, else module by module."""

    def fields(config: LoraConfig) -> dict[str, Any]:
        names = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
        return {name: getattr(config, name) for name in names}

    if all(fields(config) == fields(configs[0]) for config in configs):
        return fields(configs[0])
    narrowed = any(config.exclude_modules or config.layers_to_transform is not None for config in configs)
    if narrowed or any(isinstance(config.target_modules, str) for config in configs):
        return {"target_modules": tuple(modules)}
    return {"target_modules": tuple(sorted({name for config in configs for name in config.target_modules}))}


def merged_lock(names: Sequence[str], locks: Sequence[Lock | None]) -> Lock | None:
    """The lock of a merged adapter; None where no adapter has one.

    Base, tokenizer and stop ids must agree; the template, recipe and data stay only where all are the same. Raises
    LockMismatchError naming what differs, or the adapter that has no lock while another has one.
    """
    found = [lock for lock in locks if lock is not None]
    if not found:
        return None
    if len(found) < len(locks):
        without = next(name for name, lock in zip(names, locks, strict=True) if lock is None)
        raise LockMismatchError(
            f"merge: {without} has no lorikeet.json, while others have one",
            hint="nothing says that it was trained for the same base; remove the others' lorikeet.json if it was",
        )
    first = found[0]
    for name, lock in zip(names, found, strict=True):
        for what, expected, value in (
            ("base.sha256", first.base.sha256, lock.base.sha256),
            ("tokenizer_sha256", first.tokenizer_sha256, lock.tokenizer_sha256),
            ("stop_ids", sorted(first.stop_ids), sorted(lock.stop_ids)),
        ):
            if value != expected:
                message = f"merge: {name}: lorikeet.json: {what}: expected {expected} as in {names[0]}, found {value}"
                raise LockMismatchError(message, hint="merge adapters of one base", param=what)

    def shared(field: str) -> Any:
        values = [getattr(lock, field) for lock in found]
        return values[0] if all(value == values[0] for value in values) else None

    return msgspec.structs.replace(
        first,
        template=shared("template"),
        recipe_sha256=shared("recipe_sha256"),
        data_sha256=shared("data_sha256"),
        code_version=__version__,
    )


def merge_folders(
    spec: MergeSpec,
    folders: Sequence[Path],
    output: Path,
    *,
    force: bool = False,
    report: Callable[[int, int], None] | None = None,
) -> Merged:
    """Merge the PEFT directories `folders` (in the order of `spec.adapters`) into the PEFT directory `output`.

    It appears whole or not at all, with a lock as `merged_lock` says. Raises ConfigError where `output` is in the way:
    anything that is there without `force`, an input or what is no adapter even with it.
    """
    check_spec(spec)
    _check_output(folders, output, force)
    lock = merged_lock(spec.adapters, [read_lock(folder) for folder in folders])
    merged = merge(spec, [read_source(folder) for folder in folders], report)
    base_name = lock.base.name if lock is not None else _base_name(folders[0])
    write_peft(output, merged.config, merged.pairs, base_name=base_name, lock=lock)
    return merged


def _check_output(folders: Sequence[Path], output: Path, force: bool) -> None:
    if not (output.exists() or output.is_symlink()):
        return
    if any(output.resolve() == folder.resolve() for folder in folders):
        raise ConfigError(f"--output: {output} is one of the adapters to merge", param="output")
    if not (output / CONFIG).exists() or output.is_symlink():
        raise ConfigError(f"--output: {output} exists and is not an adapter's folder", param="output")
    if not force:
        raise ConfigError(f"--output: {output} exists", hint="--force replaces it", param="output")


def _base_name(folder: Path) -> str:
    name = json.loads((folder / CONFIG).read_text("utf-8")).get("base_model_name_or_path")
    return name if isinstance(name, str) else ""
