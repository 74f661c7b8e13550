"""An evaluation's engine has its place within the memory of its job, whatever the machine has free."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lorikeet.errors import ConfigError
from lorikeet.model.families import load_spec
from lorikeet.model.sources import find_model
from lorikeet.model.spec import ModelSpec
from lorikeet.server.estimate import RUNTIME
from lorikeet.server.judging import QUESTIONS, TOKENS, engine_memory, judging_memory

NANO = load_spec(find_model("lorikeet-nano"))
LLAMA_8B: dict[str, Any] = {
    "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_layers": 32, "num_heads": 32,
    "num_kv_heads": 8, "head_dim": 128, "max_context": 131_072,
}  # fmt: skip
SPECS = (NANO, replace(NANO, **LLAMA_8B))


@given(st.sampled_from(SPECS), st.integers(0, 2**38), st.sampled_from([2, 4]), st.integers(0, 2**32))
def test_all_that_it_takes_is_within_the_jobs_memory(spec: ModelSpec, memory: int, itemsize: int, adapter: int) -> None:
    numbers = sum(site.d_in * site.d_out for site in spec.sites)
    kept = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * itemsize  # of a token
    try:
        keys, slab = engine_memory(memory, spec, itemsize, adapter)
    except ConfigError as error:
        assert error.param == "memory" and "--job-memory" in str(error.hint)
        assert memory < RUNTIME + 3 * 2**30 + itemsize * numbers
        return
    assert keys + slab + itemsize * numbers + RUNTIME <= memory
    assert keys >= kept * min(TOKENS, spec.max_context) and slab > 0
    assert keys <= kept * QUESTIONS * spec.max_context  # what it could ever hold


@given(st.sampled_from(SPECS), st.sampled_from([2, 4]), st.integers(0, 2**27))
def test_what_is_estimated_is_enough(spec: ModelSpec, itemsize: int, adapter: int) -> None:
    """For all questions at once, at their expected length, and an adapter of a usual size."""
    assume(4 * adapter <= 2**28)
    base = 2 * sum(site.d_in * site.d_out for site in spec.sites)
    keys, slab = engine_memory(judging_memory(spec, base), spec, itemsize, adapter)
    kept = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * itemsize
    assert keys >= QUESTIONS * kept * min(TOKENS, spec.max_context) and slab >= 4 * adapter


def test_more_than_there_is_is_refused_by_name() -> None:
    with pytest.raises(
        ConfigError, match=r"judging on this base takes 1[5-9]\.\d GiB at least, and the job may hold 2"
    ):
        engine_memory(2 * 2**30, SPECS[1], 2)
