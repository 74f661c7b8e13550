"""What do thousands of adapters cost when only some of them fit into memory?

Zipf(1.0) requests over all adapters of the embedded base, one server for each budget of resident adapters, in turns.
First the capacity of each (closed loop); then, for each, the same trace of Poisson arrivals at 70% of the capacity with
all resident (open loop). Then single requests to adapters that nobody has seen. The last line is JSON.
"""

from __future__ import annotations

import statistics
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from load import Ask, Clients, Json
from open_loop import Prompts, flags, last_line, measured, percentiles, prepared
from ours import ServerSide, Setup
from shapes import evict, fixture, make_adapter
from worker import progress

EXAMPLES = """examples:
  python benchmarks/many_adapters.py                                       5,000 adapters, 100%, 10% and 1% resident
  python benchmarks/many_adapters.py --adapters 200 --requests 300         a short one
  python benchmarks/many_adapters.py --resident 0.05 --load 0.9            one budget, more traffic
"""
COLD_RANK, COLD_BARS, CAPACITY_BAR, TAIL_BAR = 16, (0.050, 0.200), 0.6, 1.3


class Traffic(Prompts):
    """Requests on adapters of Zipf(1.0): adapter k in proportion to 1 / (k + 1)."""

    def __init__(self, options: Namespace, vocabulary: int) -> None:
        super().__init__(options, vocabulary)
        self._weights = 1 / np.arange(1, options.adapters + 1)
        self._weights /= self._weights.sum()

    def clients(self, count: int, rounds: int) -> Clients:
        """A closed loop."""
        chosen = self.draw.choice(len(self._weights), (count, rounds), p=self._weights)
        return [[Ask(self.prompt(), int(adapter)) for adapter in row] for row in chosen]

    def arrivals(self, count: int, rate: float) -> list[tuple[float, list[int], int]]:
        """(seconds from the start, prompt, adapter): Poisson at `rate` requests a second."""
        times = np.cumsum(self.draw.exponential(1 / rate, count))
        chosen = self.draw.choice(len(self._weights), count, p=self._weights)
        return [(float(at), self.prompt(), int(adapter)) for at, adapter in zip(times, chosen, strict=True)]


