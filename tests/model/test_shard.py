"""What each rank holds: shares that make the whole again, of spec, weights, entries and files; and the same logits.

The ranks of the last test are threads that wait for each other, so that every kind of adapter is summed as it is
between processes, in fp64: what is left is arithmetic alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.adapters.kinds import make, write_loreft
from tests.fixtures import AdapterShape, make_adapter, make_batch, make_slab, sample_tokens

from lorikeet.adapters.compiled import compile_adapter, lay_out_parts, open_compiled, part_of
from lorikeet.adapters.normal import Entry
from lorikeet.errors import AdapterError, ConfigError
from lorikeet.kernels.reference import ReferenceOps
from lorikeet.model.decoder import forward
from lorikeet.model.shard import BY_INPUTS, BY_OUTPUTS, Shard
from lorikeet.model.sources import checkpoint_files, identify
from lorikeet.model.spec import ModelSpec
from lorikeet.model.weights import load
from lorikeet.types import BaseIdentity

Checkpoint = Callable[..., Path]
COUNTS = st.sampled_from([1, 2, 4, 8])


def spec_of(heads: int, kv_heads: int, intermediate: int = 8, vocabulary: int = 61, head_dim: int = 4) -> ModelSpec:
    return ModelSpec(
        family="llama", vocab_size=vocabulary, hidden_size=12, intermediate_size=intermediate, num_layers=2,
        num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, max_context=32,
    )  # fmt: skip


@st.composite
def divided(draw: st.DrawFn) -> list[Shard]:
    """All ranks' shares of a model that divides."""
    ranks, kv_heads, group = draw(COUNTS), draw(st.sampled_from([1, 2, 3, 4, 8, 16])), draw(st.integers(1, 8))
    heads = kv_heads * group
    assume(heads % ranks == 0 and (kv_heads % ranks == 0 or ranks % kv_heads == 0))
    spec = spec_of(
        heads, kv_heads, ranks * draw(st.integers(1, 5)), draw(st.integers(8, 40)), draw(st.sampled_from([2, 6]))
    )
    return [Shard(spec, rank, ranks) for rank in range(ranks)]


def covered(parts: list[slice], size: int) -> list[int]:
    return [place for part in parts for place in range(*part.indices(size))]


@settings(max_examples=60, deadline=None)
@given(divided())
def test_parts_are_the_whole(shards: list[Shard]) -> None:
    spec = shards[0].whole
    for role in BY_OUTPUTS:
        parts, width = [shard.outputs(role) for shard in shards], spec.site(0, role).d_out
        places = covered(parts, width)
        assert set(places) == set(range(width))
        assert len(places) == sum(shard.local.site(0, role).d_out for shard in shards)
        if role not in ("k", "v"):
            assert places == list(range(width))
    for role in BY_INPUTS:
        width = spec.site(0, role).d_in
        assert covered([shard.inputs(role) for shard in shards], width) == list(range(width))
        assert all(shard.local.site(0, role).d_in * len(shards) == width for shard in shards)
    assert covered([shard.head for shard in shards], spec.vocab_size) == list(range(spec.vocab_size))


