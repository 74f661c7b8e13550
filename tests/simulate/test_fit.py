from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from lorikeet.errors import ConfigError
from lorikeet.simulate.cost import CostModel, StepFeatures
from lorikeet.simulate.fit import Measurement, fit_steps, fitted_model, read_measurement
from lorikeet.simulate.scenario import FittedCost

SUM = CostModel(
    combine="sum", fixed=1e-3, sequences=2e-6, logit_rows=3e-6, adapters=1e-5, copied_bytes=1e-10,
    context=5e-9, adapter_bytes=2e-10, tokens=4e-6, pairs=1e-9, adapter_work=1e-13,
)  # fmt: skip
MAX = replace(SUM, combine="max", weights=2e-3, tokens=4e-5, adapter_bytes=2e-9)


def random_steps(model: CostModel, count: int = 2000, noise: float = 0.0) -> np.ndarray:
    draw = np.random.default_rng(0)
    steps = []
    for _ in range(count):
        sequences, adapters = int(draw.integers(1, 64)), int(draw.integers(0, 16))
        prompts = int(draw.integers(0, 1000)) * int(draw.integers(0, 2))
        context, nbytes = int(draw.integers(1, 500)) * sequences, adapters * int(draw.integers(1, 4)) * 2**20
        features = StepFeatures(
            tokens=sequences + prompts,
            sequences=sequences,
            logit_rows=int(draw.integers(1, sequences + 1)),
            context=context,
            pairs=context + prompts**2 // 2,
            adapters=adapters,
            adapter_bytes=nbytes,
            adapter_work=int(nbytes * prompts * draw.random()),
            copied_bytes=int(draw.integers(0, 2)) * 10**7,
        )
        steps.append([*features, model.seconds(features) * float(np.exp(noise * draw.normal()))])
    return np.array(steps)


def test_a_sum_is_recovered() -> None:
    fit = fit_steps(random_steps(SUM))
    assert fit.model.combine == "sum"
    for name in ("fixed", "sequences", "logit_rows", "adapters", "context", "tokens", "pairs", "copied_bytes"):
        assert getattr(fit.model, name) == pytest.approx(getattr(SUM, name), rel=1e-3), name
    assert fit.median_error < 1e-6


def test_the_longer_of_memory_and_arithmetic_is_recovered() -> None:
    steps = random_steps(MAX)
    fit = fit_steps(steps)
    assert fit.model.combine == "max"
    predicted = np.array([fit.model.seconds(StepFeatures(*map(int, step[:-1]))) for step in steps])
    assert predicted == pytest.approx(steps[:, -1], rel=0.05)
    assert fit.model.tokens == pytest.approx(MAX.tokens, rel=0.05)


def test_noise_leaves_the_sum_right() -> None:
    steps = random_steps(SUM, noise=0.3)
    fit = fit_steps(steps)
    predicted = sum(fit.model.seconds(StepFeatures(*map(int, step[:-1]))) for step in steps)
    assert predicted == pytest.approx(steps[:, -1].sum(), rel=0.02)
    assert fit.median_error == pytest.approx(0.2, abs=0.05)


def written(path: Path, **changes: object) -> str:
    fields = {"model": "m", "machine": "x", "adapters": 2, "steps": random_steps(SUM, 200).tolist()}
    compiles = {"compiles": [(10**6, 0.02), (3 * 10**6, 0.04)]}
    path.write_bytes(msgspec.json.encode(Measurement(**(fields | compiles | changes))))
    return str(path)


def test_a_measurement_becomes_a_model(tmp_path: Path) -> None:
    cost = FittedCost(file=written(tmp_path / "bench.json"), request=0.002)
    model = fitted_model(cost, adapters=True, cold=True).model
    assert model.cold_seconds(2 * 10**6) == pytest.approx(0.03)
    assert model.request == 0.002
    told = fitted_model(msgspec.structs.replace(cost, cold=1.0, cold_bandwidth=1e6), adapters=True, cold=True).model
    assert told.cold_seconds(2 * 10**6) == pytest.approx(3.0)


def test_what_was_not_measured_is_refused(tmp_path: Path) -> None:
    cost = FittedCost(file=written(tmp_path / "bench.json", adapters=0, compiles=[]))
    with pytest.raises(ConfigError, match="measured without adapters"):
        fitted_model(cost, adapters=True, cold=False)
    cost = FittedCost(file=written(tmp_path / "bench.json", compiles=[]))
    with pytest.raises(ConfigError, match="cost.cold: missing"):
        fitted_model(cost, adapters=True, cold=True)
    fitted_model(cost, adapters=True, cold=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": ["tokens"]}, "has the features tokens; expected tokens, sequences"),
        ({"steps": [[1.0]] * 60}, "expected 10 numbers a step"),
        ({"steps": []}, "steps"),
        ({"speed": 1}, "unknown field `speed`"),
    ],
)
def test_a_file_of_another_kind_is_refused(change: dict[str, object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    written(path)
    path.write_text(msgspec.json.encode(msgspec.json.decode(path.read_bytes()) | change).decode())
    with pytest.raises(ConfigError, match=message):
        read_measurement(path)
    with pytest.raises(ConfigError, match="does not exist"):
        read_measurement(tmp_path / "nothing.json")
