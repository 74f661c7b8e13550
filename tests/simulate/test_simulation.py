from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.simulate.scenarios import flat, scenario, stream

from lorikeet.simulate.cost import CostModel, given_model
from lorikeet.simulate.scenario import GivenCost, Scenario
from lorikeet.simulate.simulation import OUTCOMES, Record, simulate
from lorikeet.simulate.traffic import Traffic


def run(given_scenario: Scenario, cost: CostModel | None = None) -> Record:
    if cost is None:
        assert isinstance(given_scenario.cost, GivenCost)
        cost = given_model(given_scenario.cost)
    return simulate(given_scenario, cost)


def requests(times: list[float], prompt: list[int], output: list[int], adapter: list[int] | None = None) -> Traffic:
    count = len(times)
    none = np.full(count, -1) if adapter is None else np.array(adapter)
    return Traffic(np.array(times), np.zeros(count, np.int64), none, np.array(prompt), np.array(output))


ONE = {"kind": "fixed", "tokens": 1}


def test_one_sequence_at_a_time_is_an_m_d_1_queue() -> None:
    """Mean wait of Pollaczek and Khinchine: rho D / (2 (1 - rho))."""
    step, rate = 0.01, 70.0
    record = run(
        scenario(
            requests=40_000,
            traffic=[stream(arrivals={"kind": "poisson", "rate": rate}, prompt=ONE, output=ONE)],
            replicas={"count": 1},
            engine={"kv_tokens": 64, "max_seqs": 1, "queue": 10_000},
        ),
        flat(step),
    )
    wait = record.first - record.traffic.time - step
    busy = rate * step
    assert wait.min() >= -1e-9
    assert wait.mean() == pytest.approx(busy * step / (2 * (1 - busy)), rel=0.06)
    assert (wait < 1e-9).mean() == pytest.approx(1 - busy, abs=0.02)
    assert record.steps == len(record.first)
    assert record.busy.sum() == pytest.approx(step * record.steps)


def test_a_request_alone_takes_its_chunks_and_its_tokens() -> None:
    one = scenario(replicas={"count": 1}, engine={"kv_tokens": 4096, "max_seqs": 8, "step_tokens": 64})
    cost = CostModel(combine="sum", fixed=1e-3, tokens=1e-5, request=0.5)
    record = simulate(one, cost, requests([2.0], [200], [10]))
    assert record.first[0] == pytest.approx(2.0 + 0.5 + 4 * 1e-3 + 200 * 1e-5)  # 200 tokens in chunks of 64
    assert record.gaps == pytest.approx(np.full(9, 1e-3 + 1e-5))
    assert record.last[0] == pytest.approx(record.first[0] + record.gaps.sum())
    assert record.steps == 13 and record.made[0] == 10


def test_where_an_adapter_was_decides_what_its_request_waits_for() -> None:
    one = scenario(replicas={"count": 1}, adapters={"count": 3, "bytes": ["8MiB"]})  # the slab holds one of them
    cost = CostModel(combine="sum", fixed=1e-3, copied_bytes=0.01 / 2**23, cold=1.0)
    record = simulate(one, cost, requests([0.0, 0.5, 3.0, 5.0, 7.0], [10] * 5, [1] * 5, [0, 0, 0, 1, 0]))
    assert record.tier.tolist() == [2, 2, 0, 2, 1]  # the last was evicted by the other, and is compiled still
    step, copy = 0.001, 0.011  # a step that only copies, before the one that runs the prompt
    waited = record.first - record.traffic.time
    assert waited == pytest.approx([1 + copy + step, 0.5 + copy + step, step, 1 + copy + step, copy + step])


def test_the_loader_compiles_one_adapter_after_another() -> None:
    one = scenario(replicas={"count": 1}, adapters={"count": 3, "bytes": ["1MiB"]})
    cost = CostModel(combine="sum", fixed=1e-3, cold=1.0)
    record = simulate(one, cost, requests([0.0, 0.0, 0.0], [10] * 3, [1] * 3, [0, 1, 2]))
    assert record.first == pytest.approx([1.002, 2.002, 3.002])


def test_a_full_queue_refuses_and_a_deadline_ends() -> None:
    one = scenario(
        replicas={"count": 1},
        engine={"kv_tokens": 4096, "max_seqs": 1, "step_tokens": 64, "queue": 3},
        traffic=[stream(deadline=0.5)],
    )
    record = simulate(one, flat(0.1), requests([0.0, 0.01, 0.02, 0.03, 0.04, 0.05], [10] * 6, [4] * 6))
    outcomes = [OUTCOMES[i] for i in record.outcome]
    assert outcomes == ["length", "error", "error", "error", "refused", "refused"]
    assert record.made.tolist()[0] == 4 and record.made.tolist()[4:] == [0, 0]


