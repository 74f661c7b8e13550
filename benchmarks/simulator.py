"""Does the simulator tell the truth? The same arrivals through the real engine and through `lorikeet simulate`.

The cost model is fitted on `lorikeet bench`'s bursts, which are not the scenario: open loop, Poisson, Zipf adapters, a
slab that holds a part of them. Latencies near saturation multiply every error of a step's time, and a machine whose
speed drifts by 5% would make any simulator wrong there: the rate is a share of what the simulator finds possible.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace
from rich.console import Console

from lorikeet.bench import TimedEngine, measure, open_engine
from lorikeet.config import EngineConfig, parse_size
from lorikeet.simulate.cost import CostModel, StepFeatures
from lorikeet.simulate.fit import Measurement
from lorikeet.simulate.run import cost_model
from lorikeet.simulate.scenario import FittedCost, Poisson, Scenario, check_scenario, read_scenario
from lorikeet.simulate.simulation import simulate
from lorikeet.simulate.summary import percentiles, summarise
from lorikeet.simulate.traffic import Traffic, draw_traffic
from shapes import NAMES, default_cache, fixture

SCENARIO = Path(__file__).parent.parent / "recipes" / "simulate" / "nano.yaml"
BAR = 0.2
JUDGED = ("requests_per_second", "tokens_per_second", "ttft_p50", "ttft_p95")
Json = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="nano", choices=NAMES)
    parser.add_argument("--scenario", type=Path, default=SCENARIO)
    parser.add_argument(
        "--load", type=float, default=0.4, help="share of the simulated throughput when all come at once"
    )
    parser.add_argument("--runs", type=int, default=3, help="each with its own arrivals; the medians are judged")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, help="of the engine; default: all cores")
    parser.add_argument("--cache", type=Path, default=default_cache())
    options = parser.parse_args()

    scenario = read_scenario(options.scenario)
    base = fixture(options.model, options.cache)
    folders = base.adapters([options.rank] * scenario.adapters.count)
    config = replace(engine_config(base.model, scenario), threads=options.threads)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bench.json"
        engine, infos, _ = open_engine(config, folders, Path(folder) / "compiled")
        scenario = replace(
            scenario,
            cost=FittedCost(file=str(file)),
            adapters=replace(scenario.adapters, bytes=[info.nbytes for info in infos]),
            engine=replace(scenario.engine, kv_tokens=engine.sizes.blocks * config.block_size),
        )
        check_scenario(scenario)
        bursts = Bursts(replace(config, adapter_memory=None), folders, file)
        cost = bursts.fit(scenario)
        scenario = with_rate(scenario, options.load * capacity(scenario, cost))
        timed, played = TimedEngine(engine), []
        for seed in range(options.runs):
            traffic = draw_traffic(replace(scenario, seed=scenario.seed + seed))
            played.append((traffic, *play(timed, infos, traffic)))
            cost = bursts.fit(scenario)
    runs = []
    for traffic, measured, steps in played:
        told = sum(cost.seconds(features) for features, _ in steps) / sum(seconds for _, seconds in steps)
        runs.append((measured, simulated_numbers(scenario, cost, traffic)))
        report(*runs[-1], told)
    conclude(runs)


class Bursts:
    """What `lorikeet bench` measures, again before and after each run: the speed of a machine drifts, and the cost
    model has to be that of the time of the runs. No step of a run is among them."""

    def __init__(self, config: EngineConfig, folders: list[Path], file: Path) -> None:
        self._config, self._folders, self._file = config, folders, file
        self._measured: Measurement | None = None

    def fit(self, scenario: Scenario) -> CostModel:
        """Measure once more, and fit on everything so far."""
        before = [] if self._measured is None else self._measured.steps
        new = measure(self._config, self._folders, seed=len(before))
        self._measured = replace(new, steps=[*before, *new.steps])
        self._file.write_bytes(msgspec.json.encode(self._measured))
        return cost_model(scenario, Console(stderr=True))


def engine_config(model: str, scenario: Scenario) -> EngineConfig:
    limits = scenario.engine
    return EngineConfig(
        model=model,
        adapter_memory=parse_size(limits.adapter_memory),
        block_size=limits.block_size,
        max_seqs=limits.max_seqs,
        step_tokens=limits.step_tokens,
        chunk_tokens=limits.chunk_tokens,
        queue=limits.queue,
    )


def with_rate(scenario: Scenario, rate: float) -> Scenario:
    return replace(scenario, traffic=[replace(stream, arrivals=Poisson(rate=rate)) for stream in scenario.traffic])


def capacity(scenario: Scenario, cost: CostModel) -> float:
    """Requests a second when all come at once."""
    flood = replace(with_rate(scenario, 1e6), engine=replace(scenario.engine, queue=scenario.requests))
    return float(summarise(flood, simulate(flood, cost))["throughput"]["requests_per_second"])


def play(engine: TimedEngine, infos: list[Any], traffic: Traffic) -> tuple[Json, list[tuple[StepFeatures, float]]]:
    """Send the requests when their time has come, whatever the engine does; step while there is work."""
    draw = np.random.default_rng(0)
    vocabulary = engine.engine.spec.vocab_size
    prompts = [draw.integers(0, vocabulary, length).tolist() for length in traffic.prompt]
    for i in range(20):  # code and memory are warm
        engine.add(draw.integers(0, vocabulary, 32).tolist(), 8, infos[i % len(infos)])
        engine.step()
    while engine.engine.has_work():
        engine.step()
    engine.steps.clear()
    count, times, outputs, chosen = len(traffic), *(a.tolist() for a in (traffic.time, traffic.output, traffic.adapter))
    index: dict[str, int] = {}
    first, last = [-1.0] * count, [-1.0] * count
    gaps: list[float] = []
    added = finished = 0
    begin = time.perf_counter()
    while finished < count:
        while added < count and times[added] <= time.perf_counter() - begin:
            name = engine.add(prompts[added], outputs[added], infos[chosen[added]] if chosen[added] >= 0 else None)
            index[name] = added
            added += 1
        if not engine.engine.has_work():
            time.sleep(max(times[added] - (time.perf_counter() - begin), 0.0))
            continue
        events = engine.step()
        now = time.perf_counter() - begin
        for event in events:
            i = index[event.request_id]
            if first[i] < 0:
                first[i] = now
            else:
                gaps.append(now - last[i])
            last[i] = now
            finished += event.finish is not None
            assert event.error is None, event.error
    steps = list(engine.steps)
    busy = sum(seconds for _, seconds in steps)
    return numbers(traffic, np.array(first), np.array(last), np.array(gaps), len(steps), busy), steps


def simulated_numbers(scenario: Scenario, cost: CostModel, traffic: Traffic) -> Json:
    record = simulate(scenario, cost, traffic)
    return numbers(traffic, record.first, record.last, record.gaps, record.steps, float(record.busy.sum()))


def numbers(traffic: Traffic, first: Any, last: Any, gaps: Any, steps: int, busy: float) -> Json:
    seconds = float(last.max() - traffic.time[0])
    ttft, itl = percentiles(first - traffic.time), percentiles(gaps)
    return {
        "requests_per_second": len(traffic) / seconds,
        "tokens_per_second": float(traffic.output.sum()) / seconds,
        "ttft_p50": ttft["p50"],
        "ttft_p95": ttft["p95"],
        "itl_p50": itl["p50"],
        "itl_p95": itl["p95"],
        "steps": steps,
        "busy_share": busy / seconds,
    }


def report(measured: Json, simulated: Json, told: float) -> None:
    """`told` is what the cost model says of the very steps that the engine took, predicted / measured."""
    print(f"\n{'':24}{'measured':>12}{'simulated':>12}{'ratio':>8}")
    for name, value in measured.items():
        print(f"{name:24}{value:12.5g}{simulated[name]:12.5g}{simulated[name] / value:8.2f}")
    print(f"{'cost of measured steps':48}{told:8.2f}", flush=True)


def conclude(runs: list[tuple[Json, Json]]) -> None:
    ratios = {
        name: float(np.median([simulated[name] / measured[name] for measured, simulated in runs])) for name in JUDGED
    }
    holds = all(abs(ratio - 1) <= BAR for ratio in ratios.values())
    print("\nmedian ratios " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()))
    pairs = [{"measured": measured, "simulated": simulated} for measured, simulated in runs]
    print(json.dumps({"ratios": ratios, "bar": BAR, "holds": holds, "runs": pairs}))


if __name__ == "__main__":
    main()
