"""Measuring steps, on a tiny base; how fast they are is not looked at."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from tests.simulate.scenarios import scenario, stream

import lorikeet.kernels.cpu  # noqa: F401  before the cache is another: compiled kernels stay where they are
from lorikeet import bench
from lorikeet.config import EngineConfig
from lorikeet.errors import ConfigError
from lorikeet.simulate.cost import StepFeatures
from lorikeet.simulate.fit import read_measurement
from lorikeet.simulate.run import cost_model
from lorikeet.simulate.simulation import simulate


def test_steps_are_measured_and_a_simulation_runs_on_them(
    checkpoint: object, adapters: object, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "BATCHES", (1, 4))
    monkeypatch.setattr(bench, "DISTINCT", (0, 2))
    monkeypatch.setattr(bench, "PROMPTS", (6, 30))
    monkeypatch.setattr(bench, "NEW_TOKENS", 8)
    folders = adapters("llama", 3)  # type: ignore[operator]
    config = EngineConfig(model=str(checkpoint("llama")), max_seqs=4, step_tokens=32, kv_memory=2**22)  # type: ignore[operator]
    output = tmp_path / "bench.json"
    bench.run_bench(config, adapters=folders[0].parent, output=output)
    measured = read_measurement(output)
    steps = [StepFeatures(*map(int, step[:-1])) for step in measured.steps]
    assert measured.adapters >= 3 and measured.compiles and all(seconds > 0 for *_, seconds in measured.steps)
    assert {step.sequences for step in steps} >= {1, 2, 3, 4} and max(step.tokens for step in steps) >= 30
    assert {step.adapters for step in steps} == {0, 1, 2} and any(step.copied_bytes for step in steps)
    assert all(step.pairs >= step.context >= step.tokens >= step.sequences for step in steps)
    made = scenario(cost={"kind": "fitted", "file": str(output)}, adapters={"count": 2, "bytes": ["1KiB"]})
    made = msgspec.structs.replace(made, requests=20, traffic=[msgspec.convert(stream(), type(made.traffic[0]))])
    assert simulate(made, cost_model(made)).made.sum() > 0


def test_a_folder_without_adapters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--adapters: found no adapter_config.json"):
        bench.adapter_folders(tmp_path)