def test_a_shared_prefix_is_computed_once_for_each_adapter() -> None:
    def hits(shared: int, adapters: list[int]) -> int:
        one = scenario(replicas={"count": 1}, traffic=[stream(adapters={"kind": "zipf"}, shared_prefix=shared)])
        return simulate(one, flat(1e-3), requests([0.0, 5.0], [100, 90], [2, 2], adapters)).prefix_hit_tokens

    assert hits(64, [1, 1]) == 64 and hits(64, [1, 2]) == 0 and hits(0, [1, 1]) == 0


def test_the_same_scenario_gives_the_same_numbers() -> None:
    for routing in ("least_loaded", "adapter_hash", "adapter_affinity"):
        first, again = (run(scenario(replicas={"count": 3, "routing": routing})) for _ in range(2))
        for field in fields(Record):
            if field.name != "traffic":
                a, b = (np.asarray(getattr(record, field.name)) for record in (first, again))
                assert np.array_equal(a, b, equal_nan=True), field.name


def test_adapters_of_many_sizes_wait_no_longer_than_those_of_one() -> None:
    """A slab that is full of unequal adapters opens its holes without moving everything."""

    def slowest(sizes: list[str]) -> float:
        one = scenario(
            requests=3000,
            traffic=[stream(arrivals={"kind": "poisson", "rate": 60.0}, adapters={"kind": "zipf", "exponent": 0.8})],
            adapters={"count": 600, "bytes": sizes, "compiled": True},
            replicas={"count": 1},
            engine={"kv_tokens": 40960, "adapter_memory": "4GiB", "max_seqs": 32, "step_tokens": 512, "queue": 10_000},
        )
        record = run(one)
        return float(np.percentile(record.first - record.traffic.time, 95))

    equal = slowest(["40MiB"])
    assert slowest(["8MiB", "16MiB", "24MiB", "40MiB", "72MiB", "80MiB"]) < 1.3 * equal
    assert slowest(["1MiB", "2MiB", "7MiB", "30MiB", "80MiB", "120MiB"]) < 1.5 * equal


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    arrivals: list[dict[str, Any]] = [
        {"kind": "poisson", "rate": draw(st.sampled_from([20.0, 300.0, 5000.0]))},
        {"kind": "gamma", "rate": 200.0, "variation": 4.0},
        {"kind": "on_off", "rate": 2000.0, "on_seconds": 0.05, "off_seconds": 0.3},
    ]
    adapters = [None, {"kind": "zipf", "base_share": 0.2}, {"kind": "uniform"}]
    streams = [
        stream(
            tenant=f"t{i}",
            arrivals=draw(st.sampled_from(arrivals)),
            adapters=draw(st.sampled_from(adapters)),
            shared_prefix=draw(st.sampled_from([0, 20])),
            deadline=draw(st.sampled_from([None, None, 0.05])),
        )
        for i in range(draw(st.integers(1, 3)))
    ]
    return scenario(
        seed=draw(st.integers(0, 1000)),
        requests=draw(st.integers(1, 150)),
        traffic=streams,
        adapters={"count": 20, "bytes": ["1MiB", "3MiB"], "compiled": draw(st.booleans())},
        replicas={
            "count": draw(st.integers(1, 4)),
            "routing": draw(st.sampled_from(["least_loaded", "adapter_hash", "adapter_affinity"])),
        },
        engine={
            "kv_tokens": draw(st.sampled_from([96, 256, 4096])),
            "adapter_memory": draw(st.sampled_from(["3MiB", "12MiB", "80MiB"])),
            "max_seqs": draw(st.sampled_from([1, 4, 16])),
            "step_tokens": draw(st.sampled_from([16, 128])),
            "chunk_tokens": draw(st.sampled_from([None, 5])),
            "queue": draw(st.sampled_from([4, 1000])),
            "prefix_cache": draw(st.booleans()),
        },
    )


@given(scenarios())
@settings(max_examples=60, deadline=None)
def test_every_request_ends_once_and_every_token_is_counted(some: Scenario) -> None:
    record = run(some)  # asserts itself that no request ends twice, or never
    finished, refused = record.outcome == OUTCOMES.index("length"), record.outcome == OUTCOMES.index("refused")
    assert (record.made[finished] == record.traffic.output[finished]).all()
    assert (record.made <= record.traffic.output).all() and (record.made[refused] == 0).all()
    assert np.isnan(record.first[refused]).all() and not np.isnan(record.last[finished]).any()
    assert (record.first[finished] > record.traffic.time[finished]).all()
    assert len(record.gaps) == np.maximum(record.made - 1, 0).sum() and (record.gaps > 0).all()
    assert ((record.tier < 0) == (record.traffic.adapter < 0)).all()
    if finished.all() and record.preemptions == 0:  # the last token of a prompt counts as the step that samples
        assert record.prefill_tokens + record.prefix_hit_tokens == (record.traffic.prompt - 1).sum()
    if all(one.deadline is None for one in some.traffic) and some.engine.queue > some.requests:
        assert finished.all()
