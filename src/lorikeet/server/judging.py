"""What an evaluation job needs, and how the engine of its process is to share that out."""

from __future__ import annotations

from lorikeet.errors import ConfigError
from lorikeet.model.spec import ModelSpec
from lorikeet.server.estimate import RUNTIME
from lorikeet.server.job_memory import gib

QUESTIONS = 32  # in the engine at once, as `judge` has it
TOKENS = 512  # of a question and its answer for which there is room; longer ones run fewer at once
ADAPTERS = 256 * 2**20  # bytes: the adapter that is judged, and what a step copies of it
STEP_TOKENS = 1024  # of one forward pass, as the engine has it


def judging_memory(spec: ModelSpec, base: int) -> int:
    """Bytes. `base`: of the checkpoint; twice, as a processor without bf16 holds it in fp32."""
    return RUNTIME + 2 * base + _working(spec) + ADAPTERS + QUESTIONS * min(TOKENS, spec.max_context) * _kept(spec, 4)


def engine_memory(memory: int, spec: ModelSpec, itemsize: int, adapter: int = 0) -> tuple[int, int]:
    """Bytes of keys and values, and of adapters, for the engine of a process that holds at most `memory`.

    `itemsize` is that of the weights in memory, `adapter` the size of the files of what is judged. Raises `ConfigError`
    where not one question fits.
    """
    weights = itemsize * sum(site.d_in * site.d_out for site in spec.sites)
    left = memory - RUNTIME - weights - _working(spec)
    slab = min(max(ADAPTERS, 4 * adapter), left // 2)
    keys = min(left - slab, QUESTIONS * spec.max_context * _kept(spec, itemsize))
    least = min(TOKENS, spec.max_context) * _kept(spec, itemsize)
    if keys < least:
        needed = memory - left + 2 * least
        raise ConfigError(
            f"memory: judging on this base takes {gib(needed)} at least, and the job may hold {gib(memory)}",
            hint="start the server with a larger --job-memory", param="memory",
        )  # fmt: skip
    return keys, slab


def _kept(spec: ModelSpec, itemsize: int) -> int:
    """Bytes of the keys and values of a token."""
    return 2 * spec.num_layers * spec.kv_size * itemsize


def _working(spec: ModelSpec) -> int:
    """Bytes of a forward pass, and of the logits that tokens are chosen from, at most."""
    wide = 8 * spec.hidden_size + 4 * spec.intermediate_size + 4 * spec.q_size
    return 4 * (STEP_TOKENS * wide + 4 * QUESTIONS * spec.vocab_size)
