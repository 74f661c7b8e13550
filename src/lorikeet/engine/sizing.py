"""What the machine offers and how it is shared out when nobody says: data type, cache and slab sizes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import torch
from torch import Tensor

from lorikeet.adapters.compiled import Dtype
from lorikeet.config import EngineConfig
from lorikeet.engine.scheduler import FREE_TOKENS
from lorikeet.errors import ConfigError
from lorikeet.kernels.int4_weight import Int4Weight, WhereItFits
from lorikeet.kernels.precision import DTYPES
from lorikeet.kernels.weight import DenseWeight, Int8Weight, Table, Weight, pack, pack_table
from lorikeet.model.cache_scales import FP8
from lorikeet.model.spec import ModelSpec

log = logging.getLogger(__name__)

_LOGIT_BYTES = 256 * 2**20  # of fp32 logits in one step
_SHARE = 0.25  # of the free memory, for the cache and again for the slab
_SLAB_BYTES = 2 * 2**30  # a slab never takes more unless told to
_COPY_BYTES = 64 * 2**20  # of adapters in one step
_DEVICE_COPY_BYTES = 256 * 2**20  # the same to a GPU: it copies beside the step, for about as long as that takes
_DEVICE_FREE_TOKENS = 256  # about where reading the weights and multiplying with them take as long
_DEVICE_SHARE = 0.92  # of a GPU's free memory: allocators round up, libraries take their own
_DEVICE_EXTRA = 2**30  # bytes of a GPU that captured graphs, workspaces and tables take
_LOGIT_COPIES = 4  # of a step's logits while tokens are sampled
_HOST_BYTES = 16 * 2**30  # of pinned copies, unless told more


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Everything about an engine that is counted. Memory in bytes."""

    dtype: torch.dtype
    adapter_dtype: torch.dtype
    max_context: int
    blocks: int
    kv_bytes: int
    slab_bytes: int
    logit_rows: int
    device: str = "cpu"
    host_bytes: int = 0  # of pinned copies of adapters, beside a GPU
    copy_bytes: int = _COPY_BYTES  # of adapters that a step may bring in
    free_tokens: int = FREE_TOKENS  # of a step that takes hardly longer for them

    @property
    def adapter_dtype_name(self) -> Dtype:
        return "bfloat16" if self.adapter_dtype == torch.bfloat16 else "float32"


def choose_device(config: EngineConfig) -> str:
    """`cpu` or `cuda`. Raises ConfigError for what is not there.

    `auto` is the CPU as long as no test of the GPU path has run on a GPU; the log says where one could be used.
    """
    found = torch.cuda.is_available()
    if config.device == "cuda" and not found:
        raise ConfigError(
            "device: found 'cuda', but torch finds no CUDA device",
            hint="use --device cpu, or install a CUDA build of torch where there is a GPU",
            param="device",
        )
    if config.device != "cuda" and config.adapter_host_memory is not None:
        raise ConfigError(
            "adapter_host_memory: not available on a CPU, where adapters live in one tier of memory",
            hint="use --adapter-memory, or --device cuda where there is a GPU",
            param="adapter_host_memory",
        )
    if config.device == "auto" and found:
        log.warning("there is a GPU, and --device cuda would use it; that path was never run on one yet (docs/gpu.md)")
    return "cuda" if config.device == "cuda" else "cpu"


def choose_weights(
    config: EngineConfig, dtype: torch.dtype, device: str = "cpu"
) -> Callable[[Tensor, Tensor | None], Weight]:
    """What a linear layer's weight is held as. Raises ConfigError for what this device or dtype does not multiply."""
    kind = config.quantize
    if kind == "none":
        return pack
    if kind in ("fp8", "nf4") and device == "cpu":
        raise _refused(f"{kind} weights need a GPU", "use --quantize int8 or int4 on a CPU")
    if dtype != torch.bfloat16:
        found = f"{kind} weights are multiplied in bfloat16, and the dtype here is {str(dtype)[6:]}"
        raise _refused(found, "add --dtype bfloat16, or leave --quantize out")
    if device == "cpu":
        return Int8Weight if kind == "int8" else WhereItFits(Int4Weight)
    from lorikeet.kernels.gpu_weight import CAPABILITY, Fp8Weight, GpuInt4Weight, GpuInt8Weight, Nf4Weight

    if kind != "fp8":
        return GpuInt8Weight if kind == "int8" else WhereItFits(GpuInt4Weight if kind == "int4" else Nf4Weight)
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        found = "fp8 weights need a GPU of compute capability {}.{} or more, found {}.{}".format(
            *CAPABILITY, *capability
        )
        raise _refused(found, "use --quantize int8, or leave it out")
    return Fp8Weight


