"""Measured steps on disk, and the cost model fitted on them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta
from scipy.optimize import nnls

from lorikeet.errors import ConfigError
from lorikeet.simulate.cost import CostModel, StepFeatures
from lorikeet.simulate.scenario import FittedCost

Floats = npt.NDArray[np.float64]

OVERHEAD = ("fixed", "sequences", "logit_rows", "adapters", "copied_bytes")
MEMORY = ("weights", "context", "adapter_bytes")
ARITHMETIC = ("tokens", "pairs", "adapter_work")
LEAST_STEPS = 50
_KNEES = (4, 8, 16, 32, 64, 128, 256)  # tokens from which a step may be bound by arithmetic: where the search begins
_ROUNDS = 30


class Measurement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The output of `lorikeet bench`. A row of `steps` is the features in the order of `features`, then seconds."""

    version: Literal[1] = 1
    model: str
    machine: str
    adapters: int  # that took part
    features: tuple[str, ...] = StepFeatures._fields
    steps: Annotated[list[list[float]], Meta(min_length=LEAST_STEPS)]
    compiles: list[tuple[int, float]] = []  # bytes and seconds of reading, checking and compiling one adapter


@dataclass(frozen=True, slots=True)
class Fit:
    """A model, and its error on steps that it was not fitted on: the median of |predicted / measured - 1|, and the
    seconds of all of them together, predicted / measured - 1."""

    model: CostModel
    median_error: float
    total_error: float


def read_measurement(path: Path) -> Measurement:
    """Raises ConfigError."""
    try:
        measured = msgspec.json.decode(path.read_bytes(), type=Measurement)
    except FileNotFoundError:
        raise ConfigError(
            f"cost.file: {path} does not exist", hint="`lorikeet bench --output FILE` measures it", param="cost.file"
        ) from None
    except msgspec.DecodeError as error:
        raise ConfigError(f"cost.file: {path}: {error}", hint="measure again", param="cost.file") from None
    if measured.features != StepFeatures._fields:
        raise ConfigError(
            f"cost.file: {path} has the features {', '.join(measured.features)}; "
            f"expected {', '.join(StepFeatures._fields)}",
            hint="measure again with this version's `lorikeet bench`",
            param="cost.file",
        )
    if any(len(step) != len(StepFeatures._fields) + 1 or step[-1] <= 0 for step in measured.steps):
        raise ConfigError(
            f"cost.file: {path}: expected {len(StepFeatures._fields) + 1} numbers a step, the seconds above 0",
            param="cost.file",
        )
    return measured


def fitted_model(cost: FittedCost, *, adapters: bool, cold: bool) -> Fit:
    """The model of a machine by its measured steps, for a scenario with `adapters`, some of them `cold`."""
    measured = read_measurement(Path(cost.file))
    if adapters and not measured.adapters:
        raise ConfigError(
            f"cost.file: {cost.file} was measured without adapters, the scenario has some",
            hint="`lorikeet bench --adapters DIR` measures steps with adapters",
            param="cost.file",
        )
    seconds, byte = _fit_compiles(measured.compiles)
    if cost.cold is not None:
        seconds = cost.cold
    elif cold and not measured.compiles:
        raise ConfigError(f"cost.cold: missing, and {cost.file} has no measured compilation", param="cost.cold")
    if cost.cold_bandwidth is not None:
        byte = 1 / cost.cold_bandwidth
    fit = fit_steps(np.array(measured.steps))
    return replace(fit, model=replace(fit.model, cold=seconds, cold_bytes=byte, request=cost.request))


