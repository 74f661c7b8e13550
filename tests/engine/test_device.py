"""The engine on a CUDA device: slab, host tier, copy stream, graphs and kernels together, against the dense oracle."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch

from lorikeet.config import EngineConfig
from lorikeet.engine.engine import Engine
from lorikeet.engine.sizing import Sizes, choose_sizes
from lorikeet.engine.staging import PinnedStaging
from lorikeet.kernels.weight import DenseWeight
from lorikeet.model.decoder import DecoderWeights, LayerWeights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_device(one: Any) -> Any:
    """Weights with all their tensors on the device."""
    if isinstance(one, torch.Tensor):
        return one.cuda()
    if isinstance(one, DenseWeight):
        return DenseWeight(one.weight.cuda(), None if one.bias is None else one.bias.cuda())
    if isinstance(one, list):
        return [on_device(each) for each in one]
    if isinstance(one, DecoderWeights | LayerWeights):
        return replace(one, **{field.name: on_device(getattr(one, field.name)) for field in fields(one)})
    return one


def engine_of(world: Any, infos: list[Any], slab_bytes: int = 2**20, host_bytes: int = 2**20, **config: Any) -> Engine:
    from lorikeet.kernels import pick

    settings = EngineConfig(**{"block_size": 16, "max_seqs": 8, "step_tokens": 64, **config})
    sizes = Sizes(
        dtype=torch.float32, adapter_dtype=torch.float32, max_context=128, blocks=64, kv_bytes=0,
        slab_bytes=slab_bytes, logit_rows=64, device="cuda", host_bytes=host_bytes, copy_bytes=4096,
    )  # fmt: skip
    engine = Engine(world.spec, world.base, on_device(world.weights), pick("cuda"), sizes, settings, world._open)
    engine._runner.warm()
    for info in infos:
        engine.register(info)
    return engine


def test_answers_are_the_dense_ones(world: Any) -> None:
    """Mixed ranks and kinds, more adapters than slab or host tier hold, streams of different lengths."""
    infos = [world.adapter(50 + i, rank) for i, rank in enumerate((1, 2, 5, 1, 4, 16, 20))]
    infos += [world.adapter(60, 2, scaled=True), world.adapter(61, 2, overrides=True)]
    total = sum(info.nbytes for info in infos)
    engine = engine_of(world, infos, total * 6 // 10 // 64 * 64, total * 7 // 10 // 64 * 64)
    for turn in range(6):
        requests = [
            world.request(f"{turn}-{i}", world.prompt(turn + i, 3 + i), info and info.digest, max_tokens=4 + i)
            for i, info in enumerate([None, *infos])
        ]
        answers = world.run(engine, requests)
        for request in requests:
            expected = world.greedy(request.tokens, request.sampling.max_tokens, request.adapter)
            assert answers[request.request_id].tokens == expected, request.request_id


def test_graphs_are_used_and_change_nothing(world: Any) -> None:
    infos = [world.adapter(1), world.adapter(2, 3, scaled=True)]
    engine = engine_of(world, infos)
    forward = engine._runner._forward
    requests = [world.request(f"{i}", [5, 6, 7 + i], infos[i % 2].digest, max_tokens=20) for i in range(5)]
    answers = world.run(engine, requests)
    assert forward._graphs, "nothing was captured"
    for request in requests:
        assert answers[request.request_id].tokens == world.greedy(request.tokens, 20, request.adapter)


def test_sampled_tokens_do_not_depend_on_the_device(world: Any) -> None:
    info = world.adapter(1)
    sampling = {"temperature": 0.8, "seed": 7, "top_p": 0.9, "logprobs": 2, "max_tokens": 10}
    request = world.request("a", [5, 6, 7], info.digest, **sampling)
    found, expected = (world.run(one, [request])["a"] for one in (engine_of(world, [info]), world.engine([info])))
    assert found.tokens == expected.tokens
    assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-3)


def test_arrays_get_there_and_back() -> None:
    staging, draw = PinnedStaging(torch.device("cuda"), 4096), np.random.default_rng(0)
    for _ in range(20):
        staging.begin()
        arrays = [draw.integers(0, 99, (draw.integers(0, 400),)).astype(t) for t in (np.int64, np.int32, np.float64)]
        tensors = [staging.put(array) for array in arrays]
        staging.flush()
        fetched = [staging.fetch(tensor * 2) for tensor in tensors]
        for array, there in zip(arrays, fetched, strict=True):
            assert np.array_equal(there.array(), array * 2)


def test_one_budget_for_cache_and_slab(world: Any) -> None:
    sizes = choose_sizes(EngineConfig(max_seqs=4), world.spec, torch.bfloat16, "cuda")
    free, _ = torch.cuda.mem_get_info()
    assert 0 < sizes.kv_bytes + sizes.slab_bytes < free and sizes.host_bytes > 0


def test_an_fp8_cache_says_nearly_the_same(world: Any) -> None:
    """Prompts and decode steps, in graphs too; what the device rounds is what the reference rounds."""
    infos = [world.adapter(1), world.adapter(2, 3, ("k", "v"))]
    requests = [
        world.request(f"{i}", world.prompt(i, 5 + 4 * i), one and one.digest, max_tokens=12, prompt_logprobs=0,
                      ignore_eos=True)
        for i, one in enumerate([None, *infos])
    ]  # fmt: skip
    engine = engine_of(world, infos, kv_cache_dtype="fp8")
    found, full = world.run(engine, requests), world.run(engine_of(world, infos), requests)
    reference = world.engine(infos, kv_cache_dtype="fp8", blocks=64)
    expected = world.run(reference, requests)
    for ours, theirs in zip(engine._runner.cache, reference._runner.cache, strict=True):
        assert ours.k.dtype == torch.float8_e4m3fn
        assert torch.equal(ours.k_scale.cpu(), theirs.k_scale) and torch.equal(ours.v_scale.cpu(), theirs.v_scale)
    for name, answer in found.items():
        scores = np.array(answer.prompt_logprobs[1:])
        assert np.abs(scores - np.array(expected[name].prompt_logprobs[1:])).mean() < 0.02
        assert 0 < np.abs(scores - np.array(full[name].prompt_logprobs[1:])).mean() < 0.3