def choose_table(config: EngineConfig, device: str = "cpu") -> Callable[[Tensor], Table]:
    """What the head is held as, and an embedding tied to it, once `choose_weights` took the configuration."""
    return partial(pack_table, int8=config.quantize == "int8") if device == "cpu" else DenseWeight


def _refused(message: str, hint: str) -> ConfigError:
    return ConfigError(f"quantize: {message}", hint=hint, param="quantize")


def choose_cache_dtype(config: EngineConfig, dtype: torch.dtype, device: str = "cpu") -> torch.dtype:
    """What keys and values are held in. Raises ConfigError for what this device does not read."""
    if config.kv_cache_dtype == "auto":
        return dtype
    found = "the device here is a CPU"
    if device != "cpu":
        from lorikeet.kernels.gpu_weight import CAPABILITY

        capability = torch.cuda.get_device_capability(device)
        if capability >= CAPABILITY:
            return FP8
        found = "the one here has {}.{}".format(*capability)
    raise ConfigError(
        f"kv_cache_dtype: an fp8 cache needs a GPU of compute capability 8.9 or more, and {found}",
        hint="leave --kv-cache-dtype out, or set it to auto",
        param="kv_cache_dtype",
    )


def available_memory() -> int:
    """Bytes this process may still take: what the machine has free, within the limit of its control group."""
    free = int(psutil.virtual_memory().available)
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return free
    return min(free, max(limit - used, 0))


