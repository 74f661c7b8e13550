"""A recorded forward pass gives what its kernels give one by one, and says what it cannot record."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.kernels.inputs import make_batch, make_segments, make_slab

from lorikeet.kernels.batch import Batch, LayerCache, Slab, SlabOverride
from lorikeet.kernels.cpu import CpuOps
from lorikeet.kernels.cpu_record import Buffers, NotRecordable, Program
from lorikeet.kernels.precision import native_bf16_products
from lorikeet.kernels.reference import ReferenceOps
from lorikeet.kernels.weight import Int8Weight, pack, pack_table
from lorikeet.model.decoder import DecoderWeights, LayerWeights, forward
from lorikeet.model.spec import ModelSpec
from lorikeet.model.weights import rope_tables
from lorikeet.types import SiteGroup

needs_instruction = pytest.mark.skipif(not native_bf16_products(), reason="needs AVX512-BF16")
PLAIN = ModelSpec(
    family="llama", vocab_size=97, hidden_size=64, intermediate_size=96, num_layers=3, num_heads=4, num_kv_heads=2,
    head_dim=32, max_context=64,
)  # fmt: skip
SPECS = {
    "plain": PLAIN,
    "biases": replace(PLAIN, vocab_size=96, qkv_bias=True, o_bias=True, mlp_bias=True),
    "normed heads, windows": replace(PLAIN, qk_norm=True, windows=(None, 5, 9), head_dim=16, num_heads=6),
}
FORMS = {"bf16": pack, "int8": Int8Weight}


def make_weights(spec: ModelSpec, form: str, dtype: torch.dtype = torch.bfloat16) -> DecoderWeights:
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

    def linear(d_out: int, d_in: int, bias: bool) -> object:
        return FORMS[form](random(d_out, d_in), random(d_out) if bias else None)

    h, m, q, kv = spec.hidden_size, spec.intermediate_size, spec.q_size, spec.kv_size
    layers = [
        LayerWeights(
            attn_norm=random(h) + 1, qkv=linear(q + 2 * kv, h, spec.qkv_bias), o=linear(h, q, spec.o_bias),
            mlp_norm=random(h) + 1, gate_up=linear(2 * m, h, spec.mlp_bias), down=linear(h, m, spec.mlp_bias),
            q_norm=random(spec.head_dim) + 1 if spec.qk_norm else None,
            k_norm=random(spec.head_dim) + 1 if spec.qk_norm else None,
        )  # type: ignore[arg-type]
        for _ in range(spec.num_layers)
    ]  # fmt: skip
    table = pack_table(random(spec.vocab_size, h), form == "int8")  # 97 tokens stay plain, 96 are in panels
    return DecoderWeights(table, layers, random(h) + 1, table, *rope_tables(spec))


def make_step(
    spec: ModelSpec, sequences: list[tuple[int, int]], adapters: list[int], seed: int, adapter_dtype: torch.dtype
) -> tuple[Batch, Slab, list[LayerCache]]:
    """A batch of sequences (new tokens, length), the first ones on the base, the others one on each of `adapters`."""
    generator = torch.Generator().manual_seed(seed)
    heads = (spec.num_heads, spec.num_kv_heads, spec.head_dim)
    *_, batch, cache = make_batch(sequences, heads, 4, torch.bfloat16, generator)
    caches = [LayerCache(cache.k.clone(), cache.v.clone()) for _ in range(spec.num_layers)]
    total = sum(new for new, _ in sequences)
    batch.tokens = torch.randint(0, spec.vocab_size, (total,), generator=generator)
    wanted = batch.query_start[1:].long() - 1
    batch.logit_rows = wanted
    sites = tuple(site for site in spec.sites if site.layer is not None)
    ranks = [[(site.index * 7 + handle) % 5 for site in sites] for handle in range(4)]
    group = SiteGroup(sites, tuple(0 for _ in sites))
    slab = make_slab(ranks, group, adapter_dtype, generator)
    add_vectors(slab, spec, generator)
    batch.scaled = seed % 2 == 0
    if adapters:
        counts = [new for new, _ in sequences][-len(adapters) :]
        batch.token_segments = make_segments(counts, total, True, generator)
        batch.token_segments.rows += total - sum(counts)
        batch.logit_segments = make_segments([1] * len(adapters), len(wanted), True, generator)
        batch.logit_segments.rows += len(wanted) - len(adapters)
        batch.token_segments.adapter = batch.logit_segments.adapter = sorted(adapters)
    return batch, slab, caches


def add_vectors(slab: Slab, spec: ModelSpec, generator: torch.Generator) -> None:
    """Gains and shifts at some sites of some adapters, behind the pairs."""
    width = 4 // slab.data.itemsize
    slab.vectors = torch.full((4, slab.table.shape[1], 2), -1)
    parts, at = [slab.data, slab.data.new_zeros(-slab.data.numel() % 32)], -(-slab.data.numel() // 32) * 32
    for handle in range(1, 4):
        for site in spec.sites[handle :: handle + 1]:
            for kind in range(2):
                if site.layer is not None and (site.index + handle + kind) % 3:
                    vector = 1 + torch.randn(-(-site.d_out // 16) * 16, generator=generator) / 4
                    slab.vectors[handle, site.index, kind] = at
                    parts.append(vector.view(slab.data.dtype))
                    at += width * len(vector)
    slab.data = torch.cat(parts)


def assert_alike(found: torch.Tensor, expected: torch.Tensor) -> None:
    """But for sums in another order, each rounded to bf16; what nobody wrote is NaN in both."""
    assert torch.equal(found.isnan(), expected.isnan())
    expected = expected.float().nan_to_num(0)
    assert (found.float().nan_to_num(0) - expected).norm() <= 0.02 * expected.norm()


@needs_instruction
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SPECS)
def test_as_kernel_by_kernel(name: str, form: str, threads: int) -> None:
    torch.set_num_threads(threads)
    spec = SPECS[name]
    weights = make_weights(spec, form)
    run = partial(forward, spec, weights)

    @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(
        st.lists(st.tuples(st.integers(1, 20), st.integers(0, 30)), min_size=1, max_size=6),
        st.lists(st.sampled_from(range(4)), max_size=3, unique=True),
        st.integers(0, 99),
        st.sampled_from((torch.bfloat16, torch.float32)),
    )
    def check(sizes: list[tuple[int, int]], adapters: list[int], seed: int, adapter_dtype: torch.dtype) -> None:
        adapters = adapters[: len(sizes)]
        sequences = [(new, new + before) for new, before in sizes]
        batch, slab, caches = make_step(spec, sequences, adapters, seed, adapter_dtype)
        copies = [LayerCache(one.k.clone(), one.v.clone()) for one in caches]
        program = Program(run, slab, caches, rows=130)
        expected = ReferenceOps.prepare(CpuOps(), run, slab, copies, 130)(batch)
        assert_alike(program(batch), expected)
        for one, other in zip(caches, copies, strict=True):
            assert_alike(one.k, other.k)
            assert_alike(one.v, other.v)
        rest = replace(batch, token_segments=None, logit_segments=None)  # the same program without adapters
        assert_alike(program(rest), ReferenceOps.prepare(CpuOps(), run, slab, copies, 130)(rest))

    check()


def add_tables(slab: Slab, spec: ModelSpec, generator: torch.Generator) -> None:
    """What few adapters have, behind the rest: 0 nothing; 1 a larger vocabulary, with a head of its own and rows of the
    embedding; 2 norms; 3 pairs on embedding and head, and on the stream after every other layer, with shifts there."""
    h, tokens = spec.hidden_size, spec.vocab_size + 3
    sites = len(spec.sites) + spec.num_layers - slab.table.shape[1]
    slab.table = torch.cat((slab.table, slab.table.new_zeros(4, sites, 5)), 1)
    slab.scale = torch.cat((slab.scale, torch.full((4, sites), 0.5)), 1)
    assert slab.vectors is not None
    slab.vectors = torch.cat((slab.vectors, slab.vectors.new_full((4, sites, 2), -1)), 1)

    def put(values: torch.Tensor) -> int:
        at = slab.data.numel()
        padding = slab.data.new_zeros(-values.numel() % 32)
        slab.data = torch.cat((slab.data, values.flatten().to(slab.data.dtype), padding))
        return at

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / h**0.5

    index = torch.tensor([2, 5, *range(spec.vocab_size, tokens)])
    slab.vocabulary[1] = tokens
    slab.overrides[1] = [
        SlabOverride("embed", None, put(random(len(index), h)), len(index), h, h, index),
        SlabOverride("head", None, put(random(tokens, h)), tokens, h, h, None),
    ]
    slab.overrides[2] = [
        SlabOverride(role, layer, put(1 + random(1, h)), 1, h, h, None)
        for role, layer in (("attn_norm", 0), ("mlp_norm", spec.num_layers - 1), ("norm", None))
    ]
    for site in (spec.site(None, "embed"), spec.site(None, "head"), *spec.residual_sites[::2]):
        a, b = put(random(4, site.d_in)), put(random(4, site.d_out))
        slab.table[3, site.index] = torch.tensor([a, b, site.d_in, site.d_out, 4])
        if site.role == "residual":
            shift = torch.randn(site.d_out, generator=generator)
            slab.vectors[3, site.index, 1] = slab.data.numel()
            slab.data = torch.cat((slab.data, shift.view(slab.data.dtype)))


@needs_instruction
@pytest.mark.parametrize("name", SPECS)
def test_adapters_that_do_more_make_pauses(name: str) -> None:
    """As kernel by kernel; the other rows of the batch are what they are without them, to the last bit."""
    torch.set_num_threads(2)
    spec = SPECS[name]
    run = partial(forward, spec, make_weights(spec, "bf16"))

    @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(
        st.lists(st.tuples(st.integers(1, 20), st.integers(0, 30)), min_size=2, max_size=6),
        st.lists(st.sampled_from(range(4)), min_size=1, max_size=4, unique=True),
        st.integers(0, 99),
        st.sampled_from((torch.bfloat16, torch.float32)),
    )
    def check(sizes: list[tuple[int, int]], adapters: list[int], seed: int, adapter_dtype: torch.dtype) -> None:
        adapters = sorted(adapters[: len(sizes) - 1])
        sequences = [(new, new + before) for new, before in sizes]
        batch, slab, caches = make_step(spec, sequences, adapters, seed, adapter_dtype)
        add_tables(slab, spec, torch.Generator().manual_seed(seed))
        batch.overridden, batch.scaled = bool({1, 2, 3} & set(adapters)), True
        assert batch.token_segments is not None
        for handle, start in zip(adapters, batch.token_segments.start[:-1], strict=True):
            if handle == 1:  # tokens that the base does not have
                batch.tokens[batch.token_segments.rows[start]] = spec.vocab_size + seed % 3
        copies, again = ([LayerCache(one.k.clone(), one.v.clone()) for one in caches] for _ in range(2))
        program = Program(run, slab, caches, 130, CpuOps())
        found = program(batch)
        expected = ReferenceOps.prepare(CpuOps(), run, slab, copies, 130)(batch)
        assert_alike(found, expected)
        for one, other in zip(caches, copies, strict=True):
            assert_alike(one.k, other.k)
            assert_alike(one.v, other.v)
        bases = len(sizes) - len(adapters)
        rest = replace(batch, tokens=batch.tokens.clamp(max=spec.vocab_size - 1), overridden=False)
        alone = Program(run, slab, again, 130)(rest)
        assert torch.equal(found[:bases, : spec.vocab_size].nan_to_num(0), alone[:bases].nan_to_num(0))

    check()


@needs_instruction
def test_too_many_rows_are_refused() -> None:
    batch, slab, caches = make_step(PLAIN, [(9, 9)], [], 0, torch.bfloat16)
    program = Program(partial(forward, PLAIN, make_weights(PLAIN, "bf16")), slab, caches, rows=8)
    with pytest.raises(ValueError, match="9 tokens and 1 rows of logits; expected at most 8"):
        program(batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_cannot_be_recorded_is_launched_kernel_by_kernel(dtype: torch.dtype) -> None:
    """Weights of another form than panels, here for their dtype or for a width that is no multiple of 32."""
    spec = PLAIN if dtype == torch.float32 else replace(PLAIN, intermediate_size=50)
    batch, slab, caches = make_step(spec, [(9, 9)], [0], 0, torch.bfloat16)
    caches = [LayerCache(one.k.to(dtype), one.v.to(dtype)) for one in caches]
    run = partial(forward, spec, make_weights(spec, "bf16", dtype))
    with pytest.raises(NotRecordable):
        Program(run, slab, caches, rows=32)
    step = CpuOps().prepare(run, slab, caches, 32)
    assert step(batch).shape == (1, spec.vocab_size)


def test_a_buffer_is_taken_again_once_nothing_shows_it() -> None:
    buffers = Buffers(4)
    first = buffers.take(8, torch.bfloat16)
    half = first[:, 4:]
    place = first.data_ptr()
    del first
    assert buffers.take(8, torch.bfloat16).data_ptr() != place
    del half
    assert buffers.take(8, torch.bfloat16).data_ptr() == place
    assert buffers.take(16, torch.bfloat16).data_ptr() != place
