"""`lorikeet simulate`: read a scenario, run it, print the tables, write the page."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import msgspec
from rich.console import Console

from lorikeet.errors import ConfigError
from lorikeet.simulate.cost import CostModel, given_model
from lorikeet.simulate.page import page
from lorikeet.simulate.scenario import GivenCost, Scenario, read_scenario
from lorikeet.simulate.simulation import simulate
from lorikeet.simulate.summary import summarise, tables


def run_simulate(path: Path, output: Path, as_json: bool = False) -> None:
    """Simulate the scenario at `path`. Numbers go to standard output, everything else to standard error."""
    errors = Console(stderr=True)
    scenario = read_scenario(path)
    if not output.parent.is_dir():
        raise ConfigError(f"--output: found {output}, and there is no folder {output.parent}", param="output")
    cost = cost_model(scenario, errors)
    started = time.perf_counter()
    with errors.status(f"simulating {scenario.requests} requests"):
        record = simulate(scenario, cost)
    seconds = time.perf_counter() - started
    summary = summarise(scenario, record)
    output.write_text(page(path.stem, summary, record), encoding="utf-8")
    if as_json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(summary)).decode() + "\n")
    else:
        Console().print(tables(summary))
    errors.print(f"{record.steps} steps simulated in {seconds:.1f} s; the plots are in {output}", highlight=False)


def cost_model(scenario: Scenario, log: Console | None = None) -> CostModel:
    """The model that a scenario asks for, given or fitted; how good the fit is goes to `log`."""
    if isinstance(scenario.cost, GivenCost):
        return given_model(scenario.cost)
    from lorikeet.simulate.fit import fitted_model  # scipy takes a while to import

    adapters = any(stream.adapters is not None for stream in scenario.traffic)
    fit = fitted_model(scenario.cost, adapters=adapters, cold=adapters and not scenario.adapters.compiled)
    if log is not None:
        log.print(
            f"cost fitted on {scenario.cost.file} ({fit.model.combine} of memory and arithmetic): on held-out steps "
            f"the median error is {fit.median_error:.1%}, that of all together {fit.total_error:+.1%}",
            highlight=False,
        )
    return fit.model
