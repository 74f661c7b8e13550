"""The simulated time: arrivals, deliveries and ends of steps, in the order in which they happen."""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from lorikeet.engine.blocks import root_key
from lorikeet.engine.request import Sequence
from lorikeet.errors import OverloadedError
from lorikeet.simulate.cost import CostModel
from lorikeet.simulate.replica import TIERS, Replica
from lorikeet.simulate.routing import make_router
from lorikeet.simulate.scenario import Scenario
from lorikeet.simulate.traffic import BASE, Floats, Ints, Traffic, draw_traffic
from lorikeet.types import AdapterInfo, Event, Request, SamplingParams

OUTCOMES = ("length", "error", "refused")
SAMPLES = 400  # of the gauges, from the first to the last arrival
SETTLED = 0.9  # fairness is judged by the requests of this first part of the time of arrivals
_NOTHING: frozenset[int] = frozenset()


@dataclass(slots=True)
class Record:
    """What became of every request, arrays [requests] (times in seconds, NaN is never)."""

    traffic: Traffic
    first: Floats  # time of the first token
    last: Floats  # of the last one
    made: Ints  # tokens
    outcome: Ints  # index in OUTCOMES
    tier: Ints  # index in TIERS of where the adapter was at the arrival; -1 for the base
    served: Ints  # tokens of prompt and output by the time of the last arrival
    gaps: Floats  # seconds between tokens of one sequence, [gaps]
    gauges: Floats  # time, running, waiting, tokens made so far, [samples, 4]
    steps: int
    sequence_steps: int
    busy: Floats  # seconds in steps, by replica
    preemptions: int
    prefix_hit_tokens: int
    prefill_tokens: int


@dataclass(slots=True)
class _Log:
    """Lists that events are written to, turned into arrays at the end."""

    first: list[float]
    last: list[float]
    made: list[int]
    outcome: list[int]
    tier: list[int]
    replica: list[int]
    served: Ints | None = None
    gaps: array[float] = field(default_factory=lambda: array("d"))
    gauges: list[tuple[float, int, int, int]] = field(default_factory=list)


def simulate(scenario: Scenario, cost: CostModel, traffic: Traffic | None = None) -> Record:
    """Run a scenario to its end: until every request has its final event. `traffic` is drawn unless it is given."""
    return _Simulation(scenario, cost, draw_traffic(scenario) if traffic is None else traffic).run()


