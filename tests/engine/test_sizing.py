"""Sizes from the configuration and the machine, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from msgspec.structs import replace

from lorikeet.config import EngineConfig
from lorikeet.engine import sizing
from lorikeet.engine.engine import Engine
from lorikeet.engine.sizing import choose_device, choose_sizes, choose_weights
from lorikeet.errors import ConfigError
from lorikeet.kernels.weight import Int8Weight, pack

GIB = 2**30


@pytest.fixture
def one_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "available_memory", lambda: GIB)


def test_the_cache_takes_what_all_sequences_need_or_its_share(world: Any, one_gib: None) -> None:
    spec = world.spec  # 2 layers of 2 x 16 numbers a token
    small = choose_sizes(EngineConfig(max_seqs=4), spec, torch.float32)
    assert (small.blocks, small.max_context) == (4 * 256 // 16, 256)
    assert small.kv_bytes == small.blocks * 16 * 2 * 2 * 16 * 4
    large = choose_sizes(EngineConfig(max_seqs=10**6, step_tokens=10**6), spec, torch.float32)
    assert GIB // 4 - large.kv_bytes in range(16 * 256)
    assert small.slab_bytes == GIB // 4
    half = choose_sizes(EngineConfig(max_seqs=4, adapter_dtype="bfloat16"), spec, torch.float32)
    assert half.adapter_dtype == torch.bfloat16 and half.adapter_dtype_name == "bfloat16"


def test_what_is_configured_is_taken(world: Any) -> None:
    config = EngineConfig(kv_memory=16 * 256 * 5 + 100, adapter_memory=1000, max_context=70, max_seqs=2, block_size=16)
    sizes = choose_sizes(config, world.spec, torch.float32)
    assert (sizes.blocks, sizes.max_context, sizes.slab_bytes) == (5, 70, 960)


def test_a_context_that_the_cache_cannot_hold(world: Any, caplog: pytest.LogCaptureFixture) -> None:
    small = EngineConfig(kv_memory=16 * 256 * 5)
    assert choose_sizes(small, world.spec, torch.float32).max_context == 80
    assert "context of 256 tokens is cut" in caplog.text and "80" in caplog.text
    with pytest.raises(ConfigError, match="max_context: found 200; .* holds 80"):
        choose_sizes(replace(small, max_context=200), world.spec, torch.float32)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (EngineConfig(kv_memory=4096), "kv_memory: 4096 bytes hold 1 blocks"),
        (EngineConfig(max_context=257), "max_context: found 257; expected 2 to 256"),
        (EngineConfig(max_context=1), "max_context: found 1"),
        (EngineConfig(step_tokens=10, max_seqs=11), r"step_tokens: found 10; expected at least max_seqs \(11\)"),
        (EngineConfig(block_size=0), "block_size: found 0"),
        (EngineConfig(queue=0), "queue: found 0"),
    ],
)
def test_impossible_counts(world: Any, config: EngineConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        choose_sizes(config, world.spec, torch.float32)
    assert caught.value.param == message.split(":")[0]


def test_devices_and_tiers_that_are_not_there() -> None:
    assert choose_device(EngineConfig()) == "cpu"
    with pytest.raises(ConfigError, match="device: found 'cuda'"):
        Engine.build(EngineConfig(device="cuda"))
    with pytest.raises(ConfigError, match="adapter_host_memory"):
        Engine.build(EngineConfig(adapter_host_memory=GIB))


def test_int8_weights_need_bf16() -> None:
    assert choose_weights(EngineConfig(), torch.float32) is pack
    assert choose_weights(EngineConfig(quantize="int8"), torch.bfloat16) is Int8Weight
    with pytest.raises(ConfigError, match="quantize: int8 .* float32") as caught:
        Engine.build(EngineConfig(quantize="int8", dtype="float32"))
    assert caught.value.param == "quantize"


def test_free_memory_is_known() -> None:
    assert sizing.available_memory() > 0
