"""An engine that holds keys and values in fp8: what it answers is what attention over rounded ones answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from lorikeet import kernels
from lorikeet.config import EngineConfig
from lorikeet.engine import engine as engine_module
from lorikeet.engine import sizing
from lorikeet.errors import ConfigError
from lorikeet.kernels.reference import ReferenceOps
from lorikeet.kernels.weight import DenseWeight
from lorikeet.model.cache_scales import FP8, find_scales
from lorikeet.model.decoder import forward
from lorikeet.model.sources import find_model
from lorikeet.model.tokenizer import Tokenizer

Tensor = torch.Tensor
SCORES = {"logprobs": 0, "prompt_logprobs": 0, "ignore_eos": True}


class RoundingOps(ReferenceOps):
    """Dense attention over keys and values as fp8 holds them."""

    def __init__(self, scales: list[tuple[Tensor, Tensor]]) -> None:
        self._scales, self._layer = scales, 0

    def attention(self, q: Tensor, k: Tensor, v: Tensor, batch: Any, cache: Any, window: int | None) -> Tensor:
        k_scale, v_scale = self._scales[self._layer % len(self._scales)]
        self._layer += 1
        k, v = ((x / s[:, None]).clamp(-448, 448).to(FP8).float() * s[:, None] for x, s in ((k, k_scale), (v, v_scale)))
        return super().attention(q, k, v, batch, cache, window)


@pytest.fixture
def variant(world: Any) -> Callable[..., Any]:
    """The world with a bias of the second head's keys, values that are larger by a factor, scales of a checkpoint."""

    def made(k_bias: float = 0.0, v_factor: float = 1.0, scale: float | None = None) -> Any:
        spec, layers = world.spec, []
        first, end = spec.q_size + spec.head_dim, spec.q_size + spec.kv_size
        for layer in world.weights.layers:
            weight, bias, o = layer.qkv.weight.clone(), layer.qkv.bias.clone(), layer.o
            bias[first:end] += k_bias
            weight[end:] *= v_factor
            bias[end:] *= v_factor
            layers.append(
                replace(layer, qkv=DenseWeight(weight, bias), o=DenseWeight(o.weight / v_factor, o.bias), q_norm=None,
                        k_norm=None)
            )  # fmt: skip
        scales = None if scale is None else [(torch.full((spec.num_kv_heads,), scale),) * 2] * spec.num_layers
        weights = replace(world.weights, layers=layers, cache_scales=scales)
        return replace(world, spec=replace(spec, qk_norm=False), weights=weights)

    return made


def asked(world: Any, infos: list[Any], count: int = 12) -> list[Any]:
    digests = [None, *(info.digest for info in infos)]
    return [
        world.request(f"{i:02}", world.prompt(i, 4 + 3 * i), digests[i % len(digests)], max_tokens=8, **SCORES)
        for i in range(count)
    ]


def scores(answers: dict[str, Any], prompts_alone: bool = False) -> np.ndarray:
    """All logprobs, request by request."""
    parts = [a.prompt_logprobs[1:] + ([] if prompts_alone else a.logprobs) for _, a in sorted(answers.items())]
    return np.concatenate(parts)


def test_attention_is_over_what_fp8_holds(variant: Callable[..., Any]) -> None:
    """The base: prompts in chunks, decode, a window, against one dense pass that rounds on its own."""
    world = variant(k_bias=6.0)
    engine = world.engine(kv_cache_dtype="fp8", step_tokens=16)
    assert all(layer.k.dtype == layer.v.dtype == FP8 for layer in engine._runner.cache)
    requests = asked(world, [])
    answers = world.run(engine, requests)
    scales = find_scales(world.spec, world.weights, ReferenceOps(), 16)
    for one, layer in zip(scales, engine._runner.cache, strict=True):
        assert torch.equal(one[0], layer.k_scale) and torch.equal(one[1], layer.v_scale)
        assert one[0][0] < one[0][1]
    for request in requests:
        answer = answers[request.request_id]
        tokens = torch.tensor(request.tokens + answer.tokens)
        batch = dense(tokens)
        logits = forward(world.spec, world.weights, batch, RoundingOps(scales))
        expected = logits.log_softmax(-1)[:-1].gather(1, tokens[1:, None]).flatten()
        found = torch.tensor(answer.prompt_logprobs[1:] + answer.logprobs)
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def dense(tokens: Tensor) -> Any:
    from lorikeet.kernels.batch import Batch

    count = len(tokens)
    return Batch(
        tokens=tokens, positions=torch.arange(count), query_start=torch.tensor([0, count], dtype=torch.int32),
        kv_len=torch.tensor([count], dtype=torch.int32), max_query=count, max_kv=count,
    )  # fmt: skip


@pytest.mark.parametrize("v_factor", [1.0, 2.0**-12, 2.0**12])
def test_answers_are_nearly_those_of_a_full_cache(variant: Callable[..., Any], v_factor: float) -> None:
    """However large values are: scales follow them, and what is rounded is the same share of them."""
    world = variant(v_factor=v_factor)
    infos = [world.adapter(1, roles=("q", "o", "up")), world.adapter(2, 5, ("k", "gate"))]
    full = world.run(world.engine(infos), asked(world, infos))
    found = world.run(world.engine(infos, kv_cache_dtype="fp8"), asked(world, infos))
    off = np.abs(scores(found, True) - scores(full, True))
    same = [answer.tokens[0] == full[name].tokens[0] for name, answer in found.items()]
    assert 0 < off.mean() < 0.3 and np.mean(same) > 0.7


