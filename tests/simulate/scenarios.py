"""Small scenarios to change one thing of."""

from __future__ import annotations

from typing import Any

import msgspec

from lorikeet.simulate.cost import CostModel
from lorikeet.simulate.scenario import Scenario, check_scenario

GIVEN = {
    "kind": "given", "fixed": 1e-3, "weights": "1GiB", "parameters": 5e8, "kv_token_bytes": "16KiB",
    "bandwidth": 1e12, "flops": 1e14, "copy_bandwidth": 1e10, "cold": 0.05, "cold_bandwidth": 1e9, "request": 1e-4,
}  # fmt: skip


def stream(**changes: Any) -> dict[str, Any]:
    return {
        "tenant": "a",
        "arrivals": {"kind": "poisson", "rate": 100.0},
        "prompt": {"kind": "uniform", "min": 5, "max": 60},
        "output": {"kind": "uniform", "min": 1, "max": 20},
    } | changes


def document(**changes: Any) -> dict[str, Any]:
    """A scenario as it stands in YAML."""
    return {
        "version": 1,
        "requests": 300,
        "traffic": [stream(adapters={"kind": "zipf"})],
        "adapters": {"count": 20, "bytes": ["1MiB", "3MiB"]},
        "replicas": {"count": 2},
        "engine": {"kv_tokens": 4096, "adapter_memory": "12MiB", "max_seqs": 8, "step_tokens": 64},
        "cost": GIVEN,
    } | changes


def scenario(**changes: Any) -> Scenario:
    made = msgspec.convert(document(**changes), Scenario)
    check_scenario(made)
    return made


def flat(seconds: float) -> CostModel:
    """Every step takes as long, whatever is in it."""
    return CostModel(combine="sum", fixed=seconds)
