"""What a step costs: its features, read from a plan, and the model that turns them into seconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from lorikeet.config import parse_size
from lorikeet.engine.plan import Plan
from lorikeet.engine.residency import AdapterMove
from lorikeet.simulate.scenario import GivenCost
from lorikeet.types import AdapterCopy


class StepFeatures(NamedTuple):
    """What a step's time depends on. A pair is one query token and one key it attends to."""

    tokens: int
    sequences: int
    logit_rows: int
    context: int  # tokens whose keys and values are read, over all sequences
    pairs: int
    adapters: int  # distinct ones
    adapter_bytes: int  # of the distinct ones
    adapter_work: int  # tokens x bytes of the adapter that acts on them
    copied_bytes: int  # into the slab or within it


class StepMeter:
    """Reads the features of every plan of one scheduler, in order."""

    def __init__(self, max_seqs: int) -> None:
        self._handle = [-1] * max_seqs  # by slot
        self._bytes: dict[int, int] = {}  # by handle

    def measure(self, plan: Plan) -> StepFeatures:
        copied = 0
        for instruction in plan.adapters:
            if isinstance(instruction, AdapterCopy):
                copied += instruction.count
                self._bytes[instruction.handle] = instruction.nbytes
            elif isinstance(instruction, AdapterMove):
                copied += instruction.nbytes
        handles, sizes = self._handle, self._bytes
        for load in plan.loads:
            handles[load.slot] = load.handle
        context = pairs = work = 0
        distinct = set()
        for item in plan.sequences:
            count, start = item.count, item.start
            context += start + count
            pairs += count * start + count * (count + 1) // 2
            handle = handles[item.slot]
            if handle >= 0:
                distinct.add(handle)
                work += count * sizes[handle]
        read = sum([sizes[handle] for handle in distinct])
        return StepFeatures(
            plan.token_count, len(plan.sequences), plan.logit_rows, context, pairs, len(distinct), read, work, copied
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """Seconds of a step: the overhead, plus the memory's and the arithmetic's time, summed or the longer of the two
    (the roofline model: Williams et al. 2009). All but `combine` are seconds for one of what they are named after.
    """

    combine: Literal["sum", "max"]
    # overhead
    fixed: float
    sequences: float = 0.0
    logit_rows: float = 0.0
    adapters: float = 0.0
    copied_bytes: float = 0.0
    # memory
    weights: float = 0.0  # the base, once a step
    context: float = 0.0
    adapter_bytes: float = 0.0
    # arithmetic
    tokens: float = 0.0
    pairs: float = 0.0
    adapter_work: float = 0.0
    # outside of steps
    cold: float = 0.0
    cold_bytes: float = 0.0
    request: float = 0.0

    def seconds(self, f: StepFeatures) -> float:
        """Of one step."""
        overhead = (
            self.fixed
            + self.sequences * f.sequences
            + self.logit_rows * f.logit_rows
            + self.adapters * f.adapters
            + self.copied_bytes * f.copied_bytes
        )
        if not f.tokens:
            return overhead
        memory = self.weights + self.context * f.context + self.adapter_bytes * f.adapter_bytes
        arithmetic = self.tokens * f.tokens + self.pairs * f.pairs + self.adapter_work * f.adapter_work
        return overhead + (memory + arithmetic if self.combine == "sum" else max(memory, arithmetic))

    def cold_seconds(self, nbytes: int) -> float:
        """Of the loader, from the first request for an adapter until it is compiled on the replica's disk."""
        return self.cold + self.cold_bytes * nbytes


def given_model(given: GivenCost) -> CostModel:
    """The model of a device by its data sheet."""
    weights = parse_size(given.weights, "cost.weights")
    kv_token = parse_size(given.kv_token_bytes, "cost.kv_token_bytes")
    return CostModel(
        combine="max",
        fixed=given.fixed,
        sequences=given.sequence,
        adapters=given.adapter,
        copied_bytes=1 / given.copy_bandwidth,
        weights=weights / given.bandwidth,
        context=kv_token / given.bandwidth,
        adapter_bytes=1 / given.bandwidth,
        tokens=2 * given.parameters / given.flops,
        pairs=given.attention_flops / given.flops,
        adapter_work=1 / given.flops,
        cold=given.cold,
        cold_bytes=0.0 if given.cold_bandwidth is None else 1 / given.cold_bandwidth,
        request=given.request,
    )