def fit_steps(steps: Floats) -> Fit:
    """Fit [N, features + 1], the last column seconds. Of both ways to combine, the one that predicts the other half of
    the steps better."""
    columns = _columns(steps[:, :-1])
    seconds = steps[:, -1]
    learn = np.arange(len(steps)) // 16 % 2 == 0
    best: tuple[float, str, Floats] | None = None
    for combine in ("sum", "max"):
        found = _fit(combine, {name: column[learn] for name, column in columns.items()}, seconds[learn])
        ratio = _predict(combine, columns, found)[~learn] / seconds[~learn]
        loss = float(np.mean((ratio - 1) ** 2))
        if best is None or loss < best[0]:
            best = loss, combine, ratio
    assert best is not None
    _, combine, ratio = best
    found = _fit(combine, columns, seconds)
    return Fit(
        model=CostModel(combine="max" if combine == "max" else "sum", **found),
        median_error=float(np.median(np.abs(ratio - 1))),
        total_error=float(np.sum(ratio * seconds[~learn]) / np.sum(seconds[~learn]) - 1),
    )


def _columns(features: Floats) -> dict[str, Floats]:
    """What each coefficient is multiplied by, [N] each."""
    columns = dict(zip(StepFeatures._fields, features.T, strict=True))
    return columns | {"fixed": np.ones(len(features)), "weights": (columns["tokens"] > 0).astype(np.float64)}


def _predict(combine: str, columns: dict[str, Floats], found: dict[str, float]) -> Floats:
    overhead, memory, arithmetic = (
        sum((found[name] * columns[name] for name in names if name in found), np.zeros(len(columns["fixed"])))
        for names in (OVERHEAD, MEMORY, ARITHMETIC)
    )
    return overhead + (memory + arithmetic if combine == "sum" else np.maximum(memory, arithmetic))


def _fit(combine: str, columns: dict[str, Floats], seconds: Floats) -> dict[str, float]:
    if combine == "sum":  # one step costs the weights once, which `fixed` says already
        return _solve({name: columns[name] for name in (*OVERHEAD, *MEMORY[1:], *ARITHMETIC)}, seconds)
    fits = [_fit_longer(columns, seconds, columns["tokens"] < knee) for knee in _KNEES]
    losses = [np.mean((_predict("max", columns, found) / seconds - 1) ** 2) for found in fits]
    return fits[int(np.argmin(losses))]


def _fit_longer(columns: dict[str, Floats], seconds: Floats, by_memory: npt.NDArray[np.bool_]) -> dict[str, float]:
    """Alternate between least squares and saying which steps are bound by memory (max-affine regression: Magnani and
    Boyd 2009)."""
    for _ in range(_ROUNDS):
        masked = {name: columns[name] for name in OVERHEAD}
        masked |= {name: columns[name] * by_memory for name in MEMORY}
        masked |= {name: columns[name] * ~by_memory for name in ARITHMETIC}
        found = _solve(masked, seconds)
        memory, arithmetic = (sum(found[n] * columns[n] for n in names) for names in (MEMORY, ARITHMETIC))
        before, by_memory = by_memory, np.asarray(memory >= arithmetic)
        if np.array_equal(before, by_memory):
            break
    return found


def _solve(columns: dict[str, Floats], seconds: Floats) -> dict[str, float]:
    """Least squares of relative errors with coefficients of 0 or more. Errors are relative to the prediction of the
    round before: relative to what was measured, slow steps would count for too little and the sum come out low."""
    table = np.stack(list(columns.values()), axis=1)
    scale = np.maximum(table.max(axis=0), 1e-300)
    expected = seconds
    for _ in range(4):
        solved, _ = nnls(table / scale / expected[:, None], seconds / expected, maxiter=100 * table.shape[1])
        expected = np.maximum(table / scale @ solved, seconds.min() / 2)
    return dict(zip(columns, (solved / scale).tolist(), strict=True))


def _fit_compiles(compiles: list[tuple[int, float]]) -> tuple[float, float]:
    """Seconds of a compilation and seconds a byte."""
    if not compiles:
        return 0.0, 0.0
    sizes, seconds = np.array(compiles).T
    found = _solve({"fixed": np.ones(len(sizes)), "bytes": sizes}, seconds)
    return found["fixed"], found["bytes"]
