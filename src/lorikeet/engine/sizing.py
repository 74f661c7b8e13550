"""What the machine offers and how it is shared out when nobody says: data type, cache and slab sizes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

from lorikeet.adapters.compiled import Dtype
from lorikeet.config import EngineConfig
from lorikeet.errors import ConfigError
from lorikeet.kernels.precision import DTYPES
from lorikeet.kernels.weight import Int8Weight, Weight, pack
from lorikeet.model.spec import ModelSpec

log = logging.getLogger(__name__)

_LOGIT_BYTES = 256 * 2**20  # of fp32 logits in one step
_SHARE = 0.25  # of the free memory, for the cache and again for the slab
_SLAB_BYTES = 2 * 2**30  # a slab never takes more unless told to


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

    @property
    def adapter_dtype_name(self) -> Dtype:
        return "bfloat16" if self.adapter_dtype == torch.bfloat16 else "float32"


def choose_device(config: EngineConfig) -> str:
    """The device to run on. Raises ConfigError for one that this version has no kernels for."""
    if config.device == "cuda":
        raise ConfigError(
            "device: found 'cuda'; expected 'auto' or 'cpu', there are no GPU kernels in this version", param="device"
        )
    if config.adapter_host_memory is not None:
        raise ConfigError(
            "adapter_host_memory: not available on a CPU, where adapters live in one tier of memory",
            hint="use --adapter-memory",
            param="adapter_host_memory",
        )
    return "cpu"


def choose_weights(config: EngineConfig, dtype: torch.dtype) -> Callable[[Tensor, Tensor | None], Weight]:
    """What a linear layer's weight is held as. Raises ConfigError for int8 beside another dtype than bf16."""
    if config.quantize == "none":
        return pack
    if dtype != torch.bfloat16:
        raise ConfigError(
            f"quantize: int8 weights are multiplied in bfloat16, and the dtype here is {str(dtype)[6:]}",
            hint="add --dtype bfloat16, or leave --quantize out",
            param="quantize",
        )
    return Int8Weight


def available_memory() -> int:
    """Bytes this process may still take: what the machine has free, within the limit of its control group."""
    free = int(psutil.virtual_memory().available)
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return free
    return min(free, max(limit - used, 0))


def choose_sizes(config: EngineConfig, spec: ModelSpec, dtype: torch.dtype) -> Sizes:
    """Sizes as configured, else from the free memory. Call it with the weights loaded. Raises ConfigError."""
    _check_counts(config, spec)
    max_context = config.max_context or spec.max_context
    adapter_dtype = dtype if config.adapter_dtype == "auto" else DTYPES[config.adapter_dtype]
    available = available_memory()
    block_bytes = 2 * spec.num_layers * config.block_size * spec.kv_size * dtype.itemsize
    blocks_each = -(-max_context // config.block_size)
    if config.kv_memory is not None:
        kv_bytes = config.kv_memory
    else:
        kv_bytes = min(int(available * _SHARE), config.max_seqs * blocks_each * block_bytes)
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
    slab_bytes = config.adapter_memory
    if slab_bytes is None:
        slab_bytes = min(int(available * _SHARE), _SLAB_BYTES)
    return Sizes(
        dtype=dtype,
        adapter_dtype=adapter_dtype,
        max_context=min(max_context, blocks * config.block_size),
        blocks=blocks,
        kv_bytes=blocks * block_bytes,
        slab_bytes=slab_bytes // 64 * 64,
        logit_rows=max(2 * config.max_seqs, _LOGIT_BYTES // (4 * spec.vocab_size)),
    )


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
