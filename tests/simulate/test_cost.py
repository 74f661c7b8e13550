from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest
from tests.simulate.scenarios import GIVEN

from lorikeet.engine.plan import Plan, SlotLoad
from lorikeet.engine.residency import AdapterDrop, AdapterMove, Instruction
from lorikeet.simulate.cost import CostModel, StepFeatures, StepMeter, given_model
from lorikeet.simulate.scenario import GivenCost
from lorikeet.types import AdapterCopy, SamplingParams, ScheduledSequence


def copy(handle: int, nbytes: int, start: int, count: int) -> AdapterCopy:
    return AdapterCopy(digest="d", path="p", handle=handle, offset=0, nbytes=nbytes, start=start, count=count)


def plan(sequences: list[ScheduledSequence], loads: dict[int, int], adapters: list[Instruction]) -> Plan:
    return Plan(
        adapters=adapters,
        loads=[SlotLoad(slot, [1], [], handle, SamplingParams(), 0) for slot, handle in loads.items()],
        sequences=sequences,
        token_count=sum(item.count for item in sequences),
        logit_rows=sum(item.samples for item in sequences),
    )


def test_features_are_read_from_plans() -> None:
    meter = StepMeter(max_seqs=4)
    only_copies = meter.measure(plan([], {}, [copy(7, 1000, 0, 600), AdapterMove(3, 512, 0, 64), AdapterDrop(2)]))
    assert only_copies == StepFeatures(0, 0, 0, 0, 0, 0, 0, 0, copied_bytes=664)
    first = meter.measure(
        plan(
            [ScheduledSequence(0, 0, 4, True), ScheduledSequence(1, 10, 3, False), ScheduledSequence(2, 0, 2, True)],
            {0: 7, 1: 7, 2: -1},
            [copy(7, 1000, 600, 400)],
        )
    )
    assert first == StepFeatures(
        tokens=9,
        sequences=3,
        logit_rows=2,
        context=4 + 13 + 2,
        pairs=(1 + 2 + 3 + 4) + (11 + 12 + 13) + (1 + 2),
        adapters=1,
        adapter_bytes=1000,
        adapter_work=7 * 1000,
        copied_bytes=400,
    )
    later = meter.measure(plan([ScheduledSequence(0, 4, 1, True), ScheduledSequence(2, 2, 1, True)], {}, []))
    assert later == StepFeatures(2, 2, 2, 5 + 3, 5 + 3, 1, 1000, 1000, 0)


STEP = StepFeatures(
    tokens=100, sequences=4, logit_rows=3, context=500, pairs=9000, adapters=2, adapter_bytes=10**6, adapter_work=10**8,
    copied_bytes=10**5,
)  # fmt: skip


def test_memory_and_arithmetic_are_summed_or_the_longer_one_counts() -> None:
    model = CostModel(
        combine="sum", fixed=1.0, sequences=0.5, logit_rows=0.25, adapters=2.0, copied_bytes=1e-5,
        weights=3.0, context=0.01, adapter_bytes=1e-6, tokens=0.1, pairs=1e-3, adapter_work=1e-7,
    )  # fmt: skip
    overhead, memory, arithmetic = 1 + 2 + 0.75 + 4 + 1, 3 + 5 + 1, 10 + 9 + 10
    assert model.seconds(STEP) == pytest.approx(overhead + memory + arithmetic)
    assert replace(model, combine="max").seconds(STEP) == pytest.approx(overhead + arithmetic)
    assert replace(model, combine="max", tokens=0, pairs=0, adapter_work=0).seconds(STEP) == pytest.approx(
        overhead + memory
    )
    idle = StepFeatures(0, 0, 0, 0, 0, 0, 0, 0, 10**5)
    assert model.seconds(idle) == pytest.approx(2.0)  # no forward pass, no weights


def test_a_data_sheet_becomes_seconds() -> None:
    given = msgspec.convert(GIVEN | {"sequence": 1e-5, "adapter": 2e-5, "attention_flops": 1e5}, GivenCost)
    memory = (2**30 + 500 * 2**14 + 10**6) / 1e12
    arithmetic = (100 * 2 * 5e8 + 9000 * 1e5 + 10**8) / 1e14
    expected = 1e-3 + 4e-5 + 4e-5 + 10**5 / 1e10 + max(memory, arithmetic)
    assert given_model(given).seconds(STEP) == pytest.approx(expected)
    assert given_model(given).cold_seconds(10**9) == pytest.approx(1.05)