class _Simulation:
    def __init__(self, scenario: Scenario, cost: CostModel, traffic: Traffic) -> None:
        self._scenario, self._cost, self._traffic = scenario, cost, traffic
        self._replicas = [Replica(scenario.engine, cost) for _ in range(scenario.replicas.count)]
        self._route = make_router(scenario.replicas, self._replicas)
        self._adapters: dict[int, AdapterInfo] = {}
        self._sizes = scenario.adapter_bytes
        self._roots = [root_key("", stream.tenant) for stream in scenario.traffic]
        # (time, order, replica, request); request -1 is the end of a step
        self._calendar: list[tuple[float, int, int, int]] = []
        self._order = self._delivered = 0
        count = len(traffic)
        self._log = _Log([-1.0] * count, [-1.0] * count, [0] * count, [-1] * count, [-1] * count, [-1] * count)
        self._time, self._adapter = traffic.time.tolist(), traffic.adapter.tolist()
        self._stream, self._prompt = traffic.stream.tolist(), traffic.prompt.tolist()
        self._output = traffic.output.tolist()
        self._sample_every = max(self._time[-1] / SAMPLES, 1e-6)
        self._next_sample = 0.0

    def run(self) -> Record:
        times, calendar, count = self._time, self._calendar, len(self._traffic)
        arrived = 0
        while arrived < count or calendar:
            if arrived < count and (not calendar or times[arrived] <= calendar[0][0]):
                now = times[arrived]
                self._arrive(arrived, now)
                arrived += 1
                if arrived == count:
                    self._log.served = self._served()
            else:
                now, _, index, request = heapq.heappop(calendar)
                replica = self._replicas[index]
                if request < 0:
                    self._take(replica.end(now), now)
                else:
                    self._deliver(request, index, now)
                if not replica.stepping:
                    end = replica.begin(now)
                    if end is not None:
                        self._plan(end, index, -1)
            if now >= self._next_sample:
                self._sample(now)
        return self._record()

    def _plan(self, time: float, replica: int, request: int) -> None:
        self._order += 1
        heapq.heappush(self._calendar, (time, self._order, replica, request))

    def _info(self, number: int) -> AdapterInfo:
        info = self._adapters.get(number)
        if info is None:
            name = f"adapter-{number}"
            nbytes = self._sizes[number % len(self._sizes)]
            info = self._adapters[number] = AdapterInfo(digest=name, path=name, nbytes=nbytes, max_rank=0, sites=0)
        return info

    def _arrive(self, request: int, now: float) -> None:
        number = self._adapter[request]
        info = None if number == BASE else self._info(number)
        index = self._route(None if info is None else info.digest)
        replica = self._replicas[index]
        replica.in_flight += 1
        self._log.replica[request] = index
        ready = now
        if info is not None:
            tier, ready = replica.fetch(info, now, self._scenario.adapters.compiled)
            self._log.tier[request] = TIERS.index(tier)
        self._plan(ready + self._cost.request, index, request)

    def _deliver(self, request: int, index: int, now: float) -> None:
        self._delivered += 1
        number, stream = self._adapter[request], self._scenario.traffic[self._stream[request]]
        info = None if number == BASE else self._info(number)
        prompt, output = self._prompt[request], self._output[request]
        shared = min(stream.shared_prefix, prompt - 1)
        own = -1 - request * 2**24  # token ids that no other request has; what is shared has small ones
        sequence = Sequence(
            request=Request(
                request_id=str(request),
                tokens=[*range(shared), *range(own, own - (prompt - shared), -1)],
                sampling=SamplingParams(max_tokens=output),
                adapter=None if info is None else info.digest,
                tenant=stream.tenant,
                deadline=None if stream.deadline is None else self._time[request] + stream.deadline,
            ),
            arrival=self._delivered,
            seed=0,
            limit=prompt + output,
            stop_ids=_NOTHING,
            root=self._roots[self._stream[request]],
        )
        try:
            self._replicas[index].add(sequence, info, now)
        except OverloadedError:
            self._end(request, "refused")

    def _take(self, events: Iterable[Event], now: float) -> None:
        log = self._log
        last, made, gaps = log.last, log.made, log.gaps
        for event in events:
            request = int(event.request_id)
            if event.tokens:
                before = last[request]
                if before < 0:
                    log.first[request] = now
                else:
                    gaps.append(now - before)
                last[request] = now
                made[request] += len(event.tokens)
            if event.finish is not None:
                self._end(request, event.finish)

    def _end(self, request: int, outcome: str) -> None:
        assert self._log.outcome[request] == -1, f"request {request} ended twice"
        self._log.outcome[request] = OUTCOMES.index(outcome)
        self._replicas[self._log.replica[request]].in_flight -= 1

    def _served(self) -> Ints:
        started = np.array(self._log.first) >= 0
        return np.array(self._log.made) + np.where(started, self._traffic.prompt, 0)

    def _sample(self, now: float) -> None:
        schedulers = [replica.scheduler for replica in self._replicas]
        running = sum(len(scheduler.running) for scheduler in schedulers)
        waiting = sum(replica.in_flight for replica in self._replicas) - running
        self._log.gauges.append((now, running, waiting, sum(scheduler.decode_tokens for scheduler in schedulers)))
        self._next_sample = now + self._sample_every

    def _record(self) -> Record:
        log, schedulers = self._log, [replica.scheduler for replica in self._replicas]
        first, last = np.array(log.first), np.array(log.last)
        assert log.served is not None and -1 not in log.outcome, "a request has no final event"
        return Record(
            traffic=self._traffic,
            first=np.where(first < 0, np.nan, first),
            last=np.where(last < 0, np.nan, last),
            made=np.array(log.made),
            outcome=np.array(log.outcome),
            tier=np.array(log.tier),
            served=log.served,
            gaps=np.frombuffer(log.gaps, np.float64) if log.gaps else np.zeros(0),
            gauges=np.array(log.gauges, np.float64),
            steps=sum(replica.steps for replica in self._replicas),
            sequence_steps=sum(replica.sequence_steps for replica in self._replicas),
            busy=np.array([replica.busy for replica in self._replicas]),
            preemptions=sum(scheduler.preemptions for scheduler in schedulers),
            prefix_hit_tokens=sum(scheduler.prefix_hit_tokens for scheduler in schedulers),
            prefill_tokens=sum(scheduler.prefill_tokens for scheduler in schedulers),
        )