def available_device_memory(device: str) -> int:
    """Bytes of a GPU this process may still take, with what its allocator holds and nobody uses."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def choose_sizes(config: EngineConfig, spec: ModelSpec, dtype: torch.dtype, device: str = "cpu") -> Sizes:
    """Sizes as configured, else from the free memory. Call it with the weights loaded. Raises ConfigError."""
    _check_counts(config, spec)
    max_context = config.max_context or spec.max_context
    adapter_dtype = dtype if config.adapter_dtype == "auto" else DTYPES[config.adapter_dtype]
    number = choose_cache_dtype(config, dtype, device).itemsize
    block_bytes = 2 * spec.num_layers * config.block_size * spec.kv_size * number
    logit_rows = max(2 * config.max_seqs, _LOGIT_BYTES // (4 * spec.vocab_size))
    wanted = config.max_seqs * -(-max_context // config.block_size) * block_bytes
    if device == "cpu":
        kv_bytes, slab_bytes = _share_host(config, wanted)
    else:
        working = _working_bytes(config, spec, dtype, logit_rows) + _dequantised_bytes(config, spec)
        kv_bytes, slab_bytes = _share_device(config, wanted, available_device_memory(device), working)
    blocks = kv_bytes // block_bytes
    if blocks < 2:
        raise ConfigError(
            f"kv_memory: {kv_bytes} bytes hold {blocks} blocks of {block_bytes} bytes; expected at least 2",
            hint="raise --kv-memory or lower --max-context",
            param="kv_memory",
        )
    if blocks * config.block_size < max_context:
        held = f"the key-value cache of {kv_bytes} bytes holds {blocks * config.block_size}"
        if config.max_context is not None:
            raise ConfigError(
                f"max_context: found {max_context}; {held}", hint="raise --kv-memory", param="max_context"
            )
        log.warning("the model's context of %d tokens is cut: %s; raise --kv-memory", max_context, held)
    return Sizes(
        dtype=dtype,
        adapter_dtype=adapter_dtype,
        max_context=min(max_context, blocks * config.block_size),
        blocks=blocks,
        kv_bytes=blocks * block_bytes,
        slab_bytes=slab_bytes // 64 * 64,
        logit_rows=logit_rows,
        device=device,
        host_bytes=0 if device == "cpu" else _host_bytes(config),
        copy_bytes=_COPY_BYTES if device == "cpu" else _DEVICE_COPY_BYTES,
        free_tokens=FREE_TOKENS if device == "cpu" else _DEVICE_FREE_TOKENS,
    )


def _share_host(config: EngineConfig, wanted: int) -> tuple[int, int]:
    """Bytes of cache and slab on a CPU: a quarter of what is free each, unless less is wanted or more configured."""
    share = int(available_memory() * _SHARE) // config.tensor_parallel
    kv_bytes = min(share, wanted) if config.kv_memory is None else config.kv_memory
    slab_bytes = min(share, _SLAB_BYTES) if config.adapter_memory is None else config.adapter_memory
    return kv_bytes, slab_bytes


def _share_device(config: EngineConfig, wanted: int, free: int, working: int) -> tuple[int, int]:
    """Bytes of cache and slab on a GPU: one budget, of which either takes half at most unless it is configured."""
    budget = int(free * _DEVICE_SHARE) - working
    if budget <= 0:
        raise ConfigError(
            f"device: {free} bytes of the GPU are free beside the weights, and a step works in {working} bytes",
            hint="lower --step-tokens or --max-seqs, use --quantize, or take a GPU with more memory",
            param="device",
        )
    kv_bytes, slab_bytes = config.kv_memory, config.adapter_memory
    if kv_bytes is None:
        kv_bytes = min(wanted, budget // 2 if slab_bytes is None else max(budget - slab_bytes, 0))
    if slab_bytes is None:
        slab_bytes = min(max(budget - kv_bytes, 0), budget // 2)
    if kv_bytes + slab_bytes > budget:
        name = "kv_memory" if config.kv_memory is not None else "adapter_memory"
        raise ConfigError(
            f"{name}: {kv_bytes} bytes of keys and values and {slab_bytes} of adapters; expected at most {budget} "
            "together, which the GPU has free beside the weights and what a step works in",
            hint="lower --kv-memory or --adapter-memory",
            param=name,
        )
    return kv_bytes, slab_bytes


def _working_bytes(config: EngineConfig, spec: ModelSpec, dtype: torch.dtype, logit_rows: int) -> int:
    """What a step takes of a GPU beside weights, cache and slab, at most."""
    widest = 3 * spec.intermediate_size + 4 * spec.hidden_size + 2 * (spec.q_size + 2 * spec.kv_size)
    activations = 2 * config.step_tokens * widest * dtype.itemsize
    return _LOGIT_COPIES * 4 * logit_rows * spec.vocab_size + activations + _DEVICE_EXTRA


def _dequantised_bytes(config: EngineConfig, spec: ModelSpec) -> int:
    """Of the largest weight in bf16: many rows are multiplied with that, one layer after the other."""
    if config.quantize in ("none", "fp8"):
        return 0
    return 2 * max(group.d_in * group.d_out for group in spec.groups[0].values())


def _host_bytes(config: EngineConfig) -> int:
    """Of pinned copies of adapters: as configured, else a quarter of the free host memory at most."""
    available = available_memory() // config.tensor_parallel  # every rank has copies of its own
    if config.adapter_host_memory is None:
        return min(int(available * _SHARE), _HOST_BYTES) // 64 * 64
    if config.adapter_host_memory > available:
        raise ConfigError(
            f"adapter_host_memory: found {config.adapter_host_memory}; expected at most the {available} bytes of host "
            "memory that are free",
            param="adapter_host_memory",
        )
    return config.adapter_host_memory // 64 * 64


def _check_counts(config: EngineConfig, spec: ModelSpec) -> None:
    for name in ("block_size", "max_seqs", "step_tokens", "chunk_tokens", "queue"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name}: found {value}; expected 1 or more", param=name)
    if config.step_tokens < config.max_seqs:
        raise ConfigError(
            f"step_tokens: found {config.step_tokens}; expected at least max_seqs ({config.max_seqs}), "
            "so that every sequence can decode in each step",
            param="step_tokens",
        )
    if config.max_context is not None and not 2 <= config.max_context <= spec.max_context:
        raise ConfigError(
            f"max_context: found {config.max_context}; expected 2 to {spec.max_context}, the model's own",
            param="max_context",
        )