@settings(max_examples=60, deadline=None)
@given(divided())
def test_a_rank_has_the_keys_of_its_queries(shards: list[Shard]) -> None:
    spec = shards[0].whole
    group = spec.num_heads // spec.num_kv_heads
    for shard in shards:
        local = shard.local
        first_query, first_key = (shard.outputs(role).indices(10**6)[0] // spec.head_dim for role in "qk")
        assert shard.outputs("k") == shard.outputs("v")
        for head in range(local.num_heads):
            key = first_key + head // (local.num_heads // local.num_kv_heads)
            assert key == (first_query + head) // group


@settings(max_examples=60, deadline=None)
@given(divided(), st.integers(0, 5), st.integers(0, 2**31))
def test_pairs_add_up(shards: list[Shard], rank: int, seed: int) -> None:
    """Scale and rank are every rank's; the outputs side by side, or their sum, are those of the whole pair."""
    spec, random = shards[0].whole, np.random.default_rng(seed)
    for site in (*(spec.site(1, role) for role in (*BY_OUTPUTS, *BY_INPUTS)), spec.residual_sites[0], spec.sites[-1]):
        whole = Entry(
            site, random.normal(size=(rank, site.d_in)), random.normal(size=(rank, site.d_out)), 0.7,
            random.normal(size=site.d_out), random.normal(size=site.d_out),
        )  # fmt: skip
        x = random.normal(size=site.d_in)
        expected = whole.b.T @ (whole.a @ x)
        parts = [part_of(whole, shard) for shard in shards]
        assert all((part.rank, part.scale, part.site.index) == (rank, 0.7, site.index) for part in parts)
        assert all((part.a.shape[1], part.b.shape[1]) == (part.site.d_in, part.site.d_out) for part in parts)
        found = [part.b.T @ (part.a @ x[shard.inputs(site.role)]) for part, shard in zip(parts, shards, strict=True)]
        if site.role in BY_INPUTS:
            np.testing.assert_allclose(sum(found), expected, atol=1e-9)
        for part, shard, output in zip(parts, shards, found, strict=True):
            mine = shard.outputs(site.role)
            assert np.array_equal(part.gain, whole.gain[mine]) and np.array_equal(part.shift, whole.shift[mine])  # type: ignore[arg-type, index]
            if site.role not in BY_INPUTS:
                np.testing.assert_allclose(output, expected[mine], atol=1e-9)


@pytest.mark.parametrize(
    ("spec", "ranks", "message"),
    [
        (spec_of(6, 2), 4, "found 4; expected a divisor of the model's attention heads, 6"),
        (spec_of(4, 2, intermediate=10), 4, "found 4; expected a divisor of the model's intermediate size, 10"),
        (spec_of(12, 3), 4, "found 4; expected a divisor or a multiple of the model's key-value heads, 3"),
        (spec_of(8, 8, vocabulary=5), 8, "found 8; expected at most the model's vocabulary, 5"),
    ],
)
def test_what_does_not_divide_is_refused_by_name(spec: ModelSpec, ranks: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        Shard(spec, 0, ranks)
    assert refused.value.param == "tensor_parallel" and refused.value.hint == "lower --tensor-parallel"


@pytest.mark.parametrize("overrides", [False, True])
def test_a_file_has_every_ranks_part(overrides: bool, tmp_path: Path) -> None:
    from lorikeet.adapters import compiled
    from lorikeet.adapters.overrides import Override

    random, base = np.random.default_rng(3), BaseIdentity(name="b", sha256="b", tokenizer_sha256="t", stop_ids=())
    shards = [Shard(spec_of(8, 2), rank, 4) for rank in range(4)]

    def array(*shape: int) -> np.ndarray:
        return random.normal(size=shape).astype(np.float32)

    entries = [
        Entry(site, array(3, site.d_in), array(3, site.d_out), 0.5, array(site.d_out), None)
        for site in shards[0].whole.sites
    ]
    tables = [Override("head", None, array(2, 12), (3, 9)), Override("norm", None, array(1, 12))] if overrides else []
    header, data = lay_out_parts(entries, shards, "d" * 64, base, "float32", overrides=tables)
    path = tmp_path / "one.lorikeet"
    compiled._write(path, header, data)
    assert (header.ranks, header.shared) == (4, 128 + 64 if overrides else 0)
    for shard in shards:
        found = open_compiled(path, shard.rank, 4)
        assert found.data.nbytes == header.nbytes
        for entry, place in zip(entries, found.header.entries, strict=True):
            mine = part_of(entry, shard)
            for part, at, stride in ((mine.a, place.a, place.stride_a), (mine.b, place.b, place.stride_b)):
                rows = found.data[at : at + 3 * stride].reshape(3, stride)[:, : part.shape[1]]
                assert np.array_equal(rows, part)
            assert np.array_equal(found.data[place.gain : place.gain + len(mine.gain)], mine.gain)  # type: ignore[arg-type]
        for table, there in zip(tables, found.header.overrides, strict=True):
            rows = found.data[there.at : there.at + there.rows * there.stride].reshape(there.rows, there.stride)
            assert np.array_equal(rows[:, : there.width], table.values)
    with pytest.raises(AdapterError, match="expected parts for 2 processes, found 4"):
        open_compiled(path, 0, 2)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 64)
    with pytest.raises(AdapterError, match="expected .* bytes, found"):
        open_compiled(path, 1, 4)


@pytest.mark.parametrize("family", ["llama-tied", "qwen3"])
def test_a_checkpoint_is_read_in_parts(family: str, checkpoint: Checkpoint) -> None:
    folder = checkpoint(family)
    spec, whole = load(folder, torch.float32)
    parts = [load(folder, torch.float32, rank=rank, ranks=4)[1] for rank in range(4)]
    shards = [Shard(spec, rank, 4) for rank in range(4)]
    x = torch.randn(5, spec.hidden_size)
    for layer in range(spec.num_layers):
        for name in ("o", "down"):  # summed, biases and all
            weight = getattr(whole.layers[layer], name)
            x = torch.randn(5, weight.shape[1])
            summed = sum(
                getattr(part.layers[layer], name).linear(x[:, shard.inputs(name)])
                for part, shard in zip(parts, shards, strict=True)
            )
            torch.testing.assert_close(summed, weight.linear(x), atol=1e-5, rtol=1e-5)
        for part, shard in zip(parts, shards, strict=True):
            for name, roles in (("qkv", "q k v"), ("gate_up", "gate up")):
                mine, weight = getattr(part.layers[layer], name), getattr(whole.layers[layer], name)
                sites = [spec.site(layer, role) for role in roles.split()]
                rows = weight.dequantised().split([site.d_out for site in sites])
                expected = torch.cat([r[shard.outputs(s.role)] for r, s in zip(rows, sites, strict=True)])
                assert torch.equal(mine.dequantised(), expected)
                assert mine.shape[0] == sum(shard.local.site(layer, site.role).d_out for site in sites)
    assert torch.equal(torch.cat([part.head.dequantised() for part in parts]), whole.head.dequantised())
    assert all(torch.equal(part.embed.dequantised(), whole.embed.dequantised()) for part in parts)


# --- the same logits --------------------------------------------------------------------------------------------------


class Threads:
    """What `kernels.ranks.Ranks` does, among threads of this process; `of(rank)` is one of them."""

    def __init__(self, count: int) -> None:
        self.count, self.parts = count, [torch.empty(0)] * count
        self.sums = 0
        self._barrier = threading.Barrier(count, timeout=60)

    def of(self, rank: int) -> Any:
        class One:
            def sum(_, x: torch.Tensor) -> torch.Tensor:
                self.sums += rank == 0
                return torch.stack(self._meet(rank, x)).sum(0)

            def gather(_, x: torch.Tensor, total: int) -> torch.Tensor:
                return torch.cat(self._meet(rank, x), dim=1)[:, :total]

        return One()

    def _meet(self, rank: int, x: torch.Tensor) -> list[torch.Tensor]:
        self.parts[rank] = x.clone()
        self._barrier.wait()
        parts = list(self.parts)
        self._barrier.wait()
        return parts

    def run(self, work: Callable[[int], torch.Tensor]) -> list[torch.Tensor]:
        results: list[Any] = [None] * self.count

        def one(rank: int) -> None:
            try:
                with torch.inference_mode():
                    results[rank] = work(rank)
            except BaseException as error:
                results[rank] = error
                self._barrier.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, threading.BrokenBarrierError):
                raise result
        return results


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft's: of what it saves, and of merging
@pytest.mark.filterwarnings("ignore:Adapter .default.. .* have invalid shape")  # peft of its own biases of B
@pytest.mark.parametrize(
    ("family", "ranks", "kinds"),
    [
        ("llama-tied", 2, ["dora", "bias all", "both tied"]),
        ("qwen2", 4, ["dora, bias all", "lora_bias", "ia3, up and down", "modules_to_save"]),  # 2 key-value heads
    ],
)
def test_logits_are_those_of_one_process(
    family: str, ranks: int, kinds: list[str], checkpoint: Checkpoint, tmp_path: Path, cache: Path
) -> None:
    base = checkpoint(family)
    spec, weights = load(base, torch.float64)
    folders = [make(kind, base, tmp_path / kind, seed) for seed, kind in enumerate(kinds)]
    pattern = AdapterShape(rank=8, rank_pattern={"q_proj": 3, r"layers\.1\.mlp\.up_proj": 5, "down_proj": 1})
    folders.append(make_adapter(base, tmp_path / "ranks", pattern, 7))
    write_loreft(tmp_path / "reft", spec.hidden_size, [0, 2], 3)
    folders.append(tmp_path / "reft")
    identity, files = identify(base), checkpoint_files(base)

    def compiled(count: int) -> list[Path]:
        infos = [
            compile_adapter(folder, spec, identity, "float32", cache, checkpoint=files, ranks=count)
            for folder in folders
        ]
        return [Path(info.path) for info in infos]

    rows = [sample_tokens(1, 5 + 3 * i, i)[0] for i in range(len(folders) + 1)]
    batch = make_batch(rows, [None, *range(len(folders))])
    whole = make_slab(compiled(1), spec)
    with torch.inference_mode():
        expected = forward(spec, weights, batch, ReferenceOps(), whole)
        plain = forward(spec, weights, make_batch(rows, [None] * len(rows)), ReferenceOps())
    threads, parts = Threads(ranks), compiled(ranks)

    def work(rank: int) -> torch.Tensor:
        ops = ReferenceOps()
        ops.ranks = threads.of(rank)
        mine = load(base, torch.float64, rank=rank, ranks=ranks)[1]
        slab = make_slab(parts, spec, rank)
        return forward(Shard(spec, rank, ranks).local, mine, batch, ops, slab)

    for logits in threads.run(work):
        torch.testing.assert_close(logits, expected, atol=1e-9, rtol=0)
    assert threads.sums == 2 * spec.num_layers
    sizes = [len(row) for row in rows]
    for ours, base_only in zip(expected.split(sizes)[1:], plain.split(sizes)[1:], strict=True):
        assert (ours - base_only).abs().mean() > 0.05, "an adapter that does nothing shows nothing"
