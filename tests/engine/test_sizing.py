"""Sizes from the configuration and the machine, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from msgspec.structs import replace

from lorikeet.config import EngineConfig
from lorikeet.engine import sizing
from lorikeet.engine.engine import Engine
from lorikeet.engine.sizing import choose_cache_dtype, choose_device, choose_sizes, choose_weights
from lorikeet.errors import ConfigError
from lorikeet.kernels.gpu_weight import Fp8Weight, GpuInt4Weight, GpuInt8Weight, Nf4Weight
from lorikeet.kernels.int4_weight import Int4Weight, WhereItFits
from lorikeet.kernels.precision import choose_dtype
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


def test_devices_and_tiers_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(EngineConfig()) == "cpu"
    assert choose_device(EngineConfig(device="cpu")) == "cpu"
    with pytest.raises(ConfigError, match="device: found 'cuda', but torch finds no CUDA device"):
        Engine.build(EngineConfig(device="cuda"))
    with pytest.raises(ConfigError, match="adapter_host_memory"):
        Engine.build(EngineConfig(adapter_host_memory=GIB))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantised_weights_need_bf16(kind: Any) -> None:
    with pytest.raises(ConfigError, match=f"quantize: {kind} .* float32") as caught:
        Engine.build(EngineConfig(quantize=kind, dtype="float32"))
    assert caught.value.param == "quantize"


# --- a GPU --------------------------------------------------------------------------------------------------------


@pytest.fixture
def ten_gib(monkeypatch: pytest.MonkeyPatch, one_gib: None) -> None:
    """A GPU with 10 GiB free, 92% of which less a working GiB and a bit are shared out."""
    monkeypatch.setattr(sizing, "available_device_memory", lambda device: 10 * GIB)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def test_a_gpu_is_for_those_who_ask_for_it(ten_gib: None, caplog: pytest.LogCaptureFixture) -> None:
    assert choose_device(EngineConfig(device="cuda")) == "cuda"
    assert choose_device(EngineConfig(device="cuda", adapter_host_memory=GIB)) == "cuda"
    assert choose_device(EngineConfig(device="cpu")) == "cpu" and not caplog.records
    assert choose_device(EngineConfig()) == "cpu" and "--device cuda" in caplog.text
    for device in ("auto", "cpu"):
        with pytest.raises(ConfigError, match="adapter_host_memory: not available on a CPU"):
            choose_device(EngineConfig(device=device, adapter_host_memory=GIB))
    assert choose_dtype("auto", "cuda") == torch.bfloat16


def test_cache_and_slab_share_one_budget(world: Any, ten_gib: None) -> None:
    def sizes(**config: Any) -> Any:
        return choose_sizes(EngineConfig(max_seqs=4, **config), world.spec, torch.float32, "cuda")

    each = 4 * 256 * 256  # 4 sequences of 256 tokens
    small = sizes()
    assert small.kv_bytes == each and 3 * GIB < small.slab_bytes < 4.2 * GIB
    assert (small.device, small.host_bytes, small.copy_bytes) == ("cuda", GIB // 4, 256 * 2**20)
    assert small.free_tokens > 100 > choose_sizes(EngineConfig(), world.spec, torch.float32).free_tokens
    both = sizes(kv_memory=2 * GIB, adapter_memory=5 * GIB)
    assert (both.kv_bytes, both.slab_bytes) == (2 * GIB, 5 * GIB)
    assert sizes(kv_memory=7 * GIB).slab_bytes < 1.2 * GIB
    assert sizes(adapter_memory=6 * GIB, adapter_host_memory=GIB // 2).host_bytes == GIB // 2
    with pytest.raises(ConfigError, match="kv_memory: .* expected at most") as caught:
        sizes(kv_memory=4 * GIB, adapter_memory=5 * GIB)
    assert caught.value.param == "kv_memory"
    with pytest.raises(ConfigError, match="adapter_memory: .* expected at most"):
        sizes(adapter_memory=9 * GIB)
    with pytest.raises(ConfigError, match="adapter_host_memory: found .* that are free"):
        sizes(adapter_host_memory=2 * GIB)


def test_a_gpu_without_room(world: Any, ten_gib: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "available_device_memory", lambda device: GIB)
    with pytest.raises(ConfigError, match="device: .* bytes of the GPU are free beside the weights"):
        choose_sizes(EngineConfig(), world.spec, torch.float32, "cuda")


def test_weights_by_device(ten_gib: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(kind: Any, device: str) -> Any:
        found = choose_weights(EngineConfig(quantize=kind), torch.bfloat16, device)
        return found.form if isinstance(found, WhereItFits) else found

    assert [chosen(kind, "cpu") for kind in ("none", "int8", "int4")] == [pack, Int8Weight, Int4Weight]
    forms = {"none": pack, "int8": GpuInt8Weight, "int4": GpuInt4Weight, "nf4": Nf4Weight, "fp8": Fp8Weight}
    assert {kind: chosen(kind, "cuda") for kind in forms} == forms
    for kind in ("fp8", "nf4"):
        with pytest.raises(ConfigError, match=f"quantize: {kind} weights need a GPU"):
            chosen(kind, "cpu")
    with pytest.raises(ConfigError, match="quantize: fp8 .* dtype here is float32"):
        choose_weights(EngineConfig(quantize="fp8"), torch.float32, "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ConfigError, match="quantize: fp8 .* 8.9 .* found 8.0"):
        chosen("fp8", "cuda")


def test_many_rows_need_room_for_a_dequantised_weight(world: Any, ten_gib: None) -> None:
    plain, int4 = (
        choose_sizes(EngineConfig(quantize=kind, max_seqs=4), world.spec, torch.bfloat16, "cuda")
        for kind in ("none", "int4")
    )
    largest = 2 * max(group.d_in * group.d_out for group in world.spec.groups[0].values())
    assert 0 <= plain.slab_bytes - int4.slab_bytes - largest // 2 <= 64  # adapters take half of what is left


def test_an_fp8_cache_holds_twice_as_much(world: Any, ten_gib: None, monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(kv_memory=GIB, kv_cache_dtype="fp8")
    assert choose_cache_dtype(config, torch.bfloat16, "cuda") == torch.float8_e4m3fn
    assert choose_cache_dtype(EngineConfig(), torch.bfloat16, "cuda") == torch.bfloat16
    full = choose_sizes(replace(config, kv_cache_dtype="auto"), world.spec, torch.bfloat16, "cuda")
    small = choose_sizes(config, world.spec, torch.bfloat16, "cuda")
    assert (small.blocks, small.kv_bytes, small.dtype) == (2 * full.blocks, full.kv_bytes, torch.bfloat16)
    wanted = choose_sizes(EngineConfig(kv_cache_dtype="fp8"), world.spec, torch.bfloat16, "cuda")
    assert wanted.kv_bytes == 64 * 256 * 64, "what all sequences need takes half the bytes"
    with pytest.raises(ConfigError, match="kv_cache_dtype: an fp8 cache needs a GPU .* here is a CPU") as caught:
        Engine.build(EngineConfig(device="cpu", kv_cache_dtype="fp8"))
    assert caught.value.param == "kv_cache_dtype"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(ConfigError, match="kv_cache_dtype: .* 8.9 or more, and the one here has 8.6"):
        choose_sizes(config, world.spec, torch.bfloat16, "cuda")


def test_free_memory_is_known() -> None:
    assert sizing.available_memory() > 0