TEXTS = (
    "The library opens at nine in the morning and", "Once there was a small bird that", "The weather today is",
    "How do I reset my password? First,", "Question: what is a loan? Answer:", "In the year 1990 the city",
)  # fmt: skip


def test_a_trained_model_says_mostly_the_same(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded base, from the configuration on, with plain kernels in the place of a GPU's."""
    held = {"auto": torch.float32, "fp8": FP8}
    for module in (engine_module, sizing):
        monkeypatch.setattr(module, "choose_cache_dtype", lambda config, *_: held[config.kv_cache_dtype])
    monkeypatch.setattr(kernels, "pick", lambda device: ReferenceOps())
    tokenizer = Tokenizer(find_model("lorikeet-nano"))

    def answers(kind: Any) -> tuple[Any, dict[str, Any]]:
        config = EngineConfig(
            device="cpu", dtype="float32", kv_cache_dtype=kind, max_context=128, max_seqs=8, kv_memory=2**24,
            adapter_memory=2**20, threads=1,
        )  # fmt: skip
        engine = engine_module.Engine.build(config)
        found = [world.request(text, tokenizer.encode(text), max_tokens=16, **SCORES) for text in TEXTS]
        return engine.sizes, world.run(engine, found)

    (sizes, full), (small, found) = answers("auto"), answers("fp8")
    assert small.blocks // 4 == sizes.blocks and small.kv_bytes <= 2**24
    off = np.abs(scores(found, True) - scores(full, True))
    same = [a == b for text in TEXTS for a, b in zip(found[text].tokens, full[text].tokens, strict=True)]
    assert 0 < off.mean() < 0.1 and np.mean(same) > 0.7


@pytest.mark.parametrize(
    "how", [{"k_bias": 3000.0}, {"v_factor": 2.0**12, "scale": 1.0}, {"v_factor": 2.0**-12, "scale": 1.0}]
)
def test_what_fp8_cannot_hold_is_refused(variant: Callable[..., Any], how: dict[str, float]) -> None:
    """Keys that all but agree, and scales of a checkpoint that cut values off, or round them to nothing."""
    world = variant(**how)
    with pytest.raises(
        ConfigError, match=r"kv_cache_dtype: found fp8, .* head \d in layer \d .* at most 25%"
    ) as refused:
        world.engine(kv_cache_dtype="fp8")
    assert refused.value.param == "kv_cache_dtype"


def test_broken_weights_are_not_calibrated(variant: Callable[..., Any]) -> None:
    world = variant()
    world.weights.layers[1].qkv.weight[-1, 0] = torch.nan
    with pytest.raises(ConfigError, match="kv_cache_dtype: .* in layer 1 .* inf%"):
        world.engine(kv_cache_dtype="fp8")


def test_an_adapter_beyond_the_scales_is_cut_off(world: Any) -> None:
    """Its keys and values are hundreds of times larger than the base's: numbers, not NaN, and others do not change."""
    wild = world.adapter(7, 4, ("k", "v"))
    world.adapters[wild.digest].data[:] *= 300
    requests = asked(world, [wild], 4)
    engine = world.engine([wild], kv_cache_dtype="fp8", prefix_cache=False)
    for layer in engine._runner.cache:
        layer.v.zero_()
    answers = world.run(engine, requests)
    assert all(answer.finish == "length" and np.isfinite(scores({"": answer})).all() for answer in answers.values())
    assert max(layer.v.float().abs().max() for layer in engine._runner.cache) == 448
    alone = world.run(world.engine(kv_cache_dtype="fp8"), requests[::2])
    for name, answer in alone.items():
        assert answers[name].tokens == answer.tokens


def test_blocks_that_are_shared_are_as_good_as_own_ones(world: Any) -> None:
    prefix = world.prompt(3, 41)
    requests = [
        world.request(f"{i}", prefix + world.prompt(i, 3), max_tokens=6, logprobs=0, ignore_eos=True) for i in range(4)
    ]

    def answers(shared: bool) -> dict[str, Any]:
        engine = world.engine(kv_cache_dtype="fp8", prefix_cache=shared)
        return world.run(engine, requests[:1]) | world.run(engine, requests[1:])

    alone, together = answers(False), answers(True)
    assert together["2"].events[-1].cached_tokens >= 40
    for name, answer in alone.items():
        assert together[name].tokens == answer.tokens
        assert together[name].logprobs == pytest.approx(answer.logprobs, abs=1e-4)


def test_the_kernels_of_a_gpu_fill_and_read_it(world: Any, device: str) -> None:
    """The interpreter cuts off what it cannot hold of a number, where a device rounds: twice the error, at most."""
    if device != "cpu":
        pytest.skip("the tiny base lies on the CPU")
    from lorikeet.kernels.gpu import GpuOps

    info = world.adapter(31, 3)
    requests = asked(world, [info], 2)
    expected = world.run(world.engine([info]), requests)
    engine = world.engine([info], ops=GpuOps(), kv_cache_dtype="fp8", blocks=24)
    found = world.run(engine, requests)
    scales = find_scales(world.spec, world.weights, ReferenceOps(), 64)
    for one, layer in zip(scales, engine._runner.cache, strict=True):
        assert torch.equal(one[0], layer.k_scale) and torch.equal(one[1], layer.v_scale)
    off = np.abs(scores(found, True) - scores(expected, True))
    assert 0 < off.mean() < 0.5
