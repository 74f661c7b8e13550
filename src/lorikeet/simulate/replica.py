"""One simulated engine: the very scheduler, blocks and residency of `lorikeet serve`, a cost model for a runner."""

from __future__ import annotations

from typing import Literal

from lorikeet.config import parse_size
from lorikeet.engine.blocks import BlockPool
from lorikeet.engine.plan import Outcome, Plan
from lorikeet.engine.request import Sequence
from lorikeet.engine.residency import Place, Residency
from lorikeet.engine.scheduler import Scheduler
from lorikeet.simulate.cost import CostModel, StepMeter
from lorikeet.simulate.scenario import EngineLimits
from lorikeet.types import AdapterInfo, Event

Tier = Literal["resident", "disk", "cold"]
TIERS: tuple[Tier, ...] = ("resident", "disk", "cold")
ANY_TOKEN = 1


class _AnyTokens(dict[int, int]):
    """What every slot has sampled, whichever they are."""

    def __missing__(self, slot: int) -> int:
        return ANY_TOKEN


_SAMPLED = Outcome(tokens=_AnyTokens())


class Replica:
    """Steps begin and end at the times that its caller, who keeps the calendar, says."""

    def __init__(self, limits: EngineLimits, cost: CostModel) -> None:
        self._cost = cost
        self._now = 0.0
        self.residency = Residency(parse_size(limits.adapter_memory, "engine.adapter_memory"), clock=lambda: self._now)
        self.scheduler = Scheduler(
            BlockPool(limits.kv_tokens // limits.block_size),
            self.residency,
            block_size=limits.block_size,
            max_seqs=limits.max_seqs,
            step_tokens=limits.step_tokens,
            chunk_tokens=limits.chunk_tokens,
            logit_rows=limits.max_seqs + 1,  # nobody asks for the logprobs of prompts
            queue=limits.queue,
            prefix_cache=limits.prefix_cache,
        )
        self._meter = StepMeter(limits.max_seqs)
        self._plan: Plan | None = None
        self._compiled: dict[str, float] = {}  # when the loader has an adapter ready, those that it still works on
        self._loader_free = 0.0
        self.in_flight = 0  # requests that were sent here and have not ended
        self.steps = 0
        self.busy = 0.0  # seconds in steps
        self.sequence_steps = 0

    @property
    def stepping(self) -> bool:
        return self._plan is not None

    def fetch(self, adapter: AdapterInfo, now: float, compiled: bool) -> tuple[Tier, float]:
        """Where a request finds its adapter, and when the replica can take the request. The loader compiles one
        adapter after another; `compiled`: it is on the disk though it was never used."""
        if self.residency.knows(adapter.digest):
            resident = self.residency.place(adapter.digest) is Place.RESIDENT
            return ("resident" if resident else "disk"), now
        if compiled:
            self.residency.register(adapter)
            return "disk", now
        ready = self._compiled.get(adapter.digest)
        if ready is None:
            ready = max(now, self._loader_free) + self._cost.cold_seconds(adapter.nbytes)
            self._loader_free = self._compiled[adapter.digest] = ready
        return "cold", ready

    def add(self, sequence: Sequence, adapter: AdapterInfo | None, now: float) -> None:
        """Take a request. Raises OverloadedError when the queue is full."""
        self._now = now
        if adapter is not None and not self.residency.knows(adapter.digest):
            self.residency.register(adapter)
            self._compiled.pop(adapter.digest, None)
        self.scheduler.add(sequence, now)

    def begin(self, now: float) -> float | None:
        """Begin a step if there is something to do: the time when it ends."""
        if not self.scheduler.has_work:
            return None
        self._now = now
        plan = self._plan = self.scheduler.schedule(now)
        seconds = self._cost.seconds(self._meter.measure(plan))
        self.steps += 1
        self.sequence_steps += len(plan.sequences)
        self.busy += seconds
        return now + seconds

    def end(self, now: float) -> list[Event]:
        """End the step; its events."""
        assert self._plan is not None
        self._now = now
        plan, self._plan = self._plan, None
        return self.scheduler.update(plan, _SAMPLED)
