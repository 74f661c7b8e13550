"""Merging adapters. The oracle is peft's `add_weighted_adapter`, and dense arithmetic where peft refuses."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.fixtures import AdapterShape, make_adapter, oracle

from lorikeet.adapters.configs import CONFIG, LoraConfig
from lorikeet.adapters.files import AdapterFile, Lock, LockedBase, LockedTemplate, read_lock, write_lock, write_peft
from lorikeet.adapters.merge import (
    METHODS,
    Source,
    _factored,
    merge,
    merge_folders,
    merge_key,
    merged_lock,
    read_source,
)
from lorikeet.adapters.normal import check_adapter
from lorikeet.errors import AdapterError, ConfigError, LockMismatchError
from lorikeet.model.families import load_spec
from lorikeet.types import MergeSpec

Q0 = "model.layers.0.self_attn.q_proj"
OPTIONS: dict[str, dict[str, Any]] = {
    "linear": {},
    "cat": {},
    "svd": {},
    "ties": {"density": 0.4},
    "dare_linear": {"density": 0.6},
    "dare_ties": {"density": 0.7, "majority_sign_method": "frequency"},
    "magnitude_prune": {"density": 0.3},
    "ties_svd": {"density": 0.5, "majority_sign_method": "frequency"},
    "dare_linear_svd": {"density": 0.5},
    "dare_ties_svd": {"density": 0.5},
    "magnitude_prune_svd": {"density": 0.2, "svd_rank": 7},
}


@pytest.fixture(scope="session")
def trio(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three adapters of rank 4 on different modules and layers: plain, rsLoRA, and with patterns in bf16."""
    shapes = (
        AdapterShape(rank=4),
        AdapterShape(rank=4, rslora=True, targets=("q_proj", "down_proj")),
        AdapterShape(rank=4, targets=("q_proj", "v_proj"), alpha_pattern={"v_proj": 24}),
    )
    root = tmp_path_factory.mktemp("trio")
    dtypes = (torch.float32, torch.float32, torch.bfloat16)
    return [
        make_adapter(checkpoint("llama"), root / f"adapter-{i}", shape, seed=i, dtype=dtype)
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
    ]


def merge_spec(folders: Sequence[Path], weights: Sequence[float], method: str, **options: Any) -> MergeSpec:
    return MergeSpec(adapters=tuple(map(str, folders)), weights=tuple(weights), method=method, **options)  # type: ignore[arg-type]


def merged_by_peft(
    base: Path, folders: Sequence[Path], spec: MergeSpec
) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """module -> (A, B [d_out, r]) of peft's merge, drawn with the seed of the spec."""
    model = oracle(base, folders[0])
    for i, folder in enumerate(folders[1:]):
        model.load_adapter(str(folder), adapter_name=f"other-{i}")
    lora = model.base_model
    inject = lora.inject_adapter

    def seeded(*arguments: Any, **named: Any) -> None:
        inject(*arguments, **named)  # draws the values that the merge then replaces
        torch.manual_seed(spec.seed)

    lora.inject_adapter = seeded
    lora.add_weighted_adapter(
        ["default", *(f"other-{i}" for i in range(len(folders) - 1))],
        list(spec.weights),
        "merged",
        combination_type=spec.method,
        density=spec.density,
        majority_sign_method=spec.majority_sign_method or "total",
        svd_rank=spec.svd_rank,
    )
    return {
        name.removeprefix("base_model.model."): tuple(
            side["merged"].weight.detach().numpy() for side in (module.lora_A, module.lora_B)
        )
        for name, module in model.named_modules()
        if "merged" in getattr(module, "lora_A", {})
    }  # type: ignore[misc]


def close(found: NDArray[Any], expected: NDArray[Any]) -> None:
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_as_peft(method: str, checkpoint: Callable[..., Path], trio: list[Path]) -> None:
    spec = merge_spec(trio, (0.7, 0.4, -0.5), method, seed=11, **OPTIONS[method])
    ours = merge(spec, [read_source(folder) for folder in trio])
    theirs = merged_by_peft(checkpoint("llama"), trio, spec)
    assert ours.pairs.keys() == theirs.keys() and len(ours.pairs) == 21
    for module, (a, b) in ours.pairs.items():
        a_expected, b_expected = theirs[module]
        close(b.T @ a, b_expected @ a_expected)
        if not method.endswith("svd") and method != "cat":  # factors of an SVD have no sign of their own
            close(a, a_expected)
            close(b, b_expected.T)
        assert len(a) <= len(a_expected)
        assert ours.config.scale_of(module) == 1 and ours.config.rank_of(module) == len(a)