def touch(side: ServerSide, adapters: int, traffic: Traffic, clients: int) -> None:
    """Every adapter once, the rarest first: compiled, known to the engine, and the common ones resident at the end."""
    rounds = -(-adapters // clients)
    order = [max(adapters - 1 - i, 0) for i in range(rounds * clients)]  # equally many for each client
    side.run([[Ask(traffic.prompt(), i) for i in order[c::clients]] for c in range(clients)], 1)
    side.run(traffic.clients(clients, 2), 2)


def capacity(side: ServerSide, traffic: Traffic, options: Namespace) -> float:
    """Requests a second with `--clients` that never wait between two."""
    rounds = max(options.requests // options.clients, 1)
    sample = side.run(traffic.clients(options.clients, rounds), options.new)
    return options.clients * rounds / float(sample["seconds"])


def play(side: ServerSide, arrivals: list[tuple[float, list[int], int]], options: Namespace) -> Json:
    """The open loop: what clients measured, and which requests were on adapters that stay resident at every budget."""
    sent = [(at, prompt, {"model": side.names[adapter]}) for at, prompt, adapter in arrivals]
    said = side.clients.ask("open_loop", arrivals=sent, new=options.new)
    head = max(int(min(options.resident) * options.adapters) // 4, 1)
    common = np.array([adapter < head for _, _, adapter in arrivals])
    first = measured(said["first"])
    return {
        "errors": said["errors"], "ttft_": first, "common_ttft_": first[common], "latency_": measured(said["last"]),
        "late_": measured(said["late"]),
    }  # fmt: skip


@contextmanager
def servers(setup: Setup, options: Namespace) -> Iterator[dict[float, ServerSide]]:
    """One for each budget, the largest first. Those that nobody asks anything take no time from the others."""
    each, started = max(setup.adapter_bytes()), {}
    with ExitStack() as stack:
        for share in sorted(options.resident, reverse=True):
            served = setup.folder / f"{share:g}" / "served"
            served.mkdir(parents=True)
            budget = int(share * options.adapters * (each + 4096)) + 2**20
            settings = {**setup.settings, "adapter_memory": budget}
            started[share] = ServerSide(replace(setup, settings=settings, spare=served))
            stack.callback(started[share].close)
        yield started


def measure(setup: Setup, options: Namespace) -> Json:
    """All budgets beside each other: in each repeat one has its turn after another."""
    traffic, turns = Traffic(options, setup.fixture.spec.vocab_size), range(options.repeats)
    with servers(setup, options) as sides:
        for share, side in sides.items():
            began = time.perf_counter()
            touch(side, options.adapters, traffic, options.clients)
            progress(f"{share:.0%} resident: every adapter once in {time.perf_counter() - began:.0f} s")
        most: dict[float, list[float]] = {share: [] for share in sides}
        for _ in turns:
            for share, side in sides.items():
                most[share].append(capacity(side, traffic, options))
            progress("requests/s at most: " + ", ".join(f"{s:.0%} {of[-1]:.1f}" for s, of in most.items()))
        rate = options.load * statistics.median(most[max(most)])
        plays: dict[float, list[Json]] = {share: [] for share in sides}
        for _ in turns:
            arrivals = traffic.arrivals(options.requests, rate)
            for share, side in sides.items():
                plays[share].append(play(side, arrivals, options))
            tails = (f"{s:.0%} {np.nanpercentile(of[-1]['common_ttft_'], 99):.3f}" for s, of in plays.items())
            progress(f"at {rate:.1f} requests/s p99 to the first token of common adapters, s: " + ", ".join(tails))
        found = {
            share: summary(plays[share]) | {"capacity": most[share], "memory": side.memory()}
            for share, side in sides.items()
        }
    return {"rate": rate, "adapter_bytes": max(setup.adapter_bytes()), "budgets": found}


def summary(plays: list[Json]) -> Json:
    """Of all repeats together; of the requests on common adapters also one by one."""
    errors = [error for one in plays for error in one["errors"]]
    result = {"failed": len(errors), "errors": sorted(set(errors))[:3]}
    for name in ("ttft_", "common_ttft_", "latency_"):
        result |= percentiles(name, np.concatenate([one[name] for one in plays]))
    result |= percentiles("late_", np.concatenate([one["late_"] for one in plays]), (99,))
    result["common_ttft_p99_each"] = [float(np.nanpercentile(one["common_ttft_"], 99)) for one in plays]
    return result


def cold(setup: Setup, options: Namespace) -> Json:
    """Seconds to the first token of adapters that nobody has seen, one after another, files out of the page cache."""
    draw, traffic = np.random.default_rng(9), Traffic(options, setup.fixture.spec.vocab_size)
    side = ServerSide(replace(setup, adapters=setup.adapters[:1]))
    folders = [setup.spare / f"unseen-{i}" for i in range(options.cold)]
    for folder in folders:
        make_adapter(setup.fixture.spec, folder, COLD_RANK, seed=int(draw.integers(2**31)))
        evict(folder)
    try:
        side.run([[Ask(traffic.prompt(), 0)]], 1)
        time.sleep(1.1)  # the server looks for new names once a second
        bodies = [[[traffic.prompt(), {"model": folder.name}]] for folder in folders]
        seconds = [float(side.clients.ask("run", clients=[body], new=1)["ttft_p50"]) for body in bodies]
    finally:
        side.close()
    return percentiles("", measured(seconds))


def median_ratio(some: list[float], others: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(some, others, strict=True))


def verdicts(result: Json) -> list[tuple[str, float, float, bool]]:
    """(what, value, bar, whether it holds)."""
    budgets: dict[float, Any] = result["budgets"]
    most, least = budgets[max(budgets)], budgets[min(budgets)]
    found = [
        ("failed requests", float(sum(one["failed"] for one in budgets.values())), 0.0, False),
        ("capacity, least resident / all", median_ratio(least["capacity"], most["capacity"]), CAPACITY_BAR, True),
        ("p99 to first token of common adapters, least / all",
         median_ratio(least["common_ttft_p99_each"], most["common_ttft_p99_each"]), TAIL_BAR, False),
    ]  # fmt: skip
    if "cold" in result:
        found += [(f"unseen adapter to first token, {p}", result["cold"][p], bar, False)
                  for p, bar in zip(("p50", "p99"), COLD_BARS, strict=True)]  # fmt: skip
    return [(what, value, bar, value >= bar if at_least else value <= bar) for what, value, bar, at_least in found]


def arguments() -> Namespace:
    parser = flags(__doc__, EXAMPLES, shape="nano", clients=32, prompt=32, new=16)
    add = parser.add_argument
    add("--adapters", type=int, default=5000)
    add("--rank", type=int, default=8)
    add("--resident", nargs="+", type=float, default=[1.0, 0.1, 0.01], help="shares of them that fit into memory")
    add("--load", type=float, default=0.7, help="of the capacity with all resident")
    add("--requests", type=int, default=2000, help="of each measurement")
    add("--repeats", type=int, default=5, help="of each, in turns")
    add("--cold", type=int, default=100, help="unseen adapters of rank 16; 0: none")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    made = fixture(options.shape, options.cache)
    progress(f"{options.adapters} adapters in {made.root}")
    with prepared(options, made, [options.rank] * options.adapters, options.clients) as served:
        result = measure(served, options)
        if options.cold:
            result["cold"] = cold(served, options)
    for what, value, bar, holds in verdicts(result):
        print(f"{what:52} {value:8.3f}  bar {bar:g}  {'holds' if holds else 'MISSED'}")
    last_line("many_adapters", options, result)


if __name__ == "__main__":
    main()