def source(name: str, seed: int, ranks: dict[str, int], whole: bool = False, **config: Any) -> Source:
    """Random tensors, 9 inputs and 7 outputs a module; `whole` numbers have many equal magnitudes."""
    generator = np.random.default_rng(seed)

    def values(*shape: int) -> NDArray[np.float32]:
        drawn = generator.integers(-3, 4, shape) if whole else generator.normal(size=shape)
        return np.asarray(drawn, np.float32)

    tensors: Any = {}
    for module, rank in ranks.items():
        tensors |= {(module, "A"): values(rank, 9), (module, "B"): values(7, rank)}
    rank = max(ranks.values())
    fields: dict[str, Any] = {"r": rank, "alpha": 2 * rank, "rank_pattern": ranks, **config}
    return Source(name, LoraConfig(target_modules=tuple(ranks), **fields), tensors, name * 64)


def change(one: Source, module: str) -> NDArray[np.float32]:
    product = one.tensors[module, "B"] @ one.tensors[module, "A"]
    return np.asarray(one.config.scale_of(module) * product, np.float32)


@given(
    data=st.data(),
    method=st.sampled_from(["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]),
    weights=st.lists(st.sampled_from([-1.5, -0.25, 0.0, 0.5, 1.0, 2.0]), min_size=1, max_size=4),
    rank=st.integers(1, 5),
    whole=st.booleans(),
    seed=st.integers(0, 2**40),
)
@settings(max_examples=60, deadline=None)
def test_element_by_element_as_peft(
    data: st.DataObject, method: str, weights: list[float], rank: int, whole: bool, seed: int
) -> None:
    from peft.utils import merge_utils

    options: dict[str, Any] = {}
    if method != "linear":
        options["density"] = data.draw(st.sampled_from([0.01, 0.2, 0.5, 0.9]))
    if method.endswith("ties"):
        options["majority_sign_method"] = data.draw(st.sampled_from(["total", "frequency"]))
    sources = [source(str(i), seed % 1000 + i, {Q0: rank}, whole) for i in range(len(weights))]
    spec = MergeSpec(
        adapters=tuple("abcd"[: len(weights)]), weights=tuple(weights), method=method, seed=seed, **options
    )  # type: ignore[arg-type]
    a, b = merge(spec, sources).pairs[Q0]
    products = [weight * one.config.scale_of(Q0) for weight, one in zip(weights, sources, strict=True)]
    roots = [math.sqrt(abs(product)) for product in products]
    signed = [root if product >= 0 else -root for root, product in zip(roots, products, strict=True)]
    function = getattr(merge_utils, "task_arithmetic" if method == "linear" else method)
    torch.manual_seed(seed)
    for ours, side, factors in ((a, "A", signed), (b.T, "B", roots)):
        tensors = [torch.from_numpy(one.tensors[Q0, side]) for one in sources]  # type: ignore[index]
        np.testing.assert_allclose(ours, function(tensors, torch.tensor(factors), **options), atol=1e-5)


# --- what peft refuses --------------------------------------------------------------------------------------------


def unequal() -> list[Source]:
    """Ranks 2 and 3 on one module, the second alone on another."""
    return [source("a", 1, {Q0: 2}), source("b", 2, {Q0: 3, Q0.replace("q_", "v_"): 3}, use_rslora=True)]


def best(matrix: NDArray[np.float32], rank: int) -> NDArray[np.float32]:
    u, s, vh = torch.linalg.svd(torch.from_numpy(matrix), full_matrices=False)
    return np.asarray((u[:, :rank] * s[:rank]) @ vh[:rank])


def test_linear_with_unequal_ranks_is_the_exact_sum() -> None:
    one, two = unequal()
    merged = merge(MergeSpec(adapters=("a", "b"), weights=(0.5, -2.0)), [one, two])
    (a, b), (a_v, b_v) = merged.pairs.values()
    assert (len(a), len(a_v)) == (5, 3)
    np.testing.assert_allclose(b.T @ a, 0.5 * change(one, Q0) - 2 * change(two, Q0), atol=1e-5)
    np.testing.assert_allclose(b_v.T @ a_v, -2 * change(two, Q0.replace("q_", "v_")), atol=1e-5)
    assert merged.config.r in (3, 5) and merged.config.rank_of(Q0) == 5


@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    true_rank=st.integers(0, 12),
    rank=st.integers(1, 14),
    seed=st.integers(0, 999),
)
@settings(max_examples=60, deadline=None)
def test_a_change_is_factored_as_well_as_its_rank_allows(
    rows: int, columns: int, true_rank: int, rank: int, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    left, right = generator.normal(size=(rows, true_rank)), generator.normal(size=(true_rank, columns))
    matrix = (left @ right).astype(np.float32)
    a, b = _factored(matrix, rank)
    assert len(a) == b.shape[1] == min(rank, rows, columns)
    values = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    found = np.linalg.norm(matrix - b.astype(np.float64) @ a)
    assert found <= np.linalg.norm(values[rank:]) * (1 + 1e-6) + 1e-5


@pytest.mark.parametrize("density", [None, 0.3, 0.6])
@pytest.mark.parametrize(("rows", "columns"), [(300, 220), (200, 500)])
def test_a_large_change_is_factored_by_the_vectors_it_keeps(
    rows: int, columns: int, density: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pruned product of rank 8: the best approximation of rank 4, and the same one every time. Where the singular
    values lie close together (None), all are computed."""
    generator = np.random.default_rng(1)
    if density is None:
        mixed = np.linalg.qr(generator.normal(size=(rows, rows)))[0] @ np.eye(rows, columns)
        change = (mixed * np.linspace(1, 0.9, columns)).astype(np.float32)
    else:
        change = (generator.normal(size=(rows, 8)) @ generator.normal(size=(8, columns))).astype(np.float32)
        change *= generator.random(change.shape) < density
    computed: list[int] = []
    usual = np.linalg.eigh

    def eigh(matrix: NDArray[Any]) -> Any:
        computed.append(len(matrix))
        return usual(matrix)

    monkeypatch.setattr(np.linalg, "eigh", eigh)
    a, b = _factored(change, 4)
    assert (max(computed) < 30) == (density is not None)
    u, s, vh = np.linalg.svd(change.astype(np.float64), full_matrices=False)
    expected = (u[:, :4] * s[:4]) @ vh[:4]
    np.testing.assert_allclose(b.astype(np.float64) @ a, expected, atol=1e-5 * s[0])
    again = _factored(change, 4)
    np.testing.assert_array_equal(again[0], a)
    np.testing.assert_array_equal(again[1], b)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_linear_with_unequal_ranks_at_a_rank_is_the_best_approximation(rank: int) -> None:
    one, two = unequal()
    a, b = merge(MergeSpec(adapters=("a", "b"), weights=(0.5, -2.0), svd_rank=rank), [one, two]).pairs[Q0]
    assert len(a) == rank
    np.testing.assert_allclose(b.T @ a, best(0.5 * change(one, Q0) - 2 * change(two, Q0), rank), atol=1e-4)


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_other_methods_with_unequal_ranks_work_on_the_changes(method: str) -> None:
    from peft.utils import merge_utils

    one, two = unequal()
    spec = MergeSpec(adapters=("a", "b"), weights=(0.5, 2.0), method=method, density=0.5, seed=3)  # type: ignore[arg-type]
    a, b = merge(spec, [one, two]).pairs[Q0]
    torch.manual_seed(3)
    changes = [torch.from_numpy(change(part, Q0)) for part in (one, two)]
    expected = getattr(merge_utils, method)(changes, torch.tensor([0.5, 2.0]), 0.5).numpy()
    np.testing.assert_allclose(b.T @ a, best(expected, 5), atol=1e-4)
    through_svd = merge(msgspec.structs.replace(spec, method=f"{method}_svd", svd_rank=5), [one, two]).pairs[Q0]
    np.testing.assert_allclose(b.T @ a, through_svd[1].T @ through_svd[0], atol=1e-5)


def test_one_adapter_alone_is_merged_by_the_method_asked_for() -> None:
    one = source("a", 1, {Q0: 4})
    a, b = merge(MergeSpec(adapters=("a",), weights=(1.5,), method="svd", svd_rank=2), [one]).pairs[Q0]
    assert len(a) == 2
    np.testing.assert_allclose(b.T @ a, best(1.5 * change(one, Q0), 2), atol=1e-4)


def test_a_rank_is_never_larger_than_the_change_can_have() -> None:
    one = source("a", 1, {Q0: 4})
    pairs = merge(MergeSpec(adapters=("a", "a"), weights=(1, 1), method="svd", svd_rank=64), [one, one]).pairs
    assert len(pairs[Q0][0]) <= 7


# --- determinism and keys -----------------------------------------------------------------------------------------


def test_random_pruning_is_a_function_of_the_seed() -> None:
    sources = [source("a", 1, {Q0: 4}), source("b", 2, {Q0: 4})]
    spec = MergeSpec(adapters=("a", "b"), weights=(1, 1), method="dare_ties", density=0.5, seed=7)
    torch.manual_seed(99)
    first = merge(spec, sources).pairs[Q0]
    drawn = torch.rand(1)
    torch.manual_seed(99)
    assert torch.equal(torch.rand(1), drawn)  # the global generator was left alone
    for ours, again in zip(first, merge(spec, sources).pairs[Q0], strict=True):
        np.testing.assert_array_equal(ours, again)
    other = merge(msgspec.structs.replace(spec, seed=8), sources).pairs[Q0]
    assert not np.array_equal(first[0], other[0])


def test_the_key_is_what_decides_the_result() -> None:
    spec = MergeSpec(adapters=("a", "b"), weights=(1, 0.5), method="ties", density=0.5)
    digests = ("1" * 64, "2" * 64)
    key = merge_key(spec, digests)
    replace = msgspec.structs.replace
    same = [replace(spec, adapters=("x", "y")), replace(spec, seed=5), replace(spec, majority_sign_method="total")]
    assert {merge_key(one, digests) for one in same} == {key}
    others = [
        replace(spec, weights=(0.5, 1)),
        replace(spec, density=0.6),
        replace(spec, majority_sign_method="frequency"),
        replace(spec, method="ties_svd"),
        replace(spec, method="ties_svd", svd_rank=3),
        replace(spec, method="dare_ties"),
        replace(spec, method="dare_ties", seed=1),
    ]
    keys = {merge_key(one, digests) for one in others} | {key, merge_key(spec, digests[::-1])}
    assert len(keys) == len(others) + 2


# --- what makes no sense ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"adapters": (), "weights": ()}, "merge: adapters: expected at least one"),
        ({"weights": (1.0,)}, "merge: weights: expected one for each of 2 adapters, found 1"),
        ({"weights": (1.0, math.nan)}, "merge: weights: expected finite numbers, found nan"),
        ({"method": "average"}, "merge: method: expected linear | cat"),
        ({"method": "ties"}, "merge: density: expected a number above 0 and up to 1 with method ties, found None"),
        ({"method": "ties", "density": 0.0}, "merge: density: expected a number above 0 and up to 1"),
        ({"method": "ties", "density": 1.5}, "found 1.5"),
        ({"density": 0.5}, "merge: density: expected none with method linear, which prunes nothing, found 0.5"),
        ({"majority_sign_method": "total"}, "merge: majority_sign_method: expected none with method linear"),
        ({"method": "ties", "density": 0.5, "majority_sign_method": "mean"}, "majority_sign_method: expected total"),
        ({"seed": -1}, "merge: seed: expected an integer from 0"),
        ({"svd_rank": 0}, "merge: svd_rank: expected a positive integer, found 0"),
        ({"method": "cat", "svd_rank": 4}, "merge: svd_rank: expected none with method cat"),
        ({"svd_rank": 4}, "svd_rank: found 4, but the ranks are equal and method linear keeps them"),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused_by_field(fields: dict[str, Any], message: str) -> None:
    spec = MergeSpec(**{"adapters": ("a", "b"), "weights": (1.0, 1.0), **fields})
    with pytest.raises(ConfigError) as caught:
        merge(spec, [source("a", 1, {Q0: 4}), source("b", 2, {Q0: 4})][: len(spec.adapters)])
    assert message in str(caught.value)
    assert caught.value.param is not None and f"{caught.value.param}:" in caught.value.message


def two(other: Source) -> None:
    merge(MergeSpec(adapters=("a", "b"), weights=(1.0, 1.0)), [source("a", 1, {Q0: 4}), other])


def test_adapters_that_do_not_fit_are_named() -> None:
    wide = source("b", 2, {Q0: 4})
    wide.tensors[Q0, "A"] = np.zeros((4, 10), np.float32)
    with pytest.raises(AdapterError, match=r"b: .*q_proj: expected 9 inputs and 7 outputs .*, found 10 and 7"):
        two(wide)
    half = source("b", 2, {Q0: 4})
    del half.tensors[Q0, "B"]
    with pytest.raises(AdapterError, match=r"b: .*q_proj\.lora_B\.weight is missing"):
        two(half)
    with pytest.raises(AdapterError, match=r"b: .*q_proj: expected rank 2 as adapter_config"):
        two(source("b", 2, {Q0: 4}, rank_pattern={}, r=2))
    stray = source("b", 2, {Q0: 4})
    with pytest.raises(AdapterError, match=r"b: .*q_proj: not among the modules"):
        two(Source("b", LoraConfig(r=4, alpha=4, target_modules=("v_proj",)), stray.tensors, ""))
    with pytest.raises(AdapterError, match=r"self_attn\.qkv_proj and another on .*q_proj, which hold the same weights"):
        two(source("b", 2, {Q0.replace("q_proj", "qkv_proj"): 4}))
    large = source("b", 2, {Q0: 4})
    large.tensors[Q0, "A"][:] = 3e38
    with pytest.raises(AdapterError, match=r"q_proj: the result is too large for fp32"):
        merge(MergeSpec(adapters=("b",), weights=(4.0,)), [large])


def test_other_kinds_are_refused_by_name(trio: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "dora"
    folder.mkdir()
    for file in trio[0].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(AdapterError, match="dora: adapter_config.json: expected plain LoRA, found dora"):
        read_source(folder)


# --- folders ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["linear", "cat", "svd"])
def test_peft_loads_what_was_written(
    method: str, checkpoint: Callable[..., Path], adapters: Callable[..., list[Path]], tmp_path: Path
) -> None:
    """Ranks 5 and 16, different targets and patterns: linear and cat are the exact sum, svd at rank 64 too."""
    every = adapters("llama", 12)
    folders = [every[3], every[8], every[11]]
    spec = merge_spec(folders, (0.5, 1.5, -1.0), method, **({"svd_rank": 64} if method == "svd" else {}))
    merge_folders(spec, folders, tmp_path / "merged")
    base = checkpoint("llama")
    model = oracle(base, tmp_path / "merged")
    for i, folder in enumerate(folders):
        model.load_adapter(str(folder), adapter_name=f"part-{i}")
    modules = {n: m for n, m in model.named_modules() if "default" in getattr(m, "lora_A", {})}
    assert len(modules) == 21
    with torch.no_grad():
        for module in modules.values():
            parts = [f"part-{i}" for i in range(3)]
            expected = sum(
                weight * module.get_delta_weight(part)
                for part, weight in zip(parts, spec.weights, strict=True)
                if part in module.lora_A
            )
            close(module.get_delta_weight("default").numpy(), expected.numpy())
    with AdapterFile(tmp_path / "merged") as file:
        check_adapter(file.config, file.shapes, load_spec(base))  # we serve it too
    config = json.loads((tmp_path / "merged" / CONFIG).read_text())
    assert config["base_model_name_or_path"] == str(base)


def put(folder: Path, lock: Lock | None = None, seed: int = 0) -> Path:
    one = source(folder.name, seed, {Q0: 2})
    pairs = {Q0: (one.tensors[Q0, "A"], one.tensors[Q0, "B"].T)}
    write_peft(folder, one.config, pairs, base_name="tiny", lock=lock)
    return folder


LOCKED = Lock(
    base=LockedBase("tiny", "b" * 64),
    tokenizer_sha256="c" * 64,
    stop_ids=(1, 5),
    template=LockedTemplate.of("prompt", "{text}"),
    recipe_sha256="d" * 64,
    data_sha256="e" * 64,
)


def test_the_lock_stays_where_all_agree(tmp_path: Path) -> None:
    other = msgspec.structs.replace(LOCKED, stop_ids=(5, 1), data_sha256="f" * 64)
    folders = [put(tmp_path / "a", LOCKED), put(tmp_path / "b", other, seed=1)]
    merge_folders(merge_spec(folders, (1, 1), "cat"), folders, tmp_path / "ab")
    lock = read_lock(tmp_path / "ab")
    assert lock is not None and lock.base == LOCKED.base and lock.template == LOCKED.template
    assert lock.recipe_sha256 == LOCKED.recipe_sha256 and lock.data_sha256 is None
    write_lock(folders[1], msgspec.structs.replace(LOCKED, template=LockedTemplate.of("prompt", "Q: {text}")))
    merge_folders(merge_spec(folders, (1, 1), "cat"), folders, tmp_path / "ab", force=True)
    lock = read_lock(tmp_path / "ab")
    assert lock is not None and lock.template is None
    assert merged_lock(["a", "b"], [None, None]) is None


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (None, r"b has no lorikeet\.json, while others have one"),
        (msgspec.structs.replace(LOCKED, base=LockedBase("tiny", "0" * 64)), r"b: lorikeet\.json: base\.sha256"),
        (msgspec.structs.replace(LOCKED, tokenizer_sha256="0" * 64), r"b: lorikeet\.json: tokenizer_sha256"),
        (msgspec.structs.replace(LOCKED, stop_ids=(1,)), r"b: .*stop_ids: expected \[1, 5\] as in a, found \[1\]"),
    ],
)
def test_locks_that_differ_are_refused(other: Lock | None, message: str) -> None:
    with pytest.raises(LockMismatchError, match=message):
        merged_lock(["a", "b"], [LOCKED, other])


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    folders = [put(tmp_path / "a"), put(tmp_path / "b", seed=1)]
    spec, output = merge_spec(folders, (1, 1), "cat"), put(tmp_path / "ab", seed=2)
    with pytest.raises(ConfigError, match="ab exists.*--force replaces it"):
        merge_folders(spec, folders, output)
    merge_folders(spec, folders, output, force=True)
    with pytest.raises(ConfigError, match="a is one of the adapters to merge"):
        merge_folders(spec, folders, folders[0], force=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="home exists and is not an adapter's folder"):
        merge_folders(spec, folders, tmp_path / "home", force=True)
    assert (tmp_path / "home" / "letter.txt").read_text() == "dear"


def lorikeet(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lorikeet", "adapters", "merge", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_command(tmp_path: Path) -> None:
    a, b = put(tmp_path / "a"), put(tmp_path / "b", seed=1)
    flags = ["--weights", "0.7,-0.3", "--method", "ties", "--density", "0.5", "--output", str(tmp_path / "ab")]
    result = lorikeet(str(a), str(b), *flags)
    assert result.returncode == 0, result.stderr
    assert result.stdout.rstrip().endswith("ab: 1 modules, rank 2 to 2")
    expected = merge(merge_spec([a, b], (0.7, -0.3), "ties", density=0.5), [read_source(a), read_source(b)])
    tensors = read_source(tmp_path / "ab").tensors
    np.testing.assert_array_equal(tensors[Q0, "A"], expected.pairs[Q0][0])
    result = lorikeet(str(a), str(b), "--weights", "0.7;0.3", "--output", str(tmp_path / "new"))
    assert result.returncode == 2
    assert "--weights: found '0.7;0.3'; expected numbers such as 0.7,0.3" in result.stderr
    result = lorikeet("--help")
    assert "Examples" in result.stdout and "lorikeet adapters merge" in result.stdout
